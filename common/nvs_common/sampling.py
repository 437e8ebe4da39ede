"""Bilinear gather and its exact adjoint, the splat.

Pixels are (u, v) with the centre of pixel (0, 0) at (0.5, 0.5). Outside the grid of pixel
centres an image is continued with zeros (`border="zero"`, which makes the gather linear in the
image and the splat its transpose) or with its edge (`border="edge"`, for colours, so that the
outermost half pixel does not fade to black).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import chex
import jax.numpy as jnp

from nvs_common.types import Array


class _Corner(NamedTuple):
    index: Array  # [...] int32 into the flattened image
    weight: Array  # [...]


def _corners(uv: Array, height: int, width: int) -> list[_Corner]:
    """The four neighbours of each pixel position; those outside the image have weight zero."""
    x, y = uv[..., 0] - 0.5, uv[..., 1] - 0.5
    # Positions far outside would overflow int32; every neighbour out there has weight zero.
    x, y = jnp.clip(x, -2, width + 1), jnp.clip(y, -2, height + 1)
    x0, y0 = jnp.floor(x), jnp.floor(y)
    fx, fy = x - x0, y - y0
    corners = []
    for column, weight_x in ((x0, 1 - fx), (x0 + 1, fx)):
        for row, weight_y in ((y0, 1 - fy), (y0 + 1, fy)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            column_safe, row_safe = jnp.clip(column, 0, width - 1), jnp.clip(row, 0, height - 1)
            index = (row_safe * width + column_safe).astype(jnp.int32)
            corners.append(_Corner(index, jnp.where(inside, weight_x * weight_y, 0)))
    return corners


def gather(image: Array, uv: Array, *, border: Literal["zero", "edge"] = "zero") -> Array:
    """Samples an image bilinearly.

    Args:
      image: [h, w, c].
      uv: [..., 2] pixels. A NaN position gives NaN.
      border: what lies outside the outermost pixel centres: zeros, or the edge's colour.

    Returns:
      [..., c] in the image's dtype.
    """
    chex.assert_rank(image, 3)
    chex.assert_axis_dimension(uv, -1, 2)
    height, width, channels = image.shape
    if border == "edge":
        lowest = jnp.full((2,), 0.5, uv.dtype)
        highest = jnp.array([width - 0.5, height - 0.5], uv.dtype)
        shape = (1,) * (uv.ndim - 1) + (2,)
        uv = jnp.clip(uv, lowest.reshape(shape), highest.reshape(shape))
    elif border != "zero":
        raise ValueError(f"border is {border!r}; expected 'zero' or 'edge'")
    flat = image.reshape(height * width, channels)
    total = jnp.zeros(uv.shape[:-1] + (channels,), image.dtype)
    for corner in _corners(uv, height, width):
        total += flat[corner.index] * corner.weight[..., None].astype(image.dtype)
    return total


def splat(values: Array, uv: Array, height: int, width: int) -> Array:
    """Adds values onto an image bilinearly: the exact adjoint of `gather` with zero border.

    Args:
      values: [..., c].
      uv: [..., 2] pixels.
      height: rows of the image.
      width: columns of the image.

    Returns:
      [h, w, c] sums, not normalised by the weights that fell on each pixel.
    """
    chex.assert_equal_shape_prefix([values, uv], uv.ndim - 1)
    chex.assert_axis_dimension(uv, -1, 2)
    channels = values.shape[-1]
    values, uv = values.reshape(-1, channels), uv.reshape(-1, 2)
    total = jnp.zeros((height * width, channels), values.dtype)
    for corner in _corners(uv, height, width):
        total = total.at[corner.index].add(values * corner.weight[:, None].astype(values.dtype))
    return total.reshape(height, width, channels)


def inside(uv: Array, height: int, width: int) -> Array:
    """Which positions [..., 2] lie within the image's area [0, w] x [0, h]; bool [...]."""
    u, v = uv[..., 0], uv[..., 1]
    return (u >= 0) & (u <= width) & (v >= 0) & (v <= height)
