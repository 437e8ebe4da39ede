"""The smallest LVSMs that have every part, random weights for them and random views."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lvsm_jax import LVSM, SVSM, LVSMEncoderDecoder
from nvs_common.types import Cameras, Views

SIZES = dict(width=16, head_size=8, patch=4, mlp_ratio=2.0)
STACKS = dict(encoder_layers=2, decoder_layers=3)


def decoder_only(**changes: Any) -> LVSM:
    return LVSM(**{**SIZES, "layers": 3, **changes})


def encoder_decoder(**changes: Any) -> LVSMEncoderDecoder:
    return LVSMEncoderDecoder(**{**SIZES, **STACKS, "latents": 5, **changes})


def cross_attention(**changes: Any) -> SVSM:
    return SVSM(**{**SIZES, **STACKS, **changes})


KINDS = {
    "decoder_only": decoder_only,
    "encoder_decoder": encoder_decoder,
    "cached": lambda **changes: decoder_only(input_sees_target=False, **changes),
    "cross_attention": cross_attention,
}


def cameras(lead: tuple[int, ...], height: int = 8, width: int = 12, seed: int = 0) -> Cameras:
    """Cameras with random rotations, centres and principal points."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(*lead, 3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))[..., None, None]
    pose = np.tile(np.eye(4), (*lead, 1, 1))
    pose[..., :3, :3], pose[..., :3, 3] = rotation, rng.uniform(-0.7, 0.7, size=(*lead, 3))
    intrinsics = [1.1 * width, 1.2 * width, 0.5 * width, 0.45 * height]
    intrinsics = np.float32(intrinsics) * rng.uniform(0.9, 1.1, size=(*lead, 4))
    near = np.ones(lead, np.float32)
    arrays = (pose.astype(np.float32), intrinsics.astype(np.float32), near, 9 * near)
    return Cameras(*arrays, height, width)


def views(num_scenes: int = 2, num_views: int = 2, seed: int = 1, **size: int) -> Views:
    """Context views [b, v] with random images."""
    cams = cameras((num_scenes, num_views), seed=seed, **size)
    rng = np.random.default_rng(seed)
    shape = (num_scenes, num_views, cams.height, cams.width, 3)
    return Views(rng.random(shape, np.float32), cams)


def variables(module: Any, seed: int = 0, dtype: Any = np.float32) -> dict[str, Any]:
    """Random parameters of a module, far from their small initial values; nothing is compiled."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), views(1, 1), cameras((1, 1)))
    rng = np.random.default_rng(seed)

    def one(path: Any, leaf: Any) -> Any:
        x = rng.normal(size=leaf.shape)
        is_scale = path[-1].key == "scale"
        return (1 + 0.25 * x if is_scale else 0.3 * x).astype(dtype)

    return jax.tree_util.tree_map_with_path(one, dict(shapes))
