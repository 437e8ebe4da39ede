"""Inputs as seen from a target if the world were a plane of it, for one plane after another.

What does not depend on the plane is computed once. Channels are arrays of their own, so that a CPU
works on runs of pixels, and each pixel lies beside its right neighbour in one complex number:
bilinear sampling then takes two reads a channel, not four, which are most of a sweep's time.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nvs_common import cameras as camera_lib
from nvs_common.types import Array, Cameras, Views


class PlaneWarp(NamedTuple):
    """Views and how the target's pixels move in them with a plane's depth.

    Attributes:
      pairs: three arrays [v * h * w], one for each channel: a pixel and the one to its right.
      slope: three arrays [v, y, x]; x, y in focal lengths and z of a view's camera axes grow by so
        much with a plane's depth.
      offset: three arrays [v], what they are at depth zero.
      center: [v, 2] principal points, pixels.
      size: height and width of the views.
    """

    pairs: tuple[Array, ...]
    slope: tuple[Array, ...]
    offset: tuple[Array, ...]
    center: Array
    size: tuple[int, int]


class Warped(NamedTuple):
    """Colours, three of [v, y, x], and validity [v, y, x]: 1 where a view sees the point."""

    colors: tuple[Array, ...]
    valid: Array


def prepare(context: Views, target: Cameras) -> PlaneWarp:
    """Context [v] and target [], ready for `warp`."""
    images = jnp.asarray(context.images, jnp.float32)
    right = jnp.concatenate([images[:, :, 1:], images[:, :, -1:]], axis=2)
    pairs = [jax.lax.complex(images[..., c], right[..., c]).reshape(-1) for c in range(3)]
    grid = camera_lib.pixel_grid(target.height, target.width)
    rays = camera_lib.camera_rays(jnp.asarray(target.intrinsics, jnp.float32), grid)
    poses = jnp.asarray(context.cameras.world_from_cam, jnp.float32)
    own = jnp.asarray(target.world_from_cam, jnp.float32)
    view_from_target = camera_lib.compose(camera_lib.invert(poses), own[None])
    focal_x, focal_y, *center = jnp.moveaxis(
        jnp.asarray(context.cameras.intrinsics, jnp.float32), -1, 0
    )
    slope, offset = [], []
    for row, scale in enumerate((focal_x, focal_y, jnp.ones_like(focal_x))):
        line = scale[:, None] * view_from_target[:, row]
        parts = [line[:, k, None, None] * rays[None, ..., k] for k in range(3)]
        slope.append(parts[0] + parts[1] + parts[2])
        offset.append(line[:, 3])
    _, height, width, _ = images.shape
    return PlaneWarp(
        tuple(pairs), tuple(slope), tuple(offset), jnp.stack(center, -1), (height, width)
    )


def warp(planes: PlaneWarp, depth: Array) -> Warped:
    """The views warped by the plane z = depth of the target.

    Outside of an image its edges continue. A point is seen where it projects into the image and
    lies in front of the camera.
    """
    height, width = planes.size
    x, y, z = (
        depth * slope + offset[:, None, None]
        for slope, offset in zip(planes.slope, planes.offset, strict=True)
    )
    # Clamped as in `cameras.project_camera`: behind the camera pixels stay finite.
    nearness = 1 / jnp.maximum(z, camera_lib.MIN_DEPTH)
    u = x * nearness + planes.center[:, 0, None, None]
    v = y * nearness + planes.center[:, 1, None, None]
    valid = (u >= 0) & (u <= width) & (v >= 0) & (v <= height) & (z > camera_lib.MIN_DEPTH)
    return Warped(_sample(planes, u, v), valid.astype(jnp.float32))


def _sample(planes: PlaneWarp, u: Array, v: Array) -> tuple[Array, ...]:
    """Bilinear samples, three of [v, y, x], at pixels of each view; see `sampling.gather`."""
    height, width = planes.size
    x, y = jnp.clip(u - 0.5, 0, width - 1), jnp.clip(v - 0.5, 0, height - 1)
    left, top = jnp.floor(x), jnp.floor(y)
    part_x, part_y = x - left, y - top
    first = (height * width) * jnp.arange(u.shape[0], dtype=jnp.int32)[:, None, None]
    upper = first + (top * width + left).astype(jnp.int32)
    lower = upper + jnp.where(top < height - 1, width, 0)
    colors = []
    for channel in planes.pairs:
        above, below = (channel.at[index].get(mode="clip") for index in (upper, lower))
        above = above.real * (1 - part_x) + above.imag * part_x
        below = below.real * (1 - part_x) + below.imag * part_x
        colors.append(above * (1 - part_y) + below * part_y)
    return tuple(colors)
