"""What VQ-NeRF learns from: crops that are decoded, pixels that are rendered, and the surface.

The compressed branch renders one crop of latents of each target, decodes it and compares it with
the image; the global branch renders random pixels of the same target in colour (Sec. 3.3).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nvs_common import cameras, losses, metrics
from nvs_common.errors import InputError
from nvs_common.types import Array, Batch, Cameras
from vqnerf_jax import clip, codes, image_rays, model, ray_render


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of the losses, and how much is rendered for them.

    Attributes:
      decoded_weight: L1 of decoded crops.
      global_weight: L1 of rendered pixels.
      eikonal_weight: of gradients of length one, at all samples of both branches.
      mask_weight: cross-entropy of rendered pixels' opacity; needs masks.
      quantizer_weight: the quantiser's own loss, see `model.vqgan.beta`.
      regression_weight: squared distance to the encoder's latents of the same crop; falls linearly
        to zero (not in the paper).
      regression_steps: when it is zero.
      clip_weight: cosine distance of CLIP's embeddings of decoded and true crops.
      clip_every: steps from one such comparison to the next.
      clip_weights: file of CLIP, see `clip.load_clip`.
      shape_from: what the shape learns from: "both" branches, or rendered "pixels" alone. The
        gradient that comes through a decoder blurs the shape, and costs as much as all else.
      latent_crop: side of the crop of latents; of the whole grid where that is smaller.
      global_rays: pixels of each target.
      foreground: share of those that is drawn within the mask; the others lie anywhere.
      anneal_steps: over which the cosine ratio goes from 0 to 1; 0 starts at 1 (with masks).
    """

    decoded_weight: float = 1.0
    global_weight: float = 1.0
    eikonal_weight: float = 0.1
    mask_weight: float = 0.0
    quantizer_weight: float = 1.0
    regression_weight: float = 0.0
    regression_steps: int = 50_000
    clip_weight: float = 0.0
    clip_every: int = 10
    clip_weights: str = ""
    shape_from: str = "both"
    latent_crop: int = 64
    global_rays: int = 512
    foreground: float = 0.0
    anneal_steps: int = 0

    def __post_init__(self) -> None:
        if self.shape_from not in ("both", "pixels"):
            raise InputError(f"loss.shape_from={self.shape_from!r}; choose 'both' or 'pixels'.")
        if self.shape_from == "pixels" and not (self.global_rays and self.global_weight > 0):
            raise InputError(
                "loss.shape_from='pixels', but none are rendered: the shape would not learn. Set "
                "loss.shape_from='both', or loss.global_rays and loss.global_weight."
            )


class Crops(NamedTuple):
    """A window of each target: latent cameras [n] and true images."""

    cameras: Cameras
    images: Array


class Pixels(NamedTuple):
    """Random pixels of all targets: rays [n g], colours [n g, 3], mask [n g] or None."""

    rays: image_rays.Rays
    colors: Array
    mask: Array | None


def loss(
    ours: model.Model,
    weights: Weights,
    semantic: Any,
    params: Any,
    batch: Batch,
    key: Array,
    step: Array,
) -> tuple[Array, dict[str, Array]]:
    """The weighted sum of losses and the terms by name.

    Args:
      ours: the model.
      weights: of the losses.
      semantic: (module, variables) of CLIP, or None.
      params: the model's parameters.
      batch: targets [b, t] of the scene; `extras["mask"]` [b, t, h, w] in [0, 1] where known.
      key: random key.
      step: [] training step.

    Raises:
      InputError: a mask of another size than the images, or none where its loss has a weight.
    """
    keys = jax.random.split(key, 2)
    targets = jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), batch.target)
    mask = _mask(batch, weights)
    ratio = jnp.minimum(1.0, step / weights.anneal_steps) if weights.anneal_steps else 1.0
    parts = []
    if max(weights.decoded_weight, weights.regression_weight, weights.clip_weight) > 0:
        parts.append(_compressed(ours, weights, semantic, params, targets, ratio, keys[0], step))
    if weights.global_rays and weights.global_weight > 0:
        parts.append(_full_resolution(ours, weights, params, targets, mask, ratio, keys[1]))
    if not parts:
        raise InputError(
            "no branch is trained: set loss.decoded_weight, or loss.global_weight and "
            "loss.global_rays."
        )
    terms: dict[str, Array] = {}
    values: dict[str, Array] = {}
    for part in parts:
        terms |= part.terms
        values |= part.values
    total_length, samples = jnp.stack([part.eikonal for part in parts]).sum(axis=0)
    terms["eikonal"] = total_length / (samples + 1e-5)
    scales = _scales(weights)
    total = sum((scales[name] * x for name, x in terms.items()), jnp.zeros(()))
    return total, {**terms, **values}


