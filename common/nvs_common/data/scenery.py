"""Furnishes procedural scenes: rooms, desks, streets, open ground and floating clutter.

Everything is drawn from one NumPy generator. Lengths are metres, z is up. A thing is a handful
of solids under one group number: a thing that is in a camera's way is taken out as a whole.
"""

from __future__ import annotations

import numpy as np

from nvs_common.data import shapes, textures
from nvs_common.data.raycast import Solids
from nvs_common.data.shading import Materials
from nvs_common.data.shapes import BOX, CUTOUT, CYLINDER, DISC, ELLIPSOID, LEAF, QUAD

_FLAT = 1e-3


def color(rng: np.random.Generator) -> np.ndarray:
    """A surface colour [3] as a gamma-2 signal: muted as a rule, saturated now and then."""
    value = np.clip(rng.beta(2.2, 1.7), 0.12, 0.95)
    hue = rng.choice([rng.uniform(0.02, 0.14), rng.uniform(0, 1)], p=[0.6, 0.4])
    chroma = rng.beta(1.2, 4.0) if rng.random() < 0.75 else rng.uniform(0.4, 0.95)
    phase = (hue + np.array([0, 2 / 3, 1 / 3])) * 2 * np.pi
    return value * (1 - chroma * (0.5 - 0.5 * np.cos(phase)))


def turn(rng: np.random.Generator) -> np.ndarray:
    """A uniformly random rotation [3, 3]."""
    q = rng.standard_normal(4)
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def yaw(angle: float) -> np.ndarray:
    """Rotation [3, 3] about the vertical, radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


def along(direction: np.ndarray) -> np.ndarray:
    """A rotation [3, 3] whose third axis has the given direction."""
    z = direction / np.linalg.norm(direction)
    x = np.cross(z, [1.0, 0, 0] if abs(z[0]) < 0.9 else [0, 1.0, 0])
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z], axis=-1)


class Builder:
    """Collects solids and materials while a scene is being furnished."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self._solids: list[tuple] = []
        self._materials: list[tuple] = []
        self._group = 0

    def begin(self) -> None:
        """Starts a new thing: solids added from here on stand or go together."""
        self._group += 1

    def add(
        self, kind: int, center, half, axes=None, material: int | None = None, bitmap: int = 0
    ) -> None:
        """Adds a solid; flat shapes need two half extents, a CUTOUT its bitmap."""
        half = tuple(half) if len(half) == 3 else (*half, _FLAT)
        axes = np.eye(3) if axes is None else axes
        material = self.material() if material is None else material
        center = np.asarray(center, float)
        self._solids.append((kind, axes, center, half, material, bitmap, self._group))

    def rod(self, start, end, radius: float, material: int) -> None:
        """Adds a round bar between two points [3]."""
        start, end = np.asarray(start, float), np.asarray(end, float)
        length = np.linalg.norm(end - start)
        half = (radius, radius, length / 2)
        self.add(CYLINDER, (start + end) / 2, half, along(end - start), material)

    def material(self, *names: str, size: float = 1.0, base=None, glow: float = 0.0) -> int:
        """Adds a material and returns its row.

        Args:
          *names: textures to choose from; any if none is given.
          size: typical extent in world units of what it covers.
          base: [3] colour, drawn if None.
          glow: light given off.
        """
        rng, source = self.rng, textures.atlas()
        if not names and rng.random() < 0.3:
            names = ("plain",)
        main = int(rng.choice(source.find(*names) if names else len(source.names)))
        first = color(rng) if base is None else np.asarray(base, float)
        if source.style[main] == textures.PICTURE:
            cast = 1 + rng.normal(0, 0.12, 3)
            swap = np.roll(np.eye(3), rng.integers(3), axis=1)
            mix = rng.uniform(0.7, 1.15) * (0.6 * np.eye(3) + 0.4 * swap) * cast
            middle = np.full(3, rng.uniform(0.42, 0.6))
        else:
            second = color(rng)
            contrast = rng.beta(1.2, 2.2)
            swing = contrast * (second - first)
            if names and base is not None:
                swing = 0.6 * swing - 0.25 * first
            fine = rng.uniform(0, 0.25) * first
            broad = rng.uniform(0, 0.35) * (color(rng) - first)
            mix = np.stack([swing, fine, broad])
            middle = first + 0.5 * swing
        tiles = np.array([rng.uniform(0.5, 2.0), rng.uniform(0.2, 6.0)]) / size
        detail = int(rng.choice(source.find("fractal", "plain", "cloth", "marble")))
        glossy = rng.random() < 0.35
        self._materials.append(
            (
                (main, detail),
                tiles,
                rng.random(2),
                middle,
                mix,
                rng.uniform(0, 0.3),
                rng.uniform(0.1, 1.2) if glossy else 0.0,
                np.exp(rng.uniform(np.log(8), np.log(200))),
                rng.uniform(0.2, 1.0) if glossy else 0.0,
                glow,
            )
        )
        return len(self._materials) - 1

    def solids(self) -> tuple[Solids, np.ndarray]:
        """All solids sorted by kind, and the thing [p] that each belongs to."""
        *columns, group = (np.array(column) for column in zip(*self._solids, strict=True))
        order = np.argsort(columns[0], kind="stable")
        return Solids(*(column[order] for column in columns)), group[order]

    def materials(self) -> Materials:
        """The material table."""
        columns = zip(*self._materials, strict=True)
        return Materials(*(np.array(column) for column in columns))


