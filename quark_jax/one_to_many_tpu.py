"""One-to-many attention on a TPU: Pallas kernels that gather what they attend to (Eq. 5-8).

A tile of a layer stays on the chip while the views go by: each view's update features are sampled
at the elements' projections (`lane_gather`), multiplied with the folded queries and taken into a
running softmax. Delta [v, n, l, y, x, c] is never written to memory, not even a layer of it.
Channels are planes and elements lie along rows and lanes, so that 32 channels do not leave three
quarters of 128 lanes empty, as they do in arrays that end in channels.

The backward pass walks the same way: it samples each view again, with its slopes along x and y,
knows the weights from the softmax's sums that the forward pass kept, and adds what reaches the
samples to the features' gradient in memory (`lane_scatter`). Neither Delta nor its gradient is
ever written. Both passes are exact to float32; the order of the sums is that of the grid.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nvs_common.types import Array
from quark_jax import lane_gather, lane_scatter, one_to_many

# Rows and columns of a tile of a layer, and of the window of a view that is on the chip.
TILE = (16, 256)
WINDOW = (32, 384)
_VMEM = 48 * 2**20


class _Saved(NamedTuple):
    """What the backward pass takes from the forward pass."""

    query: Array  # [n, l, y, x, a, c]
    features: Array  # [v, n, y, x, c]
    uv: Array  # [v, n, l, y, x, 2]
    takes_part: Array  # [v, n, l, y, x]
    mixed: Array  # [n, l, y, x, a, c] the result
    log_total: Array  # [n, a, l, rows, columns] see `_Tiles`


class _Tiles(NamedTuple):
    """How elements [l, y, x] of one map are divided; what is beyond them looks at nothing."""

    layers: int
    size: tuple[int, int]
    tile: tuple[int, int]
    padded: tuple[int, int]  # rows and columns of all tiles
    views: int

    def pad(self, planes: Array, value: float = 0.0) -> Array:
        edges = [(0, up - side) for up, side in zip(self.padded, self.size, strict=True)]
        return jnp.pad(planes, [(0, 0)] * (planes.ndim - 2) + edges, constant_values=value)

    def planes(self, elements: Array) -> Array:
        """[l, y, x, a, c] as [a, c, l, rows, columns]."""
        return self.pad(jnp.moveaxis(elements, (3, 4), (0, 1)))

    def elements(self, planes: Array) -> Array:
        """The other way."""
        y, x = self.size
        return jnp.moveaxis(planes[..., :y, :x], (0, 1), (3, 4))

    @property
    def grid(self) -> tuple[int, int, int, int]:
        rows, columns = (up // side for up, side in zip(self.padded, self.tile, strict=True))
        return self.layers, rows, columns, self.views

    @property
    def looks(self) -> int:
        """Elements times views."""
        return math.prod(self.padded) * self.layers * self.views

    def of_element(self, *lead: int) -> pl.BlockSpec:
        """Blocks of planes [*lead, l, rows, columns]."""
        zeros = (0,) * len(lead)
        return pl.BlockSpec((*lead, None, *self.tile), lambda l, i, j, v: (*zeros, l, i, j))

    def of_view(self) -> pl.BlockSpec:
        """Blocks of planes [v, l, rows, columns]."""
        return pl.BlockSpec((None, None, *self.tile), lambda l, i, j, v: (v, l, i, j))


class _Scratch(NamedTuple):
    """A softmax over the views so far; planes have the size of the tile."""

    highest: Any  # [a]
    total: Any  # [a]
    gather: lane_gather.Scratch


def attend(
    query: Array,
    delta: one_to_many.Unstored,
    valid: Array,
    scale: float,
    *,
    interpret: Any = False,
) -> Array:
    """`one_to_many.attend_unstored` in one kernel, and its gradients in another.

    Raises:
      NotImplementedError: other types than float32.
    """
    if query.dtype != jnp.float32 or delta.features.dtype != jnp.float32:
        raise NotImplementedError(
            f"one-to-many attention on a TPU: for float32, not {query.dtype} and "
            f"{delta.features.dtype}"
        )
    options: dict[str, Any] = dict(scale=scale, interpret=interpret)
    attend_maps = _over_maps(functools.partial(_attend, **options))
    differentiate_maps = _over_maps(functools.partial(_differentiate, **options))

    @jax.custom_vjp
    def fused(query: Array, features: Array, uv: Array, valid: Array) -> Array:
        return forward(query, features, uv, valid)[0]

    def forward(query: Array, features: Array, uv: Array, valid: Array) -> tuple[Array, _Saved]:
        takes_part = one_to_many.masked(valid)
        mixed, log_total = attend_maps((query,), (features, uv, takes_part))
        return mixed, _Saved(query, features, uv, takes_part, mixed, log_total)

    def backward(saved: _Saved, cotangent: Array) -> tuple[Any, ...]:
        of_maps = (saved.query, cotangent, saved.mixed, saved.log_total)
        of_views = (saved.features, saved.uv, saved.takes_part)
        to_query, to_features, to_uv = differentiate_maps(of_maps, of_views)
        return to_query, jnp.moveaxis(to_features, 0, 1), jnp.moveaxis(to_uv, 0, 1), None

    fused.defvjp(forward, backward)
    return fused(query, *delta, valid)


def _over_maps(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls function for one map after the other, of arrays [n, ...] and arrays [v, n, ...].

    Kernels address memory by themselves and know of no batch, nor does `jax.vmap` make one.
    """

    @jax.custom_batching.sequential_vmap
    def run(of_maps: tuple[Array, ...], of_views: tuple[Array, ...]) -> Any:
        maps_first = tuple(jnp.moveaxis(x, 1, 0) for x in of_views)
        return jax.lax.map(lambda xs: function(*xs), (*of_maps, *maps_first))

    return run


