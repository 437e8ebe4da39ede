"""From a configuration to the `Task` of training a VQGAN on images: codes, encoder and decoder.

VQ-NeRF takes the codes and decoder of one that was trained before (arXiv 2310.14487 has 2048 codes
of 16 numbers, of unknown training). Losses are those of VQGAN (arXiv 2012.09841): L1, perceptual,
and from `gan_start` on adversarial. Decoder and discriminator learn in the same step; each counts
as a constant in the other's loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from nvs_common import losses, metrics, perceptual
from nvs_common.errors import InputError
from nvs_common.types import Array, Aux, Batch, Cameras, Names, Render, Task, Variables, Views
from vqnerf_jax import code_statistics, codes, discriminator, vqgan

# A code is in use if an image of the last so many steps has it.
RECENT_STEPS = 200


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of the losses.

    Attributes:
      l1_weight: of absolute differences.
      perceptual_weight: of LPIPS; needs its file.
      lpips_weights: that file, see `nvs_common.perceptual`.
      quantizer_weight: of the quantiser's own loss.
      quantizer_start: step from which on latents are quantised, and codes learn. What codes do not
        tell apart at their start, such as colours, neither decoder nor encoder learns later.
      gan_weight: of the adversarial loss, times the adaptive weight.
      gan_start: step from which on there is one.
    """

    l1_weight: float = 1.0
    perceptual_weight: float = 1.0
    lpips_weights: str = ""
    quantizer_weight: float = 1.0
    quantizer_start: int = 0
    gan_weight: float = 0.8
    gan_start: int = 0


class Parts(NamedTuple):
    """What is trained: the auto-encoder, its opponent or None, weights, LPIPS's parameters."""

    module: vqgan.VQGAN
    opponent: discriminator.Discriminator | None
    weights: Weights
    lpips: Mapping[str, Any] | None


def make(config: Any) -> Task:
    """Builds the task from `configs/vqgan.py`'s fields `model`, `discriminator` and `loss`.

    Raises:
      InputError: an unknown field or choice, or a perceptual loss without its file.
    """
    parts = make_parts(config)

    def init(key: Array, batch: Batch) -> Variables:
        del batch
        keys = jax.random.split(key)
        side = max(parts.module.factor, 2 ** (config.discriminator.layers + 1))
        image = jnp.zeros((1, side, side, 3))
        made = dict(parts.module.init(keys[0], image))
        params = {"vqgan": made.pop("params")}
        if parts.opponent is not None:
            params["discriminator"] = parts.opponent.init(keys[1], image)["params"]
        schedule = {"step": jnp.zeros((), jnp.int32)}
        if parts.module.quantizer != "none":
            schedule["last_used"] = jnp.full(num_codes(parts.module), -RECENT_STEPS, jnp.int32)
        return {"params": params, "schedule": schedule, **made}

    def loss(variables: Variables, batch: Batch, key: Array) -> tuple[Array, Aux]:
        images = jnp.asarray(batch.target.images, jnp.float32)
        return train_loss(parts, variables, images.reshape(-1, *images.shape[2:]), key)

    def render(variables: Variables, context: Views, targets: Cameras) -> Render:
        """The views of the context, through the auto-encoder."""
        if context.cameras.near.shape != targets.near.shape:
            raise InputError(
                f"{targets.near.shape[1]} targets, but {context.cameras.near.shape[1]} inputs: an "
                "auto-encoder decodes the images that it is given; see launch/reconstruct.py."
            )
        images = jnp.asarray(context.images, jnp.float32)
        flat = images.reshape(-1, *images.shape[2:])
        return Render(reconstruct(parts.module, variables, flat).images.reshape(images.shape))

    return Task(init, loss, render, param_axes(parts))


def make_parts(config: Any) -> Parts:
    """What is trained, from the fields `model`, `discriminator` and `loss`; see `make`."""
    weights = Weights(**dict(config.loss))
    if weights.perceptual_weight > 0 and not weights.lpips_weights:
        raise InputError(
            f"loss.perceptual_weight={weights.perceptual_weight} needs a file of LPIPS in "
            "loss.lpips_weights (nvs_common/perceptual.py says how to make one); without one set "
            "loss.perceptual_weight=0."
        )
    lpips = perceptual.load(weights.lpips_weights) if weights.perceptual_weight > 0 else None
    opponent = None
    if weights.gan_weight > 0:
        opponent = discriminator.Discriminator(**dict(config.discriminator))
    fields: dict[str, Any] = {
        k: tuple(x) if isinstance(x, list) else x for k, x in config.model.items()
    }
    known = {one.name for one in dataclasses.fields(vqgan.VQGAN)} - {"parent", "name"}
    if unknown := sorted(set(fields) - known):
        raise InputError(f"config.model has unknown fields {unknown}; known are {sorted(known)}.")
    return Parts(vqgan.VQGAN(**fields), opponent, weights, lpips)


