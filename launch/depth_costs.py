"""What attention between views costs: along short rays, along whole ones, and to all pixels.

Products are counted as in the arithmetic of attention alone: queries with keys and weights with
values, 4 c for each pair of a query and a key. A query has s (v - 1) keys along short rays,
y (v - 1) along whole rays of a grid of y rows, and y x v where it sees all pixels.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depth_decoder_jax import DepthTruncatedAttention, cross_view, epipolar
from launch import measuring
from nvs_common.types import Cameras

COUNTS = (6, 16)
GRIDS = ((32, 32), (64, 64), (128, 128), (256, 256))
SAMPLES = 8
CHANNELS = 64

# Programs with more products or memory are planned, not run.
MAX_GFLOP = 200.0
MAX_MIB = 6_000.0


class Cost(NamedTuple):
    """A layer: products in GFLOP, planned memory in MiB, and seconds, None where it was not run."""

    gflop: float
    peak: float
    seconds: float | None


def study(
    counts: tuple[int, ...] | list[int], grids: tuple[tuple[int, int], ...], *, repeats: int
) -> list[str]:
    """A table of all kinds of attention for numbers of views and sizes of the grid."""
    head = ("views", "grid", "attention", "GFLOP", "MiB", "ms", "time / depth_truncated")
    rows = []
    for count in counts:
        for size in grids:
            costs = {mode: measure(mode, count, size, repeats) for mode in cross_view.MODES}
            base = costs["depth_truncated"].seconds
            for mode, cost in costs.items():
                ratio = f"{cost.seconds / base:.1f}" if cost.seconds and base else "-"
                shown = f"{1e3 * cost.seconds:.0f}" if cost.seconds else "not run"
                cells = (f"{cost.gflop:.2f}", f"{cost.peak:.0f}", shown, ratio)
                rows.append((str(count), f"{size[0]} x {size[1]}", mode, *cells))
    title = f"One layer, {CHANNELS} channels, {SAMPLES} samples of a short ray, forward, float32"
    return [title, "", *measuring.table(head, rows)]


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
