"""Which surface a camera sees at every pixel: rays against boxes, ellipsoids, cylinders and plates.

A solid is a unit shape under an affine map (`Solids`). Only rays inside the projected bounding
rectangle of a solid are tried, and all solids of all views are tried in the same array
operations: a list of (solid, pixel) pairs, reduced with a packed depth-and-surface key.

Frames: the world has z up; cameras are OpenCV (x right, y down, z forward). Every ray is
`origin + depth * direction` with a direction of unit z in camera axes, so that the parameter of
a hit is its z-depth. Dimension key: p solids, v views, i instances (p times v), s samples in a
pixel, n pairs.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from nvs_common.data import shapes

# Surface numbers: three for a solid (which side was hit), these many for what surrounds the scene.
SIDES = 3
SURROUND_SIDES = 6
GROUND, DOME = 0, 1
# Geometry nearer than this to the camera plane is cut away; scenes keep clear of cameras.
MIN_DEPTH = 1e-3
_EDGES = np.array([(a, a | bit) for bit in (1, 2, 4) for a in range(8) if not a & bit])
_CORNERS = np.array([[1 - 2 * (k >> axis & 1) for axis in range(3)] for k in range(8)], np.float64)


@dataclasses.dataclass(frozen=True)
class Solids:
    """Solid shapes in the world, sorted by kind.

    Attributes:
      kind: [p] one of the kinds of `shapes`.
      axes: [p, 3, 3] rotations; columns are the local axes in the world.
      center: [p, 3].
      half: [p, 3] half extents along the local axes (of a flat shape the third is nearly 0).
      material: [p] row of the material table.
      bitmap: [p] which bitmap a CUTOUT shows; 0 for others.
    """

    kind: np.ndarray
    axes: np.ndarray
    center: np.ndarray
    half: np.ndarray
    material: np.ndarray
    bitmap: np.ndarray

    @property
    def local_from_world(self) -> np.ndarray:
        """[p, 3, 3] linear maps that turn a shape into its unit shape."""
        return np.swapaxes(self.axes, 1, 2) / self.half[:, :, None]

    def take(self, index: np.ndarray) -> Solids:
        """The solids at a sorted index or mask [p]."""
        return Solids(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Surround:
    """What lies behind every solid: the inside of a box, or a ground plane under a dome.

    Attributes:
      kind: "room", "open", or "none" for nothing (infinite depth).
      low: [3] lowest corner of a room; of an open scene, the dome's lowest point.
      high: [3] highest corner, likewise. An open scene's ground is z = 0.
      material: [6] rows of the material table: a room's sides (2 * axis + upper side), or
        GROUND and DOME.
    """

    kind: str
    low: np.ndarray
    high: np.ndarray
    material: np.ndarray


NOTHING = Surround("none", np.zeros(3), np.zeros(3), np.zeros(SURROUND_SIDES, np.int64))


@dataclasses.dataclass(frozen=True)
class Rays:
    """Pinhole rays of v views: origin + depth * (u * right + v * down + corner).

    Attributes:
      origin, right, down, corner: [v, 3] float64, world axes; right and down are a pixel's step.
      camera_from_world: [v, 3, 3] rotations.
      intrinsics: [v, 4] fx, fy, cx, cy in pixels.
      height, width: pixels.
    """

    origin: np.ndarray
    right: np.ndarray
    down: np.ndarray
    corner: np.ndarray
    camera_from_world: np.ndarray
    intrinsics: np.ndarray
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.origin)

    def view(self, index: int) -> Rays:
        """One of the views."""
        one = slice(index, index + 1)
        return Rays(
            self.origin[one],
            self.right[one],
            self.down[one],
            self.corner[one],
            self.camera_from_world[one],
            self.intrinsics[one],
            self.height,
            self.width,
        )

    def band(self, top: int, bottom: int) -> Rays:
        """The same views cropped to rows top to bottom (exclusive, at most the height)."""
        bottom = min(bottom, self.height)
        k = self.intrinsics - np.array([0, 0, 0, top])
        return dataclasses.replace(
            self, corner=self.corner + top * self.down, intrinsics=k, height=bottom - top
        )


@dataclasses.dataclass(frozen=True)
class Hits:
    """What each sample sees.

    Attributes:
      depth: [v, h * w, s] z-depth, float32; infinite where nothing is hit.
      surface: [v, h * w, s] solid * SIDES + side, or p * SIDES + side of the surround; int64.
    """

    depth: np.ndarray
    surface: np.ndarray


def pinhole_rays(world_from_cam, intrinsics, height: int, width: int) -> Rays:
    """Rays of cameras [v, 4, 4] with intrinsics [v, 4] in pixels of height x width images."""
    pose = np.asarray(world_from_cam, np.float64)
    k = np.asarray(intrinsics, np.float64)
    right = pose[:, :3, 0] / k[:, 0:1]
    down = pose[:, :3, 1] / k[:, 1:2]
    corner = pose[:, :3, 2] - k[:, 2:3] * right - k[:, 3:4] * down
    turn = np.swapaxes(pose[:, :3, :3], 1, 2)
    return Rays(pose[:, :3, 3], right, down, corner, turn, k, height, width)


def local_rays(solids: Solids, rays: Rays) -> np.ndarray:
    """Rays in the unit frame of each solid.

    Returns:
      [12, p * v] float32: origin, right, down and corner of `Rays` (three rows each).
    """
    linear = solids.local_from_world
    shift = rays.origin[None] - solids.center[:, None]
    parts = [np.einsum("pij,pvj->ipv", linear, shift)]
    for vector in (rays.right, rays.down, rays.corner):
        parts.append(np.einsum("pij,vj->ipv", linear, vector))
    return np.concatenate(parts).reshape(12, -1).astype(np.float32)


def rectangles(solids: Solids, rays: Rays) -> np.ndarray:
    """Pixel rectangles that enclose each solid in each view, cut at MIN_DEPTH.

    Returns:
      [4, p, v] int: left, right (exclusive), top, bottom (exclusive); empty where out of sight.
    """
    spread = np.einsum("ck,pk,pjk->pcj", _CORNERS, solids.half, solids.axes)
    world = (solids.center[:, None] + spread)[:, None] - rays.origin[:, None]
    points = np.einsum("vij,pvcj->pvci", rays.camera_from_world, world)
    depth = points[..., 2]
    ahead = depth > MIN_DEPTH
    if not ahead.all():
        # Where an edge crosses the camera plane the crossing bounds the visible part.
        a, b = points[:, :, _EDGES[:, 0]], points[:, :, _EDGES[:, 1]]
        gap = b[..., 2] - a[..., 2]
        part = (MIN_DEPTH - a[..., 2]) / np.where(gap == 0, 1, gap)
        crossing = a + part[..., None] * (b - a)
        points = np.concatenate([points, crossing], axis=2)
        ahead = np.concatenate([ahead, (part > 0) & (part < 1) & (gap != 0)], axis=2)
        depth = np.maximum(points[..., 2], MIN_DEPTH)
    k = rays.intrinsics[None, :, None]
    uv = points[..., :2] / np.where(ahead, depth, 1)[..., None] * k[..., :2] + k[..., 2:]
    low = np.where(ahead[..., None], uv, np.inf).min(axis=2)
    high = np.where(ahead[..., None], uv, -np.inf).max(axis=2)
    size = np.array([rays.width, rays.height])
    low = np.floor(np.clip(low, 0, size)).astype(np.int64)
    high = np.ceil(np.clip(high, 0, size)).astype(np.int64)
    return np.stack([low[..., 0], high[..., 0], low[..., 1], high[..., 1]])


def trace(solids: Solids, surround: Surround, rays: Rays, offsets: np.ndarray) -> Hits:
    """Nearest surface along every ray.

    Args:
      solids: p solids sorted by kind.
      surround: what is behind them.
      rays: v views.
      offsets: [s, 2] positions in a pixel of each sample, relative to its centre.

    Returns:
      Hits [v, h * w, s].
    """
    offsets = np.asarray(offsets, np.float32)
    depth, surface = _trace_surround(surround, rays, offsets, len(solids.kind) * SIDES)
    # Positive floats sort like their bits: one integer minimum finds depth and surface.
    key = depth.view(np.uint32).astype(np.uint64) << np.uint64(32)
    key |= surface.astype(np.uint64)
    key = key.reshape(-1)
    if len(solids.kind):
        _trace_solids(solids, rays, offsets, key)
    key = key.reshape(len(rays), rays.height * rays.width, len(offsets))
    depth = (key >> np.uint64(32)).astype(np.uint32).view(np.float32)
    return Hits(depth, (key & np.uint64(0xFFFFFFFF)).astype(np.int64))


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Rays to try: row-wise runs of pixels inside the rectangle of each instance.

    Attributes:
      of: [rows] instance of each row of pixels.
      y: [rows] pixel row.
      begin: [rows + 1] first pair of each row.
      row: [n] row of each pair; x: [n] pixel column.
    """

    of: np.ndarray
    y: np.ndarray
    begin: np.ndarray
    row: np.ndarray
    x: np.ndarray


