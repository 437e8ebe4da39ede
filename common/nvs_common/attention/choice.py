"""Which implementation is taken where the caller names none: what was measured, and on what.

An implementation becomes the default of a platform by a row of MEASURED, never by hope. A kernel
that has only been compiled for a chip, whatever its compiler estimates, is taken by name alone:

  platform  default                     by name
  cpu       "xla"                       "reference"
  gpu       "cudnn" where it has the    "xla", "pallas_gpu" (not measured)
            case, then "xla"
  tpu       "xla"                       "pallas_tpu" (not measured)

`python launch/benchmark.py attention` makes such rows on any machine.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

# Tried in this order; "xla" supports everything.
ORDER = {"cpu": ("xla",), "gpu": ("cudnn", "xla"), "tpu": ("xla",)}


class Measured(NamedTuple):
    """One comparison.

    Attributes:
      platform: as of jax.default_backend().
      device: what it was measured on.
      versions: of JAX and the library.
      date: when.
      case: sizes, type and pass.
      milliseconds: of each implementation.
    """

    platform: str
    device: str
    versions: str
    date: str
    case: str
    milliseconds: dict[str, float]


MEASURED: tuple[Measured, ...] = ()


def order(platform: str | None = None) -> tuple[str, ...]:
    """Names of implementations to try on a platform, by default that of the first device."""
    return ORDER.get(platform or jax.default_backend(), ("xla",))
