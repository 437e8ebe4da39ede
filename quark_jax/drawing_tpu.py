"""Drawing a layered depth map on a TPU: one Pallas kernel from the small map to the picture.

A tile of the picture stays on the chip while all layers and views go by: logits are upsampled by
two matrix products, activated, projected, coloured, blended with a running softmax over the views
and composited. Neither a plane of one layer nor a colour of one view is written to memory.

Colours come from arbitrary pixels of the views, and TPUs read memory in tiles. But the elements of
a tile lie in one band of depth, so their pixels lie in a small window of the view: it is copied to
the chip, and 8 x 128 elements at a time walk through the few rows they touch. Within a row of 128
pixels a lane can fetch any other, which is the only gather that the vector unit has. However far
apart the pixels are, rows and windows are visited until all of them are found.
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
from quark_jax import drawing, ldm

# Rows and columns of a tile of the picture, and of the window of a view that is on the chip.
TILE = (64, 256)
WINDOW = (96, 512)
# The vector unit works on this many rows and columns at once.
_ROWS, _LANES, _LANE_BITS = 8, 128, 7


class _Options(NamedTuple):
    layers: int
    height: int  # of the views
    width: int
    opaque_background: bool
    edge: bool
    mask_invalid: bool
    interpret: Any


class _Scratch(NamedTuple):
    """What stays on the chip while a tile is drawn; planes have the size of the tile."""

    depth: Any  # of the layer
    x: Any  # column in the view
    y: Any  # row in the view
    sample: Any  # [3] colour in the view
    rank: Any  # rank, highest, total and color: see `drawing._Blend`
    highest: Any
    total: Any
    color: Any
    canvas: Any  # [5] premultiplied colour, depth and what is let through
    window: Any  # [3, *WINDOW] of the view
    arrived: Any  # semaphore of the window's copy


def draw(
    logits: ldm.Logits,
    target: Cameras,
    context: Views,
    *,
    opaque_background: bool = False,
    unseen: Literal["black", "edge"] = "black",
    mask_invalid: bool = True,
    window: ldm.Window | None = None,
    interpret: object = False,
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
    options = dict(
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
    interpret: object,
) -> Render:
    assert logits.blend is not None  # `draw` has refused
    camera = ldm.crop(target, window)
    (layers, y, x), (height, width) = logits.depth.shape, (camera.height, camera.width)
    tile = (min(TILE[0], _up(height, _ROWS)), min(TILE[1], _up(width, _LANES)))
    rows, columns = _up(height, tile[0]), _up(width, tile[1])
    to_rows, to_columns = _resampling((y, x), target, window)
    to_rows = jnp.pad(to_rows, ((0, rows - height), (0, 0)))
    to_columns = jnp.pad(to_columns, ((0, 0), (0, columns - width)))
    images = jnp.moveaxis(jnp.asarray(context.images, jnp.float32), -1, 1)
    views, _, *size = images.shape
    padded = [_up(size[0], _ROWS), _up(size[1], _LANES)]
    edges = [(0, pad - side) for pad, side in zip(padded, size, strict=True)]
    images = jnp.pad(images, ((0, 0), (0, 0), *edges))
    held = tuple(min(most, side) for most, side in zip(WINDOW, padded, strict=True))
    options = _Options(layers, *size, opaque_background, unseen == "edge", mask_invalid, interpret)
    plane = lambda *lead: pltpu.VMEM((*lead, *tile), jnp.float32)  # noqa: E731
    scratch = _Scratch(
        *(plane() for _ in range(3)), plane(3), plane(), plane(), plane(), plane(3), plane(5),
        pltpu.VMEM((3, *held), jnp.float32), pltpu.SemaphoreType.DMA,
    )
    whole = pl.BlockSpec(memory_space=pltpu.SMEM)
    of_layer = pl.BlockSpec((None, y, x), lambda i, j, l, v: (l, 0, 0))
    canvas = pl.pallas_call(
        functools.partial(_kernel, options, tile),
        grid=(rows // tile[0], columns // tile[1], layers, views),
        in_specs=[
            whole,
            whole,
            pl.BlockSpec((tile[0], y), lambda i, j, l, v: (i, 0)),
            pl.BlockSpec((x, tile[1]), lambda i, j, l, v: (0, j)),
            of_layer,
            of_layer,
            pl.BlockSpec((None, None, y, x), lambda i, j, l, v: (v, l, 0, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((5, *tile), lambda i, j, l, v: (0, i, j)),
        out_shape=jax.ShapeDtypeStruct((5, rows, columns), jnp.float32),
        scratch_shapes=list(scratch),
        cost_estimate=_cost(logits, (rows, columns), tile, held),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=48 * 2**20,
        ),
        interpret=interpret,
        name="draw",
    )(
        _target_numbers(camera),
        _view_numbers(camera, context.cameras),
        to_rows,
        to_columns,
        logits.depth,
        logits.density,
        logits.blend,
        images,
    )[:, :height, :width]
    return Render(images=jnp.moveaxis(canvas[:3], 0, -1), depth=canvas[3], alpha=1 - canvas[4])


def _resampling(
    size: tuple[int, int], target: Cameras, window: ldm.Window | None
) -> tuple[Array, Array]:
    """Matrices [h, y] and [x, w]: `ldm.resize` of a plane is rows @ plane @ columns."""
    y, x = size
    top, left, height, width = window or (0, 0, target.height, target.width)
    rows = ldm.Window(top, 0, height, y)
    columns = ldm.Window(0, left, x, width)
    return (
        ldm.resize_plane(jnp.eye(y), target.height, y, window=rows),
        ldm.resize_plane(jnp.eye(x), x, target.width, window=columns),
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
    logits: ldm.Logits, size: tuple[int, int], tile: tuple[int, int], held: tuple[int, int]
) -> pl.CostEstimate:
    """One window a tile, layer and view, and two rows of it an element, as where depth is smooth."""
    assert logits.blend is not None
    (layers, y, x), views = logits.depth.shape, logits.blend.shape[0]
    tiles = size[0] * size[1] // (tile[0] * tile[1])
    planes = tiles * layers * (2 + views)
    upsampling = 2 * planes * tile[0] * x * (y + tile[1])
    elements = size[0] * size[1] * layers * views
    moved = tiles * layers * views * 3 * held[0] * held[1] + planes * y * x + 5 * size[0] * size[1]
    return pl.CostEstimate(
        flops=upsampling + 100 * elements, bytes_accessed=4 * moved, transcendentals=3 * elements
    )


def _kernel(
    options: _Options,
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
    *scratch_refs,
):
    """One view of one layer of one tile."""
    scratch = _Scratch(*scratch_refs)
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

    rank = _project(options, tile, numbers, views_ref, view, scratch)
    _sample(options, tile, view, images_ref, scratch)
    _add(options, full(blend_ref), rank, scratch)

    @pl.when(view == pl.num_programs(3) - 1)
    def _():
        alpha = 1 / (1 + jnp.exp(-full(density_ref)))
        if options.opaque_background:
            alpha = jnp.where(layer == 0, 1.0, alpha)
        rest = 1 - alpha
        weight = alpha / scratch.total[...]
        for channel in range(3):
            below = rest * scratch.canvas[channel]
            scratch.canvas[channel] = weight * scratch.color[channel] + below
        scratch.canvas[3] = alpha * scratch.depth[...] + rest * scratch.canvas[3]
        scratch.canvas[4] = rest * scratch.canvas[4]

    @pl.when((layer == options.layers - 1) & (view == pl.num_programs(3) - 1))
    def _():
        canvas_ref[...] = scratch.canvas[...]


def _project(
    options: _Options,
    tile: tuple[int, int],
    numbers: list[Array],
    views_ref: Any,
    view: Array,
    scratch: _Scratch,
) -> Array:
    """`ldm.project`: rows and columns in the view go to the scratch; the elements' rank returns."""
    fx, fy, cx, cy, near, _ = numbers
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
    inside = (u >= 0) & (u <= options.width) & (v >= 0) & (v <= options.height)
    # What lies behind the view has no part in it; its position only has to be one.
    u, v = jnp.where(front, u, 0.0), jnp.where(front, v, 0.0)
    scratch.x[...] = jnp.clip(u - 0.5, 0.0, options.width - 1.0)
    scratch.y[...] = jnp.clip(v - 0.5, 0.0, options.height - 1.0)
    hidden = jnp.where(front, 1.0, 0.0) if options.edge else jnp.zeros(tile, jnp.float32)
    return jnp.where(front & inside, 2.0, hidden)


