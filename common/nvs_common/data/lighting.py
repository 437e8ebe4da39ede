"""Lamps, suns and soft light from above, with filtered shadow maps.

A light sees the scene like a camera. Its map keeps the blurred mean and mean square of depth;
from the two follows a bound on how much of a neighbourhood is nearer than a point (Chebyshev's
inequality), which is a soft-edged shadow at the price of one look-up. Dimension key: k lights,
n points.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from nvs_common.data import raycast, rigs
from nvs_common.data.raycast import Rays, Solids, Surround


@dataclasses.dataclass(frozen=True)
class Lamp:
    """One light before shadows are cast.

    Attributes:
      eye, target: [3] where it is and looks.
      spread: tangent of half its cone; outside the cone nothing is shaded.
      color: [3] linear.
      reach: distance at which its light has halved; infinite for a sun.
      soft: radius of the blur of its shadows in texels of the map.
      size: texels across the shadow map.
      wrap: 0 lights by the cosine of incidence, 1 like a hemisphere of light.
    """

    eye: np.ndarray
    target: np.ndarray
    spread: float
    color: np.ndarray
    reach: float = np.inf
    soft: int = 1
    size: int = 256
    wrap: float = 0.0


@dataclasses.dataclass(frozen=True)
class Lights:
    """Lights with their shadow maps.

    Attributes:
      lamps: k lights.
      views: the view from each.
      middle: the depth that each map counts from.
      moments: [size^2, 2] of each: blurred depth and depth squared, float32.
    """

    lamps: tuple[Lamp, ...]
    views: tuple[Rays, ...]
    middle: tuple[float, ...]
    moments: tuple[np.ndarray, ...]


def cast(lamps: list[Lamp], solids: Solids, surround: Surround) -> Lights:
    """Renders the shadow maps of lights."""
    views, middles, maps = [], [], []
    for lamp in lamps:
        half = lamp.size / 2
        pose = rigs.look_at(lamp.eye, lamp.target)[None]
        k = np.array([[half / lamp.spread, half / lamp.spread, half, half]])
        view = raycast.pinhole_rays(pose, k, lamp.size, lamp.size)
        depth = raycast.trace(solids, surround, view, np.zeros((1, 2))).depth
        # Light that meets nothing goes as far as the farthest that meets something.
        met = np.isfinite(depth)
        depth = np.where(met, depth, depth.max(where=met, initial=0))
        # Counted from the middle, the square of a sun's far distance keeps its digits.
        middle = float(np.median(depth))
        depth = depth.reshape(lamp.size, lamp.size) - np.float32(middle)
        moments = _blur(np.stack([depth, depth * depth], axis=-1), lamp.soft)
        views.append(view)
        middles.append(middle)
        maps.append(moments.reshape(-1, 2))
    return Lights(tuple(lamps), tuple(views), tuple(middles), tuple(maps))


def _blur(image: np.ndarray, radius: int) -> np.ndarray:
    """Twice a box filter of 2 * radius + 1 on [h, w, c]."""
    for axis in (0, 1, 0, 1):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(image.ndim)]
        padded = np.pad(image, pad, mode="edge")
        size, total = image.shape[axis], np.zeros_like(image)
        for step in range(2 * radius + 1):
            window = slice(step, step + size)
            total += padded[window] if axis == 0 else padded[:, window]
        image = total / np.float32(2 * radius + 1)
    return image


def arriving(
    lights: Lights, k: int, position: np.ndarray, normal: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Light of lamp k at points with position and normal [3, n].

    Returns:
      direction to the lamp [3, n] of unit length, and strength [n]: shadow and fall-off,
      without the cosine of incidence.
    """
    lamp = lights.lamps[k]
    way = lamp.eye.astype(np.float32)[:, None] - position
    distance = np.sqrt(way[0] * way[0] + way[1] * way[1] + way[2] * way[2])
    way /= distance
    strength = _unshadowed(lights, k, position, normal)
    if np.isfinite(lamp.reach):
        strength = strength / (1 + (distance * np.float32(1 / lamp.reach)) ** 2)
    return way, strength


def _unshadowed(lights: Lights, k: int, position: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Part of lamp k that reaches points, [n] in [0, 1]."""
    turn = lights.views[k].camera_from_world[0].astype(np.float32)
    focal, _, centre, _ = lights.views[k].intrinsics[0].astype(np.float32)
    offset = position - lights.views[k].origin[0].astype(np.float32)[:, None]
    texel = (turn[2] @ offset) / focal
    # Looked up a little off the surface, so that a surface does not shade itself.
    offset += normal * (1.5 * texel)
    x, y, z = turn @ offset
    scale = focal / np.maximum(z, np.float32(1e-6))
    u, v = x * scale + (centre - np.float32(0.5)), y * scale + (centre - np.float32(0.5))
    size = lights.lamps[k].size
    last = size - 2
    inside = (z > 0) & (u > 0) & (v > 0) & (u < last) & (v < last)
    u, v = np.where(inside, u, 0), np.where(inside, v, 0)
    column, row = u.astype(np.int64), v.astype(np.int64)
    right, down = (u - column)[:, None], (v - row)[:, None]
    moments, cell = lights.moments[k], row * size + column
    upper = moments[cell]
    upper += right * (moments[cell + 1] - upper)
    lower = moments[cell + size]
    lower += right * (moments[cell + size + 1] - lower)
    upper += down * (lower - upper)
    mean, square = upper[:, 0], upper[:, 1]
    texel = np.abs(texel)
    behind = np.maximum(z - np.float32(lights.middle[k]) - mean - texel, 0)
    variance = np.maximum(square - mean * mean, texel * texel)
    part = variance / (variance + behind * behind)
    # The bound is never quite zero: what is nearly dark is dark.
    part = np.clip((part - np.float32(0.15)) * np.float32(1 / 0.85), 0, 1)
    return np.where(inside, part, 1).astype(np.float32, copy=False)
