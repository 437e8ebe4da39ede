"""Drawing a layered depth map on a TPU: one Pallas kernel from the small map to the picture.

A tile of the picture stays on the chip while all layers and views go by: logits are upsampled by
two matrix products, activated, projected, coloured, blended with a running softmax over the views
and composited. Neither a plane of one layer nor a colour of one view is written to memory.

Colours are found by `lane_gather`. The gradients of the map are those of another kernel,
`drawing_tpu_backward`; pictures and cameras of the inputs and the target have theirs in plain JAX,
which costs nothing where nobody asks for them: training does not.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nvs_common import cameras
from nvs_common.types import Array, Cameras, Render, Views
from quark_jax import drawing, drawing_tile, drawing_tpu_backward, lane_gather, ldm

# Rows and columns of a tile of the picture, and of the window of a view that is on the chip.
TILE = (64, 256)
WINDOW = (96, 512)


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
    """`drawing.draw` in one kernel, and the gradients of the map in another.

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

    # A batch would add an axis to what the kernels copy by themselves.
    @jax.custom_vjp
    @jax.custom_batching.sequential_vmap
    def fused(logits: ldm.Logits, target: Cameras, context: Views, corner: Any) -> Render:
        part = drawing.window_at(corner, window)
        return _draw(*_prepare(logits, target, context, part, **options), interpret=interpret)

    @jax.custom_batching.sequential_vmap
    def to_logits(args: Any, cotangents: Render) -> ldm.Logits:
        logits, target, context, corner = args
        part = drawing.window_at(corner, window)
        plan, inputs = _prepare(logits, target, context, part, **options)
        return drawing_tpu_backward.differentiate(plan, inputs, cotangents, interpret=interpret)

    def forward(*args: Any) -> tuple[Render, Any]:
        return fused(*args), args

    def backward(args: Any, cotangents: Render) -> Any:
        logits, *others = args
        to_others = jax.vjp(functools.partial(plain, logits), *others)[1](cotangents)
        return to_logits(args, cotangents), *to_others

    fused.defvjp(forward, backward)
    return fused(logits, cameras.as_float32(target), context, corner)


def _prepare(
    logits: ldm.Logits,
    target: Cameras,
    context: Views,
    window: ldm.Window | None,
    *,
    opaque_background: bool,
    unseen: str,
    mask_invalid: bool,
) -> tuple[drawing_tile.Plan, drawing_tile.Inputs]:
    camera = ldm.crop(target, window)
    (layers, y, x), (height, width) = logits.depth.shape, (camera.height, camera.width)
    tile = (
        min(TILE[0], height + -height % lane_gather.ROWS),
        min(TILE[1], width + -width % lane_gather.LANES),
    )
    plan = drawing_tile.Plan(
        layers,
        (y, x),
        (height, width),
        tile,
        WINDOW,
        lane_gather.views(jnp.asarray(context.images, jnp.float32)),
        opaque_background,
        unseen == "edge",
        mask_invalid,
    )
    inputs = drawing_tile.Inputs(
        _target_numbers(camera),
        _view_numbers(camera, context.cameras),
        *_resampling((y, x), target, window, plan.padded),
        logits.depth,
        logits.density,
        logits.blend,
        plan.sources.planes,
    )
    return plan, inputs


def _draw(plan: drawing_tile.Plan, inputs: drawing_tile.Inputs, *, interpret: Any) -> Render:
    (rows, columns), tile = plan.padded, plan.tile
    canvas = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(rows // tile[0], columns // tile[1], plan.layers, len(inputs.images)),
        in_specs=drawing_tile.specs(plan, lambda step: step),
        out_specs=pl.BlockSpec((5, *tile), lambda i, j, l, v: (0, i, j)),
        out_shape=jax.ShapeDtypeStruct((5, rows, columns), jnp.float32),
        scratch_shapes=[drawing_tile.scratch_shapes(plan)],
        cost_estimate=drawing_tile.cost(plan),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=48 * 2**20,
        ),
        interpret=interpret,
        name="draw",
    )(*inputs)[:, : plan.size[0], : plan.size[1]]
    return Render(images=jnp.moveaxis(canvas[:3], 0, -1), depth=canvas[3], alpha=1 - canvas[4])


def _kernel(plan: drawing_tile.Plan, *refs: Any):
    """One view of one layer of one tile."""
    inputs, (canvas_ref, scratch) = drawing_tile.Inputs(*refs[:8]), refs[8:]
    layer, view = pl.program_id(2), pl.program_id(3)
    last = view == pl.num_programs(3) - 1
    drawing_tile.take_view(plan, inputs, drawing_tile.corner(plan), (layer, view), scratch)

    @pl.when(last)
    def _():
        drawing_tile.composite(drawing_tile.opacity(plan, inputs, layer), scratch)

    @pl.when(last & (layer == plan.layers - 1))
    def _():
        canvas_ref[...] = scratch.canvas[...]


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
