"""What every layout is read into: frames with checked cameras, at the stored image size.

A reader turns its files into `Posed` frames (what the file says); `build_frames` finds and
probes the images and checks each camera, so that all layouts share one set of rules.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from nvs_common.data import distortion as distortion_lib
from nvs_common.data import images, scene_files
from nvs_common.data.scene_files import Packed
from nvs_common.data.sparse_points import SparsePoints
from nvs_common.errors import InputError

log = logging.getLogger(__name__)

# Rotations stored as float32 or with six decimals pass; a sheared or scaled matrix does not.
ROTATION_TOLERANCE = 1e-3
# Earth-centred coordinates reach 6.4e6 m.
MAX_TRANSLATION = 1e9
# A horizontal field of view of 175 degrees; below it the focal length is in other units.
MIN_FOCAL = 0.02
# Camera axes of OpenGL and Blender (x right, y up, z back) in OpenCV's.
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])

# Rows, columns of the stored image -> fx, fy, cx, cy in its pixels.
Lens = Callable[[int, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Posed:
    """One frame as its file describes it.

    Attributes:
      image: path in the scene's folder, mostly relative to it, perhaps without extension.
      world_from_cam: [4, 4] with OpenCV axes, unchecked.
      lens: intrinsics of the stored image once its size is known.
      distortion: of the stored image.
      near: z-depth, where the file gives one.
      far: z-depth, where the file gives one.
      packed: the image itself, where it is in an archive; `image` is then a name alone.
      mask: path of its mask relative to the scene's folder, where it has a file of its own.
      declared: rows and columns of the image, or of a larger copy, where the file gives them.
    """

    image: str
    world_from_cam: np.ndarray
    lens: Lens
    distortion: distortion_lib.Distortion = distortion_lib.Distortion()
    near: float | None = None
    far: float | None = None
    packed: Packed | None = None
    mask: str | None = None
    declared: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Frame:
    """One stored image and its checked camera.

    Attributes:
      path: the image file.
      world_from_cam: [4, 4] float64 rigid, OpenCV axes.
      stored: [4] fx, fy, cx, cy of the stored image, with distortion.
      intrinsics: [4] fx, fy, cx, cy of the undistorted image of the same size.
      distortion: removed when the image is decoded.
      height: rows of the stored image.
      width: columns of the stored image.
      near: z-depth or None.
      far: z-depth or None.
      packed: the image where it is in an archive; `path` then names it for messages.
      mask: the file of its mask; None where there is none, or the image's own alpha is one.
      declared: see `Posed`; decides how an image that EXIF turns is decoded.
    """

    path: pathlib.Path
    world_from_cam: np.ndarray
    stored: np.ndarray
    intrinsics: np.ndarray
    distortion: distortion_lib.Distortion
    height: int
    width: int
    near: float | None = None
    far: float | None = None
    packed: Packed | None = None
    mask: pathlib.Path | None = None
    declared: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a reader returns.

    Attributes:
      frames: in the order of the scene.
      source: name of the layout.
      root: the scene's folder, which image names are relative to.
      bounds: where the frames' near and far come from; None to have them from geometry.
      common_crop: whether images of different sizes are cropped to the common one (Spaces).
      ordered: whether frames keep this order, that of a video; otherwise they are sorted by name.
      world_from_scene: [4, 4] rotation, one scale and translation from the frame of the cameras to
        the units of the files, where a reader changes units (NeuS); None where it does not.
      points: of the reconstruction, where near and far come from them.
    """

    frames: tuple[Frame, ...]
    source: str
    root: pathlib.Path
    bounds: str | None = None
    common_crop: bool = False
    ordered: bool = False
    world_from_scene: np.ndarray | None = None
    points: SparsePoints | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """Choices of `load_scene` that readers see; a reader refuses those it has no use for.

    Every reader takes `strict`; those of videos take `check`, the others look at all images.
    """

    strict: bool = True
    check: str = "all"
    image_folder: str | None = None
    rig: int | None = None

    def refuse(self, source: str, *names: str) -> None:
        """Raises InputError where one of the named options was given to a layout without it."""
        for name in names:
            if getattr(self, name) is not None:
                raise InputError(f"the option {name} has no meaning for {source} scenes; drop it.")


