"""Things that stand about in procedural scenes, from crates to houses.

Each function takes a builder, where the thing stands [3] and its size in metres, and adds solids
to the builder. What is left open is drawn from the builder's generator.
"""

from __future__ import annotations

import numpy as np

from nvs_common.data import builder, shapes
from nvs_common.data.builder import Builder
from nvs_common.data.shapes import BOX, CUTOUT, CYLINDER, DISC, ELLIPSOID, LEAF, QUAD


def crate(b: Builder, at, size: float) -> None:
    """Boxes, standing or stacked askew."""
    base = np.array(at, float)
    axes = builder.yaw(b.rng.uniform(0, np.pi))
    for _ in range(int(b.rng.integers(1, 4))):
        half = size * b.rng.uniform(0.15, 0.5, 3)
        base[2] += half[2]
        b.add(BOX, base, half, axes, b.material(size=size))
        base[2] += half[2]
        size *= 0.75
        axes = builder.yaw(b.rng.uniform(0, np.pi))


def ball(b: Builder, at, size: float) -> None:
    """A sphere or an ellipsoid on the ground."""
    half = size * 0.5 * (b.rng.uniform(0.5, 1, 3) if b.rng.random() < 0.5 else np.ones(3))
    axes = builder.yaw(b.rng.uniform(0, np.pi))
    b.add(ELLIPSOID, np.add(at, [0, 0, half[2]]), half, axes, b.material(size=size))


def vessel(b: Builder, at, size: float) -> None:
    """A can, bottle or mug."""
    radius, tall = size * b.rng.uniform(0.15, 0.4), size * b.rng.uniform(0.25, 0.6)
    middle = np.add(at, [0, 0, tall])
    b.add(CYLINDER, middle, (radius, radius, tall), None, b.material(size=size))
    if b.rng.random() < 0.5:
        neck = b.material("plain", size=size)
        top = middle + [0, 0, tall]
        b.add(ELLIPSOID, top, (radius, radius, radius * 0.8), None, neck)
        b.rod(top, top + [0, 0, tall * 0.8 + radius], radius * 0.35, neck)
    elif b.rng.random() < 0.5:
        b.add(DISC, middle + [0, 0, tall * 1.001], (radius * 0.85,) * 2, None, b.material("plain"))


def table(b: Builder, at, size: float) -> None:
    """A top on four legs with things on it."""
    half = np.array([size * b.rng.uniform(0.4, 0.8), size * b.rng.uniform(0.3, 0.5), 0.02 * size])
    tall = size * b.rng.uniform(0.4, 0.7)
    axes, wood = builder.yaw(b.rng.uniform(0, np.pi)), b.material("wood", "plain", size=size)
    top = np.add(at, [0, 0, tall])
    b.add(BOX, top, half, axes, wood)
    for sx in (-1, 1):
        for sy in (-1, 1):
            foot = np.asarray(at) + axes @ (half * [0.92 * sx, 0.9 * sy, 0])
            b.rod(foot, foot + [0, 0, tall], 0.025 * size, wood)
    for _ in range(int(b.rng.integers(1, 5))):
        spot = top + axes @ (half * [*b.rng.uniform(-0.75, 0.75, 2), 1])
        small = b.rng.choice(np.array([crate, ball, vessel, plant, papers], object))
        small(b, spot, size * b.rng.uniform(0.12, 0.3))


def papers(b: Builder, at, size: float) -> None:
    """Books or sheets lying about."""
    base = np.array(at, float)
    for _ in range(int(b.rng.integers(1, 5))):
        half = size * np.array([0.5, 0.35, b.rng.uniform(0.01, 0.08)]) * b.rng.uniform(0.6, 1)
        base[2] += half[2]
        cover = b.material("print", "picture", "plain", "leaves", size=1.5 * size)
        b.add(BOX, base, half, builder.yaw(b.rng.uniform(0, np.pi)), cover)
        base[2] += half[2]


