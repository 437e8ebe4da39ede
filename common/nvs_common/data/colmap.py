"""Reads COLMAP sparse models, binary or text, without COLMAP.

Every count in a file is checked against the bytes that are left before anything is allocated.
The old layout (cameras, images, points3D) and the new one, which adds rigs and frames, both hold
all that is needed in the three old files.
"""

from __future__ import annotations

import dataclasses
import pathlib
import struct

import numpy as np

from nvs_common.data import scene_files
from nvs_common.data.distortion import Distortion
from nvs_common.errors import InputError

MAX_NAME_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Camera:
    """Intrinsics [4] fx, fy, cx, cy in pixels of height x width, and distortion."""

    intrinsics: np.ndarray
    distortion: Distortion
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class Image:
    """cam_from_world [4, 4] (OpenCV axes), camera id and indices [*] of points it observes."""

    name: str
    cam_from_world: np.ndarray
    camera: int
    seen: np.ndarray


@dataclasses.dataclass(frozen=True)
class Model:
    """Cameras by id, images in file order and points [p, 3] in the world."""

    cameras: dict[int, Camera]
    images: list[Image]
    points: np.ndarray


# Model name, id in binary files, number of parameters.
_MODELS = {
    "SIMPLE_PINHOLE": (0, 3),
    "PINHOLE": (1, 4),
    "SIMPLE_RADIAL": (2, 4),
    "RADIAL": (3, 5),
    "OPENCV": (4, 8),
    "OPENCV_FISHEYE": (5, 8),
    "FULL_OPENCV": (6, 12),
    "SIMPLE_RADIAL_FISHEYE": (8, 4),
    "RADIAL_FISHEYE": (9, 5),
}
_NAMES = {number: name for name, (number, _) in _MODELS.items()}


def has_model(folder: pathlib.Path) -> bool:
    """Whether a folder holds a sparse model in binary or text form."""
    return any(
        all((folder / f"{name}{suffix}").is_file() for name in ("cameras", "images"))
        for suffix in (".bin", ".txt")
    )


def read_model(folder: pathlib.Path) -> Model:
    """Reads a sparse model, binary before text; points3D may be absent.

    Raises:
      InputError: naming the file and what is wrong with it.
    """
    binary = (folder / "cameras.bin").is_file() and (folder / "images.bin").is_file()
    suffix = ".bin" if binary else ".txt"
    cameras_file, images_file, points_file = (
        folder / f"{name}{suffix}" for name in ("cameras", "images", "points3D")
    )
    cameras = _cameras_bin(cameras_file) if binary else _cameras_txt(cameras_file)
    ids, points = np.zeros(0, np.int64), np.zeros((0, 3))
    if points_file.is_file():
        ids, points = _points_bin(points_file) if binary else _points_txt(points_file)
        if not np.all(np.isfinite(points)):
            raise InputError(f"{points_file}: holds points with NaN or infinity.")
    order = np.argsort(ids, kind="stable")
    images = _images_bin(images_file) if binary else _images_txt(images_file)
    for i, image in enumerate(images):
        if image.camera not in cameras:
            raise InputError(
                f"{images_file}: frame {image.name!r} uses camera {image.camera}, which "
                f"{cameras_file.name} does not list."
            )
        images[i] = dataclasses.replace(image, seen=_indices(image.seen, ids, order))
    return Model(cameras, images, points)


