"""The procedural world: endless posed scenes made from a seed, with exact depth.

`World(seed)` is a source of scenes: nothing is stored or downloaded, and scene i is a function of
(seed, i) alone, on every host. Rendering is ray casting in NumPy.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import NamedTuple

import numpy as np

from nvs_common.data import raycast, rigs, shading, stages
from nvs_common.data.raycast import Rays
from nvs_common.data.shading import Stage
from nvs_common.errors import InputError
from nvs_common.types import Cameras

# Four samples of a pixel on a rotated grid: no two share a row or a column.
_SAMPLES = np.array([[-0.125, -0.375], [0.375, -0.125], [0.125, 0.375], [-0.375, 0.125]])
_CENTRE = np.zeros((1, 2))
_BAND = 8192
# Size of the sparse renderings from which depth ranges and exposure are measured.
_SPARSE_WIDTH = 32


@dataclasses.dataclass(frozen=True)
class World:
    """A source of procedural scenes: `len(world)`, `world[i] -> ProceduralScene`.

    Attributes:
      seed: scenes of two seeds have nothing in common.
      num_scenes: how many there are.
      height, width: pixels of an image.
      num_views: cameras in a scene.
      kinds: kinds of scenes to draw from; see `stages.KINDS`.
      rigs: camera rigs to draw from; see `rigs.RIGS`.
      baseline: (low, high) disparity between neighbouring cameras at the nearest depth, as a
        part of the image width.
      fov: (low, high) field of view across the longer side, degrees.
      exposure_jitter: standard deviation of each view's exposure in stops; 0 for one exposure.
      noise: standard deviation of sensor noise in the image's values; 0 for none.
    """

    seed: int = 0
    num_scenes: int = 100_000
    height: int = 64
    width: int = 112
    num_views: int = 16
    kinds: tuple[str, ...] = stages.KINDS
    rigs: tuple[str, ...] = rigs.RIGS
    baseline: tuple[float, float] = (0.03, 0.12)
    fov: tuple[float, float] = (40.0, 85.0)
    exposure_jitter: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("kinds", stages.KINDS), ("rigs", rigs.RIGS)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown or not getattr(self, name):
                raise InputError(
                    f"procedural world: {name} is {getattr(self, name)!r}; choose from {known}."
                )
        for name in ("num_scenes", "height", "width", "num_views"):
            if getattr(self, name) < 1:
                raise InputError(f"procedural world: {name} is {getattr(self, name)}; give >= 1.")
        for name in ("baseline", "fov"):
            ends = tuple(getattr(self, name))
            if len(ends) != 2 or not 0 < ends[0] <= ends[1] < 160:
                raise InputError(
                    f"procedural world: {name} is {ends}; give (low, high), 0 < low <= high < 160."
                )

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> ProceduralScene:
        index = operator.index(index)
        if not 0 <= index < self.num_scenes:
            raise IndexError(f"scene {index} of {self.num_scenes}")
        return _make_scene(self, index)


@dataclasses.dataclass(frozen=True)
class ProceduralScene:
    """One scene: cameras, and images and depths rendered when they are asked for.

    Attributes:
      cameras: Cameras [n].
      stage: what there is to see.
      look: how the camera turns light into values.
      seed: (world seed, scene index), from which per-view noise is drawn.
      names: [n] view names.
      source, bounds: where the images and the depth range come from.
    """

    cameras: Cameras
    stage: Stage
    look: Look
    seed: tuple[int, int]
    names: tuple[str, ...]
    source: str = "procedural"
    bounds: str = "percentiles of the depth that the cameras see"

    def images(self, indices) -> np.ndarray:
        """Renders views: float32 [k, h, w, 3] in [0, 1]."""
        views = [self._image(int(i)) for i in np.atleast_1d(np.asarray(indices))]
        return np.stack(views)

    def depths(self, indices) -> np.ndarray:
        """Exact z-depth at pixel centres: float32 [k, h, w]."""
        rays = _rays(self.cameras[np.atleast_1d(np.asarray(indices))])
        hits = raycast.trace(self.stage.solids, self.stage.surround, rays, _CENTRE)
        return hits.depth.reshape(len(rays), rays.height, rays.width)

    def resized(self, height: int, width: int) -> ProceduralScene:
        """The same scene rendered at another size: the centre crop of that aspect, exactly."""
        old = self.cameras
        scale = max(height / old.height, width / old.width)
        k = np.asarray(old.intrinsics) * scale
        k[..., 2] += (width - old.width * scale) / 2
        k[..., 3] += (height - old.height * scale) / 2
        cameras = Cameras(old.world_from_cam, k, old.near, old.far, height, width)
        return dataclasses.replace(self, cameras=cameras)

    def _image(self, index: int) -> np.ndarray:
        rays = _rays(self.cameras[[index]])
        # Bands of rows keep the arrays of a large image inside the processor's cache.
        rows = max(_BAND // rays.width, 1)
        bands = [rays.band(top, top + rows) for top in range(0, rays.height, rows)]
        light = np.concatenate([lit(self.stage, band).color for band in bands])
        rng = np.random.default_rng([*self.seed, index, 1])
        return self.look.develop(light.reshape(rays.height, rays.width, 3), rng)


@dataclasses.dataclass(frozen=True)
class Look:
    """How a camera turns light into image values; the same for all views of a scene.

    Attributes:
      exposure: [3] gain per channel (exposure and white balance).
      saturation: factor on the distance of colours from grey.
      gamma: exponent of the display signal.
      vignette: light lost in the corners.
      exposure_jitter, noise: as in `World`.
    """

    exposure: np.ndarray
    saturation: float
    gamma: float
    vignette: float
    exposure_jitter: float
    noise: float

    def develop(self, light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Image [h, w, 3] float32 in [0, 1] from linear light [h, w, 3]; rng draws the noise."""
        gain = self.exposure * 2 ** (self.exposure_jitter * rng.standard_normal())
        height, width = light.shape[:2]
        y = ((np.arange(height, dtype=np.float32) + 0.5) / height - 0.5) * (height / width)
        x = (np.arange(width, dtype=np.float32) + 0.5) / width - 0.5
        radius = (y[:, None] ** 2 + x**2) / (0.25 * (1 + (height / width) ** 2))
        fall = 1 - np.float32(self.vignette) * radius
        value = light * gain.astype(np.float32) * fall[..., None]
        grey = value.mean(axis=-1, keepdims=True)
        value = np.maximum(grey + np.float32(self.saturation) * (value - grey), 0)
        # Straight up to a knee, then an ever flatter shoulder: highlights are kept.
        knee = np.float32(0.6)
        over = np.maximum(value - knee, 0)
        value = np.minimum(value, knee) + (1 - knee) * over / (over + (1 - knee))
        value = value ** np.float32(1 / self.gamma)
        if self.noise:
            value += np.float32(self.noise) * rng.standard_normal(value.shape, np.float32)
        return np.clip(value, 0, 1).astype(np.float32, copy=False)


