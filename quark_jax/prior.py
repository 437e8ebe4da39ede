"""Photo-consistency as a starting point of the network (not in the paper).

Quark learns from pictures alone what makes views agree, over 600,000 steps. With
`Quark.sweep_planes` a plane sweep of the inputs' colours tells it from the first step where they
agree: every stage reads what the sweep found in its layers, depth and density start at the
sweep's, and blending starts at close views whose line of sight is free. The network learns what to
change. Nothing here is trained, and no gradient passes.

Functions take one target and its context [v], as in `ldm`. Dimension key: k planes, w windows.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nvs_common import cameras, photoconsistency, plane_warp
from nvs_common.types import Array, Cameras, Views
from quark_jax import ldm

# Sides of the windows over which costs are averaged, in elements of a map of WINDOW_ROWS rows,
# and temperatures of the soft-min over planes: wide windows average noise away and afford a
# sharper one.
WINDOWS = ((7, 1e-4), (3, 3e-4), (13, 3e-5))
WINDOW_ROWS = 32
# Per window; the first two are what depth and density start at, from the first window.
FEATURES_PER_WINDOW = 6
DEPTH, DENSITY = 0, 1
NUM_FEATURES = FEATURES_PER_WINDOW * len(WINDOWS)
# An element is hidden from a view where the map itself is nearer to it by more than this part of
# the disparity range.
SHADOW_MARGIN = 0.01
# Where wrong planes differ by less than this (squared colour difference), colours are amplified, at
# most so many times: in the dark, and on faint texture, a small difference tells as much. Measured
# on photographs of a dim desk (weights of the checkout, two views of 288x512): SSIM .862 and .774
# without, .894 and .807 with it; 3 times as much contrast loses on a sunlit street.
CONTRAST = 0.01
MAX_GAIN = 5.0
# Planes, uniform in disparity, and side of the window over which that difference is averaged.
CONTRAST_PLANES, CONTRAST_WINDOW = 8, 13
# Squared colour difference at which a view stops to agree with the others.
AGREEMENT_SCALE = 0.1 * photoconsistency.TRUNCATION


class BlendCues(NamedTuple):
    """What speaks against a view in the blend; all zero for the nearest, unobstructed one.

    Attributes:
      remote: [v] see `photoconsistency.remoteness`.
      hidden: [v, l, y, x] how far, in parts of the disparity range, the map covers an element.
      differs: [v, l, y, x] log1p of the squared, scaled difference from the views' robust mean.
    """

    remote: Array
    hidden: Array
    differs: Array


class Sweep:
    """The sweeps of many targets and what the network reads of them."""

    def __init__(self, context: Views, targets: Cameras, size: tuple[int, int], planes: int):
        """Sweeps targets [b, t] through context [b, v], both resized to the map's size."""
        images = ldm.resize(jnp.asarray(context.images, jnp.float32), *size)
        self._context = Views(images, cameras.resize(context.cameras, *size))
        self._targets = cameras.resize(targets, *size)
        one = functools.partial(sweep_costs, planes=planes)
        # XLA for CPUs is slow where views, which are summed over, are not the first axis.
        costs = jax.lax.platform_dependent(
            self._context,
            self._targets,
            cpu=lambda *of_scenes: jax.lax.map(
                lambda scene: jax.lax.map(functools.partial(one, scene[0]), scene[1]), of_scenes
            ),
            default=jax.vmap(jax.vmap(one, in_axes=(None, 0))),
        )
        self._costs = costs.reshape(-1, *costs.shape[2:])

    def features(self, volume: Array) -> Array:
        """Features [n, l, y, x, f] on the grid and in the layers of a volume [n, l, y, x, c].

        n is b times t, targets of one scene side by side.
        """
        _, num_layers, height, width, _ = volume.shape
        one = functools.partial(layer_features, num_layers=num_layers)
        features = ldm.resize(jax.vmap(one)(self._costs), height, width)
        return jax.lax.stop_gradient(features)

    def cues(self, depth_logits: Array, density_logits: Array) -> BlendCues:
        """Cues with leading [n] for maps [n, l, y, x] on the finest grid."""
        count = self._targets.near.shape[1]
        shape = (-1, count, *depth_logits.shape[1:])
        depth, density = depth_logits.reshape(shape), jax.nn.sigmoid(density_logits).reshape(shape)
        over_targets = jax.vmap(blend_cues, in_axes=(0, 0, 0, None))
        cues = jax.vmap(over_targets)(depth, density, self._targets, self._context)
        return jax.tree.map(lambda x: jax.lax.stop_gradient(x.reshape(-1, *x.shape[2:])), cues)


