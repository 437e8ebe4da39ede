"""The VQGAN auto-encoder (arXiv 2012.09841) as latent diffusion uses it: f = 2^(levels - 1).

Names of parameters follow the levels from fine to coarse, in encoder and decoder alike. Images are
[b, h, w, 3] in [-1, 1], latents [b, y, x, d].
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp

from nvs_common import autoencoder_blocks
from nvs_common.errors import InputError
from nvs_common.types import Array, Names
from vqnerf_jax import codebook, codes

QUANTIZERS = ("vq", "fsq", "lfq", "none")


@flax.struct.dataclass
class Reconstruction:
    """What a VQGAN makes of images.

    Attributes:
      images: [b, h, w, 3] decoded.
      latents: [b, y, x, d] before quantisation.
      quantized: what the quantiser returned; None where there is none.
    """

    images: Array
    latents: Array
    quantized: codes.Quantized | None


class VQGAN(nn.Module):
    """Encoder, quantiser and decoder.

    Attributes:
      channels: of each level from the finest; every level but the last halves the resolution.
      blocks: residual blocks of an encoder's level; the decoder's have one more.
      latent_channels: between the encoder and the 1x1 convolution to the codes' width.
      num_codes: k, of quantizer="vq".
      code_width: d; the number of `levels` with "fsq" and of bits with "lfq".
      groups: of group norms; divides all channels.
      in_channels: of the images that are encoded.
      out_channels: of those that are decoded.
      mid_attention: whether the coarsest resolution has attention between two blocks.
      encoder_attention: levels of the encoder with attention after each block.
      decoder_attention: the same of the decoder.
      quantizer: "vq", "fsq", "lfq", or "none" for continuous latents.
      fsq_levels: of "fsq".
      beta, beta_on, update, distance, gradient, decay, restart_below, kmeans_steps: of "vq", see
        `codebook.Codebook`.
      attention: implementation, see `nvs_common.attention`; None never holds the whole matrix of
        logits, which has 54 GB in the decoder of a 1200 x 1600 image.
      dtype: compute type; None is that of images and parameters.
    """

    channels: tuple[int, ...] = (128, 256, 512)
    blocks: int = 2
    latent_channels: int = 16
    num_codes: int = 2048
    code_width: int = 16
    groups: int = 32
    in_channels: int = 3
    out_channels: int = 3
    mid_attention: bool = True
    encoder_attention: tuple[int, ...] = ()
    decoder_attention: tuple[int, ...] = ()
    quantizer: str = "vq"
    fsq_levels: tuple[int, ...] = (8, 8, 6, 5)
    beta: float = 0.25
    beta_on: str = "codebook"
    update: str = "gradient"
    distance: str = "l2"
    gradient: str = "straight_through"
    decay: float = 0.99
    restart_below: float = 0.0
    kmeans_steps: int = 0
    attention: str | None = None
    dtype: Any = None

    @property
    def factor(self) -> int:
        """How many pixels a latent is wide."""
        return 2 ** (len(self.channels) - 1)

    def setup(self):
        self._check()
        shared = (self.channels, self.groups, self.mid_attention)
        self.encoder = Encoder(
            *shared,
            self.blocks,
            self.latent_channels,
            self.encoder_attention,
            self.attention,
            self.dtype,
        )
        self.decoder = Decoder(
            *shared,
            self.blocks + 1,
            self.out_channels,
            self.decoder_attention,
            self.attention,
            self.dtype,
        )
        self.quant_conv = nn.Conv(self.code_width, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)
        if self.quantizer == "vq":
            self.codebook = codebook.Codebook(
                self.num_codes,
                self.code_width,
                beta=self.beta,
                beta_on=self.beta_on,
                update=self.update,
                distance=self.distance,
                gradient=self.gradient,
                decay=self.decay,
                restart_below=self.restart_below,
                kmeans_steps=self.kmeans_steps,
            )
        elif self.quantizer == "fsq":
            self.codebook = codebook.FSQ(self.fsq_levels)
        elif self.quantizer == "lfq":
            self.codebook = codebook.LFQ(self.code_width)

    def __call__(
        self, images: Array, *, train: bool = False, quantize_if: Array | bool = True
    ) -> Reconstruction:
        """Encodes, quantises and decodes images; with train=True the codes learn.

        Args:
          images: [b, h, w, 3].
          train: whether running means of the codes learn.
          quantize_if: where it is false, latents are decoded as they are, codes do not learn, and
            the quantiser has no loss: an auto-encoder whose codes start later.
        """
        latents = self.encode(images)
        if self.quantizer == "none":
            return Reconstruction(self.decode(latents), latents, None)
        gate = {"learn_if": quantize_if} if self.quantizer == "vq" else {}
        quantized = self.codebook(latents, train=train, **gate)
        quantized = dataclasses.replace(
            quantized,
            values=jnp.where(quantize_if, quantized.values, latents),
            loss=jnp.where(quantize_if, quantized.loss, 0.0),
        )
        return Reconstruction(self.decode(quantized.values), latents, quantized)

    def encode(self, images: Array) -> Array:
        """Latents [b, y, x, d] of images, before quantisation.

        Raises:
          InputError: a size that is not a multiple of `factor`.
        """
        height, width, channels = images.shape[1:]
        if height % self.factor or width % self.factor or channels != self.in_channels:
            raise InputError(
                f"VQGAN: images of {height} x {width} x {channels}; both sides must be multiples "
                f"of {self.factor} and channels {self.in_channels}."
            )
        return self.quant_conv(self.encoder(images))

    def quantize(self, latents: Array) -> tuple[Array, Array]:
        """Quantised latents [b, y, x, d] (straight-through) and their indices [b, y, x].

        Raises:
          InputError: there is no quantiser.
        """
        if self.quantizer == "none":
            raise InputError("VQGAN: quantizer='none' has continuous latents; decode them as is.")
        quantized = self.codebook(latents)
        return quantized.values, quantized.indices

    def decode(self, latents: Array) -> Array:
        """Images of latents [b, y, x, d], which are decoded as they are."""
        return self.decoder(self.post_quant_conv(latents))

    def decode_indices(self, indices: Array) -> Array:
        """Images of code indices [b, y, x]."""
        return self.decode(self.codebook.lookup(indices))

    def _check(self) -> None:
        if self.quantizer not in QUANTIZERS:
            raise InputError(f"quantizer={self.quantizer!r}; choose from {QUANTIZERS}.")
        if bad := [c for c in self.channels if c % self.groups]:
            raise InputError(
                f"groups={self.groups} does not divide channels {bad}; choose another number of "
                "groups (published models with 128 channels and more have 32)."
            )
        if self.quantizer == "fsq" and len(self.fsq_levels) != self.code_width:
            raise InputError(
                f"code_width={self.code_width} but fsq_levels has {len(self.fsq_levels)} numbers; "
                "make them equal."
            )


class Encoder(nn.Module):
    """Images [b, h, w, c] to [b, y, x, latent_channels]."""

    channels: tuple[int, ...]
    groups: int
    mid_attention: bool
    blocks: int
    latent_channels: int
    attention_levels: tuple[int, ...]
    attention: str | None
    dtype: Any

    @nn.compact
    def __call__(self, images: Array) -> Array:
        setting = (self.groups, self.attention, self.dtype)
        x = nn.Conv(self.channels[0], (3, 3), dtype=self.dtype, name="conv_in")(images)
        for i, width in enumerate(self.channels):
            attends = i in self.attention_levels
            x = Level(width, self.blocks, attends, *setting, name=f"level_{i}")(x)
            if i < len(self.channels) - 1:
                # Stride 2 from the first pixel: the border is on the right and at the bottom.
                border = ((0, 1), (0, 1))
                conv = nn.Conv(width, (3, 3), (2, 2), border, dtype=self.dtype, name=f"down_{i}")
                x = conv(x)
        x = Middle(self.mid_attention, *setting, name="mid")(x)
        x = nn.silu(autoencoder_blocks.GroupNorm(self.groups, dtype=self.dtype, name="norm_out")(x))
        return nn.Conv(self.latent_channels, (3, 3), dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """[b, y, x, latent_channels] to images [b, h, w, c]."""

    channels: tuple[int, ...]
    groups: int
    mid_attention: bool
    blocks: int
    out_channels: int
    attention_levels: tuple[int, ...]
    attention: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        setting = (self.groups, self.attention, self.dtype)
        x = nn.Conv(self.channels[-1], (3, 3), dtype=self.dtype, name="conv_in")(x)
        x = Middle(self.mid_attention, *setting, name="mid")(x)
        for i in reversed(range(len(self.channels))):
            width, attends = self.channels[i], i in self.attention_levels
            x = Level(width, self.blocks, attends, *setting, name=f"level_{i}")(x)
            if i > 0:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = nn.Conv(width, (3, 3), dtype=self.dtype, name=f"up_{i}")(x)
        x = nn.silu(autoencoder_blocks.GroupNorm(self.groups, dtype=self.dtype, name="norm_out")(x))
        return nn.Conv(self.out_channels, (3, 3), dtype=self.dtype, name="conv_out")(x)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if the level attends."""

    channels: int
    blocks: int
    attends: bool
    groups: int
    attention: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for j in range(self.blocks):
            x = _block(self.channels, self.groups, self.dtype, f"block_{j}")(x)
            if self.attends:
                name = f"attention_{j}"
                x = _attention(self.groups, self.attention, self.dtype, name)(x)
        return x


