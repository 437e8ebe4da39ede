"""Targets that attend, in every block, to tokens that all targets of a scene share.

`Shared` and `Cache` hold what does not depend on the targets; they are computed once for all of
them. Exact: the same pictures as one sequence [shared tokens, tokens of a target] for each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from lvsm_jax import blocks, relative
from nvs_common import attention
from nvs_common.types import Array


class Shared(NamedTuple):
    """What the first block computes of shared tokens before it looks at any target.

    Attributes:
      tokens: [b, m, d].
      at: their frames [b, m, ...], for relative encodings.
      query, key, value: [b, m, a, f].
      attended: attention of the shared tokens to each other; None where the device's attention
        is not computed in parts.
    """

    tokens: Array
    at: relative.Frames | None
    query: Array
    key: Array
    value: Array
    attended: attention.Partial | None


class Cache(NamedTuple):
    """Keys and values of the inputs in every layer, [l, b, m, a, f]: a scene, ready to render."""

    key: Array
    value: Array


def share(
    params: blocks.Params, tokens: Array, setting: blocks.Setting, at: relative.Frames | None = None
) -> Shared:
    """Prepares shared tokens [b, m, d] for a stack of blocks."""
    first = blocks.only(blocks.split(params, 1, blocks.depth(params) - 1)[0])
    y = blocks.normalized(first, "attention_norm", tokens, setting)
    query = blocks.queries(first, y, setting, at)
    key, value = blocks.keys_values(first, y, setting, at)
    attended = None
    if attention.merges(setting.attention, setting.dtype) and blocks.depth(params) > 1:
        attended = attention.with_log_sum(query, key, value, implementation=setting.attention)
    return Shared(tokens, at, query, key, value, attended)


def run(
    params: blocks.Params,
    shared: Shared,
    own: Array,
    setting: blocks.Setting,
    at: relative.Frames | None = None,
) -> Array:
    """A stack of blocks in which all tokens of a target and the shared ones see each other.

    Args:
      params: stacked.
      shared: from `share`, with the same parameters.
      own: [b, t, n, d] tokens of each target.
      setting: how it is computed.
      at: frames of the targets' tokens, [b, t, n, ...].

    Returns:
      [b, t, n, d].
    """
    num_layers, (num_scenes, num_targets) = blocks.depth(params), own.shape[:2]
    attended_to = (shared.key, shared.value)
    if num_layers == 1:
        only = lambda layer, own: attend_block(layer, attended_to, own, setting, at)  # noqa: E731
        return blocks.remat(only, setting)(blocks.only(params), own)
    first, middle, last = blocks.split(params, 1, num_layers - 2, 1)
    every = jax.tree.map(lambda x: repeat(x, "b ... -> (b t) ...", t=num_targets), shared.at)
    flat = jax.tree.map(lambda x: rearrange(x, "b t ... -> (b t) ..."), at)
    every = relative.concatenate([every, flat])
    step = blocks.remat(lambda layer, own: _first_block(layer, shared, own, setting, at), setting)
    x = step(blocks.only(first), own)
    x = blocks.scan(lambda layer, x: blocks.block(layer, x, setting, every), middle, x, setting)
    keep = slice(shared.tokens.shape[1], None)
    step = blocks.remat(lambda layer, x: blocks.block(layer, x, setting, every, keep), setting)
    return rearrange(step(blocks.only(last), x), "(b t) n d -> b t n d", b=num_scenes)


def cache_inputs(
    params: blocks.Params, tokens: Array, setting: blocks.Setting, at: relative.Frames | None
) -> Cache:
    """What targets attend to where the inputs [b, m, d] attend among themselves alone."""
    most, last = blocks.split(params, blocks.depth(params) - 1, 1)
    step = blocks.remat(lambda x, layer: blocks.block_with_keys(layer, x, setting, at), setting)
    tokens, below = jax.lax.scan(step, tokens, most)
    y = blocks.normalized(blocks.only(last), "attention_norm", tokens, setting)
    top = blocks.keys_values(blocks.only(last), y, setting, at)
    return Cache(*(jnp.concatenate([x, y[None]]) for x, y in zip(below, top, strict=True)))


def cache_features(
    params: blocks.Params, features: Array, setting: blocks.Setting, at: relative.Frames | None
) -> Cache:
    """What targets attend to where all layers look at the same features [b, m, d]."""
    y = features.astype(setting.dtype)
    return Cache(*jax.lax.map(lambda layer: blocks.keys_values(layer, y, setting, at), params))


def run_cached(
    params: blocks.Params,
    cache: Cache,
    own: Array,
    setting: blocks.Setting,
    at: relative.Frames | None = None,
    *,
    sees_own: bool,
) -> Array:
    """A stack of blocks in which targets attend to a cache that they do not change.

    Args:
      params: stacked.
      cache: of the inputs.
      own: [b, t, n, d] tokens of each target.
      setting: how it is computed.
      at: frames of the targets' tokens, [b, t, n, ...].
      sees_own: whether the tokens of a target also attend to each other.

    Returns:
      [b, t, n, d].
    """

    def step(layer: tuple[blocks.Params, Cache], own: Array) -> Array:
        block = attend_block if sees_own else _cross_block
        return block(layer[0], layer[1], own, setting, at)

    layers: Any = (params, cache)
    step = blocks.remat(step, setting)
    unroll = max(1, min(setting.unroll, blocks.depth(params)))
    return jax.lax.scan(lambda x, layer: (step(layer, x), None), own, layers, unroll=unroll)[0]


def attend_block(
    params: blocks.Params,
    shared: tuple[Array, Array],
    own: Array,
    setting: blocks.Setting,
    at: relative.Frames | None,
) -> Array:
    """A block of targets' tokens [b, t, n, d] over shared keys and values and a target's own."""
    y = blocks.normalized(params, "attention_norm", own, setting)
    q, keys = blocks.queries(params, y, setting, at), blocks.keys_values(params, y, setting, at)
    own = blocks.add_attended(params, own, attend(q, shared, keys, setting), setting, at)
    return blocks.add_mlp(params, own, setting)


def attend(
    q: Array, shared: tuple[Array, Array], own: tuple[Array, Array], setting: blocks.Setting
) -> Array:
    """Attention of each target to the shared tokens and to its own.

    Args:
      q: [b, t, n, a, f].
      shared: keys and values [b, m, a, f].
      own: keys and values [b, t, n, a, f].
      setting: how it is computed.

    Returns:
      [b, t, n, a, f].
    """
    num_targets = q.shape[1]
    flat = [rearrange(x, "b t n a f -> (b t) n a f") for x in (q, *own)]
    if not attention.merges(setting.attention, setting.dtype):
        k, v = (_after(one, x, num_targets) for one, x in zip(shared, flat[1:], strict=True))
        out = attention.attention(flat[0], k, v, implementation=setting.attention)
        return rearrange(out, "(b t) n a f -> b t n a f", t=num_targets)
    # All targets of a scene in one: the shared keys are not repeated.
    together = rearrange(q, "b t n a f -> b (t n) a f")
    to_shared = attention.with_log_sum(together, *shared, implementation=setting.attention)
    to_own = attention.with_log_sum(*flat, implementation=setting.attention)
    parts = [
        attention.Partial(*(x.reshape(*q.shape[:3], *x.shape[2:]) for x in part))
        for part in (to_shared, to_own)
    ]
    return attention.merge(parts)


def _cross_block(
    params: blocks.Params,
    shared: tuple[Array, Array],
    own: Array,
    setting: blocks.Setting,
    at: relative.Frames | None,
) -> Array:
    """A block of targets' tokens [b, t, n, d] over shared keys and values alone."""
    y = blocks.normalized(params, "attention_norm", own, setting)
    q = blocks.queries(params, y, setting, at)
    together = rearrange(q, "b t n a f -> b (t n) a f")
    attended = attention.attention(together, *shared, implementation=setting.attention)
    own = blocks.add_attended(params, own, attended.reshape(q.shape), setting, at)
    return blocks.add_mlp(params, own, setting)


