"""From a configuration to Quark's `Task`: initialisation, loss and rendering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from nvs_common import losses, metrics, perceptual, sampling
from nvs_common.errors import InputError
from nvs_common.types import Array, Aux, Batch, Cameras, Render, Task, Variables, Views
from quark_jax import ldm, model

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make(config: ConfigDict) -> Task:
    """Builds the task from `configs/quark.py`'s fields `model` and `loss`.

    Raises:
      InputError: an unknown field of `config.model`, or a perceptual weight without weights.
    """
    module = make_module(config.model)
    l1_weight, temporal_weight = config.loss.l1_weight, config.loss.temporal_weight
    # Without perceptual weights, which cannot be shipped, training falls back to L1 alone.
    lpips_params = None
    if config.loss.lpips_weights and config.loss.lpips_weight > 0:
        lpips_params = perceptual.load(config.loss.lpips_weights)

    def init(key: Array, batch: Batch) -> Variables:
        return module.init(key, batch.context, batch.target.cameras)

    def render(variables: Variables, context: Views, targets: Cameras) -> Render:
        return module.apply(variables, context, targets)

    def loss(variables: Variables, batch: Batch, key: Array) -> tuple[Array, Aux]:
        del key  # nothing in Quark's loss is random
        rendered = render(variables, batch.context, batch.target.cameras)
        truth = jnp.asarray(batch.target.images, jnp.float32)
        l1 = losses.l1(rendered.images, truth)
        values = {"l1": l1, "psnr": jnp.mean(metrics.psnr(rendered.images, truth))}
        total = l1_weight * l1
        if lpips_params is not None:
            values["lpips"] = jnp.mean(perceptual.lpips(lpips_params, rendered.images, truth))
            total += config.loss.lpips_weight * values["lpips"]
        if temporal_weight > 0:
            values["temporal"] = temporal_difference(rendered, batch.target)
            total += temporal_weight * values["temporal"]
        return total, Aux(metrics={"loss": total, **values})

    return Task(init, loss, render, model.PARAM_AXES)


def make_module(fields: Mapping[str, Any]) -> model.Quark:
    """Builds the module from plain fields; `stages` is a list of rows of `model.Stage`."""
    fields = dict(fields)
    known = set(model.Quark.__dataclass_fields__) - {"parent", "name"}
    if unknown := sorted(set(fields) - known):
        raise InputError(f"config.model has unknown fields {unknown}; known are {sorted(known)}")
    fields["dtype"] = DTYPES[fields.get("dtype", "float32")]
    if "stages" in fields:
        fields["stages"] = tuple(model.Stage(*row) for row in fields["stages"])
    if "encoder_blocks" in fields:
        fields["encoder_blocks"] = tuple(fields["encoder_blocks"])
    return model.Quark(**fields)


def temporal_difference(rendered: Render, target: Views) -> Array:
    """How much neighbouring renders flicker beyond what the photographs do; a scalar.

    Each target but the last is compared with the next one of its scene, warped by the first's
    depth; the same warp of the photographs is subtracted, so that true view-dependence and
    occlusion cost nothing. Needs two targets a scene. Not part of the published loss.
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
