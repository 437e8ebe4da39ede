"""Scene folders: one internal form for every layout.

`load_scene(path)` reads nerfstudio, instant-ngp, Blender, COLMAP, opencv_cameras.json, LLFF,
RealEstate10K (as text files, as pixelSplat's chunks, as LVSM's JSON files), NeuS (DTU) and Spaces;
`layouts` says how they are told apart. Cameras come out as
float64 world_from_cam with OpenCV axes, pinhole intrinsics in pixels with half-integer pixel
centres, and near and far z-depths, sorted by image name. Images are decoded when asked for.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from nvs_common.data import (
    depth_bounds,
    depth_maps,
    distortion,
    images,
    layouts,
    masks,
    matching,
)
from nvs_common.data.images import Window
from nvs_common.data.scene_formats import Frame, Loaded, Options
from nvs_common.data.sparse_points import SparsePoints
from nvs_common.errors import InputError
from nvs_common.types import Cameras

# Corners are matched on images of at most this width.
MEASURE_WIDTH = 640


@dataclasses.dataclass(frozen=True)
class Scene:
    """Posed images of one place; picklable, and light until images are asked for.

    Attributes:
      cameras: [n] NumPy float64, for images of this scene's size.
      names: image paths relative to the deepest folder that holds them all.
      source: the layout.
      bounds: where near and far come from.
      path: what was loaded.
      frames: stored images and their cameras.
      windows: the part of each stored image that becomes the view.
      world_from_scene, points: see `scene_formats.Loaded`.
    """

    cameras: Cameras
    names: tuple[str, ...]
    source: str
    bounds: str
    path: pathlib.Path
    frames: tuple[Frame, ...] = dataclasses.field(repr=False)
    windows: tuple[Window, ...] = dataclasses.field(repr=False)
    world_from_scene: np.ndarray | None = None
    points: SparsePoints | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """Decodes images, undistorted and at the scene's size, float32 [k, h, w, 3] in [0, 1].

        Args:
          indices: k positions in `names`.

        Raises:
          InputError: an image cannot be decoded or is no longer the size it was.
        """
        height, width = self.cameras.height, self.cameras.width
        result = np.empty((len(indices), height, width, 3), np.float32)
        for k, i in enumerate(indices):
            image = _stored_image(self.frames[i])
            result[k] = images.resample(image, self.windows[i], height, width)
        return result

    @property
    def has_masks(self) -> bool:
        """Whether every view has a mask; by the images' headers where they may have alpha."""
        return all(masks.known(frame) for frame in self.frames)

    def masks(self, indices: Sequence[int]) -> np.ndarray:
        """Decodes masks, float32 [k, h, w]: the share of each pixel that the object covers.

        Args:
          indices: k positions in `names`.

        Raises:
          InputError: a view has none, or one of another size than its image.
        """
        size = self.cameras.height, self.cameras.width
        return np.stack([masks.read(self.frames[i], self.windows[i], *size) for i in indices])

    @property
    def has_depths(self) -> bool:
        """Whether every view has a map of depth beside its image, see `depth_maps`."""
        plain = all(f.packed is None and f.distortion.is_pinhole for f in self.frames)
        return plain and all(depth_maps.find(frame.path) is not None for frame in self.frames)

    def depths(self, indices: Sequence[int]) -> np.ndarray:
        """Reads z-depths at the scene's size, float32 [k, h, w], 0 where there is background.

        Args:
          indices: k positions in `names`.

        Raises:
          InputError: a view has no depth, or one that does not fit its image.
        """
        size = self.cameras.height, self.cameras.width
        chosen = [(self.frames[i], self.windows[i]) for i in indices]
        return np.stack(
            [depth_maps.read(f.path, (f.height, f.width), window, *size) for f, window in chosen]
        )

    def resized(self, height: int, width: int) -> Scene:
        """The scene with images centre-cropped to an aspect and resized, antialiased.

        Nothing is decoded; intrinsics follow. Applied again, it starts from this scene's view.
        """
        windows = [images.fit_window(window, height, width) for window in self.windows]
        return _assemble(self, windows, height, width)


