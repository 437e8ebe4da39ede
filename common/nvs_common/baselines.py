"""View synthesis without learning: what a model has to beat, in every evaluation table.

- `nearest_view`: the nearest input image as it is.
- `single_plane`: the world as one fronto-parallel plane. It looks at the ground truth to choose
  the plane, so it is an upper bound of what one plane can do, not a method.
- `plane_sweep`: photo-consistency on a plane sweep, soft-min over disparity, blending of the
  views that agree. A classical method with nothing trained.

All take the context Views [v] of one scene and one target Cameras [], and return [h, w, 3].
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from nvs_common import cameras as camera_lib
from nvs_common import metrics, sampling
from nvs_common.types import Array, Cameras, Views

NUM_PLANES = 64


class SweepSettings(NamedTuple):
    """Settings of `plane_sweep`, tuned on photographs of a desk and procedural rooms.

    Attributes:
      num_planes: planes, uniform in disparity between the target's near and far.
      window: side of the square over which the matching cost is averaged, as a part of the
        image's shorter side.
      min_window: least side of that square in pixels, odd.
      temperature: of the soft-min over planes, in squared intensity.
      truncation: largest squared colour difference that one view contributes to the cost, so
        that a view in which the surface is hidden does not veto it.
      falloff: blending weight of a view is exp(-distance / (falloff * nearest distance)).
    """

    num_planes: int = NUM_PLANES
    window: float = 0.09
    min_window: int = 9
    temperature: float = 3e-5
    truncation: float = 0.02
    falloff: float = 1.5


DEFAULT_SWEEP = SweepSettings()


def nearest_view(context: Views, target: Cameras) -> Array:
    """The image of the context camera whose centre is nearest to the target's, unwarped.

    Args:
      context: [v], images of the target's size.
      target: [].

    Returns:
      [h, w, 3].
    """
    _check(context, target)
    return context.images[jnp.argmin(_distances(context, target))]


def disparity_planes(target: Cameras, count: int) -> Array:
    """Depths [count] of planes uniform in disparity from far to near, ends included."""
    near = jnp.asarray(target.near, jnp.float32)
    far = jnp.asarray(target.far, jnp.float32)
    return 1.0 / jnp.linspace(1.0 / far, 1.0 / near, count)


@jax.jit
def single_plane(context: Views, target: Cameras, truth: Array) -> Array:
    """The mean of the inputs warped by the best fronto-parallel plane of the target.

    An oracle: of 64 planes uniform in disparity it takes the one with the highest PSNR against
    `truth`, so it says how much of the scene one plane can explain.

    Args:
      context: [v].
      target: [].
      truth: [h, w, 3] the target's image.

    Returns:
      [h, w, 3]; the inputs' edges continue where no input sees the plane.
    """
    _check(context, target)
    chex.assert_shape(truth, (target.height, target.width, 3))

    def mean_of_inputs(depth):
        colors, valid = _warp(context, target, depth)
        return _weighted_mean(colors, valid)

    depths = disparity_planes(target, NUM_PLANES)
    scores = jax.lax.map(lambda depth: metrics.psnr(mean_of_inputs(depth), truth), depths)
    return mean_of_inputs(depths[jnp.argmax(scores)])


def plane_sweep(context: Views, target: Cameras, settings: SweepSettings = DEFAULT_SWEEP) -> Array:
    """Blends the inputs over a plane sweep of the target, without learning.

    On every plane all inputs are warped to the target; the cost of a pixel is the weighted mean
    of the truncated squared differences of the views from their robust mean, averaged over a
    window; colours are the mean of the views that agree, weighted by closeness; the planes are
    mixed by a soft-min over the cost.

    Args:
      context: [v].
      target: []; planes lie between its near and far.
      settings: see `SweepSettings`.

    Returns:
      [h, w, 3]; the inputs' edges continue where no input sees any plane.
    """
    _check(context, target)
    return _plane_sweep(context, target, settings)


@jax.jit(static_argnames="settings")
def _plane_sweep(context: Views, target: Cameras, settings: SweepSettings) -> Array:
    distances = _distances(context, target)
    nearest = jnp.maximum(jnp.min(distances), 1e-6 * jnp.max(distances) + 1e-12)
    # Clipped so that a target at an input's centre does not silence all other views.
    relative = jnp.clip(distances / nearest, 1.0, 40.0 * settings.falloff)
    closeness = jnp.exp(-(relative - 1.0) / settings.falloff)

    def accumulate(carry, depth):
        colors, valid = _warp(context, target, depth)
        color, cost = _agreement(colors, valid, closeness, settings)
        # Online softmax over planes: the volume of costs and colours is never stored.
        logit = -cost / settings.temperature
        best, weight_sum, color_sum = carry
        new_best = jnp.maximum(best, logit)
        decay, weight = jnp.exp(best - new_best), jnp.exp(logit - new_best)
        color_sum = decay[..., None] * color_sum + weight[..., None] * color
        return (new_best, decay * weight_sum + weight, color_sum), None

    shape = (target.height, target.width)
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, 3)))
    depths = disparity_planes(target, settings.num_planes)
    (_, weight_sum, color_sum), _ = jax.lax.scan(accumulate, start, depths)
    return color_sum / weight_sum[..., None]


def _agreement(
    colors: Array, valid: Array, closeness: Array, settings: SweepSettings
) -> tuple[Array, Array]:
    """Blended colour [h, w, 3] and matching cost [h, w] of one plane.

    Args:
      colors: [v, h, w, 3] inputs warped by the plane.
      valid: [v, h, w] 1 where a view sees the plane.
      closeness: [v] blending weight by distance.
      settings: window and truncation are read.
    """
    prior = closeness[:, None, None]
    weights = prior * valid
    first = jnp.mean(jnp.square(colors - _weighted_mean(colors, weights)[None]), axis=-1)
    # One step of iteratively reweighted least squares: a view in which the surface is hidden
    # moves the mean less.
    robust = weights / (1.0 + first / (0.1 * settings.truncation))
    error = jnp.mean(jnp.square(colors - _weighted_mean(colors, robust)[None]), axis=-1)
    # A view that does not see the plane counts as half a disagreement: planes seen by one view
    # alone agree with themselves perfectly and would win otherwise.
    error = jnp.where(valid > 0, jnp.minimum(error, settings.truncation), settings.truncation / 2)
    cost = jnp.sum(prior * error, axis=0) / jnp.sum(prior, axis=0)
    # The nearest odd number of pixels.
    side = 2 * round((settings.window * min(cost.shape) - 1) / 2) + 1
    cost = _box(cost, max(side, settings.min_window))
    visible = weights / (1.0 + jnp.square(_box(error, 3) / (0.1 * settings.truncation)))
    return _weighted_mean(colors, visible), cost


def _warp(context: Views, target: Cameras, depth: Array) -> tuple[Array, Array]:
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


def _weighted_mean(colors: Array, weights: Array) -> Array:
    """Mean of [v, h, w, 3] under weights [v, h, w]; the plain mean where all weights are zero.

    Colours outside of an image are those of its edge, so what no view sees continues the edges
    and does not turn black.
    """
    weights = jnp.where(jnp.any(weights > 0, axis=0)[None], weights, 1.0)
    total = jnp.sum(weights, axis=0)
    mean = jnp.einsum("vhwc,vhw->hwc", colors, weights, precision="highest")
    return mean / jnp.maximum(total, 1e-12)[..., None]


def _box(x: Array, window: int) -> Array:
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


def _distances(context: Views, target: Cameras) -> Array:
    """Distances [v] of the context cameras' centres from the target's."""
    offset = camera_lib.centers(context.cameras) - camera_lib.centers(target)[None]
    return jnp.linalg.norm(offset, axis=-1)


def _check(context: Views, target: Cameras) -> None:
    chex.assert_shape(target.intrinsics, (4,))
    chex.assert_shape(context.images, (None, target.height, target.width, 3))
    chex.assert_shape(context.cameras.intrinsics, (context.images.shape[0], 4))
