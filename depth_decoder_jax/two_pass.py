"""Decoding where depth is not known beforehand: decode, estimate depth, decode again (Sec. 1)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from depth_decoder_jax import model
from nvs_common.errors import InputError
from nvs_common.types import Array, Cameras, Variables, Views


class DepthMaps(NamedTuple):
    """What a source of depth returns: depth [b, v, h, w] in z and the foreground [b, v, h, w]."""

    depth: Any
    mask: Any


@flax.struct.dataclass
class Decoded:
    """Pictures before and after depth was known.

    Attributes:
      images: [b, v, h, w, 3] in [0, 1].
      first: [b, v, h, w, 3] in [0, 1], as the autoencoder alone decodes them.
      depth: [b, v, h, w] z-depth that `images` were decoded with.
      mask: [b, v, h, w] bool, its foreground.
    """

    images: Any
    first: Any
    depth: Any
    mask: Any


def decode_with_depth(
    module: model.DepthGuidedDecoder,
    variables: Variables,
    latents: Array,
    cams: Cameras,
    front: Views | None,
    depth_fn: Callable[[Array, Cameras], DepthMaps],
    *,
    rounds: int = 1,
) -> Decoded:
    """Decodes, has depth estimated from the pictures, and decodes again with it.

    Args:
      module: the decoder.
      variables: its parameters.
      latents: [b, v, y, x, c], unscaled.
      cams: [b, v] of images of the decoded size.
      front: [b] the front picture and its camera.
      depth_fn: (pictures [b, v, h, w, 3] in [0, 1], cameras [b, v]) -> DepthMaps: a fit of a
        surface, a network, or what is known of the object.
      rounds: how often; from the second on depth is estimated from the last pictures.

    Returns:
      What the last round gave.

    Raises:
      InputError: depth of another size, depth in the foreground that is no positive number, or no
        foreground at all.
    """
    if rounds < 1:
        raise InputError(f"rounds={rounds}: at least one.")
    images = first = decode_plain(module, variables, latents)
    for _ in range(rounds):
        maps = DepthMaps(*depth_fn(images, cams))
        depth, mask = _checked(maps, cams)
        images = decode_guided(module, variables, latents, cams, depth, mask, front)
    return Decoded(images, first, depth, mask)


def _checked(maps: DepthMaps, cams: Cameras) -> tuple[Array, Array]:
    """Depth and foreground that can be decoded with."""
    wanted = (*np.shape(cams.near), cams.height, cams.width)
    depth, mask = np.asarray(maps.depth, np.float32), np.asarray(maps.mask) > 0.5
    if depth.shape != wanted or mask.shape != wanted:
        raise InputError(
            f"depth_fn: depth has shape {depth.shape} and mask {mask.shape}; expected [b, v, h, w] "
            f"= {wanted}, a map for every view in the size of the decoded images."
        )
    if not mask.any():
        raise InputError("depth_fn: no foreground in any view; check its threshold and cameras.")
    wrong = mask & ~(np.isfinite(depth) & (depth > 0))
    if wrong.any():
        scene, view = np.argwhere(wrong)[0][:2]
        raise InputError(
            f"depth_fn: scene {scene}, view {view}: {int(wrong[scene, view].sum())} pixels of the "
            "foreground have no positive depth; it is z-depth in world units, before the camera."
        )
    return jnp.asarray(depth), jnp.asarray(mask)


@functools.partial(jax.jit, static_argnums=0)
def decode_plain(module: model.DepthGuidedDecoder, variables: Variables, latents: Array) -> Any:
    """The first pass: pictures [b, v, h, w, 3] in [0, 1], compiled once for each module."""
    return _shown(module.apply(variables, latents, method="decode_plain"))


@functools.partial(jax.jit, static_argnums=0)
def decode_guided(module: model.DepthGuidedDecoder, variables: Variables, *args: Any) -> Any:
    """The second pass; args are those of the module's call, pictures as `decode_plain`'s."""
    return _shown(module.apply(variables, *args))


def _shown(images: Any) -> Array:
    return jnp.clip((images + 1) / 2, 0, 1)