def load_scene(
    path: str | os.PathLike,
    *,
    size: tuple[int, int] | None = None,
    strict: bool = True,
    image_folder: str | None = None,
    rig: int | None = None,
    near_far: tuple[float, float] | None = None,
    check: str = "all",
) -> Scene:
    """Loads a scene folder, a camera file, a COLMAP model folder or a RealEstate10K clip.

    Every image is looked at (its header only), so a missing or empty one is found here.

    Args:
      path: the folder; or one camera file where a folder holds several (see `layouts`).
      size: (height, width) to have the scene `resized` to. Without it all stored images must
        have one size, except for Spaces, whose images are centre-cropped to the common size.
      strict: False leaves frames out whose image is missing, with one counted warning.
      image_folder: which copy of the images to use, such as "images_4" (intrinsics follow).
      rig: which rig position of a Spaces scene; the first by default.
      near_far: z-depths for every camera, in place of the scene's own.
      check: "first" opens the first image alone where the scene is a video, whose frames have one
        size; what is wrong with another is then found when it is decoded.

    Raises:
      InputError: one sentence that names the file, the frame and the reason.
    """
    path = pathlib.Path(path)
    options = Options(strict=strict, check=check, image_folder=image_folder, rig=rig)
    loaded = layouts.recognise(path)(options)
    scene = _scene(loaded, path, size)
    if near_far is not None:
        scene = _with_depths(scene, np.tile(near_far, (len(scene), 1)), "given by the caller")
    return scene if size is None else scene.resized(*size)


def measure_depths(scene: Scene, *, pairs: int = 48) -> Scene:
    """The scene with near and far from its images, for layouts that come without points.

    Matches corners between up to `pairs` pairs of neighbouring images, keeps what agrees with
    the poses to a pixel, triangulates, and takes robust percentiles as for sparse points. About
    40 ms a pair at 512 x 288. Where too little matches the scene is returned as it was.

    Like sparse points of a reconstruction, which come from all photographs, the matches include
    views that an evaluation holds out: their corners may move a near or far plane, nothing else.

    Args:
      scene: any.
      pairs: how many pairs of images to look at.

    Raises:
      InputError: an image cannot be decoded.
    """
    shrink = min(1.0, MEASURE_WIDTH / scene.cameras.width)
    height, width = (max(1, round(shrink * x)) for x in (scene.cameras.height, scene.cameras.width))
    small = scene.resized(height, width)
    cameras, found = small.cameras, [np.zeros((0, 3))]
    for i, j in _neighbours(cameras.world_from_cam, pairs):
        first, second = small.images([i, j]).mean(axis=-1)
        a, b = matching.match(first, second)
        good = matching.sampson(cameras, i, j, a, b) < 1.0
        found.append(matching.triangulate(cameras, i, j, a[good], b[good]))
    positions = np.concatenate(found)
    points = SparsePoints(positions[np.isfinite(positions).all(axis=-1)])
    limits = depth_bounds.from_points(scene.frames, points)
    if limits is None:
        return scene
    measured = _with_depths(scene, limits, depth_bounds.FROM_IMAGES)
    return dataclasses.replace(measured, points=points)


def load_measured(
    path: str | pathlib.Path, *, size: tuple[int, int] | None = None, check: str = "all"
) -> Scene:
    """`load_scene`, and `measure_depths` where near and far would come from the cameras alone.

    What training, evaluation and rendering use: a range several times too wide wastes the
    layers, planes or samples of every system.

    Raises:
      InputError: as the two functions it is made of.
    """
    scene = load_scene(path, size=size, check=check)
    guessed = (depth_bounds.FROM_MEETING, depth_bounds.FROM_SPREAD)
    return measure_depths(scene) if scene.bounds in guessed else scene


def _with_depths(scene: Scene, limits: np.ndarray, bounds: str) -> Scene:
    """The scene with other near and far [n, 2]."""
    near, far = np.asarray(limits, np.float64).T
    if not np.all((0 < near) & (near < far) & (far < np.inf)):
        raise InputError(f"{scene.path}: near {near[0]:g}, far {far[0]:g}: need 0 < near < far.")
    cameras = dataclasses.replace(scene.cameras, near=near, far=far)
    # Whoever gives depths wants them for targets too.
    return dataclasses.replace(scene, cameras=cameras, bounds=bounds, points=None)


