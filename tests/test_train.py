"""One step on any mesh, the loop, and what a run leaves behind."""

import dataclasses
import itertools
import json
import os
import signal
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from nvs_common import (
    checkpoint,
    errors,
    evaluate,
    feed,
    optim,
    sharding,
    starting,
    train,
    training_step,
    weights,
)
from tests import toy

ONE = jax.devices()[:1]
CUBE = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}


def run(config, batches, devices=None, task=None):
    """States and metrics of the steps on these batches, without the loop."""
    task = task or toy.task()
    tx = optim.make(config)
    mesh = sharding.make_mesh(config.mesh, devices)
    states, metrics = [], []
    with jax.set_mesh(mesh), sharding.axis_rules():
        spec = feed.abstract(batches[0], mesh)
        abstract = training_step.abstract_state(task, tx, config, spec, mesh)
        init = jax.jit(
            lambda b: training_step.init_state(task, tx, config, b),
            out_shardings=training_step.layout(abstract),
        )
        step = training_step.compile_step(task, tx, config, abstract, mesh)
        state = init(feed.to_global(batches[0], mesh))
        states.append(jax.device_get(state))
        for batch in batches:
            state, values = step(state, feed.to_global(batch, mesh))
            states.append(jax.device_get(state))
            metrics.append(jax.device_get(values))
        assert jax.tree.map(lambda x: x.sharding, state) == training_step.layout(abstract)
    return states, metrics


def some(count, **changes):
    return list(itertools.islice(toy.batches(**changes), count))


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_trees_close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance), a, b)


