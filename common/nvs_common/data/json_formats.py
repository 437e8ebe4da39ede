"""Scenes described by JSON: transforms.json, opencv_cameras.json, Spaces' models.json, and what
LVSM's preprocessing writes.

All give pixel intrinsics with half-integer pixel centres; image paths are relative to the JSON
file's folder, except for LVSM.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from nvs_common.data import array_formats, depth_bounds, point_cloud, scene_files, scene_formats
from nvs_common.data.distortion import Distortion
from nvs_common.data.scene_formats import Loaded, Options, Posed
from nvs_common.data.sparse_points import SparsePoints
from nvs_common.errors import InputError

log = logging.getLogger(__name__)

TRANSFORMS_SPLITS = ("transforms_train.json", "transforms_val.json", "transforms_test.json")
# Spaces gives positions in metres; the published systems sweep 1 m to 100 m.
SPACES_NEAR, SPACES_FAR = 1.0, 100.0
_UNDISTORTED = ("PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE")
_DISTORTED = ("OPENCV", "SIMPLE_RADIAL", "RADIAL", "OPENCV_FISHEYE")


def read_any(path: pathlib.Path, options: Options) -> Loaded:
    """Reads a JSON camera file of whichever of the four kinds its contents show."""
    content = scene_files.read_json(path)
    if isinstance(content, list) and content and isinstance(content[0], list):
        return read_spaces(path, options)
    first: Any = content
    if isinstance(first, dict):
        first = first.get("frames")
    if not isinstance(first, list):
        raise InputError(
            f"{path}: not a camera file: expected a list or an object with `frames` (nerfstudio, "
            "instant-ngp, Blender, opencv_cameras.json, LVSM or Spaces)."
        )
    if first and isinstance(first[0], dict) and "fxfycxcy" in first[0]:
        return read_lvsm(path, options)
    if isinstance(content, list) or (first and isinstance(first[0], dict) and "w2c" in first[0]):
        return read_opencv(path, options)
    return read_transforms([path], options)


def read_transforms(paths: list[pathlib.Path], options: Options) -> Loaded:
    """nerfstudio, instant-ngp and Blender transforms*.json; several are put together.

    Poses are world_from_cam with OpenGL axes. Intrinsics at the top may be replaced by a
    frame's own; `camera_angle_x` is used where there is no `fl_x`, and likewise for y. Distortion
    k1..k4, p1, p2 as in nerfstudio (k3, k4 multiply r^6, r^8). Near and far come from
    `ply_file_path`.
    """
    options.refuse("transforms.json", "rig")
    frames, bounds, clouds = [], None, []
    root = paths[0].parent
    for path in paths:
        content = scene_files.read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("frames"), list):
            raise InputError(f"{path}: expected an object with a list `frames`.")
        posed = [
            _transforms_frame(content, _entry(frame, path, i), path, options)
            for i, frame in enumerate(content["frames"])
        ]
        built = scene_formats.build_frames(posed, root, path, strict=options.strict)
        points = _cloud(content, path)
        if points is not None:
            built, bounds = depth_bounds.with_points(built, points)
            clouds.append(points.positions)
        frames += built
    # Files without points leave their frames without depths: then geometry decides for all.
    bounds = bounds if all(frame.near is not None for frame in frames) else None
    # Several files often name one cloud.
    points = None if bounds is None else SparsePoints(np.unique(np.concatenate(clouds), axis=0))
    return Loaded(tuple(frames), "transforms.json", root, bounds, points=points)


def _cloud(content: dict[str, Any], path: pathlib.Path) -> SparsePoints | None:
    """Nerfstudio's sparse points, which lie in the frame of its poses."""
    if "ply_file_path" not in content:
        return None
    cloud = scene_files.inside(path.parent, content["ply_file_path"], f"{path}: ply_file_path")
    if not cloud.is_file():
        log.warning("%s: its points %s are missing; near and far come without them", path, cloud)
        return None
    return SparsePoints(point_cloud.read_ply(cloud))


def _transforms_frame(
    shared: dict[str, Any], frame: dict[str, Any], path: pathlib.Path, options: Options
) -> Posed:
    name = _image(frame, "file_path", path)
    where = f"{path}: frame {name!r}"
    rows = frame.get("transform_matrix")
    shape = (3, 4) if isinstance(rows, list) and len(rows) == 3 else (4, 4)
    gl = scene_files.matrix(rows, shape, f"{where}: transform_matrix")
    lens_keys = {**{k: v for k, v in shared.items() if k != "frames"}, **frame}
    declared = _declared(lens_keys, where)
    if options.image_folder is not None:
        # PurePosixPath would keep a Windows path whole.
        name = f"{options.image_folder}/{name.replace(chr(92), '/').rsplit('/', 1)[-1]}"
    return Posed(
        name,
        gl @ scene_formats.OPENGL,
        _transforms_lens(frame, shared, declared, where),
        _transforms_distortion(lens_keys, where),
        mask=_image(frame, "mask_path", path) if "mask_path" in frame else None,
        declared=declared,
    )


