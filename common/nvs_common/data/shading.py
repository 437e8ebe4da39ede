"""What colour a visible surface has: materials under light, gloss, sky and haze.

Colours are light (linear) inside this file; textures and palettes are gamma-2 signals and are
squared on the way in. Arrays of points are component-first, [3, n], so that each component is
contiguous. Dimension key: p solids, m materials, k lights, n points.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from nvs_common.data import lighting, raycast, shapes, textures
from nvs_common.data.lighting import Lights
from nvs_common.data.raycast import SIDES, Rays, Solids, Surround


@dataclasses.dataclass(frozen=True)
class Materials:
    """A table of materials; colours are gamma-2 signals.

    Attributes:
      texture: [m, 2] atlas rows of the main and the detail texture.
      tiles: [m, 2] their repetitions per world unit.
      shift: [m, 2] offset of the main texture in tiles.
      base: [m, 3] colour where the texture is 0.5.
      mix: [m, 3, 3] colour added per texture channel about 0.5 (rows: channel).
      detail: [m] contrast of the detail texture.
      gloss: [m] strength of highlights; shininess: [m] their exponent.
      mirror: [m] how much of the surroundings is reflected at grazing angles.
      glow: [m] light given off, as a multiple of the colour.
    """

    texture: np.ndarray
    tiles: np.ndarray
    shift: np.ndarray
    base: np.ndarray
    mix: np.ndarray
    detail: np.ndarray
    gloss: np.ndarray
    shininess: np.ndarray
    mirror: np.ndarray
    glow: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sky:
    """Light from everywhere, and the look of the dome of an open scene.

    Attributes:
      zenith, horizon, cloud, hill: [3] linear colours.
      ambient: [2, 3] linear light from below and from above.
      cover: how much of the sky is cloud, 0 to 1.
      skyline: height of the hills as the sine of their elevation.
      texture: [2] atlas rows of clouds and hills.
      haze: distance at which air has hidden most of what is behind it; infinite for clear air.
    """

    zenith: np.ndarray
    horizon: np.ndarray
    cloud: np.ndarray
    hill: np.ndarray
    ambient: np.ndarray
    cover: float
    skyline: float
    texture: np.ndarray
    haze: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """Everything that is needed to render, apart from cameras."""

    solids: Solids
    surround: Surround
    materials: Materials
    lights: Lights
    sky: Sky


@dataclasses.dataclass
class Points:
    """Surface points [n] to shade: position, normal, uv [3 or 2, n], material and depth [n]."""

    position: np.ndarray
    normal: np.ndarray
    uv: np.ndarray
    material: np.ndarray


def shade(stage: Stage, rays: Rays, uv: np.ndarray, depth: np.ndarray, surface: np.ndarray):
    """Light that reaches one camera.

    Args:
      stage: the scene.
      rays: one view.
      uv: [2, n] pixels.
      depth: [n] z-depth.
      surface: [n] as in `raycast.Hits`.

    Returns:
      [n, 3] linear colour, float32.
    """
    steps = np.stack([rays.right[0], rays.down[0], rays.corner[0]]).astype(np.float32)
    direction = uv[0] * steps[0][:, None] + (uv[1] * steps[1][:, None] + steps[2][:, None])
    origin = rays.origin[0].astype(np.float32)[:, None]
    position = origin + depth * direction
    view = direction / np.sqrt(_dot(direction, direction))
    count = len(stage.solids.kind) * SIDES
    is_solid = surface < count
    on, off = np.flatnonzero(is_solid), np.flatnonzero(~is_solid)
    points = _join(
        len(surface),
        (on, _solid_points(stage.solids, surface[on], position[:, on])),
        (off, _surround_points(stage.surround, surface[off] - count, position[:, off])),
    )
    facing = _dot(points.normal, view)
    points.normal *= np.where(facing > 0, np.float32(-1), np.float32(1))
    pixel = depth * np.float32(2 / (rays.intrinsics[0, 0] + rays.intrinsics[0, 1]))
    facing = np.abs(facing)
    albedo = _albedo(stage.materials, points, pixel, facing)
    light, shine = _illuminate(stage, points, view)
    reflected = _reflections(stage, points, view, facing)
    glow = stage.materials.glow[points.material][:, None]
    color = albedo * (light.T + glow) + shine.T + reflected.T
    if np.isfinite(stage.sky.haze):
        haze = 1 - np.exp(depth * np.float32(-1 / stage.sky.haze))
        color += (stage.sky.horizon.astype(np.float32) - color) * haze[:, None]
    if stage.surround.kind == "open":
        far = np.flatnonzero(surface == count + raycast.DOME)
        color[far] = _sky(stage, position[:, far], pixel[far]).T
    return color


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _join(count: int, *parts: tuple[np.ndarray, Points]) -> Points:
    whole = Points(
        np.empty((3, count), np.float32),
        np.empty((3, count), np.float32),
        np.empty((2, count), np.float32),
        np.empty(count, np.int64),
    )
    for index, part in parts:
        for field in dataclasses.fields(Points):
            getattr(whole, field.name)[..., index] = getattr(part, field.name)
    return whole


def _solid_points(solids: Solids, surface: np.ndarray, position: np.ndarray) -> Points:
    solid, side = surface // SIDES, surface % SIDES
    linear = solids.local_from_world.reshape(-1, 9).astype(np.float32)
    table = np.concatenate([linear, solids.center, solids.half], axis=1).astype(np.float32)
    row = np.ascontiguousarray(table[solid].T)
    kind = solids.kind[solid]
    offset = position - row[9:12]
    local = [_dot(row[3 * j : 3 * j + 3], offset) for j in range(3)]
    cylinder = kind == shapes.CYLINDER
    curved = (kind == shapes.ELLIPSOID) | (cylinder & (side == 0))
    axis = np.where(curved, 3, np.where(kind == shapes.BOX, side, 2))
    unit = [np.where(axis == j, np.sign(local[j]), np.where(curved, local[j], 0)) for j in (0, 1)]
    unit.append(np.where(curved, np.where(cylinder, 0, local[2]), (axis == 2) * np.sign(local[2])))
    # Flat shapes have no inside: any sign will do, but not zero.
    unit[2] = np.where((kind >= shapes.QUAD), np.float32(1), unit[2]).astype(np.float32)
    unit = np.stack(unit)
    normal = np.stack([_dot(row[j:9:3], unit) for j in range(3)])
    normal /= np.sqrt(_dot(normal, normal))
    metric = [local[j] * row[12 + j] for j in range(3)]
    uv = np.stack([np.where(axis == 0, metric[1], metric[0]), metric[2]])
    uv[1] = np.where(axis == 2, metric[1], uv[1])
    round_ = np.flatnonzero(curved)
    if len(round_):
        x, y, z = (c[round_] for c in local)
        half = row[12:15, round_]
        ball = ~cylinder[round_]
        z = np.where(ball, np.arcsin(np.clip(z, -1, 1)), z)
        uv[:, round_] = np.stack([np.arctan2(y, x) * half[0], z * half[2]])
    return Points(position, normal, uv, solids.material[solid])


def _surround_points(surround: Surround, side: np.ndarray, position: np.ndarray) -> Points:
    normal = np.zeros_like(position)
    if surround.kind == "room":
        axis = side // 2
        normal[axis, np.arange(len(side))] = 1
        uv = np.stack([np.where(axis == 0, position[1], position[0]), position[2]])
        uv[1] = np.where(axis == 2, position[1], uv[1])
    else:
        normal[2] = 1
        uv = position[:2]
    return Points(position, normal, uv, surround.material[side])


def _albedo(materials: Materials, points: Points, pixel: np.ndarray, facing: np.ndarray):
    """Linear albedo [n, 3] of points whose pixel covers `pixel` world units across the view."""
    m = points.material
    tiles = materials.tiles.astype(np.float32)[m]
    # A pixel covers a long ellipse on a slanted surface; its geometric mean width is filtered.
    spread = np.log2(pixel * textures.SIZE) - 0.5 * np.log2(np.maximum(facing, 0.05))
    shift = materials.shift.astype(np.float32)[m].T
    main = textures.lookup(
        materials.texture[m, 0], points.uv * tiles[:, 0] + shift, spread + np.log2(tiles[:, 0])
    )
    detail = textures.lookup(
        materials.texture[m, 1], points.uv * tiles[:, 1], spread + np.log2(tiles[:, 1])
    )
    main -= np.float32(0.5)
    mix = materials.mix.astype(np.float32)[m]
    signal = materials.base.astype(np.float32)[m]
    signal += np.einsum("nc,ncd->nd", main, mix)
    signal *= 1 + materials.detail.astype(np.float32)[m][:, None] * (2 * detail[:, :1] - 1)
    np.clip(signal, 0.01, 1, out=signal)
    return signal * signal


def _illuminate(stage: Stage, points: Points, view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Diffuse light and highlights, both [3, n]."""
    low, high = stage.sky.ambient.astype(np.float32)[:, :, None]
    light = low + (high - low) * (0.5 + 0.5 * points.normal[2])
    shine = np.zeros_like(light)
    gloss = stage.materials.gloss.astype(np.float32)[points.material]
    shiny = np.flatnonzero(gloss > 0)
    exponent = stage.materials.shininess.astype(np.float32)[points.material[shiny]]
    for k, lamp in enumerate(stage.lights.lamps):
        way, strength = lighting.arriving(stage.lights, k, points.position, points.normal)
        wrap = np.float32(lamp.wrap)
        cosine = np.maximum(_dot(points.normal, way) + wrap, 0) / (1 + wrap)
        color = lamp.color.astype(np.float32)[:, None]
        light += color * (strength * cosine)
        if len(shiny) and not lamp.wrap:
            half = way[:, shiny] - view[:, shiny]
            cosine = np.maximum(_dot(half, points.normal[:, shiny]), 0) / np.sqrt(_dot(half, half))
            shine[:, shiny] += color * (gloss[shiny] * cosine**exponent * strength[shiny])
    return light, shine


