"""Near and far z-depths of cameras, from sparse points or from the cameras alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from nvs_common.data import sparse_points
from nvs_common.data.scene_formats import Frame
from nvs_common.data.sparse_points import SparsePoints

FROM_POINTS = f"sparse points ({sparse_points.RULE})"
FROM_MEETING = "camera geometry (x 0.5 and x 8 of the depth where the viewing axes meet)"
FROM_SPREAD = "camera geometry (x 0.1 and x 10 of the spread of the camera centres)"
FROM_IMAGES = f"corners triangulated from the images ({sparse_points.RULE})"
FROM_NOTHING = "no information (all cameras share one centre): 0.1 to 100"


def with_points(
    frames: Sequence[Frame], points: SparsePoints
) -> tuple[tuple[Frame, ...], str | None]:
    """The frames [n] with near and far `from_points`, and the rule's name.

    Where there are too few points the frames are as they were and the name is None.
    """
    limits = from_points(frames, points)
    if limits is None:
        return tuple(frames), None
    bounded = (
        dataclasses.replace(frame, near=float(near), far=float(far))
        for frame, (near, far) in zip(frames, limits, strict=True)
    )
    return tuple(bounded), FROM_POINTS


def from_points(frames: Sequence[Frame], points: SparsePoints) -> np.ndarray | None:
    """Near and far of each frame [n, 2], or None where no frame sees enough points.

    Uses the points that a frame observes; if they are fewer than 10, those in front of it and
    inside its image; if these are too few as well, the nearest near and farthest far of the
    other frames.
    """
    limits = np.full((len(frames), 2), np.nan)
    for i, frame in enumerate(frames):
        found = sparse_points.depth_range(_visible_depths(frame, points, i))
        if found is not None:
            limits[i] = found
    if np.isnan(limits).all():
        return None
    empty = np.isnan(limits[:, 0])
    limits[empty] = np.nanmin(limits[:, 0]), np.nanmax(limits[:, 1])
    return limits


def _visible_depths(frame: Frame, points: SparsePoints, index: int) -> np.ndarray:
    """Positive z-depths of the points that frame `index` sees."""
    if points.seen is not None:
        observed = points.positions[points.seen[index]]
        depth = sparse_points.z_depths(observed, frame.world_from_cam)
        if len(depth) >= sparse_points.MIN_POINTS:
            return depth
    return sparse_points.z_depths_in_image(
        points.positions, frame.world_from_cam, frame.intrinsics, (frame.height, frame.width)
    )


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
