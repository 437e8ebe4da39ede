"""Attention of the features of a view to those of other views of the scene (Sec. 3.2, 3.4)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from depth_decoder_jax import aggregation, epipolar
from nvs_common import attention, autoencoder_blocks, cameras
from nvs_common.errors import InputError
from nvs_common.types import Array, Cameras

MODES = ("depth_truncated", "full_epipolar", "full_cross_view")
AGGREGATES = ("per_view", "concat_mlp")


class FrontFeatures(NamedTuple):
    """The front view's features [b, y, x, c] and its camera [b]."""

    features: Array
    cameras: Cameras


class DepthTruncatedAttention(nn.Module):
    """Adds to features what other views show near the surface that they show.

    Attributes:
      samples: s, points on a ray.
      delta: they lie at depth +- delta, in world units; it has to cover the error of depth.
      aggregate: "per_view" attends to the samples in each view; "concat_mlp" merges the views of
        a sample first, for a fixed number of views.
      num_views: v, for "concat_mlp" alone.
      head_size: f of the attention heads; fewer channels are one head.
      octaves: of the encoding of a sample's place in the interval, which comes with the direction
        that it is seen from; 0 leaves both out.
      visibility: tolerance, in world units, of another input: how far a view's own depth agrees
        that it sees the sample; 0 leaves it out.
      mode: "depth_truncated"; or, to compare with, "full_epipolar": as many samples as the grid
        has rows between near and far, whatever the depth, or "full_cross_view": all pixels of all
        views, whatever the geometry.
      mlp_ratio: hidden width of the network of "concat_mlp", as a multiple of c.
      normalize: norm before the attention.
      groups: of the norm.
      dtype: compute type; geometry and softmax are float32.
    """

    samples: int = 8
    delta: float = 0.1
    aggregate: str = "per_view"
    num_views: int = 0
    head_size: int = 64
    octaves: int = 4
    visibility: float = 0.0
    mode: str = "depth_truncated"
    mlp_ratio: float = 1.0
    normalize: bool = True
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        known: epipolar.Surfaces,
        front: FrontFeatures | None = None,
        key: Array | None = None,
    ) -> Array:
        """Features with what other views add.

        Args:
          x: [b, v, y, x, c].
          known: surfaces in the views, of any multiple of that size.
          front: a view more to look at.
          key: for training: samples are drawn at random within their strata.

        Returns:
          The shape of x; x itself before any training.

        Raises:
          InputError: an unknown choice, or another number of views than `num_views`.
        """
        self._check(x)
        known = epipolar.pool(known, *x.shape[2:4])
        y = self._normalized("norm", x)
        if front is not None:
            features = self._normalized("front_norm", front.features[:, None])[:, 0]
            front = FrontFeatures(features, front.cameras)
        q = self._heads("query", y, x.shape[-1])
        if self.mode == "full_cross_view":
            found = self._over_all(q, y, front)
        elif self.aggregate == "per_view":
            found = self._per_view(q, y, known, self._samples(known, key), front)
        else:
            found = self._merged(q, y, known, self._samples(known, key), front)
        found = found.astype(self.dtype).reshape(x.shape)
        zeros = nn.initializers.zeros_init()
        output = nn.Dense(x.shape[-1], False, self.dtype, kernel_init=zeros, name="output")
        return x + output(found).astype(x.dtype)

    def _check(self, x: Array) -> None:
        for name, allowed in (("mode", MODES), ("aggregate", AGGREGATES)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r}: choose from {list(allowed)}.")
        # `not ... > 0` also refuses NaN.
        if min(self.samples, self.head_size) < 1 or not self.delta > 0:
            raise InputError(
                f"samples={self.samples}, head_size={self.head_size} and delta={self.delta} must "
                "be positive."
            )
        if self.octaves < 0 or not self.visibility >= 0:
            raise InputError(
                f"octaves={self.octaves} and visibility={self.visibility} must not be negative."
            )
        if self.aggregate == "concat_mlp" and x.shape[1] != self.num_views:
            raise InputError(
                f"{x.shape[1]} views, but aggregate='concat_mlp' was built for num_views="
                f"{self.num_views}; give as many, or train with aggregate='per_view'."
            )

    def _normalized(self, name: str, x: Array) -> Array:
        """The named norm of each view of x [b, v, y, x, c]."""
        x = x.astype(self.dtype)
        if not self.normalize:
            return x
        norm = autoencoder_blocks.GroupNorm(self.groups, dtype=self.dtype, name=name)
        return norm(x.reshape(-1, *x.shape[2:])).reshape(x.shape)

    def _heads(self, name: str, y: Array, channels: int) -> Array:
        """The named matrix times y [..., c], in heads [..., a, f]."""
        heads = math.gcd(channels, max(channels // self.head_size, 1))
        out = nn.Dense(channels, use_bias=False, dtype=self.dtype, name=name)(y)
        return out.reshape(*y.shape[:-1], heads, channels // heads)

    def _samples(self, known: epipolar.Surfaces, key: Array | None) -> epipolar.Samples:
        rows = known.depth.shape[-2]
        count = rows if self.mode == "full_epipolar" else self.samples
        jitter = None if key is None else jax.random.uniform(key, (*known.depth.shape, count))
        offsets = epipolar.strata(count, jitter)
        if self.mode == "full_epipolar":
            return epipolar.along_rays(known, offsets)
        return epipolar.around_depth(known, self.delta, offsets)

    def _per_view(
        self,
        q: Array,
        y: Array,
        known: epipolar.Surfaces,
        samples: epipolar.Samples,
        front: FrontFeatures | None,
    ) -> Array:
        """The other views' samples, each a key of its own; [b, v, y, x, a, f]."""
        channels = y.shape[-1]
        placed = None
        if front is not None:
            pair = [self._heads(f"front_{x}", front.features, channels) for x in ("key", "value")]
            placed = self._placed(front, tuple(pair), y.shape[1])
        kernel = self._description_kernel(channels, 1)
        return aggregation.per_view(
            q,
            self._heads("key", y, channels),
            self._heads("value", y, channels),
            known,
            samples,
            describe=self._describe(known, samples),
            description_kernel=None if kernel is None else kernel.reshape(-1, *q.shape[-2:]),
            front=placed,
        )

    def _merged(
        self,
        q: Array,
        y: Array,
        known: epipolar.Surfaces,
        samples: epipolar.Samples,
        front: FrontFeatures | None,
    ) -> Array:
        """The samples of a ray, each merged over the views by a network; [b, v, y, x, a, f]."""
        count, channels = y.shape[1], y.shape[-1]
        hidden = round(self.mlp_ratio * channels)
        # The views one after the other, as one layer over all of them would have it.
        init = nn.initializers.lecun_normal()
        first = self.param("first", init, (count * channels, hidden), jnp.float32)
        bias = self.param("first_bias", nn.initializers.zeros_init(), (hidden,), jnp.float32)
        placed = None
        if front is not None:
            layer = nn.Dense(hidden, use_bias=False, dtype=self.dtype, name="front_first")
            placed = self._placed(front, layer(front.features), count)
        merged = aggregation.concat_mlp(
            y,
            first.astype(self.dtype).reshape(count, channels, hidden),
            bias,
            known,
            samples,
            describe=self._describe(known, samples),
            description_kernel=self._description_kernel(hidden, count + (front is not None)),
            front=placed,
        )
        merged = jax.nn.gelu(merged, approximate=False)
        merged = nn.Dense(channels, dtype=self.dtype, name="second")(merged)
        keys, values = (self._heads(name, merged, channels) for name in ("key", "value"))
        return aggregation.over_samples(q, keys, values, samples.valid)

    def _over_all(self, q: Array, y: Array, front: FrontFeatures | None) -> Array:
        """All pixels of all views, [b, v, y, x, a, f]."""
        channels = y.shape[-1]
        flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[-2:])  # noqa: E731
        k, v = (flat(self._heads(name, y, channels)) for name in ("key", "value"))
        if front is not None:
            names = ("front_key", "front_value")
            more = [flat(self._heads(name, front.features, channels)) for name in names]
            k, v = (jnp.concatenate(both, axis=1) for both in zip((k, v), more, strict=True))
        return attention.attention(flat(q), k, v).reshape(q.shape)

    def _placed(self, front: FrontFeatures, projected: Any, count: int) -> aggregation.Front:
        height, width = front.features.shape[1:3]
        return aggregation.Front(projected, epipolar.place(front.cameras, height, width, count))

    def _description_kernel(self, width: int, count: int) -> Array | None:
        """From what `_describe` gives in each of count views to what it adds, [count, e, width]."""
        size = (4 + 2 * self.octaves if self.octaves else 0) + bool(self.visibility)
        if not size:
            return None
        init = nn.initializers.lecun_normal()
        kernel = self.param("description", init, (count * size, width), jnp.float32)
        return kernel.astype(self.dtype).reshape(count, size, width)

    def _describe(
        self, known: epipolar.Surfaces, samples: epipolar.Samples
    ) -> aggregation.Describe:
        """Direction and place in the interval of samples, and whether a view sees them."""
        encoded = _octaves(samples.offsets, self.octaves) if self.octaves else None

        def describe(
            seen: epipolar.Seen, there: epipolar.Surfaces | None, cams: Cameras
        ) -> Array | None:
            parts = []
            if encoded is not None:
                reference = known.cameras.world_from_cam
                parts = [epipolar.directions(cameras.centers(cams), reference, samples), encoded]
            if self.visibility:
                # Nothing tells of the depth of the front view.
                agrees = jnp.ones_like(seen.depth)
                if there is not None:
                    agrees = epipolar.visibility(there, seen, self.visibility)
                parts.append(agrees[..., None])
            return jnp.concatenate(parts, axis=-1) if parts else None

        return describe


def _octaves(place: Array, count: int) -> Array:
    """A number in [-1, 1], and its sine and cosine at growing frequencies, [..., 1 + 2 count]."""
    angles = place[..., None] * jnp.pi * 2.0 ** jnp.arange(count).reshape((1,) * place.ndim + (-1,))
    return jnp.concatenate([place[..., None], jnp.sin(angles), jnp.cos(angles)], axis=-1)


# `cross_N` stands before the names in the decoder.
_LAYER = r"(cross_\d+/)?"
_NAMES = r"(front_)?(query|key|value|first)|second"
PARAM_AXES = {
    rf"{_LAYER}(((front_)?norm|second)/(scale|bias)|first_bias)": (None,),
    rf"{_LAYER}(({_NAMES})/kernel|first|description)": ("in", "out"),
    rf"{_LAYER}output/kernel": ("out", "in"),
}
