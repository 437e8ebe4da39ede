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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nvs_common.types import Array

# The vector unit works on this many rows and columns at once.
ROWS, LANES = 8, 128
_LANE_BITS = 7


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
    """

    x: Any
    y: Any
    sample: Any
    window: Any
    arrived: Any


def views(images: Array) -> Views:
    """Images [v, h, w, c] for a kernel."""
    planes = jnp.moveaxis(images, -1, 1)
    height, width = planes.shape[2:]
    edges = ((0, 0), (0, 0), (0, -height % ROWS), (0, -width % LANES))
    return Views(jnp.pad(planes, edges), height, width)


def scratch_shapes(tile: tuple[int, int], of: Views, window: tuple[int, int]) -> Scratch:
    """Scratch for elements in tiles [h, w] and windows of at most `window` of the views."""
    channels, *size = of.planes.shape[1:]
    rows, columns = (min(most, side) for most, side in zip(window, size, strict=True))
    return Scratch(
        pltpu.VMEM(tile, jnp.float32),
        pltpu.VMEM(tile, jnp.float32),
        pltpu.VMEM((channels, *tile), jnp.float32),
        pltpu.VMEM((columns // LANES, channels, rows, LANES), jnp.float32),
        pltpu.SemaphoreType.DMA,
    )


def sample(of: Views, view: Array, scratch: Scratch) -> None:
    """Samples view number `view` at the positions in the scratch."""
    tile, held, size = scratch.x.shape, _held(scratch), of.planes.shape[2:]
    low, high = _bounds(scratch.x[...], scratch.y[...], of)
    # Copies begin at tiles of memory.
    begin = (low[0] & -ROWS, low[1] & -LANES)
    across = tile[1] // LANES
    scratch.sample[...] = jnp.zeros_like(scratch.sample)

    def visit(row: Array, column: Array) -> None:
        top = pl.multiple_of(jnp.minimum(row, size[0] - held[0]), ROWS)
        left = pl.multiple_of(jnp.minimum(column, size[1] - held[1]), LANES)
        copies = []
        for part in range(held[1] // LANES):
            columns = pl.ds(pl.multiple_of(left + part * LANES, LANES), LANES)
            source = of.planes.at[view, :, pl.ds(top, held[0]), columns]
            copies.append(pltpu.make_async_copy(source, scratch.window.at[part], scratch.arrived))
            copies[-1].start()
        for copy in copies:
            copy.wait()

        def group(n: Array, _: None) -> None:
            i = _quotient(n, across)
            place = (
                pl.multiple_of(i * ROWS, ROWS),
                pl.multiple_of((n - i * across) * LANES, LANES),
            )
            # Rows and columns before these were in an earlier window.
            _walk(of, place, (row, column), (top, left), scratch)

        jax.lax.fori_loop(0, tile[0] // ROWS * across, group, None)

    def rows(i: Array, _: None) -> None:
        def columns(j: Array, _: None) -> None:
            visit(begin[0] + i * held[0], begin[1] + j * held[1])

        jax.lax.fori_loop(0, _quotient(high[1] - begin[1], held[1]) + 1, columns, None)

    # Where no element is inside of the view there is nothing to copy.
    found = (high[0] >= low[0]) & (high[1] >= low[1])
    count = jnp.where(found, _quotient(high[0] - begin[0], held[0]) + 1, 0)
    jax.lax.fori_loop(0, count, rows, None)


def cost(elements: int, of: Views, tile: tuple[int, int], window: tuple[int, int]) -> Any:
    """Operations and bytes of sampling every view at so many elements, where they are close
    together: one window a tile and view, and a row more than the elements have."""
    channels = of.planes.shape[1]
    looks = elements * of.planes.shape[0]
    moved = looks // math.prod(tile) * channels * math.prod(window)
    return pl.CostEstimate(flops=12 * looks * channels, bytes_accessed=4 * moved, transcendentals=0)


def _walk(
    of: Views,
    place: tuple[Array, Array],
    begin: tuple[Array, Array],
    corner: tuple[Array, Array],
    scratch: Scratch,
) -> None:
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
    low, high = _bounds(x, y, of)
    held = _held(scratch)
    first = [jnp.maximum(least, start) for least, start in zip(low, begin, strict=True)]
    last = [
        jnp.minimum(most, start + size - 1)
        for most, start, size in zip(high, begin, held, strict=True)
    ]
    x0, y0 = jnp.floor(x), jnp.floor(y)
    right, below = x - x0, y - y0
    x0, y0 = x0.astype(jnp.int32), y0.astype(jnp.int32)
    sides = ((x0, 1 - right), (x0 + 1, right))
    lanes = [column & (LANES - 1) for column, _ in sides]

    def block(number: Array, _: None) -> None:
        # Pixels outside of the view are in no block and no row that is visited.
        weights = [
            jnp.where(column >> _LANE_BITS == number, weight, 0.0) for column, weight in sides
        ]
        part_of_window = number - (corner[1] >> _LANE_BITS)

        def row(number: Array, _: None) -> None:
            part = jnp.where(y0 == number, 1 - below, jnp.where(y0 + 1 == number, below, 0.0))
            both = [part * weight for weight in weights]

            def channel(c: Array | int, _: None) -> None:
                pixels = scratch.window[part_of_window, c, pl.ds(number - corner[0], 1), :]
                pixels = jnp.broadcast_to(pixels, (ROWS, LANES))
                two = [
                    weight * jnp.take_along_axis(pixels, lane, axis=1)
                    for weight, lane in zip(both, lanes, strict=True)
                ]
                scratch.sample[(c, *here)] += two[0] + two[1]

            channels = scratch.sample.shape[0]
            jax.lax.fori_loop(0, channels, channel, None, unroll=channels)

        jax.lax.fori_loop(first[0], last[0] + 1, row, None)

    jax.lax.fori_loop(first[1] >> _LANE_BITS, (last[1] >> _LANE_BITS) + 1, block, None)


def _bounds(x: Array, y: Array, of: Views) -> tuple[list[Array], list[Array]]:
    """First and last rows and columns of the pixels around the positions inside of a view; the
    last before the first where none is inside."""
    inside = (x > -1) & (x < of.width) & (y > -1) & (y < of.height)
    low, high = [], []
    for position, side in ((y, of.height), (x, of.width)):
        least = jnp.min(jnp.where(inside, position, side - 1.0))
        most = jnp.max(jnp.where(inside, position, -2.0))
        low.append(jnp.maximum(jnp.floor(least).astype(jnp.int32), 0))
        high.append(jnp.minimum(jnp.floor(most).astype(jnp.int32) + 1, side - 1))
    return low, high


def _held(scratch: Scratch) -> tuple[int, int]:
    """Rows and columns of a window."""
    parts, _, rows, lanes = scratch.window.shape
    return rows, parts * lanes


def _quotient(number: Array, by: int) -> Array:
    """Of numbers that are not negative; `//` would look at the sign."""
    return jax.lax.div(number, jnp.int32(by))
