"""A folder of images without cameras, for what learns from single images.

It looks like a scene, so that the pipeline has one kind of source: its cameras all stand at the
origin, with a field of view of 90 degrees, and mean nothing.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from nvs_common.data import images, scene_files
from nvs_common.data.images import Window
from nvs_common.errors import InputError
from nvs_common.types import Cameras


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Images of a folder and of those in it, sorted by path.

    Attributes:
      cameras: [n], see above.
      names: paths relative to the folder.
      path: the folder.
    """

    cameras: Cameras
    names: tuple[str, ...]
    path: pathlib.Path
    source: str = "image folder"
    bounds: str = "no cameras"

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """Images [k, h, w, 3] float32, upright, centre-cropped to the size's aspect and resized.

        Raises:
          InputError: an image cannot be decoded.
        """
        height, width = self.cameras.height, self.cameras.width
        made = np.empty((len(indices), height, width, 3), np.float32)
        for k, i in enumerate(indices):
            image = images.decode_upright(self.path / self.names[i])
            window = images.fit_window(Window(0, 0, *image.shape[:2]), height, width)
            made[k] = images.resample(image, window, height, width)
        return made

    def resized(self, height: int, width: int) -> ImageFolder:
        """The same images at another size."""
        return dataclasses.replace(self, cameras=_cameras(len(self.names), height, width))


def load(path: str, *, size: tuple[int, int]) -> ImageFolder:
    """Lists the images of a folder, at any depth; they are decoded when asked for.

    Args:
      path: the folder.
      size: (height, width) that images get.

    Raises:
      InputError: no such folder, or fewer than two images in it.
    """
    root = pathlib.Path(path)
    if not root.is_dir():
        raise InputError(f"images:{path}: no such folder.")
    names = sorted(
        file.relative_to(root).as_posix()
        for file in root.rglob("*")
        if images.is_image(file) and file.is_file()
    )
    if not 2 <= len(names) <= scene_files.MAX_FRAMES:
        raise InputError(
            f"images:{path}: {len(names)} images; expected from 2 to {scene_files.MAX_FRAMES}, "
            f"with endings {', '.join(images.EXTENSIONS)}."
        )
    return ImageFolder(_cameras(len(names), *size), tuple(names), root)


def _cameras(count: int, height: int, width: int) -> Cameras:
    poses = np.tile(np.eye(4), (count, 1, 1))
    focal = 0.5 * max(height, width)
    k = np.tile([focal, focal, width / 2, height / 2], (count, 1))
    ones = np.ones(count)
    return Cameras(poses, k, ones, 2 * ones, height, width)
