"""Random crops of the targets: what is drawn and compared, of a map solved for the whole view.

Quark is trained on crops of 256 x 256 and then 512 x 512 pixels of full-resolution targets
(Sec. 3.4): the layered depth map and everything before it do not know of the crop.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nvs_common import cameras
from nvs_common.errors import InputError
from nvs_common.types import Array, Cameras, Views
from quark_jax import ldm


def random_windows(key: Array, targets: Cameras, size: int) -> ldm.Window | None:
    """A square window for each scene, the same in all of its targets; None where size is 0.

    Args:
      key: PRNG key; the windows are a function of it alone.
      targets: [b, t].
      size: side of the windows in pixels.

    Returns:
      Corners [b, t].

    Raises:
      InputError: the targets are smaller than the windows.
    """
    if size == 0:
        return None
    height, width = targets.height, targets.width
    if not 0 < size <= min(height, width):
        raise InputError(
            f"loss.crop={size}, but targets are {height}x{width}: choose a size from 1 to "
            f"{min(height, width)}, or 0 for the whole target."
        )
    scenes, count = targets.near.shape
    most = jnp.array([height - size, width - size])
    corners = jax.random.randint(key, (scenes, 2), 0, most.reshape(1, 2) + 1)
    # Neighbouring targets share their window, so that one can be compared with the next.
    top, left = (jnp.broadcast_to(side[:, None], (scenes, count)) for side in corners.T)
    return ldm.Window(top, left, size, size)


def cut(views: Views, window: ldm.Window | None) -> Views:
    """The windows of views [b, t]: their pixels, and cameras that see these alone."""
    if window is None:
        return views
    top, left, height, width = window

    def one(view: Views, top: Array, left: Array) -> Views:
        corner = (top, left, jnp.zeros_like(top))
        pixels = jax.lax.dynamic_slice(jnp.asarray(view.images), corner, (height, width, 3))
        return Views(pixels, cameras.crop(view.cameras, top, left, height, width))

    return jax.vmap(jax.vmap(one))(views, jnp.asarray(top), jnp.asarray(left))
