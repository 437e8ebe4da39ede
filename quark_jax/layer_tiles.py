"""Tiles of the layers of a map, as kernels for TPUs take them: planes of elements along lanes."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from nvs_common.types import Array
from quark_jax import lane_gather


class Tiles(NamedTuple):
    """How elements [l, y, x] of one map are divided for kernels that go from view to view.

    Attributes:
      layers: of the map.
      size: its rows and columns.
      tile: rows and columns of a tile.
      window: most rows and columns of a view's part that is on the chip.
      views: how many are looked at.
    """

    layers: int
    size: tuple[int, int]
    tile: tuple[int, int]
    window: tuple[int, int]
    views: int

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns of all tiles."""
        rows, columns = (side + -side % of for side, of in zip(self.size, self.tile, strict=True))
        return rows, columns

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Of a kernel: layers, tiles down, tiles across, views."""
        rows, columns = (up // side for up, side in zip(self.padded, self.tile, strict=True))
        return self.layers, rows, columns, self.views

    @property
    def elements(self) -> int:
        """Of all tiles."""
        return math.prod(self.padded) * self.layers

    def of_element(self, *lead: int) -> pl.BlockSpec:
        """Blocks of planes [*lead, l, rows, columns]."""
        zeros = (0,) * len(lead)
        return pl.BlockSpec((*lead, None, *self.tile), lambda l, i, j, v: (*zeros, l, i, j))

    def of_view(self) -> pl.BlockSpec:
        """Blocks of planes [v, l, rows, columns]."""
        return pl.BlockSpec((None, None, *self.tile), lambda l, i, j, v: (v, l, i, j))

    def planes(self, vectors: Array) -> Array:
        """Vectors of elements [l, y, x, a, c] as planes [a, c, l, rows, columns]."""
        return self._pad(jnp.moveaxis(vectors, (3, 4), (0, 1)))

    def vectors(self, planes: Array) -> Array:
        """The other way."""
        y, x = self.size
        return jnp.moveaxis(planes[..., :y, :x], (0, 1), (3, 4))

    def looks(
        self, uv: Array, takes_part: Array, sources: lane_gather.Views
    ) -> tuple[Array, Array, Array]:
        """Columns and rows in the views, and 1 where an element takes part.

        Args:
          uv: [v, l, y, x, 2] fractions of a view's size.
          takes_part: [v, l, y, x] bool.
          sources: the views.

        Returns:
          Planes [v, l, rows, columns]. What pads the tiles looks at nothing.
        """
        x, y = uv[..., 0] * sources.width - 0.5, uv[..., 1] * sources.height - 0.5
        nowhere = lane_gather.NOWHERE
        return self._pad(x, nowhere), self._pad(y, nowhere), self._pad(takes_part.astype(x.dtype))

    def _pad(self, planes: Array, value: float = 0.0) -> Array:
        edges = [(0, up - side) for up, side in zip(self.padded, self.size, strict=True)]
        return jnp.pad(planes, [(0, 0)] * (planes.ndim - 2) + edges, constant_values=value)


def divide(query: Array, views: int, *, tile: tuple[int, int], window: tuple[int, int]) -> Tiles:
    """Divides elements of queries [l, y, x, a, c] into tiles that are no larger than they are."""
    layers, y, x = query.shape[:3]
    units = (lane_gather.ROWS, lane_gather.LANES)
    rows, columns = (
        min(most, side + -side % unit) for most, side, unit in zip(tile, (y, x), units, strict=True)
    )
    return Tiles(layers, (y, x), (rows, columns), window, views)
