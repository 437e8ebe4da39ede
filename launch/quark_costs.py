"""What Quark costs: stages of a forward pass, the machine's ceilings, the rate of training."""

from __future__ import annotations

import functools
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from launch import arithmetic, measuring, tasks
from nvs_common import train
from nvs_common.data import pipeline
from quark_jax import task as quark_task


class Stage(NamedTuple):
    """One stage: its time and its multiply-adds in products and convolutions."""

    name: str
    seconds: float
    products: float

    def row(self, ceiling: float) -> tuple[str, ...]:
        """A row of a table; `ceiling` is in GMAC/s."""
        time_, count = f"{1e3 * self.seconds:.1f}", f"{1e-9 * self.products:.2f}"
        # A difference of two programs may be less than their times vary by.
        if self.seconds <= 0:
            return self.name, time_, count, "within noise", ""
        rate = 1e-9 * self.products / self.seconds
        return self.name, time_, count, f"{rate:.1f}", f"{100 * rate / ceiling:.0f} %"


class Forward(NamedTuple):
    """A measured forward pass."""

    title: str
    stages: list[Stage]
    seconds: float


def forward(
    config: Any, views: int, size: tuple[int, int], repeats: int, name: str = ""
) -> Forward:
    """Measures the stages of a forward pass of one scene and one target.

    Args:
      config: of `configs/quark.py`.
      views: number of inputs.
      size: height and width of inputs and target in pixels.
      repeats: timed repetitions of each stage, of which the median counts.
      name: of the configuration, for the title; the system by default.
    """
    height, width = size
    module = quark_task.make_module(config.model)
    batch = measuring.random_batch(1, views, 1, height, width)
    targets = batch.target.cameras
    variables = jax.jit(module.init)(jax.random.key(0), batch.context, targets)

    def until(stage: int) -> Callable:
        """The forward pass up to a stage: what later stages would add is never computed."""

        def run(variables, context):
            if stage < 0:
                return module.apply(variables, context, method="encode")
            output: Any = module.apply(variables, context, targets, method="render_stages")
            rendered, stages = output
            # A stage is judged by its density; the last by all logits, then by the picture.
            return stages[stage] if stage < len(stages) else rendered

        return run

    names = ["encode inputs", "initialise"]
    names += [f"update & fuse {i}" for i in range(len(module.stages) - 1)]
    names += ["upsample, activate, render"]
    programs = [until(index) for index in range(-1, len(names) - 1)]
    args = variables, batch.context
    compiled = [jax.jit(program).lower(*args).compile() for program in programs]
    # A stage is the difference of two programs: they take turns, or the machine's load at one of
    # them would count as the other's.
    calls = [functools.partial(program, *args) for program in compiled]
    totals = measuring.alternating_medians(*calls, repeats=repeats)
    stages, seconds, products = [], 0.0, 0.0
    for name, program, total in zip(names, programs, totals, strict=True):
        count = arithmetic.multiply_adds(program, *args)
        stages.append(Stage(name, total - seconds, count - products))
        seconds, products = total, count
    title = f"`{name or config.system}`, {views} inputs, {height}x{width}, {config.model.dtype}"
    title += f": peak {measuring.peak(compiled[-1]):.0f} MiB"
    return Forward(title, stages, seconds)


def ceilings(dtype: Any, repeats: int) -> tuple[float, float]:
    """Multiply-adds a second of a large matrix product and of the network's convolution."""
    square = jnp.ones((2048, 2048), dtype)
    image, kernel = jnp.ones((6, 288, 512, 32), dtype), jnp.ones((3, 3, 32, 32), dtype)
    product = jax.jit(jnp.matmul).lower(square, square).compile()
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    convolution = jax.jit(convolve).lower(image, kernel).compile()
    return (
        2048**3 / measuring.median_seconds(product, square, square, repeats=repeats),
        image.size * 9 * 32 / measuring.median_seconds(convolution, image, kernel, repeats=repeats),
    )


def training(config: Any, steps: int) -> list[str]:
    """Rate of the real training loop, with the real data pipeline, over `steps` steps."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        half = max(1, steps // 2)
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
    return measuring.table((f"training, batch {config.batch_size}", ""), rows)