def _indices(wanted: np.ndarray, ids: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Positions in ids of the wanted ids; those that are not there are left out."""
    wanted = np.unique(wanted[wanted >= 0])
    if not len(ids):
        return np.zeros(0, np.int64)
    position = np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)
    found = order[position]
    return found[ids[found] == wanted]


def make_camera(model: str, params: list[float], height: int, width: int) -> Camera:
    """A camera from COLMAP's model name and parameters; raises InputError."""
    if model not in _MODELS:
        raise InputError(f"unknown camera model {model!r}; supported are {', '.join(_MODELS)}.")
    expected = _MODELS[model][1]
    if len(params) != expected:
        raise InputError(f"{len(params)} parameters for {model}; expected {expected}.")
    if not 0 < height < 2**20 or not 0 < width < 2**20:
        raise InputError(f"image size {width} x {height} is not plausible.")
    one_focal = model.startswith("SIMPLE") or model in ("RADIAL", "RADIAL_FISHEYE")
    focal, rest = (params[:1] * 2, params[1:]) if one_focal else (params[:2], params[2:])
    k = [*rest[2:], 0.0, 0.0, 0.0, 0.0]
    if "FISHEYE" in model:
        lens = Distortion((k[0], k[1], k[2], k[3]), fisheye=True)
    elif model in ("OPENCV", "FULL_OPENCV"):
        lens = Distortion((k[0], k[1], k[4], 0.0), (k[5], k[6], k[7]), (k[2], k[3]))
    else:
        lens = Distortion((k[0], k[1], 0.0, 0.0))
    return Camera(np.array([*focal, *rest[:2]]), lens, height, width)


def make_pose(quaternion: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """cam_from_world [4, 4] from w, x, y, z [4] and a translation [3]; raises InputError."""
    with np.errstate(over="ignore"):  # refused just below
        length = np.linalg.norm(quaternion)
    if not np.isfinite(length) or not np.all(np.isfinite(translation)):
        raise InputError("the pose holds NaN or infinity.")
    if abs(length - 1) > 1e-2:
        raise InputError(f"the rotation quaternion has length {length:.4g}; expected 1.")
    w, x, y, z = quaternion / length
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    pose[:3, 3] = translation
    return pose


class _Cursor:
    """Little-endian values read one after another, never past the end of the data."""

    def __init__(self, path: pathlib.Path):
        self.path, self.position = path, 0
        self.data = scene_files.read_bytes(path, scene_files.MAX_BINARY_BYTES)

    def take(self, layout: str) -> tuple:
        self.need(struct.calcsize(layout))
        values = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return values

    def need(self, size: int) -> None:
        left = len(self.data) - self.position
        if size > left:
            raise InputError(
                f"{self.path}: truncated: {size} bytes expected at byte {self.position}, "
                f"{left} are left; copy the file again."
            )

    def count(self, record_size: int) -> int:
        """A count of records of at least this many bytes, which must fit into the rest."""
        (count,) = self.take("<Q")
        if count * record_size > len(self.data) - self.position:
            raise InputError(
                f"{self.path}: claims {count} records at byte {self.position - 8}, more than the "
                f"{len(self.data)} bytes of the file can hold; it is truncated or damaged."
            )
        return count

    def name(self) -> str:
        end = self.data.find(b"\0", self.position, self.position + MAX_NAME_BYTES)
        if end < 0:
            raise InputError(f"{self.path}: an image name at byte {self.position} does not end.")
        raw, self.position = self.data[self.position : end], end + 1
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: image name {raw!r} is not UTF-8.") from error


def _cameras_bin(path: pathlib.Path) -> dict[int, Camera]:
    cursor, cameras = _Cursor(path), {}
    for _ in range(cursor.count(24)):
        number, model, width, height = cursor.take("<iiQQ")
        name = _NAMES.get(model, f"number {model}")
        params = cursor.take(f"<{_MODELS[name][1]}d") if name in _MODELS else ()
        cameras[number] = _located(path, f"camera {number}", name, list(params), height, width)
    return cameras


def _located(
    path: pathlib.Path, what: str, model: str, params: list[float], height: int, width: int
) -> Camera:
    try:
        return make_camera(model, params, height, width)
    except InputError as error:
        raise InputError(f"{path}: {what}: {error}") from error


def _images_bin(path: pathlib.Path) -> list[Image]:
    cursor, images = _Cursor(path), []
    for _ in range(cursor.count(73)):
        _, *pose, camera = cursor.take("<i7di")
        name = cursor.name()
        size = 24 * cursor.count(24)
        records = np.frombuffer(cursor.data, np.dtype("<f8, <f8, <i8"), size // 24, cursor.position)
        cursor.position += size
        images.append(_image(path, name, np.array(pose), camera, records["f2"]))
    return images


def _image(path: pathlib.Path, name: str, pose: np.ndarray, camera: int, seen: np.ndarray) -> Image:
    try:
        return Image(name, make_pose(pose[:4], pose[4:]), camera, seen)
    except InputError as error:
        raise InputError(f"{path}: frame {name!r}: {error}") from error


def _points_bin(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    cursor = _Cursor(path)
    count = cursor.count(51)
    ids, points = np.zeros(count, np.int64), np.zeros((count, 3))
    for i in range(count):
        ids[i], *xyz = cursor.take("<q3d")
        points[i] = xyz
        # Colour (3 bytes) and error (8); then the track, 8 bytes an observation.
        cursor.take("<11x")
        size = 8 * cursor.count(8)
        cursor.position += size
    return ids, points


def _lines(path: pathlib.Path) -> list[tuple[int, str]]:
    """Numbered lines without comments; empty ones stay, for they mean something in images.txt."""
    lines = enumerate(scene_files.read_text(path).splitlines(), 1)
    return [(i, line.strip()) for i, line in lines if not line.lstrip().startswith("#")]


def _cameras_txt(path: pathlib.Path) -> dict[int, Camera]:
    cameras = {}
    for i, line in _lines(path):
        if not line:
            continue
        try:
            number, model, width, height, *params = line.split()
            values = (int(number), [float(p) for p in params], int(height), int(width))
        except ValueError as error:
            raise InputError(f"{path}: line {i} is not a camera: {error}.") from error
        cameras[values[0]] = _located(path, f"line {i}", model, *values[1:])
    return cameras


def _images_txt(path: pathlib.Path) -> list[Image]:
    images, lines = [], iter(_lines(path))
    for i, line in lines:
        if not line:
            continue
        # The second line of an image, its observations, may be empty or end the file.
        j, observed = next(lines, (i, ""))
        try:
            _, *pose, camera, name = line.split(maxsplit=9)
            values = np.array([float(value) for value in pose])
            if len(values) != 7:
                raise ValueError(f"{len(values) + 3} values; expected 10")
            if len(observed.split()) % 3:
                raise ValueError(f"line {j} does not hold x, y, id of observations")
            seen = np.array([int(value) for value in observed.split()[2::3]], np.int64)
            images.append(_image(path, name, values, int(camera), seen))
        except InputError:
            raise
        except (ValueError, OverflowError) as error:
            raise InputError(f"{path}: line {i} is not an image: {error}.") from error
    return images


def _points_txt(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    ids, points = [], []
    for i, line in _lines(path):
        if not line:
            continue
        try:
            number, x, y, z = line.split(maxsplit=4)[:4]
            ids.append(int(number))
            points.append((float(x), float(y), float(z)))
        except ValueError as error:
            raise InputError(f"{path}: line {i} is not a point: {error}.") from error
    return np.array(ids, np.int64), np.array(points, np.float64).reshape(-1, 3)