def _sample(
    options: _Options, tile: tuple[int, int], view: Array, images_ref: Any, scratch: _Scratch
) -> None:
    """Bilinear samples of the view's image at the positions in the scratch."""
    held = scratch.window.shape[1:]
    stops = images_ref.shape[2:]
    low, high = _bounds(scratch.x[...], scratch.y[...], options)
    # Copies begin at tiles of memory.
    begin = (low[0] // _ROWS * _ROWS, low[1] // _LANES * _LANES)
    for channel in range(3):
        scratch.sample[channel] = jnp.zeros(tile, jnp.float32)

    def visit(row: Array, column: Array) -> None:
        top = pl.multiple_of(jnp.minimum(row, stops[0] - held[0]), _ROWS)
        left = pl.multiple_of(jnp.minimum(column, stops[1] - held[1]), _LANES)
        source = images_ref.at[view, :, pl.ds(top, held[0]), pl.ds(left, held[1])]
        copy = pltpu.make_async_copy(source, scratch.window, scratch.arrived)
        copy.start()
        copy.wait()
        across = tile[1] // _LANES

        def group(n: Array, _: None) -> None:
            place = (n // across * _ROWS, n % across * _LANES)
            # Rows and columns before `row` and `column` were in an earlier window.
            _walk(options, place, (row, column), (top, left), scratch)

        jax.lax.fori_loop(0, tile[0] // _ROWS * across, group, None)

    def rows(i: Array, _: None) -> None:
        def columns(j: Array, _: None) -> None:
            visit(begin[0] + i * held[0], begin[1] + j * held[1])

        jax.lax.fori_loop(0, (high[1] - begin[1]) // held[1] + 1, columns, None)

    jax.lax.fori_loop(0, (high[0] - begin[0]) // held[0] + 1, rows, None)


def _walk(
    options: _Options,
    place: tuple[Array, Array],
    begin: tuple[Array, Array],
    corner: tuple[Array, Array],
    scratch: _Scratch,
) -> None:
    """Adds what a group of elements finds in a window: rows of the view, 128 pixels at a time.

    Args:
      options: of the kernel.
      place: row and column of the group in the tile.
      begin: first row and column of the view that this window is responsible for.
      corner: first row and column of the view that the window holds.
      scratch: of the kernel.
    """
    here = (
        pl.ds(pl.multiple_of(place[0], _ROWS), _ROWS),
        pl.ds(pl.multiple_of(place[1], _LANES), _LANES),
    )
    x, y = scratch.x[here], scratch.y[here]
    low, high = _bounds(x, y, options)
    held = scratch.window.shape[1:]
    first = [jnp.maximum(least, start) for least, start in zip(low, begin, strict=True)]
    last = [
        jnp.minimum(most, start + size - 1)
        for most, start, size in zip(high, begin, held, strict=True)
    ]
    x0, y0 = jnp.floor(x), jnp.floor(y)
    right, below = x - x0, y - y0
    x0, y0 = x0.astype(jnp.int32), y0.astype(jnp.int32)
    x1 = jnp.minimum(x0 + 1, options.width - 1)
    lanes = [i & (_LANES - 1) for i in (x0, x1)]

    def block(number: Array, colors: tuple[Array, ...]) -> tuple[Array, ...]:
        weights = [
            jnp.where(i >> _LANE_BITS == number, weight, 0.0)
            for i, weight in ((x0, 1 - right), (x1, right))
        ]
        columns = pl.ds(pl.multiple_of(number * _LANES - corner[1], _LANES), _LANES)

        def row(number: Array, colors: tuple[Array, ...]) -> tuple[Array, ...]:
            part = jnp.where(y0 == number, 1 - below, jnp.where(y0 + 1 == number, below, 0.0))
            found = []
            for channel, color in enumerate(colors):
                pixels = scratch.window[channel, pl.ds(number - corner[0], 1), columns]
                pixels = jnp.broadcast_to(pixels, (_ROWS, _LANES))
                two = [
                    weight * jnp.take_along_axis(pixels, lane, axis=1)
                    for weight, lane in zip(weights, lanes, strict=True)
                ]
                found.append(color + part * (two[0] + two[1]))
            return tuple(found)

        return jax.lax.fori_loop(first[0], last[0] + 1, row, colors)

    colors = tuple(scratch.sample[(channel, *here)] for channel in range(3))
    colors = jax.lax.fori_loop(first[1] // _LANES, last[1] // _LANES + 1, block, colors)
    for channel, color in enumerate(colors):
        scratch.sample[(channel, *here)] = color


def _bounds(x: Array, y: Array, options: _Options) -> tuple[list[Array], list[Array]]:
    """First and last rows and columns of the pixels around positions."""
    low = [jnp.min(position).astype(jnp.int32) for position in (y, x)]
    high = [
        jnp.minimum(jnp.max(position).astype(jnp.int32) + 1, side - 1)
        for position, side in ((y, options.height), (x, options.width))
    ]
    return low, high


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
        scratch.color[channel] = color + scratch.sample[channel] * shown_new
    scratch.total[...] = scratch.total[...] * old + new
    scratch.rank[...], scratch.highest[...] = best, highest


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
