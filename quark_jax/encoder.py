"""Image pyramid and ray-direction encoding (Quark, Sec. 3.2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from nvs_common import layers
from nvs_common.types import Array


class Encoder(nn.Module):
    """Residual CNN with strided mean pooling: one feature map a level, bottom-up only.

    The number of blocks, the first convolution and the heads are not published; these are a
    3x3 stem, `blocks` residual blocks a level and a normalised 1x1 head a level.

    Attributes:
      channels: features at every level (32 in the paper).
      blocks: residual blocks of each level, finest first.
      dtype: compute type.
    """

    channels: int
    blocks: Sequence[int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> list[Array]:
        """Encodes images [..., y, x, 3] in [0, 1] to levels [..., y / 2^k, x / 2^k, c]."""
        scale = (2 * sum(self.blocks)) ** -0.5
        x = (2 * images - 1).astype(self.dtype)
        x = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="stem")(x)
        levels = []
        for level, count in enumerate(self.blocks):
            if level > 0:
                x = mean_pool(x)
            for block in range(count):
                x = layers.ConvBlock(scale, self.dtype, name=f"level{level}_block{block}")(x)
            head = layers.RMSNorm(dtype=self.dtype, name=f"level{level}_norm")(x)
            levels.append(
                nn.Dense(self.channels, dtype=self.dtype, name=f"level{level}_head")(head)
            )
        return levels


def mean_pool(x: Array) -> Array:
    """Averages 2x2 blocks of [..., y, x, c]; y and x must be even."""
    *lead, height, width, channels = x.shape
    blocks = x.reshape(*lead, height // 2, 2, width // 2, 2, channels)
    return blocks.mean(axis=(-4, -2))


def sinusoids(values: Array, octaves: int) -> Array:
    """Encodes tanh(values) [..., k] as sines and cosines of 2^j pi, [..., 2 k octaves].

    Zero, where an input ray coincides with a target ray, is encoded as zeros: the cosines are
    shifted by one.
    """
    squashed = jnp.tanh(values.astype(jnp.float32))
    frequencies = jnp.pi * 2.0 ** jnp.arange(octaves, dtype=jnp.float32)
    phase = squashed[..., None] * frequencies.reshape((1,) * values.ndim + (-1,))
    waves = jnp.concatenate([jnp.sin(phase), jnp.cos(phase) - 1], axis=-1)
    return waves.reshape(*values.shape[:-1], -1)
