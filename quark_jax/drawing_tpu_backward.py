"""Gradients of a layered depth map that is drawn on a TPU: the backward pass of `drawing_tpu`.

A tile of the picture stays on the chip while it is drawn once more, from the farthest layer to the
nearest, and what is behind each layer and its colour are kept there. Then the layers are taken off
again, nearest first: what reaches their depth, density and blend logits is a plane of the tile, and
two matrix products, those of the upsampling turned around, bring it to the small map. The map's
gradient lies in memory and is added to plane by plane, tile after tile: no axis of the grid is
"parallel", and the same arguments give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nvs_common.types import Array, Render
from quark_jax import drawing_tile, ldm
from quark_jax.drawing_tile import Inputs, Plan


class _Scratch(NamedTuple):
    """What stays on the chip; planes have the size of the tile but for the last."""

    drawn: drawing_tile.Scratch
    depth: Any  # [l] of the layers, as are their
    alpha: Any  # [l]
    rank: Any  # [l] best rank,
    log_total: Any  # [l] logarithm of the softmax's sum,
    color: Any  # [l, 3] and
    behind: Any  # [l, 5] the canvas that they are put on
    reaches: Any  # [5] gradient of the canvas
    to_depth: Any  # gradient of the layer's depth
    plane: Any  # [y, x] of the map's gradient
    arrived: Any  # semaphore of its copies


def differentiate(plan: Plan, inputs: Inputs, cotangents: Render, *, interpret: Any) -> ldm.Logits:
    """Gradients of the logits from those of the picture."""
    (rows, columns), tile, y = plan.padded, plan.tile, plan.grid[0]
    # What is let through is what the accumulated alpha leaves.
    planes = [*jnp.moveaxis(cotangents.images, -1, 0), cotangents.depth, -cotangents.alpha]
    edges = [(0, 0), *((0, up - of) for up, of in zip(plan.padded, plan.size, strict=True))]
    canvas = jnp.pad(jnp.stack(planes), edges)
    # Rows of the tiles, turned: [tiles, y, rows of a tile].
    turned = jnp.swapaxes(inputs.rows.reshape(-1, tile[0], y), 1, 2)
    steps, whole = 2 * plan.layers, pl.BlockSpec(memory_space=pl.ANY)
    logits = (inputs.depth, inputs.density, inputs.blend)
    arguments = (*inputs, turned, canvas, *map(jnp.zeros_like, logits))
    in_specs = [
        *drawing_tile.specs(plan, lambda step: jnp.minimum(step, steps - 1 - step)),
        pl.BlockSpec((None, y, tile[0]), lambda i, j, s, v: (i, 0, 0)),
        pl.BlockSpec((5, *tile), lambda i, j, s, v: (0, i, j)),
        *[whole] * 3,
    ]
    gradients = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(rows // tile[0], columns // tile[1], steps, len(inputs.images)),
        in_specs=in_specs,
        out_specs=[whole] * 3,
        out_shape=[jax.ShapeDtypeStruct(plane.shape, jnp.float32) for plane in logits],
        # Gradients begin as zeros and are added to in place.
        input_output_aliases={len(arguments) - 3 + i: i for i in range(3)},
        scratch_shapes=[_scratch_shapes(plan)],
        cost_estimate=_cost(plan),
        # Tiles add to the same planes: one after the other.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 4, vmem_limit_bytes=48 * 2**20
        ),
        interpret=interpret,
        name="draw_backward",
    )(*arguments)
    return ldm.Logits(*gradients)


def _scratch_shapes(plan: Plan) -> _Scratch:
    plane = lambda *lead: pltpu.VMEM((*lead, *plan.tile), jnp.float32)  # noqa: E731
    layers = plan.layers
    return _Scratch(
        drawing_tile.scratch_shapes(plan, slopes=True),
        plane(layers),
        plane(layers),
        plane(layers),
        plane(layers),
        plane(layers, 3),
        plane(layers, 5),
        plane(5),
        plane(),
        pltpu.VMEM(plan.grid, jnp.float32),
        pltpu.SemaphoreType.DMA,
    )


def _cost(plan: Plan) -> pl.CostEstimate:
    """Twice the drawing, the second time with slopes, and a plane added to for each looked at."""
    once = drawing_tile.cost(plan)
    return pl.CostEstimate(
        flops=4 * once.flops,
        bytes_accessed=4 * once.bytes_accessed,
        transcendentals=2 * once.transcendentals,
    )


def _kernel(plan: Plan, *refs: Any):
    """One view of one layer of one tile: half of the steps draw, the other half go back."""
    inputs, (turned_ref, canvas_ref) = Inputs(*refs[:8]), refs[8:10]
    to, scratch = ldm.Logits(*refs[13:16]), refs[16]
    step, view = pl.program_id(2), pl.program_id(3)
    at = jnp.minimum(step, 2 * plan.layers - 1 - step), view
    corner, last = drawing_tile.corner(plan), view == pl.num_programs(3) - 1

    @pl.when(step < plan.layers)
    def _():
        # Nobody asks for slopes yet.
        gather = scratch.drawn.gather._replace(slopes=None)
        drawn = scratch.drawn._replace(gather=gather)
        drawing_tile.take_view(plan, inputs, corner, at, drawn)
        pl.when(last)(functools.partial(_keep, plan, inputs, at[0], scratch))

    @pl.when((step == plan.layers) & (view == 0))
    def _():
        scratch.reaches[...] = canvas_ref[...]

    @pl.when(step >= plan.layers)
    def _():
        add = functools.partial(_add, inputs, turned_ref, scratch)
        _go_back(plan, inputs, corner, at, to, add, scratch)


def _keep(plan: Plan, inputs: Inputs, layer: Array, scratch: _Scratch) -> None:
    """Keeps a layer that is blended from all views and what is behind it; then puts it on top."""
    drawn = scratch.drawn
    total, alpha = drawn.total[...], drawing_tile.opacity(plan, inputs, layer)
    scratch.depth[layer], scratch.rank[layer] = drawn.depth[...], drawn.rank[...]
    scratch.alpha[layer] = alpha
    scratch.log_total[layer] = drawn.highest[...] + jnp.log(total)
    for channel in range(3):
        scratch.color[layer, channel] = drawn.color[channel] / total
    scratch.behind[layer] = drawn.canvas[...]
    drawing_tile.composite(alpha, drawn)


def _go_back(
    plan: Plan,
    inputs: Inputs,
    corner: tuple[Array, Array],
    at: tuple[Array, Array],
    to: ldm.Logits,
    add: Callable[[Any, Array], None],
    scratch: _Scratch,
) -> None:
    """Adds a view's part of a layer to the gradients; after the last the layer is taken off."""
    layer, view = at
    to_depth, to_blend = to.depth, to.blend
    assert to_blend is not None  # `drawing_tpu.draw` has refused

    @pl.when(view == 0)
    def _():
        scratch.drawn.depth[...] = scratch.depth[layer]
        scratch.to_depth[...] = scratch.alpha[layer] * scratch.reaches[3]

    add(to_blend.at[view, layer], _of_view(plan, inputs, corner, at, scratch))

    @pl.when(view == pl.num_programs(3) - 1)
    def _():
        of_depth, of_density = _of_layer(plan, inputs, layer, scratch)
        add(to_depth.at[layer], of_depth)
        add(to.density.at[layer], of_density)
        rest = 1 - scratch.alpha[layer]
        for i in range(5):
            scratch.reaches[i] = rest * scratch.reaches[i]


