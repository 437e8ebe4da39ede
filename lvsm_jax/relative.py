"""Relative camera encodings in attention: PRoPE (arXiv 2507.10496) and GTA (arXiv 2310.10375).

The first half of a head's features, in groups of four, is multiplied by the projection matrix of
its token's camera, and the two other quarters are rotated by the column and the row of its patch,
so that attention sees only how a query's camera and a key's stand to each other. Values are moved
to the query's frame in the same way. No parameters. Always float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nvs_common import cameras
from nvs_common.types import Array, Cameras

KINDS = ("none", "prope", "gta")
_FREQUENCY_BASE = 100.0


class Frames(NamedTuple):
    """Where tokens look from and where in their image they lie.

    Attributes:
      matrix: [..., n, 4, 4] camera or projection from world.
      inverse: [..., n, 4, 4].
      angles: [..., n, 2, f / 8] rotations by column and row.
    """

    matrix: Array
    inverse: Array
    angles: Array


def frames(cams: Cameras, patch: int, head_size: int, kind: str) -> Frames | None:
    """The frames of the patches of cameras [b, v], [b, v, n, ...]; None if kind is "none"."""
    if kind == "none":
        return None
    rows, columns = cams.height // patch, cams.width // patch
    world_from_cam = jnp.asarray(cams.world_from_cam, jnp.float32)
    matrix, inverse = cameras.invert(world_from_cam), world_from_cam
    if kind == "prope":
        k, k_inverse = _lifted_intrinsics(cams)
        matrix, inverse = cameras.compose(k, matrix), cameras.compose(inverse, k_inverse)
    frequencies = _FREQUENCY_BASE ** -jnp.linspace(0, 1, head_size // 8, endpoint=False)
    y, x = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    place = jnp.stack([x.reshape(-1), y.reshape(-1)], axis=-1)
    angles = place[..., None] * frequencies.reshape(1, 1, -1)
    lead, n = world_from_cam.shape[:-2], rows * columns
    angles = angles.reshape((1,) * len(lead) + angles.shape)
    angles = jnp.broadcast_to(angles, (*lead, *angles.shape[-3:]))
    each = lambda x: jnp.broadcast_to(x[..., None, :, :], (*lead, n, 4, 4))  # noqa: E731
    return Frames(each(matrix), each(inverse), angles)


def encode_query(q: Array, at: Frames | None) -> Array:
    """Queries [..., n, a, f] in their tokens' frames."""
    return q if at is None else _apply(q, jnp.swapaxes(at.matrix, -1, -2), at.angles)


def encode_key_value(x: Array, at: Frames | None) -> Array:
    """Keys or values [..., m, a, f] in the world's frame."""
    return x if at is None else _apply(x, at.inverse, at.angles)


def decode_attended(x: Array, at: Frames | None) -> Array:
    """What queries attended to, [..., n, a, f], from the world's frame to their tokens'."""
    return x if at is None else _apply(x, at.matrix, -at.angles)


def concatenate(parts: list[Frames | None]) -> Frames | None:
    """Frames of tokens after one another, along the axis of tokens; all or none are None."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return Frames(
        jnp.concatenate([part.matrix for part in known], axis=-3),
        jnp.concatenate([part.inverse for part in known], axis=-3),
        jnp.concatenate([part.angles for part in known], axis=-3),
    )


def _lifted_intrinsics(cams: Cameras) -> tuple[Array, Array]:
    """4 x 4 intrinsics of images of side 1 centred at 0, and their inverses."""
    size = jnp.asarray([cams.width, cams.height] * 2, jnp.float32)
    k = jnp.asarray(cams.intrinsics, jnp.float32)
    k = k / size.reshape((1,) * (k.ndim - 1) + (4,))
    fx, fy, cx, cy = jnp.moveaxis(k, -1, 0)
    cx, cy, zero, one = cx - 0.5, cy - 0.5, jnp.zeros_like(fx), jnp.ones_like(fx)

    def matrix(fx: Array, fy: Array, cx: Array, cy: Array) -> Array:
        rows = [
            fx,
            zero,
            cx,
            zero,
            zero,
            fy,
            cy,
            zero,
            zero,
            zero,
            one,
            zero,
            zero,
            zero,
            zero,
            one,
        ]
        return jnp.stack(rows, axis=-1).reshape(*fx.shape, 4, 4)

    return matrix(fx, fy, cx, cy), matrix(1 / fx, 1 / fy, -cx / fx, -cy / fy)


def _apply(x: Array, matrix: Array, angles: Array) -> Array:
    """Multiplies the first half of x [..., n, a, f] by matrices and rotates the other quarters."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    half, quarter = x.shape[-1] // 2, x.shape[-1] // 4
    groups = wide[..., :half].reshape(*x.shape[:-1], -1, 4)
    # Sums of four products, not tiny matrix products.
    moved = jnp.sum(matrix[..., None, None, :, :] * groups[..., None, :], axis=-1)
    parts = [moved.reshape(*x.shape[:-1], half)]
    for index in range(2):
        start = half + index * quarter
        one, two = jnp.split(wide[..., start : start + quarter], 2, axis=-1)
        cos, sin = (f(angles[..., index, :])[..., None, :] for f in (jnp.cos, jnp.sin))
        parts += [cos * one + sin * two, cos * two - sin * one]
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


def take(at: Frames | None, keep: slice) -> Frames | None:
    """The frames [b, n, ...] of some tokens."""
    return jax.tree.map(lambda x: x[:, keep], at)
