"""From a configuration to Quark's `Task`: initialisation, loss and rendering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from nvs_common import losses, metrics, perceptual
from nvs_common.errors import InputError
from nvs_common.types import Array, Aux, Batch, Cameras, Render, Task, Variables, Views
from quark_jax import crops, kernels, ldm, model, supervision

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
CHOICES = {
    "dtype": tuple(DTYPES),
    "output": ("blend", "rgb"),
    "unseen": ("black", "edge"),
    "implementation": kernels.IMPLEMENTATIONS,
}


def make(config: Any) -> Task:
    """Builds the task from `configs/quark.py`'s fields `model` and `loss`.

    Args:
      config: a ConfigDict, or anything with its fields as attributes.

    Raises:
      InputError: an unknown field of `config.model`, or a perceptual weight without weights.
    """
    module = make_module(config.model)
    l1_weight, temporal_weight = config.loss.l1_weight, config.loss.temporal_weight
    depth_weight, ssim_weight = config.loss.depth_weight, config.loss.ssim_weight
    if depth_weight > 0 and not config.data.with_depth:
        raise InputError(
            "loss.depth_weight needs data.with_depth=True, the true depth of targets; photographs "
            "have none: use the variant `photos`, as in configs/quark.py:tiny,photos"
        )
    # Without perceptual weights, which cannot be shipped, training falls back to L1 alone.
    lpips_params = None
    if config.loss.lpips_weights and config.loss.lpips_weight > 0:
        lpips_params = perceptual.load(config.loss.lpips_weights)

    def loss(variables: Variables, batch: Batch, key: Array) -> tuple[Array, Aux]:
        targets = batch.target.cameras
        window = crops.random_windows(key, targets, config.loss.crop)
        rendered, stages = cast(
            tuple[Render, list[ldm.Logits]],
            module.apply(variables, batch.context, targets, window, method="render_stages"),
        )
        target = crops.cut(batch.target, window)
        truth = jnp.asarray(target.images, jnp.float32)
        l1 = losses.l1(rendered.images, truth)
        values = {"l1": l1, "psnr": jnp.mean(metrics.psnr(rendered.images, truth))}
        total = l1_weight * l1
        if lpips_params is not None:
            values["lpips"] = jnp.mean(perceptual.lpips(lpips_params, rendered.images, truth))
            total += config.loss.lpips_weight * values["lpips"]
        if ssim_weight > 0:
            values["ssim"] = jnp.mean(metrics.ssim(rendered.images, truth))
            total += ssim_weight * (1 - values["ssim"])
        if depth_weight > 0:
            # Of the whole target: the map is, and its stages are small.
            flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), targets)
            depth = batch.extras["depth"].reshape(-1, targets.height, targets.width)
            values["depth"] = supervision.stage_depth_loss(stages, depth, flat)
            total += depth_weight * values["depth"]
        if temporal_weight > 0:
            values["temporal"] = supervision.temporal_difference(rendered, target)
            total += temporal_weight * values["temporal"]
        return total, Aux(metrics={"loss": total, **values})

    return Task(loss=loss, param_axes=model.PARAM_AXES, **_applications(module))


def _applications(module: model.Quark) -> dict[str, Any]:
    """The fields of the task that only call the module."""

    def init(key: Array, batch: Batch) -> Variables:
        return module.init(key, batch.context, batch.target.cameras)

    def render(variables: Variables, context: Views, targets: Cameras) -> Render:
        return cast(Render, module.apply(variables, context, targets))

    def encode(variables: Variables, context: Views) -> Any:
        return module.apply(variables, context, method="encode")

    def render_encoded(
        variables: Variables, context: Views, features: Any, targets: Cameras
    ) -> Render:
        return cast(Render, module.apply(variables, context, features, targets, method="render"))

    return dict(init=init, render=render, encode=encode, render_encoded=render_encoded)


def make_module(fields: Mapping[str, Any]) -> model.Quark:
    """Builds the module from plain fields; `stages` is a list of rows of `model.Stage`."""
    fields = dict(fields)
    known = set(model.Quark.__dataclass_fields__) - {"parent", "name"}
    if unknown := sorted(set(fields) - known):
        raise InputError(f"config.model has unknown fields {unknown}; known are {sorted(known)}")
    for name, allowed in CHOICES.items():
        if fields.get(name, allowed[0]) not in allowed:
            raise InputError(f"config.model.{name}={fields[name]!r}: choose from {list(allowed)}")
    fields["dtype"] = DTYPES[fields.get("dtype", "float32")]
    if "stages" in fields:
        fields["stages"] = tuple(model.Stage(*row) for row in fields["stages"])
    if "encoder_blocks" in fields:
        fields["encoder_blocks"] = tuple(fields["encoder_blocks"])
    return model.Quark(**fields)
