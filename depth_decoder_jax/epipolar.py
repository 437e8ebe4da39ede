"""Samples of rays around known depth, and where other views see them (Sec. 3.2).

Geometry is float32. Depth is z-depth; cameras are those of the feature grid: an image of y x x
pixels. What is inferred, for the paper does not say: samples are strata of the interval depth
+- delta, one that lies behind a camera or outside of its image is masked, and background is left
as it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp

from nvs_common import cameras, sampling
from nvs_common.errors import InputError
from nvs_common.types import Array, Cameras


@flax.struct.dataclass
class Surfaces:
    """What the cameras of a scene see: depth, where there is any.

    Attributes:
      cameras: [b, v] of images of the size of the maps.
      depth: [b, v, h, w] z-depth in world units.
      mask: [b, v, h, w] bool, the foreground; elsewhere depth means nothing, but is finite.
    """

    cameras: Cameras
    depth: Any
    mask: Any


class Samples(NamedTuple):
    """Points on the rays of all pixels of all views.

    Attributes:
      points: [b, v, y, x, s, 3] in the world.
      offsets: [b, v, y, x, s] place within the interval, -1 its near end, 1 its far end.
      valid: [b, v, y, x, s] bool: before the camera, on a ray that is not background.
    """

    points: Array
    offsets: Array
    valid: Array


class Seen(NamedTuple):
    """Samples in another view.

    Attributes:
      uv: [b, v, y, x, s, 2] pixels of that view.
      depth: [b, v, y, x, s] z-depth in it.
      mask: [b, v, y, x, s] bool: valid, before that camera and inside of its image.
    """

    uv: Array
    depth: Array
    mask: Array


def surfaces(cams: Cameras, depth: Any, mask: Any = None) -> Surfaces:
    """Checks maps of depth and makes them safe to compute with.

    A pixel whose depth is not a positive number is background.

    Args:
      cams: [b, v].
      depth: [b, v, h, w] z-depth.
      mask: [b, v, h, w], foreground where it is more than a half; by default all with depth.

    Raises:
      InputError: maps of another size than the cameras' images.
    """
    depth = jnp.asarray(depth, jnp.float32)
    wanted = (*jnp.shape(cams.near), cams.height, cams.width)
    for name, map_ in (("depth", depth), ("mask", mask)):
        if map_ is not None and jnp.shape(map_) != wanted:
            raise InputError(
                f"{name} has shape {jnp.shape(map_)}, but the cameras' images are [b, v, h, w] = "
                f"{wanted}; give a map for every view, of the size of its image."
            )
    known = jnp.isfinite(depth) & (depth > cameras.MIN_DEPTH)
    if mask is not None:
        known &= jnp.asarray(mask, jnp.float32) > 0.5
    return Surfaces(cameras.as_float32(cams), jnp.where(known, depth, 1.0), known)


def pool(known: Surfaces, height: int, width: int) -> Surfaces:
    """The surfaces on a coarser grid: the mean depth of what foreground a cell has (Sec. 3.4).

    A mean over background, too, would put points into the air between the two.

    Raises:
      InputError: cells that are no whole number of pixels.
    """
    h, w = known.depth.shape[-2:]
    if h % height or w % width:
        raise InputError(
            f"depth of {h} x {w} pixels does not divide into a grid of {height} x {width} cells; "
            "give depth of the size of the decoded images."
        )
    cells = (*known.depth.shape[:-2], height, h // height, width, w // width)
    weight = known.mask.astype(jnp.float32)
    total = jnp.sum((known.depth * weight).reshape(cells), axis=(-3, -1))
    count = jnp.sum(weight.reshape(cells), axis=(-3, -1))
    # Cells of background alone would divide by zero, in the gradient as well.
    depth = jnp.where(count > 0, total / jnp.maximum(count, 1.0), 1.0)
    return Surfaces(cameras.resize(known.cameras, height, width), depth, count > 0)


def strata(num_samples: int, jitter: Array | None = None) -> Array:
    """Places of samples in equal parts of [-1, 1]: their middles, or moved by jitter.

    Args:
      num_samples: s.
      jitter: [..., s] in [0, 1), the place within a part.

    Returns:
      [s] or [..., s].
    """
    start = jnp.arange(num_samples, dtype=jnp.float32)
    if jitter is None:
        return 2 * (start + 0.5) / num_samples - 1
    return 2 * (start.reshape((1,) * (jitter.ndim - 1) + (-1,)) + jitter) / num_samples - 1


def around_depth(known: Surfaces, delta: float, offsets: Array) -> Samples:
    """Samples at depth + delta * offsets, offsets [s] or [b, v, y, x, s]."""
    offsets = _on_every_ray(offsets, known)
    return _samples(known.cameras, known.depth[..., None] + delta * offsets, offsets, known.mask)


def along_rays(known: Surfaces, offsets: Array) -> Samples:
    """Samples between the cameras' near and far depth, whatever is known of the surfaces."""
    near, far = (x[..., None, None, None] for x in (known.cameras.near, known.cameras.far))
    offsets = _on_every_ray(offsets, known)
    depth = near + (far - near) * (offsets + 1) / 2
    return _samples(known.cameras, depth, offsets, jnp.ones_like(known.mask))


