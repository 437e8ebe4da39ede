"""The nearest code of each vector: the definition, tiles in plain JAX, and the choice among them.

    nearest.search(z, codes)                          # what is known to be the best
    nearest.search(z, codes, implementation="tpu")    # this one, or an error

Distances are float32 or wider at full precision and the lowest index wins a tie, whatever computes
them. "reference" is the definition and holds all n x k distances. "xla" keeps a running minimum
over tiles of codes. "tpu" is a Pallas kernel, `nearest_tpu`.

At n = 120,000, k = 2048, d = 16 (`python launch/benchmark.py nearest_code`) on a CPU core "xla"
takes a fifth of the time of "reference" and a thousandth of its temporaries. A TPU's compiler fuses
"reference" into one loop without them; it estimates 2.96 million cycles for it on a v5e, and its
schedule of "tpu" has 0.79 million, with 0.18 million around it. Nobody has timed that on a chip:
until then "tpu" is used where it is named. A kernel for GPUs could save no memory over "xla", so
there is none before there is a GPU to show that it saves time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from nvs_common.errors import InputError
from nvs_common.types import Array
from vqnerf_jax import nearest_tpu

# Vectors and codes of a tile of distances. On a CPU it stays in the first-level caches: 240 x 256
# was the best of 16 shapes from 96 x 512 to 2000 x 2048, and 3.5 times as fast as the last.
# Accelerators have more to keep busy; there the tile is 32 MiB.
_TILE = {"cpu": (240, 256)}
_TILE_ELSEWHERE = (2**16, 128)


class Nearest(NamedTuple):
    """The nearest codes.

    Attributes:
      indices: [...] int32.
      distances: [...] squared, up to the vector's own squared length; float32 or wider.
    """

    indices: Array
    distances: Array


def search(z: Array, codes: Array, *, implementation: str | None = None) -> Nearest:
    """The nearest of codes [k, d] for each vector [..., d]; the lowest index in a tie.

    Neither result has a gradient.

    Args:
      z: [..., d].
      codes: [k, d].
      implementation: a name of IMPLEMENTATIONS, or None for the default of the device.

    Raises:
      InputError: an unknown implementation.
      NotImplementedError: the named one does not support these arrays.
    """
    chex.assert_rank(codes, 2)
    chex.assert_equal(z.shape[-1], codes.shape[-1])
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"nearest code: implementation {implementation!r} is unknown; choose one of "
            f"{sorted(IMPLEMENTATIONS)}, or None."
        )
    wide = jnp.promote_types(jnp.promote_types(z.dtype, codes.dtype), jnp.float32)
    flat, codes = jax.lax.stop_gradient((z.reshape(-1, z.shape[-1]).astype(wide), codes))
    found = IMPLEMENTATIONS[implementation or "xla"](flat, codes.astype(wide))
    return Nearest(*(x.reshape(z.shape[:-1]) for x in found))


def reference(z: Array, codes: Array) -> Nearest:
    """`search` of vectors [n, d] by its definition, with all [n, k] distances at once."""
    products = jnp.einsum("nd,kd->nk", z, codes, precision="highest")
    distances = jnp.sum(jnp.square(codes), axis=-1)[None] - 2 * products
    indices = jnp.argmin(distances, axis=-1).astype(jnp.int32)
    return Nearest(indices, jnp.min(distances, axis=-1))


def in_tiles(z: Array, codes: Array, tile: tuple[int, int] | None = None) -> Nearest:
    """`search` of vectors [n, d] with one tile (vectors, codes) of distances at a time."""
    (n, d), k = z.shape, codes.shape[0]
    rows, columns = tile or _TILE.get(jax.default_backend(), _TILE_ELSEWHERE)
    # Vectors that are divided over devices are not cut once more: every device takes its own.
    rows, columns = n if _divided() else min(rows, n), min(columns, k)
    parts, tiles = math.ceil(n / rows), math.ceil(k / columns)
    lengths = jnp.sum(jnp.square(codes), axis=-1)
    extra = tiles * columns - k
    # A code that is only there to fill the last tile is nearest to nothing.
    lengths = jnp.pad(lengths, (0, extra), constant_values=jnp.inf).reshape(tiles, columns, 1)
    doubled = jnp.pad(-2 * codes, ((0, extra), (0, 0))).reshape(tiles, columns, d)
    every = (doubled, lengths, jnp.arange(tiles, dtype=jnp.int32) * columns)

    def part(z: Array) -> Nearest:
        def tile(xs: tuple[Array, Array, Array]) -> Nearest:
            codes, lengths, start = xs
            # Codes first: the minimum then runs over the slow axis, in whole vectors of the CPU.
            products = jnp.einsum("kd,nd->kn", codes, z, precision="highest")
            index, distance = lowest(lengths + products)
            return Nearest(start + index, distance)

        def step(best: Nearest, xs: tuple[Array, Array, Array]) -> tuple[Nearest, None]:
            new = tile(xs)
            nearer = new.distances < best.distances
            return jax.tree.map(lambda x, y: jnp.where(nearer, x, y), new, best), None

        first = tile((every[0][0], every[1][0], every[2][0]))
        return jax.lax.scan(step, first, (every[0][1:], every[1][1:], every[2][1:]))[0]

    if parts == 1:
        return part(z)
    padded = jnp.pad(z, ((0, parts * rows - n), (0, 0))).reshape(parts, rows, d)
    found = jax.lax.map(part, padded)
    return Nearest(*(x.reshape(-1)[:n] for x in found))


def lowest(distances: Array) -> Nearest:
    """The first of the least of distances [k, n] on its slow axis: two reductions, which compile
    to better code than one that carries pairs."""
    least = jnp.min(distances, axis=0)
    numbers = jax.lax.broadcasted_iota(jnp.int32, distances.shape, 0)
    candidates = jnp.where(distances == least[None], numbers, distances.shape[0])
    # Of distances that are not numbers none equals the least: any index of the table will do.
    return Nearest(jnp.minimum(jnp.min(candidates, axis=0), distances.shape[0] - 1), least)


def _divided() -> bool:
    """Whether arrays may be divided over the devices of a mesh without being told so here."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind != jax.sharding.AxisType.Manual for size, kind in sizes)


def _tpu(z: Array, codes: Array) -> Nearest:
    if _divided():
        raise NotImplementedError(
            "nearest code: the kernel for TPUs is not divided over a mesh; call it inside of "
            "jax.shard_map."
        )
    return Nearest(*nearest_tpu.search(z, codes))


IMPLEMENTATIONS = {"tpu": _tpu, "xla": in_tiles, "reference": reference}