class Branch(NamedTuple):
    """What one branch gives: losses and other values by name, eikonal sum and count [2]."""

    terms: dict[str, Array]
    values: dict[str, Array]
    eikonal: Array


def _compressed(
    ours: model.Model,
    weights: Weights,
    semantic: Any,
    params: Any,
    targets: Any,
    ratio: Any,
    key: Array,
    step: Array,
) -> Branch:
    """Crops that are rendered as latents and decoded."""
    keys = jax.random.split(key)
    crop = crops(ours, targets, weights.latent_crop, keys[0])
    held = model.hold_shape(params) if weights.shape_from == "pixels" else params
    latents, eikonal = _render_crops(ours, held, crop.cameras, ratio, keys[1])
    if weights.shape_from == "pixels":
        eikonal = jnp.zeros_like(eikonal)
    decoded, quantized = model.decode(ours, params, latents)
    terms = {"decoded": losses.l1(decoded, crop.images)}
    values = {"psnr": jnp.mean(metrics.psnr(decoded, crop.images))}
    if quantized is not None:
        terms["quantizer"] = quantized.loss
        values["perplexity"] = codes.perplexity(quantized.counts)
    if weights.regression_weight > 0:
        wanted = ours.vqgan.apply({"params": params["vqgan"]}, 2 * crop.images - 1, method="encode")
        wanted = jax.lax.stop_gradient(jnp.asarray(wanted))
        left = jnp.maximum(0.0, 1 - step / weights.regression_steps)
        terms["regression"] = left * losses.l2(latents, wanted)
    if weights.clip_weight > 0:
        due = step % weights.clip_every == 0
        distance = lambda: semantic_distance(semantic, decoded, crop.images)  # noqa: E731
        terms["clip"] = jax.lax.cond(due, distance, lambda: jnp.zeros(()))
    return Branch(terms, values, eikonal)


def _full_resolution(
    ours: model.Model,
    weights: Weights,
    params: Any,
    targets: Any,
    mask: Array | None,
    ratio: Any,
    key: Array,
) -> Branch:
    """Random pixels that are rendered in colour."""
    keys = jax.random.split(key)
    share = weights.foreground
    pixels = random_pixels(ours, targets, mask, weights.global_rays, keys[0], foreground=share)
    colors, opacity, eikonal = _render_pixels(ours, params, pixels.rays, ratio, keys[1])
    terms = {"global": losses.l1(colors, pixels.colors)}
    error = losses.l2(colors, pixels.colors)
    values = {"global_psnr": -10 * jnp.log10(jnp.maximum(error, metrics.MIN_MSE))}
    if pixels.mask is not None and weights.mask_weight > 0:
        terms["mask"] = cross_entropy(opacity, pixels.mask)
    return Branch(terms, values, eikonal)


def crops(ours: model.Model, targets: Any, size: int, key: Array) -> Crops:
    """A random window of `size` x `size` latents of each target [n], and what is true there."""
    factor = ours.vqgan.factor
    grid = image_rays.latent_cameras(targets.cameras, factor)
    height, width = min(size, grid.height), min(size, grid.width)

    def one(key: Array, cams: Cameras, image: Array) -> Crops:
        keys = jax.random.split(key)
        top = jax.random.randint(keys[0], (), 0, grid.height - height + 1)
        left = jax.random.randint(keys[1], (), 0, grid.width - width + 1)

        def cut(x: Array) -> Array:
            starts = (top * factor, left * factor, *[0] * (x.ndim - 2))
            sizes = (height * factor, width * factor, *x.shape[2:])
            return jax.lax.dynamic_slice(x, starts, sizes)

        window = cameras.crop(cams, top, left, height, width)
        return Crops(window, cut(image))

    keys = jax.random.split(key, targets.images.shape[0])
    images = jnp.asarray(targets.images, jnp.float32)
    return jax.vmap(one)(keys, grid, images)


