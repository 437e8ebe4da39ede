"""Scenes described by arrays and tables: LLFF, NeuS (DTU) and RealEstate10K."""

from __future__ import annotations

import pathlib

import numpy as np

from nvs_common.data import images, masks, scene_files, scene_formats
from nvs_common.data.scene_files import Packed
from nvs_common.data.scene_formats import Loaded, Options, Posed
from nvs_common.errors import InputError

IMAGE_FOLDERS = ("images", "images_2", "images_4", "images_8")
# RealEstate10K poses are scaled so that the nearest points of a clip lie at about 1.25.
REALESTATE_NEAR, REALESTATE_FAR = 1.0, 100.0
REALESTATE_BOUNDS = "RealEstate10K convention (1 to 100)"
# NeuS scales what matters into the unit sphere; a camera inside it sees from this depth on.
SPHERE_MIN_NEAR = 0.05
# Skew of one pixel per focal length; a pinhole without skew then errs by less than a pixel.
MAX_SKEW = 1.0


def image_folder(root: pathlib.Path, chosen: str | None, known: tuple[str, ...]) -> pathlib.Path:
    """The chosen image folder of a scene, or the first of the known ones; raises InputError."""
    if chosen is not None:
        folder = scene_files.inside(root, chosen, str(root))
        if not folder.is_dir():
            raise InputError(f"{root}: there is no image folder {chosen!r}.")
        return folder
    folder = next((root / name for name in known if (root / name).is_dir()), None)
    if folder is None:
        raise InputError(f"{root}: no image folder; expected one of {', '.join(known)}.")
    return folder


def read_llff(path: pathlib.Path, options: Options) -> Loaded:
    """LLFF's poses_bounds.npy [n, 17]; row i belongs to the i-th image by name.

    A row is a 3 x 5 matrix (rotation columns down, right, back; centre; height, width, focal
    length) and the nearest and farthest z-depth. One focal length for both axes, centred
    principal point, no distortion: all that the format can say.
    """
    options.refuse("LLFF", "rig")
    rows = scene_files.read_npy(path).astype(np.float64)
    if rows.ndim != 2 or rows.shape[1] != 17:
        raise InputError(f"{path}: array of shape {rows.shape}; expected [images, 17].")
    root = path.parent
    folder = image_folder(root, options.image_folder, IMAGE_FOLDERS)
    files = _numbered(folder, len(rows), path)
    posed = []
    for file, row in zip(files, rows, strict=True):
        down, right, back, centre, (height, width, focal) = row[:15].reshape(3, 5).T
        pose = np.stack([right, down, -back, centre], axis=1)
        if not np.all(np.isfinite(row)):
            raise InputError(f"{path}: frame {file.name!r}: the row holds NaN or infinity.")
        declared = (round(height), round(width))
        lens = scene_formats.pixel_lens(np.array([focal, focal, width / 2, height / 2]), declared)
        name, (near, far) = file.relative_to(root).as_posix(), row[15:].tolist()
        posed.append(Posed(name, pose, lens, near=near, far=far, declared=declared))
    frames = scene_formats.build_frames(posed, root, path)
    return Loaded(tuple(frames), "LLFF", root, "poses_bounds.npy")


def read_neus(path: pathlib.Path, options: Options) -> Loaded:
    """NeuS and IDR cameras_sphere.npz: world_mat_i (pixel from world) and scale_mat_i.

    The scene is returned in the normalised frame, where the object fills the unit sphere.
    Integer pixel centres in the file become half-integer ones here.
    """
    options.refuse("NeuS", "rig")
    arrays = scene_files.read_npz(path)
    count = sum(name.startswith("world_mat_") and "inv" not in name for name in arrays)
    root = path.parent
    folder = image_folder(root, options.image_folder, ("image", "images", "rgb"))
    files = _numbered(folder, count, path)
    posed = []
    covered = masks.beside(root, count, path)
    for i, file in enumerate(files):
        where = f"{path}: frame {file.name!r}"
        world, scale = (_square(arrays, f"{key}_{i}", where) for key in ("world_mat", "scale_mat"))
        with np.errstate(invalid="ignore", over="ignore"):  # refused in the next line
            projection = (world @ scale)[:3]
        intrinsics, pose = decompose_projection(projection, where)
        distance = float(np.linalg.norm(pose[:3, 3]))
        posed.append(
            Posed(
                file.relative_to(root).as_posix(),
                pose,
                scene_formats.pixel_lens(intrinsics + [0, 0, 0.5, 0.5], None),
                near=max(distance - 1, SPHERE_MIN_NEAR),
                far=distance + 1,
                mask=None if covered is None else covered[i],
            )
        )
    frames = scene_formats.build_frames(posed, root, path)
    units = arrays["scale_mat_0"].astype(np.float64)
    bounds = "unit sphere of scale_mat"
    return Loaded(tuple(frames), "NeuS", root, bounds, world_from_scene=units)


