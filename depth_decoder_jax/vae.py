"""The autoencoder of Stable Video Diffusion: images one by one to latents, and clips back.

The decoder mixes the frames of a clip in three ways: by temporal convolutions, by norms whose
statistics are of the whole clip, and by a last convolution over time. A clip must therefore be
decoded whole, and a clip of one frame is not what an image decoder would give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvs_common import autoencoder_blocks as blocks
from nvs_common import sharding
from nvs_common.errors import InputError
from nvs_common.types import Array

# Latents of diffusion models are the encoder's times this; `decode` takes them without.
SCALING_FACTOR = 0.18215
LOGVAR_RANGE = (-30.0, 20.0)
TEMPORAL_EPSILON = 1e-5

# What is done to the features [b, t, y, x, c] of an up block, before they are enlarged.
Refine: TypeAlias = Callable[[int, Array], Array]


class TemporalConv(nn.Module):
    """A convolution over three neighbouring frames at each pixel, zeros beyond the clip's ends."""

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [b, t, y, x, c] to `channels`."""
        init = nn.initializers.lecun_normal(in_axis=(0, 1))
        kernel = self.param("kernel", init, (3, x.shape[-1], self.channels), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.channels,), jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        products = [jnp.einsum("btyxc,cd->btyxd", x, tap) for tap in kernel]
        pad = lambda *of_time: [(0, 0), of_time, (0, 0), (0, 0), (0, 0)]  # noqa: E731
        before = jnp.pad(products[0][:, :-1], pad(1, 0))
        after = jnp.pad(products[2][:, 1:], pad(0, 1))
        return before + products[1] + after + bias.astype(self.dtype).reshape(1, 1, 1, 1, -1)


class TemporalResnetBlock(nn.Module):
    """What mixing frames changes: two temporal convolutions, each after norm and SiLU."""

    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [b, t, y, x, c] to the same shape; the residual is not added."""
        norm: Any = dict(groups=self.groups, epsilon=TEMPORAL_EPSILON, dtype=self.dtype)
        y = nn.silu(blocks.GroupNorm(**norm, name="norm1")(x))
        y = TemporalConv(x.shape[-1], self.dtype, name="conv1")(y)
        y = nn.silu(blocks.GroupNorm(**norm, name="norm2")(y))
        return TemporalConv(x.shape[-1], self.dtype, name="conv2")(y)


