"""Batches prepared by a background thread while the device computes, with an exact position."""

from __future__ import annotations

import json
import logging
import queue
import threading
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from nvs_common import errors, sharding
from nvs_common.types import Batch

_log = logging.getLogger(__name__)


class BatchIterator(Protocol):
    """Batches of this process (NumPy) with a position that can be saved, as Grain iterators."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> Any:
        """Position as JSON values."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes to a position."""
        ...


class Taken(NamedTuple):
    """A batch, and the position before it was taken."""

    batch: Batch
    before: Any


def position(batches: BatchIterator) -> Any:
    """A copy of the position, as JSON values, that later batches cannot change."""
    return json.loads(json.dumps(batches.get_state()))


class Feed:
    """Takes batches from an iterator in a thread, a few ahead of their use.

    Attributes:
      position: where the iterator was after the batch taken last: what a checkpoint must hold,
        whatever was prepared ahead.
    """

    def __init__(self, batches: BatchIterator, first: Taken | None = None, depth: int = 2):
        """Starts the thread; from here on only this object may touch the iterator.

        Args:
          batches: the iterator.
          first: a batch that was taken from it before; it is handed out first.
          depth: how many batches wait ready at most.
        """
        self._batches = batches
        self._queue: queue.Queue[tuple[Batch | Exception, Any]] = queue.Queue(depth)
        if first is None:
            self.position = position(batches)
        else:
            self.position = first.before
            self._queue.put((first.batch, position(batches)))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        """Whether `take` would return at once."""
        return not self._queue.empty()

    def take(self) -> Batch:
        """The next batch; waits for it.

        Raises:
          InputError: the data ended.
          Exception: whatever the iterator raised.
        """
        item, after = self._queue.get()
        if isinstance(item, StopIteration):
            raise errors.InputError("the training data ended before num_steps; let it repeat.")
        if isinstance(item, Exception):
            raise item
        self.position = after
        return item

    def close(self) -> None:
        """Ends the thread after the batch that it is preparing."""
        self._closed.set()
        self._thread.join(timeout=30)
        if self._thread.is_alive():
            _log.warning("the data iterator still has not returned a batch after 30 s; left behind")

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                item, after = next(self._batches), position(self._batches)
            except Exception as e:  # handed to the consumer, who raises it
                item, after = e, None
            self._put((item, after))
            if isinstance(item, Exception):
                return

    def _put(self, entry: tuple[Batch | Exception, Any]) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(entry, timeout=0.1)
            except queue.Full:
                continue  # look again whether the feed was closed


def to_global(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """Assembles the batches of all processes into arrays over the mesh.

    Args:
      batch: this process's part, NumPy leaves [b, ...].
      mesh: scenes go over its data and fsdp axes.
    """
    where = sharding.batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(where, np.asarray(x)), batch
    )


def abstract(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """Shapes, dtypes and layout of the global batch of which `batch` is this process's part."""
    where = sharding.batch_sharding(mesh)
    parts = jax.process_count()

    def one(x):
        x = np.asarray(x)
        shape = (x.shape[0] * parts, *x.shape[1:])
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    return jax.tree.map(one, batch)
