"""How well views of one scene agree: each is warped into each other one by depth and compared.

Unlike a comparison with true images this does not punish what is plausible but different, only
what differs from view to view. True depth decides what is compared, so that no method can hide
its errors behind a depth of its own. Blurred views agree easily: read it beside PSNR.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from nvs_common import temporal
from nvs_common.errors import InputError
from nvs_common.types import Array, Cameras


@flax.struct.dataclass
class Consistency:
    """Differences between warped views, float32 scalars.

    Attributes:
      squared: mean squared difference over the pixels compared; NaN where there are none.
      share: part of the foreground pixels, in all pairs of views, that were compared.
    """

    squared: Array
    share: Array

    @property
    def decibels(self) -> Array:
        """The squared difference as a PSNR; equal views give 100."""
        return -10.0 * jnp.log10(jnp.maximum(self.squared, temporal.MIN_MSE))


def cross_view(
    images: Any,
    depth: Any,
    cameras: Cameras,
    mask: Any = None,
    *,
    tolerance: float = temporal.TOLERANCE,
) -> Consistency:
    """Compares each view with every other one where both see the same surface.

    Args:
      images: [v, h, w, 3].
      depth: [v, h, w] true z-depth; where it is no positive number there is nothing to compare.
      cameras: [v].
      mask: [v, h, w], foreground where it is more than a half; by default all that has depth.
      tolerance: see `temporal.flicker`.

    Raises:
      InputError: arrays that do not fit together.
    """
    images, depth = jnp.asarray(images, jnp.float32), jnp.asarray(depth, jnp.float32)
    shapes = {"depth": depth.shape, "cameras": (*jnp.shape(cameras.near), *depth.shape[1:])}
    shapes |= {} if mask is None else {"mask": jnp.shape(mask)}
    if wrong := {name: shape for name, shape in shapes.items() if shape != images.shape[:-1]}:
        raise InputError(
            f"images have shape {images.shape}, and {wrong}: expected one map and one camera for "
            "each image, of its size."
        )
    known = jnp.isfinite(depth) & (depth > 0)
    if mask is not None:
        known &= jnp.asarray(mask) > 0.5
    count = depth.shape[0]
    frames = temporal.Frame(images, jnp.where(known, depth, 0.0), cameras)

    def shifted(shift: Array) -> tuple[Array, Array]:
        order = (jnp.arange(count) + shift) % count
        others = jax.tree.map(lambda x: jnp.take(jnp.asarray(x), order, axis=0), frames)
        warped, same = jax.vmap(lambda a, b: temporal.warp(a, b, tolerance=tolerance))(
            others, frames
        )
        same &= known
        difference = jnp.where(same[..., None], warped - images, 0.0)
        return jnp.sum(jnp.square(difference)), jnp.sum(same)

    squared, compared = jax.lax.map(shifted, jnp.arange(1, count))
    total = jnp.sum(compared)
    return Consistency(
        jnp.sum(squared) / (3.0 * total), total / jnp.maximum((count - 1) * jnp.sum(known), 1)
    )
