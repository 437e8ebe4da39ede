"""Posed images to rows of numbers, one a patch, and back (LVSM, Sec. 3.1). Always float32."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange

from nvs_common import cameras
from nvs_common.errors import InputError
from nvs_common.types import Array, Cameras, Views

RAY_CHANNELS = 6
POSED_CHANNELS = 3 + RAY_CHANNELS


def of_views(views: Views, patch: int) -> Array:
    """Patches of views [b, v]: colours in [-1, 1], o x d and d of each pixel.

    Returns:
      [b, v, n, patch * patch * 9], pixels of a patch row by row, channels fastest.

    Raises:
      InputError: the images' sides are not multiples of the patch.
    """
    images = jnp.asarray(views.images, jnp.float32)
    posed = jnp.concatenate([2.0 * images - 1.0, cameras.plucker(views.cameras)], axis=-1)
    return patchify(posed, patch)


def of_cameras(targets: Cameras, patch: int) -> Array:
    """Patches of target cameras [b, t]: o x d and d of each pixel, [b, t, n, patch * patch * 6]."""
    return patchify(cameras.plucker(targets), patch)


def patchify(images: Array, patch: int) -> Array:
    """Cuts [..., h, w, c] into [..., n, patch * patch * c], patches row by row.

    Raises:
      InputError: the sides are not multiples of the patch.
    """
    height, width = images.shape[-3:-1]
    if height % patch or width % patch:
        raise InputError(
            f"images of {height} x {width} pixels: both sides must be multiples of the patch, "
            f"{patch}; choose another size."
        )
    return rearrange(images, "... (y p) (x q) c -> ... (y x) (p q c)", p=patch, q=patch)


def unpatchify(patches: Array, patch: int, height: int, width: int) -> Array:
    """The inverse of `patchify`: [..., n, patch * patch * c] to [..., height, width, c]."""
    y, x = height // patch, width // patch
    return rearrange(patches, "... (y x) (p q c) -> ... (y p) (x q) c", y=y, x=x, p=patch, q=patch)
