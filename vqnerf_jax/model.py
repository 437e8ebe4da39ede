"""VQ-NeRF (arXiv 2310.14487): a field rendered at a fraction of the resolution, and decoded.

One signed distance field has two heads. The latent head renders a grid with one ray for each block
of pixels, which is quantised and decoded to the full resolution (Sec. 3.2); the colour head renders
any pixel directly (global sampling, Sec. 3.3), in training and as the full-resolution reference.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from nvs_common import cameras, sharding
from nvs_common.errors import InputError
from nvs_common.types import Array, Cameras, Names, Render
from vqnerf_jax import codes, field, image_rays, ray_render, vqgan

CHOICES = {
    "latent": ("vq", "fsq", "continuous"),
    "decoder": ("frozen", "last", "full"),
}
# Parts of the field that say where surfaces are.
_SHAPE = ("sdf", "grids", "deviation", "beta")
# Parts of the auto-encoder that learn, by `decoder`; the others are held fixed.
_TRAINED = {
    "frozen": (),
    "last": ("decoder/level_0", "decoder/norm_out", "decoder/conv_out"),
    "full": ("decoder", "post_quant_conv", "codebook"),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """How images are made of a field and a decoder.

    Attributes:
      field: with as many latent channels as the codes are wide.
      vqgan: the auto-encoder.
      latent: whether rendered features are quantised, with its codebook ("vq") or by rounding
        ("fsq"), or decoded as they are ("continuous").
      decoder: what of the auto-encoder learns with the field: nothing ("frozen"), its last blocks
        at full resolution ("last"), or codes and decoder ("full").
      center: of the sphere of interest, world units.
      radius: of the sphere of interest, world units.
      background: RGB behind everything that the colour head renders.
      chunk: rays that are rendered at once.
    """

    field: field.SDFField
    vqgan: vqgan.VQGAN
    latent: str = "vq"
    decoder: str = "frozen"
    center: tuple[float, ...] = (0.0, 0.0, 0.0)
    radius: float = 1.0
    background: tuple[float, ...] = (0.0, 0.0, 0.0)
    chunk: int = 512

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"model.{name}={getattr(self, name)!r}; choose from {choices}.")
        if self.field.latent_channels != self.vqgan.code_width:
            raise InputError(
                f"the field renders {self.field.latent_channels} numbers a latent and codes have "
                f"{self.vqgan.code_width}; set model.field.latent_channels to the codes' width."
            )
        quantizer = {"vq": "vq", "fsq": "fsq"}.get(self.latent, self.vqgan.quantizer)
        if self.vqgan.quantizer != quantizer:
            raise InputError(
                f"model.latent={self.latent!r} but the auto-encoder has quantizer="
                f"{self.vqgan.quantizer!r}; make them agree, or set model.latent='continuous'."
            )
        if self.vqgan.update != "gradient":
            raise InputError(
                "model.vqgan.update: codes that are running means are not trained here."
            )
        if self.radius <= 0 or self.chunk < 1:
            raise InputError(f"radius={self.radius} and chunk={self.chunk} must be positive.")

    @property
    def jitter(self) -> int:
        """Random numbers that move the samples of a ray."""
        return 1 + self.field.outside


def init(model: Model, key: Array) -> dict[str, Any]:
    """Initial parameters: of the field, of the auto-encoder, and the latent of an empty ray."""
    keys = jax.random.split(key)
    side = model.vqgan.factor
    image = jnp.zeros((1, side, side, model.vqgan.in_channels))
    ray = jnp.zeros((1, 3))
    return {
        "field": model.field.init(keys[0], ray, ray + 1)["params"],
        "vqgan": model.vqgan.init(keys[1], image)["params"],
        "empty": jnp.zeros(model.vqgan.code_width),
    }


def hold_fixed(params: Mapping[str, Any], decoder: str) -> dict[str, Any]:
    """The parameters, those of the auto-encoder that do not learn without a gradient."""

    def one(path: tuple[Any, ...], x: Array) -> Array:
        name = sharding.path_name(path)
        learns = any(name == part or name.startswith(f"{part}/") for part in _TRAINED[decoder])
        return x if learns else jax.lax.stop_gradient(x)

    return {**params, "vqgan": jax.tree_util.tree_map_with_path(one, params["vqgan"])}


def hold_shape(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters, those of the field's shape and sharpness without a gradient."""
    own = params["field"]
    held = {name: jax.lax.stop_gradient(own[name]) for name in _SHAPE if name in own}
    return {**params, "field": {**own, **held}}


