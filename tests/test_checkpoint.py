"""Checkpoints survive kills and notice damage; weights travel in one file."""

import gc
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nvs_common import checkpoint, digests, errors, outputs, runs, sharding, train
from tests import conftest, toy

ONE = jax.devices()[:1]


def trees(seed=0, width=64):
    """Named trees as a run saves them, without the cost of a run."""
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.normal(size=(32, width)), jnp.float32)
    params = {"dense": {"kernel": kernel, "bias": jnp.arange(width, dtype=jnp.float32)}}
    progress = {"step": jnp.int32(seed), "opt_state": ({"mu": kernel * 2}, jnp.int32(3))}
    return {"params": params, "progress": progress}


def abstract(like, mesh=None, spec=None):
    mesh = mesh or sharding.make_mesh({}, ONE)
    where = NamedSharding(mesh, spec or P())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=where if x.ndim == 2 else sharding.replicated(mesh)
        ),
        like,
    )


def save(workdir, *steps, **changes):
    """Saves and commits steps whose content is trees(step)."""
    store = checkpoint.Store(workdir, keep=3)
    config = runs.to_json(toy.config(**changes))
    for step in steps:
        store.save(step, trees(step), {"step": step}, config)
    store.wait()
    store.close()


def restore(workdir, target=None):
    store = checkpoint.Store(workdir, keep=3)
    try:
        return store.restore(target or abstract(trees()))
    finally:
        store.close()


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def payload(workdir, step, item="params"):
    """The largest file of an item: where its arrays are."""
    files = [p for p in (workdir / "checkpoints" / str(step) / item).rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def test_digest_is_the_same_on_every_mesh_and_in_every_layout():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    found = {
        digests.of_tree({"x": jax.device_put(x, NamedSharding(mesh, spec))})["x"]["digest"]
        for spec in (P(), P("data"), P(("data", "fsdp"), "tensor"), P(None, "fsdp"))
    }
    assert found == {digests.of_tree({"x": x})["x"]["digest"]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_digest_changes_with_every_single_bit(dtype):
    x = np.asarray(np.random.default_rng(0).integers(0, 2, (5, 7)), jnp.dtype(dtype))
    raw = x.view(np.uint8).reshape(-1)
    bits = range(8) if dtype != "bool" else [0]
    variants = []
    for byte in range(0, raw.size, 3):
        for bit in bits:
            changed = raw.copy()
            changed[byte] ^= 1 << bit
            variants.append(changed.view(x.dtype).reshape(x.shape))
    found = np.asarray(jax.jit(jax.vmap(digests.digest))(np.stack([x, *variants])))
    assert np.all(np.any(found[1:] != found[0], axis=1))


def test_digest_changes_when_rows_are_swapped():
    x = jnp.arange(12.0).reshape(4, 3)
    assert not np.array_equal(digests.digest(x), digests.digest(x[jnp.array([1, 0, 2, 3])]))


def test_what_is_restored_is_what_was_saved_on_another_mesh(tmp_path):
    save(tmp_path, 7)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    found = restore(tmp_path, abstract(trees(), mesh, P("fsdp", "tensor")))
    assert_trees_equal(found.trees, trees(7))
    assert (found.step, found.position) == (7, {"step": 7})
    assert found.trees["params"]["dense"]["kernel"].sharding.spec == P("fsdp", "tensor")


def test_only_the_newest_steps_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5)
    store = checkpoint.Store(tmp_path, keep=3)
    assert store.steps() == [3, 4, 5]
    store.close()


def test_without_a_checkpoint_nothing_is_restored(tmp_path):
    assert restore(tmp_path) is None


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "bit_flip": lambda w: flip(payload(w, 2)),
    "bit_flip_in_optimiser": lambda w: flip(payload(w, 2, "progress")),
    "truncated": lambda w: os.truncate(payload(w, 2), 100),
    "deleted": lambda w: payload(w, 2).unlink(),
    "digests_gone": lambda w: payload(w, 2, "digests").unlink(),
    "position_changed": lambda w: (w / "checkpoints/2/position/metadata").write_text(
        '{"value": {"step": 9}}'
    ),
}


# Orbax leaves the other reads of a damaged step to the garbage collector, which complains.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_step_is_set_aside_for_the_one_before(tmp_path, kind):
    save(tmp_path, 1, 2)
    DAMAGE[kind](tmp_path)
    found = restore(tmp_path)
    assert found.step == 1
    assert_trees_equal(found.trees, trees(1))
    gc.collect()
    assert (tmp_path / "checkpoints" / "2.bad").is_dir()
    # The place is free again for the step that is made anew.
    save(tmp_path, 2)
    assert restore(tmp_path).step == 2


def test_an_uncommitted_step_does_not_count(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "2" / "commit_success.txt").unlink()
    assert restore(tmp_path).step == 1


def test_when_every_step_is_damaged_the_run_does_not_start_afresh(tmp_path):
    save(tmp_path, 1)
    flip(payload(tmp_path, 1))
    for _ in range(2):
        with pytest.raises(errors.InputError, match=r"every checkpoint is damaged .*\(1.bad\)"):
            restore(tmp_path)


