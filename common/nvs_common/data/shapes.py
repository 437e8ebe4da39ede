"""Rays against unit shapes, and the bitmaps that cut silhouettes out of flat ones.

Every function takes origins [3, n] and three directions [s, n] in the unit frame of a shape, and
returns the ray parameter, the side that was hit (None for a shape with one side) and whether it
was hit, all [s, n]. The camera is outside. Values where nothing is hit are meaningless.
"""

from __future__ import annotations

import functools

import numpy as np

BOX, ELLIPSOID, CYLINDER, QUAD, DISC, LEAF, CUTOUT = range(7)
# The unit shapes fill [-1, 1]^3; a cylinder stands along its third axis; from QUAD on they are
# flat, in the plane of the first two axes.
CUTOUT_SIZE = 128
CUTOUT_LEVELS = 5


# A ray that runs along a plane meets it at infinity or nowhere (NaN): neither counts as a hit.
_QUIET = np.errstate(divide="ignore", invalid="ignore")


@_QUIET
def box(o, d):
    """Meets the cube [-1, 1]^3: depth along rays o + t d of [3, n] and the axis that is hit."""
    inverse = [1 / c for c in d]
    middle = [-a * b for a, b in zip(o, inverse, strict=True)]
    reach = [np.abs(c) for c in inverse]
    x, y, z = (m - r for m, r in zip(middle, reach, strict=True))
    first = np.maximum(x, y)
    side = (y > x).astype(np.int8)
    side[z > first] = 2
    first = np.maximum(first, z)
    x, y, z = (m + r for m, r in zip(middle, reach, strict=True))
    last = np.minimum(np.minimum(x, y), z)
    return first, side, first <= last


@_QUIET
def ellipsoid(o, d):
    """Meets the unit sphere; o and d are [3, n] in the shape's own axes."""
    a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] + o[2] * d[2]
    # |o x d| instead of b^2 - a c: small and distant shapes would lose all digits.
    x, y, z = o[1] * d[2] - o[2] * d[1], o[2] * d[0] - o[0] * d[2], o[0] * d[1] - o[1] * d[0]
    inside = a - (x * x + y * y + z * z)
    hit = inside > 0
    return (-b - np.sqrt(np.maximum(inside, 0))) / a, None, hit


@_QUIET
def cylinder(o, d):
    """Meets the unit cylinder along the third axis with its two caps."""
    a = d[0] * d[0] + d[1] * d[1] + np.float32(1e-20)
    b = o[0] * d[0] + o[1] * d[1]
    cross = o[0] * d[1] - o[1] * d[0]
    inside = a - cross * cross
    root = np.sqrt(np.maximum(inside, 0))
    inverse = 1 / d[2]
    middle = -o[2] * inverse
    reach = np.abs(inverse)
    wall, cap = (-b - root) / a, middle - reach
    first = np.maximum(wall, cap)
    last = np.minimum((root - b) / a, middle + reach)
    return first, (cap > wall).astype(np.int8) * np.int8(2), (inside > 0) & (first <= last)


@_QUIET
def _flat(o, d):
    depth = -o[2] / d[2]
    return depth, o[0] + depth * d[0], o[1] + depth * d[1]


def quad(o, d):
    """Meets the square [-1, 1]^2 in the plane of the first two axes."""
    depth, x, y = _flat(o, d)
    return depth, None, np.maximum(np.abs(x), np.abs(y)) <= 1


def disc(o, d):
    """Meets the unit disc in the plane of the first two axes."""
    depth, x, y = _flat(o, d)
    return depth, None, x * x + y * y <= 1


def leaf(o, d):
    """Meets a leaf: two parabolas that touch at the ends of the second axis."""
    depth, x, y = _flat(o, d)
    return depth, None, np.abs(x) <= 1 - y * y


# CUTOUT is missing: it needs to know its bitmap.
INTERSECT = {
    BOX: box,
    ELLIPSOID: ellipsoid,
    CYLINDER: cylinder,
    QUAD: quad,
    DISC: disc,
    LEAF: leaf,
}


def cutout(o, d, start: np.ndarray, size: np.ndarray):
    """A quad where its bitmap is set; start and size [n] say where its mip level lies."""
    depth, x, y = _flat(o, d)
    inside = np.maximum(np.abs(x), np.abs(y)) < 1
    column = np.where(inside, (x + 1) * (0.5 * size).astype(np.float32), 0).astype(np.int64)
    row = np.where(inside, (y + 1) * (0.5 * size).astype(np.float32), 0).astype(np.int64)
    # A coordinate just below 1 may round up to the edge itself.
    row, column = np.minimum(row, size - 1), np.minimum(column, size - 1)
    return depth, None, inside & cutouts()[start + row * size + column]


