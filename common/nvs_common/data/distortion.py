"""Lens distortion and its removal, in NumPy.

Coordinates are normalised: x = X / Z, y = Y / Z in camera axes. `Distortion` takes ideal
(pinhole) coordinates to those of the stored image, which is the direction that resampling
needs, so nothing is inverted numerically.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from nvs_common.errors import InputError

# Zoom of the undistorted camera against the stored one. Below the smaller value the corners of
# a fisheye image would be stretched beyond use; the larger one is a lens nobody calibrates.
MIN_ZOOM, MAX_ZOOM = 0.5, 4.0


@dataclasses.dataclass(frozen=True)
class Distortion:
    """Radial (polynomial or rational), tangential, or fisheye distortion.

    Attributes:
      radial: k of r^2, r^4, r^6, r^8 (of the angle's powers where `fisheye`).
      denominator: k of r^2, r^4, r^6 that divide the radial factor (FULL_OPENCV).
      tangential: p1, p2.
      fisheye: equidistant projection (OPENCV_FISHEYE).
    """

    radial: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    denominator: tuple[float, float, float] = (0.0, 0.0, 0.0)
    tangential: tuple[float, float] = (0.0, 0.0)
    fisheye: bool = False

    @property
    def is_pinhole(self) -> bool:
        """Whether the stored image needs no change."""
        return not (self.fisheye or any(self.radial + self.denominator + self.tangential))

    def radius(self, r: np.ndarray) -> np.ndarray:
        """Distorted radius of ideal radii r [*], without the tangential part."""
        if self.fisheye:
            angle = np.arctan(r)
            return angle * _polynomial(self.radial, angle**2)
        return r * _polynomial(self.radial, r**2) / _polynomial(self.denominator, r**2)

    def distort(self, xy: np.ndarray) -> np.ndarray:
        """Stored-image coordinates [..., 2] of ideal coordinates [..., 2], both normalised."""
        r = np.linalg.norm(xy, axis=-1)
        # The factor tends to 1 at the centre, also for the fisheye.
        factor = np.where(r > 1e-8, self.radius(r) / np.maximum(r, 1e-8), 1.0)
        x, y = xy[..., 0], xy[..., 1]
        p1, p2 = self.tangential
        return np.stack(
            [
                x * factor + 2 * p1 * x * y + p2 * (r**2 + 2 * x**2),
                y * factor + 2 * p2 * x * y + p1 * (r**2 + 2 * y**2),
            ],
            axis=-1,
        )


def _polynomial(coefficients: tuple[float, ...], square: np.ndarray) -> np.ndarray:
    """1 + k1 s + k2 s^2 + ..."""
    result = np.zeros_like(square)
    for k in reversed(coefficients):
        result = (result + k) * square
    return 1 + result


def normalised(intrinsics: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """(u - cx) / fx, (v - cy) / fy of pixels uv [..., 2] for fx, fy, cx, cy [4]."""
    return (uv - intrinsics[2:]) / intrinsics[:2]


def to_stored(
    distortion: Distortion, stored: np.ndarray, ideal: np.ndarray, uv: np.ndarray
) -> np.ndarray:
    """Pixels of the stored image [..., 2] for pixels uv [..., 2] of the ideal camera.

    Args:
      distortion: of the stored image.
      stored: [4] its fx, fy, cx, cy.
      ideal: [4] fx, fy, cx, cy of the pinhole camera.
      uv: [..., 2].
    """
    return distortion.distort(normalised(ideal, uv)) * stored[:2] + stored[2:]


def pinhole(distortion: Distortion, intrinsics: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pinhole camera that an undistorted image of the same size has.

    Focal lengths are multiplied by one zoom and the principal point keeps its pixel. The zoom
    is the smallest in [0.5, 4] for which every pixel of the result lies in the stored image, so
    no border is invented and as much of the view as possible stays.

    Args:
      distortion: of the stored image.
      intrinsics: [4] fx, fy, cx, cy of the stored image.
      height: rows.
      width: columns.

    Returns:
      [4] fx, fy, cx, cy.

    Raises:
      InputError: where the distortion folds the image over itself even at the largest zoom, or
        nothing but stored pixels cannot be had since the principal point is outside the image.
    """
    uv = _border(height, width)
    reach = _fold_radius(distortion)

    def whole(zoom: float) -> bool:
        ideal = _zoomed(intrinsics, zoom)
        if np.max(np.linalg.norm(normalised(ideal, uv), axis=-1)) > reach:
            return False
        source = to_stored(distortion, intrinsics, ideal, uv)
        # Half a pixel outside the outermost centres still lies on the stored pixels.
        return bool(np.all((source >= 0) & (source <= [width, height])))

    if not whole(MAX_ZOOM):
        raise InputError(_why_not(distortion, intrinsics, height, width, reach))
    low, high = MIN_ZOOM, MAX_ZOOM
    if whole(low):
        return _zoomed(intrinsics, low)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if whole(middle) else (middle, high)
    return _zoomed(intrinsics, high)


def _why_not(
    distortion: Distortion, intrinsics: np.ndarray, height: int, width: int, reach: float
) -> str:
    """Why no zoom gives a pinhole image of stored pixels alone."""
    ideal = _zoomed(intrinsics, MAX_ZOOM)
    folds = np.max(np.linalg.norm(normalised(ideal, _border(height, width)), axis=-1)) > reach
    cx, cy = intrinsics[2:]
    # Zooming in leads towards the principal point, and so out of the image.
    if not folds and not (0 <= cx <= width and 0 <= cy <= height):
        return (
            f"the principal point {cx:g}, {cy:g} is outside of the image ({width} x {height} "
            "pixels), and distortion is only removed around one inside; check cx and cy, or "
            "undistort the images first"
        )
    return (
        f"distortion {distortion.radial} {distortion.tangential} folds the image over itself; "
        "check the coefficients (they belong to normalised, not pixel, coordinates)"
    )


def _zoomed(intrinsics: np.ndarray, zoom: float) -> np.ndarray:
    return intrinsics * np.array([zoom, zoom, 1.0, 1.0])


def _border(height: int, width: int) -> np.ndarray:
    """Pixel centres of the image's outermost rows and columns [*, 2]."""
    u, v = np.arange(width) + 0.5, np.arange(height) + 0.5
    rows = [np.stack(np.broadcast_arrays(u, y), -1) for y in (v[0], v[-1])]
    columns = [np.stack(np.broadcast_arrays(x, v), -1) for x in (u[0], u[-1])]
    return np.concatenate(rows + columns)


def _fold_radius(distortion: Distortion) -> float:
    """Ideal radius up to which the distorted radius grows; beyond it the image folds back."""
    # Even steps in angle, up to 84 degrees off the axis.
    r = np.tan(np.linspace(0, np.arctan(10.0), 4000))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        falls = ~(np.diff(distortion.radius(r)) > 0)
    return float(r[np.argmax(falls)]) if falls.any() else float(r[-1])


# Scenes rarely have more than one camera, and a map of a large photograph is large.
@functools.lru_cache(maxsize=2)
def _source_pixels(
    distortion: Distortion,
    stored: tuple[float, ...],
    ideal: tuple[float, ...],
    height: int,
    width: int,
) -> np.ndarray:
    """Stored-image pixel [h, w, 2] of every pixel centre of the undistorted image."""
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    source = to_stored(distortion, np.array(stored), np.array(ideal), np.stack([u, v], -1))
    return source.astype(np.float32)


def undistort(
    image: np.ndarray, distortion: Distortion, stored: np.ndarray, ideal: np.ndarray
) -> np.ndarray:
    """The image [h, w, c] as the pinhole camera `ideal` [4] sees it, by bilinear interpolation."""
    height, width = image.shape[:2]
    source = _source_pixels(distortion, tuple(stored), tuple(ideal), height, width)
    # Pixel centres are at half-integers: index = coordinate - 0.5; edge pixels are repeated.
    x = np.clip(source[..., 0] - 0.5, 0, width - 1)
    y = np.clip(source[..., 1] - 0.5, 0, height - 1)
    x0 = np.minimum(x.astype(np.int32), max(width - 2, 0))
    y0 = np.minimum(y.astype(np.int32), max(height - 2, 0))
    x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    top = image[y0, x0] * (1 - fx) + image[y0, x1] * fx
    bottom = image[y1, x0] * (1 - fx) + image[y1, x1] * fx
    return top * (1 - fy) + bottom * fy
