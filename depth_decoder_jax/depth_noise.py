"""Noise on depth that a decoder is trained with, for depth at inference is coarse (Sec. 3.3).

Uniform noise on grids of 3 x 3, 64 x 64 and 128 x 128, enlarged to the map: errors of low and of
high frequency. Scales are not published; `calibrate` finds those that a source of depth calls for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nvs_common.errors import InputError
from nvs_common.types import Array

# Side of a grid -> s: its noise is uniform in [-s, s], in world units. For an object of radius
# 0.5 the noise has a deviation of 0.03 and never exceeds 0.09.
SCALES: Mapping[int, float] = {3: 0.05, 64: 0.02, 128: 0.02}

# Steps towards the map on a grid that is nearest to the errors.
_STEPS = 6
# Draws that the effect of each grid is measured with.
_DRAWS = 8


def structured_depth_noise(
    key: Array,
    depth: Any,
    mask: Any = None,
    scales: Mapping[int, float] = SCALES,
    *,
    near: Any = 0.0,
    far: Any = jnp.inf,
) -> Array:
    """Depth with noise; add it before the depth is pooled.

    Args:
      key: random key.
      depth: [..., h, w] z-depth; each map has noise of its own.
      mask: [..., h, w], the foreground, where it is more than a half; other pixels stay as they
        are.
      scales: side of a grid -> largest noise on it, in world units.
      near: nearest result, a number or [...].
      far: farthest result, likewise.

    Returns:
      [..., h, w].

    Raises:
      InputError: arrays that do not fit together, a grid without cells or a negative scale.
    """
    depth = jnp.asarray(depth, jnp.float32)
    if mask is not None and jnp.shape(mask) != depth.shape:
        raise InputError(f"mask has shape {jnp.shape(mask)}, depth {depth.shape}; they must agree.")
    if depth.ndim < 2:
        raise InputError(f"depth has shape {depth.shape}; expected [..., h, w].")
    total = jnp.zeros_like(depth)
    for one, (side, scale) in zip(jax.random.split(key, len(scales)), scales.items(), strict=True):
        # `not 0 <= ...` also refuses NaN.
        if side != int(side) or side < 1 or not 0 <= scale < np.inf:
            raise InputError(
                f"scales={dict(scales)}: sides are whole and at least 1, scales not negative."
            )
        total += scale * _grid_noise(one, int(side), depth.shape)
    ends = [jnp.asarray(end, jnp.float32) for end in (near, far)]
    if any(end.shape not in ((), depth.shape[:-2]) for end in ends):
        raise InputError(
            f"near {ends[0].shape} and far {ends[1].shape}: expected a number each, or one for "
            f"each map, {depth.shape[:-2]}."
        )
    near, far = (jnp.broadcast_to(end, depth.shape[:-2])[..., None, None] for end in ends)
    noisy = jnp.clip(depth + total, near, far)
    return noisy if mask is None else jnp.where(jnp.asarray(mask, jnp.float32) > 0.5, noisy, depth)


def calibrate(
    errors: Any, mask: Any, grids: tuple[int, ...] = tuple(SCALES), seed: int = 0
) -> dict[int, float]:
    """Scales of noise that resembles the errors of a source of depth.

    The energy of the errors in the bands between the grids is the sum of what each grid of noise
    contributes, a number times its squared scale, which is measured on noise of scale one under
    the same masks.

    Args:
      errors: [n, h, w] estimated minus true depth.
      mask: [n, h, w] bool, where both are known.
      grids: sides of the grids, growing.
      seed: of that noise.

    Returns:
      Side of a grid -> scale, zero where the errors lack that band.

    Raises:
      InputError: arrays of different shapes, no pixel in the mask, or errors that are not finite.
    """
    errors, mask = np.asarray(errors, np.float32), np.asarray(mask, bool)
    if errors.ndim != 3 or errors.shape != mask.shape:
        raise InputError(f"errors {errors.shape} and mask {mask.shape}: expected one [n, h, w].")
    if not mask.any() or not np.isfinite(errors[mask]).all():
        raise InputError("errors: no pixel is in the mask, or some in it are not finite.")
    weight = jnp.asarray(mask, jnp.float32)
    clean = jnp.where(weight > 0, errors, 0.0)
    found = np.asarray(_band_energies(clean, weight, grids), np.float64)
    parts = []
    for index, side in enumerate(grids):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), index), _DRAWS)
        draws = [_noise_energies(k, side, weight, grids) for k in keys]
        parts.append(np.mean(draws, axis=0))
    return dict(zip(grids, _solve(np.stack(parts, axis=1), found), strict=True))


def _solve(parts: np.ndarray, energies: np.ndarray) -> list[float]:
    """Scales whose squares, not negative, give the energies best, relative to each."""
    active = list(range(len(energies)))
    row = 1 / np.maximum(energies, 1e-12 * energies.sum() + 1e-30)
    squares = np.zeros(len(energies))
    while active:
        solution = np.linalg.lstsq(parts[:, active] * row[:, None], energies * row, rcond=None)[0]
        if (solution >= 0).all():
            squares[active] = solution
            break
        del active[int(np.argmin(solution))]
    return [float(np.sqrt(square)) for square in squares]


def _grid_noise(key: Array, side: int, shape: tuple[int, ...]) -> Array:
    """Uniform noise in [-1, 1] on a grid, enlarged bilinearly to maps [..., h, w]."""
    grid = jax.random.uniform(key, (*shape[:-2], side, side), minval=-1.0, maxval=1.0)
    return jax.image.resize(grid, shape, "linear")


@functools.partial(jax.jit, static_argnums=(1, 3))
def _noise_energies(key: Array, side: int, weight: Array, grids: tuple[int, ...]) -> Array:
    return _band_energies(_grid_noise(key, side, weight.shape), weight, grids)


@functools.partial(jax.jit, static_argnums=2)
def _band_energies(maps: Array, weight: Array, grids: tuple[int, ...]) -> Array:
    """Mean squares of maps [n, h, w] between one grid and the next, where they weigh; [g]."""
    energies, below = [], jnp.zeros_like(maps)
    for side in grids[:-1]:
        smooth = _smoothed(maps, weight, side)
        energies.append(_mean_square(smooth - below, weight))
        below = smooth
    return jnp.stack([*energies, _mean_square(maps - below, weight)])


def _smoothed(maps: Array, weight: Array, side: int) -> Array:
    """About the nearest to maps, where they weigh, of what a grid can be enlarged to."""
    shape = (*maps.shape[:-2], side, side)
    fit = jnp.zeros_like(maps)
    share = jnp.maximum(jax.image.resize(weight, shape, "linear"), 1e-6)
    for _ in range(_STEPS):
        # Means over cells of what is left.
        left = jax.image.resize((maps - fit) * weight, shape, "linear") / share
        fit += jax.image.resize(left, maps.shape, "linear")
    return fit


def _mean_square(maps: Array, weight: Array) -> Array:
    return jnp.sum(jnp.square(maps) * weight) / jnp.sum(weight)
