"""Drawing a layered depth map on a TPU: one Pallas kernel from the small map to the picture.

A tile of the picture stays on the chip while all layers and views go by: logits are upsampled by
two matrix products, activated, projected, coloured, blended with a running softmax over the views
and composited. Neither a plane of one layer nor a colour of one view is written to memory.

Colours are found by `lane_gather`.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nvs_common import cameras
from nvs_common.types import Array, Cameras, Render, Views
from quark_jax import drawing, lane_gather, ldm

# Rows and columns of a tile of the picture, and of the window of a view that is on the chip.
TILE = (64, 256)
WINDOW = (96, 512)


class _Options(NamedTuple):
    layers: int
    opaque_background: bool
    edge: bool
    mask_invalid: bool


class _Scratch(NamedTuple):
    """What stays on the chip while a tile is drawn; planes have the size of the tile."""

    depth: Any  # of the layer
    rank: Any  # rank, highest, total and color: see `drawing._Blend`
    highest: Any
    total: Any
    color: Any
    canvas: Any  # [5] premultiplied colour, depth and what is let through
    gather: lane_gather.Scratch


def draw(
    logits: ldm.Logits,
    target: Cameras,
    context: Views,
    *,
    opaque_background: bool = False,
    unseen: Literal["black", "edge"] = "black",
    mask_invalid: bool = True,
    window: ldm.Window | None = None,
    interpret: Any = False,
) -> Render:
    """`drawing.draw` in one kernel.

    The backward pass is that of `drawing.draw`, in plain JAX: gradients of the small map are sums
    over tiles of the picture, which a kernel that owns one tile at a time cannot keep on the chip.

    Raises:
      NotImplementedError: a map with colours of its own, or logits that are not float32.
    """
    if logits.blend is None or logits.color is not None:
        raise NotImplementedError("drawing on a TPU: for maps with blend logits alone")
    if any(plane is not None and plane.dtype != jnp.float32 for plane in logits):
        raise NotImplementedError("drawing on a TPU: for float32 logits")
    corner = drawing.corners(window)
    options: dict[str, Any] = dict(
        opaque_background=opaque_background, unseen=unseen, mask_invalid=mask_invalid
    )

    def plain(logits: ldm.Logits, target: Cameras, context: Views, corner: Any) -> Render:
        part = drawing.window_at(corner, window)
        return drawing.draw(logits, target, context, window=part, **options)

    # A batch would add an axis to what the kernel copies by itself.
    @jax.custom_vjp
    @jax.custom_batching.sequential_vmap
    def fused(logits: ldm.Logits, target: Cameras, context: Views, corner: Any) -> Render:
        part = drawing.window_at(corner, window)
        return _draw(logits, target, context, part, interpret=interpret, **options)

    def forward(*args: Any) -> tuple[Render, Any]:
        return fused(*args), args

    def backward(args: Any, cotangents: Render) -> Any:
        return jax.vjp(plain, *args)[1](cotangents)

    fused.defvjp(forward, backward)
    return fused(logits, cameras.as_float32(target), context, corner)


def _draw(
    logits: ldm.Logits,
    target: Cameras,
    context: Views,
    window: ldm.Window | None,
    *,
    opaque_background: bool,
    unseen: str,
    mask_invalid: bool,
    interpret: Any,
) -> Render:
    assert logits.blend is not None  # `draw` has refused
    camera = ldm.crop(target, window)
    (layers, y, x), (height, width) = logits.depth.shape, (camera.height, camera.width)
    tile = (
        min(TILE[0], _up(height, lane_gather.ROWS)),
        min(TILE[1], _up(width, lane_gather.LANES)),
    )
    rows, columns = _up(height, tile[0]), _up(width, tile[1])
    resampling = _resampling((y, x), target, window, (rows, columns))
    sources = lane_gather.views(jnp.asarray(context.images, jnp.float32))
    options = _Options(layers, opaque_background, unseen == "edge", mask_invalid)
    plane = lambda *lead: pltpu.VMEM((*lead, *tile), jnp.float32)  # noqa: E731
    gather = lane_gather.scratch_shapes(tile, sources, WINDOW)
    scratch = _Scratch(plane(), plane(), plane(), plane(), plane(3), plane(5), gather)
    canvas = pl.pallas_call(
        functools.partial(_kernel, options, sources, tile),
        grid=(rows // tile[0], columns // tile[1], layers, len(sources.planes)),
        in_specs=_specs((y, x), tile),
        out_specs=pl.BlockSpec((5, *tile), lambda i, j, l, v: (0, i, j)),
        out_shape=jax.ShapeDtypeStruct((5, rows, columns), jnp.float32),
        scratch_shapes=[scratch],
        cost_estimate=_cost(logits, sources, (rows, columns), tile),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=48 * 2**20,
        ),
        interpret=interpret,
        name="draw",
    )(
        _target_numbers(camera),
        _view_numbers(camera, context.cameras),
        *resampling,
        logits.depth,
        logits.density,
        logits.blend,
        sources.planes,
    )[:, :height, :width]
    return Render(images=jnp.moveaxis(canvas[:3], 0, -1), depth=canvas[3], alpha=1 - canvas[4])


def _specs(grid: tuple[int, int], tile: tuple[int, int]) -> list[pl.BlockSpec]:
    """Blocks of the kernel's arguments for a tile (i, j), layer and view."""
    y, x = grid
    whole = pl.BlockSpec(memory_space=pltpu.SMEM)
    of_layer = pl.BlockSpec((None, y, x), lambda i, j, l, v: (l, 0, 0))
    return [
        whole,
        whole,
        pl.BlockSpec((tile[0], y), lambda i, j, l, v: (i, 0)),
        pl.BlockSpec((x, tile[1]), lambda i, j, l, v: (0, j)),
        of_layer,
        of_layer,
        pl.BlockSpec((None, None, y, x), lambda i, j, l, v: (v, l, 0, 0)),
        pl.BlockSpec(memory_space=pl.ANY),
    ]


