"""Corners matched between photographs, and the depths they triangulate to under given poses.

Small on purpose: Harris corners, normalised correlation of upright patches, mutual best. Good
for neighbouring frames of one camera walk; not a feature matcher for wide baselines.
"""

from __future__ import annotations

import numpy as np

from nvs_common.types import Cameras

# Patches are (2 RADIUS + 1)^2; matches correlate at least this well.
RADIUS = 7
MIN_CORRELATION = 0.8
MAX_CORNERS = 700
# Largest ratio of the best to the second best (1 - correlation).
MAX_AMBIGUITY = 0.5


def corners(grey: np.ndarray) -> np.ndarray:
    """The strongest Harris corners of an image [h, w], as pixels [n, 2] at pixel centres."""
    dy, dx = np.gradient(_box(grey.astype(np.float64), 1))
    xx, yy, xy = _box(dx * dx, 2), _box(dy * dy, 2), _box(dx * dy, 2)
    response = xx * yy - xy**2 - 0.05 * (xx + yy) ** 2
    height, width = grey.shape
    margin = RADIUS + 1
    inner = np.zeros_like(response)
    inner[margin:-margin, margin:-margin] = response[margin:-margin, margin:-margin]
    padded = np.pad(inner, 2)
    window = [padded[i : i + height, j : j + width] for i in range(5) for j in range(5)]
    peaks = np.flatnonzero((inner > 0) & (inner == np.max(window, axis=0)))
    best = peaks[np.argsort(-inner.flat[peaks], kind="stable")][:MAX_CORNERS]
    return np.stack([best % width, best // width], axis=-1) + 0.5


def match(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of two grey images [h, w] that are each other's best match, [k, 2] and [k, 2]."""
    points, others = corners(first), corners(second)
    if not len(points) or not len(others):
        return np.zeros((0, 2)), np.zeros((0, 2))
    score = _patches(first, points) @ _patches(second, others).T
    rows, best = np.arange(len(points)), score.argmax(axis=1)
    top = score[rows, best]
    good = (score.argmax(axis=0)[best] == rows) & (top > MIN_CORRELATION)
    # The second best must be clearly worse, or repeated texture (windows, cobbles) misleads.
    score[rows, best] = -1
    good &= 1 - top < MAX_AMBIGUITY * (1 - score.max(axis=1))
    return points[good], others[best[good]]


def sampson(
    cameras: Cameras, i: int, j: int, points_i: np.ndarray, points_j: np.ndarray
) -> np.ndarray:
    """First-order epipolar errors [k] in pixels of matches [k, 2] between cameras i and j."""
    relative = np.linalg.inv(cameras.world_from_cam[j]) @ cameras.world_from_cam[i]
    x, y, z = relative[:3, 3]
    essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ relative[:3, :3]
    inverse_i, inverse_j = (np.linalg.inv(_calibration(cameras, k)) for k in (i, j))
    fundamental = inverse_j.T @ essential @ inverse_i
    a, b = _homogeneous(points_i), _homogeneous(points_j)
    lines_j, lines_i = a @ fundamental.T, b @ fundamental
    slope = np.sum(lines_j[:, :2] ** 2, axis=1) + np.sum(lines_i[:, :2] ** 2, axis=1)
    # Coincident cameras have a zero fundamental matrix; their matches say nothing (error 0).
    return np.abs(np.sum(b * lines_j, axis=1)) / np.sqrt(np.maximum(slope, 1e-300))


def triangulate(
    cameras: Cameras, i: int, j: int, points_i: np.ndarray, points_j: np.ndarray
) -> np.ndarray:
    """World points [k, 3] nearest to the two rays of each match [k, 2] (midpoint); NaN where the
    rays are parallel or meet behind a camera."""
    rays = []
    for k, points in ((i, points_i), (j, points_j)):
        local = _homogeneous(points) @ np.linalg.inv(_calibration(cameras, k)).T
        world = local @ cameras.world_from_cam[k, :3, :3].T
        rays.append(world / np.linalg.norm(world, axis=1, keepdims=True))
    a, b = rays
    origin_a, origin_b = cameras.world_from_cam[[i, j], :3, 3]
    offset, cosine = origin_b - origin_a, np.sum(a * b, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        along_a = (a @ offset - cosine * (b @ offset)) / (1 - cosine**2)
        along_b = (cosine * (a @ offset) - b @ offset) / (1 - cosine**2)
        middle = (origin_a + along_a[:, None] * a + origin_b + along_b[:, None] * b) / 2
    middle[~((along_a > 0) & (along_b > 0) & np.isfinite(along_a + along_b))] = np.nan
    return middle


def _box(image: np.ndarray, radius: int) -> np.ndarray:
    """Mean over (2 radius + 1)^2 windows of [h, w], edges repeated."""
    padded = np.pad(image, radius, mode="edge")
    total = np.pad(padded.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    n = 2 * radius + 1
    return (total[n:, n:] - total[:-n, n:] - total[n:, :-n] + total[:-n, :-n]) / n**2


def _patches(grey: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Patches around corners [n, *] with zero mean and unit length."""
    offset = np.arange(-RADIUS, RADIUS + 1)
    x, y = (points - 0.5).astype(int).T
    patch = grey[y[:, None, None] + offset[:, None], x[:, None, None] + offset]
    flat = patch.reshape(len(points), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)


def _calibration(cameras: Cameras, k: int) -> np.ndarray:
    fx, fy, cx, cy = cameras.intrinsics[k]
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def _homogeneous(points: np.ndarray) -> np.ndarray:
    return np.concatenate([points, np.ones_like(points[:, :1])], axis=1)
