"""A quick surface of decoded views: a small NeuS, fitted in a minute or two, and its depth.

The recipe is SyncDreamer's, made smaller for a CPU: random pixels of all views, half of them of
the foreground; L1 of colours, cross-entropy of the mask, gradients of length one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depth_decoder_jax import two_pass
from nvs_common import cameras, losses
from nvs_common.errors import InputError
from nvs_common.types import Array, Cameras
from vqnerf_jax import field, image_rays, ray_render, supervision

# Steps that are compiled as one.
_CHUNK = 50
_EIKONAL_WEIGHT, _MASK_WEIGHT = 0.1, 1.0
_CLIP_NORM = 1.0
# Decoded views have a white ground, give or take this much.
WHITE = 0.06


class Recipe(NamedTuple):
    """How a surface is fitted: steps, rays of a step, peak of the learning rate, width."""

    steps: int = 600
    rays: int = 256
    learning_rate: float = 2e-3
    hidden: int = 64


RECIPE = Recipe()


class Surface(NamedTuple):
    """A fitted field in the frame of its sphere.

    Attributes:
      module: the field.
      params: its parameters.
      center: [3] of the sphere, world units.
      radius: of the sphere, world units.
      errors: [steps] mean absolute error of colours while it was fitted.
    """

    module: field.SDFField
    params: Any
    center: np.ndarray
    radius: float
    errors: np.ndarray


class _Pixels(NamedTuple):
    """All pixels of all views: rays [n], colours [n, 3], mask [n]."""

    rays: image_rays.Rays
    colors: Array
    mask: Array


def foreground(images: Any) -> np.ndarray:
    """Where views [..., h, w, 3] before white show an object; bool [..., h, w]."""
    return np.max(1 - np.asarray(images, np.float32), axis=-1) > WHITE


def fit(
    images: Any, mask: Any, cams: Cameras, recipe: Recipe = RECIPE, *, seed: int = 0
) -> Surface:
    """Fits a surface to views before white.

    Args:
      images: [v, h, w, 3] in [0, 1].
      mask: [v, h, w], the foreground.
      cams: [v]; near and far tell the sphere that holds the object.
      recipe: how.
      seed: of the field's first parameters and of the pixels.

    Raises:
      InputError: no foreground, or a fit that came to nothing finite.
    """
    mask = np.asarray(mask) > 0.5
    if not mask.any():
        raise InputError("the decoded views show nothing before white: there is no surface to fit.")
    center, radius = sphere(cams)
    # Spheres hold objects with room to spare.
    module = field.SDFField(
        layers=4,
        hidden=recipe.hidden,
        features=recipe.hidden,
        octaves=4,
        skips=(2,),
        radius=0.6,
        color_layers=2,
        color_hidden=recipe.hidden,
        color_octaves=2,
        samples=24,
        importance=24,
        rounds=2,
        precision="default",
    )
    rays = image_rays.of_cameras(cams, jnp.asarray(center), radius)
    flat = jax.tree.map(lambda x: x.reshape(mask.size, *x.shape[3:]), rays)
    colors = jnp.asarray(images, jnp.float32).reshape(-1, 3)
    pixels = _Pixels(flat, colors, jnp.asarray(mask.reshape(-1), jnp.float32))
    keys = jax.random.split(jax.random.key(seed))
    params = jax.jit(module.init)(keys[0], jnp.zeros((1, 3)), jnp.ones((1, 3)))["params"]
    params, errors = _train(module, params, pixels, recipe, keys[1])
    if not np.isfinite(errors).all():
        raise InputError("the fit of a surface came to nothing finite; check cameras and views.")
    return Surface(module, params, center, radius, errors)


def sphere(cams: Cameras) -> tuple[np.ndarray, float]:
    """Centre [3] and radius of the sphere between near and far of cameras [v] around an object."""
    poses = np.asarray(cams.world_from_cam, np.float64)
    near, far = np.asarray(cams.near, np.float64), np.asarray(cams.far, np.float64)
    middle = poses[:, :3, 3] + ((near + far) / 2)[:, None] * poses[:, :3, 2]
    return middle.mean(axis=0), float(np.mean(far - near) / 2)


def _train(
    module: field.SDFField, params: Any, pixels: _Pixels, recipe: Recipe, key: Array
) -> tuple[Any, np.ndarray]:
    warm = max(recipe.steps // 20, 1)
    schedule = optax.warmup_cosine_decay_schedule(0, recipe.learning_rate, warm, recipe.steps)
    tx = optax.chain(optax.clip_by_global_norm(_CLIP_NORM), optax.adam(schedule))
    share = 0.5 * pixels.mask / jnp.sum(pixels.mask) + 0.5 / pixels.mask.size
    likely = jnp.cumsum(share)

    @functools.partial(jax.jit, static_argnums=0)
    def run(count: int, state: Any, key: Array) -> Any:
        def step(state: Any, key: Array) -> Any:
            params, moments = state
            chosen = jax.random.uniform(key, (recipe.rays,)) * likely[-1]
            index = jnp.minimum(jnp.searchsorted(likely, chosen), likely.size - 1)
            part = jax.tree.map(lambda x: x[index], pixels)
            jitter = jax.random.uniform(jax.random.fold_in(key, 1), (recipe.rays, 1))
            (_, error), grads = jax.value_and_grad(_loss, 1, has_aux=True)(
                module, params, part, jitter
            )
            updates, moments = tx.update(grads, moments, params)
            return (optax.apply_updates(params, updates), moments), error

        return jax.lax.scan(step, state, jax.random.split(key, count))

    state, errors = (params, tx.init(params)), []
    for first in range(0, recipe.steps, _CHUNK):
        count = min(_CHUNK, recipe.steps - first)
        state, found = run(count, state, jax.random.fold_in(key, first))
        errors.append(np.asarray(found))
    return state[0], np.concatenate(errors)


def _loss(module: field.SDFField, params: Any, part: _Pixels, jitter: Array) -> Any:
    """The weighted sum, and the mean absolute error of colours."""
    out = _render(module, params, part.rays, jitter)
    error = losses.l1(out.colors, part.colors)
    mask = supervision.cross_entropy(out.opacity, part.mask)
    eikonal = out.eikonal / (out.eikonal_count + 1e-5)
    return error + _MASK_WEIGHT * mask + _EIKONAL_WEIGHT * eikonal, error


def _render(
    module: field.SDFField, params: Any, rays: image_rays.Rays, jitter: Array | None = None
) -> ray_render.RayRender:
    arrays = (rays.origins, rays.directions, rays.near, rays.far)
    options: Any = dict(background=jnp.ones(3), jitter=jitter, method="render")
    return cast(ray_render.RayRender, module.apply({"params": params}, *arrays, **options))


def depth(surface: Surface, cams: Cameras) -> two_pass.DepthMaps:
    """z-depth [v, h, w] of a surface in cameras [v], and where they see it."""
    rays = image_rays.of_cameras(cams, jnp.asarray(surface.center), surface.radius)
    shape = rays.near.shape
    flat = jax.tree.map(lambda x: x.reshape(np.prod(shape), *x.shape[3:]), rays)
    opacity, along = _opacity_and_depth(surface.module, surface.params, flat)
    # What passes has the far end in the mean; the surface's own distance is without it.
    along = (along - (1 - opacity) * flat.far) / jnp.maximum(opacity, 1e-3)
    _, directions = cameras.rays(cams)
    forward = jnp.asarray(cams.world_from_cam, jnp.float32)[:, :3, 2]
    cosine = jnp.einsum("vhwi,vi->vhw", directions, forward, precision="highest")
    found = along.reshape(shape) * surface.radius * cosine
    mask = (opacity.reshape(shape) > 0.5) & (found > 0)
    return two_pass.DepthMaps(np.asarray(found), np.asarray(mask))


@functools.partial(jax.jit, static_argnums=0)
def _opacity_and_depth(module: field.SDFField, params: Any, rays: Any) -> tuple[Array, Array]:
    def part(rays: Any) -> tuple[Array, Array]:
        out = _render(module, params, rays)
        return out.opacity, out.depth

    return image_rays.in_parts(part, rays, 1024)


def inside(surface: Surface) -> Callable[[np.ndarray], np.ndarray]:
    """A function of world points [n, 3]: which of them lie inside of the surface."""
    sdf = jax.jit(
        lambda points: surface.module.apply({"params": surface.params}, points, method="sdf")
    )

    def call(points: np.ndarray) -> np.ndarray:
        local = (np.asarray(points) - surface.center) / surface.radius
        # Beyond the sphere nothing was fitted.
        near = np.linalg.norm(local, axis=-1) < 1
        return np.asarray(sdf(jnp.asarray(local, jnp.float32)) < 0) & near

    return call


def points(surface: Surface, cams: Cameras) -> np.ndarray:
    """World points [n, 3] of the surface that cameras [v] see."""
    maps = depth(surface, cams)
    uv = cameras.pixel_grid(cams.height, cams.width)
    uv = jnp.broadcast_to(uv[None], (*maps.depth.shape, 2))
    found = cameras.unproject(cams, uv, jnp.asarray(maps.depth))
    return np.asarray(found)[np.asarray(maps.mask)]


def depth_fn(
    recipe: Recipe = RECIPE,
) -> Callable[[Array, Cameras], two_pass.DepthMaps]:
    """Depth for `two_pass.decode_with_depth`: a surface is fitted to each scene's pictures."""

    def call(images: Array, cams: Cameras) -> two_pass.DepthMaps:
        maps = []
        for index in range(images.shape[0]):
            one = cams[index]
            surface = fit(images[index], foreground(images[index]), one, recipe)
            maps.append(depth(surface, one))
        return two_pass.DepthMaps(*(np.stack(part) for part in zip(*maps, strict=True)))

    return call