def shelf(b: Builder, at, size: float) -> None:
    """Boards between two sides with goods on them."""
    wide, deep, tall = size * b.rng.uniform([0.3, 0.1, 0.5], [0.6, 0.18, 1.0])
    axes, wood = builder.yaw(b.rng.uniform(0, 2 * np.pi)), b.material("wood", "plain", size=size)
    boards, thick = int(b.rng.integers(3, 6)), 0.012 * size
    for side in (-1, 1):
        offset = axes @ np.array([side * wide, 0, 0]) + [0, 0, tall]
        b.add(BOX, np.add(at, offset), (thick, deep, tall), axes, wood)
    for level in range(boards):
        z = 2 * tall * level / (boards - 1) + thick
        b.add(BOX, np.add(at, [0, 0, z]), (wide, deep, thick), axes, wood)
        room = 2 * tall / (boards - 1)
        if level < boards - 1 and b.rng.random() < 0.8:
            half = np.array([wide * b.rng.uniform(0.3, 0.9), deep * 0.7, room * 0.35])
            goods = b.material("spines", "leaves", "picture", size=room)
            slide = axes @ np.array([b.rng.uniform(-1, 1) * (wide - half[0]), 0, 0])
            b.add(BOX, np.add(at, slide + [0, 0, z + thick + half[2]]), half, axes, goods)


def green(b: Builder) -> np.ndarray:
    """A leaf colour [3]."""
    tone = [b.rng.uniform(0.5, 1.15), 1, b.rng.uniform(0.15, 0.7)]
    return b.rng.uniform(0.2, 0.65) * np.array(tone)


def plant(b: Builder, at, size: float) -> None:
    """A pot with leaves: single ones on stalks, or fans of cut-out sprays."""
    radius = 0.12 * size
    b.add(CYLINDER, np.add(at, [0, 0, radius]), (radius, radius, radius), None, b.material("plain"))
    stem = np.add(at, [0, 0, 2 * radius])
    leaf = b.material("plain", "fractal", "marble", size=size, base=green(b))
    if b.rng.random() < 0.5:
        spray(b, stem + [0, 0, 0.3 * size], 0.45 * size, int(b.rng.integers(4, 9)), leaf)
        return
    for _ in range(int(b.rng.integers(6, 14))):
        way = builder.turn(b.rng)[:, 2] * [1, 1, 0.5] + [0, 0, 0.6]
        tip = stem + way / np.linalg.norm(way) * size * b.rng.uniform(0.25, 0.7)
        length = size * b.rng.uniform(0.1, 0.2)
        axes = builder.along(way)[:, [0, 2, 1]] * [1, 1, -1]
        b.add(LEAF, tip, (length * 0.4, length), axes @ builder.yaw(b.rng.normal(0, 0.4)), leaf)
        b.rod(stem, tip, 0.008 * size, leaf)


def spray(b: Builder, middle, size: float, count: int, leaf: int) -> None:
    """Cut-out foliage on quads that stand through one another."""
    bitmap = int(b.rng.choice(shapes.FOLIAGE_BITMAPS))
    for _ in range(count):
        axes = builder.yaw(b.rng.uniform(0, 2 * np.pi)) @ builder.along(
            np.array([1, 0, b.rng.normal(0, 0.5)])
        )
        # The bitmap's top must point up: the second axis down.
        axes = axes if axes[2, 1] < 0 else axes * [-1, -1, 1]
        half = np.full(2, size * b.rng.uniform(0.7, 1.1))
        spot = np.add(middle, b.rng.normal(0, 0.2 * size, 3))
        b.add(CUTOUT, spot, half, axes, leaf, bitmap)


def bush(b: Builder, at, size: float) -> None:
    """Cut-out foliage from the ground up."""
    leaf = b.material("foliage", "fractal", size=0.4 * size, base=green(b))
    spray(b, np.add(at, [0, 0, 0.35 * size]), 0.4 * size, int(b.rng.integers(5, 11)), leaf)


def silhouette(b: Builder, at, size: float) -> None:
    """A flat cut-out that stands or leans: an ornament, a grating, a figure, a sign."""
    half = size * b.rng.uniform(0.25, 0.6, 2)
    axes = builder.yaw(b.rng.uniform(0, 2 * np.pi)) @ builder.along(
        np.array([1, 0, b.rng.normal(0, 0.15)])
    )
    bitmap = int(b.rng.integers(shapes.cutout_count()))
    b.add(CUTOUT, np.add(at, [0, 0, half[1]]), half, axes, b.material(size=size), bitmap)


def cable(b: Builder, at, size: float) -> None:
    """A round cable that winds over the ground and rises at its end."""
    sheath = b.material("plain", size=size, base=b.rng.choice([0.12, 0.3, 0.85]) * np.ones(3))
    radius = size * b.rng.uniform(0.008, 0.03)
    angle, point = b.rng.uniform(0, 2 * np.pi), np.add(at, [0, 0, radius])
    for _ in range(int(b.rng.integers(6, 14))):
        angle += b.rng.normal(0, 0.7)
        rise = b.rng.choice([0, 0.3]) * b.rng.random()
        following = point + 0.22 * size * np.array([np.cos(angle), np.sin(angle), rise])
        b.rod(point, following, radius, sheath)
        point = following


