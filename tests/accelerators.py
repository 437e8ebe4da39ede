"""For tests that compile for devices that are not here: mark them `aot`.

    pytestmark = pytest.mark.aot

    @pytest.mark.parametrize("chip", accelerators.TPUS)
    def test_it_compiles(chip):
        compiled = accelerators.compile_for(chip, function, accelerators.shape(8, 128))

`bash .ci/run` installs the compilers (extra `aot`) and runs them; without these they skip.
"""

import jax
import jax.numpy as jnp
import pytest

from launch import absent_devices

# Chips that kernels have to compile for.
TPUS = ("v5e", "v5p", "v6e")
GPUS = ("h100",)


def shape(*dims, dtype=jnp.float32):
    """A ShapeDtypeStruct."""
    return jax.ShapeDtypeStruct(dims, dtype)


def compile_for(chip, function, *shapes):
    """The program compiled for one device of the chip; skips where its compiler is absent."""
    try:
        return absent_devices.compile_for(chip, function, *shapes)
    except absent_devices.Unavailable as e:
        pytest.skip(str(e))


def devices(chip):
    """All devices of the smallest slice; skips where the compiler is absent."""
    try:
        return absent_devices.devices(chip)
    except absent_devices.Unavailable as e:
        pytest.skip(str(e))


def lower_for_tpu(function, *shapes):
    """Lowers for a TPU, which needs no compiler and checks less; returns the module's text."""
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()


def temporaries(compiled):
    """Bytes of temporary memory that the compiler plans."""
    return compiled.memory_analysis().temp_size_in_bytes
