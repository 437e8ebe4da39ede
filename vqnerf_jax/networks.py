"""The multilayer perceptrons of an SDF renderer as pure functions of nested dicts of arrays.

Parameters of a layer are {"kernel" [in, out], "bias" [out]}, and with weight norm "scale" [out]:
the kernel's columns are then brought to that length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from nvs_common.types import Array
from vqnerf_jax import grids

# {"layer_0": {"kernel": ..., ...}, ...}.
Params: TypeAlias = Mapping[str, Mapping[str, Array]]

SHARPNESS = 100.0  # of the softplus between the layers of the signed distance
_LINEAR_FROM = 20.0  # the softplus is the identity where its argument exceeds this


def encode(x: Array, octaves: int) -> Array:
    """x [..., c] followed by sin and cos of 2^i x for each octave i: [..., c (1 + 2 octaves)]."""
    waves = [x]
    for octave in range(octaves):
        waves += [jnp.sin(2.0**octave * x), jnp.cos(2.0**octave * x)]
    return jnp.concatenate(waves, axis=-1)


def encoded_width(width: int, octaves: int) -> int:
    """Channels of `encode`."""
    return width * (1 + 2 * octaves)


def linear(layer: Mapping[str, Array], x: Array, precision: Any) -> Array:
    """Applies a layer to x [..., in]."""
    kernel = layer["kernel"]
    if "scale" in layer:
        length = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=0))
        kernel = kernel * (layer["scale"] / length)[None]
    y = jnp.einsum("...i,io->...o", x, kernel, precision=precision)
    return y + layer["bias"].reshape((1,) * (y.ndim - 1) + (-1,))


def softplus(x: Array) -> Array:
    """log(1 + exp(100 x)) / 100."""
    scaled = SHARPNESS * x
    curved = jax.nn.softplus(jnp.minimum(scaled, _LINEAR_FROM)) / SHARPNESS
    return jnp.where(scaled > _LINEAR_FROM, x, curved)


def distance(
    params: Params,
    points: Array,
    *,
    octaves: int,
    skips: Sequence[int],
    scale: float,
    precision: Any,
    features: Mapping[str, Array] | None = None,
) -> Array:
    """Signed distances and features [..., 1 + f] of points [..., 3].

    Args:
      params: of the layers.
      points: where.
      octaves: of the encoding.
      skips: layers that see the encoding again, beside the layer before.
      scale: factor on points; distances are divided by it.
      precision: of the products of matrices.
      features: grids that are read at the points beside the encoding, see `grids`.
    """
    encoded = encode(points * scale, octaves)
    if features:
        encoded = jnp.concatenate([encoded, grids.lookup(features, points * scale)], axis=-1)
    x = encoded
    for i in range(len(params)):
        if i in skips:
            x = jnp.concatenate([x, encoded], axis=-1) / math.sqrt(2)
        x = linear(params[f"layer_{i}"], x, precision)
        if i < len(params) - 1:
            x = softplus(x)
    return jnp.concatenate([x[..., :1] / scale, x[..., 1:]], axis=-1)


def relu_layers(params: Params, x: Array, precision: Any, *, last: bool) -> Array:
    """Layers with a ReLU after each; after the last one only if `last`."""
    for i in range(len(params)):
        x = linear(params[f"layer_{i}"], x, precision)
        x = jax.nn.relu(x) if last or i < len(params) - 1 else x
    return x


def background(
    params: Params,
    points: Array,
    directions: Array,
    *,
    octaves: int,
    view_octaves: int,
    skips: Sequence[int],
    precision: Any,
) -> tuple[Array, Array]:
    """Density [...] and colour logits [..., 3] outside of the sphere (NeRF++, arXiv 2010.07492).

    Args:
      params: "layer_0" ... and "density", "feature", "view", "rgb".
      points: [..., 4] on the unit sphere, and inverse distance.
      directions: [..., 3] of the rays.
      octaves: of the points' encoding.
      view_octaves: of the directions'.
      skips: layers after which the encoding is seen again.
      precision: of the products of matrices.
    """
    encoded = encode(points, octaves)
    x = encoded
    for i in range(sum(name.startswith("layer_") for name in params)):
        x = jax.nn.relu(linear(params[f"layer_{i}"], x, precision))
        if i in skips:
            x = jnp.concatenate([encoded, x], axis=-1)
    density = linear(params["density"], x, precision)[..., 0]
    feature = linear(params["feature"], x, precision)
    x = jnp.concatenate([feature, encode(directions, view_octaves)], axis=-1)
    x = jax.nn.relu(linear(params["view"], x, precision))
    return density, linear(params["rgb"], x, precision)


def init_distance(
    key: Array,
    layers: int,
    hidden: int,
    features: int,
    encoded: int,
    skips: Sequence[int],
    radius: float,
    weight_norm: bool,
) -> Params:
    """Parameters with which the distance is about that to a sphere (Atzmon and Lipman, 2020).

    Args:
      key: random key.
      layers: hidden layers.
      hidden: their width.
      features: f.
      encoded: width of the encoding, of which the first three numbers are the point.
      skips: as in `distance`.
      radius: of the sphere.
      weight_norm: whether layers have a scale.
    """
    widths = [encoded, *[hidden] * layers, 1 + features]
    params = {}
    for i, one in enumerate(jax.random.split(key, layers + 1)):
        fan_in = widths[i]
        fan_out = widths[i + 1] - (encoded if i + 1 in skips else 0)
        bias, normal = jnp.zeros(fan_out), jax.random.normal(one, (fan_in, fan_out))
        if i == layers:
            kernel, bias = 1e-4 * normal + math.sqrt(math.pi / fan_in), bias - radius
        else:
            kernel = normal * math.sqrt(2 / fan_out)
            if i == 0:
                kernel = kernel.at[3:].set(0)
            elif i in skips and encoded > 3:
                kernel = kernel.at[-(encoded - 3) :].set(0)
        params[f"layer_{i}"] = _layer(kernel, bias, weight_norm)
    return params


def init_layers(key: Array, widths: Sequence[int], weight_norm: bool) -> Params:
    """Layers of the given widths, first input to last output; uniform +-1 / sqrt(fan-in)."""
    keys = jax.random.split(key, len(widths) - 1)
    sizes = zip(keys, widths[:-1], widths[1:], strict=True)
    return {f"layer_{i}": _uniform(*size, weight_norm) for i, size in enumerate(sizes)}


def init_background(
    key: Array, layers: int, hidden: int, octaves: int, view_octaves: int, skips: Sequence[int]
) -> Params:
    """Parameters of `background`, without weight norm."""
    encoded, views = encoded_width(4, octaves), encoded_width(3, view_octaves)
    keys = jax.random.split(key, layers + 4)
    inputs = [encoded, *(hidden + (encoded if i in skips else 0) for i in range(layers - 1))]
    params = {
        f"layer_{i}": _uniform(keys[i], width, hidden, False) for i, width in enumerate(inputs)
    }
    last = hidden + (encoded if layers - 1 in skips else 0)
    heads = {
        "density": (last, 1),
        "feature": (last, hidden),
        "view": (hidden + views, hidden // 2),
        "rgb": (hidden // 2, 3),
    }
    for (name, sizes), one in zip(heads.items(), keys[layers:], strict=True):
        params[name] = _uniform(one, *sizes, False)
    return params


def _uniform(key: Array, fan_in: int, fan_out: int, weight_norm: bool) -> Mapping[str, Array]:
    kernel_key, bias_key = jax.random.split(key)
    bound = 1 / math.sqrt(fan_in)
    kernel = jax.random.uniform(kernel_key, (fan_in, fan_out), minval=-bound, maxval=bound)
    bias = jax.random.uniform(bias_key, (fan_out,), minval=-bound, maxval=bound)
    return _layer(kernel, bias, weight_norm)


def _layer(kernel: Array, bias: Array, weight_norm: bool) -> Mapping[str, Array]:
    layer = {"kernel": kernel, "bias": bias}
    if weight_norm:
        layer["scale"] = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=0))
    return layer