def pixel_lens(intrinsics: np.ndarray, declared: tuple[int, int] | None) -> Lens:
    """Intrinsics in pixels of an image of `declared` (rows, columns), or of the stored one.

    The stored image may be a smaller or larger copy: the two sizes must then differ by one
    factor, up to one pixel of rounding.
    """

    def lens(height: int, width: int) -> np.ndarray:
        if declared is None or declared == (height, width):
            return intrinsics
        rows, columns = declared
        if rows <= 0 or columns <= 0:
            raise InputError(f"image size {columns} x {rows} in the camera file is not positive.")
        if not images.same_aspect((height, width), declared):
            raise InputError(
                f"the image is {width} x {height} but its camera is for {columns} x {rows}, "
                "which is not the same aspect; check that the images belong to this file."
            )
        return intrinsics * np.array([width / columns, height / rows] * 2)

    return lens


def normalised_lens(intrinsics: np.ndarray) -> Lens:
    """Intrinsics divided by width (fx, cx) and height (fy, cy)."""
    return lambda height, width: intrinsics * np.array([width, height] * 2, np.float64)


def rigid(matrix: np.ndarray) -> np.ndarray:
    """Checks a pose [4, 4] or [3, 4] and returns it as [4, 4] with an exact rotation.

    Raises:
      InputError: not finite, sheared or scaled, mirrored, or not a rigid transform.
    """
    if not np.all(np.isfinite(matrix)):
        raise InputError("the pose holds NaN or infinity.")
    if matrix.shape == (4, 4) and not np.allclose(matrix[3], [0, 0, 0, 1], atol=1e-6):
        raise InputError(f"the pose's last row is {matrix[3].tolist()}; expected 0, 0, 0, 1.")
    rotation = matrix[:3, :3]
    if np.max(np.abs(matrix[:3])) > MAX_TRANSLATION:
        raise InputError(f"the pose holds {np.max(np.abs(matrix)):.3g}, too large to be a place.")
    error = np.max(np.abs(rotation.T @ rotation - np.eye(3)))
    if error > ROTATION_TOLERANCE:
        raise InputError(
            f"the pose's rotation is not orthonormal (R^T R differs from the identity by "
            f"{error:.3g}); expected a rigid transform without scale or shear."
        )
    if np.linalg.det(rotation) < 0:
        raise InputError("the pose's rotation is a mirror (determinant -1); expected +1.")
    u, _, vt = np.linalg.svd(rotation)
    result = np.eye(4)
    result[:3, :3], result[:3, 3] = u @ vt, matrix[:3, 3]
    return result


def invert(pose: np.ndarray) -> np.ndarray:
    """Inverse [4, 4] of a rigid transform [4, 4] or [3, 4] as it was read (checked later)."""
    result = np.eye(4)
    result[:3, :3] = pose[:3, :3].T
    with np.errstate(invalid="ignore", over="ignore"):
        result[:3, 3] = -pose[:3, :3].T @ pose[:3, 3]
    if pose.shape == (4, 4):
        result[3] = pose[3]
    return result


def check_intrinsics(intrinsics: np.ndarray, height: int, width: int) -> None:
    """Raises InputError for intrinsics [4] that no lens in front of this image has."""
    fx, fy, cx, cy = (float(value) for value in intrinsics)
    if not np.all(np.isfinite(intrinsics)):
        raise InputError("the intrinsics hold NaN or infinity.")
    if fx <= 0 or fy <= 0:
        raise InputError(f"focal length {fx:g}, {fy:g} is not positive.")
    if fx < MIN_FOCAL * width or fy < MIN_FOCAL * height:
        raise InputError(
            f"focal length {fx:g}, {fy:g} is not plausible for {width} x {height} pixels; "
            "expected pixels, not fractions of the image."
        )
    if not (-width < cx < 2 * width and -height < cy < 2 * height):
        raise InputError(f"principal point {cx:g}, {cy:g} is far outside {width} x {height}.")


