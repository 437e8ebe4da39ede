"""Where the inputs agree: the robust mean of views warped by a plane, and their disagreement.

The pieces of a plane sweep without learning, shared by the baseline and by models that take
such a sweep as an input. All functions take the context Views [v] of one scene and one target
Cameras []; colours are three arrays, one for each channel: see `plane_warp`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from nvs_common import cameras as camera_lib
from nvs_common.types import Array, Cameras

# Largest squared colour difference that one view contributes to a cost, so that a view in which
# the surface is hidden does not veto it.
TRUNCATION = 0.02
# A view that is this many times the nearest view's distance further away weighs 1 / e.
FALLOFF = 1.5


Colors: TypeAlias = tuple[Array, ...]


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


def agreement(
    colors: Colors, valid: Array, closeness: Array, truncation: float = TRUNCATION
) -> Agreement:
    """Cost of a plane and the disagreement of each view on it.

    Args:
      colors: three of [v, h, w], inputs warped by the plane, see `plane_warp`.
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


def squared_errors(colors: Colors, weights: Array, truncation: float = TRUNCATION) -> Array:
    """Squared differences [v, ...] of colours, three of [v, ...], from their robust mean.

    One step of iteratively reweighted least squares: a view in which the surface is hidden moves
    the mean less.
    """
    first = squared_differences(colors, weighted_mean(colors, weights))
    robust = weights / (1.0 + first / (0.1 * truncation))
    return squared_differences(colors, weighted_mean(colors, robust))


def squared_differences(colors: Colors, mean: Colors) -> Array:
    """Mean squares [v, ...] of what three of [v, ...] differ from three of [...] by."""
    squares = [jnp.square(c - m[None]) for c, m in zip(colors, mean, strict=True)]
    return (squares[0] + squares[1] + squares[2]) / 3


def weighted_mean(colors: Colors, weights: Array) -> Colors:
    """Means [...] of three of [v, ...] under weights; plain means where all weights are zero.

    Colours outside of an image are those of its edge, so what no view sees continues the edges
    and does not turn black.
    """
    weights = jnp.where(jnp.any(weights > 0, axis=0)[None], weights, 1.0)
    share = 1 / jnp.maximum(jnp.sum(weights, axis=0), 1e-12)
    return tuple(jnp.sum(c * weights, axis=0) * share for c in colors)


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
