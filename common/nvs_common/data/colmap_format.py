"""COLMAP scenes: where the model and the images lie, and near and far from its points."""

from __future__ import annotations

import pathlib

import numpy as np

from nvs_common.data import array_formats, colmap, depth_bounds, scene_files, scene_formats
from nvs_common.data.scene_formats import Loaded, Options, Posed
from nvs_common.data.sparse_points import SparsePoints
from nvs_common.errors import InputError

IMAGE_FOLDERS = (*array_formats.IMAGE_FOLDERS, "input")


def find_model(folder: pathlib.Path) -> pathlib.Path | None:
    """The sparse model of a scene folder: sparse/0, sparse, the folder itself, or the first
    other folder in sparse by name."""
    sparse = folder / "sparse"
    tries = [sparse / "0", sparse, folder]
    if sparse.is_dir():
        tries += [path for path in scene_files.entries(sparse) if path.is_dir()]
    return next((path for path in tries if colmap.has_model(path)), None)


def find_beside(folder: pathlib.Path) -> pathlib.Path | None:
    """The model in `colmap` beside the images of a scene folder, as nerfstudio leaves it."""
    if not any((folder / name).is_dir() for name in IMAGE_FOLDERS):
        return None  # a folder of scenes, one of which has the name `colmap`
    return find_model(folder / "colmap")


def scene_root(model: pathlib.Path) -> pathlib.Path:
    """The folder that holds the images of a model folder such as x/sparse/0."""
    model = model.absolute()
    if model.name == "sparse":
        root = model.parent
    elif model.parent.name == "sparse":
        root = model.parent.parent
    else:
        root = model
    # nerfstudio keeps the model in x/colmap/sparse/0 and the images in x/images.
    if root.name == "colmap" and not any((root / name).is_dir() for name in IMAGE_FOLDERS):
        root = root.parent
    return root


def read(model_folder: pathlib.Path, options: Options) -> Loaded:
    """Reads a model and the images of its scene: images, else images_2, _4, _8, else input.

    Intrinsics follow the stored images' size. Near and far come from the points where the model
    has enough of them.
    """
    options.refuse("COLMAP", "rig")
    model = colmap.read_model(model_folder)
    root = scene_root(model_folder)
    folder = options.image_folder
    if folder is not None or any((root / name).is_dir() for name in IMAGE_FOLDERS):
        found = array_formats.image_folder(root, folder, IMAGE_FOLDERS)
        prefix = found.relative_to(root).as_posix() + "/"
    else:
        prefix = ""
    posed, seen = [], {}
    for image in model.images:
        camera = model.cameras[image.camera]
        declared = (camera.height, camera.width)
        lens = scene_formats.pixel_lens(camera.intrinsics, declared)
        pose = scene_formats.invert(image.cam_from_world)
        item = Posed(prefix + image.name, pose, lens, camera.distortion, declared=declared)
        posed.append(item)
        name = scene_files.inside(root, prefix + image.name, str(model_folder))
        seen[name.relative_to(root).as_posix()] = image.seen
    if not posed:
        raise InputError(f"{model_folder}: the scene is empty: the model has no images.")
    frames = scene_formats.build_frames(posed, root, model_folder, strict=options.strict)
    names = [frame.path.relative_to(root).as_posix() for frame in frames]
    observed = tuple(seen.get(name, np.zeros(0, np.int64)) for name in names)
    points = SparsePoints(model.points, observed)
    bounded, bounds = depth_bounds.with_points(frames, points)
    return Loaded(bounded, "COLMAP", root, bounds, points=None if bounds is None else points)
