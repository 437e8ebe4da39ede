"""Sessions of a run: what a later one finds, mends or refuses, and what a run starts from."""

import contextlib
import dataclasses
import json

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from nvs_common import errors, evaluate, runs, starting, train
from tests import toy
from tests.test_train import ONE, lines, run, some


def fit(config, workdir, **options):
    return train.fit(toy.task(), toy.batches(), config, workdir, devices=ONE, **options)


def test_collections_come_along_and_the_schedule_does_not(tmp_path, caplog):
    first = fit(toy.config(num_steps=2), tmp_path / "first")
    like = {"params": first.params, "counts": {"scenes": np.zeros((), np.int32)}}
    found = starting.initial_variables(tmp_path / "first", like)
    assert int(found["counts"]["scenes"]) == 16
    like = {"params": first.params, "counts": {"scenes": np.zeros(3)}, "schedule": {"step": 0}}
    assert set(starting.initial_variables(tmp_path / "first", like)) == {"params"}
    assert "'counts' starts anew: scenes is () there and (3,) here" in caplog.text


def test_microbatches_are_of_one_step():
    """A task that counts steps in "schedule" sees the same number in all of them."""
    plain = toy.task()

    def init(key, batch):
        return {**plain.init(key, batch), "schedule": {"step": jnp.zeros((), jnp.int32)}}

    def loss(variables, batch, key):
        step = variables["schedule"]["step"]
        value, aux = plain.loss({k: variables[k] for k in ("params", "counts")}, batch, key)
        metrics = {**aux.metrics, "seen": step.astype(jnp.float32)}
        collections = {**aux.collections, "schedule": {"step": step + 1}}
        return value, dataclasses.replace(aux, metrics=metrics, collections=collections)

    task = plain._replace(init=init, loss=loss)
    states, metrics = run(toy.config(accumulate=4), some(3), ONE, task)
    state = states[-1]
    assert [float(m["seen"]) for m in metrics] == [0, 1, 2]
    assert int(state.collections["schedule"]["step"]) == 3
    assert int(state.collections["counts"]["scenes"]) == 24


def test_an_evaluation_that_the_last_session_left_out_is_made(tmp_path):
    made = []

    def rate(variables, step):
        made.append(step)
        if len(made) == 1:
            raise KeyboardInterrupt
        return evaluate.Evaluation({"psnr": 1.0}, {})

    config = toy.config(num_steps=2, eval_every=5)
    for expected in ([2], [2, 2], [2, 2]):
        with contextlib.suppress(KeyboardInterrupt):
            fit(config, tmp_path, evaluate=rate)
        assert made == expected


def test_a_folder_of_a_run_belongs_to_one_process(tmp_path):
    with runs.locked(tmp_path), pytest.raises(errors.InputError, match="another process trains"):
        fit(toy.config(num_steps=1), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.InputError, match="cannot be written to"):
        fit(toy.config(num_steps=1), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_every": 0}, "log_every=0: expected 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0"),
        ({"batch_size": -2}, "batch_size=-2"),
        ({"ema": 1.5}, "ema=1.5"),
        ({"stop_after_minutes": -1.0}, "stop_after_minutes=-1"),
        ({"profile": (3,)}, "profile="),
        ({"profile": (3, 1)}, "profile="),
        ({"optim.learning_rate": float("nan")}, "learning_rate=nan"),
    ],
)
def test_fields_that_cannot_be_meant_are_named(tmp_path, changes, message):
    with pytest.raises(errors.InputError, match=message):
        fit(toy.config(**changes), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["height", "num_context"])
def test_sizes_below_one_are_named(name):
    config = ml_collections.ConfigDict(
        {"data": dict(height=8, width=8, num_context=1, num_target=1) | {name: -3}}
    )
    with pytest.raises(errors.InputError, match=f"data.{name}=-3: expected 1 or more"):
        runs.check_sizes(config)


def test_damaged_records_do_not_stop_a_run(tmp_path, caplog):
    fit(toy.config(num_steps=2), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "ki\n')
    (tmp_path / "run.json").write_text('{"sess')
    assert int(fit(toy.config(num_steps=4), tmp_path).step) == 4
    assert [line["step"] for line in lines(tmp_path, "train")] == [2, 4]
    assert len(json.loads((tmp_path / "run.json").read_text())["sessions"]) == 1
    assert "renamed to run.json.bad" in caplog.text and "is damaged and dropped" in caplog.text


def test_an_infinite_field_is_the_same_when_the_run_goes_on(tmp_path):
    config = toy.config(num_steps=1)
    with config.unlocked():
        config.most = float("inf")
    fit(config, tmp_path)
    runs.check_workdir(tmp_path, config)


def test_a_config_that_is_missing_or_none_is_named(tmp_path):
    config = toy.config(num_steps=1)
    fit(config, tmp_path)
    file = tmp_path / "config.json"
    file.write_text("[1, 2]")
    with pytest.raises(errors.InputError, match="not a config"):
        runs.check_workdir(tmp_path, config)
    file.unlink()
    with pytest.raises(errors.InputError, match="missing beside checkpoints"):
        runs.check_workdir(tmp_path, config)
