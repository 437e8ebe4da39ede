"""Two processes train as one, and refuse to start when they disagree."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from nvs_common import checkpoint, train
from tests import conftest, toy

CUBE = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}

WORKER = """
import ast, os, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from launch import processes
processes.join()
from nvs_common import errors, train
from tests import toy

index, count = jax.process_index(), jax.process_count()


class Part:
    # This process's rows of every batch.
    def __init__(self):
        self.inner = toy.batches()
        self.get_state, self.set_state = self.inner.get_state, self.inner.set_state

    def __next__(self):
        return jax.tree.map(lambda x: x[index::count], next(self.inner))


changes = ast.literal_eval(sys.argv[2])
try:
    train.fit(toy.task(), Part(), toy.config(**changes), sys.argv[1])
except errors.InputError as e:
    print("refused:", e, flush=True)
    os._exit(2)
"""


def start(workdir, *changes):
    """Runs a process for each of `changes`; returns (exit code, output) of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for index, change in enumerate(changes):
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": f"{conftest.ROOT}:{conftest.ROOT / 'common'}",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(len(changes)),
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, "-c", WORKER, str(workdir), repr(change)]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen(command, env=env, **pipe))
    try:
        outputs = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, out) for process, out in zip(running, outputs, strict=True)]


@pytest.mark.thorough
def test_two_processes_make_the_steps_of_one_and_their_checkpoint_serves_it(tmp_path):
    changes = {**CUBE, "num_steps": 3}
    for code, output in start(tmp_path / "two", changes, changes):
        assert code == 0, output
    config = toy.config(**changes)
    one = train.fit(toy.task(), toy.batches(), config, tmp_path / "one")
    _, variables = checkpoint.load_variables(tmp_path / "two", 3)
    close = lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6)  # noqa: E731
    jax.tree.map(close, variables["params"], one.params)
    # Goes on in one process from what two have written.
    further = {**changes, "num_steps": 4}
    state = train.fit(toy.task(), toy.batches(), toy.config(**further), tmp_path / "two")
    assert int(state.step) == 4


def test_processes_with_different_configs_stop_and_name_the_field(tmp_path):
    changes = {"mesh.data": 8}
    results = start(tmp_path, changes, {**changes, "batch_size": 16})
    assert [code for code, _ in results] == [2, 2]
    assert "processes [1] were started with another config" in results[0][1]
    assert "batch_size: 8 there, 16 here" in results[1][1]
    assert not (tmp_path / "checkpoints").exists()
