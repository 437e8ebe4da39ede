"""Reconstruction losses: float32 scalars, the mean over all elements.

Predictions and truths are [..., h, w, c] with any leading axes. What is reported per image is in
`metrics`.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp

from nvs_common.types import Array


def l1(pred: Array, truth: Array) -> Array:
    """Mean absolute difference of images [..., h, w, c]; a scalar."""
    return jnp.mean(jnp.abs(_difference(pred, truth)))


def l2(pred: Array, truth: Array) -> Array:
    """Mean squared difference of images [..., h, w, c]; a scalar."""
    return jnp.mean(jnp.square(_difference(pred, truth)))


def charbonnier(pred: Array, truth: Array, epsilon: float = 1e-3) -> Array:
    """Mean of sqrt(difference^2 + epsilon^2), a smooth L1; a scalar.

    Args:
      pred: [..., h, w, c].
      truth: [..., h, w, c].
      epsilon: width of the quadratic part, in units of intensity; the loss of equal images is
        epsilon, not zero.
    """
    difference = _difference(pred, truth)
    return jnp.mean(jnp.sqrt(jnp.square(difference) + epsilon**2))


def _difference(pred: Array, truth: Array) -> Array:
    chex.assert_equal_shape([pred, truth])
    # Compute in float32 whatever the model's compute type: bfloat16 has 8 bits of intensity.
    return jnp.asarray(pred, jnp.float32) - jnp.asarray(truth, jnp.float32)