def _resampling(
    grid: tuple[int, int], target: Cameras, window: ldm.Window | None, size: tuple[int, int]
) -> tuple[Array, Array]:
    """Matrices [h, y] and [x, w]: `ldm.resize` of a plane is rows @ plane @ columns.

    Rows and columns beyond the picture, up to `size`, are zero.
    """
    y, x = grid
    top, left, height, width = window or (0, 0, target.height, target.width)
    rows = ldm.Window(top, 0, height, y)
    columns = ldm.Window(0, left, x, width)
    to_rows = ldm.resize_plane(jnp.eye(y), target.height, y, window=rows)
    to_columns = ldm.resize_plane(jnp.eye(x), x, target.width, window=columns)
    return (
        jnp.pad(to_rows, ((0, size[0] - height), (0, 0))),
        jnp.pad(to_columns, ((0, 0), (0, size[1] - width))),
    )


def _target_numbers(camera: Cameras) -> Array:
    """fx, fy, cx, cy, near, far of the picture's camera."""
    return jnp.stack([*jnp.asarray(camera.intrinsics, jnp.float32), camera.near, camera.far])


def _view_numbers(camera: Cameras, views: Cameras) -> Array:
    """[v, 16]: view_from_target row by row, then fx, fy, cx, cy."""
    views = cameras.as_float32(views)
    relative = cameras.compose(cameras.invert(views.world_from_cam), camera.world_from_cam[None])
    return jnp.concatenate([relative[:, :3].reshape(-1, 12), views.intrinsics], axis=-1)


def _cost(
    logits: ldm.Logits, sources: lane_gather.Views, size: tuple[int, int], tile: tuple[int, int]
) -> pl.CostEstimate:
    layers, y, x = logits.depth.shape
    pixels = size[0] * size[1]
    planes = pixels // (tile[0] * tile[1]) * layers * (2 + len(sources.planes))
    gather = lane_gather.cost(pixels * layers, sources, tile, WINDOW)
    looks = pixels * layers * len(sources.planes)
    return pl.CostEstimate(
        flops=gather.flops + 2 * planes * tile[0] * x * (y + tile[1]) + 60 * looks,
        bytes_accessed=gather.bytes_accessed + 4 * planes * y * x + 20 * pixels,
        transcendentals=2 * looks,
    )


def _kernel(
    options: _Options,
    sources: lane_gather.Views,
    tile: tuple[int, int],
    target_ref,
    views_ref,
    rows_ref,
    columns_ref,
    depth_ref,
    density_ref,
    blend_ref,
    images_ref,
    canvas_ref,
    scratch: _Scratch,
):
    """One view of one layer of one tile."""
    layer, view = pl.program_id(2), pl.program_id(3)
    numbers = [target_ref[i] for i in range(6)]
    near, far = numbers[4:]

    def full(plane_ref: Any) -> Array:
        """The tile of an upsampled plane."""
        product = functools.partial(
            jnp.dot, precision="highest", preferred_element_type=jnp.float32
        )
        return product(product(rows_ref[...], plane_ref[...]), columns_ref[...])

    @pl.when((layer == 0) & (view == 0))
    def _():
        nothing = jnp.zeros(tile, jnp.float32)
        for channel in range(3):
            scratch.canvas[channel] = nothing
        scratch.canvas[3] = nothing + far
        scratch.canvas[4] = nothing + 1

    @pl.when(view == 0)
    def _():
        anchor = (layer.astype(jnp.float32) + 0.5) / options.layers
        fraction = anchor + 0.5 / options.layers * jnp.tanh(full(depth_ref))
        scratch.depth[...] = 1 / (fraction * (1 / near - 1 / far) + 1 / far)
        nothing = jnp.zeros(tile, jnp.float32)
        scratch.rank[...], scratch.highest[...] = nothing - 1, nothing - jnp.inf
        scratch.total[...] = nothing
        for channel in range(3):
            scratch.color[channel] = nothing

    sources = sources._replace(planes=images_ref)
    rank = _project(options, sources, numbers, views_ref, view, scratch)
    lane_gather.sample(sources, view, scratch.gather)
    _add(options, full(blend_ref), rank, scratch)

    @pl.when(view == pl.num_programs(3) - 1)
    def _():
        _composite(options, full(density_ref), layer, scratch)

    @pl.when((layer == options.layers - 1) & (view == pl.num_programs(3) - 1))
    def _():
        canvas_ref[...] = scratch.canvas[...]


