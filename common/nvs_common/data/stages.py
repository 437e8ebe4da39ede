"""Composes procedural scenes: what surrounds them, what stands where, light, and a viewpoint.

World z is up, lengths are metres (a desk is a room seen from close by). Everything is a function
of one NumPy generator.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from nvs_common.data import builder, lighting, rigs, scenery, textures
from nvs_common.data.lighting import Lamp, Lights
from nvs_common.data.raycast import Solids, Surround
from nvs_common.data.shading import Sky
from nvs_common.data.shapes import BOX, QUAD

ROOM, DESK, STREET, FIELD, CLUTTER = "room", "desk", "street", "field", "clutter"
KINDS = (ROOM, DESK, STREET, FIELD, CLUTTER)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A furnished scene before cameras and light are set.

    Attributes:
      content: solids and materials so far.
      surround: what is behind them.
      stand: where the photographer stands.
      extent: radius about the stand's target in which shadows are sharp.
    """

    content: builder.Builder
    surround: Surround
    stand: rigs.Stand
    extent: float


def furnish(rng: np.random.Generator, kind: str) -> Plan:
    """Draws the contents of a scene of one of KINDS."""
    make = {ROOM: _room, DESK: _desk, STREET: _street, FIELD: _field, CLUTTER: _clutter}
    return make[kind](builder.Builder(rng), rng)


def clear(
    solids: Solids, group: np.ndarray, centres: np.ndarray, margin: float
) -> tuple[Solids, np.ndarray]:
    """Takes out every thing that comes within margin of a camera centre [n, 3]."""
    close = (builder.distances(solids, centres) < margin).any(axis=1)
    keep = ~np.isin(group, group[close])
    return solids.take(keep), group[keep]


def illuminate(rng: np.random.Generator, plan: Plan, solids: Solids) -> tuple[Lights, Sky]:
    """Draws light and sky, and casts the shadows of the solids."""
    draw = _daylight if plan.surround.kind == "open" else _lamplight
    lamps, sky = draw(rng, plan)
    return lighting.cast(lamps, solids, plan.surround), sky


_WARM = np.array([1.0, 0.86, 0.68])


def _daylight(rng, plan: Plan) -> tuple[list[Lamp], Sky]:
    azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 1.2)
    way = np.array([np.cos(azimuth), np.sin(azimuth), np.tan(height)])
    dull = rng.beta(0.5, 0.9)
    power = rng.uniform(1.5, 3.5) * (1 - dull)
    target = np.append(plan.stand.target[:2], 0)
    radius = plan.extent
    sun = target + way / np.linalg.norm(way) * 300
    tint = 1 + (_WARM - 1) * rng.uniform(0.1, 0.8)
    blue = np.array([0.75, 0.88, 1.0])
    above = rng.uniform(0.55, 0.9) * (blue + dull * (1 - blue))
    below = rng.uniform(0.12, 0.3) * (0.5 + power * np.sin(height)) * np.array([1.0, 0.95, 0.85])
    lamps = [
        Lamp(sun, target, radius / 300, power * tint, soft=1 + int(3 * dull)),
        Lamp(target + [1, 2, 60], target, radius / 60, 0.6 * above, soft=3, size=112, wrap=1.0),
    ]
    return lamps, _sky(rng, np.stack([below, 0.4 * above]), above, dull)


def _lamplight(rng, plan: Plan) -> tuple[list[Lamp], Sky]:
    low, high = plan.surround.low, plan.surround.high
    size = high - low
    tint = 1 + (_WARM - 1) * rng.uniform(0, 0.6)
    above = np.exp(rng.uniform(np.log(0.1), np.log(0.7))) * tint
    below = above * rng.uniform(0.3, 0.7)
    centre = (low + high) / 2
    lamps = []
    for _ in range(int(rng.integers(1, 3))):
        reach = rng.uniform(0.5, 1.5) * size[2]
        color = rng.uniform(0.8, 2.4) * (1 + (_WARM - 1) * rng.uniform(0, 1))
        if rng.random() < 0.35:
            # Daylight through a window: from the side, cool and soft.
            eye = low + size * [rng.choice([0.02, 0.98]), rng.uniform(0.1, 0.9), 0.6]
            color = 1.5 * color * [0.75, 0.9, 1.1]
            soft = int(rng.integers(2, 5))
            lamps.append(Lamp(eye, centre, 2.0, color, reach + size[0], soft, 160))
        else:
            eye = low + size * [*rng.uniform(0.15, 0.85, 2), 0.96]
            eye[:2] += (plan.stand.target[:2] - eye[:2]) * rng.uniform(0, 0.6)
            floor = np.append(plan.stand.target[:2] + rng.normal(0, 0.3, 2), low[2])
            spread = min(2.2, 1.4 * plan.extent / (eye[2] - plan.stand.target[2] + 0.01))
            lamps.append(Lamp(eye, floor, spread, color, reach, int(rng.integers(1, 4))))
    top = np.append(plan.stand.target[:2] + 0.01, low[2] + 0.99 * size[2])
    spread = min(2.5, 1.4 * plan.extent / (top[2] - plan.stand.target[2]))
    lamps.append(Lamp(top, plan.stand.target, spread, 0.6 * above, soft=3, size=112, wrap=1.0))
    sky = _sky(rng, np.stack([below, 0.4 * above]), above, 0.0)
    return lamps, dataclasses.replace(sky, haze=np.inf)