def _pairs(box: np.ndarray) -> _Pairs:
    """Every pixel of rectangles [4, i], in order."""
    rows = box[3] - box[2]
    of = np.repeat(np.arange(len(rows)), rows)
    y = np.arange(len(of)) - np.repeat(np.cumsum(rows) - rows - box[2], rows)
    columns = (box[1] - box[0])[of]
    begin = np.concatenate([[0], np.cumsum(columns)])
    row = np.repeat(np.arange(len(of)), columns)
    x = np.arange(len(row)) - np.repeat(begin[:-1] - box[0][of], columns)
    return _Pairs(of, y, begin, row, x)


def _extent(solids: Solids, rays: Rays) -> np.ndarray:
    """Size in pixels [p * v] of solids seen face on, wherever the image ends."""
    offset = solids.center[:, None] - rays.origin
    depth = np.einsum("vj,pvj->pv", rays.camera_from_world[:, 2], offset)
    size = 2 * solids.half.max(axis=1)[:, None] * rays.intrinsics[:, 0]
    return (size / np.maximum(depth, MIN_DEPTH)).reshape(-1)


def _trace_solids(solids: Solids, rays: Rays, offsets: np.ndarray, key: np.ndarray) -> None:
    """Lowers `key` [v * h * w * s] wherever a solid is nearer."""
    box = rectangles(solids, rays).reshape(4, -1)
    seen = np.flatnonzero((box[1] > box[0]) & (box[3] > box[2]))
    if not len(seen):
        return
    box = box[:, seen]
    local = local_rays(solids, rays)[:, seen]
    view, solid = seen % len(rays), seen // len(rays)
    cutout = np.stack(shapes.cutout_level(solids.bitmap[solid], _extent(solids, rays)[seen]))
    pairs = _pairs(box)
    line = local[6:9, pairs.of] * (pairs.y + 0.5).astype(np.float32) + local[9:12, pairs.of]
    first_pixel = view[pairs.of] * (rays.height * rays.width) + pairs.y * rays.width
    kinds = solids.kind[solid[pairs.of]]
    for kind in np.unique(kinds):
        first, last = np.searchsorted(kinds, [kind, kind + 1])
        span = slice(pairs.begin[first], pairs.begin[last])
        row, x = pairs.row[span], pairs.x[span]
        item = pairs.of[row]
        right, down = local[3:6, item], local[6:9, item]
        base = line[:, row] + right * (x + 0.5).astype(np.float32)
        direction = [
            base[j] + offsets[:, 0:1] * right[j] + offsets[:, 1:2] * down[j] for j in range(3)
        ]
        if kind == shapes.CUTOUT:
            depth, side, hit = shapes.cutout(local[0:3, item], direction, *cutout[:, item])
        else:
            depth, side, hit = shapes.INTERSECT[kind](local[0:3, item], direction)
        sample, pair = np.nonzero(hit & (depth > MIN_DEPTH))
        value = depth[sample, pair].view(np.uint32).astype(np.uint64) << np.uint64(32)
        surface = (solid * SIDES)[item[pair]]
        if side is not None:
            surface = surface + side[sample, pair]
        place = (first_pixel[row] + x)[pair] * len(offsets) + sample
        np.minimum.at(key, place, value | surface.astype(np.uint64))


