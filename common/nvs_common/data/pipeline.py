"""Training batches: a Grain pipeline whose order is a function of (seed, step) alone.

Row r of step n is sample n * batch_size + r of an endless shuffled sequence, on whichever of H
hosts it lands: host k holds rows k, k + H, k + 2H, ... of every step. The number of workers and
of hosts change neither which samples make a step nor what is in them, and the state of the
iterator is the number of the next step, so resuming is immediate and needs no saved file of the
same shape. This holds because chance comes from (seed, sample number) and because batches are
formed before work is handed to workers.

Nothing here calls JAX; worker processes never start a backend.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from nvs_common.data import samples, sources
from nvs_common.errors import InputError
from nvs_common.types import Batch

# A worker takes one core for itself, and decodes on the CPU whatever the host has.
_WORKER_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
_START_SECONDS = 60
# Batches of each worker that lie ready: one in its queue, one taken out by a thread here.
_QUEUE = 1
_ENDLESS = 2**48  # samples; Grain's own endless length overflows where it is rounded up
_SHARED_MEMORY = "/dev/shm"
# Smaller arrays go through a pipe. What is in the pipe has to fit its buffer of 64 KiB, or a
# worker that is told to end waits in vain for its last batch to be taken.
_SHARED_MEMORY_LEAF = 1024


def training_batches(
    config, *, source: Any = None, shard: grain.sharding.ShardOptions | None = None
) -> BatchIterator:
    """Endless NumPy batches, this process's share of `config.batch_size` scenes each.

    Reads `config.seed`, `config.batch_size` and `config.data`, see `Sampler` and `make_source`;
    `config.data.workers` is the number of worker processes, 0 for threads of this one.

    Args:
      config: the run's config.
      source: scenes; `sources.make_source(config)` if None.
      shard: which share this process gets; by default its JAX process index and count.

    Raises:
      InputError: a bad source or option, or a scene too small for the asked views.
    """
    source = sources.make_source(config) if source is None else source
    shard = grain.sharding.ShardByJaxProcess() if shard is None else shard
    rows, rest = divmod(config.batch_size, shard.shard_count)
    if rest or rows == 0:
        raise InputError(
            f"batch_size={config.batch_size} does not divide among {shard.shard_count} "
            "processes: set it to a multiple of their number."
        )
    if config.data.workers < 0:
        raise InputError(f"data.workers={config.data.workers}, but it has to be 0 or more.")
    sampler = samples.Sampler.from_config(config)
    sequence = sample_sequence(source, sampler, config.seed)
    first = source[0].cameras
    views = rows * (sampler.num_context + sampler.num_target)
    batch_bytes = views * first.height * first.width * 3 * np.dtype(np.float32).itemsize
    workers = config.data.workers if _fits_shared_memory(config.data.workers, batch_bytes) else 0
    shapes = None
    if sampler.min_context or sampler.crops:
        shapes = functools.partial(samples.DrawShape, config.seed, sampler)
    for size in sampler.crops:
        samples.crop_window(first, size)  # before anything is read
    return BatchIterator(sequence, config.batch_size, shard, workers, shapes)


def sample_sequence(source: Any, sampler: samples.Sampler, seed: int) -> grain.MapDataset:
    """The endless sequence of samples; each epoch of a source is shuffled anew.

    Raises:
      InputError: a scene is too small for the sampler.
    """
    if not isinstance(source, sources.Mixture):
        source = sources.Mixture((source,), (1.0,))
    sequences = []
    for number, part in enumerate(source.parts):
        if len(part) == 0:
            raise InputError(f"Source {number} of data.source has no scene.")
        part = sampler.usable(part)
        sampler.check(part)
        chain = grain.MapDataset.range(len(part)).seed(_fold(seed, number)).shuffle()
        sequences.append(chain.repeat().random_map(samples.DrawSample(part, sampler)))
    if len(sequences) == 1:
        return sequences[0]
    return grain.MapDataset.mix(sequences, source.weights)


_iterators: weakref.WeakSet[BatchIterator] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends workers before the interpreter takes apart the modules they are ended with."""
    for iterator in list(_iterators):
        iterator.close()


