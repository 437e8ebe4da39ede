"""Measures the library, side by side in one run: python launch/benchmark.py NAME

  quark   time of each stage of a forward pass, peak memory, training rate and data wait

Prints a Markdown table; with --out it is also written to a file. Times are medians on the
devices JAX finds; memory is what XLA planned for the compiled program (arguments, results and
temporaries), which on a CPU or GPU is its peak.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

# launch/ and configs/ belong to the checkout and are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from launch import cli, tasks
from nvs_common import errors, runs, train
from nvs_common.data import pipeline
from nvs_common.types import Batch, Cameras, Views
from quark_jax import task as quark_task

_CONFIG = cli.define_config(required=False)
_OUT = flags.DEFINE_string("out", None, "File for the table (Markdown).")
_VIEWS = flags.DEFINE_integer("views", None, "Input views; the config's by default.")
_SIZE = flags.DEFINE_string("size", None, "Image size as HxW; the config's by default.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed repetitions; the median is shown.")
_STEPS = flags.DEFINE_integer("steps", 60, "Training steps to measure; 0 leaves training out.")


def main(argv) -> None:
    """Runs the named benchmark and prints its table."""
    if len(argv) != 2 or argv[1] not in BENCHMARKS:
        raise errors.InputError(f"name one benchmark of {sorted(BENCHMARKS)}, found {argv[1:]}")
    lines = BENCHMARKS[argv[1]]()
    text = "\n".join([_machine(), "", *lines])
    print(text)
    if _OUT.value:
        runs.write_text(pathlib.Path(_OUT.value), text + "\n")


def quark() -> list[str]:
    """Stages of a forward pass of one scene and one target, and the training loop."""
    config: Any = _CONFIG.value or cli.load_config("configs/quark.py:tiny")
    height, width = _size(config)
    views = _VIEWS.value or config.data.num_context
    module = quark_task.make_module(config.model)
    batch = random_batch(1, views, 1, height, width)
    targets = batch.target.cameras
    variables = jax.jit(module.init)(jax.random.key(0), batch.context, targets)

    def until(stage: int) -> Callable:
        """The forward pass up to a stage: what later stages would add is never computed."""

        def run(variables, context):
            features = module.apply(variables, context, method="encode")
            if stage < 0:
                return features
            output: Any = module.apply(variables, context, targets, method="render_stages")
            rendered, stages = output
            # A stage is judged by its density; the last by all logits, then by the picture.
            return stages[stage] if stage < len(stages) else rendered

        return jax.jit(run)

    names = ["encode inputs", "initialise"]
    names += [f"update & fuse {i}" for i in range(len(module.stages) - 1)]
    names += ["upsample, activate, render"]
    rows, before = [], 0.0
    compiled = None
    for stage, stage_name in enumerate(names, start=-1):
        compiled = until(stage).lower(variables, batch.context).compile()
        seconds = median_seconds(compiled, variables, batch.context)
        rows.append((stage_name, f"{1e3 * (seconds - before):.1f}"))
        before = seconds
    rows.append(("whole forward pass", f"{1e3 * before:.1f}"))
    lines = [f"`{config.system}`, {views} inputs, {height}x{width}, grid_area"]
    lines[0] += f" {config.model.grid_area}, {config.model.dtype}: peak {peak(compiled):.0f} MiB"
    lines += ["", *table(("stage", "ms"), rows)]
    return lines + (["", *training(config)] if _STEPS.value else [])


def training(config) -> list[str]:
    """Rate of the real training loop, with the real data pipeline."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        half = max(1, _STEPS.value // 2)
        # The first half fills buffers and caches; only the second is reported.
        config.update(num_steps=2 * half, log_every=half, eval_every=0)
        config.optim.update(schedule="constant", warmup_steps=0)
    task = tasks.TASKS[config.system](config)
    with tempfile.TemporaryDirectory() as folder:
        train.fit(task, pipeline.training_batches(config), config, folder)
        lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, lines) if line["kind"] == "train"][-1]
    images = config.data.num_context + config.data.num_target
    examples = last["examples_per_second"]
    rows = [
        ("steps / s", f"{last['steps_per_second']:.2f}"),
        ("scenes / s", f"{examples:.2f}"),
        ("images / s (inputs and targets)", f"{examples * images:.1f}"),
        ("share of time waiting for data", f"{100 * last['data_wait_fraction']:.1f} %"),
    ]
    return table((f"training, batch {config.batch_size}", ""), rows)


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


def median_seconds(compiled: Callable, *args: Any) -> float:
    """Median time of a compiled function, results ready."""
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(_REPEATS.value):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def peak(compiled: Any) -> float:
    """Planned memory of a compiled program in MiB: arguments, results and temporaries."""
    plan = compiled.memory_analysis()
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return total / 2**20


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


BENCHMARKS = {"quark": quark}


def _size(config) -> tuple[int, int]:
    if _SIZE.value is None:
        return config.data.height, config.data.width
    try:
        height, width = (int(side) for side in _SIZE.value.split("x"))
    except ValueError:
        raise errors.InputError(f"--size={_SIZE.value}: expected HxW, e.g. 1080x1920") from None
    return height, width


def _machine() -> str:
    device = jax.devices()[0]
    when = time.strftime("%Y-%m-%d")
    return f"JAX {jax.__version__}, {len(jax.devices())} x {device.device_kind}, {when}"


if __name__ == "__main__":
    cli.run(main, arguments=1)
