"""Which implementation is taken where the caller names none.

An implementation becomes the default of a platform by a measurement that is written here, never by
hope. A kernel that has only been compiled for a chip, whatever its compiler estimates, is taken by
name alone:

  platform  default                     by name
  cpu       "xla"                       "reference"
  gpu       "cudnn" where it has the    "xla", "pallas_gpu" (not measured)
            case, then "xla"
  tpu       "xla"                       "pallas_tpu" (not measured)

CPU, JAX 0.10.2, 2026-11-28: planned memory in MiB of one scene, 2 heads of 64, float32, with norms
of queries and keys, forward / with the backward pass; times are beside the tile sizes in `chunked`.

  tokens   "reference"        "xla"
  1024       18.0 / 45.0       4.9 / 8.8
  4096      264.0 / 660.3     18.0 / 28.5
  16384    4128.1 / 10321.0   72.0 / 107.3

`python launch/benchmark.py attention` makes such rows, and times, on any machine.
"""

from __future__ import annotations

import jax

# Tried in this order; "xla" supports everything.
ORDER = {"cpu": ("xla",), "gpu": ("cudnn", "xla"), "tpu": ("xla",)}


def order(platform: str | None = None) -> tuple[str, ...]:
    """Names of implementations to try on a platform, by default that of the first device."""
    return ORDER.get(platform or jax.default_backend(), ("xla",))