def render_rays(
    model: Model,
    params: Mapping[str, Any],
    rays: image_rays.Rays,
    keep: Callable[[ray_render.RayRender], Any],
    *,
    cosine_ratio: Array | float = 1.0,
    jitter: Array | None = None,
) -> Any:
    """Renders rays [r], `chunk` at a time, see `image_rays.in_parts`.

    Args:
      model: what renders.
      params: its parameters.
      rays: [r].
      keep: what of a chunk's render to return; the rest is not computed.
      cosine_ratio: see `volume.neus_alphas`.
      jitter: [r, model.jitter] in [0, 1), moves samples; None leaves them where they are.
    """

    def render(part: tuple[image_rays.Rays, Array | None]) -> Any:
        rays, jitter = part
        out = model.field.apply(
            {"params": params["field"]},
            rays.origins,
            rays.directions,
            rays.near,
            rays.far,
            cosine_ratio=cosine_ratio,
            background=jnp.asarray(model.background),
            jitter=jitter,
            method="render",
        )
        return keep(cast(ray_render.RayRender, out))

    return image_rays.in_parts(render, (rays, jitter), model.chunk)


def fill(params: Mapping[str, Any], latents: Array, opacity: Array) -> Array:
    """Latents [..., d] over the learned latent of empty space, by opacity [...]."""
    empty = params["empty"].reshape((1,) * (latents.ndim - 1) + (-1,))
    return latents + (1 - opacity)[..., None] * empty


def decode(
    model: Model, params: Mapping[str, Any], latents: Array
) -> tuple[Array, codes.Quantized | None]:
    """Images [b, h, w, 3] in about [0, 1] of latents [b, y, x, d], and what the quantiser said."""
    variables, quantized = {"params": params["vqgan"]}, None
    if model.latent != "continuous":
        quantized = cast(
            codes.Quantized,
            model.vqgan.apply(variables, latents, method=lambda module, z: module.codebook(z)),
        )
        latents = quantized.values
    images = model.vqgan.apply(variables, latents, method="decode")
    return (cast(Array, images) + 1) / 2, quantized


def render_views(
    model: Model, params: Mapping[str, Any], cams: Cameras, *, full_resolution: bool = False
) -> Render:
    """Images of cameras [n], with z-depth in world units and opacity.

    Args:
      model: what renders.
      params: its parameters.
      cams: [n].
      full_resolution: one ray for each pixel and its colour, instead of latents that are decoded.
    """
    grid = cams if full_resolution else image_rays.latent_cameras(cams, model.vqgan.factor)
    rays = image_rays.of_cameras(grid, jnp.asarray(model.center), model.radius)
    shape = rays.near.shape

    def keep(out: ray_render.RayRender) -> tuple[Array, Array, Array]:
        seen = out.colors if full_resolution else out.latents
        assert seen is not None  # the model checks that the field has latents
        return seen, out.opacity, out.depth

    flat = jax.tree.map(lambda x: x.reshape(math.prod(shape), *x.shape[len(shape) :]), rays)
    seen, opacity, depth = render_rays(model, params, flat, keep)
    seen, opacity, depth = (x.reshape(*shape, *x.shape[1:]) for x in (seen, opacity, depth))
    depth = depth * model.radius * _cosine(grid)
    if full_resolution:
        return Render(seen, depth, opacity)
    images, _ = decode(model, params, fill(params, seen, opacity))
    size = (shape[0], cams.height, cams.width)
    return Render(images, *(jax.image.resize(x, size, "bilinear") for x in (depth, opacity)))


def param_axes(model: Model) -> dict[str, Names]:
    """Logical axes of all parameters, for the rows that this model has."""
    axes: dict[str, Names] = {"empty": (None,)}
    own = {row: n for row, n in field.PARAM_AXES.items() if model.field.grids or "grids" not in row}
    axes |= {f"field/({pattern})": names for pattern, names in own.items()}
    axes |= {f"vqgan/({p})": names for p, names in vqgan.param_axes(model.vqgan).items()}
    return axes


def _cosine(cams: Cameras) -> Array:
    """z-depth [n, h, w] of a step of length one along each ray."""
    _, directions = cameras.rays(cams)
    forward = jnp.asarray(cams.world_from_cam, jnp.float32)[..., :3, 2]
    return jnp.einsum("nhwi,ni->nhw", directions, forward, precision="highest")
