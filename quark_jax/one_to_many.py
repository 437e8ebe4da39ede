"""One-to-many attention as functions (Quark, Eq. 5-8): the plain form, stored or a layer at a time.

`kernels` chooses between these and a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nvs_common.types import Array
from quark_jax import ldm

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


def with_plain_backward(forward: Callable[..., Array], scale: float) -> Callable[..., Array]:
    """A kernel's forward pass with the backward pass of `attend_unstored`.

    Args:
      forward: of one map: query [l, y, x, a, c], features [v, y, x, c], uv [v, l, y, x, 2], views
        that take part [v, l, y, x] -> [l, y, x, a, c].
      scale: factor on the logits.

    Returns:
      (query, features, uv, valid) -> [n, l, y, x, a, c], shapes as in `attend_unstored`.
    """

    @jax.custom_vjp
    @jax.custom_batching.sequential_vmap
    def fused(query: Array, features: Array, uv: Array, valid: Array) -> Array:
        # One map after the other: kernels address memory by themselves and know of no batch.
        maps_first = (jnp.moveaxis(x, 1, 0) for x in (features, uv, masked(valid)))
        return jax.lax.map(lambda xs: forward(*xs), (query, *maps_first))

    def backward(args: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
        def plain(query: Array, features: Array, uv: Array, valid: Array) -> Array:
            return attend_unstored(query, Unstored(features, uv), valid, scale)

        return jax.vjp(plain, *args)[1](cotangent)

    fused.defvjp(lambda *args: (fused(*args), args), backward)
    return fused


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
