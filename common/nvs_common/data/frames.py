"""Frames as LVSM's published evaluation prepares them, to the bit where Pillow is the same.

Images are resized as 8-bit pictures (Lanczos) so that their height is the model's image size and
their width a multiple of the patch, and centre-cropped to a square. `Scene.resized` crops first
and resizes in floating point: better pictures, but not those of the published tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from nvs_common.errors import InputError
from nvs_common.types import Cameras


class Layout(NamedTuple):
    """How a stored image becomes a frame: resized to `height` x `width`, then cropped.

    Attributes:
      height, width: after resizing.
      top, left: corner of the crop.
      rows, columns: of the crop.
    """

    height: int
    width: int
    top: int
    left: int
    rows: int
    columns: int


def layout(height: int, width: int, size: int, patch: int, *, square: bool = True) -> Layout:
    """The layout for stored images of height x width.

    Args:
      height: stored rows.
      width: stored columns.
      size: rows after resizing.
      patch: the width is rounded to a multiple of it, halves to the even one.
      square: crop the centre to the shorter side.

    Raises:
      InputError: size is no multiple of the patch, or nothing would be left of the width.
    """
    if size < 1 or patch < 1 or size % patch:
        raise InputError(f"image size {size} is not a multiple of the patch size {patch}.")
    # Whole pixels first, then the patch: two roundings, as published.
    columns = round(int(size / height * width) / patch) * patch
    if columns < patch:
        raise InputError(f"images of {height}x{width} are too narrow for patches of {patch}.")
    if not square:
        return Layout(size, columns, 0, 0, size, columns)
    side = min(size, columns)
    return Layout(size, columns, (size - side) // 2, (columns - side) // 2, side, side)


def image(stored: np.ndarray, made: Layout) -> np.ndarray:
    """The frame [rows, columns, 3] float32 in [0, 1] of a stored image [h, w, 3] uint8."""
    resized = Image.fromarray(stored).resize((made.width, made.height), Image.Resampling.LANCZOS)
    window = np.asarray(resized)[made.top : made.top + made.rows][
        :, made.left : made.left + made.columns
    ]
    return window.astype(np.float32) / np.float32(255)


def intrinsics(stored: np.ndarray, size: tuple[int, int], made: Layout) -> np.ndarray:
    """fx, fy, cx, cy [..., 4] of frames, from those of stored images of `size` (h, w)."""
    factor = np.array([made.width / size[1], made.height / size[0]] * 2)
    return stored * factor - np.array([0, 0, made.left, made.top])


@dataclasses.dataclass(frozen=True)
class FrameScene:
    """A scene whose views are frames; what evaluation needs of a scene, and no more.

    Attributes:
      scene: of stored images.
      cameras: [n] of the frames.
      made: their layout.
    """

    scene: Any
    cameras: Cameras
    made: Layout

    @property
    def names(self) -> tuple[str, ...]:
        """Image names, in the order of the cameras."""
        return self.scene.names

    @property
    def source(self) -> str:
        """The scene's layout on disk."""
        return self.scene.source

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """Frames [k, h, w, 3] float32 in [0, 1].

        Raises:
          InputError: an image cannot be decoded.
        """
        # Decoding gives multiples of 1 / 255 for 8-bit images: rounding gives them back exactly.
        stored = np.round(255 * self.scene.images(indices)).astype(np.uint8)
        return np.stack([image(picture, self.made) for picture in stored])


def prepare(scene: Any, size: int, patch: int, *, square: bool = True) -> FrameScene:
    """The scene as frames of a model; arguments as of `layout`. Nothing is decoded.

    Raises:
      InputError: as `layout`.
    """
    old = scene.cameras
    made = layout(old.height, old.width, size, patch, square=square)
    k = intrinsics(np.asarray(old.intrinsics, np.float64), (old.height, old.width), made)
    cameras = dataclasses.replace(old, intrinsics=k, height=made.rows, width=made.columns)
    return FrameScene(scene, cameras, made)