def _neighbours(poses: np.ndarray, pairs: int) -> list[tuple[int, int]]:
    """Pairs of cameras a short way apart that look the same way, spread over the scene."""
    centres, axes = poses[:, :3, 3], poses[:, :3, 2]
    count = len(poses)
    result = []
    for i in np.unique(np.linspace(0, count - 1, pairs // 2).astype(int)):
        distance = np.linalg.norm(centres - centres[i], axis=-1)
        distance[(axes @ axes[i] < np.cos(np.radians(25))) | (distance == 0)] = np.inf
        order = np.argsort(distance, kind="stable")
        # The nearest has most in common, a farther one more parallax.
        result += [(int(i), int(order[k])) for k in (0, 3) if k < count]
    return [(i, j) for i, j in result if axes[i] @ axes[j] >= np.cos(np.radians(25)) and i != j]


def find_scenes(path: str | os.PathLike) -> list[pathlib.Path]:
    """Paths for `load_scene` of all scenes directly inside a folder, sorted by name.

    The path of one scene, or of a camera file, gives itself.

    Raises:
      InputError: the path is not there or holds no scene.
    """
    return layouts.find(pathlib.Path(path))


def _scene(loaded: Loaded, path: pathlib.Path, size: tuple[int, int] | None) -> Scene:
    frames, names, points = _sorted(loaded)
    height, width = frames[0].height, frames[0].width
    if loaded.common_crop:
        height = min(frame.height for frame in frames)
        width = min(frame.width for frame in frames)
    windows = []
    for frame, name in zip(frames, names, strict=True):
        if (frame.height, frame.width) == (height, width) or size is not None:
            windows.append(Window(0, 0, frame.height, frame.width))
        elif loaded.common_crop:
            top, left = (frame.height - height) // 2, (frame.width - width) // 2
            windows.append(Window(top, left, height, width))
        else:
            raise InputError(
                f"{path}: frame {name!r} is {frame.width} x {frame.height} but {names[0]!r} is "
                f"{width} x {height}; pass size=(height, width) to bring them to one size."
            )
    bounds, near_far = loaded.bounds, np.array([[frame.near, frame.far] for frame in frames])
    if bounds is None:
        near_far, bounds = depth_bounds.from_cameras(frames)
    poses = np.stack([frame.world_from_cam for frame in frames])
    near, far = near_far.astype(np.float64).T
    cameras = Cameras(poses, np.zeros((len(frames), 4)), near, far, height, width)
    files = (names, loaded.source, bounds, path, frames, tuple(windows))
    scene = Scene(cameras, *files, loaded.world_from_scene, points)
    return _assemble(scene, windows, height, width)


def _assemble(scene: Scene, windows: Sequence[Window], height: int, width: int) -> Scene:
    if height < 1 or width < 1:
        raise InputError(f"{scene.path}: size {height} x {width}; expected at least 1 x 1.")
    intrinsics = [
        images.fit_intrinsics(frame.intrinsics, window, height, width)
        for frame, window in zip(scene.frames, windows, strict=True)
    ]
    cameras = dataclasses.replace(
        scene.cameras, intrinsics=np.stack(intrinsics), height=height, width=width
    )
    return dataclasses.replace(scene, cameras=cameras, windows=tuple(windows))


def _sorted(
    loaded: Loaded,
) -> tuple[tuple[Frame, ...], tuple[str, ...], SparsePoints | None]:
    """Frames by name, or in the order of the video, their names, and the points they see."""
    folders = [frame.path.parent for frame in loaded.frames]
    common = pathlib.Path(os.path.commonpath(folders))
    names = [frame.path.relative_to(common).as_posix() for frame in loaded.frames]
    order = list(range(len(names)))
    if not loaded.ordered:
        order.sort(key=lambda i: names[i])
    points = None if loaded.points is None else loaded.points.reordered(order)
    return tuple(loaded.frames[i] for i in order), tuple(names[i] for i in order), points


def _stored_image(frame: Frame) -> np.ndarray:
    image = images.decode(frame.path, frame.packed, frame.declared)
    if image.shape[:2] != (frame.height, frame.width):
        raise InputError(
            f"{frame.path}: the image is {image.shape[1]} x {image.shape[0]} but was "
            f"{frame.width} x {frame.height} when the scene was loaded (of a video, its first "
            "frame); load the scene again, or bring its images to one size."
        )
    if frame.distortion.is_pinhole:
        return image
    return distortion.undistort(image, frame.distortion, frame.stored, frame.intrinsics)
