"""Linen blocks shared by the systems. Parameters are float32; `dtype` is the compute type."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvs_common import normalization
from nvs_common.types import Array


def scaled_init(scale: float):
    """LeCun-normal initialiser times `scale`; 1 / sqrt(branches) is GPT-2's residual scaling."""
    return nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")


rms_norm = normalization.rms_norm


def layer_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """Standardises x [..., c] over c and multiplies by scale [c]; float32, without a bias."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + epsilon)
    return centred * inverse * scale.reshape((1,) * (x.ndim - 1) + (-1,))


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """The exact GELU, x times the normal distribution's cdf; computed in float32 or wider.

    The backward pass has x alone stored, and computes the rest again. There is no forward-mode
    derivative; `jax.nn.gelu` has one.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _gelu_backward(x: Array, cotangent: Array) -> tuple[Array]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    density = jnp.exp(-0.5 * jnp.square(wide)) * (2 * math.pi) ** -0.5
    slope = _normal_cdf(wide) + wide * density
    return ((cotangent.astype(wide.dtype) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def _normal_cdf(x: Array) -> Array:
    # With erf: erfc, which is exact far below zero as well, takes three times as long on a CPU.
    return 0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5))


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