def _sky(rng, ambient: np.ndarray, above: np.ndarray, dull: float) -> Sky:
    bright = rng.uniform(1.3, 2.4) * above.mean()
    blue = np.array([0.11, 0.3, 0.8]) * rng.uniform(0.8, 1.25, 3)
    zenith = bright * (blue + dull * (0.9 - blue))
    horizon = bright * np.array([0.8, 0.92, 1.0]) ** (1 - dull) * rng.uniform(0.95, 1.05, 3)
    hill = np.array([0.06, 0.08, 0.04]) * rng.uniform(0.5, 2.5, 3)
    source = textures.atlas()
    rows = np.array([rng.choice(source.find("fractal")), rng.choice(source.find("foliage"))])
    cloud = np.full(3, bright * rng.uniform(1.0, 1.4))
    cover, skyline = rng.uniform(0.1, 0.7), rng.uniform(0.01, 0.12)
    haze = np.exp(rng.uniform(np.log(60), np.log(600))) if rng.random() < 0.5 else np.inf
    return Sky(zenith, horizon, cloud, hill, ambient, cover, skyline, rows, haze)


_INDOOR = (
    scenery.crate, scenery.crate, scenery.ball, scenery.vessel, scenery.table, scenery.table,
    scenery.shelf, scenery.shelf, scenery.plant, scenery.lamp, scenery.panel, scenery.papers,
    scenery.fence, scenery.chair, scenery.chair, scenery.cable, scenery.silhouette,
    scenery.screen,
)  # fmt: skip
_DESKTOP = (
    scenery.crate, scenery.crate, scenery.ball, scenery.vessel, scenery.vessel, scenery.vessel,
    scenery.papers, scenery.papers, scenery.plant, scenery.panel, scenery.lamp, scenery.fence,
    scenery.cable, scenery.cable, scenery.screen, scenery.silhouette,
)  # fmt: skip
_OUTDOOR = (
    scenery.crate, scenery.ball, scenery.plant, scenery.bush, scenery.bush, scenery.bush,
    scenery.fence, scenery.lamp, scenery.panel, scenery.tree, scenery.tree, scenery.vessel,
    scenery.silhouette,
)  # fmt: skip


def _place(b: builder.Builder, things, at, size: float) -> None:
    b.begin()
    things[b.rng.integers(len(things))](b, at, size)


def _large(rng) -> np.ndarray:
    """Colour of a wall or floor: muted as a rule."""
    return builder.muted(rng) if rng.random() < 0.85 else builder.color(rng)


def _occlude(b: builder.Builder, rng, things, stand: rigs.Stand, floor: float) -> None:
    """Stands a few things into the foreground, beside the line of sight."""
    for _ in range(int(rng.integers(0, 4))):
        way = stand.target - stand.eye
        aside = np.array([way[1], -way[0], 0]) * rng.uniform(0.15, 0.5) * rng.choice([-1, 1])
        part = rng.uniform(0.3, 0.7)
        spot = stand.eye + part * (way + aside)
        size = rng.uniform(0.2, 0.5) * np.linalg.norm(way) * part
        _place(b, things, np.array([spot[0], spot[1], floor]), size)