def _declared(keys: dict[str, Any], where: str) -> tuple[int, int] | None:
    """Rows and columns that the intrinsics are for, where both are given."""
    if "w" not in keys or "h" not in keys:
        return None
    width, height = (scene_files.number(keys[key], f"{where}: {key}") for key in ("w", "h"))
    return round(height), round(width)


def _transforms_lens(
    frame: dict[str, Any], shared: dict[str, Any], declared: tuple[int, int] | None, where: str
) -> scene_formats.Lens:
    """Each of fx, fy, cx, cy from what is given of it; square pixels and the centre otherwise."""
    focal_x, focal_y = (_focal(axis, (frame, shared), where) for axis in "xy")
    if focal_x is None:
        raise InputError(f"{where}: neither fl_x nor camera_angle_x is given; add one.")
    keys = {**shared, **frame}
    cx, cy = (
        scene_files.number(keys[key], f"{where}: {key}") if key in keys else None
        for key in ("cx", "cy")
    )

    def lens(height: int, width: int) -> np.ndarray:
        rows, columns = declared or (height, width)
        fx = focal_x(columns)
        fy = fx if focal_y is None else focal_y(rows)
        centre = (columns / 2 if cx is None else cx, rows / 2 if cy is None else cy)
        return scene_formats.pixel_lens(np.array([fx, fy, *centre]), declared)(height, width)

    return lens


def _focal(
    axis: str, sources: tuple[dict[str, Any], ...], where: str
) -> Callable[[int], float] | None:
    """Image size along an axis -> focal length, from the first source that gives it, or None.

    In one source a focal length beats an angle: instant-ngp writes both, and only the first is
    calibrated.
    """
    for keys in sources:
        if (name := f"fl_{axis}") in keys:
            focal = scene_files.number(keys[name], f"{where}: {name}")
            return lambda size: focal
        if (name := f"camera_angle_{axis}") in keys:
            angle = scene_files.number(keys[name], f"{where}: {name}")
            if not 0 < angle < np.pi:
                raise InputError(f"{where}: {name} {angle:g}; expected 0 to pi radians.")
            return lambda size: 0.5 * size / np.tan(0.5 * angle)
    return None


def _transforms_distortion(keys: dict[str, Any], where: str) -> Distortion:
    model = keys.get("camera_model", "OPENCV")
    if model not in _UNDISTORTED + _DISTORTED:
        raise InputError(
            f"{where}: unknown camera_model {model!r}; expected one of {_UNDISTORTED + _DISTORTED}."
        )
    fisheye = model == "OPENCV_FISHEYE" or keys.get("is_fisheye") is True
    if model in _UNDISTORTED and not fisheye:
        return Distortion()
    k1, k2, k3, k4, p1, p2 = (
        scene_files.number(keys.get(key, 0.0), f"{where}: {key}")
        for key in ("k1", "k2", "k3", "k4", "p1", "p2")
    )
    tangential = (0.0, 0.0) if fisheye else (p1, p2)
    return Distortion((k1, k2, k3, k4), tangential=tangential, fisheye=fisheye)


def read_opencv(path: pathlib.Path, options: Options) -> Loaded:
    """opencv_cameras.json: a list of frames, or an object with `frames`.

    Each frame has file_path, w2c (cam_from_world, OpenCV axes), fx, fy, cx, cy and w, h.
    """
    options.refuse("opencv_cameras.json", "rig", "image_folder")
    content = scene_files.read_json(path)
    frames = content.get("frames") if isinstance(content, dict) else content
    if not isinstance(frames, list):
        raise InputError(f"{path}: expected a list of frames or an object with `frames`.")
    posed = [_opencv_frame(_entry(frame, path, i), path) for i, frame in enumerate(frames)]
    built = scene_formats.build_frames(posed, path.parent, path, strict=options.strict)
    return Loaded(tuple(built), "opencv_cameras.json", path.parent)


def _opencv_frame(frame: dict[str, Any], path: pathlib.Path) -> Posed:
    name = _image(frame, "file_path", path)
    where = f"{path}: frame {name!r}"
    pose = scene_files.matrix(frame.get("w2c"), (4, 4), f"{where}: w2c")
    values = [
        scene_files.number(frame.get(key), f"{where}: {key}")
        for key in ("fx", "fy", "cx", "cy", "h", "w")
    ]
    declared = (round(values[4]), round(values[5]))
    lens = scene_formats.pixel_lens(np.array(values[:4]), declared)
    return Posed(name, scene_formats.invert(pose), lens, declared=declared)