def _rays(cameras: Cameras) -> Rays:
    return raycast.pinhole_rays(
        cameras.world_from_cam, cameras.intrinsics, cameras.height, cameras.width
    )


class Lit(NamedTuple):
    """One view: linear color [h * w, 3] of what is there, and the part [h * w] it covers."""

    color: np.ndarray
    coverage: np.ndarray


def lit(stage: Stage, rays: Rays) -> Lit:
    """Renders one view: every surface in a pixel is shaded once.

    Where nothing surrounds the solids, a pixel's color is that of its covered part times the part.
    """
    hits = raycast.trace(stage.solids, stage.surround, rays, _SAMPLES)
    surface, depth = hits.surface[0].T, hits.depth[0].T
    met = np.isfinite(depth)
    depth = np.where(met, depth, 0)
    samples, pixels = surface.shape
    alike = surface[:, None] == surface[None]
    count = alike.sum(axis=1, dtype=np.float32)
    first = np.ones((samples, pixels), bool)
    for sample in range(1, samples):
        first[sample] = ~alike[sample, :sample].any(axis=0)
    sample, pixel = np.nonzero(first & met)
    share = alike[sample, :, pixel].T.astype(np.float32) / count[sample, pixel]
    # At the middle of the samples that see it, in pixels.
    offset = np.einsum("sc,sn->cn", _SAMPLES.astype(np.float32), share)
    middle = (share * depth[:, pixel]).sum(axis=0)
    uv = np.stack([pixel % rays.width, pixel // rays.width]).astype(np.float32) + 0.5 + offset
    color = shading.shade(stage, rays, uv, middle, surface[sample, pixel])
    color *= (count[sample, pixel] / samples)[:, None]
    light = np.empty((pixels, 3), np.float32)
    for channel in range(3):
        light[:, channel] = np.bincount(pixel, color[:, channel], pixels)
    return Lit(light, met.mean(axis=0, dtype=np.float32))


def _make_scene(world: World, index: int) -> ProceduralScene:
    rng = np.random.default_rng([world.seed, index])
    plan = stages.furnish(rng, str(rng.choice(world.kinds)))
    solids, group = plan.content.solids()
    stand = plan.stand
    reach = float(np.linalg.norm(stand.target - stand.eye))
    solids, group = stages.clear(solids, group, stand.eye[None], 0.12 * reach)
    k = rigs.intrinsics(rng, rng.uniform(*world.fov), world.height, world.width)
    kind, rig_seed = str(rng.choice(world.rigs)), rng.integers(2**62)
    part = np.exp(rng.uniform(*np.log(world.baseline))) * world.width / k[0]
    poses = rigs.look_at(stand.eye, stand.target)[None]
    kept = solids, group
    # Baselines follow the nearest depth, which a rig seen from the eye alone does not know yet.
    for _ in range(2):
        depth = _depth(kept[0], plan.surround, _sparse(poses, k, world))
        nearest = 0.9 * float(np.median(np.percentile(depth, 0.5, axis=1)))
        rig_rng = np.random.default_rng(rig_seed)
        baseline = part * nearest
        poses = rigs.poses(rig_rng, kind, stand, world.num_views, baseline, nearest)
        kept = stages.clear(solids, group, poses[:, :3, 3], 0.55 * nearest)
    solids = kept[0]
    lights, sky = stages.illuminate(rng, plan, solids)
    stage = Stage(solids, plan.surround, plan.content.materials(), lights, sky)
    rays = _sparse(poses, k, world)
    depth = _depth(solids, plan.surround, rays)
    near = 0.9 * np.percentile(depth, 0.5, axis=1)
    far = 1.1 * np.percentile(depth, 99.5, axis=1)
    cameras = Cameras(poses, np.tile(k, (len(poses), 1)), near, far, world.height, world.width)
    look = _look(rng, world, stage, rays)
    names = tuple(f"{view:03d}" for view in range(len(poses)))
    return ProceduralScene(cameras, stage, look, (world.seed, index), names)


def _sparse(poses: np.ndarray, k: np.ndarray, world: World) -> Rays:
    """A few rays across the whole image of each pose."""
    scale = _SPARSE_WIDTH / world.width
    height = max(round(world.height * scale), 1)
    stretch = np.array([scale, height / world.height] * 2)
    return raycast.pinhole_rays(poses, np.tile(k * stretch, (len(poses), 1)), height, _SPARSE_WIDTH)


def _depth(solids, surround, rays: Rays) -> np.ndarray:
    return raycast.trace(solids, surround, rays, _CENTRE).depth.reshape(len(rays), -1)


def _look(rng: np.random.Generator, world: World, stage: Stage, rays: Rays) -> Look:
    """Exposes for the middle view."""
    one = rays.view(len(rays) // 2)
    light = lit(stage, one).color
    # Between a fixed mean and a fixed highlight, as cameras do.
    middle, bright = np.mean(light), np.percentile(light, 90)
    aim = np.exp(rng.normal(-0.05, 0.45)) * np.sqrt(0.19 * 0.55)
    gain = aim / max(float(np.sqrt(middle * bright)), 1e-4)
    warm = rng.normal(0.03, 0.12)
    balance = np.exp(np.array([warm, 0.3 * warm, -warm]) + rng.normal(0, 0.02, 3))
    return Look(
        balance * gain,
        rng.uniform(0.95, 1.6),
        rng.uniform(1.8, 2.4),
        rng.choice([0, rng.uniform(0, 0.35)]),
        world.exposure_jitter,
        world.noise,
    )
