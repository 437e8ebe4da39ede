"""Reconstruction losses: one value per image, in float32.

Arrays are predictions and truths [..., h, w, c]; every function averages over the last three
axes and returns [...], so that the caller decides how to weigh images.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp

from nvs_common.types import Array

_IMAGE_AXES = (-3, -2, -1)


def l1(pred: Array, truth: Array) -> Array:
    """Mean absolute difference of images [..., h, w, c], per image [...]."""
    return jnp.mean(jnp.abs(_difference(pred, truth)), axis=_IMAGE_AXES)


def l2(pred: Array, truth: Array) -> Array:
    """Mean squared difference of images [..., h, w, c], per image [...]."""
    return jnp.mean(jnp.square(_difference(pred, truth)), axis=_IMAGE_AXES)


def charbonnier(pred: Array, truth: Array, epsilon: float = 1e-3) -> Array:
    """Mean of sqrt(difference^2 + epsilon^2), a smooth L1, per image [...].

    Args:
      pred: [..., h, w, c].
      truth: [..., h, w, c].
      epsilon: width of the quadratic part, in units of intensity; the loss of equal images is
        epsilon, not zero.
    """
    difference = _difference(pred, truth)
    return jnp.mean(jnp.sqrt(jnp.square(difference) + epsilon**2), axis=_IMAGE_AXES)


def _difference(pred: Array, truth: Array) -> Array:
    chex.assert_equal_shape([pred, truth])
    # Compute in float32 whatever the model's compute type: bfloat16 has 8 bits of intensity.
    return jnp.asarray(pred, jnp.float32) - jnp.asarray(truth, jnp.float32)