def read(sweep: Sweep | None, volume: Array) -> Array | None:
    """What a model without a sweep, or with one, reads of it: see `Sweep.features`."""
    return None if sweep is None else sweep.features(volume)


def sweep_costs(context: Views, target: Cameras, planes: int) -> Array:
    """Matching costs [w, k, y, x] of planes uniform in disparity, from far to near.

    Args:
      context: [v] images at about the resolution of the map.
      target: [] of the map's size; a plane lies in the middle of its part of its near to far.
      planes: k.
    """
    closeness = _closeness(context.cameras, target)
    gain = contrast_gain(context, target)[None]
    sides = window_sides(target.height)
    warps = plane_warp.prepare(context, target)

    def one(depth: Array) -> Array:
        colors, valid = plane_warp.warp(warps, depth)
        colors = tuple(gain * channel for channel in colors)
        cost = photoconsistency.agreement(colors, valid, closeness).cost
        # Without the barrier XLA computes the cost again for every element of the windows.
        cost = jax.lax.optimization_barrier(cost)
        return jnp.stack([photoconsistency.box(cost, side) for side in sides])

    return jnp.moveaxis(jax.lax.map(one, _plane_depths(target, planes)), 1, 0)


def window_sides(rows: int) -> tuple[int, ...]:
    """Odd sides of the windows in a map of so many rows, which grow with the square root.

    In a finer map a window of as many elements covers less of the scene and less texture, one of
    the same part of the scene blurs what the map could resolve. On two photographs each of a desk
    and a street, maps of 144 rows, SSIM was .850 and .356 with the sides of 32 rows, .859 and .362
    with twice and .856 and .357 with four times these.
    """
    scale = math.sqrt(rows / WINDOW_ROWS) if rows > WINDOW_ROWS else 1.0
    return tuple(2 * round((scale * side - 1) / 2) + 1 for side, _ in WINDOWS)


def contrast_gain(context: Views, target: Cameras) -> Array:
    """By how much colours are amplified before they are compared, [y, x] from 1 to MAX_GAIN.

    The costs' truncation and temperatures are absolute. This brings the difference that views
    show on an average plane, which is mostly a wrong one, up to CONTRAST; it is the same on every
    plane, so that it favours none.

    Args:
      context: [v] images at about the resolution of the map.
      target: [] of the map's size.
    """
    closeness = _closeness(context.cameras, target)[:, None, None]
    warps = plane_warp.prepare(context, target)

    def difference(depth: Array) -> Array:
        colors, valid = plane_warp.warp(warps, depth)
        weights = closeness * valid
        mean = photoconsistency.weighted_mean(colors, weights)
        squared = photoconsistency.squared_differences(colors, mean)
        return jnp.sum(weights * squared, axis=0) / jnp.maximum(jnp.sum(weights, axis=0), 1e-6)

    planes = jax.lax.map(difference, _plane_depths(target, CONTRAST_PLANES))
    typical = photoconsistency.box(jnp.mean(planes, axis=0), CONTRAST_WINDOW)
    return jnp.clip(jnp.sqrt(CONTRAST / (typical + 1e-5)), 1.0, MAX_GAIN)


def _plane_depths(target: Cameras, planes: int) -> Array:
    fractions = ldm.anchors(planes)
    return 1 / (fractions * (1 / target.near - 1 / target.far) + 1 / target.far)


