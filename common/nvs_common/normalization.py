"""Normalisation that attention and layers share; statistics are float32 or wider."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nvs_common.types import Array


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """Divides x [..., c] by its root mean square over c and multiplies by scale [c]; float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    total = jnp.einsum("...c,...c->...", wide, wide, precision="highest")
    square = total[..., None] / x.shape[-1]
    inverse = jax.lax.rsqrt(square + epsilon)
    return wide * inverse * scale.reshape((1,) * (x.ndim - 1) + (-1,))
