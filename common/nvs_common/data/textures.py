"""A fixed atlas of tileable textures and filtered look-ups in it.

The atlas is generated once a process, always from the same seed: fractal noise, bricks, planks,
print, facades, dead leaves and so on, with values in [0, 1] of a gamma-2 signal. Materials bend
their colours, so that a few dozen textures look like thousands. Every texel is stored with its
right, lower and lower-right neighbours in 16 bytes: a bilinear look-up is one gather.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

SIZE = 256
LEVELS = 9
# How a material may colour a texture: patterns take any two colours, pictures keep their own.
PATTERN, PICTURE = 0, 1


@dataclasses.dataclass(frozen=True)
class Atlas:
    """Tileable textures with their mip levels.

    Attributes:
      texels: [t * (4^9 - 1) / 3, 4] uint32; a texel's four neighbours, each 8-bit r, g, b.
      level_start: [9] where a mip level begins inside a texture.
      stride: texels a texture occupies.
      names: [t] what each texture is.
      style: [t] PATTERN or PICTURE.
    """

    texels: np.ndarray
    level_start: np.ndarray
    stride: int
    names: tuple[str, ...]
    style: np.ndarray

    def find(self, *names: str) -> np.ndarray:
        """Indices of the textures with one of these names."""
        return np.array([i for i, name in enumerate(self.names) if name in names])


@functools.cache
def atlas() -> Atlas:
    """The atlas; generated at the first call in a process (about a second)."""
    rng = np.random.default_rng(20240607)
    levels = [SIZE >> level for level in range(LEVELS)]
    sizes = np.array([n * n for n in levels])
    texels, names, style = [], [], []
    for name, (make, count, kind) in _MAKERS.items():
        for _ in range(count):
            names.append(name)
            style.append(kind)
            texels.append(_pack(np.clip(make(rng), 0, 1)))
    start = np.cumsum(sizes) - sizes
    return Atlas(np.concatenate(texels), start, int(sizes.sum()), tuple(names), np.array(style))


def lookup(texture: np.ndarray, uv: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Trilinear look-up, wrapping around.

    Args:
      texture: [n] rows of the atlas.
      uv: [2, n] in tiles (1 is one repetition), float32.
      level: [n] mip level: log2 of the texels that a pixel covers; clamped to the atlas.

    Returns:
      [n, 3] float32 in [0, 1].
    """
    level = np.clip(level, 0, LEVELS - 1.001)
    low = level.astype(np.int64)
    part = (level - low).astype(np.float32)[:, None]
    fine = _bilinear(texture, uv, low)
    fine += part * (_bilinear(texture, uv, low + 1) - fine)
    return fine


def _bilinear(texture: np.ndarray, uv: np.ndarray, level: np.ndarray) -> np.ndarray:
    source = atlas()
    size = (SIZE >> level).astype(np.int64)
    xy = uv * size - np.float32(0.5)
    floor = np.floor(xy)
    part = xy - floor
    cell = floor.astype(np.int64) & (size - 1)
    index = texture * source.stride + source.level_start[level] + cell[1] * size + cell[0]
    four = source.texels[index].view(np.uint8).reshape(-1, 4, 4)[:, :, :3].astype(np.float32)
    right, down = (part * np.float32(1 / 255)), part
    weight = np.empty((len(texture), 4, 1), np.float32)
    weight[:, 1, 0] = right[0] * (1 - down[1])
    weight[:, 0, 0] = np.float32(1 / 255) * (1 - down[1]) - weight[:, 1, 0]
    weight[:, 3, 0] = right[0] * down[1]
    weight[:, 2, 0] = np.float32(1 / 255) * down[1] - weight[:, 3, 0]
    four *= weight
    return (four[:, 0] + four[:, 1]) + (four[:, 2] + four[:, 3])


def _pack(image: np.ndarray) -> np.ndarray:
    """All mip levels of an image [256, 256, 3], [*, 4] uint32."""
    packed = []
    # Averaged as light, that is squared, and stored as roots.
    linear = image.astype(np.float32) ** 2
    for level in range(LEVELS):
        if level:
            n = SIZE >> level
            linear = linear.reshape(n, 2, n, 2, 3).mean(axis=(1, 3))
        bytes_ = np.zeros((*linear.shape[:2], 4), np.uint8)
        bytes_[..., :3] = np.rint(np.sqrt(linear) * 255)
        right = np.roll(bytes_, -1, axis=1)
        four = np.stack([bytes_, right, np.roll(bytes_, -1, 0), np.roll(right, -1, 0)], axis=2)
        packed.append(np.ascontiguousarray(four).view(np.uint32).reshape(-1, 4))
    return np.concatenate(packed)


