"""Blocks of the update-and-fuse steps (Quark, Sec. 3.2.2, 3.3 and App. A)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvs_common import layers, photoconsistency
from nvs_common.types import Array
from quark_jax import ldm, prior

# The logit of a view that has no part in an element: finite, and weightless beside any other.
LEFT_OUT = -1e9


class Unstored(NamedTuple):
    """Update features before they are gathered: what `delta` is where it is never held whole.

    Attributes:
      features: [v, n, y, x, c] in the views' images.
      uv: [v, n, l, y, x, 2] where the elements of the volume fall in them, as fractions.
    """

    features: Array
    uv: Array


def over_delta(
    function: Callable[[Array, Array, Array], Array],
    query: Array,
    delta: Array | Unstored,
    valid: Array,
) -> Array:
    """Applies a function of single elements to queries and update features.

    Unstored features are gathered a layer at a time, for this function alone, and again in the
    backward pass: of [v, n, l, y, x, c] only one layer ever exists.

    Args:
      function: (query [n, ..., *], delta [v, n, ..., c], valid [v, n, ...]) -> [n, ..., *].
      query: [n, l, y, x, *].
      delta: [v, n, l, y, x, c], or what they are gathered from.
      valid: [v, n, l, y, x].

    Returns:
      [n, l, y, x, *].
    """
    if not isinstance(delta, Unstored):
        return function(query, delta, valid)

    def view(per_view: tuple[Array, Array]) -> Array:
        return jax.vmap(ldm.back_project)(*per_view)

    def layer(per_layer: tuple[Array, Array, Array]) -> Array:
        query, uv, valid = per_layer
        # A loop, so that the result is stored once and not recomputed by each of its readers.
        gathered = jax.lax.map(jax.checkpoint(view), (delta.features, uv))
        return function(query, gathered, valid)

    layers_first = (
        jnp.moveaxis(query, 1, 0),
        jnp.moveaxis(delta.uv, 2, 0),
        jnp.moveaxis(valid, 2, 0),
    )
    return jnp.moveaxis(jax.lax.map(jax.checkpoint(layer), layers_first), 0, 1)


def attend(query: Array, keys: Array, values: Array, valid: Array, scale: float) -> Array:
    """One query an element against one key a view, with a float32 softmax over the views.

    Args:
      query: [n, ..., a, f].
      keys: [v, n, ..., a, f], or [v, n, ..., f] shared by all heads.
      values: [v, n, ..., a, c], or [v, n, ..., c].
      valid: [v, n, ...] bool; views that do not see an element get no weight unless none does.
      scale: factor on the logits.

    Returns:
      [n, ..., a, c].
    """
    if keys.ndim == query.ndim:
        keys, values = keys[..., None, :], values[..., None, :]
    return _attend(query * scale, keys, values, masked(valid))


def attend_unstored(query: Array, delta: Unstored, valid: Array, scale: float) -> Array:
    """`attend` of queries [n, l, y, x, a, c] to features that are keys and values of all heads."""

    def change(query: Array, delta: Array, valid: Array) -> Array:
        return attend(query, delta, delta, valid, scale)

    return over_delta(change, query, delta, valid)


def agreement(query: Array, delta: Array, valid: Array) -> Array:
    """Products of queries [n, ..., c] with each view's features [v, n, ..., c]: [n, ..., v].

    Views that do not see an element are masked later, where these are blend logits.
    """
    del valid
    return jnp.stack([_dot(query, key) for key in _views(delta)], axis=-1)


def masked(valid: Array) -> Array:
    """Views that take part [v, n, ...]: those that see an element, or all where none does."""
    return valid | ~jnp.any(valid, axis=0, keepdims=True)


@jax.custom_vjp
def _attend(query: Array, keys: Array, values: Array, takes_part: Array) -> Array:
    """Attention over the views on axis 0; the backward pass is written out for its speed.

    Left to automatic differentiation, every product becomes one tiny matrix product an element,
    several times slower on a CPU than sums over channels one view at a time.
    """
    return _mix(_weights(query, keys, takes_part), values)


def _weights(query: Array, keys: Array, takes_part: Array) -> list[Array]:
    """Softmax over views in float32 or wider: for each view the weights [n, ..., a]."""
    logits = [
        jnp.where(part[..., None], _dot(query, key), LEFT_OUT)
        for key, part in zip(_views(keys), _views(takes_part), strict=True)
    ]
    highest = functools.reduce(jnp.maximum, logits)
    powers = [jnp.exp(logit - highest) for logit in logits]
    total = sum(powers[1:], powers[0])
    return [power / total for power in powers]


def _mix(weights: list[Array], values: Array) -> Array:
    """Weighted sum over views [n, ..., a, c]."""
    pairs = zip(weights, _views(values), strict=True)
    parts = [weight.astype(values.dtype)[..., None] * value for weight, value in pairs]
    return sum(parts[1:], parts[0])


def _dot(a: Array, b: Array) -> Array:
    """Products summed over channels in float32 or wider, by a matrix product: XLA's reductions
    over short last axes are slower."""
    product = a * b
    ones = jnp.ones((product.shape[-1], 1), product.dtype)
    wide = jnp.promote_types(product.dtype, jnp.float32)
    return jnp.matmul(product, ones, precision="highest", preferred_element_type=wide)[..., 0]


def _views(x: Array) -> list[Array]:
    return list(jnp.unstack(x))


def _attend_forward(query, keys, values, takes_part):
    weights = _weights(query, keys, takes_part)
    return _mix(weights, values), (query, keys, values, weights)


def _attend_backward(saved, gradient):
    query, keys, values, weights = saved
    seen = [_dot(gradient, value) for value in _views(values)]
    mean = sum(weight * one for weight, one in zip(weights, seen, strict=True))
    slopes = [weight * (one - mean) for weight, one in zip(weights, seen, strict=True)]

    def to_views(per_view: list[Array], element: Array, heads: int) -> Array:
        """Scales an element's vectors for each view, summed over heads that share features."""
        out = []
        for scalar in per_view:
            scaled = scalar.astype(element.dtype)[..., None] * element
            if heads == 1:
                first, *rest = jnp.unstack(scaled, axis=-2)
                scaled = sum(rest, first)[..., None, :]
            out.append(scaled)
        return jnp.stack(out)

    to_keys = to_views(slopes, query, keys.shape[-2])
    to_values = to_views(weights, gradient, values.shape[-2])
    return _mix(slopes, keys).astype(query.dtype), to_keys, to_values, None


