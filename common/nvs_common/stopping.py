"""When a run stops before its last step: the scheduler asks (SIGTERM), or its time is over."""

from __future__ import annotations

import signal
import threading
import time
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils


class Stop:
    """Answers, the same on every process, whether to stop after this step.

    A context manager: SIGTERM is handled inside. In a distributed job JAX's own notifier receives
    SIGTERM and lets all processes agree on a step; a handler of ours would take that away.
    """

    def __init__(self, after_minutes: float):
        """Starts the clock.

        Args:
          after_minutes: time limit from now, 0 for none.
        """
        self._deadline = time.monotonic() + 60 * after_minutes if after_minutes else None
        self._distributed = jax.distributed.is_initialized()
        self._asked = threading.Event()
        self._previous = None
        # Python lets only the main thread handle signals.
        main = threading.current_thread() is threading.main_thread()
        self._handles = main and not self._distributed

    def __enter__(self) -> Stop:
        if self._handles:
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._asked.set())
        return self

    def __exit__(self, *_) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._previous)

    def reason(self, step: int) -> Literal["preempted", "time"] | None:
        """Why to stop after step number `step`; every process must ask at every step."""
        if self._asked.is_set():
            return "preempted"
        if self._distributed and multihost_utils.reached_preemption_sync_point(step):
            return "preempted"
        if self._deadline is None:
            return None
        late = time.monotonic() > self._deadline
        if jax.process_count() > 1:
            # The clock of process 0 decides, so that all stop at the same step.
            late = bool(multihost_utils.broadcast_one_to_all(np.asarray(late)))
        return "time" if late else None