def _reflections(stage: Stage, points: Points, view: np.ndarray, facing: np.ndarray):
    """What glossy surfaces mirror of the surrounding light, [3, n]."""
    mirror = stage.materials.mirror.astype(np.float32)[points.material]
    fresnel = mirror * (0.04 + 0.96 * (1 - np.minimum(facing, 1)) ** 5)
    up = view[2] + 2 * facing * points.normal[2]
    low, high = stage.sky.ambient.astype(np.float32)[:, :, None]
    return (low + (high - low) * np.clip(0.5 + up, 0, 1)) * fresnel


def _sky(stage: Stage, position: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """Sky with clouds and a skyline of hills at points of the dome, [3, n]."""
    sky = stage.sky
    middle = (stage.surround.low + stage.surround.high).astype(np.float32) / 2
    radius = np.float32((stage.surround.high[2] - stage.surround.low[2]) / 2)
    d = (position - middle[:, None]) / radius
    up = np.clip(d[2], 0, 1)
    columns = [
        np.asarray(c, np.float32)[:, None] for c in (sky.zenith, sky.horizon, sky.cloud, sky.hill)
    ]
    zenith, horizon, cloud, hill = columns
    color = horizon + (zenith - horizon) * np.sqrt(up)
    texel = np.log2(pixel / radius * textures.SIZE)
    # Clouds lie on a plane above the ground: they shrink towards the horizon.
    plane = d[:2] / (up + np.float32(0.15))
    level = texel - 1.5 * np.log2(up + np.float32(0.15)) - 1.5
    rows = np.full(len(up), sky.texture[0])
    puff = textures.lookup(rows, plane * np.float32(0.35), level)[:, 0]
    puff = np.clip((puff - 1 + np.float32(sky.cover)) * 4, 0, 1)
    color += (cloud - color) * puff
    around = np.arctan2(d[1], d[0]) * np.float32(1 / (2 * np.pi))
    rows = np.full(len(up), sky.texture[1])
    flat = np.zeros_like(around)
    crest = textures.lookup(rows, np.stack([2 * around, flat]), texel - 1.6)[:, 0]
    leaf = textures.lookup(rows, np.stack([8 * around, d[2] * 4]), texel + 1.0)[:, 1]
    height = np.float32(sky.skyline) * (np.float32(0.4) + 1.2 * crest)
    sharp = np.clip((height - d[2]) / (pixel / radius) + 0.5, 0, 1)
    return color + (hill * (0.35 + 1.3 * leaf) - color) * sharp
