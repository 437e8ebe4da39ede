"""The smallest Quark that has every part, as a run on disk, without training."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import numpy as np

from launch import cli, tasks, trained
from nvs_common import checkpoint, runs
from tests import conftest


def config() -> Any:
    """configs/quark.py:tiny at 16 x 24 pixels."""
    c = cli.load_config(f"{conftest.ROOT / 'configs' / 'quark.py'}:tiny")
    c.data.update(height=16, width=24, num_context=3, views_per_scene=6)
    c.eval.update(num_scenes=1, photo_size=(c.data.height, c.data.width))
    c.model.update(grid_area=96, layers=2, channels=8, appearance_channels=4)
    c.model.update(encoder_blocks=(1, 1), stages=((1, 1, 1, 1, False), (0, 1, 1, 1, True)))
    return c


def variables(c: Any, seed: int = 0) -> dict[str, Any]:
    """Random parameters of a config's shapes; nothing is compiled for them."""
    c = c.copy_and_resolve_references()
    if "lpips_weights" in c.loss:
        c.loss.lpips_weights = ""  # the task would look for the file
    size = (c.data.height, c.data.width)
    made = trained.abstract_variables(tasks.TASKS[c.system](c), c.data.num_context, *size)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), dict(made))


def save_run(workdir: pathlib.Path, c: Any, **record: Any) -> dict[str, Any]:
    """Writes a run of one step, 5; returns the variables that evaluation uses."""
    averaged = variables(c)
    trees = {"params": variables(c, seed=1)["params"], "ema_params": averaged["params"]}
    store = checkpoint.Store(workdir, keep=1)
    store.save(5, jax.tree.map(jax.numpy.asarray, trees), {"position": 0}, runs.to_json(c))
    store.close()
    session = {"start_step": 0, "command": ["/home/me/launch/train.py", "--config=c.py:tiny"]}
    session |= {"devices": 1, "device_kind": "cpu", "environment": {"SECRET": "x"}, **record}
    (workdir / "run.json").write_text(json.dumps({"sessions": [session]}))
    return averaged
