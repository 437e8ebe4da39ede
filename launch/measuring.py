"""What benchmarks measure with and how they show it: times, planned memory, Markdown tables."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nvs_common import rendering
from nvs_common.types import Batch, Cameras, Task, Variables, Views

# Seconds until idle threads of one library no longer spin where those of another are to work.
_PAUSE = 0.01


def median_seconds(compiled: Callable, *args: Any, repeats: int) -> float:
    """Median time of a compiled function, results ready; the first call does not count."""
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def alternating_medians(*functions: Callable[[], Any], repeats: int) -> list[float]:
    """Median times of functions that take turns, so that all meet the same load of the machine.

    The first call of each does not count.
    """
    for function in functions:
        jax.block_until_ready(function())
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, mine in zip(functions, times, strict=True):
            time.sleep(_PAUSE)
            begin = time.perf_counter()
            jax.block_until_ready(function())
            mine.append(time.perf_counter() - begin)
    return [float(np.median(mine)) for mine in times]


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
    args = jax.tree.map(jnp.asarray, (dict(variables), context, targets))
    compiled = jax.jit(task.render).lower(*args).compile()
    return Pass(median_seconds(compiled, *args, repeats=repeats), peak(compiled))


def random_batch(scenes: int, views: int, targets: int, height: int, width: int) -> Batch:
    """Noise images from a small forward-facing rig: what they show does not change the time."""
    rng = np.random.default_rng(0)

    def posed(count: int) -> Views:
        pose = np.tile(np.eye(4, dtype=np.float32), (scenes, count, 1, 1))
        pose[..., :2, 3] = rng.normal(size=(scenes, count, 2)) * 0.1
        intrinsics = np.array([width, width, width / 2, height / 2], np.float32)
        near, far = (
            np.full((scenes, count), 1, np.float32),
            np.full((scenes, count), 20, np.float32),
        )
        cams = Cameras(pose, np.tile(intrinsics, (scenes, count, 1)), near, far, height, width)
        images = rng.uniform(size=(scenes, count, height, width, 3)).astype(np.float32)
        return jax.tree.map(jnp.asarray, Views(images, cams))

    return Batch(posed(views), posed(targets))


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

    @property
    def points(self) -> Any:
        return getattr(self.scene, "points", None)

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
