"""Worker processes of the data pipeline end with their program, and not before it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

SCRIPT = """
import sys
import ml_collections
from nvs_common.data import pipeline
if __name__ == "__main__":
    data = dict(source="procedural", height=8, width=12, num_scenes=4, views_per_scene=6,
                workers=1, num_context=2, num_target=1, nearest=4)
    config = ml_collections.ConfigDict(dict(seed=0, batch_size=1, data=data))
    iterator = pipeline.training_batches(config)
    next(iterator)
    print([p.pid for p in __import__("multiprocessing").active_children()], flush=True)
    if sys.argv[1] == "wait":
        sys.stdin.read()
"""


def run_script(path, mode):
    path.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'common'}"}
    return subprocess.Popen(
        [sys.executable, str(path), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.thorough
def test_a_program_that_forgets_to_close_ends_quietly(tmp_path):
    process = run_script(tmp_path / "program.py", "end")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads /proc")
@pytest.mark.thorough
def test_workers_outlive_signals_to_the_group_and_end_with_a_killed_parent(tmp_path):
    process = run_script(tmp_path / "program.py", "wait")
    workers = json.loads(process.stdout.readline())
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    assert all(running(pid) for pid in workers)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(running(pid) for pid in workers):
        assert time.monotonic() < deadline, f"workers {workers} outlived their parent"
        time.sleep(0.1)


def running(pid):
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
