"""How near a reconstructed surface or solid is to the true one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.spatial

from nvs_common.errors import InputError


class Chamfer(NamedTuple):
    """Mean distances, in the units of the points.

    Attributes:
      accuracy: from the reconstructed points to the nearest true ones.
      completeness: from the true points to the nearest reconstructed ones.
    """

    accuracy: float
    completeness: float

    @property
    def mean(self) -> float:
        """The Chamfer distance: half the sum of both, of distances that are not squared."""
        return (self.accuracy + self.completeness) / 2


def chamfer(points: np.ndarray, truth: np.ndarray) -> Chamfer:
    """Distances between two clouds of points, [n, 3] and [m, 3].

    Raises:
      InputError: a cloud without points, of another shape or with values that are not finite.
    """
    for name, cloud in (("points", points), ("truth", truth)):
        if np.ndim(cloud) != 2 or np.shape(cloud)[1] != 3 or not len(cloud):
            raise InputError(f"{name} has shape {np.shape(cloud)}; expected [n, 3] with n > 0.")
        if not np.isfinite(cloud).all():
            raise InputError(f"{name} holds coordinates that are not finite.")
    there, _ = scipy.spatial.KDTree(truth).query(points)
    back, _ = scipy.spatial.KDTree(points).query(truth)
    return Chamfer(float(np.mean(there)), float(np.mean(back)))


def thinned(points: np.ndarray, cell: float) -> np.ndarray:
    """One point [m, 3], the mean, of each cell of a grid that holds some of points [n, 3].

    Clouds from many views are dense where many look; thinned, each part of a surface counts once.
    """
    cells = np.floor(np.asarray(points) / cell).astype(np.int64)
    _, of, count = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    of = of.reshape(-1)
    sums = np.stack([np.bincount(of, points[:, axis]) for axis in range(3)], axis=-1)
    return sums / count[:, None]


def volume_iou(
    inside: Callable[[np.ndarray], np.ndarray],
    truth: Callable[[np.ndarray], np.ndarray],
    *,
    half: float,
    resolution: int = 64,
) -> float:
    """Volume of the intersection of two solids over that of their union.

    Args:
      inside: points [n, 3] -> bool [n].
      truth: likewise.
      half: half the side of the cube about the origin in which they are compared.
      resolution: points along each side of it, at the centres of equal cells.

    Raises:
      InputError: neither solid has a point in the cube.
    """
    axis = half * (2 * (np.arange(resolution) + 0.5) / resolution - 1)
    both = either = 0
    for x in axis:
        y, z = np.meshgrid(axis, axis, indexing="ij")
        points = np.stack([np.full(y.size, x), y.ravel(), z.ravel()], axis=-1)
        first, second = np.asarray(inside(points), bool), np.asarray(truth(points), bool)
        both += int(np.sum(first & second))
        either += int(np.sum(first | second))
    if not either:
        raise InputError(f"neither solid has a point in the cube of half side {half}.")
    return both / either
