"""Writes the surface that a trained VQ-NeRF has learned.

    python launch/mesh.py --workdir=runs/a --out=mesh.ply [--resolution=512] [--scene=PATH]

The mesh (.ply, .obj or .glb) is in the units of the scene's cameras; with --scene in those of its
files, which differ where a layout brings scenes into the unit sphere (NeuS's scale_mat, DTU). With
--scene, cameras that are inside the surface are reported before anything is written. --picture
draws the mesh from four sides. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import pathlib
import sys

# launch/ and configs/ belong to the checkout and are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
from absl import flags

from launch import cli, mesh_picture, trained
from nvs_common import outputs
from nvs_common.data import scenes
from nvs_common.errors import InputError
from vqnerf_jax import inspection, mesh, task

_SOURCE = trained.define_source()
_OUT = flags.DEFINE_string("out", None, "File to write: .ply, .obj or .glb.", required=True)
_RESOLUTION = flags.DEFINE_integer("resolution", 512, "Cells along each axis.", lower_bound=8)
_SCENE = flags.DEFINE_string("scene", None, "Scene: its cameras are checked, its units used.")
_PICTURE = flags.DEFINE_string("picture", "", "Also draws the mesh, to this .png file.")


def main(_) -> int:
    """Extracts and writes the mesh; returns the exit code."""
    outputs.check_file(_OUT.value, mesh.SUFFIXES)
    if _PICTURE.value:
        outputs.check_file(_PICTURE.value, (".png",))
    model = trained.load(_SOURCE)
    if model.config.system != "vqnerf":
        raise InputError(f"{model.path}: {model.config.system} has no surface; pass a VQ-NeRF run.")
    ours, _ = task.make_model(model.config.model)
    params = model.variables["params"]
    scene = None
    if _SCENE.value:
        scene = scenes.load_scene(_SCENE.value)
        inspection.check_cameras(ours, params, scene.cameras, scene.names)
    found = mesh.extract(jax.jit(inspection.distances(ours, params)), _RESOLUTION.value)
    found = mesh.in_world(found, ours.center, ours.radius)
    if _PICTURE.value:
        outputs.write_image(_PICTURE.value, mesh_picture.four_sides(found))
    if scene is not None and scene.world_from_scene is not None:
        found = mesh.moved(found, scene.world_from_scene)
    mesh.write(_OUT.value, found)
    print(f"{_OUT.value}: {len(found.vertices)} vertices, {len(found.faces)} triangles")
    return 0


if __name__ == "__main__":
    cli.run(main)