def find_image(root: pathlib.Path, relative: str, where: str) -> pathlib.Path | None:
    """The image of a frame inside the scene's folder, or None where there is none.

    Tries the path itself, then image extensions after it (Blender and instant-ngp leave them
    out), then `images_2`, `images_4`, `images_8` in place of a leading `images`.
    """
    path = scene_files.inside(root, relative, where)
    tries = [path]
    if not images.is_image(path):
        tries += [path.with_name(path.name + extension) for extension in images.EXTENSIONS]
    parts = path.relative_to(root).parts
    if parts[:1] == ("images",):
        tries += [root.joinpath(f"images_{n}", *parts[1:]) for n in (2, 4, 8)]
    found = next((candidate for candidate in tries if candidate.is_file()), None)
    if found is None:
        return None
    return scene_files.inside(root, found.relative_to(root).as_posix(), where)


def build_frames(
    posed: Sequence[Posed],
    root: pathlib.Path,
    file: pathlib.Path,
    *,
    strict: bool = True,
    check: str = "all",
) -> list[Frame]:
    """Finds every frame's image and checks its camera.

    Args:
      posed: what the file says.
      root: the scene's folder.
      file: for messages.
      strict: whether a missing image is an error; else it is left out with one warning.
      check: "all" opens every image; "first" only the first, whose size all others have to have
        when they are decoded.

    Raises:
      InputError: naming the file, the frame and the reason.
    """
    if check not in ("all", "first"):
        raise InputError(f"check={check!r} is none of 'all', 'first'.")
    if not posed:
        raise InputError(f"{file}: the scene is empty: it lists no frames.")
    if len(posed) > scene_files.MAX_FRAMES:
        raise InputError(f"{file}: {len(posed)} frames; at most {scene_files.MAX_FRAMES}.")
    frames, missing, seen = [], [], set()
    for item in posed:
        where = f"{file}: frame {item.image!r}"
        packed = item.packed is not None
        path = root / item.image if packed else find_image(root, item.image, where)
        if path is None:
            missing.append(item.image)
            if strict:
                raise InputError(
                    f"{where}: its image is missing under {root}; restore it, or leave frames "
                    "without images out: load_scene(path, strict=False)."
                )
            continue
        if path in seen:
            raise InputError(f"{where}: the image is listed twice; remove one of the two.")
        seen.add(path)
        known = (frames[0].height, frames[0].width) if check == "first" and frames else None
        mask = None if item.mask is None else _mask(item.mask, root, where)
        size = known or images.probe(path, item.packed, item.declared)
        frames.append(_build(item, path, mask, where, size))
    if missing:
        log.warning(
            "%s: skipped %d of %d frames whose images are missing (first: %s)",
            *(file, len(missing), len(posed), missing[0]),
        )
    if not frames:
        raise InputError(f"{file}: the scene is empty: none of its {len(posed)} images exists.")
    return frames


def _mask(relative: str, root: pathlib.Path, where: str) -> pathlib.Path:
    path = scene_files.inside(root, relative, where)
    if not path.is_file():
        raise InputError(f"{where}: its mask {path} is missing; restore it, or drop its entry.")
    return path


def _build(
    item: Posed, path: pathlib.Path, mask: pathlib.Path | None, where: str, size: tuple[int, int]
) -> Frame:
    height, width = size
    try:
        pose = rigid(item.world_from_cam)
        stored = np.asarray(item.lens(height, width), np.float64)
        check_intrinsics(stored, height, width)
        _check_depths(item.near, item.far)
        intrinsics = stored
        if not item.distortion.is_pinhole:
            intrinsics = distortion_lib.pinhole(item.distortion, stored, height, width)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    camera = (pose, stored, intrinsics, item.distortion)
    source = (item.packed, mask, item.declared)
    return Frame(path, *camera, height, width, item.near, item.far, *source)


def _check_depths(near: float | None, far: float | None) -> None:
    if near is not None and far is not None and not 0 < near < far < np.inf:
        raise InputError(f"near {near:g} and far {far:g}: expected 0 < near < far.")
