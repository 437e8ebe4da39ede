"""The ablations of Quark's Tab. 4 (arXiv 2411.16680), each trained anew at a size of one's own.

Every variant gets the same steps, seed, training data and held-out scenes. The published columns
are of the full-size model after 600,000 steps: what can be compared is the sign and the order.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from configs import quark as quark_config
from launch import measuring, tasks
from nvs_common import evaluate, train, training_step
from nvs_common.data import pipeline, sources
from nvs_common.errors import InputError

FULL = "full"
PUBLISHED_PSNR = 30.41


class Published(NamedTuple):
    """What Tab. 4 says of a variant: dB and percent of the runtime above the full model's."""

    psnr: float
    runtime: float


PUBLISHED = {
    "no_collapse": Published(0.16, 115.18),
    "fewer_iterations": Published(-0.08, -17.49),
    "no_ray_encoding": Published(-0.09, -1.28),
    "no_render_and_refine": Published(-0.70, -5.22),
    "no_cross_attention": Published(-0.68, -3.09),
    "rgb": Published(-1.23, -4.56),
}
# Removes what is not the paper's.
OURS = ("no_sweep",)
HEAD = (
    *("variant", "PSNR", "SSIM", "to full, dB", "s / step", "forward, ms", "to full"),
    *("paper: dB", "paper: runtime"),
)


class Measured(NamedTuple):
    """A trained variant: quality on held-out views, and times in seconds."""

    psnr: float
    ssim: float
    step: float
    forward: float


def study(
    config: Any,
    steps: int,
    *,
    variants: Sequence[str] = (),
    repeats: int = 5,
    devices: Sequence[Any] | None = None,
) -> list[str]:
    """Trains the full model and every variant; the table's lines.

    Rows go to stderr as they are measured. A variant that fails has the reason in its row, and
    the others are measured all the same.

    Args:
      config: the full model; `config.eval.num_scenes` held-out scenes are used, all their targets.
      steps: of training, for each.
      variants: names of `configs/quark.py`'s ABLATIONS; all by default.
      repeats: timed forward passes.
      devices: to train on; all by default.

    Raises:
      InputError: an unknown variant, or the full model cannot be trained.
    """
    unknown = sorted(set(variants) - set(quark_config.ABLATIONS))
    if unknown:
        raise InputError(f"--variants: {unknown} are not of {sorted(quark_config.ABLATIONS)}.")
    held_out = sources.held_out(config)
    scenes = [measuring.Kept(held_out[number]) for number in range(len(held_out))]
    full, rows = None, []
    _say(measuring.table(HEAD, []))
    for name in (FULL, *(variants or quark_config.ABLATIONS)):
        try:
            found = measure(_variant(config, name, steps), scenes, repeats, devices)
            full = found if name == FULL else full
            rows.append(_row(name, found, full))
        except train.Preempted:
            rows.append(_failed(name, "stopped before its end"))
            _say([measuring.row(rows[-1])])
            break
        except Exception as error:
            if name == FULL and isinstance(error, InputError):
                raise  # nothing is measured yet, and it would be the same for all
            # One variant must not lose the others' hours.
            traceback.print_exc()
            rows.append(_failed(name, f"{type(error).__name__}: {error}"))
        _say([measuring.row(rows[-1])])
        # Nothing of a variant's programs is of use to the next.
        jax.clear_caches()
    return [_title(config, steps, len(scenes)), "", *measuring.table(HEAD, rows), "", NOTE]


NOTE = (
    "The paper's columns are Tab. 4 of arXiv 2411.16680: the full-size model, 600,000 steps, PSNR "
    f"{PUBLISHED_PSNR} dB. `no_sweep` removes the plane sweep, an addition of this library that "
    "the paper does not have; `unfolded` is the standard form of the attention."
)


def measure(
    config: Any, scenes: Sequence[Any], repeats: int, devices: Sequence[Any] | None = None
) -> Measured:
    """Trains a config in a temporary folder, and evaluates it on every held-out view of scenes."""
    task = tasks.TASKS[config.system](config)
    with tempfile.TemporaryDirectory() as folder:
        batches = pipeline.training_batches(config)
        state = train.fit(task, batches, config, folder, devices=devices)
        lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, lines) if line["kind"] == "train"]
    rates = [line["steps_per_second"] for line in logged if "steps_per_second" in line]
    # Off the mesh of the training, which evaluation does not need.
    variables = jax.tree.map(np.asarray, jax.device_get(training_step.variables(state)))
    quality = evaluate.quick(task, variables, scenes, config).metrics
    passed = measuring.forward(task, variables, scenes[0], config.data.num_context, repeats)
    step = 1 / statistics.median(rates) if rates else float("nan")
    return Measured(quality["psnr"], quality["ssim"], step, passed.seconds)


def _variant(config: Any, name: str, steps: int) -> Any:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if name != FULL:
            quark_config.ABLATIONS[name](config)
        # No evaluation and no checkpoint on the way; several windows of the clock.
        config.update(num_steps=steps, eval_every=0, checkpoint_every=0, keep_checkpoints=1)
        config.update(log_every=max(1, steps // 10), stop_after_minutes=0.0, profile=(0, 0))
        config.optim.warmup_steps = min(config.optim.warmup_steps, steps // 2)
        # Every held-out view of a scene.
        config.eval.views = 2**30
    return config


def _title(config: Any, steps: int, scenes: int) -> str:
    data = config.data
    return (
        f"`{config.system}`, {steps} steps each, seed {config.seed}, {data.num_context} inputs, "
        f"{data.height}x{data.width}, {scenes} held-out scenes"
    )


def _row(name: str, found: Measured, full: Measured | None) -> tuple[str, ...]:
    """A row of the table; `full` is what the variant is compared with, if that was measured."""
    better = slower = ""
    if name != FULL and full is not None:
        better = f"{found.psnr - full.psnr:+.2f}"
        slower = f"{100 * (found.forward / full.forward - 1):+.1f} %"
    paper = (f"{PUBLISHED_PSNR}" if name == FULL else "not in it", "")
    if name in PUBLISHED:
        paper = (f"{PUBLISHED[name].psnr:+.2f}", f"{PUBLISHED[name].runtime:+.2f} %")
    label = f"{name} (ours)" if name in OURS else name
    quality = (f"{found.psnr:.2f}", f"{found.ssim:.3f}", better)
    return (label, *quality, f"{found.step:.3f}", f"{1e3 * found.forward:.1f}", slower, *paper)


def _failed(name: str, reason: str) -> tuple[str, ...]:
    words = " ".join(reason.split()).replace("|", "/")
    return (name, f"failed: {words[:120]}", *[""] * (len(HEAD) - 2))


def _say(lines: Sequence[str]) -> None:
    print("\n".join(lines), file=sys.stderr, flush=True)
