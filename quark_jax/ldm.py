"""The layered depth map (LDM): pure functions from logits and cameras to pictures.

An LDM lives in the frustum of one target camera. Layer 1 (index 0) is the farthest. Each layer
is confined to its own band of disparity, so layers never cross and the compositing order is
fixed (Quark, arXiv 2411.16680, Sec. 3.1). Functions here take one target and one view; batch
them with `jax.vmap`. Geometry is float32.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from nvs_common import cameras, compositing, sampling
from nvs_common.types import Array, Cameras, Render, Views

# Points nearer to a view's camera plane than this part of the target's near are not seen by it.
MIN_VIEW_DEPTH = 1e-2


class Projection(NamedTuple):
    """Where each element of an LDM falls in one view.

    Attributes:
      uv: [l, y, x, 2] as a fraction of the view's width and height, so that it serves every
        resolution of the view.
      valid: [l, y, x] bool: in front of the view and inside its image.
      front: [l, y, x] bool: in front of the view.
    """

    uv: Array
    valid: Array
    front: Array


class Logits(NamedTuple):
    """An LDM before activation.

    Attributes:
      depth: [l, y, x] before tanh.
      density: [l, y, x] before the sigmoid.
      blend: [v, l, y, x] before the softmax over views; None where nothing is blended.
      color: [l, y, x, 3] before the sigmoid, or None: only in the RGB ablation.
    """

    depth: Array
    density: Array
    blend: Array | None = None
    color: Array | None = None


class Window(NamedTuple):
    """A part of a picture: the corner may be traced, the size is static.

    Attributes:
      top: [] first row.
      left: [] first column.
      height: rows.
      width: columns.
    """

    top: Array | int
    left: Array | int
    height: int
    width: int


def anchors(num_layers: int) -> Array:
    """Middle of each layer's band as a fraction of the disparity range, [l] (Eq. 3)."""
    return (jnp.arange(num_layers, dtype=jnp.float32) + 0.5) / num_layers


def depths(logits: Array, near: Array, far: Array) -> Array:
    """Depth of each layer from its logit (Eq. 4).

    Args:
      logits: [l, ...]; zero is the middle of the layer's disparity band.
      near: [] z-depth of the near plane.
      far: [] z-depth of the far plane.

    Returns:
      [l, ...] z-depth, decreasing from layer to layer.
    """
    num_layers = logits.shape[0]
    anchor = anchors(num_layers).reshape((-1,) + (1,) * (logits.ndim - 1))
    return depth_in_band(logits, anchor, num_layers, near, far)


def depth_in_band(logits: Array, anchor: Array, num_layers: int, near: Array, far: Array) -> Array:
    """Depth of elements [...] whose bands have their middles at `anchor` (Eq. 4)."""
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    fraction = anchor.astype(dtype) + 0.5 / num_layers * jnp.tanh(logits.astype(dtype))
    return 1 / (fraction * (1 / near - 1 / far) + 1 / far)


def project(depth: Array, target: Cameras, view: Cameras) -> Projection:
    """Projects LDM elements into a view.

    Args:
      depth: [l, y, x] z-depth in the target camera.
      target: [] camera of the LDM, whose height and width are the grid's (y, x).
      view: [] camera to project into.

    Returns:
      Positions as a fraction of the view's size, and which of them the view sees.
    """
    chex.assert_shape(depth, (None, target.height, target.width))
    view_from_target = cameras.compose(cameras.invert(view.world_from_cam), target.world_from_cam)
    dtype = depth.dtype
    fx, fy, cx, cy = jnp.asarray(target.intrinsics)
    # Coordinates are planes of their own, which is several times faster than triples. Rays are
    # turned once; what is left for every layer is a multiplication by its depth.
    x = ((jnp.arange(target.width, dtype=dtype) + 0.5 - cx) / fx).reshape(1, 1, -1)
    y = ((jnp.arange(target.height, dtype=dtype) + 0.5 - cy) / fy).reshape(1, -1, 1)
    right, down, z = (
        (row[0] * x + row[1] * y + row[2]) * depth + row[3] for row in view_from_target[:3]
    )
    front = z > MIN_VIEW_DEPTH * target.near
    # Clamped so that a point behind the camera gives a finite pixel and gradient.
    safe = jnp.maximum(z, cameras.MIN_DEPTH)
    fx, fy, cx, cy = jnp.asarray(view.intrinsics)
    uv = jnp.stack([right / safe * fx + cx, down / safe * fy + cy], axis=-1)
    valid = front & sampling.inside(uv, view.height, view.width)
    size = jnp.array([view.width, view.height], uv.dtype).reshape(1, 1, 1, 2)
    # What lies behind the camera is moved out of the image: it can then neither be gathered
    # nor splatted, and its gradient is zero instead of huge.
    uv = jnp.where(front[..., None], uv / size, -2.0)
    return Projection(jnp.clip(uv, -2.0, 3.0), valid, front)


