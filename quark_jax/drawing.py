"""Drawing a layered depth map without holding all of its colours: one layer and view at a time.

The same picture as `ldm.upsample_activate` (Quark, Eq. 1), composited while layers are activated,
from farthest to nearest, with a running softmax over the views. Peak memory is a small multiple
of the output, whatever the number of views and layers; the backward pass computes each layer and
view again. For few pixels `ldm.upsample_activate` is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nvs_common.types import Array, Cameras, Render, Views
from quark_jax import ldm


class _Canvas(NamedTuple):
    """What the layers so far look like: premultiplied colour, depth, and what they let through."""

    color: Array  # [h, w, 3]
    depth: Array  # [h, w]
    through: Array  # [h, w]


class _Blend(NamedTuple):
    """A softmax over the views so far, scaled by exp(-highest).

    Only the views of the best rank found for an element are shown in it: those that see it
    before those that have it in front, and these before the others.
    """

    rank: Array  # [h, w]
    highest: Array  # [h, w]
    total: Array  # [h, w]
    color: Array  # [h, w, 3]


def draw(
    logits: ldm.Logits,
    target: Cameras,
    context: Views,
    *,
    opaque_background: bool = False,
    unseen: Literal["black", "edge"] = "black",
    mask_invalid: bool = True,
    window: ldm.Window | None = None,
) -> Render:
    """Upsamples a map to the target's size, activates it and renders it, layer by layer.

    Args and result are those of `ldm.upsample_activate`.
    """
    if logits.color is None and logits.blend is None:
        raise ValueError("the map has neither blend logits nor colours")
    num_layers = logits.depth.shape[0]
    camera = ldm.crop(target, window)

    def full(plane: Array) -> Array:
        return ldm.resize_plane(plane, target.height, target.width, window=window)

    def layer(canvas: _Canvas, xs: tuple[Array, Array, ldm.Logits]) -> tuple[_Canvas, None]:
        index, anchor, planes = xs
        near, far = target.near, target.far
        depth = ldm.depth_in_band(full(planes.depth), anchor, num_layers, near, far)
        alpha = jax.nn.sigmoid(full(planes.density))
        if opaque_background:
            alpha = jnp.where(index == 0, 1.0, alpha)
        if planes.color is not None:
            color = jax.nn.sigmoid(
                jnp.stack([full(x) for x in jnp.unstack(planes.color, axis=-1)], -1)
            )
        else:
            assert planes.blend is not None  # the map has colours or blend logits
            color = _blended(
                (context, planes.blend), full, depth, camera, unseen == "edge", mask_invalid
            )
        return _over(canvas, color, depth, alpha), None

    blend = None if logits.blend is None else jnp.moveaxis(logits.blend, 1, 0)
    layers = logits._replace(blend=blend)
    xs = (jnp.arange(num_layers), ldm.anchors(num_layers), layers)
    empty = _empty(camera, jnp.promote_types(logits.depth.dtype, jnp.float32))
    canvas, _ = jax.lax.scan(jax.checkpoint(layer), empty, xs)
    return Render(images=canvas.color, depth=canvas.depth, alpha=1 - canvas.through)


def _empty(camera: Cameras, dtype) -> _Canvas:
    """Nothing drawn yet: black, at the far plane, all of it open."""
    shape = (camera.height, camera.width)
    far = jnp.broadcast_to(jnp.asarray(camera.far, dtype), shape)
    return _Canvas(jnp.zeros((*shape, 3), dtype), far, jnp.ones(shape, dtype))


def _over(canvas: _Canvas, color: Array, depth: Array, alpha: Array) -> _Canvas:
    """Puts a layer on top."""
    rest = 1 - alpha
    return _Canvas(
        alpha[..., None] * color + rest[..., None] * canvas.color,
        alpha * depth + rest * canvas.depth,
        rest * canvas.through,
    )


def _blended(
    views: tuple[Views, Array],
    full: Callable[[Array], Array],
    depth: Array,
    camera: Cameras,
    edge: bool,
    mask_invalid: bool,
) -> Array:
    """Colour [h, w, 3] of one layer of depth [h, w], from views [v] and blend logits [v, y, x].

    `full` brings logits [y, x] to the size of the picture.
    """

    def view(blend: _Blend, per_view: tuple[Views, Array]) -> tuple[_Blend, None]:
        context, plane = per_view
        logit = full(plane)
        seen = ldm.project(depth[None], camera, context.cameras)
        valid, front = seen.valid[0], seen.front[0]
        # An element that no view sees shows, with `edge`, those that have it in front.
        rank = jnp.where(valid, 2, jnp.where(front, 1, 0) if edge else 0)
        color = ldm.view_colors(context.images, seen.uv[0])
        return _add(blend, logit, color, rank, mask_invalid), None

    shape, dtype = depth.shape, depth.dtype
    nothing = _Blend(
        jnp.full(shape, -1),
        jnp.full(shape, -jnp.inf, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((*shape, 3), dtype),
    )
    blend, _ = jax.lax.scan(jax.checkpoint(view), nothing, views)
    return blend.color / blend.total[..., None]


def _add(blend: _Blend, logit: Array, color: Array, rank: Array, mask_invalid: bool) -> _Blend:
    """Takes one more view into the softmax; lower ranks than the best leave the colour.

    With `mask_invalid` they also leave the total that the colour is divided by.
    """
    best = jnp.maximum(blend.rank, rank)
    stays, enters = blend.rank == best, rank == best
    counts_old, counts_new = stays | (not mask_invalid), enters | (not mask_invalid)
    # The highest logit only scales both sums: no gradient has to pass through it.
    fixed = jax.lax.stop_gradient(logit)
    highest = jnp.maximum(
        jnp.where(counts_old, blend.highest, -jnp.inf), jnp.where(counts_new, fixed, -jnp.inf)
    )
    old = jnp.where(counts_old, jnp.exp(blend.highest - highest), 0)
    # Inside of the exponential too: what is left out must not overflow in the gradient.
    new = jnp.where(counts_new, jnp.exp(jnp.where(counts_new, logit - highest, 0)), 0)
    shown_old = jnp.where(stays, old, 0)
    shown_new = jnp.where(enters & (rank > 0), new, 0)
    return _Blend(
        best,
        highest,
        blend.total * old + new,
        blend.color * shown_old[..., None] + color * shown_new[..., None],
    )


def corners(window: ldm.Window | None) -> Any:
    """The part of a window that is mapped over: its size is static."""
    return None if window is None else window[:2]


def window_at(corner: Any, like: ldm.Window | None) -> ldm.Window | None:
    """The window of the size of another at a corner that was mapped over."""
    return None if like is None else ldm.Window(corner[0], corner[1], like.height, like.width)
