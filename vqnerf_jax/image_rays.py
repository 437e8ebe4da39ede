"""Rays of images, of the latents that a decoder makes images of, and rendering them in parts.

A latent stands for a block of factor x factor pixels, and its ray passes through the middle of that
block (Sec. 3.2 of arXiv 2310.14487 says the grid's size alone).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from nvs_common import cameras
from nvs_common.errors import InputError
from nvs_common.types import Array, Cameras
from vqnerf_jax import volume


@flax.struct.dataclass
class Rays:
    """Rays in the frame of the unit sphere: origins and unit directions [..., 3], ends [...]."""

    origins: Array
    directions: Array
    near: Array
    far: Array


def latent_cameras(cams: Cameras, factor: int) -> Cameras:
    """Cameras [...] whose pixels are the latents of images: one for each factor x factor block.

    Raises:
      InputError: an image size that is not a multiple of the factor.
    """
    if cams.height % factor or cams.width % factor:
        raise InputError(
            f"images of {cams.height} x {cams.width} have no whole latents of {factor} x {factor} "
            "pixels; choose a size of which both sides are multiples."
        )
    return cameras.resize(cams, cams.height // factor, cams.width // factor)


def of_cameras(cams: Cameras, center: Array, radius: float) -> Rays:
    """Rays [..., h, w] through all pixel centres, where the sphere (world units) becomes the unit
    sphere."""
    return to_sphere(*cameras.rays(cams), center, radius)


def at_pixels(cams: Cameras, uv: Array, center: Array, radius: float) -> Rays:
    """Rays [n] of one camera [] through pixel positions uv [n, 2]."""
    pose = jnp.asarray(cams.world_from_cam, jnp.float32)
    local = cameras.camera_rays(jnp.asarray(cams.intrinsics, jnp.float32), uv)
    directions = jnp.einsum("ij,nj->ni", pose[:3, :3], local, precision="highest")
    directions = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
    origins = jnp.broadcast_to(pose[None, :3, 3], directions.shape)
    return to_sphere(origins, directions, center, radius)


def to_sphere(origins: Array, directions: Array, center: Array, radius: float) -> Rays:
    """Rays [..., 3] of the world in the frame where a sphere of it is the unit sphere."""
    center = jnp.asarray(center, jnp.float32).reshape((1,) * (origins.ndim - 1) + (3,))
    origins = (origins - center) / radius
    flat = origins.reshape(-1, 3), directions.reshape(-1, 3)
    near, far = (x.reshape(origins.shape[:-1]) for x in volume.near_far(*flat))
    # A camera inside the sphere sees nothing behind itself.
    return Rays(origins, directions, jnp.maximum(near, 0), far)


def in_parts(render: Callable[[Any], Any], rays: Any, size: int) -> Any:
    """Renders rays a part at a time, with gradients that are exact and as cheap in memory.

    The deferred back-propagation of large renders: the forward pass keeps nothing but the rays,
    and the backward pass renders each part again for its share of the gradient.

    Args:
      render: rays [n] -> a tree of arrays [n, ...], which are put together, and of scalars, which
        are added.
      rays: a tree of arrays [r, ...].
      size: n, of all parts but the last; as many rays as that are rendered in the plain way.

    Returns:
      The tree of all rays.
    """
    total = jax.tree.leaves(rays)[0].shape[0]
    if total <= size:
        return render(rays)
    whole = total // size * size
    pieces = []
    if whole:
        # A loop's body is not merged with its recomputation, which `prevent_cse` guards against.
        part = jax.checkpoint(render, prevent_cse=False)
        cut = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), rays)
        done = jax.lax.map(part, cut)
        pieces.append(
            jax.tree.map(
                lambda x: jnp.sum(x) if x.ndim == 1 else x.reshape(whole, *x.shape[2:]), done
            )
        )
    if whole < total:
        pieces.append(jax.checkpoint(render)(jax.tree.map(lambda x: x[whole:], rays)))
    return jax.tree.map(
        lambda *x: sum(x[1:], x[0]) if x[0].ndim == 0 else jnp.concatenate(x), *pieces
    )
