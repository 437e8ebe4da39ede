"""Attention: one function, several implementations, chosen by what the device supports.

    attention.attention(q, k, v)                            # the best that works here
    attention.attention(q, k, v, implementation="cudnn")    # this one, or an error

"reference" is the definition, "xla" is written in plain JAX for every device and never holds a
large matrix of logits, "cudnn" is NVIDIA's fused kernel for 16-bit numbers.

Attention to several sets of keys can be computed a set at a time: `with_log_sum` keeps what is
needed to `merge` the results, so that what several queries have in common is computed once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from nvs_common.attention import chunked, cudnn, reference
from nvs_common.errors import InputError
from nvs_common.types import Array

IMPLEMENTATIONS = {
    "cudnn": cudnn.attention,
    "xla": chunked.attention,
    "reference": reference.attention,
}
# Tried in this order where the caller names none; "xla" supports everything.
_DEFAULT = ("cudnn", "xla")


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
    implementation: str | None = None,
) -> Array:
    """Dense attention, softmax(scale q k^T) v; softmax statistics are float32 or wider.

    Args:
      q: [b, n, a, f].
      k: [b, m, a, f].
      v: [b, m, a, f].
      scale: factor on the logits, 1 / sqrt(f) by default.
      implementation: a name of IMPLEMENTATIONS; by default the first that supports the arrays
        and the device.

    Returns:
      [b, n, a, f] of the type of v.

    Raises:
      InputError: an unknown implementation.
      NotImplementedError: the named one does not support these arrays or this device.
    """
    return _attend(q, k, v, scale, implementation, need_log_sum=False)[0]


def with_log_sum(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Partial:
    """Attention as above, and what `merge` needs.

    Raises:
      InputError: an unknown implementation.
      NotImplementedError: the named one does not support these arrays, this device, or gradients
        of the denominator ("cudnn").
    """
    out, log_sum = _attend(q, k, v, scale, implementation, need_log_sum=True)
    assert log_sum is not None  # an implementation without it has refused
    return Partial(out, log_sum)


def merge(parts: Sequence[Partial]) -> Array:
    """Attention to all keys from attention to disjoint sets of them, [b, n, a, f]."""
    total = functools.reduce(jnp.logaddexp, [part.log_sum for part in parts])
    weighted = [
        part.out.astype(total.dtype) * jnp.exp(part.log_sum - total)[..., None] for part in parts
    ]
    return functools.reduce(jnp.add, weighted).astype(parts[0].out.dtype)


def merges(implementation: str | None, dtype: jax.typing.DTypeLike) -> bool:
    """Whether attention in parts suits what `attention` would choose: not where it is "cudnn"."""
    if implementation is None:
        return not cudnn.supports(dtype)
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
    implementation: str | None,
    *,
    need_log_sum: bool,
) -> tuple[Array, Array | None]:
    check_name(implementation)
    chex.assert_rank([q, k, v], 4)
    chex.assert_equal_shape([k, v])
    chex.assert_equal_shape_suffix([q, k], 2)
    chex.assert_equal_shape_prefix([q, k], 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation is not None:
        return IMPLEMENTATIONS[implementation](q, k, v, scale=scale, need_log_sum=need_log_sum)
    for name in _DEFAULT:
        try:
            return IMPLEMENTATIONS[name](q, k, v, scale=scale, need_log_sum=need_log_sum)
        except NotImplementedError:
            continue
    raise NotImplementedError(f"no implementation of attention for {q.shape}, {k.shape}")
