"""Targets that attend, in every block, to tokens that all targets of a scene share.

`Shared` holds what does not depend on the targets; it is computed once for all of them. Exact:
the same pictures as one sequence [shared tokens, tokens of a target] for each target.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange, repeat

from lvsm_jax import blocks
from nvs_common import attention
from nvs_common.types import Array


class Shared(NamedTuple):
    """What the first block computes of shared tokens before it looks at any target.

    Attributes:
      tokens: [b, m, d].
      query, key, value: [b, m, a, f].
      attended: attention of the shared tokens to each other; None where the device's attention
        is not computed in parts.
    """

    tokens: Array
    query: Array
    key: Array
    value: Array
    attended: attention.Partial | None


def share(params: blocks.Params, tokens: Array, setting: blocks.Setting) -> Shared:
    """Prepares shared tokens [b, m, d] for a stack of blocks."""
    first = blocks.only(blocks.split(params, 1, blocks.depth(params) - 1)[0])
    y = blocks.normalized(first, "attention_norm", tokens, setting)
    query = blocks.queries(first, y, setting)
    key, value = blocks.keys_values(first, y, setting)
    attended = None
    if attention.merges(setting.attention, setting.dtype) and blocks.depth(params) > 1:
        attended = attention.with_log_sum(query, key, value, implementation=setting.attention)
    return Shared(tokens, query, key, value, attended)


def run(params: blocks.Params, shared: Shared, own: Array, setting: blocks.Setting) -> Array:
    """A stack of blocks in which all tokens of a target and the shared ones see each other.

    Args:
      params: stacked.
      shared: from `share`, with the same parameters.
      own: [b, t, n, d] tokens of each target.
      setting: how it is computed.

    Returns:
      [b, t, n, d].
    """
    num_layers, num_shared = blocks.depth(params), shared.tokens.shape[1]
    if num_layers == 1:
        step = blocks.remat(lambda layer, own: _own(layer, shared, own, setting), setting)
        return step(blocks.only(params), own)
    first, middle, last = blocks.split(params, 1, num_layers - 2, 1)
    step = blocks.remat(lambda layer, own: _first_block(layer, shared, own, setting), setting)
    x = step(blocks.only(first), own)
    x = blocks.scan(lambda layer, x: blocks.block(layer, x, setting), middle, x, setting)
    keep = slice(num_shared, None)
    step = blocks.remat(lambda layer, x: blocks.block(layer, x, setting, keep), setting)
    return rearrange(step(blocks.only(last), x), "(b t) n d -> b t n d", b=own.shape[0])


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


def _own(params: blocks.Params, shared: Shared, own: Array, setting: blocks.Setting) -> Array:
    """The first block of a target's own tokens, [b, t, n, d]."""
    y = blocks.normalized(params, "attention_norm", own, setting)
    q, (k, v) = blocks.queries(params, y, setting), blocks.keys_values(params, y, setting)
    attended = attend(q, (shared.key, shared.value), (k, v), setting)
    own = blocks.add_attended(params, own, attended, setting)
    return blocks.add_mlp(params, own, setting)


def _first_block(
    params: blocks.Params, shared: Shared, own: Array, setting: blocks.Setting
) -> Array:
    """The first block of all tokens, [(b t), m + n, d]."""
    num_targets = own.shape[1]
    y = blocks.normalized(params, "attention_norm", own, setting)
    q, (k, v) = blocks.queries(params, y, setting), blocks.keys_values(params, y, setting)
    attended = jnp.concatenate(
        [
            _attend_from_shared(shared, k, v, setting),
            attend(q, (shared.key, shared.value), (k, v), setting),
        ],
        axis=2,
    )
    x = jnp.concatenate([repeat(shared.tokens, "b m d -> b t m d", t=num_targets), own], axis=2)
    x, attended = (x.reshape(-1, *x.shape[2:]) for x in (x, attended))
    return blocks.add_mlp(params, blocks.add_attended(params, x, attended, setting), setting)


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
