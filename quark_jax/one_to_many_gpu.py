"""One-to-many attention on a GPU: a Pallas kernel that gathers what it attends to (Eq. 5-8).

A block of elements walks through the views: four rows of a view's update features are loaded for
each element, mixed, multiplied with the queries and taken into a running softmax, all in registers.
Delta [v, n, l, y, x, c] is never written to memory.

It is compiled by way of Triton, for a gather is a load from computed addresses there. JAX 0.11
deprecates that way for Mosaic GPU, whose copies want tiles and have no gather.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nvs_common.types import Array
from quark_jax import one_to_many

# Elements of a block: with 32 channels each holds 8 KiB of features in registers at a time.
BLOCK = 64


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
    and sums that blocks add to in any order differ from run to run.

    Raises:
      NotImplementedError: other types than float32, or channels that are no power of two.
    """
    channels = query.shape[-1]
    if query.dtype != jnp.float32 or delta.features.dtype != jnp.float32:
        raise NotImplementedError(
            f"one-to-many attention on a GPU: for float32, not {query.dtype} and "
            f"{delta.features.dtype}"
        )
    if channels & (channels - 1):
        raise NotImplementedError(
            f"one-to-many attention on a GPU: {channels} channels are no power of two"
        )
    forward = functools.partial(_attend, scale=scale, interpret=interpret)
    return one_to_many.with_plain_backward(forward, scale)(query, *delta, valid)


def _attend(
    query: Array, features: Array, uv: Array, takes_part: Array, *, scale: float, interpret: Any
) -> Array:
    """Of one map: query [l, y, x, a, c], features [v, y, x, c], uv [v, l, y, x, 2]."""
    # Here, for a JAX that has given up Triton must still import the models.
    from jax.experimental.pallas import triton

    views, height, width, channels = features.shape
    heads = query.shape[-2]
    flat = query.reshape(-1, heads, channels)
    extra = -len(flat) % BLOCK
    size = jnp.array([width, height], uv.dtype).reshape(1, 1, 2)
    places = uv.reshape(views, -1, 2) * size - 0.5
    part = takes_part.reshape(views, -1)
    flat = jnp.pad(flat, ((0, extra), (0, 0), (0, 0)))
    x, y = (jnp.pad(places[..., i], ((0, 0), (0, extra))) for i in (0, 1))
    part = jnp.pad(part.astype(jnp.float32), ((0, 0), (0, extra)))
    count = len(flat)
    of_views = pl.BlockSpec((views, BLOCK), lambda i: (0, i))
    of_elements = pl.BlockSpec((BLOCK, heads, channels), lambda i: (i, 0, 0))
    looks = count * views
    mixed = pl.pallas_call(
        functools.partial(_kernel, scale, (height, width)),
        grid=(count // BLOCK,),
        in_specs=[
            of_elements,
            of_views,
            of_views,
            of_views,
            pl.BlockSpec((views, height * width, channels), lambda i: (0, 0, 0)),
        ],
        out_specs=of_elements,
        out_shape=jax.ShapeDtypeStruct(flat.shape, jnp.float32),
        cost_estimate=pl.CostEstimate(
            flops=looks * channels * (8 + 4 * heads),
            bytes_accessed=4 * (2 * flat.size + looks * (3 + channels)),
            transcendentals=2 * looks * heads,
        ),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="one_to_many",
    )(flat, x, y, part, features.reshape(views, height * width, channels))
    return mixed[: count - extra].reshape(query.shape)


def _kernel(scale, size, query_ref, x_ref, y_ref, part_ref, features_ref, mixed_ref):
    """All views of a block of elements."""
    height, width = size
    heads, channels = query_ref.shape[1:]
    queries = [query_ref[:, head, :] * scale for head in range(heads)]

    def corner(view: Array, column: Array, row: Array, weight: Array) -> Array:
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        index = jnp.where(inside, row * width + column, 0)
        found = features_ref[view, index, :]
        return found * jnp.where(inside, weight, 0.0)[:, None]

    def step(view: Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        x, y = x_ref[view, :], y_ref[view, :]
        x0, y0 = jnp.floor(x), jnp.floor(y)
        right, below = x - x0, y - y0
        x0, y0 = x0.astype(jnp.int32), y0.astype(jnp.int32)
        delta = corner(view, x0, y0, (1 - right) * (1 - below))
        delta += corner(view, x0 + 1, y0, right * (1 - below))
        delta += corner(view, x0, y0 + 1, (1 - right) * below)
        delta += corner(view, x0 + 1, y0 + 1, right * below)
        part, new = part_ref[view, :] > 0, []
        for query, (highest, total, mixed) in zip(queries, state, strict=True):
            logit = jnp.where(part, jnp.sum(query * delta, axis=1), one_to_many.LEFT_OUT)
            top = jnp.maximum(highest, logit)
            shrink, power = jnp.exp(highest - top), jnp.exp(logit - top)
            mixed = mixed * shrink[:, None] + delta * power[:, None]
            new.append((top, total * shrink + power, mixed))
        return tuple(new)

    zeros = jnp.zeros(x_ref.shape[1], jnp.float32)
    # Below LEFT_OUT, and finite: the difference of two of them is a number.
    empty = (zeros + 2 * one_to_many.LEFT_OUT, zeros, jnp.zeros(mixed_ref.shape[::2], jnp.float32))
    state = jax.lax.fori_loop(0, x_ref.shape[0], step, (empty,) * heads)
    for head, (_, total, mixed) in enumerate(state):
        mixed_ref[:, head, :] = mixed / total[:, None]
