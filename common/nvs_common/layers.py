"""Linen blocks shared by the systems. Parameters are float32; `dtype` is the compute type."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvs_common.types import Array


def scaled_init(scale: float):
    """LeCun-normal initialiser times `scale`; 1 / sqrt(branches) is GPT-2's residual scaling."""
    return nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """Divides x [..., c] by its root mean square over c and multiplies by scale [c]; float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    total = jnp.einsum("...c,...c->...", wide, wide, precision="highest")
    square = total[..., None] / x.shape[-1]
    inverse = jax.lax.rsqrt(square + epsilon)
    return wide * inverse * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def layer_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """Standardises x [..., c] over c and multiplies by scale [c]; float32, without a bias."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + epsilon)
    return centred * inverse * scale.reshape((1,) * (x.ndim - 1) + (-1,))


class RMSNorm(nn.Module):
    """Divides by the root mean square over channels and multiplies by a learned scale.

    Statistics are float32 whatever the compute type; the output has the compute type.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
        return rms_norm(x, scale, self.epsilon).astype(self.dtype)


class ConvBlock(nn.Module):
    """Pre-norm residual block of two 3x3 convolutions: x + conv(gelu(conv(norm(x)))).

    Attributes:
      residual_scale: factor on the last convolution's initial weights.
      dtype: compute type.
    """

    residual_scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., h, w, c] to the same shape."""
        channels = x.shape[-1]
        y = RMSNorm(dtype=self.dtype, name="norm")(x)
        y = nn.Conv(channels, (3, 3), dtype=self.dtype, name="conv_in")(y)
        y = nn.Conv(
            channels,
            (3, 3),
            dtype=self.dtype,
            kernel_init=scaled_init(self.residual_scale),
            name="conv_out",
        )(nn.gelu(y))
        return x + y
