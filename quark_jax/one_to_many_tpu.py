"""One-to-many attention on a TPU: Pallas kernels that gather what they attend to (Eq. 5-8).

A tile of a layer stays on the chip while the views go by: each view's update features are sampled
at the elements' projections (`lane_gather`), multiplied with the folded queries and taken into a
running softmax. Delta [v, n, l, y, x, c] is never written to memory, not even a layer of it.
Channels are planes and elements lie along rows and lanes, so that 32 channels do not leave three
quarters of 128 lanes empty, as they do in arrays that end in channels.

The backward pass, `one_to_many_tpu_backward`, walks the same way: Delta's gradient is never written
either. Both passes are exact to float32 and sum in the order of the grid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nvs_common.types import Array
from quark_jax import lane_gather, layer_tiles, one_to_many, one_to_many_tpu_backward

# Rows and columns of a tile of a layer, and of the window of a view that is on the chip.
TILE = (16, 256)
WINDOW = (32, 384)


class _Saved(NamedTuple):
    """What the backward pass takes from the forward pass."""

    query: Array  # [n, l, y, x, a, c]
    features: Array  # [v, n, y, x, c]
    uv: Array  # [v, n, l, y, x, 2]
    takes_part: Array  # [v, n, l, y, x]
    mixed: Array  # [n, l, y, x, a, c] the result
    log_total: Array  # [n, a, l, rows, columns] of all tiles


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
    """`one_to_many.attend_unstored` in one kernel, and its gradients in another.

    Raises:
      NotImplementedError: other types than float32.
    """
    if query.dtype != jnp.float32 or delta.features.dtype != jnp.float32:
        raise NotImplementedError(
            f"one-to-many attention on a TPU: for float32, not {query.dtype} and "
            f"{delta.features.dtype}"
        )
    options: dict[str, Any] = dict(scale=scale, interpret=interpret)
    attend_maps = _over_maps(functools.partial(_attend, **options))
    differentiate_maps = _over_maps(functools.partial(_differentiate, **options))

    @jax.custom_vjp
    def fused(query: Array, features: Array, uv: Array, valid: Array) -> Array:
        return forward(query, features, uv, valid)[0]

    def forward(query: Array, features: Array, uv: Array, valid: Array) -> tuple[Array, _Saved]:
        takes_part = one_to_many.masked(valid)
        mixed, log_total = attend_maps((query,), (features, uv, takes_part))
        return mixed, _Saved(query, features, uv, takes_part, mixed, log_total)

    def backward(saved: _Saved, cotangent: Array) -> tuple[Any, ...]:
        of_maps = (saved.query, cotangent, saved.mixed, saved.log_total)
        of_views = (saved.features, saved.uv, saved.takes_part)
        to_query, to_features, to_uv = differentiate_maps(of_maps, of_views)
        return to_query, jnp.moveaxis(to_features, 0, 1), jnp.moveaxis(to_uv, 0, 1), None

    fused.defvjp(forward, backward)
    return fused(query, *delta, valid)


def _over_maps(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls function for one map after the other, of arrays [n, ...] and arrays [v, n, ...].

    Kernels address memory by themselves and know of no batch, nor does `jax.vmap` make one.
    """

    @jax.custom_batching.sequential_vmap
    def run(of_maps: tuple[Array, ...], of_views: tuple[Array, ...]) -> Any:
        maps_first = tuple(jnp.moveaxis(x, 1, 0) for x in of_views)
        return jax.lax.map(lambda xs: function(*xs), (*of_maps, *maps_first))

    return run


def _attend(
    query: Array, features: Array, uv: Array, takes_part: Array, *, scale: float, interpret: Any
) -> tuple[Array, Array]:
    """Of one map: query [l, y, x, a, c], features [v, y, x, c], uv [v, l, y, x, 2].

    Returns:
      [l, y, x, a, c], and the logarithm of the softmax's sums [a, l, rows, columns].
    """
    heads, channels = query.shape[3:]
    tiles = layer_tiles.divide(query, len(features), tile=TILE, window=WINDOW)
    sources, looks = lane_gather.views(features), tiles.elements * tiles.views
    planes = tiles.planes(query) * scale
    vmem = lambda *lead: pltpu.VMEM((*lead, *tiles.tile), jnp.float32)  # noqa: E731
    gather = lane_gather.scratch_shapes(tiles.tile, sources, tiles.window)
    cost = lane_gather.cost(tiles.elements, sources, tiles.tile, tiles.window)
    sums = jax.ShapeDtypeStruct((heads, *planes.shape[2:]), jnp.float32)
    mixed, log_total = pl.pallas_call(
        functools.partial(_kernel, sources),
        grid=tiles.grid,
        in_specs=[
            tiles.of_element(heads, channels),
            *[tiles.of_view()] * 3,
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[tiles.of_element(heads, channels), tiles.of_element(heads)],
        out_shape=[jax.ShapeDtypeStruct(planes.shape, jnp.float32), sums],
        scratch_shapes=[_Scratch(vmem(heads), vmem(heads), gather)],
        cost_estimate=pl.CostEstimate(
            flops=cost.flops + 5 * looks * heads * channels,
            bytes_accessed=cost.bytes_accessed + 4 * (2 * planes.size + sums.size + 3 * looks),
            transcendentals=2 * looks * heads,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=48 * 2**20,
        ),
        interpret=interpret,
        name="one_to_many",
    )(planes, *tiles.looks(uv, takes_part, sources), sources.planes)
    return tiles.vectors(mixed), log_total


def _kernel(
    sources: lane_gather.Views,
    query_ref,
    x_ref,
    y_ref,
    takes_part_ref,
    features_ref,
    mixed_ref,
    log_total_ref,
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

    @pl.when(last)
    def _():
        log_total_ref[...] = scratch.highest[...] + jnp.log(scratch.total[...])


def _differentiate(
    query: Array,
    cotangent: Array,
    mixed: Array,
    log_total: Array,
    features: Array,
    uv: Array,
    takes_part: Array,
    *,
    scale: float,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """Gradients of query, features and uv of one map, in the shapes of `_attend`."""
    tiles = layer_tiles.divide(query, len(features), tile=TILE, window=WINDOW)
    # The mean over the views, by their weights, of the gradient's products with the samples.
    mean = jnp.sum(cotangent * mixed, axis=-1, keepdims=True)
    of_elements = one_to_many_tpu_backward.Elements(
        tiles.planes(query) * scale, tiles.planes(cotangent), log_total, tiles.planes(mean)[:, 0]
    )
    sources = lane_gather.views(features)
    looks = tiles.looks(uv, takes_part, sources)
    to_query, to_features, to_uv = one_to_many_tpu_backward.differentiate(
        tiles, sources, of_elements, looks, interpret=interpret
    )
    return to_query * scale, to_features, to_uv
