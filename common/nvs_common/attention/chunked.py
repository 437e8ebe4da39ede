"""Attention in plain JAX, tile by tile with an online softmax.

Neither pass holds more than a tile of the n x m logits: the forward pass keeps a running maximum
and sum (Milakov and Gimelshein, arXiv 1805.02867), the backward pass computes the logits again
from the denominators (FlashAttention, arXiv 2205.14135). It has no forward-mode derivative;
"reference" does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nvs_common.types import Array

# Logits of a head that are computed at once, and the side of a tile where there are more. On two
# CPU cores 256 x 256 took 0.38 of the time of the whole matrix at n = m = 3072, and was the best
# of the sides from 64 to 1024; up to 512 x 512 the whole matrix was as fast. Accelerators have
# more to keep busy.
_WHOLE = {"cpu": 2**18}
_SIDE = {"cpu": 256}
_WHOLE_ELSEWHERE, _SIDE_ELSEWHERE = 2**20, 1024


class _Keys(NamedTuple):
    """A tile of keys and values [b, a, m, f], and what is added to its logits: -inf for padding."""

    k: Array
    v: Array
    bias: Array | None


def attention(
    q: Array, k: Array, v: Array, *, scale: float, need_log_sum: bool
) -> tuple[Array, Array]:
    """See `nvs_common.attention.attention`; supports everything."""
    del need_log_sum
    return tiled(q, k, v, scale, side(q.shape[1], k.shape[1]))


def tiled(q: Array, k: Array, v: Array, scale: float, side: int) -> tuple[Array, Array]:
    """Attention and log-denominators in tiles of at most side x side; shapes as in `reference`."""
    # Heads first: products of matrices then need no other layout.
    out, log_sum = _attend(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), scale, side)
    return jnp.swapaxes(out, 1, 2), jnp.swapaxes(log_sum, 1, 2)


def gradients(
    saved: tuple[Array, Array, Array, Array, Array],
    cotangents: tuple[Array, Array],
    scale: float,
) -> tuple[Array, Array, Array]:
    """Cotangents of q, k and v, which may be some of the keys that the denominators are of.

    Args:
      saved: q, k, v, and the output and log-denominators of all keys.
      cotangents: of the output and the log-denominators.
      scale: factor on the logits.
    """
    n, m = saved[0].shape[1], saved[1].shape[1]
    heads_first = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
    saved, cotangents = jax.tree.map(heads_first, (saved, cotangents))
    return jax.tree.map(heads_first, _backward(scale, side(n, m), saved, cotangents))


def side(n: int, m: int, backend: str | None = None) -> int:
    """Side of a tile on the default device or another backend; all of a small matrix."""
    backend = backend or jax.default_backend()
    whole = n * m <= _WHOLE.get(backend, _WHOLE_ELSEWHERE)
    return max(n, m) if whole else _SIDE.get(backend, _SIDE_ELSEWHERE)


def _values(q: Array, k: Array, v: Array, scale: float, side: int) -> tuple[Array, Array]:
    """Of [b, a, n, f] and [b, a, m, f]: [b, a, n, f] and [b, a, n]."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    keys = _key_tiles(k, v, side)

    def rows(q: Array) -> tuple[Array, Array]:
        def step(carry: tuple[Array, Array, Array], tile: _Keys):
            out, highest, total = carry
            logits = _logits(q, tile, scale)
            new = jnp.maximum(highest, jnp.max(logits, axis=-1))
            powers, shrink = jnp.exp(logits - new[..., None]), jnp.exp(highest - new)
            out = out * shrink[..., None] + _product("banm,bamf->banf", powers, tile.v)
            return (out, new, total * shrink + jnp.sum(powers, axis=-1)), None

        empty = jnp.zeros(q.shape[:3], wide)
        carry = (jnp.zeros(q.shape, wide), empty - jnp.inf, empty)
        out, highest, total = _scan(step, carry, keys)[0]
        return (out / total[..., None]).astype(v.dtype), highest + jnp.log(total)

    out, log_sum = _scan(lambda _, q: (None, rows(q)), None, _tiles(q, side))[1]
    return _untiled(out, q.shape[2]), _untiled(log_sum, q.shape[2])


