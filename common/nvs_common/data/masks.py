"""Masks of scene folders: which share of each pixel the object covers.

A mask is a file of its own (the folder `mask` or `masks` of NeuS's and IDR's layout, nerfstudio's
`mask_path`; white is the object) or the alpha channel of the image itself.
"""

from __future__ import annotations

import pathlib

import numpy as np

from nvs_common.data import distortion, images, scene_files
from nvs_common.data.images import Window
from nvs_common.data.scene_formats import Frame
from nvs_common.errors import InputError

FOLDERS = ("mask", "masks")


def known(frame: Frame) -> bool:
    """Whether a frame has a mask: a file, or an alpha channel, by the image's header."""
    return frame.mask is not None or images.has_alpha(frame.path, frame.packed)


def read(frame: Frame, window: Window, height: int, width: int) -> np.ndarray:
    """The mask of a view, undistorted and at its size: float32 [h, w] in [0, 1].

    Raises:
      InputError: there is none, it cannot be decoded, or has another size than the image.
    """
    if frame.mask is not None:
        mask = images.decode(frame.mask, declared=frame.declared)[..., 0]
    elif images.has_alpha(frame.path, frame.packed):
        mask = images.decode_alpha(frame.path, frame.packed, frame.declared)
    else:
        raise InputError(
            f"{frame.path}: no mask: the image has no alpha channel, and there is no mask file "
            f"for it; add one (folder {FOLDERS[0]!r} beside the images), or train without masks "
            "(data.with_mask=False, loss.mask_weight=0)."
        )
    if mask.shape != (frame.height, frame.width):
        raise InputError(
            f"{frame.mask or frame.path}: the mask is {mask.shape[1]} x {mask.shape[0]} but its "
            f"image {frame.path.name} is {frame.width} x {frame.height}; resize the mask."
        )
    if not frame.distortion.is_pinhole:
        planes = np.repeat(mask[..., None], 3, axis=-1)
        planes = distortion.undistort(planes, frame.distortion, frame.stored, frame.intrinsics)
        mask = planes[..., 0]
    planes = np.repeat(mask[..., None], 3, axis=-1)
    return images.resample(planes, window, height, width)[..., 0]


def beside(root: pathlib.Path, count: int, path: pathlib.Path) -> list[str] | None:
    """Masks of a scene whose images are matched by order, relative to it; None without a folder.

    Raises:
      InputError: another number of masks than of images.
    """
    folder = next((root / name for name in FOLDERS if (root / name).is_dir()), None)
    if folder is None:
        return None
    files = [file for file in scene_files.entries(folder) if images.is_image(file)]
    if len(files) != count:
        raise InputError(
            f"{path}: {count} cameras but {len(files)} masks in {folder}; the two are matched by "
            "order: add the missing masks, or move the folder away to train without masks."
        )
    return [file.relative_to(root).as_posix() for file in files]
