"""The benchmark of LVSM at toy size: the same model in PyTorch, and without PyTorch installed."""

import pathlib
import subprocess
import sys

import pytest

from launch import lvsm_speed
from nvs_common.errors import InputError
from tests import small_lvsm

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULES = {kind: small_lvsm.KINDS[kind]() for kind in ("decoder_only", "encoder_decoder")}


def study():
    return lvsm_speed.study(MODULES, [lvsm_speed.Case(2, 2, 2)], [2], side=8, repeats=2, threads=1)


def rows(lines):
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return [row for row in cells if row[0] in (*MODULES, "2")]


def test_pictures_and_gradients_are_those_of_pytorch():
    pytest.importorskip("torch", reason="PyTorch is not installed (extra [torch])")
    found = rows(study())
    assert [row[:5] for row in found[:-1]] == [
        [kind, "2", "2", "2", name] for kind in MODULES for name in ("forward", "and backward")
    ]
    for row in found[:-1]:
        slow, fast, ratio, apart = map(float, row[5:])
        assert slow > 0 and fast > 0 and ratio == pytest.approx(slow / fast, rel=0.5)
        assert apart <= (2e-6 if row[4] == "forward" else 1e-4)
    assert len(found) == 5


def test_without_pytorch_the_table_of_caches_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    lines = study()
    assert lines[0] == lvsm_speed.WITHOUT_TORCH and "[torch]" in lines[0]
    (row,) = rows(lines)
    assert row[0] == "2" and all(float(cell) > 0 for cell in row[1:])


def test_threads_that_there_are_not():
    assert lvsm_speed.use_threads(None) >= 1
    with pytest.raises(InputError, match="--threads=100000"):
        lvsm_speed.use_threads(100_000)


FAULTS = """
import ctypes, resource
from launch import allocation
assert allocation.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**27)
    libc.memset(block, 1, 2**27)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's C library")
def test_freed_memory_is_used_again():
    # In a process of its own: what is set stays.
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(done.stdout) < 100  # of 32768 pages
