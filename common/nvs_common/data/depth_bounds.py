"""Near and far z-depths of cameras, from sparse points or from the cameras alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from nvs_common.data.scene_formats import Frame

FROM_POINTS = "sparse points (1st to 99th percentile, x 0.9 and x 1.1)"
FROM_MEETING = "camera geometry (x 0.5 and x 8 of the depth where the viewing axes meet)"
FROM_SPREAD = "camera geometry (x 0.1 and x 10 of the spread of the camera centres)"
FROM_IMAGES = "corners triangulated from the images (1st to 99th percentile, x 0.9 and x 1.1)"
FROM_NOTHING = "no information (all cameras share one centre): 0.1 to 100"
# Fewer points than this say little about their 1st and 99th percentile.
MIN_POINTS = 10


def with_points(
    frames: Sequence[Frame], points: np.ndarray, seen: Sequence[np.ndarray] | None = None
) -> tuple[tuple[Frame, ...], str | None]:
    """The frames with near and far `from_points`, and the rule's name; None if there are too few.

    Args:
      frames: n cameras.
      points: [p, 3] in the world.
      seen: for each frame the indices of the points it observes; None where nobody knows.
    """
    seen = [np.zeros(0, np.int64)] * len(frames) if seen is None else seen
    limits = from_points(frames, points, seen)
    if limits is None:
        return tuple(frames), None
    bounded = (
        dataclasses.replace(frame, near=float(near), far=float(far))
        for frame, (near, far) in zip(frames, limits, strict=True)
    )
    return tuple(bounded), FROM_POINTS


def from_points(
    frames: Sequence[Frame], points: np.ndarray, seen: Sequence[np.ndarray]
) -> np.ndarray | None:
    """Near and far of each frame [n, 2] from points [p, 3], or None where no frame has enough.

    Uses the points that a frame observes; if they are fewer than 10, those in front of it and
    inside its image; if these are too few as well, the nearest near and farthest far of the
    other frames.

    Args:
      frames: n cameras.
      points: in the world.
      seen: for each frame the indices [*] of the points it observes.
    """
    limits = np.full((len(frames), 2), np.nan)
    for i, frame in enumerate(frames):
        depth = _visible_depths(frame, points, seen[i])
        if len(depth) >= MIN_POINTS:
            near, far = np.percentile(depth, [1, 99])
            limits[i] = near * 0.9, far * 1.1
    if np.isnan(limits).all():
        return None
    empty = np.isnan(limits[:, 0])
    limits[empty] = np.nanmin(limits[:, 0]), np.nanmax(limits[:, 1])
    return limits


def _visible_depths(frame: Frame, points: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Positive z-depths of the points a frame sees."""
    rotation, centre = frame.world_from_cam[:3, :3], frame.world_from_cam[:3, 3]
    depth = (points[seen] - centre) @ rotation[:, 2]
    depth = depth[depth > 0]
    if len(depth) >= MIN_POINTS or not len(points):
        return depth
    local = (points - centre) @ rotation
    local = local[local[:, 2] > 0]
    uv = local[:, :2] / local[:, 2:] * frame.intrinsics[:2] + frame.intrinsics[2:]
    return local[np.all((uv >= 0) & (uv <= [frame.width, frame.height]), axis=-1), 2]


def from_cameras(frames: Sequence[Frame]) -> tuple[np.ndarray, str]:
    """Near and far of each frame [n, 2] from the cameras alone, and the name of the rule.

    Where the viewing axes meet (cameras around an object): from a half to eight times the
    z-depth of their least-squares meeting point, which keeps the object in the nearer half of
    the disparities and leaves room for a background. Otherwise: from a tenth to ten times the
    root-mean-square distance of the centres from their mean. That covers forward walks and
    sideways sweeps, but is wide: `scenes.measure_depths` looks at the images instead. A scene
    whose cameras share one centre has no scale at all and gets 0.1 to 100.
    """
    poses = np.stack([frame.world_from_cam for frame in frames])
    centres, axes = poses[:, :3, 3], poses[:, :3, 2]
    depth = _meeting_depths(centres, axes)
    if depth is not None:
        return depth[:, None] * np.array([0.5, 8.0]), FROM_MEETING
    spread = np.sqrt(np.mean(np.sum((centres - centres.mean(axis=0)) ** 2, axis=-1)))
    if spread < 1e-9 * max(1.0, float(np.max(np.abs(centres)))):
        return np.tile([0.1, 100.0], (len(frames), 1)), FROM_NOTHING
    return np.tile([0.1 * spread, 10 * spread], (len(frames), 1)), FROM_SPREAD


def _meeting_depths(centres: np.ndarray, axes: np.ndarray) -> np.ndarray | None:
    """z-depths [n] of the point nearest to all viewing axes, or None where they do not meet."""
    across = np.eye(3) - axes[:, :, None] * axes[:, None, :]
    normal = across.mean(axis=0)
    # The smallest eigenvalue is the mean squared sine between the axes and their common direction.
    if np.linalg.eigvalsh(normal)[0] < np.sin(np.radians(0.5)) ** 2:
        return None
    point = np.linalg.solve(normal, np.einsum("nij,nj->i", across, centres) / len(centres))
    depth = np.sum((point - centres) * axes, axis=-1)
    miss = np.linalg.norm(np.einsum("nij,nj->ni", across, point - centres), axis=-1)
    middle = np.median(depth)
    if middle <= 0 or np.mean(depth > 0) < 0.9 or np.median(miss) > 0.3 * middle:
        return None
    # A few cameras beside or behind the point take the nearest plausible depth.
    return np.maximum(depth, 0.1 * middle)