def _trace_surround(surround: Surround, rays: Rays, offsets: np.ndarray, first_code: int):
    """Depth [v, h * w, s] float32 and surface [v, h * w, s] of what is behind the solids."""
    shape = (len(rays), rays.height, rays.width, len(offsets))
    flat = (len(rays), rays.height * rays.width, len(offsets))
    if surround.kind == "none":
        # Behind every solid there is a surface like any other, only at no distance.
        return np.full(flat, np.inf, np.float32), np.full(flat, first_code)
    u = (np.arange(rays.width)[:, None] + 0.5 + offsets[:, 0]).astype(np.float32)
    v = (np.arange(rays.height)[:, None] + 0.5 + offsets[:, 1]).astype(np.float32)
    steps = np.stack([rays.right, rays.down, rays.corner]).astype(np.float32)
    right, down, corner = steps[:, :, :, None, None, None]
    d = [right[:, j] * u + (down[:, j] * v[:, None] + corner[:, j]) for j in range(3)]
    if surround.kind == "room":
        depth, side = _inside_box(surround, rays.origin, d)
    else:
        depth, side = _under_dome(surround, rays.origin, d)
    surface = np.broadcast_to(first_code + side, shape)
    return np.ascontiguousarray(depth, np.float32).reshape(flat), surface.reshape(flat)


