"""Bilinear samples of a view inside of a Pallas kernel for TPUs.

TPUs read memory in tiles and have no gather from it. But neighbouring elements of a layered depth
map lie in one band of depth, so what they look at lies in a small window of the view. The window
is copied to the chip, and 8 x 128 elements at a time walk through the few rows that they touch:
within a row of 128 pixels each lane can fetch any other, the one gather of the vector unit. However
far apart pixels are, windows and rows are visited until all of them are found: the picture's
content costs time, never correctness.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nvs_common.types import Array

# The vector unit works on this many rows and columns at once.
ROWS, LANES = 8, 128
LANE_BITS = 7
# A row and a column that no view has: elements there look at nothing.
NOWHERE = -2.0

Corner = tuple[Array, Array]


class Views(NamedTuple):
    """Images of views in memory, as a kernel takes them.

    Attributes:
      planes: [v, c, h, w], both sides whole tiles of memory.
      height: rows that are there.
      width: columns that are there.
    """

    planes: Any
    height: int
    width: int


class Scratch(NamedTuple):
    """What a kernel keeps on the chip to sample a view.

    Attributes:
      x: [h, w] column in the view of each element, pixel centres at whole numbers.
      y: [h, w] row.
      sample: [c, h, w] what is found there; zero outside of the view.
      window: [columns / 128, c, rows, 128] of the view: a row that is fetched from is one load.
      arrived: semaphore of the window's copies.
      slopes: [2, c, h, w] how the sample changes along x and y; None where nobody asks.
    """

    x: Any
    y: Any
    sample: Any
    window: Any
    arrived: Any
    slopes: Any = None


def views(images: Array) -> Views:
    """Images [v, h, w, c] for a kernel."""
    planes = jnp.moveaxis(images, -1, 1)
    height, width = planes.shape[2:]
    edges = ((0, 0), (0, 0), (0, -height % ROWS), (0, -width % LANES))
    return Views(jnp.pad(planes, edges), height, width)


def scratch_shapes(
    tile: tuple[int, int], of: Views, window: tuple[int, int], *, slopes: bool = False
) -> Scratch:
    """Scratch for elements in tiles [h, w] and windows of at most `window` of the views."""
    channels = of.planes.shape[1]
    rows, columns = window_size(of, window)
    return Scratch(
        pltpu.VMEM(tile, jnp.float32),
        pltpu.VMEM(tile, jnp.float32),
        pltpu.VMEM((channels, *tile), jnp.float32),
        pltpu.VMEM((columns // LANES, channels, rows, LANES), jnp.float32),
        pltpu.SemaphoreType.DMA,
        pltpu.VMEM((2, channels, *tile), jnp.float32) if slopes else None,
    )


def window_size(of: Views, most: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the windows: no more than the views have."""
    rows, columns = (min(m, side) for m, side in zip(most, of.planes.shape[2:], strict=True))
    return rows, columns