def _composite(options: _Options, density: Array, layer: Array, scratch: _Scratch) -> None:
    """Puts the layer, blended from all views, on top of those behind it."""
    alpha = 1 / (1 + jnp.exp(-density))
    if options.opaque_background:
        alpha = jnp.where(layer == 0, 1.0, alpha)
    rest = 1 - alpha
    weight = alpha / scratch.total[...]
    for channel in range(3):
        below = rest * scratch.canvas[channel]
        scratch.canvas[channel] = weight * scratch.color[channel] + below
    scratch.canvas[3] = alpha * scratch.depth[...] + rest * scratch.canvas[3]
    scratch.canvas[4] = rest * scratch.canvas[4]


def _project(
    options: _Options,
    sources: lane_gather.Views,
    numbers: list[Array],
    views_ref: Any,
    view: Array,
    scratch: _Scratch,
) -> Array:
    """`ldm.project`: rows and columns in the view go to the scratch; the elements' rank returns."""
    fx, fy, cx, cy, near, _ = numbers
    tile = scratch.depth.shape
    first = (pl.program_id(0) * tile[0], pl.program_id(1) * tile[1])
    row, column = (
        (jax.lax.broadcasted_iota(jnp.int32, tile, axis) + first[axis]).astype(jnp.float32)
        for axis in (0, 1)
    )
    x, y = (column + 0.5 - cx) / fx, (row + 0.5 - cy) / fy
    m = [views_ref[view, i] for i in range(16)]
    depth = scratch.depth[...]
    right, down, z = (
        (m[4 * i] * x + m[4 * i + 1] * y + m[4 * i + 2]) * depth + m[4 * i + 3] for i in range(3)
    )
    front = z > ldm.MIN_VIEW_DEPTH * near
    safe = jnp.maximum(z, cameras.MIN_DEPTH)
    u, v = right / safe * m[12] + m[14], down / safe * m[13] + m[15]
    inside = (u >= 0) & (u <= sources.width) & (v >= 0) & (v <= sources.height)
    hidden = jnp.where(front, 1.0, 0.0) if options.edge else jnp.zeros(tile, jnp.float32)
    rank = jnp.where(front & inside, 2.0, hidden)
    # Colours go on beyond the edge; what is not shown is not looked for.
    places = ((scratch.gather.x, u, sources.width), (scratch.gather.y, v, sources.height))
    for place, position, side in places:
        position = jnp.clip(position - 0.5, 0.0, side - 1.0)
        place[...] = jnp.where(rank > 0, position, -2.0)
    return rank


def _add(options: _Options, logit: Array, rank: Array, scratch: _Scratch) -> None:
    """Takes the view into the softmax; see `drawing._add`."""
    before = scratch.rank[...]
    best = jnp.maximum(before, rank)
    stays, enters = before == best, rank == best
    highest_before = scratch.highest[...]
    if options.mask_invalid:
        highest_before = jnp.where(stays, highest_before, -jnp.inf)
        logit = jnp.where(enters, logit, -jnp.inf)
    # One of the two is a number: the exponential of the other may be zero.
    highest = jnp.maximum(highest_before, logit)
    old, new = jnp.exp(highest_before - highest), jnp.exp(logit - highest)
    shown_old = jnp.where(stays, old, 0.0)
    shown_new = jnp.where(enters & (rank > 0), new, 0.0)
    for channel in range(3):
        color = scratch.color[channel] * shown_old
        scratch.color[channel] = color + scratch.gather.sample[channel] * shown_new
    scratch.total[...] = scratch.total[...] * old + new
    scratch.rank[...], scratch.highest[...] = best, highest


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
