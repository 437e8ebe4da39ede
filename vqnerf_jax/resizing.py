"""Resizing of images to the numbers that published image encoders were trained and tested with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from nvs_common.errors import InputError
from nvs_common.types import Array

METHODS = ("bilinear", "bilinear_antialias", "bicubic", "bicubic_antialias")
# The cubic kernel's parameter where PyTorch does not antialias; with antialias it is -0.5.
_SHARP = -0.75


def resize(images: Array, height: int, width: int, method: str = "bicubic_antialias") -> Array:
    """Resizes images [..., h, w, c] as PyTorch's `interpolate` does (align_corners=False).

    Args:
      images: any type of floats.
      height: rows of the result.
      width: columns of the result.
      method: a name of METHODS. `jax.image.resize` has another kernel for "bicubic".

    Raises:
      InputError: an unknown method.
    """
    if method not in METHODS:
        raise InputError(f"resize: method={method!r}; choose from {METHODS}.")
    if method == "bicubic":
        rows = _cubic_matrix(images.shape[-3], height).astype(images.dtype)
        columns = _cubic_matrix(images.shape[-2], width).astype(images.dtype)
        images = jnp.einsum("hi,...iwc->...hwc", rows, images, precision="highest")
        return jnp.einsum("wj,...hjc->...hwc", columns, images, precision="highest")
    kind, _, antialias = method.partition("_")
    shape = (*images.shape[:-3], height, width, images.shape[-1])
    highest = jax.lax.Precision.HIGHEST
    return jax.image.resize(images, shape, kind, antialias=bool(antialias), precision=highest)


def _cubic_matrix(source: int, target: int) -> np.ndarray:
    """Weights [target, source] of cubic convolution; beyond the edge the edge is repeated."""
    centres = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(centres).astype(int) - 1
    matrix = np.zeros((target, source))
    for tap in range(4):
        index = first + tap
        x = np.abs(centres - index)
        near = ((_SHARP + 2) * x - (_SHARP + 3)) * x**2 + 1
        far = _SHARP * (((x - 5) * x + 8) * x - 4)
        weight = np.where(x <= 1, near, np.where(x < 2, far, 0))
        np.add.at(matrix, (np.arange(target), np.clip(index, 0, source - 1)), weight)
    return matrix
