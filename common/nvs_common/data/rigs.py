"""Camera rigs of procedural scenes: where photographs of one scene are taken from.

World z is up; cameras are OpenCV. Baselines are relative to the nearest depth, so that the
disparity between neighbours is a chosen part of the image width, as in real captures.
"""

from __future__ import annotations

import dataclasses

import numpy as np

GRID, ARC, ORBIT, WALK = "grid", "arc", "orbit", "walk"
RIGS = (GRID, ARC, ORBIT, WALK)


@dataclasses.dataclass(frozen=True)
class Stand:
    """Where the photographer stands: eye and target [3], and the free space for cameras.

    Attributes:
      eye, target: [3] world.
      low, high: [3] box that camera centres must stay inside.
    """

    eye: np.ndarray
    target: np.ndarray
    low: np.ndarray
    high: np.ndarray


def look_at(eye: np.ndarray, target: np.ndarray, roll: np.ndarray | float = 0.0) -> np.ndarray:
    """OpenCV poses [..., 4, 4] at eye [..., 3] that look at target [..., 3]; roll in radians."""
    forward = target - eye
    forward = forward / np.linalg.norm(forward, axis=-1, keepdims=True)
    right = np.cross(forward, np.array([0.0, 0.0, 1.0]))
    right = right / np.linalg.norm(right, axis=-1, keepdims=True)
    down = np.cross(forward, right)
    c, s = np.cos(roll)[..., None], np.sin(roll)[..., None]
    pose = np.zeros((*forward.shape[:-1], 4, 4))
    pose[..., :3, 0] = c * right + s * down
    pose[..., :3, 1] = c * down - s * right
    pose[..., :3, 2] = forward
    pose[..., :3, 3] = eye
    pose[..., 3, 3] = 1
    return pose


def intrinsics(rng: np.random.Generator, fov: float, height: int, width: int) -> np.ndarray:
    """fx, fy, cx, cy [4] for a horizontal field of view in degrees of a 16:9 image.

    Taller images keep the focal length relative to the longer side; the principal point is up
    to 2 % off.
    """
    focal = max(width, height) / (2 * np.tan(np.radians(fov) / 2))
    off = np.clip(rng.normal(0, 0.006, 2), -0.02, 0.02) * max(width, height)
    return np.array([focal, focal, width / 2 + off[0], height / 2 + off[1]])


def poses(
    rng: np.random.Generator, kind: str, stand: Stand, count: int, baseline: float, nearest: float
) -> np.ndarray:
    """Poses of a rig around a stand.

    Args:
      rng: draws jitter.
      kind: one of RIGS.
      stand: eye, target and free space.
      count: number of cameras.
      baseline: distance between neighbours, world units.
      nearest: nearest depth seen from the eye, world units.

    Returns:
      [count, 4, 4] world_from_cam.
    """
    centre = look_at(stand.eye, stand.target)
    right, down, forward = centre[:3, 0], centre[:3, 1], centre[:3, 2]
    distance = float(np.linalg.norm(stand.target - stand.eye))
    make = {GRID: _grid, ARC: _arc, ORBIT: _orbit, WALK: _walk}[kind]
    local, target = make(rng, count, baseline, nearest, distance)
    frame = np.stack([right, down, forward], axis=-1)
    eyes = np.clip(stand.eye + local @ frame.T, stand.low, stand.high)
    targets = stand.eye + target @ frame.T
    roll = rng.normal(0, 0.03) + rng.normal(0, 0.012, count)
    return look_at(eyes, targets, roll)


# Each returns eyes and targets [count, 3] in the frame (right, down, forward) of the stand.


def _grid(rng, count, baseline, nearest, distance):
    columns = int(np.ceil(np.sqrt(count * rng.choice([1.0, 1.8, 4.0]))))
    rows = -(-count // columns)
    index = np.arange(count)
    x = (index % columns) - (columns - 1) / 2
    y = (index // columns) - (rows - 1) / 2
    eye = np.stack([x, y * rng.uniform(0.5, 1.0), np.zeros(count)], axis=-1)
    eye += rng.normal(0, [0.18, 0.18, 0.12], (count, 3))
    # Between parallel cameras and cameras that all look at one point.
    inward = rng.uniform(0, 1)
    target = eye * baseline * [1, 1, 0] * (1 - inward) + [0, 0, distance]
    target += rng.normal(0, 0.015 * distance, (count, 3))
    return eye * baseline, target


def _arc(rng, count, baseline, nearest, distance):
    angle = (np.arange(count) - (count - 1) / 2) * baseline / distance
    return _around(rng, angle, count, baseline, distance)


def _orbit(rng, count, baseline, nearest, distance):
    # Wider steps than an arc's, but never so wide that neighbours share little.
    step = min(np.radians(rng.uniform(40, 110)) / count, 1.6 * baseline / distance)
    angle = (np.arange(count) - (count - 1) / 2) * step
    return _around(rng, angle, count, baseline, distance)


def _around(rng, angle, count, baseline, distance):
    angle = np.clip(angle, -1.2, 1.2)
    rise = np.cumsum(rng.normal(0, 0.25, count))
    rise -= rise.mean()
    radius = distance * (1 + rng.normal(0, 0.02, count))
    eye = np.stack(
        [np.sin(angle) * radius, rise * baseline, distance - np.cos(angle) * radius], axis=-1
    )
    target = np.array([0, 0, distance]) + rng.normal(0, 0.03 * distance, (count, 3))
    return eye, target


def _walk(rng, count, baseline, nearest, distance):
    step = min(rng.uniform(0.5, 2.0) * baseline, 0.35 * nearest)
    forward = step * (np.arange(count) - 0.3 * count)
    sway = np.cumsum(rng.normal(0, 0.3, (count, 2)), axis=0) * [1, 0.4]
    sway -= sway.mean(axis=0)
    eye = np.concatenate([sway * baseline, forward[:, None]], axis=-1)
    target = eye + [0, 0, distance] + np.cumsum(rng.normal(0, 0.012, (count, 3)), axis=0) * distance
    return eye, target
