"""The transpose of `lane_gather`: gradients of the pixels, inside of a Pallas kernel for TPUs.

Lanes fetch from each other but do not add to each other, and memory has no scatter. But the matrix
unit adds: with a one-hot matrix of 128 elements' columns, their bilinear weights in it, one product
brings the channels of 128 elements to 128 pixels of a row. Windows of the gradient are copied to
the chip, added to and written back, in the order in which a tile's elements were gathered. So
nothing depends on luck: the same arguments give the same bits. The tiles of a view have to follow
each other, as all of them may add to the same pixels: no axis of the grid is "parallel".
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nvs_common.types import Array
from quark_jax import lane_gather
from quark_jax.lane_gather import LANE_BITS, LANES, ROWS, Corner


class Scratch(NamedTuple):
    """What a kernel keeps on the chip to add to a view's gradient.

    Attributes:
      values: [c, h, w] what each element adds, at the positions of the gather.
      turned: [8, c, 128] the same of 8 x 128 elements: those of a row are one load.
      places: [2, 8, 128] columns and rows of these elements in the view.
      window: [columns / 128, rows, c, 128] of the gradient.
      arrived: semaphore of the window's copies.
    """

    values: Any
    turned: Any
    places: Any
    window: Any
    arrived: Any


def nothing(of: lane_gather.Views) -> Array:
    """Gradients of all views before anything is added: [v, h, c, w], sides as in memory."""
    views, channels, height, width = of.planes.shape
    return jnp.zeros((views, height, channels, width), jnp.float32)


def images(gradients: Array, of: lane_gather.Views) -> Array:
    """Gradients [v, h, c, w] as those of the images [v, h, w, c]."""
    return jnp.moveaxis(gradients[:, : of.height, :, : of.width], 2, 3)


def scratch_shapes(
    tile: tuple[int, int], of: lane_gather.Views, window: tuple[int, int]
) -> Scratch:
    """Scratch for elements in tiles [h, w] and windows of at most `window` of the views."""
    channels = of.planes.shape[1]
    rows, columns = lane_gather.window_size(of, window)
    return Scratch(
        pltpu.VMEM((channels, *tile), jnp.float32),
        pltpu.VMEM((ROWS, channels, LANES), jnp.float32),
        pltpu.VMEM((2, ROWS, LANES), jnp.float32),
        pltpu.VMEM((columns // LANES, rows, channels, LANES), jnp.float32),
        pltpu.SemaphoreType.DMA,
    )


def add(
    gradients: Any, of: lane_gather.Views, view: Array, position: tuple[Any, Any], scratch: Scratch
) -> None:
    """Adds the values in the scratch to the gradient of view number `view`.

    Args:
      gradients: [v, h, c, w] in memory.
      of: the views.
      view: [] number.
      position: references to columns x and rows y of the elements, [h, w].
      scratch: of the kernel.
    """
    x_ref, y_ref = position
    parts, rows = scratch.window.shape[:2]
    held = (rows, parts * LANES)

    def visit(begin: Corner, corner: Corner) -> None:
        def copy(*, back: bool) -> None:
            copies = []
            for part in range(parts):
                columns = pl.ds(pl.multiple_of(corner[1] + part * LANES, LANES), LANES)
                ends = [
                    gradients.at[view, pl.ds(corner[0], rows), :, columns],
                    scratch.window.at[part],
                ]
                source, destination = reversed(ends) if back else ends
                copies.append(pltpu.make_async_copy(source, destination, scratch.arrived))
                copies[-1].start()
            for one in copies:
                one.wait()

        def group(place: Corner) -> None:
            here = (pl.ds(place[0], ROWS), pl.ds(place[1], LANES))
            scratch.turned[...] = jnp.swapaxes(scratch.values[(slice(None), *here)], 0, 1)
            scratch.places[0], scratch.places[1] = x_ref[here], y_ref[here]

            def strip(row: Array, _: None) -> None:
                x, y = (scratch.places[i, pl.ds(row, 1), :] for i in range(2))
                _walk(of, (x, y), scratch.turned[row], begin, corner, scratch)

            jax.lax.fori_loop(0, ROWS, strip, None)

        copy(back=False)
        lane_gather.over_groups(x_ref.shape, group)
        # Before the next window, which may hold some of the same pixels, or the next tile.
        copy(back=True)

    lane_gather.over_windows(of, (x_ref[...], y_ref[...]), held, visit)


def cost(
    elements: int, of: lane_gather.Views, tile: tuple[int, int], window: tuple[int, int]
) -> pl.CostEstimate:
    """Operations and bytes of adding to every view at so many elements, where they are close
    together: one window a tile and view, and two rows of one block for 128 elements."""
    channels = of.planes.shape[1]
    looks = elements * of.planes.shape[0]
    moved = looks // math.prod(tile) * channels * math.prod(window)
    return pl.CostEstimate(
        flops=4 * looks * LANES * channels, bytes_accessed=8 * moved, transcendentals=0
    )


def _walk(
    of: lane_gather.Views,
    position: Corner,
    values: Array,
    begin: Corner,
    corner: Corner,
    scratch: Scratch,
) -> None:
    """Adds 128 elements' values to a window: row by row, 128 pixels at a time.

    Args:
      of: the views.
      position: columns x and rows y, [1, 128].
      values: [c, 128].
      begin: first row and column of the view that this window is responsible for.
      corner: first row and column of the view that it holds.
      scratch: of the kernel.
    """
    x, y = position
    parts, rows = scratch.window.shape[:2]
    found = lane_gather.bounds(x, y, of)
    first, last = lane_gather.part_of(found, begin, (rows, parts * LANES))
    (x0, right), (y0, below) = lane_gather.cell(x), lane_gather.cell(y)

    def block(number: Array, _: None) -> None:
        pixel = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) + number * LANES
        # [pixels, elements]
        weights = lane_gather.either(pixel, x0, 1 - right, right)
        part_of_window = number - (corner[1] >> LANE_BITS)

        def row(number: Array, _: None) -> None:
            # Pixels outside of the view are in no row that is visited, nor is their block's part.
            part = lane_gather.either(number, y0, 1 - below, below)
            # All digits of both: what is added is exact to float32.
            added = jax.lax.dot_general(
                values * part,
                weights,
                (((1,), (1,)), ((), ())),
                precision="highest",
                preferred_element_type=jnp.float32,
            )
            scratch.window[part_of_window, number - corner[0]] += added

        jax.lax.fori_loop(first[0], last[0] + 1, row, None)

    jax.lax.fori_loop(first[1] >> LANE_BITS, (last[1] >> LANE_BITS) + 1, block, None)
