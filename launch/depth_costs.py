"""What attention between views, and the decoder, cost.

Attention along short rays, along whole ones, and to all pixels. Products are counted as in the
arithmetic of attention alone: queries with keys and weights with values, 4 c for each pair of a
query and a key. A query has s (v - 1) keys along short rays, y (v - 1) along whole rays of a grid
of y rows, and y x v where it sees all pixels.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depth_decoder_jax import SVDVAE, DepthTruncatedAttention, cross_view, epipolar
from launch import measuring
from nvs_common.types import Cameras

COUNTS = (6, 16)
GRIDS = ((32, 32), (64, 64), (128, 128), (256, 256))
SAMPLES = 8
CHANNELS = 64

# Programs with more products or memory are planned, not run.
MAX_GFLOP = 200.0
MAX_MIB = 6_000.0


class Decoder(NamedTuple):
    """A decoder of clips, and what diffusers' TemporalDecoder takes for it.

    Attributes:
      channels, num_resnets: of the autoencoder.
      latents: (t, y, x) of a clip.
      published: CPU seconds of diffusers 0.42 with PyTorch 2.13 on one thread of an AMD EPYC,
        which other work shared: the least and the median.
    """

    channels: tuple[int, ...]
    num_resnets: int
    latents: tuple[int, int, int]
    published: tuple[float, float]


DECODERS = (
    Decoder((32, 64), 1, (3, 16, 16), (0.019, 0.020)),
    Decoder((32, 64), 2, (3, 16, 16), (0.030, 0.033)),
    Decoder((32, 64, 128, 128), 2, (4, 8, 8), (0.188, 0.194)),
    Decoder((32, 64, 128, 128), 2, (4, 32, 32), (4.09, 4.17)),
    Decoder((64, 128, 256, 256), 2, (4, 16, 16), (2.68, 2.79)),
    Decoder((128, 256, 512, 512), 2, (4, 16, 16), (10.1, 10.1)),
)


class Cost(NamedTuple):
    """A layer: products in GFLOP, planned memory in MiB, and seconds, None where it was not run."""

    gflop: float
    peak: float
    seconds: float | None


def study(
    counts: tuple[int, ...] | list[int], grids: tuple[tuple[int, int], ...], *, repeats: int
) -> Iterator[str]:
    """A table of all kinds of attention for numbers of views and sizes of the grid, by lines."""
    head = ("views", "grid", "attention", "GFLOP", "MiB", "ms")
    head += ("time / short rays", "expected", "time / smaller grid", "expected")
    yield f"One layer, {CHANNELS} channels, {SAMPLES} samples of a short ray, forward, float32;"
    yield "expected are ratios of products; a layer has more to do than its attention."
    yield ""
    yield from measuring.table(head, [])
    for count in counts:
        before: dict[str, Cost] = {}
        for size in grids:
            costs = {mode: measure(mode, count, size, repeats) for mode in cross_view.MODES}
            for mode, cost in costs.items():
                name = (str(count), f"{size[0]} x {size[1]}", mode)
                cells = (f"{cost.gflop:.2f}", f"{cost.peak:.0f}", _shown(cost))
                ratios = (*_ratio(cost, costs["depth_truncated"]), *_ratio(cost, before.get(mode)))
                yield measuring.row((*name, *cells, *ratios))
            before = costs


def _shown(cost: Cost) -> str:
    """Milliseconds, or why there are none."""
    if cost.seconds is not None:
        return f"{1e3 * cost.seconds:.0f}"
    if cost.peak > MAX_MIB:
        return f"not run: more than {MAX_MIB:.0f} MiB"
    return f"not run: more than {MAX_GFLOP:.0f} GFLOP"


def _ratio(cost: Cost, base: Cost | None) -> tuple[str, str]:
    """Of times, where both were measured, and of products."""
    if base is None or base is cost:
        return "", ""
    both = cost.seconds is not None and base.seconds is not None
    measured = f"{cost.seconds / base.seconds:.1f}" if both else "-"  # type: ignore[operator]
    return measured, f"{cost.gflop / base.gflop:.1f}"


def measure(mode: str, count: int, size: tuple[int, int], repeats: int) -> Cost:
    """The cost of a layer of a kind for `count` views of a grid (rows, columns)."""
    module = DepthTruncatedAttention(samples=SAMPLES, mode=mode, octaves=0)
    x = jax.ShapeDtypeStruct((1, count, *size, CHANNELS), jnp.float32)
    known = orbit(count, *size)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, known)
    compiled = jax.jit(functools.partial(module.apply)).lower(shapes, x, known).compile()
    gflop, peak = 1e-9 * products(mode, count, size), measuring.peak(compiled)
    if gflop > MAX_GFLOP or peak > MAX_MIB:
        return Cost(gflop, peak, None)
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1, leaf.dtype), shapes)
    features = jax.random.normal(jax.random.key(1), x.shape)
    args: Any = (variables, features, known)
    return Cost(gflop, peak, measuring.median_seconds(compiled, *args, repeats=repeats))


def products(mode: str, count: int, size: tuple[int, int]) -> float:
    """FLOP of a layer's attention."""
    rows, columns = size
    keys = {
        "depth_truncated": SAMPLES * (count - 1),
        "full_epipolar": rows * (count - 1),
        "full_cross_view": rows * columns * count,
    }
    return 4.0 * CHANNELS * count * rows * columns * keys[mode]


