"""Features on regular grids: a field that learns in minutes where a deep network takes hours.

Not in the papers: NeuS encodes points by waves alone. A few dense grids of growing resolution are
read by trilinear interpolation; the network that follows can be small. The distance's gradient is
then constant in directions within a cell up to what the network bends, so that surfaces are about
as smooth as the finest grid is fine.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nvs_common.types import Array

_CORNERS = np.array(list(itertools.product((0, 1), repeat=3)), np.int32)
_START = 1e-2


def init(key: Array, resolutions: Sequence[int], channels: int) -> dict[str, Array]:
    """Small random features: {"level_0": [g, g, g, c], ...}."""
    keys = jax.random.split(key, len(resolutions))
    return {
        f"level_{i}": jax.random.uniform(one, (g, g, g, channels), minval=-_START, maxval=_START)
        for i, (one, g) in enumerate(zip(keys, resolutions, strict=True))
    }


def lookup(grids: Mapping[str, Array], points: Array) -> Array:
    """Features [..., levels * c] at points [..., 3] in [-1, 1]^3; those of the border beyond it."""
    flat = jnp.clip(points.reshape(-1, 3), -1, 1)
    found = [_trilinear(jnp.asarray(grids[f"level_{i}"]), flat) for i in range(len(grids))]
    return jnp.concatenate(found, axis=-1).reshape(*points.shape[:-1], -1)


def _trilinear(grid: Array, points: Array) -> Array:
    """Features [n, c] of one grid; its first and last values lie at -1 and 1."""
    size, channels = grid.shape[0], grid.shape[-1]
    position = (points + 1) * (0.5 * (size - 1))
    cell = jnp.clip(jnp.floor(jax.lax.stop_gradient(position)), 0, size - 2)
    part = position - cell
    corner = cell.astype(jnp.int32)[:, None] + _CORNERS[None]
    index = (corner[..., 0] * size + corner[..., 1]) * size + corner[..., 2]
    rows = grid.reshape(-1, channels).at[index].get(mode="promise_in_bounds")
    share = jnp.where(_CORNERS[None] == 1, part[:, None], 1 - part[:, None])
    weights = share[..., 0] * share[..., 1] * share[..., 2]
    return jnp.sum(weights[..., None] * rows, axis=1)