def cutout_level(bitmap: np.ndarray, extent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and size [i] of the mip level of bitmaps [i] that are `extent` [i] pixels large."""
    level = np.log2(CUTOUT_SIZE / np.maximum(extent, 1)) - 0.5
    level = np.clip(np.rint(level), 0, CUTOUT_LEVELS - 1).astype(np.int64)
    sizes = CUTOUT_SIZE >> np.arange(CUTOUT_LEVELS)
    first = np.cumsum(sizes**2) - sizes**2
    return bitmap * (sizes**2).sum() + first[level], sizes[level]


def cutout_count() -> int:
    """How many bitmaps there are."""
    return len(_BITMAPS)


@functools.cache
def cutouts() -> np.ndarray:
    """All bitmaps with their mip levels, flat bool; always generated from the same seed."""
    rng = np.random.default_rng(77)
    parts = []
    for make in _BITMAPS:
        cover = make(rng).astype(np.float32)
        for level in range(CUTOUT_LEVELS):
            if level:
                n = CUTOUT_SIZE >> level
                cover = cover.reshape(n, 2, n, 2).mean(axis=(1, 3))
            # Half of the area, or less: thin parts thicken with distance and do not vanish.
            parts.append((cover > 0.4).ravel())
    return np.concatenate(parts)


def _square() -> tuple[np.ndarray, np.ndarray]:
    x = (np.arange(CUTOUT_SIZE) + 0.5) / CUTOUT_SIZE * 2 - 1
    return np.meshgrid(x, x)


def _ellipse(x, y, center, half, angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    u, v = (x - center[0]) * c + (y - center[1]) * s, (y - center[1]) * c - (x - center[0]) * s
    return (u / half[0]) ** 2 + (v / half[1]) ** 2 < 1


def _crown(rng) -> np.ndarray:
    """Leaves in a round heap, thinner towards its edge."""
    x, y = _square()
    cover = np.zeros(x.shape, bool)
    for _ in range(int(rng.integers(90, 190))):
        center = rng.normal(0, 0.38, 2)
        half = rng.uniform(0.03, 0.11) * np.array([1, rng.uniform(0.35, 0.7)])
        if np.abs(center).max() < 0.88:
            cover |= _ellipse(x, y, center, half, rng.uniform(0, np.pi))
    return cover


def _fern(rng) -> np.ndarray:
    """Leaflets on both sides of a bent stem."""
    x, y = _square()
    bend = rng.uniform(-0.3, 0.3)
    cover = (np.abs(x - bend * (y**2 - 1)) < 0.025) & (np.abs(y) < 0.95)
    for step in np.linspace(-0.85, 0.85, int(rng.integers(7, 14))):
        length = 0.75 * (1 - 0.8 * abs(step + 0.2))
        for side in (-1, 1):
            center = np.array([bend * (step**2 - 1) + side * 0.5 * length, step - 0.15 * length])
            cover |= _ellipse(x, y, center, (0.5 * length, 0.05), -side * 0.35)
    return cover


def _twigs(rng) -> np.ndarray:
    """A branch that forks several times, with some leaves."""
    x, y = _square()
    cover = np.zeros(x.shape, bool)
    ends = [(np.array([0.0, 0.98]), -np.pi / 2, 0.55, 0.05)]
    for _ in range(5):
        grown = []
        for start, angle, length, thick in ends:
            way = np.array([np.cos(angle), np.sin(angle)])
            middle = start + way * length / 2
            cover |= _ellipse(x, y, middle, (length * 0.55, thick), angle)
            for fork in (rng.uniform(0.2, 0.7), -rng.uniform(0.2, 0.7)):
                grown.append((start + way * length, angle + fork, length * 0.72, thick * 0.75))
        ends = grown
    for start, angle, _, _ in ends:
        if rng.random() < 0.7 and np.abs(start).max() < 0.9:
            cover |= _ellipse(x, y, start, (0.09, 0.05), angle)
    return cover


def _mesh(rng) -> np.ndarray:
    """A wire mesh or a lattice, straight or diagonal."""
    x, y = _square()
    if rng.random() < 0.5:
        x, y = x + y, x - y
    n, thick = int(rng.integers(4, 9)), rng.uniform(0.1, 0.25)
    return (np.abs(x * n % 1 - 0.5) > 0.5 - thick) | (np.abs(y * n % 1 - 0.5) > 0.5 - thick)


def _grille(rng) -> np.ndarray:
    """Uprights between two rails, with rings."""
    x, y = _square()
    n = int(rng.integers(4, 9))
    bars = np.abs(x * n % 1 - 0.5) > 0.36
    radius = np.hypot((x * n + 0.5) % 1 - 0.5, (y - rng.uniform(-0.5, 0.5)) * n)
    rails = (np.abs(np.abs(y) - 0.85) < 0.07) | ((radius < 0.45) & (radius > 0.25))
    return (bars & (np.abs(y) < 0.97)) | rails


def _flower(rng) -> np.ndarray:
    """Petals around a centre, or a star."""
    x, y = _square()
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    petals = int(rng.integers(4, 10))
    wave = 0.5 + 0.5 * np.cos(petals * angle + rng.uniform(0, 6))
    return radius < 0.3 + 0.65 * wave ** rng.uniform(0.5, 1.5)


def _blob(rng) -> np.ndarray:
    """An outline of a few harmonics: stones, animals, folded cloth."""
    x, y = _square()
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    edge = 0.6 + sum(
        rng.normal(0, 0.35 / (k + 1)) * np.cos(k * angle + rng.uniform(0, 6)) for k in range(1, 8)
    )
    return radius < np.clip(edge, 0.15, 0.97)


def _letters(rng) -> np.ndarray:
    """Blocky glyphs in rows."""
    n = int(rng.choice([8, 16]))
    cells = rng.random((n, n)) < 0.6
    cells[3::4] = False
    cells[:, 3::4] = False
    return np.kron(cells, np.ones((CUTOUT_SIZE // n,) * 2)) > 0


FOLIAGE_BITMAPS = range(0, 10)
_BITMAPS = (
    *(_crown,) * 5, *(_fern,) * 2, *(_twigs,) * 3, *(_mesh,) * 3, *(_grille,) * 2,
    *(_flower,) * 3, *(_blob,) * 4, *(_letters,) * 2,
)  # fmt: skip