def decompose_projection(projection: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """fx, fy, cx, cy [4] and world_from_cam [4, 4] of pixel_from_world [3, 4] up to scale."""
    left = projection[:, :3]
    if not np.all(np.isfinite(projection)) or abs(np.linalg.det(left)) < 1e-12:
        raise InputError(f"{where}: the projection matrix is singular or not finite.")
    # Only the sign for which depth in front of the camera is positive gives a rotation.
    projection = projection * np.sign(np.linalg.det(left))
    left = projection[:, :3]
    # left = upper triangular x rotation, from QR of the inverse: left^-1 = R^T K^-1.
    q, r = np.linalg.qr(np.linalg.inv(left))
    signs = np.sign(np.diag(r))
    calibration = np.linalg.inv(r * signs[:, None])
    calibration = calibration / calibration[2, 2]
    if abs(calibration[0, 1]) > MAX_SKEW:
        raise InputError(
            f"{where}: skew of {calibration[0, 1]:.3g} pixels, which no pinhole camera here has; "
            "rectify the images."
        )
    pose = np.eye(4)
    pose[:3, :3] = q * signs
    pose[:3, 3] = -np.linalg.solve(left, projection[:, 3])
    return calibration[[0, 1, 0, 1], [0, 1, 2, 2]], pose


def read_realestate(path: pathlib.Path, frames_folder: pathlib.Path, options: Options) -> Loaded:
    """A RealEstate10K clip: a text file of cameras and a folder of <timestamp>.<extension>.

    Frames keep the order of their timestamps (as numbers), which evaluation indices refer to.
    """
    options.refuse("RealEstate10K", "rig", "image_folder")
    posed = [realestate_frame(str(time), values) for time, values in realestate_rows(path)]
    frames = scene_formats.build_frames(
        posed, frames_folder, path, strict=options.strict, check=options.check
    )
    source = "RealEstate10K"
    return Loaded(tuple(frames), source, frames_folder, REALESTATE_BOUNDS, ordered=True)


def realestate_frame(name: str, values: np.ndarray, packed: Packed | None = None) -> Posed:
    """A frame from the 18 numbers fx fy cx cy (of width and height) 0 0, cam_from_world 3 x 4."""
    pose = scene_formats.invert(values[6:].reshape(3, 4))
    lens = scene_formats.normalised_lens(values[:4])
    return Posed(name, pose, lens, near=REALESTATE_NEAR, far=REALESTATE_FAR, packed=packed)


def realestate_rows(path: pathlib.Path) -> list[tuple[int, np.ndarray]]:
    """Timestamps and their 18 numbers [fx fy cx cy 0 0, cam_from_world 3 x 4], by timestamp."""
    lines = [line.split() for line in scene_files.read_text(path).splitlines()]
    # The first line is the address of the video.
    lines = [(i, line) for i, line in enumerate(lines, 1) if line and (i > 1 or len(line) == 19)]
    rows: dict[int, np.ndarray] = {}
    for i, line in lines:
        if len(line) != 19 or not line[0].isdigit():
            raise InputError(
                f"{path}: line {i} holds {len(line)} values; expected a timestamp and 18 numbers."
            )
        try:
            values = np.array([float(text) for text in line[1:]])
        except ValueError as error:
            raise InputError(f"{path}: line {i}: {error}.") from error
        if int(line[0]) in rows:
            raise InputError(f"{path}: line {i}: timestamp {line[0]} appears twice.")
        rows[int(line[0])] = values
    if not rows:
        raise InputError(f"{path}: the scene is empty: no camera lines.")
    return sorted(rows.items())


def _numbered(folder: pathlib.Path, count: int, path: pathlib.Path) -> list[pathlib.Path]:
    """The folder's images by name, one for each of the file's cameras."""
    files = [file for file in scene_files.entries(folder) if images.is_image(file)]
    if len(files) != count or not count:
        raise InputError(
            f"{path}: {count} cameras but {len(files)} images in {folder}; the two are matched "
            "by order, so both must be complete."
        )
    return files


def _square(arrays: dict[str, np.ndarray], key: str, where: str) -> np.ndarray:
    if key not in arrays or arrays[key].shape != (4, 4):
        found = arrays[key].shape if key in arrays else "nothing"
        raise InputError(f"{where}: {key} is {found}; expected a 4 x 4 matrix.")
    return arrays[key].astype(np.float64)