def _walls(b: builder.Builder, rng, low, high) -> Surround:
    wall = b.material(
        "plain", "fractal", "brick", "stripes", "marble", size=rng.uniform(0.8, 3), base=_large(rng)
    )
    other = b.material(
        "plain", "fractal", "wood", "cells", size=rng.uniform(0.8, 3), base=_large(rng)
    )
    floor = b.material(
        "wood", "cells", "checks", "cloth", "marble", size=rng.uniform(0.6, 2.5), base=_large(rng)
    )
    white = rng.uniform(0.6, 0.9) * np.ones(3)
    ceiling = b.material("plain", size=2.0, base=white)
    sides = [wall, wall if rng.random() < 0.7 else other, wall, other, floor, ceiling]
    for axis in (0, 1):
        for end in (low, high):
            for _ in range(int(rng.integers(1, 5))):
                _hang(b, rng, low, high, axis, end[axis])
    return Surround("room", low, high, np.array(sides))


def _hang(b: builder.Builder, rng, low, high, axis: int, wall: float) -> None:
    """A picture, window, door or cupboard on a wall."""
    b.begin()
    other = 1 - axis
    span = high[other] - low[other]
    half = np.array([rng.uniform(0.04, 0.14) * span, rng.uniform(0.1, 0.25) * (high[2] - low[2])])
    middle = np.zeros(3)
    middle[axis] = wall
    middle[other] = low[other] + span * rng.uniform(0.15, 0.85)
    middle[2] = low[2] + (high[2] - low[2]) * rng.uniform(0.35, 0.75)
    thick = np.exp(rng.uniform(np.log(0.01), np.log(0.25)))
    extent = np.zeros(3)
    extent[[axis, other, 2]] = thick, *half
    bright = rng.choice([0.0, 0.8], p=[0.8, 0.2])
    look = b.material(
        "picture", "leaves", "print", "spines", "plain", size=2 * half.max(), glow=bright
    )
    if rng.random() < 0.6:
        b.add(BOX, middle, extent * 1.01, None, b.material("plain", "wood"))
        extent[[other, 2]] *= 0.88
        extent[axis] += 0.01
    b.add(BOX, middle, extent, None, look)


def _room(b: builder.Builder, rng) -> Plan:
    half = rng.uniform([1.8, 2.2], [3.5, 4.5])
    low, high = np.array([*-half, 0]), np.array([*half, rng.uniform(2.3, 3.2)])
    surround = _walls(b, rng, low, high)
    for _ in range(int(rng.integers(8, 17))):
        spot = np.array([*rng.uniform(-0.9, 0.9, 2) * half, 0])
        _place(b, _INDOOR, spot, rng.uniform(0.5, 1.5))
    if rng.random() < 0.6:
        b.begin()
        rug = b.material("cloth", "stripes", "leaves", "checks", size=1.5)
        b.add(QUAD, [0, 0, 0.004], rng.uniform(0.6, 1.6, 2), builder.yaw(rng.uniform(0, 3)), rug)
    eye = np.array([*rng.uniform(-0.5, 0.5) * half[:1], -half[1] * 0.6, rng.uniform(1.0, 1.8)])
    target = np.array([rng.normal(0, 0.3) * half[0], half[1] * 0.4, rng.uniform(0.5, 1.3)])
    stand = rigs.Stand(eye, target, low + 0.25, high - 0.25)
    _occlude(b, rng, _INDOOR, stand, 0.0)
    return Plan(b, surround, stand, 5.0)


def _desk(b: builder.Builder, rng) -> Plan:
    low = np.array([*-rng.uniform(1.2, 3, 2), -0.75])
    high = np.array([rng.uniform(1.2, 3), rng.uniform(0.8, 2.5), rng.uniform(1.4, 2.2)])
    surround = _walls(b, rng, low, high)
    b.begin()
    top = b.material("wood", "plain", "cloth", "marble", size=rng.uniform(0.5, 2), base=_large(rng))
    b.add(BOX, [0, 0.15, -0.03], (0.95, 0.6, 0.03), None, top)
    if rng.random() < 0.6:
        # What stands at the back of a desk: a screen, a partition, a shelf.
        b.begin()
        b.add(
            BOX,
            [rng.normal(0, 0.3), 0.74, 0.3],
            (rng.uniform(0.3, 0.9), 0.02, rng.uniform(0.2, 0.5)),
        )
    for _ in range(int(rng.integers(14, 30))):
        spot = np.array([rng.uniform(-0.85, 0.85), rng.uniform(-0.4, 0.7), 0])
        _place(b, _DESKTOP, spot, rng.uniform(0.08, 0.4))
    for _ in range(int(rng.integers(0, 5))):
        spot = np.array([*(low + (high - low) * rng.uniform(0.1, 0.9, 3))[:2], low[2]])
        _place(b, _INDOOR, spot, rng.uniform(0.5, 1.2))
    eye = np.array([rng.uniform(-0.5, 0.5), -rng.uniform(0.55, 1.0), rng.uniform(0.15, 0.8)])
    target = np.array([rng.normal(0, 0.2), rng.uniform(0, 0.5), rng.uniform(0, 0.15)])
    stand = rigs.Stand(eye, target, low + 0.1, high - 0.1)
    _occlude(b, rng, _DESKTOP, stand, 0.0)
    return Plan(b, surround, stand, 1.2)


