"""Compilers of absent devices: they work beside CPU devices, and say what is missing."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from launch import absent_devices
from nvs_common import sharding
from tests import accelerators

SQUARE = accelerators.shape(256, 256)


def doubled(x, block=(128, 128)):
    """A Pallas kernel over tiles of x."""

    def kernel(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    spec = pl.BlockSpec(block, lambda i, j: (i, j))
    grid = tuple(-(-n // size) for n, size in zip(x.shape, block, strict=True))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, shape, grid=grid, in_specs=[spec], out_specs=spec)(x)


@pytest.mark.aot
@pytest.mark.parametrize("chip", [*accelerators.TPUS, *accelerators.GPUS])
def test_a_program_compiles_for_a_chip_that_is_not_here(chip, tmp_path):
    compiled = accelerators.compile_for(chip, lambda x: jnp.exp(x @ x), SQUARE)
    assert compiled.memory_analysis().argument_size_in_bytes == 256 * 256 * 4
    assert len(jax.devices("cpu")) == 8  # untouched
    # CPU programs are still kept.
    assert jax.config.jax_persistent_cache_min_compile_time_secs < 1e6


@pytest.mark.aot
def test_the_tpu_compiler_sees_through_pallas():
    compiled = accelerators.compile_for("v5e", doubled, SQUARE)
    assert "tpu_custom_call" in compiled.as_text()
    with pytest.raises(Exception, match="divisible by 8 and 128|tiling|block"):
        accelerators.compile_for("v5e", lambda x: doubled(x, (4, 100)), SQUARE)


@pytest.mark.aot
def test_a_slice_has_collectives():
    mesh = sharding.make_mesh({"data": 4}, accelerators.devices("v5e"))
    rows = NamedSharding(mesh, P("data"))
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=rows)
    compiled = absent_devices.compile_placed(lambda x: jnp.sum(x, axis=0), x)
    assert "all-reduce" in compiled.as_text()


def test_a_kernel_is_lowered_for_a_tpu_without_its_compiler():
    assert "tpu_custom_call" in accelerators.lower_for_tpu(doubled, SQUARE)


@pytest.mark.parametrize(("chip", "missing"), [("v5e", "libtpu"), ("h100", "jax_plugins")])
def test_what_is_missing_is_said(chip, missing, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        absent_devices.importlib.util,
        "find_spec",
        lambda name: None if name.startswith(missing) else found(name),
    )
    absent_devices._tpu.cache_clear()
    absent_devices._h100.cache_clear()
    with pytest.raises(absent_devices.Unavailable, match="pip install -e"):
        absent_devices.devices(chip)
    with pytest.raises(ValueError, match="'v9' is unknown"):
        absent_devices.devices("v9")
