"""What benchmarks measure with and how they show it: times, planned memory, Markdown tables."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from nvs_common import rendering
from nvs_common.types import Cameras, Task, Variables, Views


def median_seconds(compiled: Callable, *args: Any, repeats: int) -> float:
    """Median time of a compiled function, results ready; the first call does not count."""
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def peak(compiled: Any) -> float:
    """Planned memory of a compiled program in MiB: arguments, results and temporaries."""
    plan = compiled.memory_analysis()
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return total / 2**20


class Pass(NamedTuple):
    """A forward pass: median seconds and planned memory in MiB."""

    seconds: float
    peak: float


def forward(task: Task, variables: Variables, scene: Any, num_inputs: int, repeats: int) -> Pass:
    """Measures the rendering of one view of a scene from `num_inputs` of the others."""
    context = Views(
        scene.images(np.arange(1, num_inputs + 1))[None],
        rendering.take(scene.cameras, np.arange(1, num_inputs + 1)[None]),
    )
    targets = rendering.take(scene.cameras, np.zeros((1, 1), int))
    args = jax.tree.map(jax.numpy.asarray, (dict(variables), context, targets))
    compiled = jax.jit(task.render).lower(*args).compile()
    return Pass(median_seconds(compiled, *args, repeats=repeats), peak(compiled))


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table."""
    lines = [row(head), "|" + "---|" * len(head)]
    return lines + [row(cells) for cells in rows]


def row(cells: tuple[str, ...]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


@dataclasses.dataclass(frozen=True)
class Kept:
    """A scene whose images are made once and then kept, for several methods to be compared on.

    Attributes:
      scene: the scene itself.
    """

    scene: Any

    @property
    def cameras(self) -> Cameras:
        return self.scene.cameras

    @property
    def names(self) -> tuple[str, ...]:
        return self.scene.names

    @property
    def source(self) -> str:
        return str(self.scene.source)

    @functools.cached_property
    def _images(self) -> dict[int, np.ndarray]:
        return {}

    def images(self, indices: Any) -> np.ndarray:
        """Images [k, h, w, 3] float32."""
        indices = [int(i) for i in np.atleast_1d(np.asarray(indices))]
        if missing := sorted(set(indices) - set(self._images)):
            made = np.asarray(self.scene.images(missing), np.float32)
            self._images.update(zip(missing, made, strict=True))
        return np.stack([self._images[i] for i in indices])

    def resized(self, height: int, width: int) -> Kept:
        """The same scene at another size."""
        return Kept(self.scene.resized(height, width))
