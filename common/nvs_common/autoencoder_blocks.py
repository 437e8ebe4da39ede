"""Blocks of convolutional image autoencoders: residual blocks, attention, changes of resolution.

All map images [n, h, w, c]. Parameters are float32, statistics of norms are float32 or wider,
`dtype` is the compute type; None is that of images and parameters.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvs_common import attention
from nvs_common.errors import InputError
from nvs_common.types import Array

EPSILON = 1e-6


def group_norm(x: Array, scale: Array, bias: Array, groups: int, epsilon: float) -> Array:
    """Standardises each group of channels of x [n, ..., c] over all axes between n and c.

    Args:
      x: [n, ..., c].
      scale: [c].
      bias: [c].
      groups: number of groups of neighbouring channels.
      epsilon: added to the variance.

    Returns:
      The shape of x, float32 or wider.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    flat = wide.reshape(x.shape[0], -1, x.shape[-1])
    # Sums of channels first, then of groups: a reduction that leaves the last axis alone is
    # several times faster on a CPU than one that splits it.
    centred = flat - _of_groups(jnp.mean(flat, axis=1), groups)
    variance = _of_groups(jnp.mean(jnp.square(centred), axis=1), groups)
    factors = jax.lax.rsqrt(variance + epsilon) * scale.reshape(1, 1, -1)
    return (centred * factors + bias.reshape(1, 1, -1)).reshape(x.shape)


def _of_groups(x: Array, groups: int) -> Array:
    """The mean of the group that each channel of x [n, c] is in, [n, 1, c]."""
    means = jnp.mean(x.reshape(x.shape[0], groups, -1), axis=-1, keepdims=True)
    return jnp.broadcast_to(means, (*means.shape[:2], x.shape[-1] // groups)).reshape(
        x.shape[0], 1, -1
    )


class GroupNorm(nn.Module):
    """Standardises groups of channels, then scales and shifts channels; see `group_norm`."""

    groups: int = 32
    epsilon: float = EPSILON
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        if channels % self.groups:
            raise InputError(
                f"{channels} channels do not fall into {self.groups} equal groups; choose channels "
                f"that are a multiple of {self.groups}."
            )
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32)
        y = group_norm(x, scale, bias, self.groups, self.epsilon)
        return y.astype(x.dtype if self.dtype is None else self.dtype)


def conv(channels: int, size: int, name: str, dtype: Any) -> nn.Conv:
    """A convolution that keeps the resolution."""
    return nn.Conv(channels, (size, size), padding=size // 2, dtype=dtype, name=name)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after norm and SiLU, and a shortcut.

    Attributes:
      channels: of the output; where the input has others, the shortcut is a 1x1 convolution.
      groups: of the norms.
      epsilon: of the norms.
      dtype: compute type.
    """

    channels: int
    groups: int = 32
    epsilon: float = EPSILON
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm: Any = dict(groups=self.groups, epsilon=self.epsilon, dtype=self.dtype)
        y = nn.silu(GroupNorm(**norm, name="norm1")(x))
        y = conv(self.channels, 3, "conv1", self.dtype)(y)
        y = nn.silu(GroupNorm(**norm, name="norm2")(y))
        y = conv(self.channels, 3, "conv2", self.dtype)(y)
        if x.shape[-1] != self.channels:
            x = conv(self.channels, 1, "shortcut", self.dtype)(x)
        return x + y


class SelfAttention(nn.Module):
    """One head of attention among the pixels of an image, added to it.

    Attributes:
      groups, epsilon: of the norm.
      dtype: compute type.
      implementation: of the attention, see `nvs_common.attention`.
    """

    groups: int = 32
    epsilon: float = EPSILON
    dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, h, w, c = x.shape
        y = GroupNorm(self.groups, self.epsilon, self.dtype, name="norm")(x)
        y = y.reshape(n, h * w, c)
        q, k, v = (
            nn.Dense(c, dtype=self.dtype, name=name)(y)[:, :, None]
            for name in ("query", "key", "value")
        )
        attended = attention.attention(q, k, v, implementation=self.implementation)[:, :, 0]
        out = nn.Dense(c, dtype=self.dtype, name="output")(attended)
        return x + out.reshape(x.shape)


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2 of an image padded at its right and bottom edges alone."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        padding = ((0, 1), (0, 1))
        layer = nn.Conv(x.shape[-1], (3, 3), 2, padding=padding, dtype=self.dtype, name="conv")
        return layer(x)


class Upsample(nn.Module):
    """Doubles the resolution by repeating pixels, then a 3x3 convolution."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c))
        return conv(c, 3, "conv", self.dtype)(x.reshape(n, 2 * h, 2 * w, c))
