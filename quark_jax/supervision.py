"""Losses beyond the published one: depth where a data set knows it, and temporal consistency.

Quark is trained on its final picture alone, for 600,000 steps. Where the true depth is known,
as in the procedural world, telling every stage which layer the surface lies in teaches the same
network in thousands of steps instead. Both losses here are off unless their weight is set.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nvs_common import compositing, sampling
from nvs_common.errors import InputError
from nvs_common.types import Array, Cameras, Render, Views
from quark_jax import ldm

# Keeps the logarithm of a layer's weight, and its gradient, finite.
MIN_WEIGHT = 1e-3


def depth_loss(logits: ldm.Logits, depth: Array, near: Array, far: Array) -> Array:
    """How badly a map explains the true depth of its target; a scalar.

    Two terms: the cross-entropy between the share of a cell's pixels whose depth lies in a
    layer's band and the weight with which that layer is seen, and the distance, in half bands,
    between a layer's depth and the mean depth of those pixels. Both are means over the part of the
    picture whose depth is known.

    Args:
      logits: [l, y, x] depth and density.
      depth: [h, w] true z-depth of the target; 0, infinity and NaN are not known.
      near: [] near plane of the map.
      far: [] far plane of the map.
    """
    num_layers, *grid = logits.depth.shape
    known = jnp.isfinite(depth) & (depth > 0)
    fraction = (1 / jnp.where(known, depth, far) - 1 / far) / (1 / near - 1 / far)
    fraction = jnp.clip(fraction, 0, 1 - 1e-6)
    band = jnp.floor(fraction * num_layers).astype(jnp.int32)
    # Position in the band, -1 at its far edge and 1 at its near edge, as tanh gives it.
    offset = 2 * (fraction * num_layers - band) - 1
    member = jax.nn.one_hot(band, num_layers) * known[..., None]
    pooled = ldm.resize(jnp.stack([member, member * offset[..., None]]), *grid)
    share, offsets = jnp.moveaxis(pooled, -1, 1)
    weights = compositing.over_weights(jax.nn.sigmoid(logits.density))
    cross_entropy = -jnp.sum(share * jnp.log(weights + MIN_WEIGHT))
    distance = jnp.sum(jnp.abs(share * jnp.tanh(logits.depth) - offsets))
    return (cross_entropy + distance) / jnp.maximum(jnp.sum(share), 1e-6)


def stage_depth_loss(stages: list[ldm.Logits], depth: Array, targets: Cameras) -> Array:
    """Mean of `depth_loss` over stages, targets [n] and their depths [n, h, w]; a scalar."""
    near, far = (jnp.asarray(x, jnp.float32) for x in (targets.near, targets.far))
    per_stage = [
        jnp.mean(jax.vmap(depth_loss)(ldm.Logits(s.depth, s.density), depth, near, far))
        for s in stages
    ]
    return sum(per_stage[1:], per_stage[0]) / len(per_stage)


def temporal_difference(rendered: Render, target: Views) -> Array:
    """How much neighbouring renders flicker beyond what the photographs do; a scalar.

    Each target but the last is compared with the next one of its scene, warped by the first's
    depth; the same warp of the photographs is subtracted, so that true view-dependence and
    occlusion cost nothing.

    Args:
      rendered: [b, t] with depth.
      target: [b, t] the photographs; two or more a scene.

    Raises:
      InputError: one target a scene.
    """
    if rendered.images.shape[1] < 2:
        raise InputError("loss.temporal_weight needs data.num_target of 2 or more")
    truth = jnp.asarray(target.images, jnp.float32)

    def pair(first: Array, second: Array, cam: Cameras, other: Cameras, depth: Array) -> Array:
        projection = ldm.project(depth[None], cam, other)
        size = jnp.array([other.width, other.height], jnp.float32).reshape(1, 1, 2)
        warped = sampling.gather(second, projection.uv[0] * size, border="edge")
        return (first - warped) * projection.valid[0][..., None]

    flat = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), target.cameras)
    now, later = flat[:, :-1], flat[:, 1:]
    # The depth only says where to look: it is not trained to hide flicker.
    depth = jax.lax.stop_gradient(rendered.depth[:, :-1])
    over_scene = jax.vmap(jax.vmap(pair))
    drawn = over_scene(rendered.images[:, :-1], rendered.images[:, 1:], now, later, depth)
    seen = over_scene(truth[:, :-1], truth[:, 1:], now, later, depth)
    return jnp.mean(jnp.abs(drawn - seen))
