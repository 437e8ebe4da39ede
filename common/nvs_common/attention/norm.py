"""The norms of queries and keys that an implementation may compute inside."""

from __future__ import annotations

from typing import NamedTuple

from nvs_common import normalization
from nvs_common.types import Array


class QKNorm(NamedTuple):
    """RMS-norms of queries and keys over the features of a head.

    Attributes:
      query: learned scale [f] of queries.
      key: learned scale [f] of keys.
      epsilon: added to the mean square.
    """

    query: Array
    key: Array
    epsilon: float


def apply(norm: QKNorm | None, q: Array, k: Array) -> tuple[Array, Array]:
    """Queries and keys [b, n or m, a, f] after their norms, of the same types."""
    if norm is None:
        return q, k
    return normalized(q, norm.query, norm.epsilon), normalized(k, norm.key, norm.epsilon)


def normalized(x: Array, scale: Array, epsilon: float) -> Array:
    """x [..., f] over its root mean square, times scale; of the type of x."""
    return normalization.rms_norm(x, scale, epsilon).astype(x.dtype)