def test_a_step_in_the_folder_of_another_is_damage(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "checkpoints" / "20")
    assert restore(tmp_path).step == 1
    assert (tmp_path / "checkpoints" / "20.bad").is_dir()


def test_a_save_under_way_is_not_the_newest_step(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "5").mkdir()
    assert checkpoint.newest_step(tmp_path) == 1


@pytest.mark.parametrize("name", ["a[1]", "back\\slash"])
def test_paths_that_could_not_be_read_again_are_refused(tmp_path, name):
    with pytest.raises(errors.InputError, match="choose another --workdir"):
        checkpoint.Store(tmp_path / name, keep=1)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    store = checkpoint.Store(tmp_path, keep=1)
    for error in (OSError(28, "No space left"), ValueError("RESOURCE_EXHAUSTED: no space\nmore")):

        def fail(*args, error=error, **options):
            raise error

        monkeypatch.setattr(store._manager, "wait_until_finished", fail)
        with pytest.raises(errors.InputError, match="could not be saved .*(?i:no space)") as e:
            store.wait()
        assert "\n" not in str(e.value)
    monkeypatch.undo()
    store.close()


def test_a_checkpoint_of_another_config_names_parameters_and_shapes(tmp_path):
    save(tmp_path, 1)
    words = (
        r"params/dense/bias is \(64,\) there and \(32,\) here; params/dense/kernel is \(32, 64\)"
    )
    with pytest.raises(errors.InputError, match=words) as e:
        restore(tmp_path, abstract(trees(width=32)))
    assert "\n" not in str(e.value)
    assert restore(tmp_path).step == 1  # it was not taken for damage


def test_load_variables_needs_no_optimiser_and_prefers_the_average(tmp_path):
    config = toy.config(num_steps=2, ema=0.9)
    state = train.fit(toy.task(), toy.batches(), config, tmp_path, devices=ONE)
    loaded, variables = checkpoint.load_variables(tmp_path)
    assert_trees_equal(variables["params"], state.ema_params)
    assert_trees_equal(variables["counts"], state.collections["counts"])
    assert loaded.profile == (0, 0) and loaded.optim.b2 == 0.99
    # They work on any mesh.
    batch = next(toy.batches())
    images = toy.task().render(variables, batch.context, batch.target.cameras).images
    assert images.shape == (8, 1, 4, 4, 3)


def test_load_variables_explains_what_is_missing_or_damaged(tmp_path):
    with pytest.raises(errors.InputError, match="nowhere/checkpoints: no such folder"):
        checkpoint.load_variables(tmp_path / "nowhere")
    save(tmp_path, 1, 2)
    with pytest.raises(errors.InputError, match=r"no checkpoint 5 here \(steps: \[1, 2\]\)"):
        checkpoint.load_variables(tmp_path, 5)
    flip(payload(tmp_path, 2))
    with pytest.raises(errors.InputError, match=r"checkpoints/2 is damaged .*of \[1, 2\]"):
        checkpoint.load_variables(tmp_path)
    assert (tmp_path / "checkpoints" / "2").is_dir()  # reading renames nothing
    _, variables = checkpoint.load_variables(tmp_path, 1)
    assert_trees_equal(variables["params"], trees(1)["params"])


def test_a_workdir_of_another_config_names_the_fields(tmp_path):
    config = toy.config()
    outputs.write_json(tmp_path / "config.json", runs.to_json(config))
    runs.check_workdir(tmp_path, toy.config(log_every=77, **{"mesh.data": 8}))
    with pytest.raises(errors.InputError, match=r"\(optim.b1: 0.9 -> 0.5; seed: 0 -> 3\)"):
        runs.check_workdir(tmp_path, toy.config(seed=3, **{"optim.b1": 0.5}))


KILLED = """
import os, pathlib, signal, sys, threading, time
from tests import conftest, toy
from nvs_common import runs
from tests.test_checkpoint import checkpoint, trees
workdir = pathlib.Path(sys.argv[1])
store = checkpoint.Store(workdir, keep=3)
config = runs.to_json(toy.config())
store.save(1, trees(1), {"step": 1}, config)
store.wait()
store.save(2, trees(2, width=200_000), {"step": 2}, config)
print("saving", flush=True)
time.sleep(60)
"""


def test_a_save_that_is_killed_leaves_the_step_before(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=conftest.ROOT,
        env={**os.environ, "PYTHONPATH": f"{conftest.ROOT}:{conftest.ROOT / 'common'}"},
    )
    assert process.stdout.readline() == b"saving\n"
    half = tmp_path / "checkpoints" / "2"
    while not half.exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (half / "commit_success.txt").exists()
    found = restore(tmp_path)
    assert found.step == 1
    assert_trees_equal(found.trees, trees(1))
    # Orbax removes it in the background, and waits for that before it saves.
    give_up = time.monotonic() + 60
    while half.exists() and time.monotonic() < give_up:
        time.sleep(0.01)
    assert not half.exists()
    save(tmp_path, 2)
    assert restore(tmp_path).step == 2
