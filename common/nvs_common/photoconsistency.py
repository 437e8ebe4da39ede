"""Where the inputs agree: views warped by a plane, their robust mean and their disagreement.

The pieces of a plane sweep without learning, shared by the baseline and by models that take
such a sweep as an input. All functions take the context Views [v] of one scene and one target
Cameras [].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nvs_common import cameras as camera_lib
from nvs_common import sampling
from nvs_common.types import Array, Cameras, Views

# Largest squared colour difference that one view contributes to a cost, so that a view in which
# the surface is hidden does not veto it.
TRUNCATION = 0.02
# A view that is this many times the nearest view's distance further away weighs 1 / e.
FALLOFF = 1.5


class Agreement(NamedTuple):
    """How the views agree on a plane.

    Attributes:
      cost: [h, w] weighted mean of the truncated squared differences from the robust mean.
      error: [v, h, w] truncated squared difference of each view.
    """

    cost: Array
    error: Array


def distances(context: Cameras, target: Cameras) -> Array:
    """Distances [v] of the context cameras' centres from the target's."""
    offset = camera_lib.centers(context) - camera_lib.centers(target)[None]
    return jnp.linalg.norm(offset, axis=-1)


def remoteness(context: Cameras, target: Cameras, limit: float = 60.0) -> Array:
    """By how many times the nearest view's distance each view is further away, [v] in [0, limit].

    The limit keeps a target at an input's centre from silencing all other views.
    """
    apart = distances(context, target)
    nearest = jnp.maximum(jnp.min(apart), 1e-6 * jnp.max(apart) + 1e-12)
    return jnp.clip(apart / nearest - 1.0, 0.0, limit)


def warp(context: Views, target: Cameras, depth: Array) -> tuple[Array, Array]:
    """Inputs as seen from the target if the world were the plane z = depth of the target.

    Returns:
      colours [v, h, w, 3] and validity [v, h, w], 1 where the plane's point projects into the
      image and lies in front of the camera.
    """
    uv = camera_lib.pixel_grid(target.height, target.width)
    points = camera_lib.unproject(target, uv, jnp.broadcast_to(depth, uv.shape[:-1]))

    def one(image, camera):
        pixels, z = camera_lib.project(camera, points)
        values = sampling.gather(image, pixels, border="edge")
        seen = sampling.inside(pixels, *image.shape[:2]) & (z > camera_lib.MIN_DEPTH)
        return values, seen.astype(jnp.float32)

    return jax.vmap(one)(jnp.asarray(context.images, jnp.float32), context.cameras)


def agreement(
    colors: Array, valid: Array, closeness: Array, truncation: float = TRUNCATION
) -> Agreement:
    """Cost of a plane and the disagreement of each view on it.

    Args:
      colors: [v, h, w, 3] inputs warped by the plane.
      valid: [v, h, w] 1 where a view sees the plane.
      closeness: [v] weight of a view by distance.
      truncation: see `TRUNCATION`.
    """
    prior = closeness[:, None, None]
    error = squared_errors(colors, prior * valid, truncation)
    # A view that does not see the plane counts as half a disagreement: planes seen by one view
    # alone agree with themselves perfectly and would win otherwise.
    error = jnp.where(valid > 0, jnp.minimum(error, truncation), truncation / 2)
    return Agreement(jnp.sum(prior * error, axis=0) / jnp.sum(prior, axis=0), error)


def squared_errors(colors: Array, weights: Array, truncation: float = TRUNCATION) -> Array:
    """Squared differences [v, ...] of colours [v, ..., 3] from their robust mean.

    One step of iteratively reweighted least squares: a view in which the surface is hidden moves
    the mean less.
    """
    first = jnp.mean(jnp.square(colors - weighted_mean(colors, weights)[None]), axis=-1)
    robust = weights / (1.0 + first / (0.1 * truncation))
    return jnp.mean(jnp.square(colors - weighted_mean(colors, robust)[None]), axis=-1)


def weighted_mean(colors: Array, weights: Array) -> Array:
    """Mean of [v, ..., 3] under weights [v, ...]; the plain mean where all weights are zero.

    Colours outside of an image are those of its edge, so what no view sees continues the edges
    and does not turn black.
    """
    weights = jnp.where(jnp.any(weights > 0, axis=0)[None], weights, 1.0)
    total = jnp.sum(weights, axis=0)
    mean = jnp.einsum("v...c,v...->...c", colors, weights, precision="highest")
    return mean / jnp.maximum(total, 1e-12)[..., None]


def box(x: Array, window: int) -> Array:
    """Mean of [..., h, w] over a square window, over the part of it that lies in the image."""
    for axis in (x.ndim - 2, x.ndim - 1):
        length, radius = x.shape[axis], window // 2
        position = np.arange(length)
        counts = np.minimum(position + radius, length - 1) - np.maximum(position - radius, 0) + 1
        padding = [(0, 0)] * x.ndim
        padding[axis] = (radius, radius)
        padded = jnp.pad(x, padding)
        slices = (jax.lax.slice_in_dim(padded, k, k + length, axis=axis) for k in range(window))
        total = sum(slices, jnp.float32(0))
        shape = (1,) * axis + (length,) + (1,) * (x.ndim - 1 - axis)
        x = total / jnp.asarray(counts, jnp.float32).reshape(shape)
    return x
