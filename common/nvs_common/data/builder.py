"""What scenes are built with: colours, rotations, materials, and a collector of solids.

Lengths are metres, z is up. A thing is a handful of solids under one group number, so that it can
be taken out as a whole where it is in a camera's way.
"""

from __future__ import annotations

import numpy as np

from nvs_common.data import textures
from nvs_common.data.raycast import Solids
from nvs_common.data.shading import Materials
from nvs_common.data.shapes import CYLINDER

_FLAT = 1e-3


def color(rng: np.random.Generator) -> np.ndarray:
    """A surface colour [3] as a gamma-2 signal: muted as a rule, saturated now and then."""
    value = np.clip(rng.beta(2.2, 1.7), 0.12, 0.95)
    hue = rng.choice([rng.uniform(0.02, 0.14), rng.uniform(0, 1)], p=[0.6, 0.4])
    chroma = rng.beta(1.2, 4.0) if rng.random() < 0.75 else rng.uniform(0.4, 0.95)
    phase = (hue + np.array([0, 2 / 3, 1 / 3])) * 2 * np.pi
    return value * (1 - chroma * (0.5 - 0.5 * np.cos(phase)))


def muted(rng: np.random.Generator) -> np.ndarray:
    """A colour [3] of something large: a wall, a floor, earth; grey, tan, or barely tinted."""
    value = np.clip(rng.beta(2.2, 1.6), 0.15, 0.92)
    hue = rng.choice([rng.uniform(0.04, 0.13), rng.uniform(0, 1)], p=[0.65, 0.35])
    phase = (hue + np.array([0, 2 / 3, 1 / 3])) * 2 * np.pi
    return value * (1 - rng.beta(1.1, 4.5) * (0.5 - 0.5 * np.cos(phase)))


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
    x, y, z = direction / np.sqrt(direction @ direction)
    if abs(x) < 0.9:
        first = np.array([0.0, z, -y])
    else:
        first = np.array([-z, 0.0, x])
    a, b, c = first = first / np.sqrt(first @ first)
    second = (y * c - z * b, z * a - x * c, x * b - y * a)
    return np.stack([first, second, (x, y, z)], axis=-1)


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
        # A copy: callers move their point on while they stack.
        center = np.array(center, float)
        self._solids.append((kind, axes, center, half, material, bitmap, self._group))

    def rod(self, start, end, radius: float, material: int) -> None:
        """Adds a round bar between two points [3]."""
        start, end = np.asarray(start, float), np.asarray(end, float)
        length = np.linalg.norm(end - start)
        half = (radius, radius, length / 2)
        self.add(CYLINDER, (start + end) / 2, half, along(end - start), material)

    def material(
        self, *names: str, size: float = 1.0, base=None, glow: float = 0.0, contrast: float = 0.0
    ) -> int:
        """Adds a material and returns its row.

        Args:
          *names: textures to choose from; any if none is given.
          size: typical extent in world units of what it covers.
          base: [3] colour, drawn if None.
          glow: light given off.
          contrast: if given, a pattern's dark parts are this much darker than the base colour.
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
            if base is not None:
                # Within the family of the given colour: lighter and darker, a little off in hue.
                swing = 0.35 * swing + rng.choice([-1, 1]) * rng.uniform(0.1, 0.6) * first
            if contrast:
                swing = contrast * first
                first = first - 0.2 * swing
            fine = rng.uniform(0, 0.25) * first
            broad = rng.uniform(0, 0.35 if base is None else 0.15) * (color(rng) - first)
            mix = np.stack([swing, fine, broad])
            middle = first if contrast else first + 0.5 * swing
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
