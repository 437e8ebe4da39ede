"""Distances between a mesh and the true surface, as point sets: chamfer, and DTU's protocol.

DTU (Jensen et al. 2014) as published NeuS-type tables take it: points on the mesh every 0.2 mm,
thinned to that distance; of the mesh, those in the observed volume (ObsMask) are compared with all
true points, and the true points above the table's plane with those of the mesh in the box;
distances of 20 mm and more do not count; the mean of both directions. Needs SciPy
(`pip install viewsynth-jax[mesh]`).
"""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import numpy as np

from nvs_common.errors import InputError
from vqnerf_jax.mesh import Mesh

# DTU's, in millimetres.
DENSITY, LARGEST, MARGIN = 0.2, 20.0, 60.0


class Chamfer(NamedTuple):
    """Mean distances in the units of the points.

    Attributes:
      accuracy: from the mesh to the truth.
      completeness: from the truth to the mesh.
    """

    accuracy: float
    completeness: float

    @property
    def mean(self) -> float:
        """The mean of both."""
        return (self.accuracy + self.completeness) / 2


class Observed(NamedTuple):
    """Which part of a DTU scan counts.

    Attributes:
      mask: [x, y, z] bool, voxels that were seen.
      low: [3] mm, position of the first voxel.
      high: [3] mm, the other end of the box.
      resolution: mm of a voxel.
      plane: [4] of the table: a point p is above where plane . (p, 1) > 0.
    """

    mask: np.ndarray
    low: np.ndarray
    high: np.ndarray
    resolution: float
    plane: np.ndarray


def sample_area(mesh: Mesh, count: int, rng: np.random.Generator) -> np.ndarray:
    """Points [count, 3] that are uniform on a mesh."""
    a, b, c = np.moveaxis(mesh.vertices[mesh.faces], 1, 0)
    area = 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=-1)
    if not area.sum() > 0:
        raise InputError("chamfer: the mesh has no area.")
    face = rng.choice(len(area), count, p=area / area.sum())
    u, v = rng.uniform(size=(2, count, 1))
    # The square's far half is folded onto the triangle.
    over = u + v > 1
    u, v = np.where(over, 1 - u, u), np.where(over, 1 - v, v)
    return a[face] + u * (b - a)[face] + v * (c - a)[face]


def distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance [n] of each point [n, 3] to the nearest of others [m, 3]."""
    return _tree(others).query(points, workers=-1)[0]


def chamfer(points: np.ndarray, truth: np.ndarray) -> Chamfer:
    """Mean distances between two sets of points [n, 3] and [m, 3]."""
    accuracy, completeness = distances(points, truth).mean(), distances(truth, points).mean()
    return Chamfer(float(accuracy), float(completeness))


def dtu(mesh: Mesh, truth: np.ndarray, seen: Observed, rng: np.random.Generator) -> Chamfer:
    """DTU's chamfer distance in mm of a mesh in the units of the scan.

    Args:
      mesh: in mm, the frame of the true points.
      truth: [n, 3] of the structured-light scan.
      seen: what counts.
      rng: draws points on the mesh.

    Raises:
      InputError: no point of the mesh or of the truth counts, as when units are mixed up.
    """
    a, b, c = np.moveaxis(mesh.vertices[mesh.faces], 1, 0)
    area = 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=-1).sum()
    # Twice as many as a hexagonal lattice of that distance has; thinning removes the others.
    count = max(1, int(4 * area / DENSITY**2))
    points = thin(sample_area(mesh, count, rng), DENSITY)
    points = points[_in_box(points, seen)]
    observed = points[_observed(points, seen)]
    above = truth[np.concatenate([truth, np.ones_like(truth[:, :1])], axis=-1) @ seen.plane > 0]
    near = []
    for ours, theirs in ((observed, truth), (above, points)):
        found = distances(ours, theirs) if len(ours) and len(theirs) else np.zeros(0)
        near.append(found[found < LARGEST])
    if not all(map(len, near)):
        raise InputError(
            f"chamfer: {len(observed)} points of the mesh lie in the observed volume, {len(above)} "
            f"true ones above the plane, and none within {LARGEST:g} mm of the others; is the mesh "
            "in the millimetres of the scan (launch/mesh.py --scene)?"
        )
    return Chamfer(*(float(found.mean()) for found in near))


def thin(points: np.ndarray, least: float) -> np.ndarray:
    """Points [m, 3] of [n, 3] of which no two are nearer than `least`; earlier ones stay."""
    near = _tree(points).query_ball_point(points, least, workers=-1)
    keep = np.ones(len(points), bool)
    for i, neighbours in enumerate(near):
        if keep[i]:
            keep[[j for j in neighbours if j > i]] = False
    return points[keep]


def read_observed(folder: str | pathlib.Path, scan: int) -> Observed:
    """Reads ObsMask/ObsMaskN_10.mat and ObsMask/PlaneN.mat of DTU's evaluation data.

    Raises:
      InputError: a file is missing, unreadable or without its arrays.
    """
    folder = pathlib.Path(folder) / "ObsMask"
    seen = _matlab(folder / f"ObsMask{scan}_10.mat", ("ObsMask", "BB", "Res"))
    plane = _matlab(folder / f"Plane{scan}.mat", ("P",))["P"].reshape(-1)
    if plane.shape != (4,) or seen["BB"].shape != (2, 3) or seen["ObsMask"].ndim != 3:
        raise InputError(f"{folder}: the arrays of scan {scan} have unexpected shapes.")
    low, high = seen["BB"].astype(np.float64)
    return Observed(seen["ObsMask"] > 0, low, high, float(seen["Res"].reshape(-1)[0]), plane)


def _in_box(points: np.ndarray, seen: Observed) -> np.ndarray:
    """Whether points [n, 3] lie in the box, which is widened as the published code does."""
    return np.all((points >= seen.low - MARGIN) & (points < seen.high + 2 * MARGIN), axis=-1)


def _observed(points: np.ndarray, seen: Observed) -> np.ndarray:
    """Whether points [n, 3] lie in a voxel that was seen."""
    voxel = np.rint((points - seen.low) / seen.resolution).astype(np.int64)
    inside = np.all((voxel >= 0) & (voxel < seen.mask.shape), axis=-1)
    voxel = np.where(inside[:, None], voxel, 0)
    return inside & seen.mask[tuple(voxel.T)]


def _tree(points: np.ndarray) -> Any:
    try:
        from scipy import spatial
    except ImportError as e:
        raise InputError("chamfer needs SciPy: pip install 'viewsynth-jax[mesh]'.") from e
    return spatial.KDTree(points)


def _matlab(path: pathlib.Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        from scipy import io
    except ImportError as e:
        raise InputError("DTU's files need SciPy: pip install 'viewsynth-jax[mesh]'.") from e
    try:
        found = io.loadmat(path, variable_names=names)
    except (OSError, ValueError, NotImplementedError, TypeError) as e:
        raise InputError(f"{path}: cannot be read ({e}); give DTU's evaluation data.") from e
    if missing := [name for name in names if name not in found]:
        raise InputError(f"{path}: holds no {', '.join(missing)}.")
    return {name: np.asarray(found[name]) for name in names}
