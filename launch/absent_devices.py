"""Compiles for TPUs and GPUs that this machine does not have.

    compiled = absent_devices.compile_for("v5e", function, shape, shape)
    compiled.memory_analysis()     # bytes a device: arguments, results, temporaries
    compiled.cost_analysis()       # TPU: flops, bytes accessed, optimal_seconds

The compilers are the devices' own: a Pallas kernel that breaks a rule of tiling or does not fit
fails here as it would there. They come with the extra `aot` (libtpu; the CUDA plugin and ptxas)
and run inside this process beside any number of CPU devices, and in several processes at once.
Nothing is run: times of a GPU cannot be told, those of a TPU are the compiler's estimate.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# The smallest slice that there is of each chip.
TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
CHIPS = (*TPUS, "h100")

# libtpu looks for the machine it runs on, and lets one process in at a time: both are for chips.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}

# What CUDA reports of an H100 SXM; XLA plans for it.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 3 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
}
"""


class Unavailable(RuntimeError):
    """The compiler of a device is not installed."""


def devices(chip: str) -> list[Any]:
    """Devices to compile for: of the smallest slice of a TPU, or one GPU.

    Args:
      chip: one of CHIPS.

    Raises:
      Unavailable: its compiler is not installed.
      ValueError: an unknown chip.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip {chip!r} is unknown; choose one of {list(CHIPS)}.")
    return list(_h100() if chip == "h100" else _tpu(TPUS[chip]))


def slice_devices(topology: str) -> list[Any]:
    """Devices of a slice of TPUs, such as "v5e:4x4".

    Raises:
      Unavailable: libtpu is not installed.
    """
    return list(_tpu(topology))


def compile_for(chip: str, function: Callable, *shapes: Any) -> Any:
    """Compiles function(*shapes) for one device of a chip.

    Args:
      chip: one of CHIPS.
      function: of arrays; jitted or not.
      shapes: trees of ShapeDtypeStructs or arrays.

    Returns:
      The compiled program, as of jax.stages.Compiled.

    Raises:
      Unavailable: the chip's compiler is not installed.
    """
    mesh = Mesh(np.array(devices(chip)[:1]), ("chip",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, P())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)  # noqa: E731
    return compile_placed(function, *jax.tree.map(place, shapes))


def compile_placed(function: Callable, *shapes: Any) -> Any:
    """Compiles function(*shapes), whose ShapeDtypeStructs carry shardings over absent devices."""
    with _without_cache():
        return jax.jit(function).lower(*shapes).compile()


@functools.cache
def _tpu(topology: str) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise Unavailable("libtpu is not installed: pip install -e '.[aot]' (or '.[tpu]')")
    if jax.default_backend() != "tpu":
        for name, value in _LIBTPU.items():
            os.environ.setdefault(name, value)
    return tuple(topologies.get_topology_desc(topology, platform="tpu").devices)


@functools.cache
def _h100() -> tuple[Any, ...]:
    plugin = importlib.util.find_spec("jax_plugins.xla_cuda13") if _spec("jax_plugins") else None
    if plugin is None:
        raise Unavailable("the CUDA plugin is not installed: pip install -e '.[aot]' (or '.[gpu]')")
    _find_ptxas()
    return tuple(
        topologies.get_topology_desc(
            "h100", platform="cuda", target_config=_H100, topology="1x1x1"
        ).devices
    )


def _find_ptxas() -> None:
    """Puts the assembler of the wheel nvidia-cuda-nvcc on PATH where there is no other."""
    if shutil.which("ptxas"):
        return
    found = _spec("nvidia")
    for folder in found.submodule_search_locations or () if found else ():
        for ptxas in pathlib.Path(folder).glob("*/bin/ptxas"):
            os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{ptxas.parent}"
            return
    raise Unavailable("ptxas is neither on PATH nor installed: pip install -e '.[aot]'")


def _spec(name: str) -> Any:
    return importlib.util.find_spec(name)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Keeps programs out of the persistent cache: those for absent devices cannot be read back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)
