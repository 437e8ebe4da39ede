"""Decoding one image to RGB float32 in [0, 1], and cutting and resizing it with its camera.

A window is (top, left, height, width) in pixels of the stored image; height and width may be
fractional. Resizing to h x w multiplies fx, cx by w / window width and fy, cy by
h / window height, with nothing else to add because pixel centres lie at half-integers.
"""

from __future__ import annotations

import io
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import (
    Image,
    TiffImagePlugin,  # noqa: F401  (importing registers the reader)
    WebPImagePlugin,  # noqa: F401
)

from nvs_common.data import scene_files
from nvs_common.data.scene_files import Packed
from nvs_common.errors import InputError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
# A closed list: some of Pillow's readers start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM")
MAX_PIXELS = 150_000_000
_ORIENTATION = 0x0112
# EXIF orientations of an image, and how it is put upright: mirrors and half turns, then those of
# an image whose rows are columns in the file.
_MIRRORS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
}
_QUARTER_TURNS = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Window(NamedTuple):
    """A rectangle of the stored image; pixels [left, left + width] x [top, top + height]."""

    top: float
    left: float
    height: float
    width: float


def is_image(path: pathlib.Path) -> bool:
    """Whether the file's name ends like an image's, and is not a hidden one (macOS's `._a.png`)."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def same_aspect(size: tuple[int, int], declared: tuple[int, int]) -> bool:
    """Whether two sizes (rows, columns) differ by one factor, up to a pixel of rounding."""
    (height, width), (rows, columns) = size, declared
    low = max((width - 1) / columns, (height - 1) / rows)
    return low <= min((width + 1) / columns, (height + 1) / rows)


def probe(
    path: pathlib.Path, packed: Packed | None = None, declared: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Rows and columns of an image as `decode` gives it, from its header alone.

    Args:
      path: the file; of an image in an archive, what messages call it.
      packed: where the image is in an archive.
      declared: rows and columns that the image's camera is for, or those of a larger copy. They
        decide whether an image that EXIF turns is turned; without them it is refused.

    Raises:
      InputError: missing, empty, unreadable, not an image, too large, or turned by EXIF.
    """
    with _open(path, packed) as image:
        turned = _turn(image, path, declared) is not None
        return (image.width, image.height) if turned else (image.height, image.width)


def decode(
    path: pathlib.Path, packed: Packed | None = None, declared: tuple[int, int] | None = None
) -> np.ndarray:
    """An image as float32 [h, w, 3] in [0, 1].

    Grey becomes RGB. 16-bit grey is scaled by 65535; of 16-bit colours, and of grey with alpha,
    the upper 8 bits are read. Straight alpha is composited on white here, before any resampling,
    so that hidden colours never bleed into the edge.

    Args:
      path: as of `probe`.
      packed: as of `probe`.
      declared: as of `probe`.

    Raises:
      InputError: as `probe`, or the data ends early or is damaged, or holds other values.
    """
    with _open(path, packed) as image:
        return _to_rgb(_upright(image, path, declared), path)


def decode_upright(path: pathlib.Path) -> np.ndarray:
    """`decode` of an image that no camera describes: turned as its EXIF asks, whichever way.

    Raises:
      InputError: as `decode`, but for the turn.
    """
    with _open(path, None) as image:
        orientation = _orientation(image)
        turn = (_MIRRORS | _QUARTER_TURNS).get(orientation)
        # Pillow turns a TIFF by itself when it is decoded.
        return _to_rgb(_decoded(image, path, None if image.format == "TIFF" else turn), path)


def has_alpha(path: pathlib.Path, packed: Packed | None = None) -> bool:
    """Whether an image has an alpha channel, from its header alone; arguments as of `probe`."""
    with _open(path, packed) as image:
        return image.mode in ("RGBA", "LA", "La", "RGBa")


def decode_alpha(
    path: pathlib.Path, packed: Packed | None = None, declared: tuple[int, int] | None = None
) -> np.ndarray:
    """The alpha channel of an image that has one: float32 [h, w] in [0, 1].

    Raises:
      InputError: as `decode`.
    """
    with _open(path, packed) as image:
        upright = _upright(image, path, declared)
        return np.asarray(upright.getchannel(upright.getbands()[-1]), np.float32) / 255