def orbit(count: int, height: int, width: int) -> epipolar.Surfaces:
    """Cameras around a sphere of radius 0.5, 1.5 from its centre, and its depth."""
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    cos, sin, zero = np.cos(angles), np.sin(angles), 0 * angles
    # Rows of world_from_cam: each camera looks at the origin, its y axis down.
    pose = np.array(
        [
            [cos, zero, -sin, 1.5 * sin],
            [zero, zero + 1, zero, zero],
            [sin, zero, cos, -1.5 * cos],
            [zero, zero, zero, zero + 1],
        ]
    )
    k = np.array([1.1 * width, 1.1 * width, width / 2, height / 2], np.float32)
    near = np.ones((1, count), np.float32)
    intrinsics = np.broadcast_to(k, (1, count, 4))
    poses = np.moveaxis(pose, -1, 0)[None].astype(np.float32)
    cams = Cameras(poses, intrinsics, near, 2 * near, height, width)
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    square = ((u - k[2]) / k[0]) ** 2 + ((v - k[3]) / k[1]) ** 2
    # |z (x, y, 1) - (0, 0, 1.5)| = 0.5, a quadratic equation in z.
    inside = 1.5**2 - (1 + square) * (1.5**2 - 0.5**2)
    depth = np.where(inside > 0, (1.5 - np.sqrt(np.maximum(inside, 0))) / (1 + square), 0.0)
    return epipolar.surfaces(cams, np.broadcast_to(depth, (1, count, height, width)))


def decoders(cases: Sequence[Decoder], *, repeats: int) -> Iterator[str]:
    """Times of the plain decoder beside those of diffusers, by lines.

    diffusers runs in the same process and on as many threads where it is installed; with --threads
    and processors of their own (taskset) both are CPU seconds of one thread.
    """
    live = _diffusers()
    yield "Decoding a clip, float32, CPU seconds: least / median"
    yield ""
    head = (
        "channels",
        "blocks",
        "latents",
        "ours",
        "diffusers here",
        "diffusers, one thread, EPYC",
    )
    yield from measuring.table(head, [])
    for case in cases:
        times = [_cpu_seconds(_ours(case), repeats)]
        there = _cpu_seconds(live(case), repeats) if live else None
        times += [there, case.published]
        cells = (", ".join(map(str, case.channels)), str(case.num_resnets), str(case.latents))
        yield measuring.row((*cells, *map(_both, times)))


def _both(times: tuple[float, float] | None) -> str:
    return "not installed" if times is None else f"{times[0]:.3f} / {times[1]:.3f}"


def _cpu_seconds(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """The least and the median CPU time of calls, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        function()
        times.append(time.process_time() - begin)
    return float(np.min(times)), float(np.median(times))


def _ours(case: Decoder) -> Callable[[], Any]:
    module = SVDVAE(case.channels, case.num_resnets, num_mid=case.num_resnets)
    side = 2 ** (len(case.channels) - 1)
    images = jax.ShapeDtypeStruct((1, 1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.05 * rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    variables = jax.tree.map(draw, shapes)
    latents = jax.random.normal(jax.random.key(1), (1, *case.latents, module.latent_channels))
    decode = jax.jit(functools.partial(module.apply, method="decode"))
    return lambda: jax.block_until_ready(decode(variables, latents))


def _diffusers() -> Callable[[Decoder], Callable[[], Any]] | None:
    """A maker of the same decoders in diffusers; None where it is not installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from diffusers.models.autoencoders import (  # pyright: ignore[reportMissingImports]
            autoencoder_kl_temporal_decoder as published,
        )
    except ImportError:
        return None

    def make(case: Decoder) -> Callable[[], Any]:
        channels: Any = case.channels
        decoder = published.TemporalDecoder(4, 3, channels, case.num_resnets).eval()
        frames, height, width = case.latents
        latents = torch.randn(frames, 4, height, width)
        only_images = torch.zeros(1, frames)

        def run() -> None:
            with torch.no_grad():
                decoder(latents, image_only_indicator=only_images, num_frames=frames)

        return run

    return make
