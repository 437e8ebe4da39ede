"""The over operator on layers, and the expected depth that goes with it. Always float32."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from nvs_common.types import Array


def over_weights(alphas: Array) -> Array:
    """How much each layer is seen: its alpha times what the nearer layers let through.

    Args:
      alphas: [l, ...] from the farthest layer (first) to the nearest (last), in [0, 1].

    Returns:
      [l, ...]; the sum over layers is the accumulated alpha.
    """
    alphas = jnp.asarray(alphas, jnp.promote_types(alphas.dtype, jnp.float32))
    through = jnp.ones_like(alphas[0])
    weights = []
    # Unrolled: products of (1 - alpha) have finite gradients even where an alpha is one.
    for layer in reversed(range(alphas.shape[0])):
        weights.append(alphas[layer] * through)
        through = through * (1 - alphas[layer])
    return jnp.stack(weights[::-1])


def over(colors: Array, alphas: Array) -> Array:
    """Composites layers back to front over black: C <- a_l c_l + (1 - a_l) C.

    Args:
      colors: [l, ..., c] from the farthest layer (first) to the nearest (last), not
        premultiplied.
      alphas: [l, ...].

    Returns:
      [..., c], premultiplied by the accumulated alpha.
    """
    chex.assert_equal_shape([colors[..., 0], alphas])
    return jnp.einsum("l...,l...c->...c", over_weights(alphas), colors, precision="highest")


def accumulated(alphas: Array) -> Array:
    """Accumulated alpha [...] of layers [l, ...]: one minus what all of them let through."""
    return 1 - jnp.prod(1 - alphas, axis=0)


def expected_depth(depths: Array, alphas: Array, far: Array) -> Array:
    """Depth composited like a colour, with what is left of the ray at the far plane.

    Args:
      depths: [l, ...] z-depth of each layer, farthest first.
      alphas: [l, ...].
      far: [] or [...] z-depth that stands for an empty ray.

    Returns:
      [...] z-depth.
    """
    chex.assert_equal_shape([depths, alphas])
    weights = over_weights(alphas)
    return jnp.sum(weights * depths, axis=0) + (1 - jnp.sum(weights, axis=0)) * far
