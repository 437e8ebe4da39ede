"""From a configuration to VQ-NeRF's `Task`: one scene, learned from crops and pixels of its views.

Losses are inferred where the paper is silent; all of them are weighted by the configuration. Step
numbers, which annealing follows, are in the collection "schedule".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nvs_common.errors import InputError
from nvs_common.types import Array, Aux, Batch, Cameras, Render, Task, Variables, Views
from vqnerf_jax import clip, field, model, supervision, vqgan, vqgan_weights

# Fields of an auto-encoder that its arrays do not tell: how it was trained, how attention is run.
_UNTOLD = ("beta", "update", "decay", "restart_below", "kmeans_steps", "gradient", "attention")


def make(config: Any) -> Task:
    """Builds the task from `configs/vqnerf.py`'s fields `model` and `loss`.

    Args:
      config: a ConfigDict, or anything with its fields as attributes.

    Raises:
      InputError: an unknown field or choice, weights that cannot be read or do not fit.
    """
    ours, loaded = make_model(config.model)
    weights = supervision.Weights(**dict(config.loss))
    semantic = clip.load_clip(weights.clip_weights) if weights.clip_weights else None
    if weights.clip_weight > 0 and semantic is None:
        # Weights of CLIP cannot be shipped; training goes on without them, as the metrics show.
        weights = dataclasses.replace(weights, clip_weight=0.0)
    full_resolution = config.model.full_resolution

    def init(key: Array, batch: Batch) -> Variables:
        del batch
        params = model.init(ours, key)
        if loaded is not None:
            params["vqgan"] = loaded
        return {"params": params, "schedule": {"step": jnp.zeros((), jnp.int32)}}

    def loss(variables: Variables, batch: Batch, key: Array) -> tuple[Array, Aux]:
        step = variables["schedule"]["step"]
        params = model.hold_fixed(variables["params"], ours.decoder)
        total, metrics = supervision.loss(ours, weights, semantic, params, batch, key, step)
        return total, Aux({"loss": total, **metrics}, {"schedule": {"step": step + 1}})

    def render(variables: Variables, context: Views, targets: Cameras) -> Render:
        del context  # the scene is in the parameters
        flat = jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), targets)
        out = model.render_views(ours, variables["params"], flat, full_resolution=full_resolution)
        lead = jnp.shape(targets.near)
        return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), out)

    return Task(init, loss, render, model.param_axes(ours))


def make_model(fields: Mapping[str, Any]) -> tuple[model.Model, Any]:
    """Builds the model from plain fields, and the parameters of its auto-encoder from a file.

    Returns:
      The model, and parameters if `vqgan_weights` names a file, else None.

    Raises:
      InputError: see `make`.
    """
    settings = dict(fields["field"])
    decoder = _plain("model.vqgan", fields["vqgan"], vqgan.VQGAN)
    loaded = None
    if fields["vqgan_weights"]:
        options = {k: decoder[k] for k in ("groups", "beta_on") if k in decoder}
        autoencoder, variables = vqgan_weights.load_vqgan(fields["vqgan_weights"], **options)
        loaded = variables["params"]
        _compare(fields["vqgan_weights"], autoencoder, decoder)
    else:
        autoencoder = vqgan.VQGAN(**decoder)
        if fields["decoder"] != "full":
            raise InputError(
                f"model.decoder={fields['decoder']!r} holds parts of an auto-encoder fixed, and "
                "none was given; name its file in model.vqgan_weights, or set model.decoder='full'."
            )
    settings.setdefault("latent_channels", autoencoder.code_width)
    renderer = field.SDFField(**_plain("model.field", settings, field.SDFField))
    options: dict[str, Any] = {n: fields[n] for n in ("latent", "decoder", "radius", "chunk")}
    options |= {name: tuple(fields[name]) for name in ("center", "background")}
    return model.Model(renderer, autoencoder, **options), loaded


def _compare(name: str, found: vqgan.VQGAN, wanted: Mapping[str, Any]) -> None:
    """Raises InputError where the file's auto-encoder is another than the configuration says."""
    wrong = {k: (x, getattr(found, k)) for k, x in wanted.items() if getattr(found, k) != x}
    # What arrays do not tell is taken from the configuration.
    if wrong := {k: x for k, x in wrong.items() if k not in _UNTOLD}:
        told = ", ".join(
            f"{k}={said!r} but the file has {own!r}" for k, (said, own) in wrong.items()
        )
        raise InputError(f"{name}: config.model.vqgan has {told}; make them agree.")


def _plain(where: str, fields: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Fields of a module, lists as tuples."""
    known = {one.name for one in dataclasses.fields(kind)} - {"parent", "name"}
    if unknown := sorted(set(fields) - known):
        raise InputError(f"config.{where} has unknown fields {unknown}; known are {sorted(known)}.")
    return {k: tuple(x) if isinstance(x, list) else x for k, x in fields.items()}
