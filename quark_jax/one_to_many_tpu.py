"""One-to-many attention on a TPU: a Pallas kernel that gathers what it attends to (Eq. 5-8).

A tile of a layer stays on the chip while the views go by: each view's update features are sampled
at the elements' projections (`lane_gather`), multiplied with the folded queries and taken into a
running softmax. Delta [v, n, l, y, x, c] is never written to memory, not even a layer of it.
Channels are planes and elements lie along rows and lanes, so that 32 channels do not leave three
quarters of 128 lanes empty, as they do in arrays that end in channels.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nvs_common.types import Array
from quark_jax import lane_gather, one_to_many

# Rows and columns of a tile of a layer, and of the window of a view that is on the chip.
TILE = (16, 256)
WINDOW = (32, 384)


class _Scratch(NamedTuple):
    """A softmax over the views so far; planes have the size of the tile."""

    highest: Any  # [a]
    total: Any  # [a]
    gather: lane_gather.Scratch


def attend(
    query: Array,
    delta: one_to_many.Unstored,
    valid: Array,
    scale: float,
    *,
    interpret: Any = False,
) -> Array:
    """`one_to_many.attend_unstored` in one kernel.

    The backward pass is that of the plain form: the gradient of a gather adds to arbitrary pixels,
    and lanes can fetch from each other but not add to each other.

    Raises:
      NotImplementedError: other types than float32.
    """
    if query.dtype != jnp.float32 or delta.features.dtype != jnp.float32:
        raise NotImplementedError(
            f"one-to-many attention on a TPU: for float32, not {query.dtype} and "
            f"{delta.features.dtype}"
        )

    forward = functools.partial(_attend, scale=scale, interpret=interpret)
    return one_to_many.with_plain_backward(forward, scale)(query, *delta, valid)


def _attend(
    query: Array, features: Array, uv: Array, takes_part: Array, *, scale: float, interpret: Any
) -> Array:
    """Of one map: query [l, y, x, a, c], features [v, y, x, c], uv [v, l, y, x, 2]."""
    layers, y, x, heads, channels = query.shape
    tile = (
        min(TILE[0], y + -y % lane_gather.ROWS),
        min(TILE[1], x + -x % lane_gather.LANES),
    )
    edges = ((0, -y % tile[0]), (0, -x % tile[1]))
    padded = lambda planes: jnp.pad(planes, [(0, 0)] * (planes.ndim - 2) + [*edges])  # noqa: E731
    sources = lane_gather.views(features)
    planes = padded(jnp.moveaxis(query, (3, 4), (0, 1))) * scale
    rows, columns = planes.shape[-2:]
    vmem = lambda *lead: pltpu.VMEM((*lead, *tile), jnp.float32)  # noqa: E731
    gather = lane_gather.scratch_shapes(tile, sources, WINDOW)
    scratch = _Scratch(vmem(heads), vmem(heads), gather)
    of_element = pl.BlockSpec((heads, channels, None, *tile), lambda l, i, j, v: (0, 0, l, i, j))
    of_view = pl.BlockSpec((None, None, *tile), lambda l, i, j, v: (v, l, i, j))
    looks = layers * rows * columns * len(features)
    cost = lane_gather.cost(layers * rows * columns, sources, tile, WINDOW)
    mixed = pl.pallas_call(
        functools.partial(_kernel, sources),
        grid=(layers, rows // tile[0], columns // tile[1], len(features)),
        in_specs=[of_element, of_view, of_view, of_view, pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=of_element,
        out_shape=jax.ShapeDtypeStruct(planes.shape, jnp.float32),
        scratch_shapes=[scratch],
        cost_estimate=pl.CostEstimate(
            flops=cost.flops + 5 * looks * heads * channels,
            bytes_accessed=cost.bytes_accessed + 4 * (2 * planes.size + 3 * looks),
            transcendentals=2 * looks * heads,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=48 * 2**20,
        ),
        interpret=interpret,
        name="one_to_many",
    )(
        planes,
        padded(uv[..., 0] * sources.width - 0.5),
        padded(uv[..., 1] * sources.height - 0.5),
        padded(takes_part.astype(jnp.float32)),
        sources.planes,
    )
    return jnp.moveaxis(mixed[..., :y, :x], (0, 1), (3, 4))


def _kernel(
    sources: lane_gather.Views,
    query_ref,
    x_ref,
    y_ref,
    takes_part_ref,
    features_ref,
    mixed_ref,
    scratch: _Scratch,
):
    """Takes one view into the softmax of one tile; the result is kept where it will be written."""
    view, gather = pl.program_id(3), scratch.gather
    heads, channels = query_ref.shape[:2]

    @pl.when(view == 0)
    def _():
        scratch.highest[...] = jnp.full_like(scratch.highest, -jnp.inf)
        scratch.total[...] = jnp.zeros_like(scratch.total)
        mixed_ref[...] = jnp.zeros_like(mixed_ref)

    gather.x[...], gather.y[...] = x_ref[...], y_ref[...]
    lane_gather.sample(sources._replace(planes=features_ref), view, gather)
    last = view == pl.num_programs(3) - 1
    for head in range(heads):

        def multiply(c: Array, logit: Array, head: int = head) -> Array:
            return logit + query_ref[head, c] * gather.sample[c]

        logit = jax.lax.fori_loop(0, channels, multiply, jnp.zeros(x_ref.shape, jnp.float32))
        logit = jnp.where(takes_part_ref[...] > 0, logit, one_to_many.LEFT_OUT)
        highest = jnp.maximum(scratch.highest[head], logit)
        shrink = jnp.exp(scratch.highest[head] - highest)
        power = jnp.exp(logit - highest)
        total = scratch.total[head] * shrink + power
        scratch.highest[head], scratch.total[head] = highest, total
        # The last view also divides by the sum of all.
        divided = jnp.where(last, 1 / total, jnp.ones_like(total))
        old, new = shrink * divided, power * divided

        def mix(c: Array, _: None, head: int = head, old=old, new=new) -> None:
            mixed_ref[head, c] = mixed_ref[head, c] * old + gather.sample[c] * new

        jax.lax.fori_loop(0, channels, mix, None)
