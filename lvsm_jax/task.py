"""From a configuration to LVSM's `Task`: initialisation, loss and rendering."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp

from lvsm_jax import model
from nvs_common import cameras, losses, metrics, vgg19
from nvs_common.errors import InputError
from nvs_common.types import Array, Aux, Batch, Cameras, Render, Task, Variables, Views

_log = logging.getLogger(__name__)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MODULES = {
    "decoder_only": model.LVSM,
    "encoder_decoder": model.LVSMEncoderDecoder,
    "cross_attention": model.SVSM,
}
# Cameras that define the frame in which the network sees all of them.
NORMALIZE = ("all", "inputs", "none")


def make(config: Any) -> Task:
    """Builds the task from `configs/lvsm.py`'s fields `model`, `poses` and `loss`.

    Poses are normalised here, in training and rendering alike (Sec. 4.2; scenes only):
    `config.poses.normalize` is "all" for inputs and targets together, as published tables are
    made (what is rendered then depends on which targets are asked for at once), "inputs" for the
    inputs alone, or "none". In training "all" are the views that were drawn, each once:
    extras["drawn_poses"] [b, n, 4, 4] of a batch in which views are inputs and targets, or neither.

    Args:
      config: a ConfigDict, or anything with its fields as attributes.

    Raises:
      InputError: an unknown field or choice; the loss, a file of perceptual weights that is none.
    """
    module, place = make_module(config.model), _normalizer(config.poses)
    l2_weight, perceptual_weight = config.loss.l2_weight, config.loss.perceptual_weight
    perceptual_path = config.loss.perceptual_weights

    @functools.cache
    def vgg() -> Any:
        """The perceptual loss's network, read when a loss is traced: who renders needs no file."""
        # Without the weights, which cannot be shipped, training falls back to squared error alone.
        return vgg19.load(perceptual_path) if perceptual_path and perceptual_weight > 0 else None

    def images(
        variables: Variables, context: Views, targets: Cameras, drawn: Array | None = None
    ) -> Array:
        context, targets = place(context, targets, drawn)
        return cast(Array, module.apply(variables, context, targets))

    def init(key: Array, batch: Batch) -> Variables:
        return module.init(key, batch.context, batch.target.cameras)

    def loss(variables: Variables, batch: Batch, key: Array) -> tuple[Array, Aux]:
        del key  # there is no dropout
        drawn = batch.extras.get("drawn_poses")
        rendered = images(variables, batch.context, batch.target.cameras, drawn)
        truth = jnp.asarray(batch.target.images, jnp.float32)
        l2 = losses.l2(rendered, truth)
        values = {"l2": l2, "psnr": jnp.mean(metrics.psnr(rendered, truth))}
        total = l2_weight * l2
        if vgg() is None and perceptual_weight > 0:
            # At tracing, so once a run: a long one must not miss half of its loss unseen.
            _log.warning(
                "loss.perceptual_weight=%g is without effect: loss.perceptual_weights names no "
                "file of VGG-19 weights; training minimises squared error alone.",
                perceptual_weight,
            )
        if vgg() is not None:
            values["perceptual"] = vgg19.loss(vgg(), rendered, truth)
            total += perceptual_weight * values["perceptual"]
        return total, Aux(metrics={"loss": total, **values})

    def render(variables: Variables, context: Views, targets: Cameras) -> Render:
        return Render(images(variables, context, targets))

    return Task(init, loss, render, model.PARAM_AXES)


def make_module(fields: Mapping[str, Any]) -> Any:
    """Builds the module from plain fields; `architecture` is a name of MODULES.

    Raises:
      InputError: an unknown architecture, field or dtype.
    """
    fields = dict(fields)
    architecture = fields.pop("architecture", "decoder_only")
    if architecture not in MODULES:
        raise InputError(
            f"config.model.architecture={architecture!r}: choose from {sorted(MODULES)}."
        )
    kind = MODULES[architecture]
    known = {field.name for field in dataclasses.fields(kind)} - {"parent", "name"}
    if unknown := sorted(set(fields) - known):
        raise InputError(
            f"config.model has fields {unknown} that {architecture} does not know; known are "
            f"{sorted(known)}."
        )
    if fields.setdefault("dtype", "float32") not in DTYPES:
        raise InputError(f"config.model.dtype={fields['dtype']!r}: choose from {list(DTYPES)}.")
    return kind(**{**fields, "dtype": DTYPES[fields["dtype"]]})


def _normalizer(poses: Any):
    """The function that moves context [b, v] and targets [b, t] to the network's frame."""
    normalize, scale = poses.normalize, poses.scale
    if normalize not in NORMALIZE or scale <= 0:
        raise InputError(
            f"config.poses: normalize={normalize!r} must be one of {NORMALIZE} and scale={scale} "
            "positive."
        )

    def place(
        context: Views, targets: Cameras, drawn: Array | None = None
    ) -> tuple[Views, Cameras]:
        if normalize == "none":
            return context, targets
        parts = [
            jnp.asarray(part.world_from_cam, jnp.float32) for part in (context.cameras, targets)
        ]
        count, together = parts[0].shape[1], jnp.concatenate(parts, axis=1)
        all_views = together if drawn is None else jnp.asarray(drawn, jnp.float32)
        reference = all_views if normalize == "all" else parts[0]
        moved = cameras.normalize_poses(together, scale, reference=reference)
        seen = dataclasses.replace(context.cameras, world_from_cam=moved[:, :count])
        return (
            dataclasses.replace(context, cameras=seen),
            dataclasses.replace(targets, world_from_cam=moved[:, count:]),
        )

    return place
