"""Attention: one function, several implementations, chosen by what was measured.

    attention.attention(q, k, v)                            # the best that works here
    attention.attention(q, k, v, implementation="cudnn")    # this one, or an error
    attention.attention(q, k, v, norm=QKNorm(query, key, 1e-5))    # with norms of q and k

"reference" is the definition, "xla" is written in plain JAX for every device and never holds a
large matrix of logits, "cudnn" is NVIDIA's fused kernel for 16-bit numbers, "pallas_tpu" and
"pallas_gpu" are kernels of our own with the norms inside. `choice` says which is the default.

Attention to several sets of keys can be computed a set at a time: `with_log_sum` keeps what is
needed to `merge` the results, so that what several queries have in common is computed once.
`context_parallel` (a module of its own) splits the tokens over devices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from nvs_common.attention import (
    choice,
    chunked,
    cudnn,
    pallas_gpu,
    pallas_tpu,
    reference,
)
from nvs_common.attention import norm as norms
from nvs_common.attention import packed as packing
from nvs_common.attention.norm import QKNorm as QKNorm
from nvs_common.attention.packed import Packed as Packed
from nvs_common.errors import InputError
from nvs_common.types import Array

IMPLEMENTATIONS = {
    "cudnn": cudnn.attention,
    "xla": chunked.attention,
    "reference": reference.attention,
    "pallas_tpu": pallas_tpu.attention,
    "pallas_gpu": pallas_gpu.attention,
}
# Kernels that normalise queries and keys inside, and that mask packed targets inside.
_FUSED = ("pallas_tpu", "pallas_gpu")
_MASKED = ("pallas_tpu",)


class Partial(NamedTuple):
    """Attention to some of the keys.

    Attributes:
      out: [b, n, a, f], softmax over these keys alone.
      log_sum: [b, n, a], the logarithm of the softmax's denominator, float32 or wider.
    """

    out: Array
    log_sum: Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    norm: QKNorm | None = None,
    packed: Packed | None = None,
    implementation: str | None = None,
) -> Array:
    """Dense attention, softmax(scale q k^T) v; softmax statistics are float32 or wider.

    Args:
      q: [b, n, a, f].
      k: [b, m, a, f].
      v: [b, m, a, f].
      scale: factor on the logits, 1 / sqrt(f) by default.
      norm: RMS-norms of queries and keys that come first, inside the kernel where it has them.
      packed: targets packed in one sequence, see `nvs_common.attention.packed`; None sees all.
      implementation: a name of IMPLEMENTATIONS; by default the first that supports the arrays
        and the device.

    Returns:
      [b, n, a, f] of the type of v.

    Raises:
      InputError: an unknown implementation, or tokens that are not packed as is said.
      NotImplementedError: the named one does not support these arrays or this device.
    """
    return _attend(q, k, v, scale, norm, packed, implementation, need_log_sum=False)[0]


def with_log_sum(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    norm: QKNorm | None = None,
    packed: Packed | None = None,
    implementation: str | None = None,
) -> Partial:
    """Attention as above, and what `merge` needs.

    Raises:
      InputError: an unknown implementation.
      NotImplementedError: the named one does not support these arrays, this device, or gradients
        of the denominator ("cudnn").
    """
    out, log_sum = _attend(q, k, v, scale, norm, packed, implementation, need_log_sum=True)
    assert log_sum is not None  # an implementation without it has refused
    return Partial(out, log_sum)


def merge(parts: Sequence[Partial]) -> Array:
    """Attention to all keys from attention to disjoint sets of them, [b, n, a, f]."""
    return merge_partial(parts).out


def merge_partial(parts: Sequence[Partial]) -> Partial:
    """The same with its denominator, to be merged with more."""
    total = functools.reduce(jnp.logaddexp, [part.log_sum for part in parts])
    weighted = [
        part.out.astype(total.dtype) * jnp.exp(part.log_sum - total)[..., None] for part in parts
    ]
    return Partial(functools.reduce(jnp.add, weighted).astype(parts[0].out.dtype), total)


def fuses_norm(implementation: str | None) -> bool:
    """Whether norms of queries and keys are computed inside of what `attention` would choose."""
    first = choice.order()[0] if implementation is None else implementation
    return first in _FUSED


def merges(implementation: str | None, dtype: jax.typing.DTypeLike) -> bool:
    """Whether attention in parts suits what `attention` would choose: not where it is "cudnn"."""
    if implementation is None:
        return "cudnn" not in choice.order() or not cudnn.supports(dtype)
    return implementation != "cudnn"


def check_name(implementation: str | None) -> None:
    """Raises InputError for a name that is not in IMPLEMENTATIONS."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"attention implementation {implementation!r} is unknown; choose one of "
            f"{sorted(IMPLEMENTATIONS)}, or None."
        )


def _attend(
    q: Array,
    k: Array,
    v: Array,
    scale: float | None,
    norm: QKNorm | None,
    packed: Packed | None,
    implementation: str | None,
    *,
    need_log_sum: bool,
) -> tuple[Array, Array | None]:
    check_name(implementation)
    chex.assert_rank([q, k, v], 4)
    chex.assert_equal_shape([k, v])
    chex.assert_equal_shape_suffix([q, k], 2)
    chex.assert_equal_shape_prefix([q, k], 1)
    if packed is not None:
        packing.check(packed, q.shape[1], k.shape[1])
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if implementation is not None:
        return _by_name(implementation, q, k, v, factor, norm, packed, need_log_sum)
    for name in choice.order():
        try:
            return _by_name(name, q, k, v, factor, norm, packed, need_log_sum)
        except NotImplementedError:
            continue
    raise NotImplementedError(f"no implementation of attention for {q.shape}, {k.shape}")


def _by_name(
    name: str,
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    norm: QKNorm | None,
    packed: Packed | None,
    need_log_sum: bool,
) -> tuple[Array, Array | None]:
    """One implementation, with what it does not do inside done around it."""
    inside: dict[str, Any] = {}
    if name in _FUSED:
        inside["norm"] = norm
    else:
        q, k = norms.apply(norm, q, k)
    if name in _MASKED:
        inside["packed"] = packed
    elif packed is not None:
        return _packed_in_parts(name, q, k, v, scale, packed, inside)
    return IMPLEMENTATIONS[name](q, k, v, scale=scale, need_log_sum=need_log_sum, **inside)


def _packed_in_parts(
    name: str,
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    packed: Packed,
    inside: dict[str, Any],
) -> tuple[Array, Array]:
    """Packed targets without a mask: to shared keys, and each target to its own, then merged."""
    attend = functools.partial(IMPLEMENTATIONS[name], scale=scale, need_log_sum=True, **inside)
    shared, own = packed
    k, k_own, v, v_own = k[:, :shared], k[:, shared:], v[:, :shared], v[:, shared:]
    above = max(0, q.shape[1] - k_own.shape[1])  # queries of shared tokens
    b, size = q.shape[0], q.shape[2:]
    results = []
    if above:
        results.append(Partial(*attend(q[:, :above], k, v)))
    q = q[:, above:]
    # Targets that have queries are the last ones.
    grouped = lambda x: x[:, x.shape[1] - q.shape[1] :].reshape(-1, own, *size)  # noqa: E731
    to_own = attend(*map(grouped, (q, k_own, v_own)))
    to_own = Partial(*(x.reshape(b, -1, *x.shape[2:]) for x in to_own))
    if not shared:
        return to_own
    results.append(merge_partial([Partial(*attend(q, k, v)), to_own]))
    out, log_sum = (jnp.concatenate(parts, axis=1) for parts in zip(*results, strict=True))
    return out, log_sum
