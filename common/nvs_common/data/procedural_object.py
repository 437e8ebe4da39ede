"""An object of a few solids on white, photographed from all around, whose surface is known exactly.

What a method that recovers surfaces is measured on: the signed distance of any point, images with
masks and depth, all from a seed. Pure NumPy. The object fits the unit sphere about the origin.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from nvs_common.data import rigs
from nvs_common.errors import InputError
from nvs_common.types import Cameras

KINDS = ("sphere", "box", "torus", "capsule")
# Of the cameras, from the origin and in degrees.
DISTANCE = 2.7
FIELD_OF_VIEW = 40.0
_STEPS, _CLOSE = 80, 5e-4
_LIGHT = np.array([0.36, -0.48, 0.8])
# Positions within a pixel of the rays whose mean it is.
_OFFSETS = (np.stack(np.meshgrid([-0.25, 0.25], [-0.25, 0.25]), -1) + 0.5).reshape(-1, 2)


@dataclasses.dataclass(frozen=True)
class Part:
    """One solid.

    Attributes:
      kind: one of KINDS.
      center: [3].
      axes: [3, 3] rows are its own axes.
      size: [3] radius; half sides; radii of ring and tube; half length and radius.
      colors: [2, 3] of its stripes, linear light.
      frequency: [3] of the stripes along the world's axes; zero for one colour.
    """

    kind: str
    center: np.ndarray
    axes: np.ndarray
    size: np.ndarray
    colors: np.ndarray
    frequency: np.ndarray

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Signed distances [n] of points [n, 3], negative inside."""
        p = (points - self.center) @ self.axes.T
        if self.kind == "sphere":
            return np.linalg.norm(p, axis=-1) - self.size[0]
        if self.kind == "box":
            q = np.abs(p) - self.size
            outside = np.linalg.norm(np.maximum(q, 0), axis=-1)
            return outside + np.minimum(q.max(axis=-1), 0) - 0.02
        if self.kind == "torus":
            ring = np.hypot(p[:, 0], p[:, 1]) - self.size[0]
            return np.hypot(ring, p[:, 2]) - self.size[1]
        along = np.clip(p[:, 2], -self.size[0], self.size[0])
        p = np.stack([p[:, 0], p[:, 1], p[:, 2] - along], axis=-1)
        return np.linalg.norm(p, axis=-1) - self.size[1]

    def color(self, points: np.ndarray) -> np.ndarray:
        """Linear colours [n, 3] of its surface at points [n, 3]."""
        share = 0.5 + 0.5 * np.tanh(3 * np.sin(points @ self.frequency))
        return self.colors[0] + share[:, None] * (self.colors[1] - self.colors[0])