def _add(
    inputs: Inputs, turned_ref: Any, scratch: _Scratch, plane_ref: Any, gradient: Array
) -> None:
    """Adds the tile's part to a plane of the map's gradient: rows^T @ gradient @ columns^T."""
    small = drawing_tile.product(gradient, inputs.columns[...], transposed=True)
    here = pltpu.make_async_copy(plane_ref, scratch.plane, scratch.arrived)
    here.start()
    here.wait()
    scratch.plane[...] += drawing_tile.product(turned_ref[...], small)
    back = pltpu.make_async_copy(scratch.plane, plane_ref, scratch.arrived)
    back.start()
    back.wait()


def _of_view(
    plan: Plan,
    inputs: Inputs,
    corner: tuple[Array, Array],
    at: tuple[Array, Array],
    scratch: _Scratch,
) -> Array:
    """Gradient of a view's blend logits; what its colour's place tells of the depth is added."""
    layer, view = at
    place = drawing_tile.look(plan, inputs, corner, view, scratch.drawn)
    gather, best = scratch.drawn.gather, scratch.rank[layer]
    logit, alpha = drawing_tile.full(inputs, inputs.blend), scratch.alpha[layer]
    weight = jnp.exp(logit - scratch.log_total[layer])
    if plan.mask_invalid:
        weight = jnp.where(place.rank == best, weight, 0.0)
    shown = jnp.where((place.rank == best) & (place.rank > 0), weight, 0.0)
    seen = mean = moved = jnp.zeros_like(alpha)
    for channel in range(3):
        reaches = alpha * scratch.reaches[channel]
        seen += reaches * gather.sample[channel]
        mean += reaches * scratch.color[layer, channel]
        along_x, along_y = (gather.slopes[i, channel] for i in range(2))
        moved += reaches * (along_x * place.x_slope + along_y * place.y_slope)
    scratch.to_depth[...] += shown * moved
    return shown * seen - weight * mean


def _of_layer(plan: Plan, inputs: Inputs, layer: Array, scratch: _Scratch) -> tuple[Array, Array]:
    """Gradients of a layer's logits of depth and density."""
    near, far = inputs.target[4], inputs.target[5]
    depth, alpha = scratch.depth[layer], scratch.alpha[layer]
    to_alpha = scratch.reaches[3] * (depth - scratch.behind[layer, 3])
    to_alpha -= scratch.reaches[4] * scratch.behind[layer, 4]
    for channel in range(3):
        change = scratch.color[layer, channel] - scratch.behind[layer, channel]
        to_alpha += scratch.reaches[channel] * change
    # Of an opaque background the slope of the sigmoid is zero, as it should be.
    to_density = to_alpha * alpha * (1 - alpha)
    bent = jnp.tanh(drawing_tile.full(inputs, inputs.depth))
    slope = depth * depth * (1 / far - 1 / near) * (0.5 / plan.layers) * (1 - bent * bent)
    return scratch.to_depth[...] * slope, to_density
