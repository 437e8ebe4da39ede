"""What the kernels that draw on a TPU do with one tile of the picture, one layer and one view.

`drawing_tpu` draws, `drawing_tpu_backward` draws again for the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nvs_common import cameras
from nvs_common.types import Array
from quark_jax import lane_gather, ldm


class Plan(NamedTuple):
    """How a picture is drawn.

    Attributes:
      layers: of the map.
      grid: rows and columns of the map.
      size: rows and columns of the picture.
      tile: those of a tile.
      window: most rows and columns of a view's part that is on the chip.
      sources: the views' images.
      opaque_background: see `ldm.upsample_activate`.
      edge: whether the views' edges are shown where no view sees an element.
      mask_invalid: see `ldm.upsample_activate`.
    """

    layers: int
    grid: tuple[int, int]
    size: tuple[int, int]
    tile: tuple[int, int]
    window: tuple[int, int]
    sources: lane_gather.Views
    opaque_background: bool
    edge: bool
    mask_invalid: bool

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns of all tiles."""
        rows, columns = (side + -side % of for side, of in zip(self.size, self.tile, strict=True))
        return rows, columns


class Inputs(NamedTuple):
    """What kernels are given, as arrays or references.

    Attributes:
      target: [6] fx, fy, cx, cy, near, far of the picture's camera.
      views: [v, 16] view_from_target row by row, then fx, fy, cx, cy.
      rows: [h, y], and
      columns: [x, w]: the upsampled plane is rows @ plane @ columns.
      depth: [l, y, x] logits, as are density, and
      blend: [v, l, y, x]. A kernel has those of one layer and view.
      images: [v, 3, h, w] in memory.
    """

    target: Any
    views: Any
    rows: Any
    columns: Any
    depth: Any
    density: Any
    blend: Any
    images: Any


class Scratch(NamedTuple):
    """What stays on the chip while a tile is drawn; planes have the size of the tile."""

    depth: Any  # of the layer
    rank: Any  # rank, highest, total and color: see `drawing._Blend`
    highest: Any
    total: Any
    color: Any  # [3]
    canvas: Any  # [5] premultiplied colour, depth and what is let through
    gather: lane_gather.Scratch


class Place(NamedTuple):
    """Of elements in a view: their rank there, and how columns and rows change with depth."""

    rank: Array
    x_slope: Array
    y_slope: Array


def specs(plan: Plan, layer: Callable[[Any], Any]) -> list[pl.BlockSpec]:
    """Blocks of `Inputs` for a tile (i, j), a step and a view; `layer` is that of a step."""
    y, x = plan.grid
    whole = pl.BlockSpec(memory_space=pltpu.SMEM)
    of_layer = pl.BlockSpec((None, y, x), lambda i, j, s, v: (layer(s), 0, 0))
    return [
        whole,
        whole,
        pl.BlockSpec((plan.tile[0], y), lambda i, j, s, v: (i, 0)),
        pl.BlockSpec((x, plan.tile[1]), lambda i, j, s, v: (0, j)),
        of_layer,
        of_layer,
        pl.BlockSpec((None, None, y, x), lambda i, j, s, v: (v, layer(s), 0, 0)),
        pl.BlockSpec(memory_space=pl.ANY),
    ]


def scratch_shapes(plan: Plan, *, slopes: bool = False) -> Scratch:
    """Scratch of a kernel; slopes of the colours where it asks for them."""
    plane = lambda *lead: pltpu.VMEM((*lead, *plan.tile), jnp.float32)  # noqa: E731
    gather = lane_gather.scratch_shapes(plan.tile, plan.sources, plan.window, slopes=slopes)
    return Scratch(plane(), plane(), plane(), plane(), plane(3), plane(5), gather)


def cost(plan: Plan) -> pl.CostEstimate:
    """Operations and bytes of drawing a picture."""
    views, pixels, (y, x) = len(plan.sources.planes), math.prod(plan.padded), plan.grid
    planes = pixels // math.prod(plan.tile) * plan.layers * (2 + views)
    gather = lane_gather.cost(pixels * plan.layers, plan.sources, plan.tile, plan.window)
    looks = pixels * plan.layers * views
    return pl.CostEstimate(
        flops=gather.flops + 2 * planes * plan.tile[0] * x * (y + plan.tile[1]) + 60 * looks,
        bytes_accessed=gather.bytes_accessed + 4 * planes * y * x + 20 * pixels,
        transcendentals=2 * looks,
    )


def corner(plan: Plan) -> tuple[Array, Array]:
    """First row and column of a kernel's tile."""
    return pl.program_id(0) * plan.tile[0], pl.program_id(1) * plan.tile[1]


def full(given: Inputs, plane_ref: Any) -> Array:
    """The tile of an upsampled plane."""
    return product(product(given.rows[...], plane_ref[...]), given.columns[...])


