"""VQ-NeRF's parts left out one by one, each trained anew on one procedural object.

Every variant gets the same steps, seed and views. The surface is compared with the true one, which
no data set of photographs allows. Differences within a few tenths of a decibel are chance: each is
one run.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from configs import vqnerf as vqnerf_config
from launch import measuring, tasks
from nvs_common import evaluate, train, training_step
from nvs_common.data import pipeline, procedural_object, sources
from nvs_common.errors import InputError
from vqnerf_jax import chamfer, inspection, mesh
from vqnerf_jax import task as vqnerf_task

FULL = "full"
CODES = "codes_"
# No quantisation, no full-resolution branch, no decoder at all, other codebooks.
VARIANTS = (FULL, "continuous", "no_global", "neus", "codes_16", "codes_1024")
HEAD = (
    *("variant", "PSNR", "PSNR within the mask", "SSIM", "chamfer x 1000", "perplexity"),
    *("s / step",),
)
_CELLS, _POINTS, _WINDOWS = 96, 30_000, 5


class Found(NamedTuple):
    """What a variant reaches; chamfer is None where it has no surface."""

    quality: dict[str, float]
    chamfer: float | None
    perplexity: float | None
    step: float


def study(config: Any, steps: int, variants: Sequence[str] = ()) -> list[str]:
    """Trains the variants; the table's lines. Rows go to stderr as they are measured.

    Args:
      config: the full model, on "procedural_object".
      steps: of training, for each.
      variants: of VARIANTS, or codes_K for another K; all of VARIANTS by default.

    Raises:
      InputError: an unknown variant, or other data.
    """
    if config.data.source != "procedural_object":
        raise InputError(
            f"data.source={config.data.source!r}: the ablation needs the true surface; set it to "
            "'procedural_object'."
        )
    made = [(name, _variant(config, name, steps)) for name in variants or VARIANTS]
    rows = []
    for name, one in made:
        rows.append(_row(name, measure(one)))
        print(measuring.row(rows[-1]), file=sys.stderr, flush=True)
        # Nothing of a variant's programs is of use to the next.
        jax.clear_caches()
    data = config.data
    title = (
        f"`{config.system}`, object {data.object}, {steps} steps each, seed {config.seed}, "
        f"{data.height}x{data.width}, auto-encoder "
        f"{config.model.vqgan_weights or 'not pre-trained'}, decoder {config.model.decoder!r}"
    )
    return [title, "", *measuring.table(HEAD, rows)]


def measure(config: Any) -> Found:
    """Trains a config in a temporary folder; its views and its surface."""
    task = tasks.TASKS[config.system](config)
    with tempfile.TemporaryDirectory() as folder:
        state = train.fit(task, pipeline.training_batches(config), config, folder)
        lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, lines) if line["kind"] == "train"]
    variables = jax.tree.map(np.asarray, jax.device_get(training_step.variables(state)))
    quality = evaluate.quick(task, variables, sources.held_out(config), config).metrics
    rates = [line["steps_per_second"] for line in logged if "steps_per_second" in line]
    step = 1 / float(np.median(rates)) if rates else float("nan")
    surface = _chamfer(config, variables["params"])
    return Found(dict(quality), surface, logged[-1].get("perplexity"), step)


def _chamfer(config: Any, params: Any) -> float | None:
    """Chamfer distance to the true surface; None where the field has no surface."""
    ours, _ = vqnerf_task.make_model(config.model)
    rng = np.random.default_rng(0)
    try:
        found = mesh.extract(jax.jit(inspection.distances(ours, params)), _CELLS)
    except mesh.NoSurface:
        return None
    found = mesh.in_world(found, ours.center, ours.radius)
    truth = procedural_object.orbit(config.data.object, 8, 8, 1).surface(_POINTS, rng)
    return chamfer.chamfer(chamfer.sample_area(found, _POINTS, rng), truth).mean


def _variant(config: Any, name: str, steps: int) -> Any:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        number = name.removeprefix(CODES)
        if name.startswith(CODES) and number.isdecimal():
            config.model.vqgan.num_codes = int(number)
        elif name in vqnerf_config.VARIANTS:
            vqnerf_config.VARIANTS[name](config)
        elif name != FULL:
            raise InputError(f"--variants={name}: choose of {VARIANTS}, or codes_K.")
        # No evaluation and no checkpoint on the way; several windows of the clock.
        config.update(num_steps=steps, eval_every=0, checkpoint_every=0, keep_checkpoints=1)
        config.update(log_every=max(1, steps // _WINDOWS), stop_after_minutes=0.0)
        config.optim.warmup_steps = min(config.optim.warmup_steps, steps // 2)
    return config


def _row(name: str, found: Found) -> tuple[str, ...]:
    quality = found.quality
    surface = "no surface" if found.chamfer is None else f"{1e3 * found.chamfer:.1f}"
    codes = "" if found.perplexity is None else f"{found.perplexity:.0f}"
    shown = (f"{quality['psnr']:.2f}", f"{quality['psnr_masked']:.2f}", f"{quality['ssim']:.3f}")
    return (name, *shown, surface, codes, f"{found.step:.2f}")