def read_lvsm(path: pathlib.Path, options: Options) -> Loaded:
    """A clip as LVSM's preprocessing writes it: metadata/<clip>.json and images/<clip>/.

    Each frame has image_path, fxfycxcy in pixels and w2c (cam_from_world, OpenCV axes). Image
    paths are those of the machine that wrote them: their last two parts are looked up in the
    folder `images` beside `metadata`. Frames keep the order of the file.
    """
    options.refuse("LVSM", "rig", "image_folder")
    content = scene_files.read_json(path)
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list):
        raise InputError(f"{path}: expected an object with a list `frames`.")
    posed = [_lvsm_frame(_entry(frame, path, i), path) for i, frame in enumerate(frames)]
    root = path.parent.parent
    built = scene_formats.build_frames(
        posed, root, path, strict=options.strict, check=options.check
    )
    bounds = array_formats.REALESTATE_BOUNDS
    return Loaded(tuple(built), "LVSM", root, bounds, ordered=True)


def _lvsm_frame(frame: dict[str, Any], path: pathlib.Path) -> Posed:
    parts = _image(frame, "image_path", path).replace("\\", "/").split("/")
    name = "/".join(["images", *parts[-2:]])
    where = f"{path}: frame {name!r}"
    pose = scene_files.matrix(frame.get("w2c"), (4, 4), f"{where}: w2c")
    values = scene_files.matrix(frame.get("fxfycxcy"), (4,), f"{where}: fxfycxcy")
    return Posed(
        name,
        scene_formats.invert(pose),
        scene_formats.pixel_lens(values, None),
        near=array_formats.REALESTATE_NEAR,
        far=array_formats.REALESTATE_FAR,
    )


def read_spaces(path: pathlib.Path, options: Options) -> Loaded:
    """Spaces' models.json: rig positions, each a list of cameras; `options.rig` chooses one.

    The orientation is the axis-angle of cam_from_world, the position the centre in metres.
    """
    options.refuse("Spaces", "image_folder")
    content = scene_files.read_json(path)
    if not isinstance(content, list) or not content:
        raise InputError(f"{path}: the scene is empty: expected a list of rig positions.")
    rig = options.rig or 0
    if not 0 <= rig < len(content) or not isinstance(content[rig], list):
        raise InputError(f"{path}: no rig position {rig}; the file holds {len(content)}.")
    posed = [_spaces_frame(_entry(item, path, i), path) for i, item in enumerate(content[rig])]
    built = scene_formats.build_frames(posed, path.parent, path, strict=options.strict)
    bounds = "Spaces convention (1 m to 100 m)"
    return Loaded(tuple(built), f"Spaces rig {rig}", path.parent, bounds, common_crop=True)


def _spaces_frame(item: dict[str, Any], path: pathlib.Path) -> Posed:
    name = _image(item, "relative_path", path)
    where = f"{path}: frame {name!r}"
    focal, aspect, width, height = (
        scene_files.number(item.get(key), f"{where}: {key}")
        for key in ("focal_length", "pixel_aspect_ratio", "width", "height")
    )
    cx, cy = scene_files.matrix(item.get("principal_point"), (2,), f"{where}: principal_point")
    pose = np.eye(4)
    turn = scene_files.matrix(item.get("orientation"), (3,), f"{where}: orientation")
    pose[:3, :3] = rotation(turn).T
    pose[:3, 3] = scene_files.matrix(item.get("position"), (3,), f"{where}: position")
    declared = (round(height), round(width))
    lens = scene_formats.pixel_lens(np.array([focal, focal * aspect, cx, cy]), declared)
    return Posed(name, pose, lens, near=SPACES_NEAR, far=SPACES_FAR, declared=declared)


def rotation(axis_angle: np.ndarray) -> np.ndarray:
    """Rotation [3, 3] about axis_angle [3] by its length in radians (Rodrigues)."""
    angle = np.linalg.norm(axis_angle)
    if angle == 0:
        return np.eye(3)
    x, y, z = axis_angle / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _entry(frame: Any, path: pathlib.Path, index: int) -> dict[str, Any]:
    if not isinstance(frame, dict):
        raise InputError(f"{path}: frame {index} is {type(frame).__name__}; expected an object.")
    return frame


def _image(frame: dict[str, Any], key: str, path: pathlib.Path) -> str:
    name = frame.get(key)
    if not isinstance(name, str) or not name:
        raise InputError(f"{path}: a frame has {key} {name!r}; expected the path of its image.")
    return name