def sample(of: Views, view: Array, scratch: Scratch) -> None:
    """Samples view number `view` at the positions in the scratch."""
    tile, held = scratch.x.shape, _held(scratch)
    scratch.sample[...] = jnp.zeros_like(scratch.sample)
    if scratch.slopes is not None:
        scratch.slopes[...] = jnp.zeros_like(scratch.slopes)

    def visit(begin: Corner, corner: Corner) -> None:
        copies = []
        for part in range(held[1] // LANES):
            columns = pl.ds(pl.multiple_of(corner[1] + part * LANES, LANES), LANES)
            source = of.planes.at[view, :, pl.ds(corner[0], held[0]), columns]
            copies.append(pltpu.make_async_copy(source, scratch.window.at[part], scratch.arrived))
            copies[-1].start()
        for copy in copies:
            copy.wait()
        over_groups(tile, lambda place: _walk(of, place, begin, corner, scratch))

    over_windows(of, (scratch.x[...], scratch.y[...]), held, visit)


def over_windows(
    of: Views, position: Corner, held: tuple[int, int], visit: Callable[[Corner, Corner], None]
) -> None:
    """Visits the windows of a view that hold the pixels around a tile's elements.

    Args:
      of: the views.
      position: columns x and rows y of the elements.
      held: rows and columns of a window.
      visit: (begin, corner) -> None: the first row and column of the view that the window is
        responsible for, those before were in an earlier one; and the first that it holds.
    """
    size = of.planes.shape[2:]
    low, high = bounds(*position, of)
    # Copies begin at tiles of memory.
    begin = (low[0] & -ROWS, low[1] & -LANES)

    def rows(i: Array, _: None) -> None:
        def columns(j: Array, _: None) -> None:
            row, column = begin[0] + i * held[0], begin[1] + j * held[1]
            top = pl.multiple_of(jnp.minimum(row, size[0] - held[0]), ROWS)
            left = pl.multiple_of(jnp.minimum(column, size[1] - held[1]), LANES)
            visit((row, column), (top, left))

        jax.lax.fori_loop(0, _quotient(high[1] - begin[1], held[1]) + 1, columns, None)

    # Where no element is inside of the view there is nothing to copy.
    found = (high[0] >= low[0]) & (high[1] >= low[1])
    count = jnp.where(found, _quotient(high[0] - begin[0], held[0]) + 1, 0)
    jax.lax.fori_loop(0, count, rows, None)


def over_groups(tile: tuple[int, int], walk: Callable[[Corner], None]) -> None:
    """Calls `walk` with the first row and column of every 8 x 128 elements of a tile."""
    across = tile[1] // LANES

    def group(n: Array, _: None) -> None:
        i = _quotient(n, across)
        walk((pl.multiple_of(i * ROWS, ROWS), pl.multiple_of((n - i * across) * LANES, LANES)))

    jax.lax.fori_loop(0, tile[0] // ROWS * across, group, None)


def cost(elements: int, of: Views, tile: tuple[int, int], window: tuple[int, int]) -> Any:
    """Operations and bytes of sampling every view at so many elements, where they are close
    together: one window a tile and view, and a row more than the elements have."""
    channels = of.planes.shape[1]
    looks = elements * of.planes.shape[0]
    moved = looks // math.prod(tile) * channels * math.prod(window)
    return pl.CostEstimate(flops=12 * looks * channels, bytes_accessed=4 * moved, transcendentals=0)


def _walk(of: Views, place: Corner, begin: Corner, corner: Corner, scratch: Scratch) -> None:
    """Adds what 8 x 128 elements find in a window: row by row, 128 pixels at a time.

    Args:
      of: the views.
      place: row and column of the elements in the tile.
      begin: first row and column of the view that this window is responsible for.
      corner: first row and column of the view that it holds.
      scratch: of the kernel.
    """
    here = (pl.ds(place[0], ROWS), pl.ds(place[1], LANES))
    x, y = scratch.x[here], scratch.y[here]
    first, last = part_of(bounds(x, y, of), begin, _held(scratch))
    (x0, right), (y0, below) = cell(x), cell(y)
    lanes = [x0 & (LANES - 1), (x0 + 1) & (LANES - 1)]

    def block(number: Array, _: None) -> None:
        # Pixels outside of the view are in no block and no row that is visited.
        def of_columns(at_x0: Any, next_to_it: Any) -> list[Array]:
            pairs = ((x0, at_x0), (x0 + 1, next_to_it))
            return [jnp.where(column >> LANE_BITS == number, w, 0.0) for column, w in pairs]

        columns, column_slopes = of_columns(1 - right, right), of_columns(-1.0, 1.0)
        part_of_window = number - (corner[1] >> LANE_BITS)

        def row(number: Array, _: None) -> None:
            part = either(number, y0, 1 - below, below)
            sums = [(scratch.sample, [part * weight for weight in columns])]
            if scratch.slopes is not None:
                slope = either(number, y0, -1.0, 1.0)
                sums += [
                    (scratch.slopes.at[0], [part * weight for weight in column_slopes]),
                    (scratch.slopes.at[1], [slope * weight for weight in columns]),
                ]

            def channel(c: Array | int, _: None) -> None:
                pixels = scratch.window[part_of_window, c, pl.ds(number - corner[0], 1), :]
                pixels = jnp.broadcast_to(pixels, (ROWS, LANES))
                two = [jnp.take_along_axis(pixels, lane, axis=1) for lane in lanes]
                for total, weights in sums:
                    total[(c, *here)] += weights[0] * two[0] + weights[1] * two[1]

            channels = scratch.sample.shape[0]
            jax.lax.fori_loop(0, channels, channel, None, unroll=channels)

        jax.lax.fori_loop(first[0], last[0] + 1, row, None)

    jax.lax.fori_loop(first[1] >> LANE_BITS, (last[1] >> LANE_BITS) + 1, block, None)


def cell(position: Array) -> tuple[Array, Array]:
    """The last pixel at or before positions, and how far behind it they are."""
    before = jnp.floor(position)
    return before.astype(jnp.int32), position - before


def either(pixel: Array, before: Array, there: Any, after: Any) -> Array:
    """What belongs to a pixel: `there` if it is the one before, `after` if the next, or zero."""
    return jnp.where(pixel == before, there, jnp.where(pixel == before + 1, after, 0.0))


def bounds(x: Array, y: Array, of: Views) -> tuple[Corner, Corner]:
    """First and last rows and columns of the pixels around the positions inside of a view; the
    last before the first where none is inside."""
    # At -1 the sample is zero, but has a slope.
    inside = (x >= -1) & (x < of.width) & (y >= -1) & (y < of.height)

    def along(position: Array, side: int) -> Corner:
        least = jnp.min(jnp.where(inside, position, side - 1.0))
        most = jnp.max(jnp.where(inside, position, NOWHERE))
        first = jnp.maximum(jnp.floor(least).astype(jnp.int32), 0)
        return first, jnp.minimum(jnp.floor(most).astype(jnp.int32) + 1, side - 1)

    (top, bottom), (left, right) = along(y, of.height), along(x, of.width)
    return (top, left), (bottom, right)


def part_of(
    found: tuple[Corner, Corner], begin: Corner, held: tuple[int, int]
) -> tuple[Corner, Corner]:
    """The part of `bounds` that a window of `held` rows and columns is responsible for."""
    (top, left), (bottom, right) = found
    return (
        (jnp.maximum(top, begin[0]), jnp.maximum(left, begin[1])),
        (jnp.minimum(bottom, begin[0] + held[0] - 1), jnp.minimum(right, begin[1] + held[1] - 1)),
    )


def _held(scratch: Scratch) -> tuple[int, int]:
    """Rows and columns of a window."""
    parts, _, rows, lanes = scratch.window.shape
    return rows, parts * lanes


def _quotient(number: Array, by: int) -> Array:
    """Of numbers that are not negative; `//` would look at the sign."""
    return jax.lax.div(number, jnp.int32(by))