def back_project(features: Array, uv: Array) -> Array:
    """Brings a view's features [y, x, c] to the LDM: P^T of Sec. 3.1.

    Args:
      features: [y, x, c] of the view, at any resolution.
      uv: [l, y, x, 2] fractions of the view's size.

    Returns:
      [l, y, x, c], zero outside the view.
    """
    return sampling.gather(features, _pixels(uv, features.shape[0], features.shape[1]))


def view_colors(image: Array, uv: Array) -> Array:
    """Colours [..., 3] of a view's image at positions [..., 2], continued with its edge."""
    return sampling.gather(image, _pixels(uv, *image.shape[:2]), border="edge")


def splat_to_view(
    appearance: Array,
    density: Array,
    uv: Array,
    height: int,
    width: int,
    *,
    normalize: bool = False,
) -> Array:
    """Renders an LDM into an input view by splatting its layers (Eq. 2).

    Args:
      appearance: [l, y, x, c].
      density: [l, y, x] alpha of each element.
      uv: [l, y, x, 2] fractions of the view's size.
      height: rows of the picture.
      width: columns of the picture.
      normalize: divide each layer by max(splat of ones, 1), so that elements that pile up on
        a pixel are averaged. The published formula does not.

    Returns:
      [h, w, c]. Layers keep their order, which holds in every view whose centre is in front of
      the near plane.
    """
    chex.assert_equal_shape([density, uv[..., 0]])
    values = jnp.concatenate([appearance, density[..., None]], axis=-1)
    if normalize:
        values = jnp.concatenate([values, jnp.ones_like(density)[..., None]], axis=-1)

    def layer(values_yxc: Array, uv_yx: Array) -> Array:
        return sampling.splat(values_yxc, _pixels(uv_yx, height, width), height, width)

    image = jax.vmap(layer)(values, uv)
    if normalize:
        image = image[..., :-1] / jnp.maximum(image[..., -1:], 1)
    # Elements that pile up can exceed an alpha of one, which no compositing can use.
    return compositing.over(image[..., :-1], jnp.clip(image[..., -1], 0, 1))


def resize(x: Array, height: int, width: int, *, window: Window | None = None) -> Array:
    """Resamples the two axes before the last bilinearly; antialiased when it shrinks.

    Args:
      x: [..., y, x, c].
      height: rows of the whole result.
      width: columns of the whole result.
      window: the part of the result that is computed, all of it by default.

    Returns:
      [..., h, w, c].
    """
    y, x_axis = x.ndim - 3, x.ndim - 2
    if window is None:
        shape = x.shape[:y] + (height, width, x.shape[-1])
        return x if shape == x.shape else jax.image.resize(x, shape, "linear", antialias=True)
    shape = x.shape[:y] + (window.height, window.width, x.shape[-1])
    scale = jnp.array([height / x.shape[y], width / x.shape[x_axis]], jnp.float32)
    corner = jnp.stack([jnp.asarray(side, jnp.float32) for side in window[:2]])
    axes = (y, x_axis)
    return jax.image.scale_and_translate(x, shape, axes, scale, -corner, "linear", antialias=True)


def resize_plane(x: Array, height: int, width: int, *, window: Window | None = None) -> Array:
    """`resize` of planes [..., y, x], in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return resize(wide[..., None], height, width, window=window)[..., 0]


def upsample(logits: Logits, height: int, width: int, window: Window | None = None) -> Logits:
    """Upsamples logits to the output's size, or a window of it, before activation (Sec. 3.2.3)."""

    def planes(x: Array) -> Array:
        return resize_plane(x, height, width, window=window)

    return Logits(
        planes(logits.depth),
        planes(logits.density),
        None if logits.blend is None else planes(logits.blend),
        None if logits.color is None else resize(logits.color, height, width, window=window),
    )


def crop(target: Cameras, window: Window | None) -> Cameras:
    """The target's camera, or that of its window."""
    return target if window is None else cameras.crop(target, *window)


def blend_weights(logits: Array, valid: Array) -> Array:
    """Softmax over the views that see an element, or over all where none does (Sec. 3.2.3).

    Args:
      logits: [v, ...].
      valid: [v, ...] bool.

    Returns:
      [v, ...], summing to one.
    """
    takes_part = valid | ~jnp.any(valid, axis=0)[None]
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    logits = jnp.where(takes_part, logits.astype(wide), -1e9)
    return jax.nn.softmax(logits, axis=0)


