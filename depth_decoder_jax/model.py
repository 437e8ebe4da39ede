"""The depth-guided decoder (arXiv 2408.14016): latents of several views to pictures that agree.

The decoder of a video autoencoder with attention between views after its first up blocks, guided
by coarse depth, and with a picture of the object's front at full resolution. What the paper
leaves open is an attribute with its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from depth_decoder_jax import cross_view, epipolar, vae
from nvs_common.errors import InputError
from nvs_common.types import Array, Cameras, Names, Views

FRONTS = ("view", "broadcast", "none")


class FrontPyramid(nn.Module):
    """Features of the front picture at the resolutions of the up blocks.

    Attributes:
      channels: of the levels, from the finest to the coarsest; each halves the resolution.
      dtype: compute type.
    """

    channels: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> list[Array]:
        """Maps pictures [b, h, w, 3] in [-1, 1] to levels [b, y, x, c], the coarsest first."""
        levels = []
        x = images.astype(self.dtype)
        for index, width in enumerate(self.channels):
            stride = 2 if index else 1
            x = nn.Conv(width, (3, 3), stride, 1, dtype=self.dtype, name=f"conv_{index}")(x)
            levels.append(x)
            x = nn.silu(x)
        return levels[::-1]


class DepthGuidedDecoder(nn.Module):
    """Decodes the views of a scene together.

    Attributes:
      vae: the autoencoder; its decoder is part of this one.
      levels: up blocks that attention follows, from the coarsest on.
      samples: points on a ray, at each level.
      delta, aggregate, num_views, head_size, octaves, visibility, mode: see
        `cross_view.DepthTruncatedAttention`.
      front: how the front picture enters: as another "view" to look at; by "broadcast", added to
        the features of the first view, which then is the front view; "none" leaves it out.
    """

    vae: vae.SVDVAE = vae.SVDVAE()
    levels: int = 3
    samples: tuple[int, ...] = (8, 8, 16, 16)
    delta: float = 0.1
    aggregate: str = "per_view"
    num_views: int = 0
    head_size: int = 64
    octaves: int = 4
    visibility: float = 0.0
    mode: str = "depth_truncated"
    front: str = "view"

    def setup(self):
        channels = self.vae.channels[::-1]
        if not 0 < self.levels <= min(len(channels), len(self.samples)):
            raise InputError(
                f"levels={self.levels} and samples={self.samples}: the decoder has {len(channels)} "
                "up blocks, and each level needs its number of samples."
            )
        if self.front not in FRONTS:
            raise InputError(f"front={self.front!r}: choose from {list(FRONTS)}.")
        self.cross = [
            cross_view.DepthTruncatedAttention(
                samples=count,
                delta=self.delta,
                aggregate=self.aggregate,
                num_views=self.num_views,
                head_size=self.head_size,
                octaves=self.octaves,
                visibility=self.visibility,
                mode=self.mode,
                groups=self.vae.groups,
                dtype=self.vae.dtype,
            )
            for count in self.samples[: self.levels]
        ]
        if self.front != "none":
            self.pyramid = FrontPyramid(self.vae.channels, self.vae.dtype)
        if self.front == "broadcast":
            zeros = nn.initializers.zeros_init()
            setting: Any = dict(dtype=self.vae.dtype, kernel_init=zeros, use_bias=False)
            self.broadcast = [nn.Conv(c, (1, 1), **setting) for c in channels[: self.levels]]

    def __call__(
        self,
        latents: Array,
        cams: Cameras,
        depth: Array,
        mask: Array | None = None,
        front: Views | None = None,
        key: Array | None = None,
    ) -> Array:
        """Decodes views that look at each other.

        Args:
          latents: [b, v, y, x, c], unscaled, see `vae.SVDVAE.decode`; the views of a scene are
            decoded as one clip.
          cams: [b, v] of images of the decoded size.
          depth: [b, v, h, w] z-depth; a pixel without a positive number is background.
          mask: [b, v, h, w] foreground, all that has depth by default. With the defaults nothing
            is added to background, nor where no other view sees the surface; "concat_mlp" adds
            what its network makes of the view itself, the modes that compare know no background.
          front: [b] the front picture, in [0, 1], and its camera.
          key: for training: samples are drawn at random within their strata.

        Returns:
          [b, v, h, w, 3], about [-1, 1]; before training, just what the autoencoder decodes.

        Raises:
          InputError: sizes that do not fit together, a front picture that is missing.
        """
        self._check(latents, cams, front)
        known = epipolar.surfaces(cams, depth, mask)
        if self.front == "none" or front is None:
            front, levels = None, []
        else:
            levels = self.pyramid(2 * jnp.asarray(front.images) - 1)
        keys = [None] * self.levels if key is None else list(jax.random.split(key, self.levels))

        def refine(index: int, x: Array) -> Array:
            if index >= self.levels:
                return x
            seen = None
            if self.front == "broadcast":
                x = x.at[:, 0].add(self.broadcast[index](levels[index]).astype(x.dtype))
            elif front is not None:
                seen = cross_view.FrontFeatures(levels[index], front.cameras)
            return self.cross[index](x, known, seen, keys[index])

        if self.is_initializing():
            # The encoder's parameters, too, are made here.
            self.vae.encode(jnp.zeros((1, 1, self._factor(), self._factor(), self.vae.in_channels)))
        return self.vae.decode(latents, refine)

    def encode(self, images: Array) -> tuple[Array, Array]:
        """Mean and log-variance of images, see `vae.SVDVAE.encode`."""
        return self.vae.encode(images)

    def decode_plain(self, latents: Array) -> Array:
        """The pictures of the autoencoder alone, see `vae.SVDVAE.decode`."""
        return self.vae.decode(latents)

    def _factor(self) -> int:
        """Pixels to an element of the latents, along either axis."""
        return 2 ** (len(self.vae.channels) - 1)

    def _check(self, latents: Array, cams: Cameras, front: Views | None) -> None:
        factor = self._factor()
        size = (latents.shape[-3] * factor, latents.shape[-2] * factor)
        if (cams.height, cams.width) != size or jnp.shape(cams.near) != latents.shape[:2]:
            raise InputError(
                f"latents of shape {latents.shape} decode to images of {size}; there are cameras "
                f"{jnp.shape(cams.near)} of images of {(cams.height, cams.width)}: give a camera "
                "for every view, resized to the decoded images."
            )
        if self.front == "none":
            return
        if front is None:
            raise InputError(f"front={self.front!r} needs the front picture; give it, or 'none'.")
        shape = jnp.shape(front.images)
        if self.front == "broadcast" and shape[1:3] != size:
            raise InputError(
                f"the front picture has shape {shape}; front='broadcast' needs it in the size of "
                f"the decoded images, {size}."
            )
        wrong = len(shape) != 4 or shape[0] != latents.shape[0] or shape[3] != 3
        if wrong or any(n % factor for n in shape[1:3]):
            raise InputError(
                f"the front picture has shape {shape}; expected [b, h, w, 3] with b="
                f"{latents.shape[0]} and sides that are multiples of {factor}."
            )


def _joined(*tables: Mapping[str, Names]) -> dict[str, Names]:
    """One row for all that is laid out alike."""
    rows: dict[Names, list[str]] = {}
    for table in tables:
        for pattern, names in table.items():
            rows.setdefault(tuple(names), []).append(f"({pattern})")
    return {"|".join(patterns): names for names, patterns in rows.items()}


_FRONT_AXES = {
    r"pyramid/conv_\d+/bias": (None,),
    r"(pyramid/conv|broadcast)_\d+/kernel": (None, None, "in", "out"),
}
PARAM_AXES = _joined(vae.PARAM_AXES, cross_view.PARAM_AXES, _FRONT_AXES)
