"""Flicker along a camera path: neighbouring frames compared where they show the same point.

The depth of a frame says where each of its pixels lay in the frame before. The frame before is
read there, and what it shows should be what the frame shows. Pixels that the frame before did not
see do not count. Shading that truly changes with the direction of view counts as a difference,
and so does the resampling: the same measure of true frames with true depth is the floor.
"""

from __future__ import annotations

from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp

from nvs_common import cameras as geometry
from nvs_common import sampling
from nvs_common.types import Array, Cameras

# Points are the same if their depths differ by at most this part.
TOLERANCE = 0.02
# Smallest mean squared difference that is told apart from zero, as in `metrics`: 100 dB.
MIN_MSE = 1e-10


@flax.struct.dataclass
class Frame:
    """A frame of a path, or several: images [..., h, w, 3], z-depth [..., h, w], cameras [...].

    Arrays may be NumPy or JAX.
    """

    images: Any
    depth: Any
    cameras: Cameras


@flax.struct.dataclass
class Flicker:
    """How much a frame differs from the one before it, both float32 scalars per pair [...].

    Attributes:
      absolute: mean absolute difference of the pixels compared; NaN where there are none.
      squared: mean squared difference of these.
      share: part of the frame's pixels that were compared, 0 to 1.
    """

    absolute: Array
    squared: Array
    share: Array

    @property
    def decibels(self) -> Array:
        """The squared difference as a PSNR; equal frames give 100."""
        return -10.0 * jnp.log10(jnp.maximum(self.squared, MIN_MSE))


def flicker(before: Frame, frame: Frame, *, tolerance: float = TOLERANCE) -> Flicker:
    """Compares a frame with the one before it, warped by the frame's depth.

    Args:
      before: [] the frame before.
      frame: [] the frame.
      tolerance: a pixel counts if the depth that `before` has where the pixel is found differs
        from the pixel's own, as seen from there, by at most this part.
    """
    warped, same = warp(before, frame, tolerance=tolerance)
    return compare(warped, frame.images, same)


def warp(before: Frame, frame: Frame, *, tolerance: float = TOLERANCE) -> tuple[Array, Array]:
    """The frame before as the frame's camera would see it, and where that is known.

    Args:
      before: [] the frame before.
      frame: [] the frame; its images are not read.
      tolerance: see `flicker`.

    Returns:
      images [h, w, 3], and bool [h, w]: the pixel's point lies in the image before, not nearer to
      its border than half a pixel, and nothing hides it there.
    """
    chex.assert_equal_shape_prefix([frame.images, frame.depth], 2)
    chex.assert_equal_shape_prefix([before.images, before.depth], 2)
    camera, other = frame.cameras, before.cameras
    points = geometry.unproject(
        camera, geometry.pixel_grid(camera.height, camera.width), jnp.asarray(frame.depth)
    )
    uv, z = geometry.project(other, points)
    # Beyond the outermost pixel centres there is nothing to interpolate between.
    inside = sampling.inside(uv - 0.5, other.height - 1, other.width - 1)
    # The inverse: it is linear on a plane, so that interpolation is exact there.
    inverse = 1 / jnp.maximum(jnp.asarray(before.depth, jnp.float32), geometry.MIN_DEPTH)
    seen = sampling.gather(inverse[..., None], uv, border="edge")[..., 0]
    same = inside & (z > geometry.MIN_DEPTH) & (jnp.abs(seen * z - 1) <= tolerance)
    warped = sampling.gather(jnp.asarray(before.images, jnp.float32), uv, border="edge")
    return warped, same


def compare(warped: Array, images: Array, same: Array) -> Flicker:
    """Differences of two images [h, w, 3] over the pixels where `same` [h, w] is true."""
    chex.assert_equal_shape([warped, images])
    difference = jnp.asarray(warped, jnp.float32) - jnp.asarray(images, jnp.float32)
    count = jnp.sum(same)
    # Not a product: what is not compared may be NaN.
    kept = jnp.where(same[..., None], difference, 0.0)
    elements = 3.0 * count
    absolute, squared = jnp.sum(jnp.abs(kept)) / elements, jnp.sum(jnp.square(kept)) / elements
    return Flicker(absolute, squared, count / same.size)


def path_flicker(frames: Frame, *, tolerance: float = TOLERANCE) -> Flicker:
    """`flicker` of every frame [t] of a path but the first: [t - 1]."""
    before, after = (jax.tree.map(lambda x, s=s: x[s], frames) for s in (slice(-1), slice(1, None)))
    return jax.vmap(lambda a, b: flicker(a, b, tolerance=tolerance))(before, after)