def _open(path: pathlib.Path, packed: Packed | None) -> Image.Image:
    try:
        if packed is None and not path.is_file():
            raise InputError(f"{path}: the image does not exist.")
        if (path.stat().st_size if packed is None else packed.count) == 0:
            raise InputError(f"{path}: the image file is empty (zero bytes); copy it again.")
        content = path if packed is None else io.BytesIO(scene_files.read_packed(packed, str(path)))
        image = Image.open(content, formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{path}: not an image of a known format {FORMATS}.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: the image cannot be read ({reason}).") from error
    try:
        _check(image, path)
    except InputError:
        image.close()
        raise
    return image


def _upright(
    image: Image.Image, path: pathlib.Path, declared: tuple[int, int] | None
) -> Image.Image:
    """The decoded image, turned where `_turn` says so."""
    return _decoded(image, path, _turn(image, path, declared))


def _decoded(image: Image.Image, path: pathlib.Path, turn: Image.Transpose | None) -> Image.Image:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(
            f"{path}: cannot be decoded ({error}); the file is damaged or cut short."
        ) from error
    return image if turn is None else image.transpose(turn)


def _check(image: Image.Image, path: pathlib.Path) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f"{path}: {image.width} x {image.height} pixels; at most {MAX_PIXELS} are allowed."
        )


def _turn(
    image: Image.Image, path: pathlib.Path, declared: tuple[int, int] | None
) -> Image.Transpose | None:
    """How an image is turned to become the one that its camera describes; None for not at all.

    Structure from motion mostly reads the stored rows, whatever EXIF says of them: they are kept
    where their size can be the camera's. Where only the turned size can be, the image is turned.
    """
    orientation = _orientation(image)
    if orientation in (0, 1):
        return None
    stored, turned = (image.height, image.width), (image.width, image.height)
    # Pillow turns a TIFF by itself, so that its stored rows are out of reach.
    told = declared if image.format != "TIFF" and orientation in _QUARTER_TURNS else None
    # Half turns and mirrors leave the size as it is, which then says nothing.
    if told is not None and min(told) > 0:
        # Where rounding lets both sizes pass, the very size decides.
        for fits in (same_aspect, tuple.__eq__):
            if fits(stored, told) != fits(turned, told):
                return None if fits(stored, told) else _QUARTER_TURNS[orientation]
    raise InputError(
        f"{path}: EXIF orientation {orientation} turns the image away from its stored rows, and "
        "no width and height of its camera tell which of the two that describes; rotate the "
        "pixels and drop the tag."
    )


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1, upright, where there is none."""
    # Asking a PNG without EXIF for its EXIF would decode it.
    if "exif" not in image.info and image.format != "TIFF":
        return 1
    return image.getexif().get(_ORIENTATION, 1)


def _to_rgb(image: Image.Image, path: pathlib.Path) -> np.ndarray:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = np.asarray(image).astype(np.float32) / 65535
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.mode in ("I", "F"):
        raise InputError(f"{path}: holds {image.mode} values without a known range; save as PNG.")
    # A palette or a plain RGB PNG can have one transparent colour.
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"), np.float32) / 255
        return rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:])
    return np.asarray(image.convert("RGB"), np.float32) / 255


def fit_window(window: Window, height: int, width: int) -> Window:
    """The largest centred part of a window with the aspect of height x width.

    The corner is a whole number of pixels from the window's, so that a crop without a change of
    scale copies pixels.
    """
    scale = max(height / window.height, width / window.width)
    # At least one stored pixel: a very long and thin request keeps a positive window.
    rows, columns = max(height / scale, 1.0), max(width / scale, 1.0)
    top, left = (window.height - rows) // 2, (window.width - columns) // 2
    return Window(window.top + max(top, 0.0), window.left + max(left, 0.0), rows, columns)


def fit_intrinsics(intrinsics: np.ndarray, window: Window, height: int, width: int) -> np.ndarray:
    """fx, fy, cx, cy [4] after cutting out the window and resizing it to height x width."""
    corner = np.array([0.0, 0.0, window.left, window.top])
    factor = np.array([width / window.width, height / window.height] * 2)
    return (intrinsics - corner) * factor


def resample(image: np.ndarray, window: Window, height: int, width: int) -> np.ndarray:
    """Cuts the window out of an image [*, *, 3] and resizes it to [h, w, 3], antialiased.

    Lanczos with support that grows with the reduction, clipped to [0, 1] afterwards.
    """
    top, left = int(window.top), int(window.left)
    if (window.height, window.width) == (height, width) and (top, left) == window[:2]:
        return np.ascontiguousarray(image[top : top + height, left : left + width])
    box = (
        window.left,
        window.top,
        min(window.left + window.width, image.shape[1]),
        min(window.top + window.height, image.shape[0]),
    )
    planes = [
        Image.fromarray(np.ascontiguousarray(image[..., c], np.float32)).resize(
            (width, height), Image.Resampling.LANCZOS, box=box
        )
        for c in range(3)
    ]
    return np.clip(np.stack([np.asarray(plane) for plane in planes], axis=-1), 0.0, 1.0)
