"""Depth of scene folders: a map beside each image, of its size, of z-depth in world units.

    depth/NAME.npy, NAME_depth.npy    floats; 0, infinity and NaN are background
    depth/NAME.png, NAME_depth.png    16 bits, thousandths of a world unit; 0 is background

NAME is that of the image without its extension; the folder `depth` is in the image's own, or
beside it where that is one of images alone (images, rgb, ...).
"""

from __future__ import annotations

import pathlib

import numpy as np
from PIL import Image

from nvs_common.data import images, scene_files
from nvs_common.data.images import Window
from nvs_common.errors import InputError

FOLDER, SUFFIX = "depth", "_depth"
EXTENSIONS = (".npy", ".png")
UNIT = 1e-3
# Starts of the names of folders that hold images and nothing else of a scene.
_OF_IMAGES = ("image", "rgb")


def find(image: pathlib.Path) -> pathlib.Path | None:
    """The depth of an image, or None where there is none."""
    tries = [image.parent / FOLDER / image.stem]
    if image.parent.name.startswith(_OF_IMAGES):
        tries.append(image.parent.parent / FOLDER / image.stem)
    tries.append(image.parent / (image.stem + SUFFIX))
    paths = [path.with_name(path.name + end) for path in tries for end in EXTENSIONS]
    return next((path for path in paths if path.is_file()), None)


def read(
    image: pathlib.Path, stored: tuple[int, int], window: Window, height: int, width: int
) -> np.ndarray:
    """The depth of a view at its size: float32 [h, w], 0 where there is background.

    Resized to the nearest pixel: a mean over an edge would lie in mid-air.

    Args:
      image: the stored image.
      stored: its rows and columns.
      window: the part of it that becomes the view.
      height: rows of the view.
      width: columns of the view.

    Raises:
      InputError: no depth, of another size than the image, negative, or no file of depth.
    """
    path = find(image)
    if path is None:
        raise InputError(
            f"{image}: no depth; expected {FOLDER}/{image.stem}.npy (z-depth in world units) or "
            ".png (16 bits, thousandths of a unit); convert .exr files to .npy."
        )
    depth = _decoded(path)
    if depth.shape != stored:
        raise InputError(
            f"{path}: depth of {' x '.join(map(str, depth.shape))}, but its image {image.name} has "
            f"{stored[0]} x {stored[1]} rows and columns; render both at one size."
        )
    if (depth < 0).any():
        raise InputError(f"{path}: {int((depth < 0).sum())} depths are negative; 0 is background.")
    rows = window.top + (np.arange(height) + 0.5) * window.height / height
    columns = window.left + (np.arange(width) + 0.5) * window.width / width
    row, column = (
        np.clip(np.floor(place).astype(int), 0, size - 1)
        for place, size in zip((rows, columns), stored, strict=True)
    )
    return depth[row[:, None], column]


def _decoded(path: pathlib.Path) -> np.ndarray:
    """Depth [h, w] float32 as stored, background 0."""
    if path.suffix == ".npy":
        depth = scene_files.read_npy(path)
        if depth.ndim == 3 and depth.shape[-1] == 1:
            depth = depth[..., 0]
        if depth.ndim != 2 or depth.dtype.kind != "f":
            raise InputError(f"{path}: {depth.dtype} {depth.shape}; expected floats [h, w].")
        return np.where(np.isfinite(depth), depth, 0).astype(np.float32)
    images.probe(path)
    with Image.open(path, formats=("PNG",)) as image:
        if not image.mode.startswith("I"):
            raise InputError(f"{path}: mode {image.mode}; expected a PNG of 16 bits, one channel.")
        try:
            return np.asarray(image).astype(np.float32) * np.float32(UNIT)
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"{path}: cannot be decoded ({error}); write it again.") from error