def train_loss(parts: Parts, variables: Variables, images: Array, key: Array) -> tuple[Array, Aux]:
    """The loss of images [n, h, w, 3] in [0, 1], and the terms by name."""
    weights = parts.weights
    params, step = variables["params"], variables["schedule"]["step"]
    made, state = _reconstruct(parts, variables, images, key)
    terms = {"l1": losses.l1(made.images, images)}
    values = {"psnr": jnp.mean(metrics.psnr(made.images, images))}
    if parts.lpips is not None:
        terms["perceptual"] = jnp.mean(metrics.lpips(made.images, images, parts.lpips))
    schedule = {**variables["schedule"], "step": step + 1}
    if made.quantized is not None:
        # Codes that latents do not become yet are in no use.
        counts = jnp.where(step >= weights.quantizer_start, made.quantized.counts, 0.0)
        terms["quantizer"] = made.quantized.loss
        values["perplexity"] = codes.perplexity(counts)
        last = jnp.where(counts > 0, step, schedule["last_used"])
        schedule["last_used"] = last
        values["usage"] = jnp.mean((step - last < RECENT_STEPS).astype(jnp.float32))
    scales: dict[str, Any] = {"l1": weights.l1_weight, "perceptual": weights.perceptual_weight}
    scales["quantizer"] = weights.quantizer_weight
    if parts.opponent is not None:
        scale = _adaptive(parts, params, made, images)
        scales["adversarial"] = weights.gan_weight * (step >= weights.gan_start) * scale
        scales["discriminator"] = jnp.asarray(step >= weights.gan_start, jnp.float32)
        terms |= _adversarial(parts, params, made.images, images)
        values["adaptive_weight"] = scale
    total = sum((scales[name] * x for name, x in terms.items()), jnp.zeros(()))
    return total, Aux({"loss": total, **terms, **values}, {"schedule": schedule, **state})


def reconstruct(module: vqgan.VQGAN, variables: Variables, images: Array) -> vqgan.Reconstruction:
    """Images [n, h, w, 3] in [0, 1] through the auto-encoder of a trained run's variables."""
    made = cast(vqgan.Reconstruction, module.apply(autoencoder(variables), 2 * images - 1))
    return dataclasses.replace(made, images=(made.images + 1) / 2)


def autoencoder(variables: Variables) -> Variables:
    """The variables of the auto-encoder alone, from those of a run or of its checkpoint."""
    held: dict[str, Any] = {"params": variables["params"]["vqgan"]}
    if "codes" in variables:
        state = variables["codes"]["codebook"]["state"]
        if not isinstance(state, code_statistics.Statistics):
            # A checkpoint that is read without its task holds plain mappings.
            state = code_statistics.Statistics(**state)
        held["codes"] = {"codebook": {"state": state}}
    return held


def num_codes(module: vqgan.VQGAN) -> int:
    """How many codes the quantiser has."""
    if module.quantizer == "vq":
        return module.num_codes
    if module.quantizer == "lfq":
        return 2**module.code_width
    total = 1
    for level in module.fsq_levels:
        total *= level
    return total


def param_axes(parts: Parts) -> dict[str, Names]:
    """Logical axes of all parameters."""
    axes = {f"vqgan/({p})": names for p, names in vqgan.param_axes(parts.module).items()}
    if parts.opponent is not None:
        own = discriminator.PARAM_AXES.items()
        axes |= {f"discriminator/({p})": names for p, names in own}
    return axes


def _reconstruct(
    parts: Parts, variables: Variables, images: Array, key: Array
) -> tuple[vqgan.Reconstruction, dict[str, Any]]:
    """Images through the auto-encoder, whose codes learn; and their new state."""
    start = parts.weights.quantizer_start
    held: dict[str, Any] = {"params": variables["params"]["vqgan"]}
    mutable = ["codes"] if "codes" in variables else []
    held |= {name: variables[name] for name in mutable}
    options: Any = dict(train=True, mutable=mutable, rngs={"codes": key})
    if start:
        options["quantize_if"] = variables["schedule"]["step"] >= start
    made, state = parts.module.apply(held, 2 * images - 1, **options)
    made = cast(vqgan.Reconstruction, made)
    return dataclasses.replace(made, images=(made.images + 1) / 2), dict(state)


def _adversarial(
    parts: Parts, params: Mapping[str, Any], decoded: Array, images: Array
) -> dict[str, Array]:
    """Losses of the decoder and of the discriminator, each with the other held fixed."""
    judge = params["discriminator"]
    real = _judge(parts, judge, images)
    return {
        "adversarial": discriminator.deceive(_judge(parts, jax.lax.stop_gradient(judge), decoded)),
        "discriminator": discriminator.hinge(
            real, _judge(parts, judge, jax.lax.stop_gradient(decoded))
        ),
    }


def _adaptive(
    parts: Parts, params: Mapping[str, Any], made: vqgan.Reconstruction, images: Array
) -> Array:
    """The adaptive weight [], from gradients of the decoder's last kernel."""
    fixed = jax.lax.stop_gradient((params, made.latents, made.quantized))
    params, latents, quantized = fixed
    latents = latents if quantized is None else quantized.values
    own = params["vqgan"]

    def decoded(kernel: Array) -> Array:
        last = {**own["decoder"]["conv_out"], "kernel": kernel}
        held = {**own, "decoder": {**own["decoder"], "conv_out": last}}
        image = parts.module.apply({"params": held}, latents, method="decode")
        return (cast(Array, image) + 1) / 2

    def wanted(kernel: Array) -> Array:
        ours = decoded(kernel)
        value = parts.weights.l1_weight * losses.l1(ours, images)
        if parts.lpips is not None:
            distance = jnp.mean(metrics.lpips(ours, images, parts.lpips))
            value = value + parts.weights.perceptual_weight * distance
        return value

    def deceived(kernel: Array) -> Array:
        return discriminator.deceive(_judge(parts, params["discriminator"], decoded(kernel)))

    kernel = own["decoder"]["conv_out"]["kernel"]
    return discriminator.adaptive_weight(jax.grad(wanted)(kernel), jax.grad(deceived)(kernel))


def _judge(parts: Parts, params: Any, images: Array) -> Array:
    assert parts.opponent is not None
    return cast(Array, parts.opponent.apply({"params": params}, 2 * images - 1))
