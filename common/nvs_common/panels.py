"""Pictures that people look at: coloured depth, error maps, strips of views. uint8 NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

# Colours from far (dark) to near (bright), of steadily rising lightness, so that the map also
# reads in grey and by colour-blind eyes.
_ANCHORS = np.array(
    [
        [10, 7, 35],
        [44, 24, 98],
        [63, 54, 140],
        [56, 92, 152],
        [45, 127, 150],
        [52, 160, 134],
        [112, 190, 103],
        [186, 214, 82],
        [253, 236, 130],
    ],
    np.float64,
)
_GAP = 2  # pixels between pictures of a strip


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Intensities in [0, 1] (clamped) to 0..255."""
    return np.round(np.clip(np.asarray(image, np.float64), 0.0, 1.0) * 255.0).astype(np.uint8)


def colors(values: np.ndarray) -> np.ndarray:
    """Values [...] in [0, 1] (clamped, NaN is 0) as colours [..., 3] uint8, dark to bright."""
    place = np.clip(np.nan_to_num(values), 0.0, 1.0) * (len(_ANCHORS) - 1)
    grid = np.arange(len(_ANCHORS))
    channels = [np.interp(place, grid, _ANCHORS[:, channel]) for channel in range(3)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def disparity_range(depth: np.ndarray) -> tuple[float, float]:
    """Lowest and highest disparity worth a colour: the 2nd and 98th percentile of 1 / depth.

    Depths that are not positive and finite are left out; with none left it is (0, 1).
    """
    usable = depth[np.isfinite(depth) & (depth > 0)]
    if usable.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(1.0 / usable, [2, 98])
    return float(low), float(high)


def depth_image(depth: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Z-depth [h, w] as colours by disparity, near is bright; no depth is black.

    Args:
      depth: [h, w] in world units.
      limits: lowest and highest disparity, `disparity_range(depth)` by default; fix them to
        compare images.
    """
    low, high = disparity_range(depth) if limits is None else limits
    usable = np.isfinite(depth) & (depth > 0)
    disparity = 1.0 / np.where(usable, depth, 1.0)
    # An image of one depth has an empty range: all of it in the middle of the scale.
    flat = high - low < 1e-9 * max(abs(high), 1e-30)
    scaled = np.full(depth.shape, 0.5) if flat else (disparity - low) / (high - low)
    return np.where(usable[..., None], colors(scaled), 0).astype(np.uint8)


def error_image(pred: np.ndarray, truth: np.ndarray, limit: float = 0.25) -> np.ndarray:
    """Mean absolute error over channels as colours, dark is none and bright is `limit` or more.

    Args:
      pred: [h, w, 3] in [0, 1].
      truth: [h, w, 3] in [0, 1].
      limit: error at the end of the scale; fixed, so that images compare.
    """
    return colors(np.abs(np.asarray(pred, np.float64) - truth).mean(axis=-1) / limit)


def strip(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images [h, w, 3] uint8 of one height side by side with a thin grey gap."""
    gap = np.full((images[0].shape[0], _GAP, 3), 128, np.uint8)
    parts = [part for image in images for part in (gap, image)]
    return np.concatenate(parts[1:], axis=1)


def thumbnail(image: np.ndarray, height: int) -> np.ndarray:
    """The image [h, w, 3] uint8 shrunk to a height; a smaller one is returned as it is."""
    if image.shape[0] <= height:
        return image
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized)