def _tiles(query: Array, views: int) -> _Tiles:
    """Of queries [l, y, x, a, c]."""
    layers, *size = query.shape[:3]
    units = (lane_gather.ROWS, lane_gather.LANES)
    rows, columns = (
        min(most, side + -side % unit) for most, side, unit in zip(TILE, size, units, strict=True)
    )
    y, x = size
    return _Tiles(layers, (y, x), (rows, columns), (y + -y % rows, x + -x % columns), views)


def _looks(
    tiles: _Tiles, sources: lane_gather.Views, uv: Array, takes_part: Array
) -> tuple[Array, Array, Array]:
    """Planes [v, l, rows, columns]: columns and rows in the views, and who takes part."""
    x, y = uv[..., 0] * sources.width - 0.5, uv[..., 1] * sources.height - 0.5
    nowhere = lane_gather.NOWHERE
    return tiles.pad(x, nowhere), tiles.pad(y, nowhere), tiles.pad(takes_part.astype(jnp.float32))


def _attend(
    query: Array, features: Array, uv: Array, takes_part: Array, *, scale: float, interpret: Any
) -> tuple[Array, Array]:
    """Of one map: query [l, y, x, a, c], features [v, y, x, c], uv [v, l, y, x, 2].

    Returns:
      [l, y, x, a, c], and the logarithm of the softmax's sums [a, l, rows, columns].
    """
    heads, channels = query.shape[3:]
    tiles, sources = _tiles(query, len(features)), lane_gather.views(features)
    planes = tiles.planes(query) * scale
    vmem = lambda *lead: pltpu.VMEM((*lead, *tiles.tile), jnp.float32)  # noqa: E731
    gather = lane_gather.scratch_shapes(tiles.tile, sources, WINDOW)
    cost = lane_gather.cost(tiles.looks // tiles.views, sources, tiles.tile, WINDOW)
    sums = jax.ShapeDtypeStruct((heads, *planes.shape[2:]), jnp.float32)
    mixed, log_total = pl.pallas_call(
        functools.partial(_kernel, sources),
        grid=tiles.grid,
        in_specs=[
            tiles.of_element(heads, channels),
            *[tiles.of_view()] * 3,
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[tiles.of_element(heads, channels), tiles.of_element(heads)],
        out_shape=[jax.ShapeDtypeStruct(planes.shape, jnp.float32), sums],
        scratch_shapes=[_Scratch(vmem(heads), vmem(heads), gather)],
        cost_estimate=pl.CostEstimate(
            flops=cost.flops + 5 * tiles.looks * heads * channels,
            bytes_accessed=cost.bytes_accessed
            + 4 * (2 * planes.size + sums.size + 3 * tiles.looks),
            transcendentals=2 * tiles.looks * heads,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM,
        ),
        interpret=interpret,
        name="one_to_many",
    )(planes, *_looks(tiles, sources, uv, takes_part), sources.planes)
    return tiles.elements(mixed), log_total


def _kernel(
    sources: lane_gather.Views,
    query_ref,
    x_ref,
    y_ref,
    takes_part_ref,
    features_ref,
    mixed_ref,
    log_total_ref,
    scratch: _Scratch,
):
    """Takes one view into the softmax of one tile; the result is kept where it will be written."""
    view, gather = pl.program_id(3), scratch.gather
    heads, channels = query_ref.shape[:2]

    @pl.when(view == 0)
    def _():
        scratch.highest[...] = jnp.full_like(scratch.highest, -jnp.inf)
        scratch.total[...] = jnp.zeros_like(scratch.total)
        mixed_ref[...] = jnp.zeros_like(mixed_ref)

    gather.x[...], gather.y[...] = x_ref[...], y_ref[...]
    lane_gather.sample(sources._replace(planes=features_ref), view, gather)
    last = view == pl.num_programs(3) - 1
    for head in range(heads):

        def multiply(c: Array, logit: Array, head: int = head) -> Array:
            return logit + query_ref[head, c] * gather.sample[c]

        logit = jax.lax.fori_loop(0, channels, multiply, jnp.zeros(x_ref.shape, jnp.float32))
        logit = jnp.where(takes_part_ref[...] > 0, logit, one_to_many.LEFT_OUT)
        highest = jnp.maximum(scratch.highest[head], logit)
        shrink = jnp.exp(scratch.highest[head] - highest)
        power = jnp.exp(logit - highest)
        total = scratch.total[head] * shrink + power
        scratch.highest[head], scratch.total[head] = highest, total
        # The last view also divides by the sum of all.
        divided = jnp.where(last, 1 / total, jnp.ones_like(total))
        old, new = shrink * divided, power * divided

        def mix(c: Array, _: None, head: int = head, old=old, new=new) -> None:
            mixed_ref[head, c] = mixed_ref[head, c] * old + gather.sample[c] * new

        jax.lax.fori_loop(0, channels, mix, None)

    @pl.when(last)
    def _():
        log_total_ref[...] = scratch.highest[...] + jnp.log(scratch.total[...])


def _differentiate(
    query: Array,
    cotangent: Array,
    mixed: Array,
    log_total: Array,
    features: Array,
    uv: Array,
    takes_part: Array,
    *,
    scale: float,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """Of one map, as in `_attend`: gradients of query, features and uv."""
    heads, channels = query.shape[3:]
    tiles, sources = _tiles(query, len(features)), lane_gather.views(features)
    planes, gradients = tiles.planes(query) * scale, tiles.planes(cotangent)
    # The weighted mean of what the views' features are multiplied with, over the views.
    mean = tiles.planes(jnp.sum(cotangent * mixed, axis=-1, keepdims=True))[:, 0]
    nothing, whole = lane_scatter.nothing(sources), pl.BlockSpec(memory_space=pl.ANY)
    like = lambda *arrays: [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]  # noqa: E731
    of_heads, looks = tiles.of_element(heads), _looks(tiles, sources, uv, takes_part)
    inputs = (planes, gradients, log_total, mean, *looks, sources.planes, nothing)
    to_query, to_x, to_y, to_features = pl.pallas_call(
        functools.partial(_backward_kernel, sources),
        grid=tiles.grid,
        in_specs=[
            *[tiles.of_element(heads, channels)] * 2,
            *[of_heads] * 2,
            *[tiles.of_view()] * 3,
            *[whole] * 2,
        ],
        out_specs=[tiles.of_element(heads, channels), tiles.of_view(), tiles.of_view(), whole],
        out_shape=like(planes, *looks[:2], nothing),
        # The features' gradient begins as zeros and is added to in place.
        input_output_aliases={len(inputs) - 1: 3},
        scratch_shapes=[
            lane_gather.scratch_shapes(tiles.tile, sources, WINDOW, slopes=True),
            lane_scatter.scratch_shapes(tiles.tile, sources, WINDOW),
        ],
        cost_estimate=_backward_cost(tiles, sources, heads),
        # Tiles add to the same pixels: one after the other.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 4, vmem_limit_bytes=_VMEM
        ),
        interpret=interpret,
        name="one_to_many_backward",
    )(*inputs)
    y, x = tiles.size
    to_uv = jnp.stack([to_x * sources.width, to_y * sources.height], axis=-1)[..., :y, :x, :]
    return tiles.elements(to_query) * scale, lane_scatter.images(to_features, sources), to_uv


def _backward_cost(tiles: _Tiles, sources: lane_gather.Views, heads: int) -> pl.CostEstimate:
    elements, channels = tiles.looks // tiles.views, sources.planes.shape[1]
    gather = lane_gather.cost(elements, sources, tiles.tile, WINDOW)
    scatter = lane_scatter.cost(elements, sources, tiles.tile, WINDOW)
    planes = elements * heads * (3 * channels + 2) + 5 * tiles.looks
    return pl.CostEstimate(
        # With its two slopes a sample costs three times as much.
        flops=3 * gather.flops + scatter.flops + tiles.looks * channels * (10 * heads + 4),
        bytes_accessed=gather.bytes_accessed + scatter.bytes_accessed + 4 * planes,
        transcendentals=tiles.looks * heads,
    )


def _backward_kernel(
    sources: lane_gather.Views,
    query_ref,
    gradient_ref,
    log_total_ref,
    mean_ref,
    x_ref,
    y_ref,
    takes_part_ref,
    features_ref,
    nothing_ref,
    to_query_ref,
    to_x_ref,
    to_y_ref,
    to_features_ref,
    gather: lane_gather.Scratch,
    scatter: lane_scatter.Scratch,
):
    """Gradients of one tile and view; the queries' are summed where they will be written."""
    del nothing_ref  # the features' gradient, which is in its place
    view = pl.program_id(3)
    heads, channels = query_ref.shape[:2]
    zeros = jnp.zeros(x_ref.shape, jnp.float32)

    @pl.when(view == 0)
    def _():
        to_query_ref[...] = jnp.zeros_like(to_query_ref)

    gather.x[...], gather.y[...] = x_ref[...], y_ref[...]
    lane_gather.sample(sources._replace(planes=features_ref), view, gather)
    scatter.values[...] = jnp.zeros_like(scatter.values)
    for head in range(heads):

        def multiply(c: Array, sums: tuple[Array, Array], head: int = head) -> tuple[Array, Array]:
            sample = gather.sample[c]
            return sums[0] + query_ref[head, c] * sample, sums[1] + gradient_ref[head, c] * sample

        logit, seen = jax.lax.fori_loop(0, channels, multiply, (zeros, zeros))
        logit = jnp.where(takes_part_ref[...] > 0, logit, one_to_many.LEFT_OUT)
        weight = jnp.exp(logit - log_total_ref[head])
        slope = weight * (seen - mean_ref[head])

        def spread(c: Array, _: None, head: int = head, weight=weight, slope=slope) -> None:
            to_query_ref[head, c] += slope * gather.sample[c]
            scatter.values[c] += slope * query_ref[head, c] + weight * gradient_ref[head, c]

        jax.lax.fori_loop(0, channels, spread, None)

    def move(c: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        value = scatter.values[c]
        return sums[0] + value * gather.slopes[0, c], sums[1] + value * gather.slopes[1, c]

    to_x_ref[...], to_y_ref[...] = jax.lax.fori_loop(0, channels, move, (zeros, zeros))
    lane_scatter.add(to_features_ref, sources, view, (gather.x, gather.y), scatter)