def chair(b: Builder, at, size: float) -> None:
    """A seat on four legs with a back of slats."""
    half, axes = 0.22 * size, builder.yaw(b.rng.uniform(0, 2 * np.pi))
    wood, seat = b.material("wood", "plain", size=size), b.material("cloth", "plain", size=size)
    b.add(BOX, np.add(at, [0, 0, 2 * half]), (half, half, 0.12 * half), axes, seat)
    for sx in (-1, 1):
        for sy in (-1, 1):
            foot = np.asarray(at) + axes @ (0.92 * half * np.array([sx, sy, 0]))
            b.rod(foot, foot + [0, 0, (4.4 if sy > 0 else 2) * half], 0.08 * half, wood)
    for level in np.linspace(2.7, 4.2, int(b.rng.integers(2, 5))):
        slat = np.asarray(at) + axes @ (half * np.array([0, 0.92, level]))
        b.add(BOX, slat, half * np.array([0.95, 0.05, 0.14]), axes, wood)


def screen(b: Builder, at, size: float) -> None:
    """A screen on a foot."""
    half = size * np.array([0.5, 0.015, 0.3])
    axes = builder.yaw(b.rng.normal(0, 0.5) + np.pi * (b.rng.random() < 0.3))
    dark = b.material("plain", size=size, base=b.rng.uniform(0.08, 0.25) * np.ones(3))
    middle = np.add(at, [0, 0, 0.12 * size + half[2]])
    b.add(BOX, middle, half, axes, dark)
    b.add(BOX, np.add(at, [0, 0, 0.01 * size]), size * np.array([0.2, 0.12, 0.01]), axes, dark)
    b.rod(at, middle, 0.025 * size, dark)
    face = np.stack([axes[:, 0], axes[:, 2], -axes[:, 1]], axis=-1)
    shown = b.material("print", "picture", size=size, glow=b.rng.choice([0.0, 1.0]))
    shown = dark if b.rng.random() < 0.4 else shown
    front = middle - axes[:, 1] * half[1] * 1.1
    b.add(QUAD, front, half[[0, 2]] * 0.94, face, shown)


def fence(b: Builder, at, size: float) -> None:
    """A lattice of bars."""
    axes, paint = builder.yaw(b.rng.uniform(0, np.pi)), b.material("plain", "wood", size=size)
    count, tall = int(b.rng.integers(4, 10)), size * b.rng.uniform(0.4, 0.8)
    half = size * b.rng.uniform(0.4, 0.8)
    thick = size * b.rng.uniform(0.008, 0.025)
    for x in np.linspace(-half, half, count):
        foot = np.asarray(at) + axes @ np.array([x, 0, 0])
        b.rod(foot, foot + [0, 0, tall], thick, paint)
    for z in (0.2 * tall, 0.9 * tall):
        middle = np.add(at, [0, 0, z])
        b.rod(middle - axes[:, 0] * half, middle + axes[:, 0] * half, thick, paint)


def lamp(b: Builder, at, size: float) -> None:
    """A pole with a shade."""
    tall = size * b.rng.uniform(0.8, 1.4)
    metal = b.material("plain", size=size)
    b.rod(at, np.add(at, [0, 0, tall]), 0.03 * size, metal)
    radius = size * b.rng.uniform(0.08, 0.2)
    shade = b.material("plain", "cloth", "stripes", size=size, glow=b.rng.choice([0, 0.5]))
    half = (radius, radius, radius * b.rng.uniform(0.5, 1.2))
    b.add(b.rng.choice([CYLINDER, ELLIPSOID]), np.add(at, [0, 0, tall]), half, None, shade)


def panel(b: Builder, at, size: float) -> None:
    """A thin plate or sign leaning in any direction."""
    half = size * b.rng.uniform(0.2, 0.5, 2)
    axes = builder.yaw(b.rng.uniform(0, 2 * np.pi)) @ builder.along(
        np.array([1, 0, b.rng.normal(0, 0.2)])
    )
    lift = half.max()
    face = b.material("picture", "print", "leaves", "checks", "stripes", size=2 * size)
    b.add(b.rng.choice([QUAD, QUAD, DISC]), np.add(at, [0, 0, lift]), half, axes, face)


