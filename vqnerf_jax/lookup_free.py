"""Quantisation without a table of codes: rounding to levels, signs, and their entropies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nvs_common.types import Array
from vqnerf_jax import codes

# The outermost levels are this much nearer than where tanh ends, so that they are reached.
_MARGIN = 1e-3
_SMALLEST_PROBABILITY = 1e-5


class Entropies(NamedTuple):
    """Of codes' probabilities: mean entropy of each vector's, and entropy of the batch's mean."""

    of_each: Array
    of_all: Array


def round_to_levels(z: Array, levels: Sequence[int]) -> Array:
    """Rounds each number of z [..., d] to its levels in [-1, 1]; straight-through gradient."""
    count = _row(levels, z)
    half = (count - 1) * (1 + _MARGIN) / 2
    # An even number of levels has none at zero: half a step to the left makes one.
    offset = _row([0.5 * (level % 2 == 0) for level in levels], z)
    bounded = jnp.tanh(z + jnp.arctanh(offset / half)) * half - offset
    rounded = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
    return rounded / _row([level // 2 for level in levels], z)


def level_indices(values: Array, levels: Sequence[int]) -> Array:
    """The index [...] of rounded values [..., d]; the first number varies fastest."""
    half = _row([level // 2 for level in levels], values)
    digits = jnp.round(values * half + half).astype(jnp.int32)
    return jnp.sum(digits * _bases(levels).reshape((1,) * (values.ndim - 1) + (-1,)), axis=-1)


def from_level_indices(indices: Array, levels: Sequence[int]) -> Array:
    """The values [..., d] of indices [...], float32."""
    shape = (1,) * indices.ndim + (-1,)
    count = jnp.asarray(levels, jnp.int32).reshape(shape)
    digits = indices[..., None] // _bases(levels).reshape(shape) % count
    half = (count // 2).astype(jnp.float32)
    return digits.astype(jnp.float32) / half - 1


def sign_indices(z: Array) -> Array:
    """The index [...] of the signs of z [..., d]; the first number is the highest bit."""
    bits = 2 ** jnp.arange(z.shape[-1] - 1, -1, -1, dtype=jnp.int32)
    return jnp.sum((z > 0) * bits.reshape((1,) * (z.ndim - 1) + (-1,)), axis=-1)


def from_sign_indices(indices: Array, width: int) -> Array:
    """Signs [..., d] of indices [...], float32."""
    shifts = jnp.arange(width - 1, -1, -1, dtype=jnp.int32)
    bits = indices[..., None] >> shifts.reshape((1,) * indices.ndim + (-1,)) & 1
    return 2.0 * bits.astype(jnp.float32) - 1


def entropies(
    z: Array, table: Array, inverse_temperature: float, axis_name: str | None = None
) -> Entropies:
    """Entropies of softmax(2 z e inverse_temperature) over codes e.

    Args:
      z: [n, d] vectors of this device.
      table: [k, d] codes.
      inverse_temperature: how sharp the probabilities are.
      axis_name: see `codes`.
    """
    products = jnp.einsum("nd,kd->nk", z, table, precision="highest")
    p = jax.nn.softmax(2 * inverse_temperature * products, axis=-1)
    total = codes.across(jnp.asarray(p.shape[0], p.dtype), axis_name)
    of_each = codes.across(jnp.sum(_entropy(p)), axis_name) / total
    return Entropies(of_each, _entropy(codes.across(jnp.sum(p, axis=0), axis_name) / total))


def _entropy(p: Array) -> Array:
    return -jnp.sum(p * jnp.log(jnp.maximum(p, _SMALLEST_PROBABILITY)), axis=-1)


def _bases(levels: Sequence[int]) -> Array:
    return jnp.asarray(np.cumprod([1, *levels[:-1]]), jnp.int32)


def _row(numbers: Sequence[float], like: Array) -> Array:
    """Numbers [d] that broadcast with an array [..., d]."""
    return jnp.asarray(numbers, like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))