def product(a: Array, b: Array, *, transposed: bool = False) -> Array:
    """A matrix product of all digits; of the second's transpose if so said."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision="highest", preferred_element_type=jnp.float32)


def take_view(
    plan: Plan,
    given: Inputs,
    corner: tuple[Array, Array],
    at: tuple[Array, Array],
    scratch: Scratch,
) -> None:
    """Takes a view into the colour of a layer; the first also begins the layer, or the canvas.

    Args:
      plan: of the picture.
      given: references.
      corner: first row and column of the tile.
      at: numbers of the layer and the view.
      scratch: of the kernel.
    """
    layer, view = at
    near, far = given.target[4], given.target[5]
    nothing = jnp.zeros(plan.tile, jnp.float32)

    @pl.when((layer == 0) & (view == 0))
    def _():
        for channel in range(3):
            scratch.canvas[channel] = nothing
        scratch.canvas[3] = nothing + far
        scratch.canvas[4] = nothing + 1

    @pl.when(view == 0)
    def _():
        anchor = (layer.astype(jnp.float32) + 0.5) / plan.layers
        fraction = anchor + 0.5 / plan.layers * jnp.tanh(full(given, given.depth))
        scratch.depth[...] = 1 / (fraction * (1 / near - 1 / far) + 1 / far)
        scratch.rank[...], scratch.highest[...] = nothing - 1, nothing - jnp.inf
        scratch.total[...] = nothing
        for channel in range(3):
            scratch.color[channel] = nothing

    rank = look(plan, given, corner, view, scratch).rank
    _add(plan, full(given, given.blend), rank, scratch)


def look(
    plan: Plan, given: Inputs, corner: tuple[Array, Array], view: Array, scratch: Scratch
) -> Place:
    """Projects the layer's elements into a view and samples it there: `ldm.project`."""
    fx, fy, cx, cy, near = (given.target[i] for i in range(5))
    row, column = (
        (jax.lax.broadcasted_iota(jnp.int32, plan.tile, axis) + corner[axis]).astype(jnp.float32)
        for axis in (0, 1)
    )
    x, y = (column + 0.5 - cx) / fx, (row + 0.5 - cy) / fy
    m = [given.views[view, i] for i in range(16)]
    depth, sources = scratch.depth[...], plan.sources
    rays = [m[4 * i] * x + m[4 * i + 1] * y + m[4 * i + 2] for i in range(3)]
    right, down, z = (ray * depth + m[4 * i + 3] for i, ray in enumerate(rays))
    front = z > ldm.MIN_VIEW_DEPTH * near
    safe = jnp.maximum(z, cameras.MIN_DEPTH)
    away = jnp.where(z > cameras.MIN_DEPTH, rays[2], 0.0)
    u, v = right / safe * m[12] + m[14], down / safe * m[13] + m[15]
    inside = (u >= 0) & (u <= sources.width) & (v >= 0) & (v <= sources.height)
    hidden = jnp.where(front, 1.0, 0.0) if plan.edge else jnp.zeros(plan.tile, jnp.float32)
    rank = jnp.where(front & inside, 2.0, hidden)
    slopes = []
    for place, pixel, side, (along, ray, focal) in (
        (scratch.gather.x, u, sources.width, (right, rays[0], m[12])),
        (scratch.gather.y, v, sources.height, (down, rays[1], m[13])),
    ):
        # Colours go on beyond the edge; what is not shown is not looked for.
        position = jnp.clip(pixel - 0.5, 0.0, side - 1.0)
        place[...] = jnp.where(rank > 0, position, lane_gather.NOWHERE)
        moves = (pixel > 0.5) & (pixel < side - 0.5)
        slopes.append(jnp.where(moves, focal * (ray - along / safe * away) / safe, 0.0))
    lane_gather.sample(sources._replace(planes=given.images), view, scratch.gather)
    return Place(rank, *slopes)


def opacity(plan: Plan, given: Inputs, layer: Array) -> Array:
    """The layer's alpha."""
    alpha = 1 / (1 + jnp.exp(-full(given, given.density)))
    return jnp.where(layer == 0, 1.0, alpha) if plan.opaque_background else alpha


def composite(alpha: Array, scratch: Scratch) -> None:
    """Puts the layer, blended from all views, on top of those behind it."""
    rest = 1 - alpha
    weight = alpha / scratch.total[...]
    for channel in range(3):
        below = rest * scratch.canvas[channel]
        scratch.canvas[channel] = weight * scratch.color[channel] + below
    scratch.canvas[3] = alpha * scratch.depth[...] + rest * scratch.canvas[3]
    scratch.canvas[4] = rest * scratch.canvas[4]


def _add(plan: Plan, logit: Array, rank: Array, scratch: Scratch) -> None:
    """Takes the view into the softmax; see `drawing._add`."""
    before = scratch.rank[...]
    best = jnp.maximum(before, rank)
    stays, enters = before == best, rank == best
    highest_before = scratch.highest[...]
    if plan.mask_invalid:
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