def layer_features(costs: Array, num_layers: int) -> Array:
    """What the sweep found in each layer's band: [l, y, x, NUM_FEATURES].

    For each window: logits of depth and density (those of an LDM that composites to the
    soft-min), the weight of the band, the depth's offset in it, the least cost in the band, and
    its distance from the least of all.

    Args:
      costs: [w, k, y, x]; k is a multiple of num_layers.
      num_layers: l.
    """
    planes = costs.shape[1]
    if planes % num_layers:
        raise ValueError(
            f"sweep_planes={planes} is not a multiple of the map's {num_layers} layers"
        )
    positions = 2 * ldm.anchors(planes // num_layers) - 1

    def group(x: Array) -> Array:
        return x.reshape(num_layers, -1, *x.shape[1:])

    features = []
    for cost, (_, temperature) in zip(costs, WINDOWS, strict=True):
        weights = group(jax.nn.softmax(-cost / temperature, axis=0)).sum(axis=1)
        within = jax.nn.softmax(-group(cost) / temperature, axis=1)
        offset = jnp.einsum("lkyx,k->lyx", within, positions)
        least = group(cost).min(axis=1)
        excess = least - cost.min(axis=0)[None]
        features += [jnp.arctanh(jnp.clip(offset, -0.97, 0.97)), _density_logit(weights)]
        features += [weights, offset, jnp.sqrt(least) * 7, jnp.sqrt(excess) * 7]
    return jnp.stack(features, axis=-1)


def blend_cues(depth_logits: Array, density: Array, target: Cameras, context: Views) -> BlendCues:
    """Which views an element should not take its colour from.

    Args:
      depth_logits: [l, y, x].
      density: [l, y, x] alpha.
      target: [] of the map's size.
      context: [v] images at about the resolution of the map.
    """
    depth = ldm.depths(depth_logits, target.near, target.far)
    per_unit = 1 / (1 / target.near - 1 / target.far)

    def view(image: Array, camera: Cameras) -> tuple[Array, Array, Array]:
        projection = ldm.project(depth, target, camera)
        # Nearness to the view, as the view itself and as an element sees it.
        nearness = per_unit / jnp.maximum(_depth_in(camera, target, depth), 0.3 * target.near)
        nearest = ldm.splat_to_view(
            nearness[..., None], density, projection.uv, *depth.shape[1:], normalize=True
        )
        cover = ldm.back_project(nearest, projection.uv)[..., 0] - nearness
        hidden = jnp.maximum(cover - SHADOW_MARGIN, 0)
        return hidden, ldm.back_project(image, projection.uv), projection.valid

    hidden, colors, valid = jax.vmap(view)(jnp.asarray(context.images), context.cameras)
    closeness = _closeness(context.cameras, target)
    weights = closeness.reshape(-1, 1, 1, 1) * valid
    errors = photoconsistency.squared_errors(tuple(jnp.moveaxis(colors, -1, 0)), weights)
    differs = jnp.log1p(jnp.square(errors / AGREEMENT_SCALE)) * valid
    return BlendCues(photoconsistency.remoteness(context.cameras, target), hidden, differs)


def _closeness(context: Cameras, target: Cameras) -> Array:
    return jnp.exp(-photoconsistency.remoteness(context, target) / photoconsistency.FALLOFF)


def _density_logit(weights: Array) -> Array:
    """Logits of densities that composite to the weights [l, ...], which sum to one."""
    nearer = jnp.cumsum(weights[::-1], axis=0)[::-1] - weights
    density = jnp.clip(weights / jnp.maximum(1 - nearer, 1e-3), 1e-3, 1 - 1e-3)
    return jnp.log(density) - jnp.log1p(-density)


def _depth_in(view: Cameras, target: Cameras, depth: Array) -> Array:
    """z-depth in a view of elements [l, y, x] given by their depth in the target."""
    view_from_target = cameras.compose(cameras.invert(view.world_from_cam), target.world_from_cam)
    rays = cameras.camera_rays(target.intrinsics, cameras.pixel_grid(target.height, target.width))
    slope = jnp.einsum("yxi,i->yx", rays, view_from_target[2, :3], precision="highest")
    return depth * slope[None] + view_from_target[2, 3]