class Middle(nn.Module):
    """Two residual blocks of the coarsest resolution, with attention between them if it attends."""

    attends: bool
    groups: int
    attention: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = _block(x.shape[-1], self.groups, self.dtype, "block_0")(x)
        if self.attends:
            x = _attention(self.groups, self.attention, self.dtype, "attention_0")(x)
        return _block(x.shape[-1], self.groups, self.dtype, "block_1")(x)


def _block(channels: int, groups: int, dtype: Any, name: str) -> autoencoder_blocks.ResnetBlock:
    return autoencoder_blocks.ResnetBlock(channels, groups, dtype=dtype, name=name)


def _attention(
    groups: int, implementation: str | None, dtype: Any, name: str
) -> autoencoder_blocks.SelfAttention:
    options: Any = dict(dtype=dtype, implementation=implementation, name=name)
    return autoencoder_blocks.SelfAttention(groups, **options)


def param_axes(module: VQGAN) -> dict[str, Names]:
    """Logical axes of a VQGAN's parameters: the rows of PARAM_AXES that it has."""
    attends = module.mid_attention or module.encoder_attention or module.decoder_attention
    has_codes = module.quantizer == "vq" and module.update == "gradient"
    left_out = (() if has_codes else ("codebook",)) + (() if attends else (".*/attention",))
    return {row: names for row, names in PARAM_AXES.items() if not row.startswith(left_out)}


PARAM_AXES = {
    r"codebook/embedding": ("codes", None),
    r"(.*/)?(bias|scale)": (None,),
    r"(.*/)?(conv_in|conv_out|conv1|conv2|down_\d|up_\d|shortcut|.*quant_conv)/kernel": (
        None,
        None,
        "in",
        "out",
    ),
    r".*/attention_\d/(query|key|value)/kernel": ("embed", "heads"),
    r".*/attention_\d/output/kernel": ("heads", "embed"),
}
