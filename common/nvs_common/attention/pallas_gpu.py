"""Attention on NVIDIA GPUs as one kernel a pass, with the norms of queries and keys inside.

Two of Pallas' compilers make kernels for GPUs. Mosaic GPU reaches a Hopper's tensor cores best, but
has kernels for Hopper and newer alone, and in JAX 0.10 its interpreter on CPUs does not read and
write references, so that nothing of it could be checked where there is no GPU. This file is for the
other one, Triton: it runs interpreted on CPUs, and compiles for Ampere and newer. JAX 0.11 calls it
deprecated; the kernels are few, and `attention` says so where JAX no longer has it.

cuDNN's kernel, with the norms outside, stays the default (`choice`). What this one has to show for
itself needs a GPU: with the norms inside, the normalised queries and keys are neither written nor
kept for the backward pass, two arrays of n a f. It has been compiled for an H100, and not been run
on one: it is taken by name alone ("pallas_gpu").

Tokens are filled up to whole tiles. The backward pass is two kernels, over keys and over queries,
which compute the logits again; derivatives of the norms are left to XLA.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nvs_common import normalization
from nvs_common.attention.norm import QKNorm
from nvs_common.types import Array

HEAD_SIZES = (32, 64, 128)  # powers of two, as everything in Triton
BLOCK = 64  # queries and keys of a tile; 128 keys where a head is small
_WARPS = 4
_STAGES = 2


class _Static(NamedTuple):
    """Arguments that are not arrays."""

    scale: float
    epsilon: float | None
    interpret: bool


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    norm: QKNorm | None = None,
    need_log_sum: bool = False,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """See `nvs_common.attention.attention`.

    Args:
      q: [b, n, a, f].
      k: [b, m, a, f].
      v: [b, m, a, f].
      scale: factor on the logits.
      norm: of queries and keys.
      need_log_sum: both results are always given.
      interpret: runs the kernels without a GPU, slowly.

    Returns:
      [b, n, a, f] of the type of v, and log-denominators [b, n, a], float32.

    Raises:
      NotImplementedError: types or head sizes that the kernels do not have; JAX without Triton.
    """
    del need_log_sum
    _check(q, k, v)
    epsilon = None if norm is None else norm.epsilon
    ones = jnp.ones((q.shape[-1],), jnp.float32)
    scales = (ones, ones) if norm is None else (norm.query, norm.key)
    scales = tuple(x.astype(jnp.float32) for x in scales)
    return _attend(q, k, v, *scales, _Static(scale, epsilon, interpret))


def _check(q: Array, k: Array, v: Array) -> None:
    types = {x.dtype for x in (q, k, v)}
    if len(types) > 1 or types.pop() not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(
            f"attention implementation 'pallas_gpu' needs bfloat16, float16 or float32 and the "
            f"same for all, not {q.dtype}, {k.dtype} and {v.dtype}; use 'xla' or None."
        )
    if q.shape[-1] not in HEAD_SIZES:
        raise NotImplementedError(
            f"attention implementation 'pallas_gpu' has head sizes {HEAD_SIZES}, not "
            f"{q.shape[-1]}; use 'xla' or None."
        )


def _values(
    q: Array, k: Array, v: Array, q_scale: Array, k_scale: Array, static: _Static
) -> tuple[Array, Array]:
    n, m = q.shape[1], k.shape[1]
    q, k, v = (_padded(x) for x in (q, k, v))
    b, size, a, f = q.shape
    out, log_sum = _call(
        functools.partial(_forward_kernel, static=static, m=m),
        [jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct((b, a, size), jnp.float32)],
        (q, k, v, q_scale, k_scale),
        in_specs=[_tile(f), _all(k), _all(v), _scale(f), _scale(f)],
        out_specs=[_tile(f), _tile_row()],
        tiles=size // BLOCK,
        products=2,
        static=static,
    )
    return out[:, :n], jnp.swapaxes(log_sum, 1, 2)[:, :n]


def _forward_kernel(q_ref, k_ref, v_ref, qs_ref, ks_ref, out_ref, log_sum_ref, *, static, m):
    wide = jnp.float32
    q = _normalized(q_ref[...], qs_ref[...], static.epsilon)
    q = (q * static.scale).astype(q_ref.dtype)

    def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, highest, total = carry
        at = pl.ds(j * BLOCK, BLOCK)
        k = _normalized(k_ref[at, :], ks_ref[...], static.epsilon).astype(k_ref.dtype)
        logits = jnp.where(_seen(j, m)[None, :], _product(q, k.T), -jnp.inf)
        new = jnp.maximum(highest, jnp.max(logits, axis=1))
        powers, shrink = jnp.exp(logits - new[:, None]), jnp.exp(highest - new)
        out = out * shrink[:, None] + _product(powers.astype(v_ref.dtype), v_ref[at, :])
        return out, new, total * shrink + jnp.sum(powers, axis=1)

    empty = jnp.zeros((BLOCK,), wide)
    carry = (jnp.zeros(q.shape, wide), empty - jnp.inf, empty)
    out, highest, total = jax.lax.fori_loop(0, k_ref.shape[0] // BLOCK, step, carry)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    log_sum_ref[...] = highest + jnp.log(total)


def _forward(q, k, v, q_scale, k_scale, static: _Static):
    out, log_sum = _values(q, k, v, q_scale, k_scale, static)
    return (out, log_sum), (q, k, v, out, log_sum, q_scale, k_scale)


def _backward(static: _Static, saved, cotangents):
    q, k, v, out, log_sum, q_scale, k_scale = saved
    d_out, d_log_sum = cotangents
    wide = jnp.float32
    common = jnp.sum(out.astype(wide) * d_out.astype(wide), axis=-1) - d_log_sum.astype(wide)
    n, m = q.shape[1], k.shape[1]
    qs, ks, vs, ds = (_padded(x) for x in (q, k, v, d_out.astype(v.dtype)))
    rows = [jnp.swapaxes(_padded(x), 1, 2) for x in (log_sum, common)]
    inputs = (qs, ks, vs, q_scale, k_scale, ds, *rows)
    size, f = qs.shape[1], qs.shape[3]
    whole_row = pl.BlockSpec((None, None, size), _row_of_head)
    (d_q,) = _call(
        functools.partial(_query_kernel, static=static, m=m),
        [jax.ShapeDtypeStruct(qs.shape, q.dtype)],
        inputs,
        in_specs=[_tile(f), _all(ks), _all(vs), *[_scale(f)] * 2, _tile(f), *[_tile_row()] * 2],
        out_specs=[_tile(f)],
        tiles=size // BLOCK,
        products=3,
        static=static,
    )
    d_k, d_v = _call(
        functools.partial(_key_kernel, static=static, m=m),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (ks, vs)],
        inputs,
        in_specs=[_all(qs), _tile(f), _tile(f), *[_scale(f)] * 2, _all(ds), *[whole_row] * 2],
        out_specs=[_tile(f), _tile(f)],
        tiles=ks.shape[1] // BLOCK,
        products=4,
        static=static,
    )
    d_q, d_k, d_v = d_q[:, :n], d_k[:, :m], d_v[:, :m]
    if static.epsilon is None:
        return d_q, d_k, d_v, jnp.zeros_like(q_scale), jnp.zeros_like(k_scale)
    d_q, d_q_scale = _through_norm(q, q_scale, static.epsilon, d_q)
    d_k, d_k_scale = _through_norm(k, k_scale, static.epsilon, d_k)
    return d_q, d_k, d_v, d_q_scale, d_k_scale


_attend: Any = jax.custom_vjp(_values, nondiff_argnums=(5,))
_attend.defvjp(_forward, _backward)


def _query_kernel(
    q_ref, k_ref, v_ref, qs_ref, ks_ref, d_out_ref, log_sum_ref, common_ref, d_q_ref, *, static, m
):
    q = _normalized(q_ref[...], qs_ref[...], static.epsilon)
    q, d_out = (q * static.scale).astype(q_ref.dtype), d_out_ref[...]
    log_sum, common = log_sum_ref[...], common_ref[...]

    def step(j: Array, d_q: Array) -> Array:
        at = pl.ds(j * BLOCK, BLOCK)
        k = _normalized(k_ref[at, :], ks_ref[...], static.epsilon).astype(k_ref.dtype)
        weights = jnp.exp(_product(q, k.T) - log_sum[:, None])
        weights = jnp.where(_seen(j, m)[None, :], weights, 0.0)
        d_logits = weights * (_product(d_out, v_ref[at, :].T) - common[:, None])
        return d_q + _product(d_logits.astype(k.dtype), k)

    d_q = jnp.zeros(q.shape, jnp.float32)
    d_q = jax.lax.fori_loop(0, k_ref.shape[0] // BLOCK, step, d_q)
    d_q_ref[...] = (d_q * static.scale).astype(d_q_ref.dtype)


def _key_kernel(
    q_ref,
    k_ref,
    v_ref,
    qs_ref,
    ks_ref,
    d_out_ref,
    log_sum_ref,
    common_ref,
    d_k_ref,
    d_v_ref,
    *,
    static,
    m,
):
    # Keys that are padding have cotangents of no meaning, which are cut off; and finite logits, for
    # a key of zeros has none else.
    del m
    k = _normalized(k_ref[...], ks_ref[...], static.epsilon).astype(k_ref.dtype)
    v = v_ref[...]

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_k, d_v = carry
        at = pl.ds(i * BLOCK, BLOCK)
        q = _normalized(q_ref[at, :], qs_ref[...], static.epsilon)
        q, d_out = (q * static.scale).astype(q_ref.dtype), d_out_ref[at, :]
        weights = jnp.exp(_product(k, q.T) - log_sum_ref[at][None, :])
        d_v = d_v + _product(weights.astype(d_out.dtype), d_out)
        d_logits = weights * (_product(v, d_out.T) - common_ref[at][None, :])
        return d_k + _product(d_logits.astype(q.dtype), q), d_v

    zeros = jnp.zeros(k.shape, jnp.float32)
    d_k, d_v = jax.lax.fori_loop(0, q_ref.shape[0] // BLOCK, step, (zeros, zeros))
    d_k_ref[...] = d_k.astype(d_k_ref.dtype)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)


def _call(kernel, out_shape, inputs, *, in_specs, out_specs, tiles, products, static):
    """A kernel over (tiles, scenes, heads), with its cost."""
    try:
        from jax.experimental.pallas import triton as plgpu
    except ImportError as e:
        raise NotImplementedError(
            f"attention implementation 'pallas_gpu' needs Pallas' Triton compiler, which JAX "
            f"{jax.__version__} does not have; use 'cudnn', 'xla' or None."
        ) from e
    q, k = inputs[0], inputs[1]
    b, n, a, f = q.shape
    logits = b * a * n * k.shape[1]
    return pl.pallas_call(
        kernel,
        out_shape,
        grid=(tiles, b, a),
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * f * logits,
            transcendentals=logits,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *out_shape)),
        ),
        interpret=static.interpret,
        name=kernel.func.__name__.strip("_"),
    )(*inputs)


def _through_norm(x: Array, scale: Array, epsilon: float, cotangent: Array) -> tuple[Array, Array]:
    normal = lambda x, scale: normalization.rms_norm(x, scale, epsilon)  # noqa: E731
    return jax.vjp(normal, x, scale)[1](cotangent.astype(jnp.float32))


def _normalized(x: Array, scale: Array, epsilon: float | None) -> Array:
    """x [n, f] over its root mean square, times scale [f]; float32."""
    x = x.astype(jnp.float32)
    if epsilon is None:
        return x
    square = jnp.sum(x * x, axis=1) / x.shape[1]
    return x * jax.lax.rsqrt(square + epsilon)[:, None] * scale[None, :]


def _product(x: Array, y: Array) -> Array:
    """Product of matrices, summed in float32; exact products of float32."""
    exact = x.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else None
    return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)


def _seen(j: Array, m: int) -> Array:
    return j * BLOCK + jnp.arange(BLOCK) < m


def _padded(x: Array) -> Array:
    """[b, n, ...] with zeros up to whole tiles."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % BLOCK), *[(0, 0)] * (x.ndim - 2)])


def _tile(f: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, BLOCK, None, f), lambda i, b, a: (b, i, a, 0))


def _all(x: Array) -> pl.BlockSpec:
    return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda i, b, a: (b, 0, a, 0))


def _tile_row() -> pl.BlockSpec:
    return pl.BlockSpec((None, None, BLOCK), lambda i, b, a: (b, a, i))


def _scale(f: int) -> pl.BlockSpec:
    return pl.BlockSpec((f,), lambda i, b, a: (0,))


def _row_of_head(i: Any, b: Any, a: Any) -> tuple[Any, ...]:
    return (b, a, 0)