_attend.defvjp(_attend_forward, _attend_backward)


def fold(query: Array, key: Array, value: Array, output: Array) -> tuple[Array, Array]:
    """Folds the projections of standard attention into two matrices a head (Eq. 8).

    Args:
      query, key, value: [c, a, f] projections of standard multi-head attention.
      output: [a, f, c].

    Returns:
      Query [c, a, c] and output [a, c, c] matrices: with them, keys and values are the raw
      features. Standard logits are scaled by 1 / sqrt(f) and folded ones by 1 / sqrt(c); the
      query matrix carries the difference.
    """
    channels, _, per_head = query.shape
    folded_query = jnp.einsum("iaf,jaf->iaj", query, key) * (channels / per_head) ** 0.5
    return folded_query, jnp.einsum("jaf,afc->ajc", value, output)


class OneToMany(nn.Module):
    """One-to-many attention from an element of the volume to the views' features (Eq. 5-9).

    Attributes:
      heads: attention heads.
      folded: keys and values are the raw features (Eq. 8); otherwise the standard form.
      uniform: ablation without cross-attention: every valid view has the same weight.
      residual_scale: factor on the output's initial weights.
      query_scale: factor on the queries' initial weights; small ones start as a mean.
      dtype: compute type.
    """

    heads: int
    folded: bool = True
    uniform: bool = False
    residual_scale: float = 1.0
    query_scale: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, volume: Array, delta: Array | Unstored, valid: Array) -> Array:
        """Adds what the views tell: volume [n, ..., c], delta [v, n, ..., c], valid [v, n, ...]."""
        channels = volume.shape[-1]
        per_head = channels if self.folded else channels // self.heads
        if not self.folded and channels % self.heads:
            raise ValueError(f"{channels} channels do not divide into {self.heads} heads")

        def matrix(name: str, ins: tuple[int, ...], outs: tuple[int, ...], scale=1.0) -> Array:
            return Matrix(ins, outs, scale, name=name)().astype(self.dtype)

        # Plain arrays: a layer of the network cannot be called inside of the loop over layers.
        one, many = (channels,), (self.heads, per_head)
        to_query = matrix("query", one, many, self.query_scale)
        raw = self.folded
        to_key, to_value = (None if raw else matrix(n, one, many) for n in ("key", "value"))
        to_output = matrix("output", many, one, self.residual_scale)

        def change(volume: Array, delta: Array, valid: Array) -> Array:
            query = jnp.einsum("...c,caf->...af", volume, to_query)
            if self.uniform:
                query = jnp.zeros_like(query)
            keys = delta if raw else jnp.einsum("...c,caf->...af", delta, to_key)
            values = delta if raw else jnp.einsum("...c,caf->...af", delta, to_value)
            mixed = attend(query, keys, values, valid, per_head**-0.5)
            return jnp.einsum("...af,afc->...c", mixed.astype(self.dtype), to_output)

        normed = layers.RMSNorm(dtype=self.dtype, name="norm")(volume)
        return volume + over_delta(change, normed, delta, valid)


