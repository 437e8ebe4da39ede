"""Gradients of one-to-many attention on a TPU: the backward pass of `one_to_many_tpu`.

A tile of a layer stays on the chip while the views go by, as in the forward pass. Each is sampled
again (`lane_gather`), with its slopes along x and y for the gradient of the positions. With the
sums of the softmax at hand, no view has to know of another: the queries' gradient is summed over
them, and the samples' goes on to the features' gradient in memory (`lane_scatter`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nvs_common.types import Array
from quark_jax import lane_gather, lane_scatter, one_to_many
from quark_jax.layer_tiles import Tiles


class Elements(NamedTuple):
    """What is given for each element; planes [l, rows, columns].

    Attributes:
      query: [a, c] planes, scaled.
      gradient: [a, c] planes of the result.
      log_total: [a] planes, logarithms of the softmax's sums.
      mean: [a] planes of the products of gradient and result.
    """

    query: Any
    gradient: Any
    log_total: Any
    mean: Any


class _Looks(NamedTuple):
    """Columns and rows in a view, and who takes part: planes."""

    x: Any
    y: Any
    takes_part: Any


class _Results(NamedTuple):
    """Gradients: planes of the queries and the positions, and what is in memory."""

    query: Any
    x: Any
    y: Any
    features: Any


def differentiate(
    tiles: Tiles,
    sources: lane_gather.Views,
    given: Elements,
    looks: tuple[Array, Array, Array],
    *,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """Gradients of one map: of the scaled queries [l, y, x, a, c], of the views' features
    [v, y, x, c] and of uv [v, l, y, x, 2]."""
    heads, channels = given.query.shape[:2]
    nothing, whole = lane_scatter.nothing(sources), pl.BlockSpec(memory_space=pl.ANY)
    inputs = (*given, *looks, sources.planes, nothing)
    of_vectors, of_heads = tiles.of_element(heads, channels), tiles.of_element(heads)
    of_view = tiles.of_view()
    results = _Results(given.query, *looks[:2], nothing)
    window = (tiles.tile, sources, tiles.window)
    to = pl.pallas_call(
        functools.partial(_kernel, sources),
        grid=tiles.grid,
        in_specs=[of_vectors, of_vectors, of_heads, of_heads, *[of_view] * 3, whole, whole],
        out_specs=_Results(of_vectors, of_view, of_view, whole),
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), results),
        # The features' gradient begins as zeros and is added to in place.
        input_output_aliases={len(inputs) - 1: len(results) - 1},
        scratch_shapes=[
            lane_gather.scratch_shapes(*window, slopes=True),
            lane_scatter.scratch_shapes(*window),
        ],
        cost_estimate=_cost(tiles, sources, heads),
        # Tiles add to the same pixels: one after the other.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 4, vmem_limit_bytes=48 * 2**20
        ),
        interpret=interpret,
        name="one_to_many_backward",
    )(*inputs)
    y, x = tiles.size
    to_uv = jnp.stack([to.x * sources.width, to.y * sources.height], axis=-1)[..., :y, :x, :]
    return tiles.vectors(to.query), lane_scatter.images(to.features, sources), to_uv


def _cost(tiles: Tiles, sources: lane_gather.Views, heads: int) -> pl.CostEstimate:
    channels, looks = sources.planes.shape[1], tiles.elements * tiles.views
    window = (tiles.elements, sources, tiles.tile, tiles.window)
    gather, scatter = lane_gather.cost(*window), lane_scatter.cost(*window)
    planes = tiles.elements * heads * (3 * channels + 2) + 5 * looks
    return pl.CostEstimate(
        # With its two slopes a sample costs three times as much.
        flops=3 * gather.flops + scatter.flops + looks * channels * (10 * heads + 4),
        bytes_accessed=gather.bytes_accessed + scatter.bytes_accessed + 4 * planes,
        transcendentals=looks * heads,
    )


def _kernel(sources: lane_gather.Views, *refs: Any):
    """Gradients of one tile and view; the queries' are summed where they will be written."""
    given, looks, (features_ref, _), to = (
        Elements(*refs[:4]),
        _Looks(*refs[4:7]),
        refs[7:9],
        _Results(*refs[9:13]),
    )
    gather, scatter = refs[13:]
    view = pl.program_id(3)
    heads, channels = given.query.shape[:2]
    zeros = jnp.zeros(looks.x.shape, jnp.float32)

    @pl.when(view == 0)
    def _():
        to.query[...] = jnp.zeros_like(to.query)

    gather.x[...], gather.y[...] = looks.x[...], looks.y[...]
    lane_gather.sample(sources._replace(planes=features_ref), view, gather)
    scatter.values[...] = jnp.zeros_like(scatter.values)

    def of_head(head: int) -> None:
        def multiply(c: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            sample = gather.sample[c]
            logit, seen = sums
            return logit + given.query[head, c] * sample, seen + given.gradient[head, c] * sample

        logit, seen = jax.lax.fori_loop(0, channels, multiply, (zeros, zeros))
        logit = jnp.where(looks.takes_part[...] > 0, logit, one_to_many.LEFT_OUT)
        weight = jnp.exp(logit - given.log_total[head])
        slope = weight * (seen - given.mean[head])

        def spread(c: Array, _: None) -> None:
            to.query[head, c] += slope * gather.sample[c]
            scatter.values[c] += slope * given.query[head, c] + weight * given.gradient[head, c]

        jax.lax.fori_loop(0, channels, spread, None)

    for head in range(heads):
        of_head(head)

    def move(c: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        value = scatter.values[c]
        return sums[0] + value * gather.slopes[0, c], sums[1] + value * gather.slopes[1, c]

    to.x[...], to.y[...] = jax.lax.fori_loop(0, channels, move, (zeros, zeros))
    lane_scatter.add(to.features, sources, view, (gather.x, gather.y), scatter)
