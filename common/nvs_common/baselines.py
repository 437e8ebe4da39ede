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

from nvs_common import metrics, plane_warp
from nvs_common import photoconsistency as photo
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
    truncation: float = photo.TRUNCATION
    falloff: float = photo.FALLOFF


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
    return context.images[jnp.argmin(photo.distances(context.cameras, target))]


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
    warps = plane_warp.prepare(context, target)

    def mean_of_inputs(depth):
        colors, valid = plane_warp.warp(warps, depth)
        return jnp.stack(photo.weighted_mean(colors, valid), axis=-1)

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
    far_limit = 40.0 * settings.falloff - 1.0
    remote = photo.remoteness(context.cameras, target, far_limit)
    closeness = jnp.exp(-remote / settings.falloff)
    warps = plane_warp.prepare(context, target)

    def accumulate(carry, depth):
        colors, valid = plane_warp.warp(warps, depth)
        color, cost = _blend(colors, valid, closeness, settings)
        # Online softmax over planes: the volume of costs and colours is never stored.
        logit = -cost / settings.temperature
        best, weight_sum, color_sum = carry
        new_best = jnp.maximum(best, logit)
        decay, weight = jnp.exp(best - new_best), jnp.exp(logit - new_best)
        pairs = zip(color_sum, color, strict=True)
        color_sum = tuple(decay * before + weight * own for before, own in pairs)
        return (new_best, decay * weight_sum + weight, color_sum), None

    shape = (target.height, target.width)
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), (jnp.zeros(shape),) * 3)
    depths = disparity_planes(target, settings.num_planes)
    (_, weight_sum, color_sum), _ = jax.lax.scan(accumulate, start, depths)
    return jnp.stack(color_sum, axis=-1) / weight_sum[..., None]


def _blend(
    colors: photo.Colors, valid: Array, closeness: Array, settings: SweepSettings
) -> tuple[photo.Colors, Array]:
    """Blended colour, three of [h, w], and matching cost [h, w] of one plane.

    Args:
      colors: three of [v, h, w], inputs warped by the plane.
      valid: [v, h, w] 1 where a view sees the plane.
      closeness: [v] blending weight by distance.
      settings: window and truncation are read.
    """
    cost, error = photo.agreement(colors, valid, closeness, settings.truncation)
    # The nearest odd number of pixels.
    side = 2 * round((settings.window * min(cost.shape) - 1) / 2) + 1
    # Without the barrier XLA computes both again for every element of the windows.
    cost, error = jax.lax.optimization_barrier((cost, error))
    cost = photo.box(cost, max(side, settings.min_window))
    weights = closeness[:, None, None] * valid
    visible = weights / (1.0 + jnp.square(photo.box(error, 3) / (0.1 * settings.truncation)))
    return photo.weighted_mean(colors, visible), cost


def _check(context: Views, target: Cameras) -> None:
    chex.assert_shape(target.intrinsics, (4,))
    chex.assert_shape(context.images, (None, target.height, target.width, 3))
    chex.assert_shape(context.cameras.intrinsics, (context.images.shape[0], 4))