def _on_every_ray(offsets: Array, known: Surfaces) -> Array:
    lead = (1,) * (known.depth.ndim + 1 - offsets.ndim)
    shape = (*known.depth.shape, offsets.shape[-1])
    return jnp.broadcast_to(offsets.reshape(lead + offsets.shape), shape)


def _samples(cams: Cameras, depth: Array, offsets: Array, mask: Array) -> Samples:
    uv = cameras.pixel_grid(cams.height, cams.width)[None, None, :, :, None]
    uv = jnp.broadcast_to(uv, (*depth.shape, 2))
    valid = mask[..., None] & (depth > cameras.MIN_DEPTH)
    return Samples(cameras.unproject(cams, uv, depth), offsets, valid)


def see(cams: Cameras, samples: Samples) -> Seen:
    """Where cameras [b, v] see the samples, those of view i in camera i."""
    uv, depth = cameras.project(cams, samples.points)
    mask = samples.valid & (depth > cameras.MIN_DEPTH)
    return Seen(uv, depth, mask & sampling.inside(uv, cams.height, cams.width))


def gather(maps: Array, uv: Array) -> Array:
    """Bilinear samples [b, v, y, x, s, c] of maps [b, v, y, x, c] at uv; zeros outside."""
    chex.assert_equal_shape_prefix([maps, uv], 2)
    return jax.vmap(jax.vmap(sampling.gather))(maps, uv)


def other_depth(known: Surfaces, uv: Array) -> tuple[Array, Array]:
    """Depth that views [b, v] know at uv [b, v, y, x, s, 2], and the share of it that is known."""
    weight = known.mask.astype(jnp.float32)
    both = jnp.stack([known.depth * weight, weight], axis=-1)
    total, share = jnp.moveaxis(gather(both, uv), -1, 0)
    return total / jnp.where(share > 0, share, 1.0), share


def visibility(known: Surfaces, seen: Seen, tolerance: float) -> Array:
    """How far a view's own depth agrees that it sees the samples, [b, v, y, x, s] in [0, 1].

    Soft, for depth is wrong just where it jumps; zero where the view knows no depth.
    """
    depth, share = other_depth(known, seen.uv)
    return share * jnp.exp(-0.5 * jnp.square((seen.depth - depth) / tolerance))


def directions(centers: Array, world_from_reference: Array, samples: Samples) -> Array:
    """Unit vectors from centers [b, v, 3] to the samples in the axes of reference cameras [b, v].

    Returns:
      [b, v, y, x, s, 3].
    """
    away = samples.points - centers[:, :, None, None, None]
    # Finite, and with a finite gradient, for a sample in the centre itself.
    away = away * jax.lax.rsqrt(jnp.sum(jnp.square(away), axis=-1, keepdims=True) + 1e-12)
    rotation = world_from_reference[..., :3, :3]
    return jnp.einsum("bvij,bvyxsi->bvyxsj", rotation, away, precision="highest")


def turn(tree: Any, shift: Array) -> Any:
    """Arrays [b, v, ...] with view i + shift, of a circle of views, in the place of view i."""

    def one(x: Array) -> Array:
        count = x.shape[1]
        return jnp.take(x, (jnp.arange(count) + shift) % count, axis=1)

    return jax.tree.map(one, tree)


def place(cams: Cameras, height: int, width: int, count: int) -> Cameras:
    """Cameras [b] of a view that all views look at, [b, count] of a grid of features."""
    cams = cameras.resize(cameras.as_float32(cams), height, width)
    repeat = lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], count, *x.shape[1:]))  # noqa: E731
    return dataclasses.replace(jax.tree.map(repeat, cams), height=height, width=width)