def random_pixels(
    ours: model.Model,
    targets: Any,
    mask: Array | None,
    count: int,
    key: Array,
    *,
    foreground: float = 0.0,
) -> Pixels:
    """Random pixels of each target [n], `count` of each; a share of them within the mask."""
    num, height, width = targets.images.shape[:3]
    images = jnp.asarray(targets.images, jnp.float32)

    def one(key: Array, cams: Cameras, image: Array, mask: Array | None) -> Pixels:
        if mask is None or foreground <= 0:
            index = jax.random.randint(key, (count,), 0, height * width)
        else:
            index = _in_proportion(mask.reshape(-1), foreground, count, key)
        uv = jnp.stack([index % width, index // width], axis=-1) + 0.5
        rays = image_rays.at_pixels(cams, uv, jnp.asarray(ours.center), ours.radius)
        colors = image.reshape(-1, 3)[index]
        return Pixels(rays, colors, None if mask is None else mask.reshape(-1)[index])

    found = jax.vmap(one)(jax.random.split(key, num), targets.cameras, images, mask)
    return jax.tree.map(lambda x: x.reshape(num * count, *x.shape[2:]), found)


def _in_proportion(mask: Array, share: float, count: int, key: Array) -> Array:
    """Indices [n] of which a share is drawn in proportion to mask [p], the others uniformly."""
    inside = mask / jnp.maximum(jnp.sum(mask), 1e-6)
    cumulative = jnp.cumsum(share * inside + (1 - share) / mask.size)
    # Scaled by the last one, which is less than one where nothing is inside, or by rounding.
    drawn = jax.random.uniform(key, (count,)) * cumulative[-1]
    return jnp.minimum(jnp.searchsorted(cumulative, drawn, side="right"), mask.size - 1)


def semantic_distance(semantic: Any, images: Array, truth: Array) -> Array:
    """The distance [] of CLIP's embeddings of images [b, h, w, 3]; no gradient to its weights."""
    module, variables = semantic
    variables = jax.lax.stop_gradient(variables)
    embeddings = [clip.embed(module, variables, x) for x in (images, truth)]
    return clip.cosine_distance(*embeddings)


def cross_entropy(opacity: Array, mask: Array) -> Array:
    """Binary cross-entropy [] of opacities [r] and a mask [r], both kept from 0 and 1."""
    opacity = jnp.clip(opacity, 1e-3, 1 - 1e-3)
    return -jnp.mean(mask * jnp.log(opacity) + (1 - mask) * jnp.log(1 - opacity))


def _scales(weights: Weights) -> dict[str, float]:
    """The weight of each term by its name."""
    return {
        "decoded": weights.decoded_weight,
        "global": weights.global_weight,
        "eikonal": weights.eikonal_weight,
        "mask": weights.mask_weight,
        "quantizer": weights.quantizer_weight,
        "regression": weights.regression_weight,
        "clip": weights.clip_weight,
    }


def _render_crops(
    ours: model.Model, params: Any, cams: Cameras, ratio: Any, key: Array
) -> tuple[Array, Array]:
    """Latents [n, y, x, d] of windows, and the eikonal sum and count [2]."""
    rays = image_rays.of_cameras(cams, jnp.asarray(ours.center), ours.radius)
    shape = rays.near.shape
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), rays)

    def keep(out: ray_render.RayRender) -> tuple[Array, Array, Array, Array]:
        assert out.latents is not None  # the model checks that the field has latents
        return out.latents, out.opacity, out.eikonal, out.eikonal_count

    jitter = jax.random.uniform(key, (flat.near.shape[0], ours.jitter))
    options = dict(cosine_ratio=ratio, jitter=jitter)
    latents, opacity, *eikonal = model.render_rays(ours, params, flat, keep, **options)
    latents = model.fill(params, latents, opacity)
    return latents.reshape(*shape, -1), jnp.stack(eikonal)


def _render_pixels(
    ours: model.Model, params: Any, rays: image_rays.Rays, ratio: Any, key: Array
) -> tuple[Array, Array, Array]:
    """Colours [r, 3], opacities [r], and the eikonal sum and count [2]."""

    def keep(out: ray_render.RayRender) -> tuple[Array, Array, Array, Array]:
        return out.colors, out.opacity, out.eikonal, out.eikonal_count

    jitter = jax.random.uniform(key, (rays.near.shape[0], ours.jitter))
    options = dict(cosine_ratio=ratio, jitter=jitter)
    colors, opacity, *eikonal = model.render_rays(ours, params, rays, keep, **options)
    return colors, opacity, jnp.stack(eikonal)


def _mask(batch: Batch, weights: Weights) -> Array | None:
    """Masks [n, h, w] of the targets [b, t], if there are any."""
    mask = batch.extras.get("mask")
    if mask is None:
        if weights.mask_weight > 0:
            raise InputError(
                f"loss.mask_weight={weights.mask_weight} but the batch has no masks; use data with "
                "masks, or set loss.mask_weight=0 (and then loss.anneal_steps=50000)."
            )
        return None
    wanted = batch.target.images.shape[:-1]
    if mask.shape != wanted:
        raise InputError(
            f"masks have shape {tuple(mask.shape)} and images {tuple(wanted)}; give one mask of "
            "the image's size for each image."
        )
    return jnp.asarray(mask, jnp.float32).reshape(-1, *wanted[2:])