def upsample_activate(
    logits: Logits,
    target: Cameras,
    context: Views,
    *,
    opaque_background: bool = False,
    unseen: Literal["black", "edge"] = "black",
    mask_invalid: bool = True,
    window: Window | None = None,
) -> Render:
    """Upsamples an LDM to the target's size, activates it and renders it (Eq. 1).

    Holds the colours of every view, layer and pixel at once; `drawing.draw` does not.

    Args:
      logits: at the LDM's resolution.
      target: [] camera; its height and width are the output's.
      context: [v] full-resolution input images and cameras.
      opaque_background: make the farthest layer opaque.
      unseen: colour of elements outside of every view: black, or the nearest edges of the views
        that have them in front.
      mask_invalid: views that do not see an element have no part in its colour.
      window: the part of the picture to render, all of it by default.

    Returns:
      Render of one image [h, w, 3], its depth [h, w] and accumulated alpha [h, w]. What no
      layer covers is black and lies at the far plane.
    """
    full = upsample(logits, target.height, target.width, window)
    target = crop(target, window)
    depth = depths(full.depth, target.near, target.far)
    density = jax.nn.sigmoid(full.density)
    if opaque_background:
        density = density.at[0].set(1.0)
    if full.color is not None:
        wide = jnp.promote_types(full.color.dtype, jnp.float32)
        color = jax.nn.sigmoid(full.color.astype(wide))
    else:
        if full.blend is None:
            raise ValueError("the map has neither blend logits nor colours")
        color = blended_color(
            depth, full.blend, target, context, unseen=unseen, mask_invalid=mask_invalid
        )
    return Render(
        images=compositing.over(color, density),
        depth=compositing.expected_depth(depth, density, target.far),
        alpha=compositing.accumulated(density),
    )


def blended_color(
    depth: Array,
    blend: Array,
    target: Cameras,
    context: Views,
    *,
    unseen: Literal["black", "edge"] = "black",
    mask_invalid: bool = True,
) -> Array:
    """Colour of every element: the inputs at its projections, blended.

    Args:
      depth: [l, h, w] z-depth in the target.
      blend: [v, l, h, w] logits.
      target: [] camera of size h x w.
      context: [v] images and cameras.
      unseen: see `upsample_activate`.
      mask_invalid: see `upsample_activate`.

    Returns:
      [l, h, w, 3].
    """

    def view_color(image: Array, camera: Cameras) -> tuple[Array, Projection]:
        projection = project(depth, target, camera)
        return view_colors(image, projection.uv), projection

    colors, seen = jax.vmap(view_color)(context.images, context.cameras)
    usable = seen.valid
    if unseen == "edge":
        usable = jnp.where(jnp.any(seen.valid, axis=0)[None], seen.valid, seen.front)
    colors = colors * usable[..., None]
    weights = blend_weights(blend, usable if mask_invalid else jnp.ones_like(usable))
    return jnp.einsum("v...,v...c->...c", weights, colors, precision="highest")


def ray_difference(view: Cameras, target: Cameras) -> Array:
    """How far apart a view's rays run across the target's frustum (Sec. 3.2.1).

    Each input ray is cut with the target's near and far planes; the result is the difference
    of the two cuts in the target's projective coordinates, where the image spans [-1, 1].
    Zero where an input ray passes through the target's centre, as for a camera that only turns.

    Args:
      view: [] input camera of size y x x.
      target: [] camera with near and far.

    Returns:
      [y, x, 2].
    """
    target_from_view = cameras.compose(cameras.invert(target.world_from_cam), view.world_from_cam)
    rays = cameras.camera_rays(view.intrinsics, cameras.pixel_grid(view.height, view.width))
    origin = target_from_view[:3, 3].reshape(1, 1, 3)
    direction = jnp.einsum("ij,yxj->yxi", target_from_view[:3, :3], rays, precision="highest")
    slope_z = direction[..., 2:]
    # Rays parallel to the target's planes never cut them; the tanh that follows bounds these.
    slope_z = jnp.where(jnp.abs(slope_z) < 1e-3, jnp.where(slope_z < 0, -1e-3, 1e-3), slope_z)

    def cut(z: Array) -> Array:
        point = origin[..., :2] + direction[..., :2] * (z - origin[..., 2:]) / slope_z
        return point / z

    focal = target.intrinsics[:2] / jnp.array([target.width, target.height]) * 2
    return (cut(target.near) - cut(target.far)) * focal.reshape(1, 1, 2)


def grid_size(height: int, width: int, area: float, multiple: int) -> tuple[int, int]:
    """Rows and columns of about `area` elements with an image's aspect ratio.

    Args:
      height: image rows.
      width: image columns.
      area: elements wanted.
      multiple: both sides are multiples of this.

    Returns:
      (y, x): "retaining the same total area per layer" (Sec. 4.1).
    """
    rows = (area * height / width) ** 0.5
    columns = area / rows
    y, x = (max(1, round(side / multiple)) * multiple for side in (rows, columns))
    return y, x


def _pixels(uv: Array, height: int, width: int) -> Array:
    size = jnp.array([width, height], uv.dtype)
    return uv * size.reshape((1,) * (uv.ndim - 1) + (2,))
