"""What a run tells: metrics.jsonl, TensorBoard, and a progress line with rates and time left."""

from __future__ import annotations

import json
import logging
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm

from nvs_common import outputs

_log = logging.getLogger(__name__)
# Shown in the progress line where a run has them, in this order.
_SHOWN = {
    "loss": "loss {:.4g}",
    "psnr": "PSNR {:.2f}",
    "steps_per_second": "{:.3g} steps/s",
    "examples_per_second": "{:.3g} examples/s",
}
# Metrics of single steps that are counted, not averaged.
_SUMMED = ("skipped", "bad_data", "large_gradient")


class Clock:
    """Rates over the steps since the last report; evaluation is left out."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Begins a new window now."""
        self._start = time.perf_counter()
        self._steps = 0
        self._waited = 0.0

    def step(self) -> None:
        """Counts a step."""
        self._steps += 1

    def waited(self, seconds: float) -> None:
        """Adds time in which the device had nothing to do because the batch was not there."""
        self._waited += seconds

    def leave_out(self, seconds: float) -> None:
        """Takes time out of the window."""
        self._start += seconds

    def rates(self) -> dict[str, float]:
        """steps_per_second, examples_per_second and data_wait_fraction of the window; restarts."""
        elapsed = time.perf_counter() - self._start
        steps, waited = self._steps, self._waited
        self.restart()
        if not steps or elapsed <= 0:
            return {}
        return {
            "steps_per_second": steps / elapsed,
            "examples_per_second": steps * self._batch_size / elapsed,
            "data_wait_fraction": min(waited / elapsed, 1.0),
        }


class Writer:
    """Writes metrics and images of a run; only process 0 writes."""

    def __init__(self, workdir: pathlib.Path, start_step: int):
        """Opens the files; what a killed session wrote after start_step is dropped.

        Args:
          workdir: folder of the run.
          start_step: the step that was restored, 0 for a new run.
        """
        self._active = jax.process_index() == 0
        path = workdir / "metrics.jsonl"
        before = _until(path.read_text(errors="replace"), start_step) if path.exists() else ""
        self._written = {
            (line["kind"], line["step"]) for line in map(json.loads, before.splitlines())
        }
        if not self._active:
            return
        if path.exists():
            outputs.write_text(path, before)
        self._lines = path.open("a")
        self._board = tensorboardX.SummaryWriter(str(workdir), purge_step=start_step + 1)

    def scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Adds a line {"step", "kind", name: value, ...} and the same scalars to TensorBoard.

        A value that is not finite is written as null: JSON has no word for it.
        """
        self._written.add((kind, step))
        if not self._active:
            return
        line = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._lines.write(json.dumps({"step": step, "kind": kind, **line}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        self._board.flush()

    def has(self, kind: str, step: int) -> bool:
        """Whether a line of this kind is there for a step."""
        return (kind, step) in self._written

    def images(self, step: int, kind: str, images: Mapping[str, Any]) -> None:
        """Adds uint8 images [h, w, 3] to TensorBoard."""
        if not self._active:
            return
        for name, image in images.items():
            self._board.add_image(f"{kind}/{name}", np.asarray(image), step, dataformats="HWC")
        self._board.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            self._lines.close()
            self._board.close()


class Progress:
    """A bar on a terminal; elsewhere a log line at every report."""

    def __init__(self, start_step: int, num_steps: int):
        self._num_steps = num_steps
        first = jax.process_index() == 0
        self._log = first and not sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=num_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            disable=not first or self._log,
        )

    def step(self) -> None:
        """Moves the bar by a step."""
        self._bar.update(1)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the newest metrics."""
        shown = [form.format(values[name]) for name, form in _SHOWN.items() if name in values]
        if "data_wait_fraction" in values:
            shown.append(f"data wait {100 * values['data_wait_fraction']:.0f}%")
        self._bar.set_postfix_str(", ".join(shown))
        if self._log:
            left = ""
            if values.get("steps_per_second"):
                seconds = (self._num_steps - step) / values["steps_per_second"]
                left = f", {tqdm.tqdm.format_interval(seconds)} left"
            _log.info("step %d/%d: %s%s", step, self._num_steps, ", ".join(shown), left)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


def average(window: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps that were not skipped; of counters the sum or the newest value.

    Args:
      window: metrics of each step, scalars on the device; "skipped" is 1 for a skipped step,
        "bad_data" 1 if its batch held values that are not finite, "large_gradient" 1 if its
        gradient was finite but too large (all three are summed up), and "skipped_*" count on
        from step to step.
    """
    window = jax.device_get(window)
    kept = [m for m in window if not m["skipped"]]
    means = {k: float(np.mean([m[k] for m in kept])) if kept else math.nan for k in window[-1]}
    counters = {k: float(v) for k, v in window[-1].items() if k.startswith("skipped_")}
    sums = {k: float(sum(m[k] for m in window)) for k in _SUMMED}
    return means | sums | counters


def _until(text: str, step: int) -> str:
    """The lines of metrics.jsonl up to a step; a half-written or damaged line is dropped."""
    kept = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            value = json.loads(line) if line.endswith("\n") else {}
            if "kind" in value and value["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, LookupError):
            _log.warning("metrics.jsonl: line %d is damaged and dropped", number)
    return "".join(kept)