# Each maker takes a generator and returns [256, 256, 3]. Patterns hold the main pattern in
# channel 0, a finer companion in 1 and a broad mask in 2.


def _noise(rng, slope: float = 1.0, stretch=(1.0, 1.0)) -> np.ndarray:
    """Tileable noise [256, 256] with amplitude spectrum f^-slope, mean 0.5, mostly in [0, 1]."""
    fy = np.fft.fftfreq(SIZE)[:, None] * SIZE * stretch[1]
    fx = np.fft.rfftfreq(SIZE)[None] * SIZE * stretch[0]
    radius = np.maximum(np.hypot(fx, fy), 1.0)
    spectrum = np.fft.rfft2(rng.standard_normal((SIZE, SIZE))) * radius**-slope
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, s=(SIZE, SIZE))
    return 0.5 + 0.21 * field / field.std()


def _grid() -> tuple[np.ndarray, np.ndarray]:
    x = (np.arange(SIZE) + 0.5) / SIZE
    return np.meshgrid(x, x)


def _window(center, reach: float):
    """A wrapped square about a point in [0, 1)^2: its index, and offsets [m, m] from the point."""
    half = min(int(np.ceil(reach * SIZE)), SIZE // 2 - 1)
    steps = np.arange(-half, half + 1)
    column, row = (int(c * SIZE) for c in center)
    dx = ((column + steps + 0.5) / SIZE - center[0])[None]
    dy = ((row + steps + 0.5) / SIZE - center[1])[:, None]
    index = np.ix_((row + steps) % SIZE, (column + steps) % SIZE)
    return index, *np.broadcast_arrays(dx, dy)


def _warped(rng, image: np.ndarray, amount: float) -> np.ndarray:
    """An image moved about by smooth noise; amount in texels."""
    rows, columns = np.indices((SIZE, SIZE))
    dx, dy = (amount * (_noise(rng, 2.0) - 0.5) for _ in range(2))
    return image[(rows + dy.astype(int)) % SIZE, (columns + dx.astype(int)) % SIZE]


def _pattern(rng, main: np.ndarray, grain: float = 0.15) -> np.ndarray:
    fine = _noise(rng, 0.7)
    main = main + grain * (fine - 0.5)
    return np.stack([main, fine, _noise(rng, 1.6)], axis=-1)


def _fractal(rng):
    return _pattern(rng, _noise(rng, rng.uniform(0.9, 1.6)), 0)


def _plain(rng):
    return _pattern(rng, 0.5 + 0.12 * (_noise(rng, 1.2) - 0.5), 0.06)


def _marble(rng):
    x, y = _grid()
    turns = rng.integers(1, 4, 2)
    wave = np.sin(2 * np.pi * (turns[0] * x + turns[1] * y) + 9 * (_noise(rng, 1.6) - 0.5))
    return _pattern(rng, np.abs(wave) ** rng.uniform(0.3, 0.8), 0.2)


def _wood(rng):
    stretch = (1.0, 14.0)
    rings = _noise(rng, 1.1, stretch) + 0.4 * (_noise(rng, 0.6, (1.0, 30.0)) - 0.5)
    planks = int(rng.choice([1, 4, 6, 8]))
    if planks > 1:
        board = np.arange(SIZE) * planks // SIZE
        tone = rng.normal(0, 0.16, planks)[board]
        rings = np.take_along_axis(
            rings, (np.arange(SIZE)[None] + rng.integers(0, SIZE, planks)[board][:, None]) % SIZE, 1
        )
        gap = (np.arange(SIZE) * planks % SIZE) < 3 * planks
        rings = (rings + tone[:, None]) * np.where(gap, 0.35, 1.0)[:, None]
    return _pattern(rng, rings, 0.1)


def _brick(rng):
    rows = int(rng.choice([4, 8, 16]))
    columns = rows // 2 if rng.random() < 0.7 else rows
    x, y = _grid()
    row = np.floor(y * rows).astype(int)
    shifted = (x * columns + 0.5 * (row % 2) * (rng.random() < 0.8)) % columns
    column = np.floor(shifted).astype(int)
    tone = np.clip(rng.normal(0.6, 0.18, (rows, columns)), 0.1, 1)[row, column]
    edge = np.minimum.reduce(
        [shifted % 1, 1 - shifted % 1, (y * rows % 1) * columns / rows, (1 - y * rows % 1)]
    )
    mortar = edge < rng.uniform(0.03, 0.08)
    return _pattern(rng, np.where(mortar, rng.uniform(0, 0.3), tone), 0.35)


def _checks(rng):
    n = int(rng.choice([2, 4, 8, 16]))
    x, y = _grid()
    board = (np.floor(x * n) + np.floor(y * n)) % 2
    return _pattern(rng, 0.1 + 0.8 * board, 0.15)


def _stripes(rng):
    n = int(rng.integers(3, 20))
    x, y = _grid()
    phase = x * n + (y * rng.integers(0, 3) if rng.random() < 0.4 else 0)
    edges = np.sort(rng.random(4))
    tone = rng.random(5)[np.searchsorted(edges, (phase % 1).ravel())].reshape(x.shape)
    return _pattern(rng, tone, 0.12)


def _dots(rng):
    n = int(rng.choice([4, 8, 12]))
    x, y = _grid()
    radius = np.hypot((x * n) % 1 - 0.5, (y * n) % 1 - 0.5)
    dot = np.clip((rng.uniform(0.2, 0.42) - radius) * SIZE / n, 0, 1)
    return _pattern(rng, 0.1 + 0.8 * dot, 0.12)


def _cells(rng):
    """Stones, gravel, tiles: the cells around scattered points."""
    count = int(rng.choice([40, 150, 500]))
    # One in each square of a grid, anywhere in it: scattered without holes.
    side = int(np.sqrt(count))
    corner = np.stack(np.divmod(np.arange(side * side), side), axis=-1)
    points = (corner + rng.random((side * side, 2))) / side
    count, x = side * side, _grid()[0]
    nearest = np.full(x.shape, 9.0)
    second, owner = nearest.copy(), np.zeros(x.shape, int)
    for index, point in enumerate(points):
        # No cell reaches farther than a few mean spacings from its point.
        window, dx, dy = _window(point, 3.5 / np.sqrt(count))
        distance, best = np.hypot(dx, dy), nearest[window]
        closer = distance < best
        second[window] = np.where(closer, best, np.minimum(second[window], distance))
        owner[window] = np.where(closer, index, owner[window])
        nearest[window] = np.minimum(distance, best)
    gap = (second - nearest) * np.sqrt(count)
    tone = np.clip(rng.normal(0.55, 0.2, count), 0, 1)[owner]
    return _pattern(rng, tone * np.clip(0.25 + 3 * gap, 0, 1), 0.25)


def _cloth(rng):
    n = int(rng.choice([32, 48, 64]))
    x, y = _grid()
    weave = np.where((np.floor(x * n) + np.floor(y * n)) % 2 > 0, np.sin(np.pi * x * n) ** 2, 0.4)
    return _pattern(rng, 0.25 + 0.4 * weave + 0.5 * (_noise(rng, 1.4) - 0.5), 0.1)


def _print(rng):
    """Lines of glyphs: random 5 x 3 bitmaps on paper, with blank words and headings."""
    page = np.zeros((SIZE, SIZE))
    top = int(rng.integers(4, 14))
    while top < SIZE - 8:
        scale = int(rng.choice([1, 1, 1, 2, 2, 4]))
        left = int(rng.integers(6, 20))
        end = SIZE - int(rng.integers(6, 120))
        while left < end - 4 * scale and top + 5 * scale < SIZE:
            if rng.random() < 0.85:
                glyph = np.kron(rng.random((5, 3)) < 0.6, np.ones((scale, scale)))
                page[top : top + 5 * scale, left : left + 3 * scale] = glyph
            left += 4 * scale
        top += 5 * scale + int(rng.integers(2, 5 + 2 * scale))
    return _pattern(rng, page if rng.random() < 0.4 else 1 - page, 0.06)


def _facade(rng):
    """Windows with frames and reflections in a wall."""
    n = int(rng.choice([2, 3, 4]))
    x, y = _grid()
    cx, cy = x * n % 1 - 0.5, y * n % 1 - 0.5
    wide, tall = rng.uniform(0.16, 0.34), rng.uniform(0.24, 0.38)
    inside = np.maximum(np.abs(cx) / wide, np.abs(cy) / tall)
    bars = (np.abs(cx) < 0.015) | (np.abs(cy + 0.1) < 0.015)
    pane = (rng.random((n, n)) * 0.4)[(y * n).astype(int), (x * n).astype(int)] - 0.2 * cy
    wall = 0.7 + 0.25 * (_noise(rng, 0.8) - 0.5)
    main = np.where(inside < 1, np.where(bars, 0.95, pane), np.where(inside < 1.18, 0.98, wall))
    return _pattern(rng, main, 0.08)


def _colors(rng, count: int) -> np.ndarray:
    """Colours as photographs have them: mostly grey-brown, some strong, [count, 3]."""
    value = rng.beta(1.6, 1.8, count)[:, None]
    hue = rng.random(count)[:, None] + np.array([0, 1 / 3, 2 / 3])
    chroma = rng.beta(0.8, 2.2, count)[:, None]
    warm = np.array([1.08, 1.0, 0.88])
    return np.clip(value * warm * (1 - chroma * (0.5 + 0.5 * np.cos(2 * np.pi * hue))), 0, 1)


def _leaves(rng):
    """Dead leaves: opaque shapes of all sizes on top of one another, as in natural images."""
    image = np.repeat(np.repeat(_colors(rng, 1), SIZE, 0)[None], SIZE, 0)
    count = 400
    # Radii with a density of r^-3: as many small ones in a small area as large ones in a large.
    size = np.sort((0.012**-2 + rng.random(count) * (0.25**-2 - 0.012**-2)) ** -0.5)[::-1]
    colors = _colors(rng, count)
    boxy = rng.random() < 0.5
    for index in range(count):
        window, dx, dy = _window(rng.random(2), 2.2 * size[index])
        angle = rng.uniform(0, np.pi) * (0.2 if boxy else 1)
        u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        u, v = u / size[index], v / size[index] / rng.uniform(0.4, 1.5)
        inside = (np.maximum(np.abs(u), np.abs(v)) if boxy else np.hypot(u, v)) < 1
        ramp = 1 + 0.25 * np.clip(u, -1, 1)[..., None]
        image[window] = np.where(inside[..., None], colors[index] * ramp, image[window])
    return image * (0.8 + 0.4 * _noise(rng, 0.9)[..., None])


def _spines(rng):
    """Rows of books or goods on a shelf."""
    image = np.full((SIZE, SIZE, 3), 0.16)
    rows = int(rng.choice([1, 2, 3]))
    for row in range(rows):
        top, bottom = row * SIZE // rows, (row + 1) * SIZE // rows
        left = 0
        while left < SIZE:
            width = int(rng.integers(5, 24))
            tall = int((bottom - top) * rng.uniform(0.6, 0.97))
            block = image[bottom - tall : bottom - 3, left : left + width]
            block[:] = _colors(rng, 1)[0]
            band = int(rng.integers(0, max(tall - 12, 1)))
            block[band : band + int(rng.integers(3, 12))] = _colors(rng, 1)[0]
            block[:, :1] *= 0.4
            left += width
    return image * (0.85 + 0.3 * _noise(rng, 0.8)[..., None])


def _picture(rng):
    """A photograph-like mixture: coloured fractal noise under dead leaves and print."""
    a, b, c = _colors(rng, 3)
    mask = _warped(rng, _noise(rng, 1.8), 30)[..., None]
    image = a + (b - a) * mask + (c - a) * (_noise(rng, 1.3)[..., None] - 0.5)
    cover = _warped(rng, _noise(rng, 2.2), 40)[..., None] > 0.55
    image = np.where(cover, _leaves(rng), image)
    if rng.random() < 0.5:
        image = np.where((_print(rng)[..., :1] < 0.3) & (mask > 0.6), _colors(rng, 1)[0], image)
    return image


def _foliage(rng):
    """Many small leaves in related greens and browns, dark between them."""
    grain = _warped(rng, _noise(rng, 0.9), 12)
    return _pattern(rng, np.clip((grain - 0.35) * 1.9, 0, 1) ** 1.4, 0.2)


_MAKERS = {
    "fractal": (_fractal, 4, PATTERN),
    "plain": (_plain, 2, PATTERN),
    "marble": (_marble, 3, PATTERN),
    "wood": (_wood, 4, PATTERN),
    "brick": (_brick, 4, PATTERN),
    "checks": (_checks, 2, PATTERN),
    "stripes": (_stripes, 4, PATTERN),
    "dots": (_dots, 2, PATTERN),
    "cells": (_cells, 3, PATTERN),
    "cloth": (_cloth, 2, PATTERN),
    "print": (_print, 3, PATTERN),
    "facade": (_facade, 4, PATTERN),
    "foliage": (_foliage, 2, PATTERN),
    "leaves": (_leaves, 5, PICTURE),
    "spines": (_spines, 3, PICTURE),
    "picture": (_picture, 5, PICTURE),
}
