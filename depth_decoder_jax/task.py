"""From a configuration to the depth-guided decoder's `Task`: initialisation, loss and rendering.

A batch holds the front view as its only context, and as targets the views to decode, with depth.
Training has two stages: "autoencoder" for a small autoencoder of one's own, "decoder" for the
attention between views (Sec. 3.3, 3.4), with the encoder frozen. "plain_decoder" is, to compare
with, the second one without that attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from depth_decoder_jax import depth_noise, model, vae
from nvs_common import losses, metrics, perceptual
from nvs_common.errors import InputError
from nvs_common.types import Array, Aux, Batch, Cameras, Render, Task, Variables, Views

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
STAGES = ("autoencoder", "decoder", "plain_decoder")


def make(config: Any) -> Task:
    """Builds the task from `configs/depth_decoder.py`'s fields `model` and `loss`.

    Args:
      config: a ConfigDict, or anything with its fields as attributes.

    Raises:
      InputError: an unknown field or choice, or data without depth.
    """
    module, fields = make_module(config.model), config.loss
    if fields.stage not in STAGES:
        raise InputError(f"config.loss.stage={fields.stage!r}: choose from {list(STAGES)}.")
    if fields.stage == "decoder" and not config.data.with_depth:
        raise InputError("config.loss.stage='decoder' needs data.with_depth=True.")
    # Without perceptual weights, which cannot be shipped, training goes on without them.
    lpips_params = None
    if fields.lpips_weights and fields.lpips_weight > 0:
        lpips_params = perceptual.load(fields.lpips_weights)

    def loss(variables: Variables, batch: Batch, key: Array) -> tuple[Array, Aux]:
        stage = {"autoencoder": _autoencoder, "plain_decoder": _plain}.get(fields.stage, _decoder)
        decoded, penalty = stage(module, fields, variables, batch, key)
        truth = 2 * jnp.asarray(batch.target.images, jnp.float32) - 1
        l1, mse = losses.l1(decoded, truth), jnp.mean(jnp.square(decoded - truth))
        shown = [jnp.clip((x + 1) / 2, 0, 1) for x in (decoded, truth)]
        values = {"l1": l1, "mse": mse, "psnr": jnp.mean(metrics.psnr(*shown)), **penalty}
        total = l1 + fields.mse_weight * mse + fields.kl_weight * penalty.get("kl", 0.0)
        if lpips_params is not None:
            values["lpips"] = jnp.mean(perceptual.lpips(lpips_params, *shown))
            total += fields.lpips_weight * values["lpips"]
        return total, Aux(metrics={"loss": total, **values})

    return Task(loss=loss, param_axes=model.PARAM_AXES, **_applications(module))


def _applications(module: model.DepthGuidedDecoder) -> dict[str, Callable[..., Any]]:
    """The fields of the task that only call the module."""

    def init(key: Array, batch: Batch) -> Variables:
        cams = batch.target.cameras
        factor = 2 ** (len(module.vae.channels) - 1)
        size = (cams.height // factor, cams.width // factor)
        latents = jnp.zeros((*cams.near.shape, *size, module.vae.latent_channels))
        depth = jnp.ones((*cams.near.shape, cams.height, cams.width))
        return module.init(key, latents, cams, depth, front=_front(batch))

    def render(variables: Variables, context: Views, targets: Cameras) -> Render:
        """The views of the context, through the autoencoder: nothing is known of their depth."""
        if context.cameras.near.shape != targets.near.shape:
            raise InputError(
                f"{targets.near.shape[1]} targets, but {context.cameras.near.shape[1]} inputs: "
                "this system decodes the views it is given, and renders no others."
            )
        images = 2 * jnp.asarray(context.images, jnp.float32) - 1
        latents = cast(tuple[Array, Array], module.apply(variables, images, method="encode"))[0]
        decoded = cast(Array, module.apply(variables, latents, method="decode_plain"))
        return Render(jnp.clip((decoded + 1) / 2, 0, 1))

    return dict(init=init, render=render)


class _Decoded(NamedTuple):
    """Decoded targets [b, t, h, w, 3] in [-1, 1], and metrics that may be part of the loss."""

    images: Array
    penalty: dict[str, Array]


def _autoencoder(
    module: model.DepthGuidedDecoder, fields: Any, variables: Variables, batch: Batch, key: Array
) -> _Decoded:
    """Decodes a latent drawn for each image; `kl` is its divergence from a normal one."""
    images = 2 * jnp.asarray(batch.target.images, jnp.float32) - 1
    moments = module.apply(variables, images, method="encode")
    mean, logvar = cast(tuple[Array, Array], moments)
    latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
    decoded = cast(Array, module.apply(variables, latents, method="decode_plain"))
    return _Decoded(decoded, {"kl": kl})


def _plain(
    module: model.DepthGuidedDecoder, fields: Any, variables: Variables, batch: Batch, key: Array
) -> _Decoded:
    """Decodes the latents that `_decoder` decodes, each view as the autoencoder does."""
    latents = _latents(module, fields, variables, batch, jax.random.split(key, 3)[0])
    return _Decoded(cast(Array, module.apply(variables, latents, method="decode_plain")), {})


def _latents(
    module: model.DepthGuidedDecoder, fields: Any, variables: Variables, batch: Batch, key: Array
) -> Array:
    """Latents of the frozen encoder, in part with noise."""
    images = 2 * jnp.asarray(batch.target.images, jnp.float32) - 1
    moments = module.apply(variables, images, method="encode")
    mean = jax.lax.stop_gradient(cast(tuple[Array, Array], moments)[0])
    return noisy_latents(key, mean, fields.latent_noise)


def _decoder(
    module: model.DepthGuidedDecoder, fields: Any, variables: Variables, batch: Batch, key: Array
) -> _Decoded:
    """Decodes latents of the frozen encoder with noisy depth, and in part noisy latents."""
    of_latents, of_depth, of_samples = jax.random.split(key, 3)
    latents = _latents(module, fields, variables, batch, of_latents)
    cams, depth, mask = batch.target.cameras, batch.extras["depth"], foreground(batch)
    depth = depth_noise.structured_depth_noise(
        of_depth,
        depth,
        mask,
        dict(fields.depth_noise),
        near=cams.near,
        far=cams.far,
    )
    front = _front(batch)
    decoded = module.apply(variables, latents, cams, depth, mask, front, of_samples)
    return _Decoded(cast(Array, decoded), {})


def foreground(batch: Batch) -> Array:
    """Where targets [b, t, h, w] have depth and, where there are masks, show the object; bool.

    Background has no depth, which noise would make some of.
    """
    depth = jnp.asarray(batch.extras["depth"])
    mask = jnp.isfinite(depth) & (depth > 0)
    return mask & (batch.extras["mask"] > 0.5) if "mask" in batch.extras else mask


def noisy_latents(key: Array, latents: Array, most: float) -> Array:
    """Every second scene's latents [b, ...] with normal noise, as a diffusion model leaves it.

    Args:
      key: random key.
      latents: [b, ...], unscaled.
      most: a scene's deviation is uniform up to this, in the units of scaled latents.
    """
    of_choice, of_scale, of_noise = jax.random.split(key, 3)
    shape = (latents.shape[0],) + (1,) * (latents.ndim - 1)
    scale = jax.random.uniform(of_scale, shape, maxval=most) / vae.SCALING_FACTOR
    scale = jnp.where(jax.random.bernoulli(of_choice, 0.5, shape), scale, 0.0)
    return latents + scale * jax.random.normal(of_noise, latents.shape)


def _front(batch: Batch) -> Views:
    """The first context view of each scene, [b]."""
    images = jnp.asarray(batch.context.images, jnp.float32)[:, 0]
    return Views(images, batch.context.cameras[:, 0])


def make_module(fields: Mapping[str, Any]) -> model.DepthGuidedDecoder:
    """Builds the module from plain fields, those of the autoencoder in `vae`.

    Raises:
      InputError: an unknown field or dtype.
    """
    fields = dict(fields)
    inner = dict(fields.pop("vae"))
    for name, kind, given in (
        ("config.model", model.DepthGuidedDecoder, fields),
        ("config.model.vae", vae.SVDVAE, inner),
    ):
        known = {field.name for field in dataclasses.fields(kind)} - {"parent", "name", "vae"}
        if unknown := sorted(set(given) - known):
            raise InputError(f"{name} has unknown fields {unknown}; known are {sorted(known)}.")
    if inner.setdefault("dtype", "float32") not in DTYPES:
        raise InputError(f"config.model.vae.dtype={inner['dtype']!r}: one of {list(DTYPES)}.")
    inner |= {"dtype": DTYPES[inner["dtype"]], "channels": tuple(inner["channels"])}
    fields["samples"] = tuple(fields["samples"])
    return model.DepthGuidedDecoder(vae=vae.SVDVAE(**inner), **fields)
