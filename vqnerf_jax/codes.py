"""Vector quantisation as pure functions: nearest codes, gradients through them, losses, usage.

Vectors are [..., d] and codes [k, d]. Distances are float32 or wider at full precision: with 8 or
11 bits of mantissa the nearest code of many vectors changes. `axis_name` names the mapped axis of
`jax.shard_map` or `jax.vmap` over which the vectors are divided; under `jax.jit` with a mesh it
stays None, for sums over an array are sums over all of its devices there.
"""

from __future__ import annotations

import chex
import flax.struct
import jax
import jax.numpy as jnp

from nvs_common.types import Array
from vqnerf_jax import nearest as nearest_code


@flax.struct.dataclass
class Quantized:
    """What a quantiser returns.

    Attributes:
      values: [..., d] the quantised vectors, with a gradient to what was quantised.
      indices: [...] int32, the code of each.
      loss: scalar, what the quantiser adds to a training loss.
      counts: [k] how many vectors of the global batch took each code, float32.
    """

    values: Array
    indices: Array
    loss: Array
    counts: Array


def nearest(z: Array, codes: Array, *, implementation: str | None = None) -> Array:
    """The index [...] of the nearest code of each vector [..., d]; the lowest one in a tie.

    `implementation` and errors are those of `vqnerf_jax.nearest.search`.
    """
    return nearest_code.search(z, codes, implementation=implementation).indices


def nearest_in_shards(z: Array, shard: Array, axis_name: str) -> Array:
    """The nearest code where each device of a mapped axis holds some of the codes.

    Args:
      z: [..., d], the same on all devices of the axis.
      shard: [k / devices, d], consecutive codes in the order of the devices.
      axis_name: the mapped axis.

    Returns:
      [...] indices into all k codes, the same on all devices.
    """
    index, distance = nearest_code.search(z, shard)
    index = index + jax.lax.axis_index(axis_name) * shard.shape[0]
    every = jax.lax.all_gather((distance, index), axis_name)
    # The first of equals is on the first device, which has the lowest index.
    best = jnp.argmin(every[0], axis=0)
    return jnp.take_along_axis(every[1], best[None], axis=0)[0]


def lookup_in_shards(indices: Array, shard: Array, axis_name: str) -> Array:
    """Codes [..., d] of indices [...] where each device holds [k / devices, d] of them."""
    local = indices - jax.lax.axis_index(axis_name) * shard.shape[0]
    mine = (local >= 0) & (local < shard.shape[0])
    rows = shard[jnp.where(mine, local, 0)] * mine[..., None]
    return jax.lax.psum(rows, axis_name)


def straight_through(z: Array, quantized: Array) -> Array:
    """The quantised values, with the gradient of the identity to z."""
    chex.assert_equal_shape([z, quantized])
    return z + jax.lax.stop_gradient(quantized - z)


def rotate(z: Array, quantized: Array) -> Array:
    """The quantised values as a rotation and scaling of z that count as constants for gradients.

    The gradient of z is that of the quantised vector, turned by the angle between the two
    (Fifty et al., arXiv 2410.06424).
    """
    chex.assert_equal_shape([z, quantized])
    length, wanted = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (z, quantized))
    unit, target = (x / jnp.maximum(n, 1e-6) for x, n in ((z, length), (quantized, wanted)))
    half = unit + target
    half = half / jnp.maximum(jnp.linalg.norm(half, axis=-1, keepdims=True), 1e-6)
    scale = wanted / jnp.maximum(length, 1e-6)
    unit, target, half, scale = jax.lax.stop_gradient((unit, target, half, scale))
    along = jnp.sum(z * half, axis=-1, keepdims=True)
    return scale * (z - 2 * along * half + 2 * jnp.sum(z * unit, -1, keepdims=True) * target)


def commitment(z: Array, quantized: Array) -> Array:
    """Mean squared distance to codes that count as constants; a scalar."""
    return jnp.mean(jnp.square(jax.lax.stop_gradient(quantized) - z))


def unit(x: Array) -> Array:
    """Vectors [..., d] of length one, for cosine distances."""
    # The floor keeps the gradient of the root finite at zero.
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


def counts(indices: Array, num_codes: int, axis_name: str | None = None) -> Array:
    """How many of all indices [...] are each code: [k] float32."""
    ones = jnp.ones(indices.size, jnp.float32)
    return across(jnp.zeros(num_codes, jnp.float32).at[indices.reshape(-1)].add(ones), axis_name)


def perplexity(counts: Array) -> Array:
    """The number of codes in use [] from counts [k], exp of the entropy of their frequencies.

    Counts are those of the global batch, or of many batches added: a mean of perplexities of parts
    is smaller than that of the whole.
    """
    p = counts / jnp.maximum(jnp.sum(counts), 1)
    return jnp.exp(-jnp.sum(p * jnp.log(p + 1e-10)))


def usage(counts: Array) -> Array:
    """The fraction of codes [] that counts [k] say are used at all."""
    return jnp.mean((counts > 0).astype(jnp.float32))


def across(x: Array, axis_name: str | None) -> Array:
    """The sum over the devices of a mapped axis; x itself without one."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)