@pytest.fixture(scope="module")
def one_device():
    """States and metrics of four steps on one device, with EMA."""
    return run(toy.config(ema=0.9), some(4), ONE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The last state of six steps without a break, and its workdir."""
    workdir = tmp_path_factory.mktemp("whole")
    state = train.fit(toy.task(), toy.batches(), toy.config(ema=0.9), workdir, devices=ONE)
    return jax.device_get(state), workdir


@pytest.mark.parametrize("mesh", [{"mesh.data": 8}, CUBE], ids=["data8", "data2fsdp2tensor2"])
def test_eight_devices_make_the_same_steps_as_one(mesh, one_device):
    many, _ = run(toy.config(ema=0.9, **mesh), some(4))
    assert_trees_close(one_device[0][0].params, many[0].params, 1e-7)
    assert_trees_close(one_device[0][-1], many[-1])


def test_parameters_and_moments_lie_where_their_axes_say():
    config, task = toy.config(**CUBE, ema=0.9), toy.task()
    mesh, tx = sharding.make_mesh(config.mesh), optim.make(config)
    spec = feed.abstract(some(1)[0], mesh)
    state = training_step.abstract_state(task, tx, config, spec, mesh)
    kernel = state.params["hidden"]["kernel"].sharding
    assert kernel.spec == jax.P("fsdp", "tensor")
    moment = [
        leaf.sharding
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "mu" in str(path) and "hidden" in str(path) and "kernel" in str(path)
    ]
    assert moment == [kernel]
    assert state.ema_params["hidden"]["kernel"].sharding == kernel


def test_accumulation_makes_the_steps_of_the_whole_batch(one_device):
    parts, metrics = run(toy.config(**CUBE, ema=0.9, accumulate=2), some(4))
    assert_trees_close(one_device[0][-1], parts[-1])
    # Both microbatches were counted by the collection.
    assert parts[-1].collections["counts"]["scenes"] == 4 * 8
    for name in ("loss", "grad_norm"):
        assert_trees_close(one_device[1][-1][name], metrics[-1][name])


def test_a_step_with_nan_changes_nothing_but_counters(one_device):
    good = some(2)
    bad = dataclasses.replace(good[0], target=toy.views(np.full((8, 1, 4, 4, 3), np.nan, "f4")))
    states, metrics = run(toy.config(ema=0.9), [good[0], bad, bad, good[1]], ONE)
    fields = ("params", "opt_state", "ema_params", "collections")
    for skipped in states[2:4]:
        for name in fields:
            assert_trees_equal(getattr(states[1], name), getattr(skipped, name))
    assert [int(s.skipped) for s in states] == [0, 0, 1, 2, 2]
    assert [int(s.skipped_in_row) for s in states] == [0, 0, 1, 2, 0]
    assert [int(m["skipped"]) for m in metrics] == [0, 1, 1, 0]
    assert [int(m["bad_data"]) for m in metrics] == [0, 1, 1, 0]
    # The step after it is applied, and is the one that would have been made without them.
    assert_trees_equal(one_device[0][2].params, states[-1].params)


def test_an_infinite_gradient_of_a_finite_loss_is_skipped():
    base = toy.task()

    def loss(variables, batch, key):
        value, aux = base.loss(variables, batch, key)
        bias = variables["params"]["image"]["bias"]
        return value + jnp.sum(jnp.sqrt(jnp.abs(bias * 0))), aux  # gradient 0 * inf

    states, metrics = run(toy.config(), some(1), ONE, base._replace(loss=loss))
    assert int(states[-1].skipped) == 1
    assert int(metrics[-1]["bad_data"]) == 0
    assert_trees_equal(states[0].params, states[1].params)


def test_ema_parameters_follow_the_parameters(one_device):
    states, _ = one_device
    average = states[0].params
    for n, state in enumerate(states[1:]):
        keep = min(0.9, (1 + n) / (10 + n))
        average = jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, average, state.params)  # noqa: B023
    assert_trees_close(average, states[-1].ema_params, 1e-6)
    assert training_step.variables(states[-1])["params"] is states[-1].ema_params


def test_the_key_of_a_step_depends_on_the_step_and_not_on_the_mesh():
    base = toy.task()

    def loss(variables, batch, key):
        value, aux = base.loss(variables, batch, key)
        return value, aux.replace(metrics={"draw": jax.random.uniform(key)})

    task = base._replace(loss=loss)
    _, first = run(toy.config(), some(3), ONE, task)
    _, again = run(toy.config(**CUBE), some(3), None, task)
    draws = [[float(m["draw"]) for m in ms] for ms in (first, again)]
    assert draws[0] == draws[1] and len(set(draws[0])) == 3


def test_a_batch_that_does_not_divide_is_explained():
    with pytest.raises(errors.InputError, match="batch_size=8 .* = 4 times accumulate=3"):
        mesh = sharding.make_mesh({"data": 4}, jax.devices()[:4])
        training_step.check_batch(toy.config(accumulate=3), mesh)


@pytest.mark.thorough
def test_resume_is_bit_equal(tmp_path, whole):
    config = {"ema": 0.9, "checkpoint_every": 3}
    train.fit(toy.task(), toy.batches(), toy.config(num_steps=3, **config), tmp_path, devices=ONE)
    # A new iterator, as in a new process; the feed had run ahead of step 3 in the first session.
    resumed = train.fit(toy.task(), toy.batches(), toy.config(**config), tmp_path, devices=ONE)
    assert_trees_equal(whole[0], jax.device_get(resumed))
    # The last window is steps 5 and 6 in both.
    assert lines(whole[1], "train")[-1]["loss"] == lines(tmp_path, "train")[-1]["loss"]


@pytest.mark.thorough
def test_a_checkpoint_of_one_device_goes_on_on_eight(tmp_path, whole):
    short = toy.config(num_steps=3, ema=0.9)
    train.fit(toy.task(), toy.batches(), short, tmp_path, devices=ONE)
    state = train.fit(toy.task(), toy.batches(), toy.config(ema=0.9, **CUBE), tmp_path)
    assert_trees_close(whole[0], jax.device_get(state))
    assert state.params["hidden"]["kernel"].sharding.spec == jax.P("fsdp", "tensor")


def lines(workdir, kind):
    """The lines of metrics.jsonl of one kind."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def events(workdir):
    """(step, tag) of every TensorBoard value: records are length, crc, payload, crc."""
    found = set()
    for path in workdir.glob("events.out.tfevents.*"):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            found |= {(event.step, value.tag) for value in event.summary.value}
            data = data[16 + size :]
    return found


def test_a_run_leaves_metrics_images_config_and_manifest(tmp_path):
    def rate(variables, step):
        assert set(variables) == {"params", "counts"}
        image = np.full((4, 4, 3), 200, np.uint8)
        return evaluate.Evaluation({"psnr": 20.0 + step}, {"first": image})

    config = toy.config(num_steps=5, eval_every=2, profile=(3, 4))
    train.fit(toy.task(), toy.batches(), config, tmp_path, evaluate=rate, devices=ONE)
    training = lines(tmp_path, "train")
    assert [line["step"] for line in training] == [2, 4, 5]
    for name in ("loss", "psnr", "grad_norm", "learning_rate", "steps_per_second"):
        assert training[1][name] > 0
    assert 0 <= training[1]["data_wait_fraction"] <= 1
    assert training[1]["examples_per_second"] == pytest.approx(8 * training[1]["steps_per_second"])
    assert [(e["step"], e["psnr"]) for e in lines(tmp_path, "eval")] == [(2, 22), (4, 24), (5, 25)]
    written = events(tmp_path)
    assert {(4, "train/loss"), (5, "eval/psnr"), (2, "eval/first")} <= written
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["learning_rate"] == 0.01
    session = json.loads((tmp_path / "run.json").read_text())["sessions"][0]
    assert session["versions"]["jax"] == jax.__version__ and session["mesh"]["data"] == 1
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_metrics_after_the_restored_step_are_written_once(tmp_path):
    train.fit(toy.task(), toy.batches(), toy.config(num_steps=4), tmp_path, devices=ONE)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "kind": "train", "loss": 1.0}\n{"step": 8, "ki')
    train.fit(toy.task(), toy.batches(), toy.config(), tmp_path, devices=ONE)
    assert [line["step"] for line in lines(tmp_path, "train")] == [2, 4, 6]


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
    config = toy.config(num_steps=20, max_skipped=3, **{"optim.learning_rate": 1e38})
    # The first update makes all parameters huge; every later loss is infinite.
    with pytest.raises(errors.InputError, match="last 5 steps up to 6 .*max_skipped=3"):
        train.fit(toy.task(), toy.batches(), config, tmp_path, devices=ONE)
    assert lines(tmp_path, "train")[-1]["loss"] is None


def test_a_bad_scene_is_skipped_and_counted_by_the_loop(tmp_path):
    batches = toy.batches(bad=5)  # in one of the eight batches of an epoch
    state = train.fit(toy.task(), batches, toy.config(num_steps=8), tmp_path, devices=ONE)
    assert int(state.skipped) == 1
    assert np.all(np.isfinite(state.params["hidden"]["kernel"]))
    assert sum(line["skipped"] for line in lines(tmp_path, "train")) == 1


class Slow:
    """Batches that take a while to make."""

    def __init__(self, seconds):
        self.inner, self.seconds = toy.batches(), seconds

    def __next__(self):
        time.sleep(self.seconds)
        return next(self.inner)

    def get_state(self):
        return self.inner.get_state()

    def set_state(self, state):
        self.inner.set_state(state)


def test_waiting_for_slow_data_is_measured(tmp_path):
    config = toy.config(num_steps=10, log_every=5, checkpoint_every=0)
    train.fit(toy.task(), Slow(0.2), config, tmp_path, devices=ONE)
    line = lines(tmp_path, "train")[-1]
    # Nearly 1 on an idle machine; no faster than the data in any case.
    assert line["data_wait_fraction"] > 0.4
    assert line["steps_per_second"] < 1.5 / 0.2


def test_data_that_is_made_while_the_step_runs_is_not_waited_for(tmp_path):
    base = toy.task()

    def slowly(images):
        time.sleep(0.3)
        return np.float32(0)

    def loss(variables, batch, key):
        value, aux = base.loss(variables, batch, key)
        zero = jax.pure_callback(slowly, jax.ShapeDtypeStruct((), jnp.float32), batch.target.images)
        return value + zero, aux

    config = toy.config(num_steps=7, log_every=7, checkpoint_every=0)
    train.fit(base._replace(loss=loss), Slow(0.15), config, tmp_path, devices=ONE)
    # One after the other it would be a third.
    assert lines(tmp_path, "train")[-1]["data_wait_fraction"] < 0.2


def test_the_time_limit_saves_and_ends(tmp_path):
    config = toy.config(num_steps=10_000, checkpoint_every=0, stop_after_minutes=0.5 / 60)
    state = train.fit(toy.task(), Slow(0.05), config, tmp_path, devices=ONE)
    assert 0 < int(state.step) < 1000
    assert (tmp_path / "checkpoints" / str(int(state.step))).is_dir()


def test_sigterm_saves_and_the_next_session_goes_on(tmp_path, whole):
    def ask(variables, step):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate.Evaluation({}, {})

    before = signal.getsignal(signal.SIGTERM)
    config = toy.config(ema=0.9, eval_every=3, checkpoint_every=0)
    with pytest.raises(train.Preempted, match="saved step 4"):
        train.fit(toy.task(), toy.batches(), config, tmp_path, evaluate=ask, devices=ONE)
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = train.fit(toy.task(), toy.batches(), config, tmp_path, devices=ONE)
    assert_trees_equal(whole[0], jax.device_get(resumed))


def test_an_error_of_the_data_reaches_the_caller(tmp_path):
    class Broken(Slow):
        def __next__(self):
            if self.get_state()["next_index"] == 3:
                raise errors.InputError("scene 7: no images")
            return super().__next__()

    with pytest.raises(errors.InputError, match="scene 7"):
        train.fit(toy.task(), Broken(0), toy.config(), tmp_path, devices=ONE)


def test_the_end_of_the_data_is_explained(tmp_path):
    data = grain.MapDataset.source([some(1)[0]] * 3).to_iter_dataset()
    with pytest.raises(errors.InputError, match="data ended"):
        train.fit(toy.task(), iter(data), toy.config(), tmp_path, devices=ONE)


def test_a_batch_of_another_size_is_explained(tmp_path):
    with pytest.raises(errors.InputError, match=r"batches of \[4\] scenes"):
        train.fit(toy.task(), toy.batches(4), toy.config(), tmp_path, devices=ONE)


def _fit(config, workdir):
    return train.fit(toy.task(), toy.batches(), config, workdir, devices=ONE)


@pytest.mark.thorough
def test_a_run_starts_from_the_parameters_of_another(tmp_path):
    first = _fit(toy.config(num_steps=2, ema=0.9), tmp_path / "first")
    # Without a learning rate the parameters stay what they were at the start.
    config = toy.config(num_steps=1, ema=0.9, init_from=str(tmp_path / "first"))
    config.optim.learning_rate = 0.0
    second = _fit(config, tmp_path / "second")
    assert int(second.step) == 1
    for ours in (second.params, second.ema_params):
        assert_trees_close(ours, first.ema_params, 1e-6)


def test_a_run_starts_from_released_weights(tmp_path):
    _fit(toy.config(num_steps=2), tmp_path / "first")
    config, variables = checkpoint.load_variables(tmp_path / "first")
    file = tmp_path / "first.npz"
    config.system = "toy"
    weights.write(file, weights.Weights(config, variables, 2, {}))
    found = starting.initial_params(file, variables["params"])
    assert_trees_close(found, variables["params"], 0)
    with pytest.raises(errors.InputError, match=r"first.npz holds another model"):
        starting.initial_params(file, {"kernel": np.zeros((2, 2))})


def test_parts_that_the_other_run_lacks_may_start_anew(tmp_path):
    _fit(toy.config(num_steps=1), tmp_path / "first")
    params = checkpoint.load_variables(tmp_path / "first")[1]["params"]
    more = {**params, "extra_1": {"kernel": np.ones((2, 2))}}
    found = starting.initial_params(tmp_path / "first", more, ("extra",))
    assert_trees_close(found, params, 0)
    # What both have is taken, whatever it is called; what only the source has is left.
    found = starting.initial_params(tmp_path / "first", params, ("hidden",))
    assert_trees_close(found, params, 0)
    less = {"hidden": params["hidden"]}
    assert set(starting.initial_params(tmp_path / "first", less, ("image",))) == {"hidden"}
    with pytest.raises(errors.InputError, match="extra_1/kernel is absent there.*init_new"):
        starting.initial_params(tmp_path / "first", more, ("other",))


def test_starting_from_nothing_or_from_another_model_is_refused(tmp_path):
    with pytest.raises(errors.InputError, match="holds no training run"):
        _fit(toy.config(init_from=str(tmp_path / "absent")), tmp_path / "a")
    _fit(toy.config(num_steps=1), tmp_path / "first")
    other = {"kernel": np.zeros((2, 2))}
    with pytest.raises(errors.InputError, match="holds another model: .* there and .* here"):
        starting.initial_params(tmp_path / "first", other)
