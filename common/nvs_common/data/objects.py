"""Single objects before white, seen from an orbit: images, masks, depth and the true solid.

`Objects(seed)` is a source of scenes as the procedural world is, and scene i is a function of
(seed, i) alone. An object is a handful of textured solids inside the sphere of `RADIUS` about the
origin; the world has z up. Cameras stand on a circle around it and look at its centre, as in the
renders that multi-view diffusion models are trained on.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import ClassVar

import numpy as np

from nvs_common.data import builder, lighting, procedural, raycast, rigs, shapes
from nvs_common.data.lighting import Lamp
from nvs_common.data.raycast import Solids
from nvs_common.data.shading import Sky, Stage
from nvs_common.errors import InputError
from nvs_common.types import Cameras

# Of the sphere about the origin that holds an object, and of the orbit; world units.
RADIUS = 0.5
DISTANCE = 1.5
# Field of view of a lens of 35 mm before a sensor of 32 mm.
FOV = 49.1


@dataclasses.dataclass(frozen=True)
class Objects:
    """A source of objects: `len(objects)`, `objects[i] -> ObjectScene`.

    Attributes:
      seed: objects of two seeds have nothing in common.
      num_scenes: how many there are.
      height, width: pixels of an image.
      num_views: cameras, evenly spread over the whole circle.
      elevation: (low, high) of the orbit above the horizon, degrees.
    """

    seed: int = 0
    num_scenes: int = 100_000
    height: int = 64
    width: int = 64
    num_views: int = 16
    elevation: tuple[float, float] = (10.0, 40.0)

    def __post_init__(self) -> None:
        least = {"seed": 0, "num_scenes": 1, "height": 1, "width": 1, "num_views": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"objects: {name} is {getattr(self, name)}; give >= {low}.")
        low, high = self.elevation
        if not -80 <= low <= high <= 80:
            raise InputError(
                f"objects: elevation is ({low}, {high}); give -80 <= low <= high <= 80 degrees."
            )

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> ObjectScene:
        index = operator.index(index)
        if not 0 <= index < self.num_scenes:
            raise IndexError(f"scene {index} of {self.num_scenes}")
        rng = np.random.default_rng([self.seed, index, 2])
        names = tuple(f"{view:03d}" for view in range(self.num_views))
        return ObjectScene(_orbit(rng, self), _stage(rng), names)


@dataclasses.dataclass(frozen=True)
class ObjectScene:
    """One object, rendered when it is asked for.

    Attributes:
      cameras: Cameras [n].
      stage: the object and its light.
      names: [n] view names.
      source, bounds: where the images and the depth range come from.
      has_masks: that `masks` is there.
    """

    cameras: Cameras
    stage: Stage
    names: tuple[str, ...]
    source: str = "procedural object"
    bounds: str = "the sphere that holds the object"
    has_masks: ClassVar[bool] = True

    def images(self, indices) -> np.ndarray:
        """Renders views before white: float32 [k, h, w, 3] in [0, 1]."""
        return np.stack([self._view(int(i))[0] for i in np.atleast_1d(np.asarray(indices))])

    def masks(self, indices) -> np.ndarray:
        """Part of each pixel that the object covers: float32 [k, h, w] in [0, 1]."""
        return np.stack([self._view(int(i))[1] for i in np.atleast_1d(np.asarray(indices))])

    def depths(self, indices) -> np.ndarray:
        """Exact z-depth at pixel centres: float32 [k, h, w]; 0 where there is background."""
        cameras = self.cameras[np.atleast_1d(np.asarray(indices))]
        rays = raycast.pinhole_rays(
            cameras.world_from_cam, cameras.intrinsics, cameras.height, cameras.width
        )
        depth = raycast.trace(self.stage.solids, raycast.NOTHING, rays, np.zeros((1, 2))).depth
        depth = depth.reshape(len(rays), rays.height, rays.width)
        return np.where(np.isfinite(depth), depth, np.float32(0))

    def inside(self, points: np.ndarray) -> np.ndarray:
        """Which points [..., 3] of the world lie in the object; bool [...]."""
        return np.asarray(_in_solids(self.stage.solids, points).any(axis=-1))

    def surface(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Points [count, 3] that are uniform on the surface of the object."""
        found, missing = [np.zeros((0, 3))], count
        while missing > 0:
            points, of = _on_solids(self.stage.solids, 4 * count, rng)
            # What lies in another solid is no surface.
            points = points[~(_in_solids(self.stage.solids, points) & of).any(axis=-1)]
            # They come solid by solid: the first of them would not be uniform.
            points = rng.permutation(points)[:missing]
            found.append(points)
            missing -= len(points)
        return np.concatenate(found)

    def resized(self, height: int, width: int) -> ObjectScene:
        """The same object and orbit in images of another size; the whole object stays in view."""
        k = _intrinsics(height, width, len(self.names))
        old = self.cameras
        cameras = Cameras(old.world_from_cam, k, old.near, old.far, height, width)
        return dataclasses.replace(self, cameras=cameras)

    def _view(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        cameras = self.cameras[[index]]
        rays = raycast.pinhole_rays(
            cameras.world_from_cam, cameras.intrinsics, cameras.height, cameras.width
        )
        found = procedural.lit(self.stage, rays)
        part = found.coverage[:, None]
        # What is seen through a lens is a display signal, and so is its mixture with white.
        signal = np.sqrt(found.color / np.maximum(part, 1e-6))
        image = np.clip(signal, 0, 1) * part + (1 - part)
        shape = (cameras.height, cameras.width)
        return image.reshape(*shape, 3).astype(np.float32), found.coverage.reshape(shape)


def _in_solids(solids: Solids, points: np.ndarray) -> np.ndarray:
    """Whether points [..., 3] lie in each solid; bool [..., p]."""
    offset = np.asarray(points, float)[..., None, :] - solids.center
    local = np.einsum("pij,...pj->...pi", solids.local_from_world, offset)
    across = local[..., 0] ** 2 + local[..., 1] ** 2
    within = {
        shapes.BOX: np.abs(local).max(axis=-1) <= 1,
        shapes.ELLIPSOID: across + local[..., 2] ** 2 <= 1,
        shapes.CYLINDER: (across <= 1) & (np.abs(local[..., 2]) <= 1),
    }
    return np.any([(solids.kind == kind) & value for kind, value in within.items()], axis=0)


def _on_solids(
    solids: Solids, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Points [count, 3] uniform on solids, and which solids [count, p] each is not on."""
    area = np.array([_area(*one) for one in zip(solids.kind, solids.half, strict=True)])
    of = np.sort(rng.choice(len(area), count, p=area / area.sum()))
    counts = np.bincount(of, minlength=len(area))
    local = [
        _on_shape(kind, half, n, rng)
        for kind, half, n in zip(solids.kind, solids.half, counts, strict=True)
    ]
    points = np.einsum("nij,nj->ni", solids.axes[of], np.concatenate(local)) + solids.center[of]
    return points, np.arange(len(area)) != of[:, None]


def _area(kind: int, half: np.ndarray) -> float:
    """Of the surface of a shape with half extents [3]; of an ellipsoid to 1.1 % (Thomsen)."""
    x, y, z = half
    if kind == shapes.BOX:
        return 8 * (x * y + y * z + z * x)
    if kind == shapes.CYLINDER:
        # The rim by Ramanujan's formula.
        rim = np.pi * (3 * (x + y) - np.sqrt((3 * x + y) * (x + 3 * y)))
        return 2 * np.pi * x * y + 2 * z * rim
    power = 1.6075
    pairs = np.array([x * y, y * z, z * x]) ** power
    return 4 * np.pi * float(np.mean(pairs) ** (1 / power))


def _on_shape(kind: int, half: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Points [count, 3] uniform on a shape with half extents [3], in its own axes."""
    if kind == shapes.BOX:
        sides = np.array([half[1] * half[2], half[2] * half[0], half[0] * half[1]])
        points = rng.uniform(-1, 1, (count, 3))
        axis = rng.choice(3, count, p=sides / sides.sum())
        points[np.arange(count), axis] = rng.choice([-1, 1], count)
        return points * half
    if kind == shapes.CYLINDER:
        caps = 2 * np.pi * half[0] * half[1] / _area(kind, half)
        cap = rng.random(count) < caps
        way = _thinned(count, rng, half, 2)
        points = np.concatenate([way, rng.uniform(-1, 1, (count, 1))], axis=1)
        points[cap, :2] = _in_disc(int(cap.sum()), rng)
        points[cap, 2] = rng.choice([-1, 1], int(cap.sum()))
        return points * half
    return _thinned(count, rng, half, 3) * half


def _in_disc(count: int, rng: np.random.Generator) -> np.ndarray:
    angle, radius = rng.uniform(0, 2 * np.pi, count), np.sqrt(rng.random(count))
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1) * radius[:, None]


def _thinned(count: int, rng: np.random.Generator, half: np.ndarray, size: int) -> np.ndarray:
    """Unit vectors [count, size] that are uniform once they are stretched by half.

    Stretching takes an element of the unit sphere to one that is as much larger as
    |n / half| times the volume of half; vectors are kept in that proportion.
    """
    found = np.zeros((0, size))
    while len(found) < count:
        way = rng.standard_normal((2 * count + 8, size))
        way /= np.linalg.norm(way, axis=-1, keepdims=True)
        stretch = np.linalg.norm(way / half[:size], axis=-1) * half[:size].min()
        found = np.concatenate([found, way[rng.random(len(way)) < stretch]])
    return found[:count]


def _intrinsics(height: int, width: int, count: int) -> np.ndarray:
    focal = min(height, width) / (2 * np.tan(np.radians(FOV) / 2))
    return np.tile([focal, focal, width / 2, height / 2], (count, 1))


def _orbit(rng: np.random.Generator, source: Objects) -> Cameras:
    """Cameras on a whole circle, from a random direction on."""
    count = source.num_views
    azimuth = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(count) / count
    elevation = np.radians(rng.uniform(*source.elevation))
    level = np.cos(elevation)
    eyes = np.stack(
        [level * np.cos(azimuth), level * np.sin(azimuth), np.full(count, np.sin(elevation))], -1
    )
    poses = rigs.look_at(DISTANCE * eyes, np.zeros((count, 3)))
    # The sphere's nearest and farthest point, and a little more.
    near, far = (np.full(count, DISTANCE + side * 1.04 * RADIUS) for side in (-1, 1))
    k = _intrinsics(source.height, source.width, count)
    return Cameras(poses, k, near, far, source.height, source.width)


def _stage(rng: np.random.Generator) -> Stage:
    content = builder.Builder(rng)
    _body(content)
    solids = _fitted(content.solids()[0])
    azimuth, tint = rng.uniform(0, 2 * np.pi), 1 + np.array([0.06, 0.0, -0.08]) * rng.normal()
    key = np.array([np.cos(azimuth), np.sin(azimuth), rng.uniform(0.6, 1.4)])
    centre, spread = np.zeros(3), 1.3 * RADIUS / 4
    lamps = [
        Lamp(4 * key / np.linalg.norm(key), centre, spread, rng.uniform(0.5, 0.9) * tint, soft=2),
        Lamp(
            np.array([0.3, 0.2, 4.0]), centre, spread, np.full(3, 0.25), soft=3, size=112, wrap=1.0
        ),
    ]
    ambient = np.array([np.full(3, 0.25), np.full(3, 0.5)])
    zero, rows = np.zeros(3), np.zeros(2, int)
    sky = Sky(zero, zero, zero, zero, ambient, 0.0, 0.0, rows, np.inf)
    return Stage(
        solids,
        raycast.NOTHING,
        content.materials(),
        lighting.cast(lamps, solids, raycast.NOTHING),
        sky,
    )


_SOLID = (shapes.BOX, shapes.ELLIPSOID, shapes.CYLINDER)
_LOOKS = ("picture", "leaves", "print", "spines", "brick", "checks", "stripes", "dots", "cells")


def _body(b: builder.Builder) -> None:
    """A large solid with smaller ones half sunk into it."""
    rng = b.rng
    half = rng.uniform(0.22, 0.4, 3)
    b.add(rng.choice(_SOLID), np.zeros(3), half, builder.yaw(rng.uniform(0, np.pi)), _paint(b))
    for _ in range(int(rng.integers(2, 6))):
        way = builder.turn(rng)[:, 2]
        size = rng.uniform(0.08, 0.24, 3)
        axes = builder.turn(rng) if rng.random() < 0.5 else builder.yaw(rng.uniform(0, np.pi))
        b.add(rng.choice(_SOLID), way * half, size, axes, _paint(b))


def _paint(b: builder.Builder) -> int:
    return b.material(*_LOOKS, size=b.rng.uniform(0.4, 0.8))


def _fitted(solids: Solids) -> Solids:
    """The solids, moved and scaled into the sphere of RADIUS, which they touch."""
    points = _on_solids(solids, 2_000, np.random.default_rng(0))[0]
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    scale = 0.98 * RADIUS / np.linalg.norm(points - middle, axis=-1).max()
    return dataclasses.replace(
        solids, center=(solids.center - middle) * scale, half=solids.half * scale
    )
