"""Codes as running means of the vectors that took them, as pure functions.

Exponential moving averages after van den Oord et al. (arXiv 1711.00937, App. A.1), with two ways to
start them: from zero with the bias divided out, or from the codes with a count of one each. Dead
codes restart at vectors of the global batch; all devices draw the same ones. For `axis_name` see
`codes`.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from nvs_common.types import Array
from vqnerf_jax import codes


@flax.struct.dataclass
class Statistics:
    """Codes and the averages that they are means of, all float32.

    Attributes:
      codes: [k, d].
      counts: [k] average number of vectors a step.
      sums: [k, d] average sum of vectors a step.
      steps: [] int32, updates so far.
    """

    codes: Array
    counts: Array
    sums: Array
    steps: Array


def start(initial: Array, *, debias: bool) -> Statistics:
    """Statistics before the first update: all zero where the bias is divided out, or the codes."""
    steps, ones = jnp.zeros((), jnp.int32), jnp.ones_like(initial[:, 0])
    if debias:
        return Statistics(initial, 0 * ones, jnp.zeros_like(initial), steps)
    return Statistics(initial, ones, initial, steps)


def update(
    state: Statistics,
    z: Array,
    indices: Array,
    *,
    decay: float,
    epsilon: float,
    debias: bool,
    keep_unused: bool,
    cosine: bool = False,
    axis_name: str | None = None,
) -> Statistics:
    """One step of the averages, and the codes that follow from them.

    Args:
      state: before the step.
      z: [n, d] vectors, of length one for cosine distances.
      indices: [n] the code of each.
      decay: of the averages.
      epsilon: pseudo-count of each code.
      debias: whether averages started at zero and are divided by 1 - decay^steps.
      keep_unused: whether a code that no vector ever took stays where it is; otherwise it becomes
        the zero vector, as in published code that starts at zero.
      cosine: whether codes have length one.
      axis_name: see `codes`.

    Returns:
      The new state, the same on all devices.
    """
    z = jax.lax.stop_gradient(z).astype(state.codes.dtype)
    num_codes = state.codes.shape[0]
    count = codes.counts(indices, num_codes, axis_name)
    total = codes.across(jnp.zeros_like(state.sums).at[indices].add(z), axis_name)
    counts = decay * state.counts + (1 - decay) * count
    sums = decay * state.sums + (1 - decay) * total
    steps = state.steps + 1
    correction = _correction(steps, decay, debias)
    mean_counts, mean_sums = counts / correction, sums / correction
    everything = jnp.sum(mean_counts)
    smooth = (mean_counts + epsilon) / (everything + num_codes * epsilon) * everything
    moved = mean_sums / smooth[:, None]
    moved = codes.unit(moved) if cosine else moved
    if keep_unused:
        moved = jnp.where((counts > 0)[:, None], moved, state.codes)
    return Statistics(moved, counts, sums, steps)


def restart(
    state: Statistics,
    z: Array,
    key: Array,
    *,
    below: float,
    decay: float,
    debias: bool,
    axis_name: str | None = None,
) -> Statistics:
    """Moves codes that few vectors take to random vectors of the global batch.

    Args:
      state: after an update.
      z: [n, d] vectors of this device.
      key: random key, the same on all devices.
      below: average count under which a code is dead; what a restarted code starts with.
      decay: of the averages.
      debias: as in `update`.
      axis_name: see `codes`.
    """
    correction = _correction(state.steps, decay, debias)
    dead = state.counts / correction < below
    drawn = draw(key, jax.lax.stop_gradient(z), state.codes.shape[0], axis_name)
    drawn = drawn.astype(state.codes.dtype)
    return Statistics(
        jnp.where(dead[:, None], drawn, state.codes),
        jnp.where(dead, below * correction, state.counts),
        jnp.where(dead[:, None], drawn * below * correction, state.sums),
        state.steps,
    )


def draw(
    key: Array, z: Array, count: int, axis_name: str | None = None, *, distinct: bool = False
) -> Array:
    """Random vectors [count, d] of the global batch, the same on all devices.

    Args:
      key: random key, the same on all devices.
      z: [n, d] vectors of this device.
      count: how many to draw.
      axis_name: see `codes`.
      distinct: no vector twice, if there are enough; costs a permutation of the batch.
    """
    num_local = z.shape[0]
    total = num_local if axis_name is None else num_local * jax.lax.axis_size(axis_name)
    if distinct and total >= count:
        index = jax.random.permutation(key, total)[:count]
    else:
        index = jax.random.randint(key, (count,), 0, total)
    if axis_name is None:
        return z[index]
    # Each device gives the rows that it holds: the batch itself is not gathered.
    local = index - jax.lax.axis_index(axis_name) * num_local
    mine = (local >= 0) & (local < num_local)
    return jax.lax.psum(z[jnp.where(mine, local, 0)] * mine[:, None], axis_name)


def kmeans(
    key: Array,
    z: Array,
    num_codes: int,
    steps: int,
    *,
    cosine: bool = False,
    axis_name: str | None = None,
) -> Array:
    """Codes [k, d] to start with: Lloyd's algorithm from random vectors of the global batch.

    Args:
      key: random key, the same on all devices.
      z: [n, d] vectors of this device.
      num_codes: k.
      steps: rounds.
      cosine: whether codes have length one.
      axis_name: see `codes`.
    """
    z = codes.unit(z) if cosine else z

    def step(_: int, centres: Array) -> Array:
        indices = codes.nearest(z, centres)
        count = codes.counts(indices, num_codes, axis_name)[:, None]
        total = codes.across(jnp.zeros_like(centres).at[indices].add(z), axis_name)
        means = total / jnp.maximum(count, 1)
        return jnp.where(count > 0, codes.unit(means) if cosine else means, centres)

    z = jax.lax.stop_gradient(z)
    return jax.lax.fori_loop(0, steps, step, draw(key, z, num_codes, axis_name, distinct=True))


def _correction(steps: Array, decay: float, debias: bool) -> Array:
    """What averages that started at zero are divided by; one for the others."""
    return 1 - decay ** steps.astype(jnp.float32) if debias else jnp.ones(())
