"""The nearest code on a TPU: a Pallas kernel that never writes a distance to memory.

The matrix unit multiplies bfloat16. XLA makes a float32 product of six of its passes (the parts of
8 bits of each factor, without the three smallest of nine pairs) and each pass over d = 16 numbers
leaves seven eighths of a unit of 128 unused. Here the six pairs stand side by side in one product
of depth 6 d: the same numbers in a sixth of the passes, up to d = 21.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nvs_common.types import Array

# Vectors and codes of a step of the grid, and codes whose distances exist at once: 1 MiB.
VECTORS = 1024
CODES = 2048
_AT_ONCE = 256
# Which part of the vector meets which part of the code, 0 the highest 8 bits.
_PAIRS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))
# Rows of a tile of bfloat16: parts that begin on tiles are put together without moving rows.
_ALIGN = 16


def search(z: Array, codes: Array, *, interpret: Any = False) -> tuple[Array, Array]:
    """Index [n] and distance [n] of the nearest of codes [k, d] for vectors [n, d].

    Args:
      z: float32.
      codes: float32.
      interpret: of `pallas_call`, to run on a CPU.

    Raises:
      NotImplementedError: other types than float32.
    """
    if z.dtype != jnp.float32 or codes.dtype != jnp.float32:
        raise NotImplementedError(
            f"nearest code: the kernel for TPUs is for float32, not {z.dtype} and {codes.dtype}"
        )
    (n, d), k = z.shape, codes.shape[0]
    deep = -(-d // _ALIGN) * _ALIGN
    # Vectors lie along lanes, 128 at a time, and blocks are no larger than there is need for.
    vectors, columns = min(VECTORS, _up(n, 128)), min(CODES, _up(k, _AT_ONCE))
    rows, many = _up(n, vectors), _up(k, columns)
    z = jnp.pad(z, ((0, rows - n), (0, deep - d))).T
    z_parts = jnp.concatenate(_parts(z))
    lengths = jnp.sum(jnp.square(codes), axis=-1)
    lengths = jnp.pad(lengths, (0, many - k), constant_values=jnp.inf)[:, None]
    # A power of two changes no digit, so this is the distance as the definition rounds it.
    code_parts = _parts(jnp.pad(-2 * codes, ((0, many - k), (0, deep - d))))
    stacked = jnp.concatenate([code_parts[of_code] for _, of_code in _PAIRS], axis=-1)
    index, distance = pl.pallas_call(
        functools.partial(_kernel, deep),
        grid=(rows // vectors, many // columns),
        in_specs=[
            pl.BlockSpec((len(z_parts), vectors), lambda i, j: (0, i)),
            pl.BlockSpec((columns, stacked.shape[1]), lambda i, j: (j, 0)),
            pl.BlockSpec((columns, 1), lambda i, j: (j, 0)),
        ],
        # The running minimum: a block of results stays on the chip while the codes go by.
        out_specs=[pl.BlockSpec((1, vectors), lambda i, j: (0, i))] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((1, rows), jnp.int32),
            jax.ShapeDtypeStruct((1, rows), jnp.float32),
        ],
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * many * len(_PAIRS) * deep,
            bytes_accessed=2 * z_parts.size + 2 * stacked.size * (rows // vectors) + 8 * rows,
            transcendentals=0,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="nearest_code",
    )(z_parts, stacked, lengths)
    return index[0, :n], distance[0, :n]


def _kernel(deep: int, z_ref, codes_ref, lengths_ref, index_ref, distance_ref):
    """Takes a block of codes into the running minimum of a block of vectors."""
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _():
        index_ref[...] = jnp.zeros_like(index_ref)
        distance_ref[...] = jnp.full_like(distance_ref, jnp.inf)

    parts = [z_ref[pl.ds(part * deep, deep), :] for part in range(3)]
    stacked = jnp.concatenate([parts[of_z] for of_z, _ in _PAIRS], axis=0)
    first = block * codes_ref.shape[0]

    def step(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        here = pl.ds(pl.multiple_of(i * _AT_ONCE, _AT_ONCE), _AT_ONCE)
        products = jnp.dot(codes_ref[here, :], stacked, preferred_element_type=jnp.float32)
        distances = lengths_ref[here, :] + products
        least = jnp.min(distances, axis=0, keepdims=True)
        numbers = jax.lax.broadcasted_iota(jnp.int32, distances.shape, 0)
        numbers = jnp.where(distances == least, numbers, _AT_ONCE - 1)
        number = first + i * _AT_ONCE + jnp.min(numbers, axis=0, keepdims=True)
        nearer = least < best[1]
        return jnp.where(nearer, number, best[0]), jnp.where(nearer, least, best[1])

    steps = codes_ref.shape[0] // _AT_ONCE
    best = jax.lax.fori_loop(0, steps, step, (index_ref[...], distance_ref[...]))
    index_ref[...], distance_ref[...] = best


def _parts(x: Array) -> list[Array]:
    """Three bfloat16 arrays whose sum is x in float32."""
    parts = []
    for _ in range(3):
        # A cast there and back may be optimised away; this may not.
        high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(high.astype(jnp.bfloat16))
        x = x - high
    return parts


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