def _first_block(
    params: blocks.Params,
    shared: Shared,
    own: Array,
    setting: blocks.Setting,
    at: relative.Frames | None,
) -> Array:
    """The first block of all tokens, [(b t), m + n, d]."""
    num_targets = own.shape[1]
    y = blocks.normalized(params, "attention_norm", own, setting)
    q, (k, v) = blocks.queries(params, y, setting, at), blocks.keys_values(params, y, setting, at)
    from_shared = _attend_from_shared(shared, k, v, setting)
    from_own = attend(q, (shared.key, shared.value), (k, v), setting)
    tokens, above = jax.tree.map(
        lambda x: repeat(x, "b ... -> b t ...", t=num_targets), (shared.tokens, shared.at)
    )
    parts = [
        blocks.add_attended(params, tokens, from_shared, setting, above),
        blocks.add_attended(params, own, from_own, setting, at),
    ]
    x = rearrange(jnp.concatenate(parts, axis=2), "b t n d -> (b t) n d")
    return blocks.add_mlp(params, x, setting)


def _attend_from_shared(shared: Shared, k: Array, v: Array, setting: blocks.Setting) -> Array:
    """Attention of the shared tokens to themselves and to each target, [b, t, m, a, f]."""
    num_targets = k.shape[1]
    query = repeat(shared.query, "b m a f -> (b t) m a f", t=num_targets)
    k, v = (rearrange(x, "b t n a f -> (b t) n a f") for x in (k, v))
    split = lambda x: x.reshape(-1, num_targets, *x.shape[1:])  # noqa: E731
    if shared.attended is None:
        k, v = (_after(x, y, num_targets) for x, y in ((shared.key, k), (shared.value, v)))
        return split(attention.attention(query, k, v, implementation=setting.attention))
    to_target = attention.with_log_sum(query, k, v, implementation=setting.attention)
    among = attention.Partial(*(x[:, None] for x in shared.attended))
    return attention.merge([among, attention.Partial(*map(split, to_target))])


def _after(shared: Array, own: Array, num_targets: int) -> Array:
    """Shared [b, m, a, f] before each target's [(b t), n, a, f], [(b t), m + n, a, f]."""
    shared = repeat(shared, "b m a f -> (b t) m a f", t=num_targets)
    return jnp.concatenate([shared, own], axis=1)
