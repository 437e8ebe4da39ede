"""Attention on TPUs as one kernel a pass, with the norms of queries and keys inside.

An online softmax (FlashAttention, arXiv 2205.14135) over tiles; see `pallas_tpu_kernels`. Against
`jax.experimental.pallas.ops.tpu`'s kernels it takes any number of tokens (those of the library want
whole tiles), normalises and masks packed targets inside, and gives a differentiable denominator.

The backward pass is one kernel too: dq is summed in VMEM over the keys while dk and dv are summed
over the queries, five products a tile where two kernels would need seven. Cotangents leave the
kernel as those of the normalised queries and keys: the derivative of the norm is elementwise, and
XLA fuses it with the transposition to [b, n, a, f] that has to be done in any case.

Not measured: no TPU was at hand. It is chosen by name alone ("pallas_tpu"), see `choice`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nvs_common import normalization
from nvs_common.attention import pallas_tpu_kernels as kernels
from nvs_common.attention.norm import QKNorm
from nvs_common.attention.packed import Packed, Tiles
from nvs_common.types import Array

HEAD_SIZES = (32, 128)  # least and greatest
# Of a tile: a tile of float32 logits is 2 MiB in the forward pass, 1 MiB in the backward pass,
# which holds four of them; the compiler of each of v5e, v5p and v6e finds room for both.
FORWARD_BLOCKS = (512, 1024)
BACKWARD_BLOCKS = (512, 512)
# The backward pass holds the sum of all dq in VMEM (16 MiB on most TPUs), its result twice besides.
MAX_QUERY_BYTES = 2 * 2**20


class _Saved(NamedTuple):
    """What the backward pass reads."""

    q: Array
    k: Array
    v: Array
    out: Array
    log_sum: Array


class _Static(NamedTuple):
    """Arguments that are not arrays."""

    scale: float
    epsilon: float | None
    packed: Packed | None
    interpret: Any


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    norm: QKNorm | None = None,
    packed: Packed | None = None,
    need_log_sum: bool = False,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """See `nvs_common.attention.attention`.

    Args:
      q: [b, n, a, f].
      k: [b, m, a, f].
      v: [b, m, a, f].
      scale: factor on the logits.
      norm: of queries and keys.
      packed: what queries see.
      need_log_sum: both results are always given.
      interpret: runs the kernels without a TPU, slowly: True or pltpu.InterpretParams.

    Returns:
      [b, n, a, f] of the type of v, and log-denominators [b, n, a], float32.

    Raises:
      NotImplementedError: types or head sizes that the kernels do not have.
    """
    del need_log_sum
    check(q, k, v)
    epsilon = None if norm is None else norm.epsilon
    ones = jnp.ones((q.shape[-1],), jnp.float32)
    scales = (ones, ones) if norm is None else (norm.query, norm.key)
    scales = tuple(x.astype(jnp.float32) for x in scales)
    return _attend(q, k, v, *scales, _Static(scale, epsilon, packed, interpret))


def check(q: Array, k: Array, v: Array) -> None:
    """Raises NotImplementedError for arrays that the kernels do not support."""
    types = {x.dtype for x in (q, k, v)}
    if len(types) > 1 or types.pop() not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(
            f"attention implementation 'pallas_tpu' needs bfloat16 or float32 and the same for "
            f"all, not {q.dtype}, {k.dtype} and {v.dtype}; use 'xla' or None."
        )
    size, (least, greatest) = q.shape[-1], HEAD_SIZES
    if not least <= size <= greatest or size % 16:
        raise NotImplementedError(
            f"attention implementation 'pallas_tpu' has head sizes of {least} to {greatest} in "
            f"steps of 16, not {size}; use 'xla' or None."
        )


def gradients(
    saved: tuple[Array, Array, Array, Array, Array],
    cotangents: tuple[Array, Array],
    scale: float,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """Cotangents of q, k and v, which may be some of the keys that the denominators are of.

    Args:
      saved: q, k, v, and the output and log-denominators of all keys.
      cotangents: of the output and the log-denominators.
      scale: factor on the logits.
      interpret: as in `attention`.
    """
    ones = jnp.ones((saved[0].shape[-1],), jnp.float32)
    static = _Static(scale, None, None, interpret)
    return _kernel_gradients(static, _Saved(*saved), (ones, ones), cotangents)


def _values(
    q: Array, k: Array, v: Array, q_scale: Array, k_scale: Array, static: _Static
) -> tuple[Array, Array]:
    n, m = q.shape[1], k.shape[1]
    tiles, sizes = _tiles(n, m, FORWARD_BLOCKS, static.packed, m - n)
    setting = kernels.Setting(tiles, static.scale, static.epsilon, static.interpret)
    q, k, v = (_features_first(x, size) for x, size in zip((q, k, v), sizes, strict=True))
    out, log_sum = kernels.forward(setting, q, k, v, (q_scale[:, None], k_scale[:, None]))
    return _tokens_first(out, n), jnp.swapaxes(log_sum[:, :, 0, :n], 1, 2)


def _forward(q, k, v, q_scale, k_scale, static: _Static):
    out, log_sum = _values(q, k, v, q_scale, k_scale, static)
    return (out, log_sum), (_Saved(q, k, v, out, log_sum), (q_scale, k_scale))


def _backward(static: _Static, residuals, cotangents):
    saved, scales = residuals
    d_q, d_k, d_v = _kernel_gradients(static, saved, scales, cotangents)
    if static.epsilon is None:
        return d_q, d_k, d_v, *(jnp.zeros_like(scale) for scale in scales)
    d_q, d_q_scale = _through_norm(saved.q, scales[0], static.epsilon, d_q)
    d_k, d_k_scale = _through_norm(saved.k, scales[1], static.epsilon, d_k)
    return d_q, d_k, d_v, d_q_scale, d_k_scale


_attend: Any = jax.custom_vjp(_values, nondiff_argnums=(5,))
_attend.defvjp(_forward, _backward)


def _kernel_gradients(static: _Static, saved: _Saved, scales, cotangents):
    """Cotangents of queries and keys after their norms and of values, [b, n or m, a, f]."""
    q, k, v, out, log_sum = saved
    d_out, d_log_sum = cotangents
    wide = jnp.float32
    common = jnp.sum(out.astype(wide) * d_out.astype(wide), axis=-1) - d_log_sum.astype(wide)
    n, m, size = q.shape[1], k.shape[1], q.shape[-1]
    most = MAX_QUERY_BYTES // (4 * size) // BACKWARD_BLOCKS[0] * BACKWARD_BLOCKS[0]
    parts = []
    for begin in range(0, n, most):
        cut = slice(begin, min(begin + most, n))
        tiles, sizes = _tiles(cut.stop - begin, m, BACKWARD_BLOCKS, static.packed, m - n + begin)
        setting = kernels.Setting(tiles, static.scale, static.epsilon, static.interpret)
        rows = (_row(log_sum[:, cut], sizes[0]), _row(common[:, cut], sizes[0]))
        part = kernels.backward(
            setting,
            _features_first(q[:, cut], sizes[0]),
            _features_first(k, sizes[1]),
            _features_first(v, sizes[1]),
            (scales[0][:, None], scales[1][:, None]),
            _features_first(d_out[:, cut].astype(v.dtype), sizes[0]),
            rows,
            wide=n > most,
        )
        parts.append(part._replace(query=_tokens_first(part.query, cut.stop - begin)))
    d_q = jnp.concatenate([part.query for part in parts], axis=1) if n > most else parts[0].query
    d_k = functools.reduce(jnp.add, [part.key for part in parts]).astype(k.dtype)
    d_v = functools.reduce(jnp.add, [part.value for part in parts]).astype(v.dtype)
    return d_q, _tokens_first(d_k, m), _tokens_first(d_v, m)


def _through_norm(x: Array, scale: Array, epsilon: float, cotangent: Array) -> tuple[Array, Array]:
    normal = lambda x, scale: normalization.rms_norm(x, scale, epsilon)  # noqa: E731
    return jax.vjp(normal, x, scale)[1](cotangent.astype(jnp.float32))


def _tiles(
    n: int, m: int, blocks: tuple[int, int], packed: Packed | None, start: int
) -> tuple[Tiles, tuple[int, int, int]]:
    """Tiles, and the padded numbers of tokens of q, k and v."""
    (block_q, rows), (block_k, columns) = (
        kernels.padded(size, block) for size, block in zip((n, m), blocks, strict=True)
    )
    return Tiles(n, m, block_q, block_k, packed, start), (rows, columns, columns)


def _features_first(x: Array, size: int) -> Array:
    """[b, n, a, f] to [b, a, f, size], filled with zeros."""
    x = jnp.transpose(x, (0, 2, 3, 1))
    return jnp.pad(x, [(0, 0)] * 3 + [(0, size - x.shape[-1])])


def _tokens_first(x: Array, n: int) -> Array:
    """[b, a, f, size] to [b, n, a, f]."""
    return jnp.transpose(x[..., :n], (0, 3, 1, 2))


def _row(x: Array, size: int) -> Array:
    """[b, n, a] to [b, a, 1, size], filled with zeros."""
    x = jnp.swapaxes(x, 1, 2)[:, :, None]
    return jnp.pad(x, [(0, 0)] * 3 + [(0, size - x.shape[-1])])
