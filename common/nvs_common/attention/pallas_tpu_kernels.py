"""Kernels of `pallas_tpu`: one forward, one backward, tile by tile with features first.

All arrays are [features, tokens]: tokens fill the 128 lanes whatever the head size is (a row of 64
features would leave half of each register and of each tile of memory empty), statistics of a
softmax are sums over sublanes and one row of lanes, and so is the norm of a query. Logits are
computed transposed, [keys, queries].

q, k, v are [b, a, f, n] and [b, a, f, m], padded with zeros to whole tiles.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nvs_common.attention.packed import Tiles
from nvs_common.types import Array

# Of logits that are not seen: finite, for the difference of two infinities is no number.
_UNSEEN = -1e30
_WIDE = jnp.float32


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a kernel is compiled for.

    Attributes:
      tiles: sizes of arrays and tiles.
      scale: factor on the logits.
      epsilon: of the norms of queries and keys; None is no norm.
      interpret: False compiles; else see `pallas_call`.
    """

    tiles: Tiles
    scale: float
    epsilon: float | None
    interpret: Any


class Gradients(NamedTuple):
    """Cotangents [b, a, f, n or m] of queries and keys after their norms, and of values."""

    query: Array
    key: Array
    value: Array


def forward(
    setting: Setting, q: Array, k: Array, v: Array, scales: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Attention [b, a, f, n] of the type of v and log-denominators [b, a, 1, n].

    Args:
      setting: what to compile.
      q: [b, a, f, n], padded; k and v likewise with m.
      k: keys.
      v: values.
      scales: [f, 1] of the norms of queries and keys.
    """
    tiles, (b, a, f, n) = setting.tiles, q.shape
    row = lambda b, a, i, step: (b, a, 0, i)  # noqa: E731
    column = lambda b, a, i, step: (b, a, 0, tiles.key_tile(i, step)[0])  # noqa: E731
    queries, keys = _spec(f, tiles.block_q, row), _spec(f, tiles.block_k, column)
    scale = pl.BlockSpec((f, 1), lambda *_: (0, 0))
    logits = tiles.needed * tiles.block_q * tiles.block_k * b * a
    moved = q.size + q.size + 2 * b * a * f * tiles.needed * tiles.block_k
    return pl.pallas_call(
        functools.partial(_forward, setting=setting),
        [jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct((b, a, 1, n), _WIDE)],
        grid=(b, a, tiles.rows, tiles.key_steps),
        in_specs=[queries, keys, keys, scale, scale],
        out_specs=[queries, _spec(1, tiles.block_q, row)],
        scratch_shapes=[
            pltpu.VMEM((f, tiles.block_q), q.dtype),
            pltpu.VMEM((f, tiles.block_q), _WIDE),
            pltpu.VMEM((1, tiles.block_q), _WIDE),
            pltpu.VMEM((1, tiles.block_q), _WIDE),
        ],
        compiler_params=_in_order(1),
        cost_estimate=pl.CostEstimate(
            flops=4 * f * logits,
            transcendentals=logits,
            bytes_accessed=moved * q.dtype.itemsize + b * a * n * 4,
        ),
        interpret=setting.interpret,
        name="attention_forward",
    )(q, k, v, *scales)


def _forward(
    q_ref, k_ref, v_ref, q_scale_ref, k_scale_ref, out_ref, log_sum_ref, *scratch, setting: Setting
) -> None:
    q, out, highest, total = scratch
    i, step = pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def _():
        normal = _normalized(q_ref[...], q_scale_ref[...], setting.epsilon)
        q[...] = (normal * setting.scale).astype(q.dtype)
        out[...] = jnp.zeros(out.shape, out.dtype)
        highest[...] = jnp.full(highest.shape, _UNSEEN, highest.dtype)
        total[...] = jnp.zeros(total.shape, total.dtype)

    def attend(seen: Array | None) -> None:
        k = _normalized(k_ref[...], k_scale_ref[...], setting.epsilon).astype(k_ref.dtype)
        logits = _product(k, q[...], 0, 0)
        logits = logits if seen is None else jnp.where(seen, logits, _UNSEEN)
        new = jnp.maximum(highest[...], jnp.max(logits, axis=0, keepdims=True))
        powers, shrink = jnp.exp(logits - new), jnp.exp(highest[...] - new)
        total[...] = total[...] * shrink + jnp.sum(powers, axis=0, keepdims=True)
        added = _product(v_ref[...], powers.astype(v_ref.dtype), 1, 0)
        out[...] = out[...] * shrink + added
        highest[...] = new

    tile, needed = setting.tiles.key_tile(i, step)
    _on_tile(setting.tiles, i, tile, needed, attend)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        out_ref[...] = (out[...] / total[...]).astype(out_ref.dtype)
        log_sum_ref[...] = highest[...] + jnp.log(total[...])


def backward(
    setting: Setting,
    q: Array,
    k: Array,
    v: Array,
    scales: tuple[Array, Array],
    d_out: Array,
    rows: tuple[Array, Array],
    *,
    wide: bool,
) -> Gradients:
    """Cotangents of one pass over all tiles: five products for each, no logits kept.

    The queries' sum is kept in VMEM for all queries at once, see `pallas_tpu.MAX_QUERY_BYTES`.

    Args:
      setting: what to compile.
      q: [b, a, f, n], padded; d_out likewise, k and v with m.
      k: keys.
      v: values.
      scales: [f, 1] of the norms of queries and keys.
      d_out: cotangent of the output.
      rows: [b, a, 1, n], log-denominators and what is common to all keys of a query.
      wide: whether cotangents of keys and values are float32.
    """
    tiles, (b, a, f, n) = setting.tiles, q.shape
    row = lambda b, a, j, step: (b, a, 0, tiles.query_tile(j, step)[0])  # noqa: E731
    column = lambda b, a, j, step: (b, a, 0, j)  # noqa: E731
    queries, keys = _spec(f, tiles.block_q, row), _spec(f, tiles.block_k, column)
    line = _spec(1, tiles.block_q, row)
    scale = pl.BlockSpec((f, 1), lambda *_: (0, 0))
    logits = tiles.needed * tiles.block_q * tiles.block_k * b * a
    moved = 4 * k.size + q.size + 2 * b * a * f * tiles.needed * tiles.block_q
    d_query = jax.ShapeDtypeStruct(q.shape, q.dtype)
    d_key = jax.ShapeDtypeStruct(k.shape, _WIDE if wide else k.dtype)
    d_value = jax.ShapeDtypeStruct(k.shape, _WIDE if wide else v.dtype)
    out = pl.pallas_call(
        functools.partial(_backward, setting=setting),
        [d_query, d_key, d_value],
        grid=(b, a, tiles.columns, tiles.rows),
        in_specs=[queries, keys, keys, scale, scale, queries, line, line],
        out_specs=[_spec(f, n, lambda b, a, j, step: (b, a, 0, 0)), keys, keys],
        scratch_shapes=[
            pltpu.VMEM((f, tiles.block_k), k.dtype),
            pltpu.VMEM((f, n), _WIDE),
            pltpu.VMEM((f, tiles.block_k), _WIDE),
            pltpu.VMEM((f, tiles.block_k), _WIDE),
        ],
        compiler_params=_in_order(2),
        cost_estimate=pl.CostEstimate(
            flops=10 * f * logits,
            transcendentals=logits,
            bytes_accessed=moved * q.dtype.itemsize + 2 * b * a * n * 4,
        ),
        interpret=setting.interpret,
        name="attention_backward",
    )(q, k, v, *scales, d_out, *rows)
    return Gradients(*out)


def _backward(
    q_ref,
    k_ref,
    v_ref,
    q_scale_ref,
    k_scale_ref,
    d_out_ref,
    log_sum_ref,
    common_ref,
    d_q_ref,
    d_k_ref,
    d_v_ref,
    *scratch,
    setting: Setting,
) -> None:
    k, d_q, d_k, d_v = scratch
    tiles = setting.tiles
    j, step = pl.program_id(2), pl.program_id(3)
    first, last = step == 0, step == pl.num_programs(3) - 1

    @pl.when(first & (j == 0))
    def _():
        d_q[...] = jnp.zeros(d_q.shape, d_q.dtype)

    @pl.when(first)
    def _():
        k[...] = _normalized(k_ref[...], k_scale_ref[...], setting.epsilon).astype(k.dtype)
        d_k[...] = jnp.zeros(d_k.shape, d_k.dtype)
        d_v[...] = jnp.zeros(d_v.shape, d_v.dtype)

    i, needed = tiles.query_tile(j, step)

    def differentiate(seen: Array | None) -> None:
        q = _normalized(q_ref[...], q_scale_ref[...], setting.epsilon) * setting.scale
        q, d_out = q.astype(q_ref.dtype), d_out_ref[...]
        weights = jnp.exp(_product(k[...], q, 0, 0) - log_sum_ref[...])
        weights = weights if seen is None else jnp.where(seen, weights, 0.0)
        d_v[...] += _product(d_out, weights.astype(d_out.dtype), 1, 1)
        d_weights = _product(v_ref[...], d_out, 0, 0)
        d_logits = (weights * (d_weights - common_ref[...])).astype(q.dtype)
        d_k[...] += _product(q, d_logits, 1, 1)
        at = pl.ds(pl.multiple_of(i * tiles.block_q, tiles.block_q), tiles.block_q)
        d_q[:, at] += _product(k[...], d_logits, 1, 0)

    _on_tile(tiles, i, j, needed, differentiate)

    @pl.when(last)
    def _():
        d_k_ref[...] = d_k[...].astype(d_k_ref.dtype)
        d_v_ref[...] = d_v[...].astype(d_v_ref.dtype)

    @pl.when(last & (j == pl.num_programs(2) - 1))
    def _():
        d_q_ref[...] = (d_q[...] * setting.scale).astype(d_q_ref.dtype)


def _on_tile(tiles: Tiles, i: Any, j: Any, needed: Any, step: Any) -> None:
    """Runs step(mask) on a tile where it is needed, without a mask where all is seen."""
    if tiles.always_whole:
        step(None)
        return
    whole = tiles.whole(j)
    pl.when(needed & whole)(lambda: step(None))
    pl.when(needed & jnp.logical_not(whole))(lambda: step(_seen(tiles, i, j)))


def _seen(tiles: Tiles, i: Any, j: Any) -> Array:
    """The mask of tile (i, j), [keys, queries]."""
    shape = (tiles.block_k, tiles.block_q)
    key = j * tiles.block_k + jax.lax.broadcasted_iota(jnp.int32, (tiles.block_k, 1), 0)
    if tiles.packed is None:
        return jnp.broadcast_to(key < tiles.m, shape)
    query = i * tiles.block_q + jax.lax.broadcasted_iota(jnp.int32, (1, tiles.block_q), 1)
    own = _group(tiles, key) == _group(tiles, query + tiles.start)
    return ((key < tiles.packed.shared) | own) & (key < tiles.m)


def _group(tiles: Tiles, position: Array) -> Array:
    """The number of a token's target; shared tokens have negative ones.

    There is no division of integers; in float32 this is exact for 2 million tokens.
    """
    assert tiles.packed is not None
    middle = (position - tiles.packed.shared).astype(_WIDE) + 0.5
    return jnp.floor(middle * (1.0 / tiles.packed.own))


def _normalized(x: Array, scale: Array, epsilon: float | None) -> Array:
    """x [f, n] over its root mean square, times scale [f, 1]; float32."""
    x = x.astype(_WIDE)
    if epsilon is None:
        return x
    square = jnp.mean(x * x, axis=0, keepdims=True)
    return x * jax.lax.rsqrt(square + epsilon) * scale


def _product(x: Array, y: Array, of_x: int, of_y: int) -> Array:
    """Contracts an axis of x with one of y, summed in float32; exact products of float32."""
    exact = x.dtype == _WIDE
    return jax.lax.dot_general(
        x,
        y,
        (((of_x,), (of_y,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=_WIDE,
    )


def _spec(rows: int, columns: int, index: Any) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, rows, columns), index)


def _in_order(count: int) -> pltpu.CompilerParams:
    """Of a grid of four: how many of its last axes run in order."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",) * (4 - count) + ("arbitrary",) * count
    )


def padded(size: int, block: int) -> tuple[int, int]:
    """A side of tiles near `block`, a multiple of 128, and the size filled up to whole tiles."""
    count = math.ceil(size / block)
    side = 128 * math.ceil(size / (128 * count))
    return side, side * math.ceil(size / side)
