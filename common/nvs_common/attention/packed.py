"""Targets packed in one sequence: each sees the tokens that all share, and its own.

The keys are [shared tokens, tokens of target 1, tokens of target 2, ...]. Queries are the last n
of the same sequence: all of it, or only the targets' where keys of the shared tokens are cached.
Queries that are shared tokens see the shared tokens alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nvs_common.errors import InputError


class Packed(NamedTuple):
    """What a query of a packed sequence sees.

    Attributes:
      shared: tokens in front that every query sees.
      own: tokens of each target.
    """

    shared: int
    own: int


def check(packed: Packed, n: int, m: int) -> None:
    """Raises InputError where n queries and m keys are not packed so."""
    shared, own = packed
    if shared < 0 or own < 1 or m < shared or (m - shared) % own or n > m:
        raise InputError(
            f"attention to packed targets: {m} keys are not {shared} shared ones and targets of "
            f"{own} each, or {n} queries are more than these; change Packed(shared, own)."
        )
    if n < m and (n > m - shared or n % own):
        raise InputError(
            f"attention to packed targets: {n} queries of {m} tokens must be all of them, or those "
            f"of whole targets of {own} tokens after the {shared} shared ones."
        )


def matrix(packed: Packed, n: int, m: int) -> np.ndarray:
    """Which key each query sees, [n, m] bool."""
    query, key = np.arange(n)[:, None] + (m - n), np.arange(m)[None]
    group = lambda position: (position - packed.shared) // packed.own  # noqa: E731
    return (key < packed.shared) | (group(query) == group(key))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of the n x m logits: which are needed, and which need no mask.

    Attributes:
      n, m: queries and keys without padding.
      block_q, block_k: sides of a tile.
      packed: what queries see; None is all.
      start: place of the first query in the packed sequence.
    """

    n: int
    m: int
    block_q: int
    block_k: int
    packed: Packed | None = None
    start: int = 0

    @property
    def rows(self) -> int:
        """Tiles of queries."""
        return -(-self.n // self.block_q)

    @property
    def columns(self) -> int:
        """Tiles of keys."""
        return -(-self.m // self.block_k)

    @property
    def key_steps(self) -> int:
        """Tiles of keys that a tile of queries needs at most."""
        if self.packed is None:
            return self.columns
        ends = [self._own_keys(i) for i in range(self.rows)]
        most = max(int(last - first) + 1 for first, last in ends)
        return self._shared_columns + max(0, most)

    @property
    def needed(self) -> int:
        """Tiles that are computed, of rows x columns."""
        if self.packed is None:
            return self.rows * self.columns
        own = (self._own_keys(i) for i in range(self.rows))
        extra = sum(max(0, int(last - first) + 1) for first, last in own)
        return self.rows * self._shared_columns + extra

    def key_tile(self, i: Any, step: Any) -> tuple[Any, Any]:
        """The tile of keys that query tile i meets at a step; and whether it needs it."""
        if self.packed is None:
            return step, True
        first, last = self._own_keys(i)
        shared = self._shared_columns
        later = first + step - shared
        xp = _library(i)
        tile = xp.where(step < shared, step, xp.minimum(later, xp.maximum(last, shared - 1)))
        return xp.maximum(tile, 0), (step < shared) | (later <= last)

    def query_tile(self, j: Any, step: Any) -> tuple[Any, Any]:
        """The tile of queries that key tile j meets at a step of `rows`; and whether it needs it.

        Keys that are shared need all of them.
        """
        if self.packed is None:
            return step, True
        first, last = self._own_queries(j)
        shared = j < self._shared_columns
        xp = _library(j)
        tile = xp.where(shared, step, xp.minimum(first + step, xp.maximum(last, 0)))
        return tile, shared | (first + step <= last)

    def whole(self, j: Any) -> Any:
        """Whether all queries see all keys of tile j, none of them padding."""
        return (j + 1) * self.block_k <= (self.m if self.packed is None else self.packed.shared)

    @property
    def always_whole(self) -> bool:
        """Whether no tile needs a mask."""
        return self.packed is None and self.m % self.block_k == 0

    @property
    def _shared_columns(self) -> int:
        assert self.packed is not None
        return -(-self.packed.shared // self.block_k)

    def _own_keys(self, i: Any) -> tuple[Any, Any]:
        """First and last tile, beyond the shared ones, of keys of targets that tile i has."""
        assert self.packed is not None
        shared, own = self.packed
        begin = i * self.block_q + self.start - shared
        end = _least(begin + self.block_q, self.start + self.n - shared)  # one past the last
        first = _tile(shared + _tile(_most(begin, 0), own) * own, self.block_k)
        last = _tile(shared + _tile(_most(end - 1, 0), own) * own + own - 1, self.block_k)
        # Where all queries are shared tokens there is none, and the first is after the last.
        return _most(first, self._shared_columns), last - (last + 1) * (end <= 0)

    def _own_queries(self, j: Any) -> tuple[Any, Any]:
        """First and last tile of queries of the targets that key tile j has."""
        assert self.packed is not None
        shared, own = self.packed
        begin = j * self.block_k - shared
        end = _least(begin + self.block_k, self.m - shared)
        first = shared + _tile(_most(begin, 0), own) * own - self.start
        end = shared + _tile(_most(end - 1, 0), own) * own + own - self.start
        # A part of the queries may have none of them: then the first is after the last.
        last = _tile(_most(end - 1 + self.block_q, 0), self.block_q) - 1
        return _tile(_most(first, 0), self.block_q), _least(last, self.rows - 1)


def _library(x: Any) -> Any:
    """NumPy for numbers that are known, JAX inside a kernel."""
    return np if isinstance(x, int | np.ndarray | np.generic) else jnp


def _tile(position: Any, side: int) -> Any:
    """The number of the tile that a position, which is not negative, is in."""
    if _library(position) is np:
        return position // side
    return jax.lax.div(position, jnp.full_like(position, side))


def _least(x: Any, y: int) -> Any:
    return _library(x).minimum(x, y)


def _most(x: Any, y: int) -> Any:
    return _library(x).maximum(x, y)