class SpatioTemporalBlock(nn.Module):
    """A residual block of each frame, then one over time, blended by a learned share."""

    channels: int
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [b, t, y, x, c] to `channels`."""
        spatial = blocks.ResnetBlock(self.channels, self.groups, dtype=self.dtype, name="spatial")
        y = _each_frame(spatial, x)
        change = TemporalResnetBlock(self.groups, self.dtype, name="temporal")(y)
        mix = self.param("mix_factor", nn.initializers.zeros_init(), (1,), jnp.float32)
        share = jax.nn.sigmoid(mix).astype(self.dtype).reshape(1, 1, 1, 1, 1)
        return _constrain(y + share * change)


class Encoder(nn.Module):
    """Images [n, h, w, c] to moments [n, y, x, 2 c] of their latents."""

    channels: tuple[int, ...]
    num_resnets: int
    latent_channels: int
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = blocks.conv(self.channels[0], 3, "conv_in", self.dtype)(x)
        setting: Any = dict(groups=self.groups, dtype=self.dtype)
        for i, width in enumerate(self.channels):
            last = i == len(self.channels) - 1
            x = DownBlock(width, self.num_resnets, last, **setting, name=f"down_{i}")(x)
        x = MidBlock(**setting, name="mid")(x)
        x = nn.silu(blocks.GroupNorm(self.groups, dtype=self.dtype, name="norm_out")(x))
        return blocks.conv(2 * self.latent_channels, 3, "conv_out", self.dtype)(x)


class DownBlock(nn.Module):
    """Residual blocks, and but in the last one half the resolution."""

    channels: int
    num_resnets: int
    last: bool
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for j in range(self.num_resnets):
            setting: Any = dict(groups=self.groups, dtype=self.dtype)
            x = blocks.ResnetBlock(self.channels, **setting, name=f"resnet_{j}")(x)
        return x if self.last else blocks.Downsample(self.dtype, name="downsample")(x)


class MidBlock(nn.Module):
    """Two residual blocks with attention between them."""

    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        setting: Any = dict(groups=self.groups, dtype=self.dtype)
        x = blocks.ResnetBlock(x.shape[-1], **setting, name="resnet_0")(x)
        x = blocks.SelfAttention(**setting, name="attention")(x)
        return blocks.ResnetBlock(x.shape[-1], **setting, name="resnet_1")(x)


class TemporalDecoder(nn.Module):
    """Latents [b, t, y, x, c] of clips to frames [b, t, h, w, c].

    Attributes:
      channels: of the blocks from the finest to the coarsest, as the encoder's.
      num_resnets: blocks at each resolution.
      num_mid: blocks at the coarsest resolution before those; after the first comes attention.
      out_channels: of the frames.
      groups: of the norms.
      dtype: compute type.
    """

    channels: tuple[int, ...]
    num_resnets: int
    num_mid: int
    out_channels: int = 3
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, latents: Array, refine: Refine | None = None) -> Array:
        setting: Any = dict(groups=self.groups, dtype=self.dtype)
        x = latents.astype(self.dtype)
        x = _each_frame(blocks.conv(self.channels[-1], 3, "conv_in", self.dtype), x)
        x = TemporalMidBlock(self.num_mid, **setting, name="mid")(x)
        for i, width in enumerate(reversed(self.channels)):
            last = i == len(self.channels) - 1
            stage = UpBlock(width, self.num_resnets, last, **setting, name=f"up_{i}")
            x = stage(x, None if refine is None else lambda x, i=i: refine(i, x))
        x = _each_frame(blocks.GroupNorm(**setting, name="norm_out"), x)
        x = _each_frame(blocks.conv(self.out_channels, 3, "conv_out", self.dtype), nn.silu(x))
        return TemporalConv(self.out_channels, self.dtype, name="time_conv_out")(x)


class TemporalMidBlock(nn.Module):
    """Blocks at the coarsest resolution; attention, within each frame, follows the first one.

    The published models have as many blocks as at any resolution, but no more than two are ever
    run, and attention only where there are two: the parameters of the rest lie idle.
    """

    num_resnets: int
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        setting: Any = dict(groups=self.groups, dtype=self.dtype)
        resnets = [
            SpatioTemporalBlock(x.shape[-1], **setting, name=f"resnet_{j}")
            for j in range(self.num_resnets)
        ]
        attend = blocks.SelfAttention(**setting, name="attention")
        x = resnets[0](x)
        if self.is_initializing():
            # All of them are made, so that weights are read and written whole.
            for idle in (lambda x: _each_frame(attend, x), *resnets[1:]):
                idle(x)
        if self.num_resnets > 1:
            x = resnets[1](_each_frame(attend, x))
        return x


class UpBlock(nn.Module):
    """Spatio-temporal blocks, and but in the last one twice the resolution."""

    channels: int
    num_resnets: int
    last: bool
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, refine: Callable[[Array], Array] | None = None) -> Array:
        for j in range(self.num_resnets):
            setting: Any = dict(groups=self.groups, dtype=self.dtype)
            x = SpatioTemporalBlock(self.channels, **setting, name=f"resnet_{j}")(x)
        if refine is not None:
            x = refine(x)
        if self.last:
            return x
        return _each_frame(blocks.Upsample(self.dtype, name="upsample"), x)


class SVDVAE(nn.Module):
    """The autoencoder with a temporal decoder.

    Attributes:
      channels: of the blocks, from the finest resolution to the coarsest; each but the last
        halves the resolution.
      num_resnets: residual blocks of the encoder at each resolution; the decoder has one more.
      num_mid: blocks in the middle of the decoder, see `TemporalMidBlock`.
      latent_channels: of latents.
      in_channels: of the images encoded.
      out_channels: of the images decoded.
      groups: of all norms.
      dtype: compute type.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    num_resnets: int = 2
    num_mid: int = 2
    latent_channels: int = 4
    in_channels: int = 3
    out_channels: int = 3
    groups: int = 32
    dtype: Any = jnp.float32

    def setup(self):
        shared: Any = dict(groups=self.groups, dtype=self.dtype)
        self.encoder = Encoder(self.channels, self.num_resnets, self.latent_channels, **shared)
        self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
        self.decoder = TemporalDecoder(
            self.channels, self.num_resnets + 1, self.num_mid, self.out_channels, **shared
        )

    def __call__(self, images: Array) -> Array:
        """Encodes images [b, t, h, w, 3] in [-1, 1] and decodes the mean; the same shape."""
        return self.decode(self.encode(images)[0])

    def encode(self, images: Array) -> tuple[Array, Array]:
        """Mean and log-variance of the latents of images.

        Args:
          images: [b, t, h, w, 3] in [-1, 1].

        Returns:
          Two arrays [b, t, y, x, c], float32; not times SCALING_FACTOR.

        Raises:
          InputError: images of another rank or number of channels.
        """
        _check(images, self.in_channels, "images", "[b, t, h, w, 3]")
        lead = images.shape[:2]
        x = images.astype(self.dtype).reshape(-1, *images.shape[2:])
        moments = self.quant_conv(self.encoder(x)).astype(jnp.float32)
        moments = moments.reshape(*lead, *moments.shape[1:])
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: Array, refine: Refine | None = None) -> Array:
        """Frames of clips.

        Args:
          latents: [b, t, y, x, c], as `encode` gives them: those of a diffusion model divided by
            SCALING_FACTOR. The frames t of a scene are one clip.
          refine: (index of an up block, its features [b, t, y, x, c]) -> features of the same
            shape, applied before they are enlarged.

        Returns:
          [b, t, h, w, 3], about [-1, 1], float32.

        Raises:
          InputError: latents of another rank or number of channels.
        """
        _check(latents, self.latent_channels, "latents", "[b, t, y, x, c]")
        return self.decoder(latents, refine).astype(jnp.float32)


def _each_frame(layer: Callable[[Array], Array], x: Array) -> Array:
    """A layer of images, applied to frames [b, t, y, x, c]."""
    y = layer(x.reshape(-1, *x.shape[2:]))
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _constrain(x: Array) -> Array:
    return sharding.constrain(x, ("act_batch", "act_view", None, None, None))


def _check(x: Array, channels: int, name: str, shape: str) -> None:
    if x.ndim != 5 or x.shape[-1] != channels:
        raise InputError(f"{name} have shape {x.shape}; expected {shape} with {channels} channels.")


# `vae` stands before the names where the autoencoder is part of a larger model.
_PART = r"(vae/)?(encoder|decoder|quant_conv)"
_CONVS = r"conv_in|conv_out|(down|up)sample/conv|resnet_\d+/(spatial/)?(conv\d|shortcut)"
PARAM_AXES = {
    rf"{_PART}/(.*/)?(scale|bias|mix_factor)": (None,),
    rf"{_PART}/((.*/)?({_CONVS})/)?kernel": (None, None, "in", "out"),
    rf"{_PART}/(.*/)?(temporal/conv\d|time_conv_out)/kernel": (None, "in", "out"),
    rf"{_PART}/mid/attention/(query|key|value|output)/kernel": ("in", "out"),
}