class BatchIterator(Iterator[Batch]):
    """Batches from a step on; `get_state` is {"step": the next step} and nothing else.

    Any process count and worker count can continue from the state of any other: `set_state`
    builds the Grain chain anew, sliced from that step.
    """

    def __init__(
        self,
        sequence: grain.MapDataset,
        batch_size: int,
        shard: grain.sharding.ShardOptions,
        workers: int,
        shapes: Callable[[int], samples.DrawShape] | None = None,
    ):
        self._sequence = sequence
        self._batch_size = batch_size
        self._shard = shard
        self._workers = workers
        self._shapes = shapes
        self._step = 0
        self._chain: Any = None
        _iterators.add(self)

    def __next__(self) -> Batch:
        if self._chain is None:
            self._chain = self._make_chain()
            batch = self._first_batch() if self._workers else next(self._chain)
        else:
            batch = next(self._chain)
        if self._workers:
            # Frees the shared memory at once, however long the caller keeps the batch.
            batch = samples.copy(batch)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The number of the next step."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from a step, in constant time.

        Raises:
          InputError: the state is not one of this iterator.
        """
        if set(state) != {"step"} or state["step"] < 0:
            raise InputError(f"The data iterator's state is {state}, but {{'step': n}} is needed.")
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Ends worker processes and threads; the next batch starts them again."""
        if self._chain is not None:
            self._chain.close()
            self._chain = None

    def _make_chain(self) -> Any:
        first = self._step * self._batch_size + self._shard.shard_index
        rows = self._sequence.slice(slice(first, first + _ENDLESS, self._shard.shard_count))
        # Batched here, before workers: whole batches are handed out, in order.
        batches = rows.batch(self._batch_size // self._shard.shard_count, batch_fn=samples.stack)
        if self._shapes is not None:
            batches = batches.map_with_index(self._shapes(self._step))
        if not self._workers:
            reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
            return iter(batches.to_iter_dataset(reading))
        # Grain reads absl flags in every worker, which fails outside of absl.app.run.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        options = grain.experimental.DatasetOptions(min_shm_size=_SHARED_MEMORY_LEAF)
        chain = grain.experimental.WithOptionsIterDataset(batches.to_iter_dataset(reading), options)
        chain = chain.mp_prefetch(
            grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=_QUEUE),
            worker_init_fn=_start_worker,
        )
        return iter(chain)

    def _first_batch(self) -> Batch:
        """Asks for a batch, on which Grain starts the workers, and waits until all run."""
        others = set(multiprocessing.active_children())
        with _environment(_WORKER_ENVIRONMENT):
            batch = next(self._chain)
            # Grain starts them from threads; each inherits the environment of that moment.
            deadline = time.monotonic() + _START_SECONDS
            while len(set(multiprocessing.active_children()) - others) < self._workers:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{self._workers} data workers did not start in {_START_SECONDS} s."
                    )
                time.sleep(0.01)
        return batch


def _fold(seed: int, number: int) -> int:
    """A seed in [0, 2**32) for source `number` of a mixture."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _start_worker(worker_index: int, worker_count: int) -> None:
    """Leaves signals to the parent and ends with it, even when it is killed."""
    del worker_index, worker_count
    # Ctrl-C and a scheduler's SIGTERM reach the whole group; the parent still saves its state
    # and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _fits_shared_memory(workers: int, batch_bytes: int) -> bool:
    """Whether workers can pass their batches; they would be killed where the memory runs out."""
    # Beside those that lie ready, one in the making and one being handed over.
    needed = workers * (2 * _QUEUE + 2) * batch_bytes
    if not os.path.isdir(_SHARED_MEMORY) or shutil.disk_usage(_SHARED_MEMORY).free >= needed:
        return True
    logging.warning(
        "%s has less than the %.0f MB that %d data workers need: threads make the batches, which "
        "is slower. Give the container more with --shm-size, or set data.workers lower.",
        _SHARED_MEMORY,
        needed / 1e6,
        workers,
    )
    return False


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables that processes started inside inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
