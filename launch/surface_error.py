"""Compares a mesh with the true surface: chamfer distance.

    python launch/surface_error.py --mesh=mesh.ply --object=3            a procedural object
    python launch/surface_error.py --mesh=mesh.ply --truth=points.ply    points, or another mesh
    python launch/surface_error.py --mesh=mesh.ply --dtu=SampleSet/MVS_Data --scan=24

The mesh is in world units, as launch/mesh.py writes it. With --dtu the protocol is DTU's, in
millimetres (observed volume, plane of the table, 20 mm), and true points are those of
Points/stl/stl024_total.ply. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import pathlib
import sys

# launch/ and configs/ belong to the checkout and are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
from absl import flags

from launch import cli
from nvs_common.data import point_cloud, procedural_object
from nvs_common.errors import InputError
from vqnerf_jax import chamfer, mesh

_MESH = flags.DEFINE_string("mesh", None, "The mesh: .ply, .obj or .glb.", required=True)
_OBJECT = flags.DEFINE_integer("object", None, "Number of a procedural object (data.object).")
_TRUTH = flags.DEFINE_string("truth", "", "File of true points (.ply) or of a true mesh.")
_DTU = flags.DEFINE_string("dtu", "", "DTU's evaluation data: the folder of ObsMask and Points.")
_SCAN = flags.DEFINE_integer("scan", None, "Number of the DTU scan.")
_POINTS = flags.DEFINE_integer("points", 100_000, "Points on each surface.", lower_bound=1)


def main(_) -> int:
    """Compares; returns the exit code."""
    given = [_OBJECT.value is not None, bool(_TRUTH.value), bool(_DTU.value)]
    scan = _SCAN.value
    if sum(given) != 1 or bool(_DTU.value) != (scan is not None):
        raise InputError("pass one of --object=N, --truth=FILE, --dtu=FOLDER with --scan=N.")
    found = mesh.read(_MESH.value)
    rng = np.random.default_rng(0)
    if _DTU.value and scan is not None:
        root = pathlib.Path(_DTU.value)
        truth = point_cloud.read_ply(root / "Points" / "stl" / f"stl{scan:03d}_total.ply")
        seen = chamfer.read_observed(root, scan)
        result = chamfer.dtu(found, truth, seen, rng)
    else:
        points = chamfer.sample_area(found, _POINTS.value, rng)
        result = chamfer.chamfer(points, _true_points(rng))
    print(
        f"chamfer {result.mean:.5f} (mesh to truth {result.accuracy:.5f}, truth to mesh "
        f"{result.completeness:.5f})"
    )
    return 0


def _true_points(rng: np.random.Generator) -> np.ndarray:
    """Points [n, 3] on the true surface."""
    if _OBJECT.value is not None:
        return procedural_object.orbit(_OBJECT.value, 8, 8, 1).surface(_POINTS.value, rng)
    try:
        return chamfer.sample_area(mesh.read(_TRUTH.value), _POINTS.value, rng)
    except mesh.NoTriangles:
        return point_cloud.read_ply(pathlib.Path(_TRUTH.value))


if __name__ == "__main__":
    cli.run(main)
