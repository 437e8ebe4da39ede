"""For tests of Pallas kernels for TPUs: the interpreter that looks for data races."""

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

# What `interpret` of a kernel takes.
DETECT = pltpu.InterpretParams(detect_races=True)


def found():
    """Whether the last kernel that ran with DETECT raced."""
    return interpret_pallas_call.races.races_found