def tree(b: Builder, at, size: float) -> None:
    """A trunk under a crown of ellipsoids and leaves."""
    tall = size * b.rng.uniform(0.5, 0.9)
    bark = b.material("wood", "fractal", size=size, base=b.rng.uniform(0.2, 0.4) * np.ones(3))
    b.rod(at, np.add(at, [0, 0, tall]), 0.04 * size, bark)
    crown = b.material("foliage", "fractal", size=0.4 * size, base=green(b))
    top = np.add(at, [0, 0, tall])
    for _ in range(int(b.rng.integers(0, 6))):
        spot = top + b.rng.normal(0, 0.15 * size, 3)
        b.add(ELLIPSOID, spot, size * b.rng.uniform(0.08, 0.22, 3), builder.turn(b.rng), crown)
    spread = size * b.rng.uniform(0.2, 0.4)
    spray(b, top + [0, 0, 0.2 * spread], spread, int(b.rng.integers(5, 10)), crown)
    for _ in range(int(b.rng.integers(0, 4))):
        spray(b, top + b.rng.normal(0, 0.25 * size, 3), 0.5 * spread, 3, crown)


def house(b: Builder, at, size: float) -> None:
    """A block with windows, a plinth, a door and a roof."""
    half = size * b.rng.uniform([0.5, 0.5, 0.35], [1.0, 0.8, 0.8])
    axes = builder.yaw(b.rng.choice([0, np.pi / 2]) + b.rng.normal(0, 0.05))
    tone = builder.muted(b.rng) if b.rng.random() < 0.6 else builder.color(b.rng)
    if b.rng.random() < 0.6:
        wall = b.material("facade", size=b.rng.uniform(2.0, 4.0), base=tone, contrast=1.2)
    else:
        wall = b.material("brick", "plain", "wood", size=b.rng.uniform(1.5, 4.0), base=tone)
    base = np.asarray(at, float)
    b.add(BOX, base + [0, 0, half[2]], half, axes, wall)
    b.add(
        BOX, base + [0, 0, 0.06 * size], (*half[:2] * 1.02, 0.06 * size), axes, b.material("plain")
    )
    frame = b.material("plain", size=size, base=b.rng.choice([0.15, 0.9]) * np.ones(3))
    pane = b.material("picture", "plain", size=size, base=b.rng.uniform(0.08, 0.4) * np.ones(3))
    for _ in range(int(b.rng.integers(2, 6))):
        # Windows and doors stand out from the wall, on a long or a short side.
        side, across = b.rng.choice([-1, 1]), int(b.rng.integers(2))
        spot, extent = np.zeros(3), size * np.array([0.08, 0.08, b.rng.uniform(0.08, 0.16)])
        spot[across] = side * half[across]
        spot[1 - across] = b.rng.uniform(-0.85, 0.85) * half[1 - across]
        spot[2] = b.rng.choice([extent[2], b.rng.uniform(0.7, 1.6) * half[2]])
        extent[across] = 0.012 * size
        b.add(BOX, base + axes @ spot, extent * 1.15, axes, frame)
        extent[across] = 0.016 * size
        b.add(BOX, base + axes @ spot, extent, axes, pane)
    roof = b.material("brick", "stripes", "plain", size=0.5 * size)
    top = base + [0, 0, 2 * half[2]]
    pitch, depth = b.rng.uniform(0.4, 0.8), half[1]
    slope = depth / np.cos(pitch) * 0.55
    for side in (-1, 1):
        c, s = np.cos(pitch), np.sin(pitch)
        tilt = axes @ np.array([[1, 0, 0], [0, c, side * s], [0, -side * s, c]])
        middle = top + axes @ np.array([0, side * 0.5 * depth, 0.5 * depth * np.tan(pitch)])
        b.add(BOX, middle, (half[0] * 1.05, slope, 0.02 * size), tilt, roof)
    stack = axes @ np.array([b.rng.uniform(-0.7, 0.7) * half[0], 0, depth * np.tan(pitch)])
    b.add(BOX, top + stack, size * np.array([0.06, 0.06, 0.12]), axes, b.material("brick"))


def shard(b: Builder, at, size: float) -> None:
    """Any single shape in any orientation, in mid-air."""
    kind = int(b.rng.choice([BOX, BOX, ELLIPSOID, CYLINDER, QUAD, DISC, LEAF, CUTOUT]))
    half = size * np.exp(b.rng.uniform(np.log(0.08), np.log(0.6), 3))
    half = half[:2] + 0.1 * size if kind >= QUAD else half
    bitmap = int(b.rng.integers(shapes.cutout_count()))
    b.add(
        kind,
        np.add(at, [0, 0, 0.5 * size]),
        half,
        builder.turn(b.rng),
        b.material(size=size),
        bitmap,
    )