@dataclasses.dataclass(frozen=True)
class ObjectScene:
    """Views of an object; what `sources` calls a scene.

    Attributes:
      cameras: [n] around the object, of the images' size.
      names: of the views.
      parts: the object.
      seed: that it was made from.
    """

    cameras: Cameras
    names: tuple[str, ...]
    parts: tuple[Part, ...]
    seed: int
    source: str = "procedural object"
    bounds: str = "unit sphere"

    @property
    def has_masks(self) -> bool:
        """Always: what is not the object is known."""
        return True

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Signed distances [n] of points [n, 3]; inside they are bounds."""
        return functools.reduce(np.minimum, (part.distance(points) for part in self.parts))

    def surface(self, count: int, rng: np.random.Generator, *, band: float = 0.01) -> np.ndarray:
        """Points [count, 3] that are uniform on the surface.

        Drawn in a thin shell around it and moved to it along the gradient.
        """
        found, missing = [], count
        while missing > 0:
            points = rng.uniform(-1, 1, (200_000, 3))
            distance = self.distance(points)
            points = points[np.abs(distance) < band]
            points = points - self.distance(points)[:, None] * self.normals(points)
            # The edges between solids have no gradient: what does not arrive is left out.
            points = points[np.abs(self.distance(points)) < 0.05 * band]
            found.append(points)
            missing -= len(points)
        return np.concatenate(found)[:count]

    def normals(self, points: np.ndarray) -> np.ndarray:
        """Unit gradients [n, 3] of the distance, by central differences."""
        step = 1e-4 * np.eye(3)
        slope = [self.distance(points + s) - self.distance(points - s) for s in step]
        normal = np.stack(slope, axis=-1)
        return normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """Images [k, h, w, 3] float32, the object over white."""
        return self._stack(indices, "image")

    def masks(self, indices: Sequence[int]) -> np.ndarray:
        """Shares [k, h, w] float32 of each pixel that the object covers."""
        return self._stack(indices, "mask")

    def depths(self, indices: Sequence[int]) -> np.ndarray:
        """z-depths [k, h, w] float32 through the pixels' middles; the camera's far beside it."""
        depths = []
        for i in indices:
            origin, directions, forward = self._rays(int(i), np.full((1, 2), 0.5))
            t, hit = self._trace(origin, directions.reshape(-1, 3))
            depth = np.where(hit, t * forward.reshape(-1), self.cameras.far[i])
            depths.append(depth.reshape(self.cameras.height, self.cameras.width))
        return np.asarray(depths, np.float32)

    def resized(self, height: int, width: int) -> ObjectScene:
        """The same views at another size."""
        return orbit(self.seed, height, width, len(self.names))

    def _stack(self, indices: Sequence[int], what: str) -> np.ndarray:
        pictures = [self._picture(int(i)) for i in indices]
        return np.stack([p[..., 3] if what == "mask" else p[..., :3] for p in pictures])

    def _picture(self, index: int) -> np.ndarray:
        """Colour over white, and coverage, of one view: [h, w, 4] float32."""
        origin, directions, _ = self._rays(index, _OFFSETS)
        flat = directions.reshape(-1, 3)
        t, hit = self._trace(origin, flat)
        color = np.ones((len(flat), 3))
        points = origin + t[hit, None] * flat[hit]
        color[hit] = self._shade(points, flat[hit])
        both = np.concatenate([color, hit[:, None]], axis=-1)
        return both.reshape(*directions.shape[:-1], 4).mean(axis=2).astype(np.float32)

    def _shade(self, points: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Display colours [n, 3]: a lamp, light from above and a little gloss."""
        each = np.stack([part.distance(points) for part in self.parts])
        color, nearest = np.empty_like(points), each.argmin(axis=0)
        for i, part in enumerate(self.parts):
            mine = nearest == i
            color[mine] = part.color(points[mine])
        normal = self.normals(points)
        lamp = np.maximum(normal @ _LIGHT, 0)
        half = _LIGHT - directions
        half /= np.linalg.norm(half, axis=-1, keepdims=True)
        gloss = 0.15 * np.maximum(np.sum(normal * half, axis=-1), 0) ** 30
        light = 0.35 + 0.15 * normal[:, 2] + 0.55 * lamp
        linear = color * light[:, None] + gloss[:, None]
        return np.clip(linear, 0, 1) ** (1 / 2.2)

    def _rays(self, index: int, offsets: np.ndarray):
        """Origin [3], unit directions [h, w, s, 3] and their share of z [h, w, s]."""
        cams = self.cameras
        pose, (fx, fy, cx, cy) = cams.world_from_cam[index], cams.intrinsics[index]
        x, y = np.meshgrid(np.arange(cams.width), np.arange(cams.height))
        u, v = x[..., None] + offsets[:, 0], y[..., None] + offsets[:, 1]
        local = np.stack([(u - cx) / fx, (v - cy) / fy, np.ones_like(u)], axis=-1)
        length = np.linalg.norm(local, axis=-1)
        return pose[:3, 3], (local / length[..., None]) @ pose[:3, :3].T, 1 / length

    def _trace(self, origin: np.ndarray, directions: np.ndarray):
        """Distances [n] along rays to the surface, and whether there is one [n]."""
        middle = -directions @ origin
        closest = origin @ origin - middle**2
        reach = np.sqrt(np.maximum(1 - closest, 0))
        t, end = middle - reach, middle + reach
        hit = np.zeros(len(t), bool)
        active = np.flatnonzero(closest < 1)
        for _ in range(_STEPS):
            distance = self.distance(origin + t[active, None] * directions[active])
            hit[active[distance < _CLOSE]] = True
            t[active] += np.where(distance < _CLOSE, 0, distance)
            active = active[(distance >= _CLOSE) & (t[active] < end[active])]
            if not len(active):
                break
        return t, hit


def orbit(seed: int, height: int, width: int, num_views: int) -> ObjectScene:
    """The object of a seed and its views, from the ground to 60 degrees above.

    Raises:
      InputError: a size or number that is not positive.
    """
    if min(height, width, num_views) < 1:
        raise InputError(
            f"procedural object: {num_views} views of {height} x {width}; all must be positive."
        )
    index = np.arange(num_views)
    # Steps by the golden angle: neighbouring numbers are far apart, so that every n-th view, which
    # is held out, lies among others.
    angle = index * np.pi * (3 - np.sqrt(5))
    height_of = np.sin(np.radians(60)) * ((index * 0.381966) % 1)
    ring = np.sqrt(1 - height_of**2)
    eyes = DISTANCE * np.stack([np.cos(angle) * ring, np.sin(angle) * ring, height_of], axis=-1)
    poses = rigs.look_at(eyes, np.zeros(3))
    focal = min(height, width) / (2 * np.tan(np.radians(FIELD_OF_VIEW) / 2))
    k = np.tile([focal, focal, width / 2, height / 2], (num_views, 1))
    ends = np.full(num_views, DISTANCE)
    cameras = Cameras(poses, k, ends - 1, ends + 1, height, width)
    names = tuple(f"{i:03d}" for i in range(num_views))
    return ObjectScene(cameras, names, _parts(seed), seed)


def _parts(seed: int) -> tuple[Part, ...]:
    """A body and what is attached to it, within 0.9 of the origin."""
    rng = np.random.default_rng([seed, 20])
    body = _part(rng, "box", np.zeros(3), rng.uniform(0.22, 0.38, 3))
    parts = [body]
    for number in range(6):
        kind = KINDS[(number + int(rng.integers(2))) % len(KINDS)]
        way = rng.normal(size=3)
        center = 0.5 * way / np.linalg.norm(way)
        if kind == "torus":
            size = np.array([rng.uniform(0.16, 0.26), rng.uniform(0.05, 0.09), 0])
        elif kind == "capsule":
            size = np.array([rng.uniform(0.12, 0.28), rng.uniform(0.06, 0.1), 0])
        else:
            size = rng.uniform(0.12, 0.22, 3)
        parts.append(_part(rng, kind, center, size))
    return tuple(parts)


def _part(rng: np.random.Generator, kind: str, center: np.ndarray, size: np.ndarray) -> Part:
    axes, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    colors = rng.uniform(0.03, 0.9, (2, 3))
    way = rng.normal(size=3)
    frequency = rng.uniform(8, 22) * way / np.linalg.norm(way)
    return Part(kind, center, axes, size, colors, frequency)