def _outside(b: builder.Builder, rng) -> Surround:
    radius = np.exp(rng.uniform(np.log(35), np.log(120)))
    tone = scenery.green(b) if rng.random() < 0.3 else builder.muted(rng)
    looks = ("cells", "brick", "fractal", "foliage", "plain")
    ground = b.material(*looks, size=np.exp(rng.uniform(np.log(0.6), np.log(5))), base=tone)
    sides = np.array([ground, ground, 0, 0, 0, 0])
    return Surround("open", np.full(3, -radius), np.full(3, radius), sides)


def _street(b: builder.Builder, rng) -> Plan:
    surround = _outside(b, rng)
    wide = rng.uniform(3, 7)
    for side in (-1, 1):
        y = rng.uniform(-4, 4)
        while y < 32:
            size = rng.uniform(3, 6)
            b.begin()
            scenery.house(b, [side * (wide + size * 0.95), y, 0], size)
            y += size * rng.uniform(1.7, 2.6)
    for _ in range(int(rng.integers(12, 28))):
        side = rng.choice([-1, 1])
        spot = np.array([side * wide * rng.uniform(0.3, 1.0), rng.uniform(1, 28), 0])
        _place(b, _OUTDOOR, spot, rng.uniform(0.6, 2.5))
    eye = np.array([rng.uniform(-0.4, 0.4) * wide, rng.uniform(-4, 0), rng.uniform(1.3, 2.2)])
    target = np.array([rng.normal(0, 0.5) * wide, rng.uniform(8, 15), rng.uniform(0.8, 2.2)])
    stand = rigs.Stand(eye, target, np.array([-50, -50, 0.5]), np.full(3, 50.0))
    _occlude(b, rng, _OUTDOOR, stand, 0.0)
    return Plan(b, surround, stand, 16.0)


def _field(b: builder.Builder, rng) -> Plan:
    surround = _outside(b, rng)
    for _ in range(int(rng.integers(12, 28))):
        ahead = np.exp(rng.uniform(np.log(1.2), np.log(18)))
        spot = np.array([rng.uniform(-0.9, 0.9) * (ahead + 1), ahead, 0])
        _place(b, _OUTDOOR, spot, rng.uniform(0.3, 0.5 + 0.25 * ahead))
    for _ in range(int(rng.integers(0, 4))):
        spot = np.array([rng.uniform(-15, 15), rng.uniform(12, 28), 0])
        b.begin()
        scenery.house(b, spot, rng.uniform(3, 5))
    eye = np.array([0, -rng.uniform(0.5, 2), rng.uniform(0.6, 2.0)])
    target = np.array([rng.normal(0, 0.5), rng.uniform(2, 6), rng.uniform(0.2, 1.2)])
    stand = rigs.Stand(eye, target, np.array([-50, -50, 0.2]), np.full(3, 50.0))
    _occlude(b, rng, _OUTDOOR, stand, 0.0)
    return Plan(b, surround, stand, 11.0)


def _clutter(b: builder.Builder, rng) -> Plan:
    half = rng.uniform([2, 3, 1.5], [5, 7, 3])
    low, high = -half, half
    surround = _walls(b, rng, low, high)
    eye = np.array([0, -0.8 * half[1], 0]) + rng.normal(0, 0.2, 3)
    for _ in range(int(rng.integers(15, 40))):
        ahead = np.exp(rng.uniform(np.log(0.6), np.log(2 * half[1])))
        spot = eye + [*(rng.uniform(-0.8, 0.8, 2) * ahead), ahead]
        spot = np.array([spot[0], eye[1] + ahead, eye[2] + rng.uniform(-0.6, 0.6) * ahead])
        _place(b, (scenery.shard, scenery.shard, *_INDOOR), spot, ahead * rng.uniform(0.1, 0.4))
    target = eye + [rng.normal(0, 0.2), half[1], rng.normal(0, 0.2)]
    return Plan(b, surround, rigs.Stand(eye, target, low + 0.2, high - 0.2), 5.0)