def _forward(q: Array, k: Array, v: Array, scale: float, side: int):
    out, log_sum = _values(q, k, v, scale, side)
    return (out, log_sum), (q, k, v, out, log_sum)


def _backward(scale: float, side: int, saved, cotangents):
    q, k, v, out, log_sum = saved
    wide = log_sum.dtype
    d_out, d_log_sum = cotangents
    # The derivative of a softmax is the same for all keys but for the weights.
    common = jnp.sum(out.astype(wide) * d_out.astype(wide), axis=-1) - d_log_sum.astype(wide)
    queries = tuple(_tiles(x, side) for x in (q, d_out, log_sum, common))

    def columns(d_q: Array, tile: _Keys):
        def step(carry: tuple[Array, Array], xs: tuple[Array, ...]):
            d_k, d_v = carry
            q, d_out, log_sum, common = xs
            weights = jnp.exp(_logits(q, tile, scale) - log_sum[..., None])
            d_v = d_v + _product("banm,banf->bamf", weights, d_out)
            d_weights = _product("banf,bamf->banm", d_out, tile.v)
            d_logits = weights * (d_weights - common[..., None]) * scale
            d_k = d_k + _product("banm,banf->bamf", d_logits, q)
            return (d_k, d_v), _product("banm,bamf->banf", d_logits, tile.k)

        zeros = jnp.zeros(tile.k.shape, wide)
        grads, more = _scan(step, (zeros, zeros), queries)
        return d_q + more, grads

    d_q = jnp.zeros(queries[0].shape, wide)
    d_q, (d_k, d_v) = _scan(columns, d_q, _key_tiles(k, v, side))
    n, m = q.shape[2], k.shape[2]
    parts = (_untiled(d_q, n), _untiled(d_k, m), _untiled(d_v, m))
    return tuple(x.astype(like.dtype) for x, like in zip(parts, (q, k, v), strict=True))


_attend: Any = jax.custom_vjp(_values, nondiff_argnums=(3, 4))
_attend.defvjp(_forward, _backward)


def _logits(q: Array, tile: _Keys, scale: float) -> Array:
    logits = scale * _product("banf,bamf->banm", q, tile.k)
    return logits if tile.bias is None else logits + tile.bias.reshape(1, 1, 1, -1)


def _product(equation: str, x: Array, y: Array) -> Array:
    """einsum of x, rounded to the type of y, and y, summed in float32 or wider."""
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return jnp.einsum(equation, x.astype(y.dtype), y, preferred_element_type=wide)


def _scan(step: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    """lax.scan; a single step is no loop."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(step, carry, xs)
    carry, ys = step(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)


def _tiles(x: Array, side: int) -> Array:
    """Cuts [b, a, n, ...] into equal tiles [i, b, a, n', ...], the last one padded with zeros."""
    n = x.shape[2]
    count = -(-n // side)
    size = -(-n // count)
    pad = [(0, 0)] * x.ndim
    pad[2] = (0, count * size - n)
    x = jnp.pad(x, pad) if count * size > n else x
    return jnp.moveaxis(x.reshape(*x.shape[:2], count, size, *x.shape[3:]), 2, 0)


def _untiled(x: Array, n: int) -> Array:
    """The inverse of `_tiles`, without the padding."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :n]


def _key_tiles(k: Array, v: Array, side: int) -> _Keys:
    k_tiles, v_tiles = _tiles(k, side), _tiles(v, side)
    count, size, m = k_tiles.shape[0], k_tiles.shape[3], k.shape[2]
    bias = None
    if count * size > m:
        wide = jnp.promote_types(k.dtype, jnp.float32)
        bias = jnp.where(jnp.arange(count * size).reshape(count, size) < m, 0.0, -jnp.inf)
        bias = bias.astype(wide)
    return _Keys(k_tiles, v_tiles, bias)