def _inside_box(surround: Surround, origin: np.ndarray, d) -> tuple[np.ndarray, np.ndarray]:
    depth = np.full(d[0].shape, np.inf, np.float32)
    side = np.zeros(d[0].shape, np.int64)
    for axis in range(3):
        to_low = (surround.low[axis] - origin[:, axis]).astype(np.float32)[:, None, None, None]
        to_high = (surround.high[axis] - origin[:, axis]).astype(np.float32)[:, None, None, None]
        upper = d[axis] > 0
        with np.errstate(divide="ignore"):
            # Never negative from inside; the sign of a zero direction must not decide.
            reach = np.abs(np.where(upper, to_high, to_low) / d[axis])
        side = np.where(reach < depth, 2 * axis + upper, side)
        depth = np.minimum(depth, reach)
    return depth, side


def _under_dome(surround: Surround, origin: np.ndarray, d) -> tuple[np.ndarray, np.ndarray]:
    middle = (surround.low + surround.high) / 2
    radius = (surround.high[2] - surround.low[2]) / 2
    o = ((origin - middle) / radius).astype(np.float32)[:, :, None, None, None]
    a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    b = o[:, 0] * d[0] + o[:, 1] * d[1] + o[:, 2] * d[2]
    c = (o * o).sum(axis=1) - 1
    # A lamp may stand above a low dome; its rays that pass by end where they come nearest to it.
    dome = np.float32(radius) * (np.sqrt(np.maximum(b * b - a * c, 0)) - b) / a
    height = origin[:, 2].astype(np.float32)[:, None, None, None]
    with np.errstate(divide="ignore"):
        ground = np.where(d[2] < 0, -height / d[2], np.inf)
    return np.minimum(dome, ground), np.where(ground < dome, GROUND, DOME)
