"""Quark in the real loop on the procedural world: it learns, and resumes bit for bit."""

import json
import pathlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import quark as quark_config
from nvs_common import evaluate, train, training_step
from nvs_common.data import pipeline, sources
from quark_jax import task


def tiny_config(**changes) -> ConfigDict:
    """Small enough for a test: 32 x 56 pixels, two levels, sixteen scenes."""
    config = quark_config.get_config("tiny")
    config.update(batch_size=2, log_every=20, eval_every=0, ema=0.0, checkpoint_every=1000)
    config.data.update(height=32, width=56, num_context=3, num_target=1, nearest=3)
    config.data.update(num_scenes=16, views_per_scene=4, workers=0)
    config.optim.update(learning_rate=3e-3, warmup_steps=10)
    config.model.update(grid_area=16 * 28, layers=2, channels=8, encoder_blocks=(1, 1))
    # As published, from nothing: what a sweep starts with leaves little to learn in 200 steps.
    config.model.update(sweep_planes=0, density_bias=-2.0)
    config.model.stages = ((1, 1, 2, 1, False), (1, 1, 1, 1, False), (0, 1, 1, 1, True))
    config.update(**changes)
    return config


def run(config: ConfigDict, workdir: pathlib.Path):
    batches = pipeline.training_batches(config)
    return train.fit(task.make(config), batches, config, workdir, devices=jax.devices()[:1])


def logged(workdir: pathlib.Path, name: str) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if line["kind"] == "train"]


@pytest.mark.thorough
def test_two_hundred_steps_learn(tmp_path):
    state = run(tiny_config(num_steps=200), tmp_path)
    psnr, depth = logged(tmp_path, "psnr"), logged(tmp_path, "depth")
    assert int(state.step) == 200 and int(state.skipped) == 0
    assert psnr[-1] > psnr[0] + 2
    assert depth[-1] < 0.95 * depth[0]


@pytest.mark.thorough
def test_resumed_run_is_bit_equal(tmp_path):
    def config(num_steps: int) -> ConfigDict:
        # A constant rate does not depend on where the run was meant to end.
        config = tiny_config(num_steps=num_steps, checkpoint_every=3)
        config.optim.update(schedule="constant", warmup_steps=0)
        return config

    whole = run(config(6), tmp_path / "whole")
    assert int(run(config(3), tmp_path / "halves").step) == 3
    resumed = run(config(6), tmp_path / "halves")
    assert int(resumed.step) == 6
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.thorough
def test_structural_similarity_adds_to_the_loss():
    config = tiny_config(batch_size=1)
    batch = next(iter(pipeline.training_batches(config)))
    key = jax.random.key(0)
    plain = task.make(config)
    config.loss.ssim_weight = 2.0
    similar = task.make(config)
    variables = jax.jit(plain.init)(key, batch)
    before, after = (jax.jit(t.loss)(variables, batch, key) for t in (plain, similar))
    assert "ssim" not in before[1].metrics
    ssim = after[1].metrics["ssim"]
    assert 0 < ssim < 1
    np.testing.assert_allclose(after[0], before[0] + 2 * (1 - ssim), rtol=1e-5)


@pytest.mark.slow
def test_tiny_beats_every_baseline(tmp_path):
    """What the README shows of `configs/quark.py:tiny`; about ten minutes on two cores."""
    config = quark_config.get_config("tiny")
    made = task.make(config)
    state = run(config, tmp_path)
    held_out = sources.held_out(config)
    scenes = [(str(i), held_out[i]) for i in range(len(held_out))]
    protocol = evaluate.Protocol(num_inputs=config.data.num_context)
    result = evaluate.evaluate(made, training_step.variables(state), scenes, protocol)
    best = max(result.mean(name, "psnr") for name in evaluate.BASELINES)
    assert result.mean(evaluate.MODEL, "psnr") > best
