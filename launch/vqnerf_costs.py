"""What rendering VQ-NeRF costs: every pixel by the field, or latents by the field and a decoder.

Both at the published sizes, on the same device. Rays cost the same wherever they go, and a decoder
without attention the same for each latent: of large images a part is measured, and the time of the
whole is that times what it is a part of; tables say which part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from launch import arithmetic, measuring
from nvs_common.errors import InputError
from nvs_common.types import Cameras
from vqnerf_jax import image_rays, model, ray_render

SIZES = ((512, 512), (576, 768), (1200, 1600))
# Of plain PyTorch's NeuS on a CPU (version 2.13, one thread, CPU time): milliseconds a ray forward,
# and a latent of the decoder without attention; measured on another machine.
TORCH_RAY, TORCH_LATENT = 11.4, 1.55
HEAD = (
    *("image", "full, s", "1/4 grid, s", "decoder, s", "both, s", "faster", "by products alone"),
    *("measured of rays", "of latents", "memory full, MiB", "memory both, MiB"),
)


class Part(NamedTuple):
    """A measured part: seconds, multiply-adds, planned memory in MiB, share of the whole."""

    seconds: float
    products: float
    peak: float
    share: float

    @property
    def whole(self) -> float:
        """Seconds of the whole."""
        return self.seconds / self.share


def study(
    ours: model.Model,
    sizes: Sequence[tuple[int, int]],
    *,
    rays: int,
    latents: int,
    repeats: int,
) -> Iterator[str]:
    """Lines of a table, one image size a row.

    Args:
      ours: the model, of the sizes to measure; its parameters are random.
      sizes: (height, width) of images.
      rays: at most so many are rendered.
      latents: at most so many are decoded; with attention all of an image's.
      repeats: timed repetitions.

    Raises:
      InputError: a size that is no multiple of the decoder's factor.
    """
    params = jax.jit(lambda: model.init(ours, jax.random.key(0)))()
    yield from (measuring.row(HEAD), "|" + "---|" * len(HEAD))
    per_ray = per_latent = 0.0
    for height, width in sizes:
        if height % ours.vqgan.factor or width % ours.vqgan.factor:
            raise InputError(f"--size={height}x{width}: no multiple of {ours.vqgan.factor}.")
        full = render(ours, params, height * width, rays, "colors", repeats)
        number = height * width // ours.vqgan.factor**2
        grid = render(ours, params, number, rays, "latents", repeats)
        decoded = decode(ours, params, (height, width), latents, repeats)
        yield measuring.row(_row(height, width, full, grid, decoded))
        per_ray = 1e3 * full.whole / (height * width)
        per_latent = 1e3 * decoded.whole / number
    yield ""
    yield (
        f"{per_ray:.2f} ms a ray in colour (PyTorch's NeuS: {TORCH_RAY}) and {per_latent:.2f} ms a "
        f"latent decoded (PyTorch: {TORCH_LATENT}); PyTorch's numbers are of one thread of another "
        "machine."
    )


def render(ours: model.Model, params: Any, number: int, most: int, what: str, repeats: int) -> Part:
    """Colours or latents of some of `number` rays towards the sphere."""
    count = min(number, most)
    rays = _rays(count)

    def keep(out: ray_render.RayRender) -> Any:
        return getattr(out, what)

    def run(params: Any, rays: image_rays.Rays) -> Any:
        return model.render_rays(ours, params, rays, keep)

    return _measure(run, (params, rays), count / number, repeats)


def decode(ours: model.Model, params: Any, size: tuple[int, int], most: int, repeats: int) -> Part:
    """Codes looked up and decoded, of the upper rows of an image's latents."""
    rows, columns = (side // ours.vqgan.factor for side in size)
    kept = rows if ours.vqgan.mid_attention else min(rows, max(1, most // columns))
    latents = jax.random.normal(jax.random.key(1), (1, kept, columns, ours.vqgan.code_width))

    def run(params: Any, latents: Any) -> Any:
        return model.decode(ours, params, latents)[0]

    return _measure(run, (params, latents), kept / rows, repeats)


def _measure(run: Callable, args: tuple[Any, ...], share: float, repeats: int) -> Part:
    compiled = jax.jit(run).lower(*args).compile()
    seconds = measuring.median_seconds(compiled, *args, repeats=repeats)
    products = arithmetic.multiply_adds(run, *args)
    return Part(seconds, products, measuring.peak(compiled), share)


def _row(height: int, width: int, full: Part, grid: Part, decoded: Part) -> tuple[str, ...]:
    both = grid.whole + decoded.whole
    products = grid.products / grid.share + decoded.products / decoded.share
    return (
        f"{height} x {width}",
        *(f"{x:.1f}" for x in (full.whole, grid.whole, decoded.whole, both)),
        f"{full.whole / both:.1f}x",
        f"{full.products / full.share / products:.1f}x",
        *(f"{100 * x:.2g} %" for x in (full.share, decoded.share)),
        *(f"{x:.0f}" for x in (full.peak, max(grid.peak, decoded.peak))),
    )


def _rays(count: int) -> image_rays.Rays:
    """Rays of a square image of the unit sphere."""
    side = math.ceil(math.sqrt(count))
    pose = np.eye(4, dtype=np.float32)
    pose[2, 3] = -2.7
    k = np.array([1.3 * side, 1.3 * side, side / 2, side / 2], np.float32)
    cams = Cameras(pose, k, np.float32(1), np.float32(4), side, side)
    rays: Any = image_rays.of_cameras(cams, jnp.zeros(3), 1.0)
    return jax.tree.map(lambda x: x.reshape(side * side, *x.shape[2:])[:count], rays)
