"""Renders of single objects, in the layouts that multi-view diffusion models are trained on.

    meta.pkl                       SyncDreamer: 000.png ..., intrinsics, poses of all views
    intrinsics.npy, pose/*.npy     OpenLRM: rgba/000.png ..., OpenGL axes
    pose/*.txt                     LGM: rgb/000.png ..., 16 numbers, one field of view for all

Objects fit the cube of side one about the origin, and near and far follow from that. Depth, where
it is rendered too, lies beside the images, see `depth_maps`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np

from nvs_common import array_pickles
from nvs_common.data import images, scene_files, scene_formats
from nvs_common.data.scene_formats import Loaded, Options, Posed
from nvs_common.errors import InputError

META, POSES, INTRINSICS = "meta.pkl", "pose", "intrinsics.npy"
BOUNDS = "the cube of side one about the origin"
# Half the cube's diagonal.
REACH = 0.87
# Field of view along the height that LGM's renders have, degrees.
LGM_FOV = 49.1
# Side of the images that SyncDreamer's intrinsics are of.
SYNCDREAMER_SIDE = 256
_NEAREST = 0.05


def recognise(path: pathlib.Path) -> Callable[[Options], Loaded] | None:
    """The reader of a folder of one object's renders; None where it is of none of the layouts."""
    if (path / META).is_file():
        return lambda options: read_syncdreamer(path / META, options)
    if not (path / POSES).is_dir():
        return None
    if (path / INTRINSICS).is_file() and (path / "rgba").is_dir():
        return lambda options: read_openlrm(path, options)
    if (path / "rgb").is_dir():
        return lambda options: read_lgm(path, options)
    return None


def read_syncdreamer(path: pathlib.Path, options: Options) -> Loaded:
    """SyncDreamer's meta.pkl: intrinsics, azimuths, elevations, distances and cam_from_world.

    Raises:
      InputError: not such a file, or other numbers of views in it and beside it.
    """
    options.refuse("SyncDreamer", "rig", "image_folder")
    content = array_pickles.read(path)
    if not isinstance(content, list | tuple) or len(content) != 5:
        raise InputError(
            f"{path}: expected a list of five: intrinsics, azimuths, elevations, distances, poses."
        )
    matrix = _numbers(content[0], (3, 3), f"{path}: the intrinsics")
    count = len(content[4]) if isinstance(content[4], np.ndarray | list) else 0
    poses = _numbers(content[4], (count, 3, 4), f"{path}: the poses")
    k = matrix[[0, 1, 0, 1], [0, 1, 2, 2]]
    lens = scene_formats.pixel_lens(k, (SYNCDREAMER_SIDE, SYNCDREAMER_SIDE))
    files = _images(path.parent, count, path)
    posed = [
        _posed(file.name, scene_formats.invert(pose), lens)
        for file, pose in zip(files, poses, strict=True)
    ]
    return _loaded(posed, path.parent, path, "SyncDreamer", options)


def read_openlrm(path: pathlib.Path, options: Options) -> Loaded:
    """OpenLRM's renders: pose/*.npy [3, 4] world_from_cam with OpenGL axes, rgba/*.png.

    Raises:
      InputError: a pose or the intrinsics of another shape, an image that has no pose.
    """
    options.refuse("OpenLRM", "rig", "image_folder")
    file = path / INTRINSICS
    (fx, fy), (cx, cy), (w, h) = _numbers(scene_files.read_npy(file), (3, 2), f"{file}:")
    if not (w >= 1 and h >= 1):
        raise InputError(f"{file}: images of {w:g} x {h:g}; expected the image size in row 3.")
    lens = scene_formats.pixel_lens(np.array([fx, fy, cx, cy]), (round(h), round(w)))
    posed = []
    for name, image in _by_pose(path, ".npy", "rgba"):
        where = f"{name}: the pose"
        pose = np.vstack([_numbers(scene_files.read_npy(name), (3, 4), where), [0, 0, 0, 1]])
        posed.append(_posed(image, pose @ scene_formats.OPENGL, lens))
    return _loaded(posed, path, path / POSES, "OpenLRM", options)


def read_lgm(path: pathlib.Path, options: Options) -> Loaded:
    """LGM's renders: pose/*.txt, 16 numbers of world_from_cam with OpenCV axes, rgb/*.png.

    Raises:
      InputError: a pose that is not 16 numbers, an image that has no pose.
    """
    options.refuse("LGM", "rig", "image_folder")
    angle = np.radians(LGM_FOV)
    posed = []
    for name, image in _by_pose(path, ".txt", "rgb"):
        try:
            values = [float(text) for text in scene_files.read_text(name).split()]
        except ValueError as error:
            raise InputError(f"{name}: {error}; expected 16 numbers.") from error
        pose = _numbers(np.array(values), (16,), f"{name}: the pose").reshape(4, 4)

        def lens(height: int, width: int) -> np.ndarray:
            focal = 0.5 * height / np.tan(0.5 * angle)
            return np.array([focal, focal, width / 2, height / 2])

        posed.append(_posed(image, pose, lens))
    return _loaded(posed, path, path / POSES, "LGM", options)


def _posed(image: str, pose: np.ndarray, lens: scene_formats.Lens) -> Posed:
    distance = float(np.linalg.norm(pose[:3, 3]))
    near = max(distance - REACH, _NEAREST)
    return Posed(image, pose, lens, near=near, far=distance + REACH)


def _loaded(
    posed: list[Posed], root: pathlib.Path, file: pathlib.Path, source: str, options: Options
) -> Loaded:
    frames = scene_formats.build_frames(posed, root, file, strict=options.strict)
    return Loaded(tuple(frames), source, root, BOUNDS)


def _images(folder: pathlib.Path, count: int, file: pathlib.Path) -> list[pathlib.Path]:
    """The images of a folder by name, those with a number alone for their name."""
    found = [
        entry
        for entry in scene_files.entries(folder)
        if images.is_image(entry) and entry.stem.isdecimal()
    ]
    if len(found) != count:
        raise InputError(
            f"{file}: {count} poses, but {len(found)} images 000.png, 001.png, ... beside it; "
            "restore the missing ones."
        )
    return found


def _by_pose(path: pathlib.Path, suffix: str, folder: str) -> list[tuple[pathlib.Path, str]]:
    """(file of the pose, its image relative to the scene) of all views."""
    files = [f for f in scene_files.entries(path / POSES) if f.suffix == suffix]
    if not files:
        raise InputError(f"{path / POSES}: no pose; expected 000{suffix}, 001{suffix}, ...")
    return [(file, f"{folder}/{file.stem}.png") for file in files]


def _numbers(value: object, shape: tuple[int, ...], what: str) -> np.ndarray:
    """A finite float64 array of one shape; raises InputError."""
    try:
        array = np.asarray(value, np.float64)
    except (ValueError, TypeError) as error:
        raise InputError(f"{what} are no numbers; expected an array {shape}.") from error
    if array.shape != shape:
        raise InputError(f"{what} have shape {array.shape}; expected {shape}.")
    if not np.isfinite(array).all():
        raise InputError(f"{what} hold NaN or infinity.")
    return array