def distances(solids: Solids, points: np.ndarray) -> np.ndarray:
    """Distance [p, n] of points [n, 3] from each solid's bounding box; 0 inside."""
    offset = points[None] - solids.center[:, None]
    local = np.einsum("pji,pnj->pni", solids.axes, offset)
    return np.linalg.norm(np.maximum(np.abs(local) - solids.half[:, None], 0), axis=-1)


# Things. Each takes a builder, where it stands [3], and its size, and adds solids.


def crate(b: Builder, at, size: float) -> None:
    """Boxes, standing or stacked askew."""
    base = np.array(at, float)
    axes = yaw(b.rng.uniform(0, np.pi))
    for _ in range(int(b.rng.integers(1, 4))):
        half = size * b.rng.uniform(0.15, 0.5, 3)
        base[2] += half[2]
        b.add(BOX, base, half, axes, b.material(size=size))
        base[2] += half[2]
        size *= 0.75
        axes = yaw(b.rng.uniform(0, np.pi))


def ball(b: Builder, at, size: float) -> None:
    """A sphere or an ellipsoid on the ground."""
    half = size * 0.5 * (b.rng.uniform(0.5, 1, 3) if b.rng.random() < 0.5 else np.ones(3))
    axes = yaw(b.rng.uniform(0, np.pi))
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
    axes, wood = yaw(b.rng.uniform(0, np.pi)), b.material("wood", "plain", size=size)
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
        b.add(BOX, base, half, yaw(b.rng.uniform(0, np.pi)), cover)
        base[2] += half[2]


def shelf(b: Builder, at, size: float) -> None:
    """Boards between two sides with goods on them."""
    wide, deep, tall = size * b.rng.uniform([0.3, 0.1, 0.5], [0.6, 0.18, 1.0])
    axes, wood = yaw(b.rng.uniform(0, 2 * np.pi)), b.material("wood", "plain", size=size)
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
        way = turn(b.rng)[:, 2] * [1, 1, 0.5] + [0, 0, 0.6]
        tip = stem + way / np.linalg.norm(way) * size * b.rng.uniform(0.25, 0.7)
        length = size * b.rng.uniform(0.1, 0.2)
        axes = along(way)[:, [0, 2, 1]] * [1, 1, -1]
        b.add(LEAF, tip, (length * 0.4, length), axes @ yaw(b.rng.normal(0, 0.4)), leaf)
        b.rod(stem, tip, 0.008 * size, leaf)


def spray(b: Builder, middle, size: float, count: int, leaf: int) -> None:
    """Cut-out foliage on quads that stand through one another."""
    bitmap = int(b.rng.choice(shapes.FOLIAGE_BITMAPS))
    for _ in range(count):
        axes = yaw(b.rng.uniform(0, 2 * np.pi)) @ along(np.array([1, 0, b.rng.normal(0, 0.5)]))
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
    axes = yaw(b.rng.uniform(0, 2 * np.pi)) @ along(np.array([1, 0, b.rng.normal(0, 0.15)]))
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
    half, axes = 0.22 * size, yaw(b.rng.uniform(0, 2 * np.pi))
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
    axes = yaw(b.rng.normal(0, 0.5) + np.pi * (b.rng.random() < 0.3))
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
    axes, paint = yaw(b.rng.uniform(0, np.pi)), b.material("plain", "wood", size=size)
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
    b.rod(at, np.add(at, [0, 0, tall]), 0.02 * size, metal)
    radius = size * b.rng.uniform(0.08, 0.2)
    shade = b.material("plain", "cloth", "stripes", size=size, glow=b.rng.choice([0, 0.5]))
    half = (radius, radius, radius * b.rng.uniform(0.5, 1.2))
    b.add(b.rng.choice([CYLINDER, ELLIPSOID]), np.add(at, [0, 0, tall]), half, None, shade)


def panel(b: Builder, at, size: float) -> None:
    """A thin plate or sign leaning in any direction."""
    half = size * b.rng.uniform(0.2, 0.5, 2)
    axes = yaw(b.rng.uniform(0, 2 * np.pi)) @ along(np.array([1, 0, b.rng.normal(0, 0.2)]))
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
        b.add(ELLIPSOID, spot, size * b.rng.uniform(0.08, 0.22, 3), turn(b.rng), crown)
    spread = size * b.rng.uniform(0.2, 0.4)
    spray(b, top + [0, 0, 0.2 * spread], spread, int(b.rng.integers(5, 10)), crown)
    for _ in range(int(b.rng.integers(0, 4))):
        spray(b, top + b.rng.normal(0, 0.25 * size, 3), 0.5 * spread, 3, crown)


def house(b: Builder, at, size: float) -> None:
    """A block with windows, a plinth, a door and a roof."""
    half = size * b.rng.uniform([0.5, 0.5, 0.35], [1.0, 0.8, 0.8])
    axes = yaw(b.rng.choice([0, np.pi / 2]) + b.rng.normal(0, 0.05))
    wall = b.material("facade", size=b.rng.uniform(2.0, 4.0))
    base = np.asarray(at, float)
    b.add(BOX, base + [0, 0, half[2]], half, axes, wall)
    b.add(
        BOX, base + [0, 0, 0.06 * size], (*half[:2] * 1.02, 0.06 * size), axes, b.material("plain")
    )
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
    b.add(kind, np.add(at, [0, 0, 0.5 * size]), half, turn(b.rng), b.material(size=size), bitmap)
