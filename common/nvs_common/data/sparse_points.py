"""Points of a sparse reconstruction, and the range of depths at which a camera sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

# Fewer points than this say little about their 1st and 99th percentile.
MIN_POINTS = 10
RULE = "1st to 99th percentile, x 0.9 and x 1.1"


@dataclasses.dataclass(frozen=True)
class SparsePoints:
    """Points of a scene of n views.

    Attributes:
      positions: [p, 3] in the world.
      seen: for each view the indices [*] of the points it observes, perhaps none; None where
        the files do not say.
    """

    positions: np.ndarray
    seen: tuple[np.ndarray, ...] | None = None

    def of(self, views: Sequence[int] | np.ndarray) -> np.ndarray:
        """The points [k, 3] that any of some views observes; all where no list says so."""
        if self.seen is None:
            return self.positions
        indices = np.unique(np.concatenate([self.seen[int(view)] for view in views]))
        return self.positions[indices] if len(indices) else self.positions

    def reordered(self, order: Sequence[int]) -> SparsePoints:
        """The points of a scene whose view i is this one's view order[i]."""
        if self.seen is None:
            return self
        return dataclasses.replace(self, seen=tuple(self.seen[i] for i in order))


def z_depths(points: np.ndarray, world_from_cam: np.ndarray) -> np.ndarray:
    """z-depths [k] of those of the points [p, 3] that lie in front of a camera [4, 4]."""
    depth = (points - world_from_cam[:3, 3]) @ world_from_cam[:3, 2]
    return depth[depth > 0]


def z_depths_in_image(
    points: np.ndarray,
    world_from_cam: np.ndarray,
    intrinsics: np.ndarray,
    size: tuple[int, int],
) -> np.ndarray:
    """z-depths [k] of those of the points [p, 3] that fall into a camera's image.

    Args:
      points: in the world.
      world_from_cam: [4, 4].
      intrinsics: [4] fx, fy, cx, cy in pixels.
      size: height and width in pixels.
    """
    local = (points - world_from_cam[:3, 3]) @ world_from_cam[:3, :3]
    local = local[local[:, 2] > 0]
    uv = local[:, :2] / local[:, 2:] * intrinsics[:2] + intrinsics[2:]
    return local[np.all((uv >= 0) & (uv <= [size[1], size[0]]), axis=-1), 2]


def depth_range(depth: np.ndarray) -> tuple[float, float] | None:
    """Near and far by `RULE` of z-depths [k]; None where they are fewer than MIN_POINTS."""
    if len(depth) < MIN_POINTS:
        return None
    near, far = np.percentile(depth, [1, 99])
    return near * 0.9, far * 1.1