class Matrix(nn.Module):
    """Weights of a linear map without bias, [*ins, *outs] float32, as a dense layer names them."""

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    scale: float = 1.0

    @nn.compact
    def __call__(self) -> Array:
        def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            flat = (math.prod(self.ins), math.prod(self.outs))
            return layers.scaled_init(self.scale)(key, flat, dtype).reshape(shape)

        return self.param("kernel", init, (*self.ins, *self.outs), jnp.float32)


class LayerCollapse(nn.Module):
    """Halves the layers: V'_j = mean(V_2j-1, V_2j) + MLP([V_2j-1; V_2j]) (Sec. 3.2.2).

    The band of a new layer is the union of the two old ones.
    """

    residual_scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, volume: Array) -> Array:
        """Maps [n, 2 l, y, x, c] to [n, l, y, x, c]."""
        n, layers_in, *rest, channels = volume.shape
        pairs = volume.reshape(n, layers_in // 2, 2, *rest, channels)
        both = jnp.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=-1)
        hidden = layers.RMSNorm(dtype=self.dtype, name="norm")(both)
        hidden = nn.gelu(nn.Dense(2 * channels, dtype=self.dtype, name="dense_in")(hidden))
        init = layers.scaled_init(self.residual_scale)
        change = nn.Dense(channels, dtype=self.dtype, kernel_init=init, name="dense_out")(hidden)
        return pairs.mean(axis=2) + change


class UpdateNetwork(nn.Module):
    """Small CNN in image space from what a view shows and what the volume shows of it.

    Its depth is not published: a 3x3 convolution and `blocks` residual blocks.
    """

    channels: int
    blocks: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Maps [..., y, x, k] to update features [..., y, x, c]."""
        x = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="stem")(inputs)
        for block in range(self.blocks):
            scale = (2 * self.blocks) ** -0.5
            x = layers.ConvBlock(scale, self.dtype, name=f"block{block}")(x)
        return x


class BlendPrior(nn.Module):
    """Blend logits from `prior.BlendCues`; how much each cue counts is learned."""

    @nn.compact
    def __call__(self, cues: prior.BlendCues) -> Array:
        """Maps cues with leading [n] to [n, v, l, y, x]."""

        start = nn.initializers.constant(jnp.array([1.0, 1.0, 0.3]))
        remote, hidden, differs = self.param("scale", start, (3,), jnp.float32)
        against = remote / photoconsistency.FALLOFF * cues.remote[..., None, None, None]
        # Scaled so that a step of the optimiser changes it about as much as the others.
        return -(against + 10 * hidden * cues.hidden + differs * cues.differs)


def update_features(
    network: UpdateNetwork, inputs: tuple[Array | None, Array, Array | None]
) -> Array:
    """Update features [..., y, x, c] from the rendered map, image features and ray encoding."""
    seen, level, ray = inputs
    parts = [level]
    height, width = level.shape[-3:-1]
    if seen is not None:
        parts.append(ldm.resize(seen, height, width))
    if ray is not None:
        parts.append(ldm.resize(ray, height, width))
    return network(jnp.concatenate([part.astype(network.dtype) for part in parts], axis=-1))


class Decode(nn.Module):
    """Reads depth and density logits, and appearance, off the volume.

    Depth starts at the layers' anchors (zero weights) and density at sigmoid(bias), or, where
    there is a prior, at the prior's.
    """

    appearance_channels: int = 0
    density_bias: float = -2.0

    @nn.compact
    def __call__(self, volume: Array, features: Array | None = None) -> dict[str, Array]:
        """Maps [n, l, y, x, c] to float32 {"depth", "density" [n, l, y, x], "appearance"}.

        `features` [n, l, y, x, f] are `prior.layer_features`.
        """
        volume = volume.astype(jnp.promote_types(volume.dtype, jnp.float32))
        zeros = nn.initializers.zeros_init()
        bias = nn.initializers.constant(self.density_bias)
        out = {
            "depth": nn.Dense(1, kernel_init=zeros, name="depth")(volume)[..., 0],
            "density": nn.Dense(1, bias_init=bias, name="density")(volume)[..., 0],
        }
        if features is not None:
            for name, index in (("depth", prior.DEPTH), ("density", prior.DENSITY)):
                start = nn.Dense(1, False, kernel_init=_pick(index), name=f"prior_{name}")
                out[name] += start(features)[..., 0]
        if self.appearance_channels:
            appearance = nn.Dense(self.appearance_channels, name="appearance")(volume)
            out["appearance"] = nn.sigmoid(appearance)
        return out


def _pick(index: int) -> nn.initializers.Initializer:
    """Initial kernel that takes one of the features as it is."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        del key
        return jnp.zeros(shape, dtype).at[index].set(1)

    return init
