"""What a pixel takes from its samples in other views: two read-outs as pure functions (Sec. 3.2).

`per_view` attends to every sample in every view; `concat_mlp` first merges the views of a sample
by a small network. In both, features are projected before they are sampled: bilinear sampling is
linear, so this is the same with fewer products. Views come one after another, in a loop that
keeps running sums, so that the features of all samples in all views are never held at once.

There is no kernel that gathers for itself, as Quark has; this is arithmetic, not a measurement. The
vector unit of a TPU would fetch 128 lanes at a time, twice for every row that 8 x 128 samples touch
and for every channel: with keys and values of 512 channels and ten rows 20,480 fetches, a cycle
each at best. The same samples are 4,096 rows of 4 KiB, whole tiles of memory, which a v5e reads in
31,000 cycles while its vector unit is free. Saved would be one view's samples on their way to
memory and back; the loop already holds no more than these.

Shapes: q, k, v [b, v, y, x, a, f]; s samples of a ray; e numbers that describe a sample in a view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from depth_decoder_jax import epipolar
from nvs_common.types import Array, Cameras

# Below every logit, and finite: the difference of two of them is zero.
_LOWEST = -1e30

# (what is seen, surfaces of the views that see it, their cameras) -> [b, v, y, x, s, e].
Describe: TypeAlias = Callable[[epipolar.Seen, epipolar.Surfaces | None, Cameras], Array | None]


class Front(NamedTuple):
    """Another view that every view looks at.

    Attributes:
      projected: its projected features, arrays [b, y, x, ...].
      cameras: [b, v] its camera, at the size of its features, once for every view.
    """

    projected: Any
    cameras: Cameras


class _Softmax(NamedTuple):
    """A softmax in the making: [b, v, y, x, a] but `total` [b, v, y, x, a, f]."""

    highest: Array
    denominator: Array
    total: Array


def per_view(
    q: Array,
    k: Array,
    v: Array,
    known: epipolar.Surfaces,
    samples: epipolar.Samples,
    *,
    describe: Describe,
    description_kernel: Array | None = None,
    front: Front | None = None,
) -> Array:
    """Softmax over the samples in all other views.

    Args:
      q: queries.
      k: keys.
      v: values.
      known: surfaces of the views, at the size of q.
      samples: of the rays of the queries.
      describe: what distinguishes a sample in a view beside its features.
      description_kernel: [e, a, f] from that to what is added to the key.
      front: projected are keys and values [b, y, x, a, f].

    Returns:
      [b, v, y, x, a, f] float32; zeros where no view sees a sample.
    """
    q = q * q.shape[-1] ** -0.5
    description_query = None
    if description_kernel is not None:
        # Products with short descriptions in place of keys made from them for every sample.
        description_query = jnp.einsum("...af,eaf->...ae", q, description_kernel)

    def look(state: _Softmax, pair: Any, cams: Cameras, there: Any) -> _Softmax:
        seen = epipolar.see(cams, samples)
        both = jnp.concatenate([x.reshape(*x.shape[:4], -1) for x in pair], axis=-1)
        keys, values = jnp.split(epipolar.gather(both, seen.uv), 2, axis=-1)
        shape = (*keys.shape[:-1], *q.shape[-2:])
        logits = _logits(q, keys.reshape(shape), describe(seen, there, cams), description_query)
        return _accumulate(state, logits, seen.mask, values.reshape(shape))

    def step(state: _Softmax, shift: Array) -> tuple[_Softmax, None]:
        (k_there, v_there), there = epipolar.turn(((k, v), known), shift)
        return look(state, (k_there, v_there), there.cameras, there), None

    state = _Softmax(
        jnp.full(q.shape[:-1], _LOWEST, jnp.float32),
        jnp.zeros(q.shape[:-1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    # The backward pass samples each view anew, too.
    step = jax.checkpoint(step, prevent_cse=False)
    state = jax.lax.scan(step, state, jnp.arange(1, q.shape[1]))[0]
    if front is not None:
        pair = _for_every_view(front.projected, q.shape[1])
        look_at_front = jax.checkpoint(lambda state, pair: look(state, pair, front.cameras, None))
        state = look_at_front(state, pair)
    return _finish(state)


def concat_mlp(
    features: Array,
    first_kernel: Array,
    first_bias: Array,
    known: epipolar.Surfaces,
    samples: epipolar.Samples,
    *,
    describe: Describe,
    description_kernel: Array | None = None,
    front: Front | None = None,
) -> Array:
    """The first layer of a network over a sample's features in all views, one after the other.

    Views are in cyclic order from the ray's own, so that the network knows them by how they
    follow it.

    Args:
      features: [b, v, y, x, c].
      first_kernel: [v, c, d], part i for the view that follows by i.
      first_bias: [d].
      known: surfaces of the views.
      samples: of the rays of all pixels.
      describe: what distinguishes a sample in a view beside its features.
      description_kernel: [v, e, d], as `first_kernel`; with a front view one more, the last.
      front: projected are features times a kernel, [b, y, x, d].

    Returns:
      [b, v, y, x, s, d], before the activation.
    """
    width = first_kernel.shape[-1]

    def look(seen: epipolar.Seen, maps: Array, description: Array | None, kernel: Any) -> Array:
        found = epipolar.gather(maps, seen.uv)
        if kernel is not None and description is not None:
            found += jnp.einsum("...e,ed->...d", description.astype(found.dtype), kernel)
        return found * seen.mask[..., None].astype(found.dtype)

    def step(total: Array, xs: Any) -> tuple[Array, None]:
        shift, kernel, of_description = xs
        maps = jnp.einsum("...c,cd->...d", features, kernel)
        maps, there = epipolar.turn((maps, known), shift)
        seen = epipolar.see(there.cameras, samples)
        description = describe(seen, there, there.cameras)
        return total + look(seen, maps, description, of_description), None

    # Every sample of a ray lies on its own pixel.
    own = jnp.einsum("...c,cd->...d", features, first_kernel[0])[..., None, :]
    own = own * samples.valid[..., None].astype(own.dtype)
    total = own + first_bias.astype(own.dtype).reshape((1,) * 5 + (width,))
    count = features.shape[1]
    of_description = None if description_kernel is None else description_kernel[1:count]
    xs = (jnp.arange(1, count), first_kernel[1:], of_description)
    total = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), total, xs)[0]
    if front is not None:
        maps = _for_every_view(front.projected, count)
        seen = epipolar.see(front.cameras, samples)
        description = describe(seen, None, front.cameras)
        last = None if description_kernel is None else description_kernel[count]
        total += look(seen, maps, description, last)
    return total


def over_samples(q: Array, keys: Array, values: Array, valid: Array) -> Array:
    """Softmax over the samples of a ray, keys and values [b, v, y, x, s, a, f] of all views merged.

    Returns:
      [b, v, y, x, a, f] float32; zeros where no sample is valid.
    """
    logits = _logits(q * q.shape[-1] ** -0.5, keys, None, None)
    state = _Softmax(
        jnp.full(q.shape[:-1], _LOWEST, jnp.float32),
        jnp.zeros(q.shape[:-1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    return _finish(_accumulate(state, logits, valid, values))


def _logits(q: Array, keys: Array, description: Array | None, query: Array | None) -> Array:
    """[b, v, y, x, a, s] float32."""
    logits = jnp.einsum("...af,...saf->...as", q, keys, preferred_element_type=jnp.float32)
    if description is None or query is None:
        return logits
    description = description.astype(query.dtype)
    return logits + jnp.einsum(
        "...ae,...se->...as", query, description, preferred_element_type=jnp.float32
    )


def _accumulate(state: _Softmax, logits: Array, mask: Array, values: Array) -> _Softmax:
    """Takes in logits [b, v, y, x, a, s], mask [b, v, y, x, s], values [b, v, y, x, s, a, f]."""
    mask = mask[..., None, :]
    logits = jnp.where(mask, logits, _LOWEST)
    highest = jnp.maximum(state.highest, jnp.max(logits, axis=-1))
    # The result does not depend on what is subtracted.
    highest = jax.lax.stop_gradient(highest)
    weights = jnp.where(mask, jnp.exp(logits - highest[..., None]), 0.0)
    decay = jnp.exp(jax.lax.stop_gradient(state.highest) - highest)
    found = jnp.einsum(
        "...as,...saf->...af",
        weights.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    return _Softmax(
        highest,
        state.denominator * decay + jnp.sum(weights, axis=-1),
        state.total * decay[..., None] + found,
    )


def _finish(state: _Softmax) -> Array:
    some = state.denominator > 0
    # Where nothing is seen, zero and a gradient of zero instead of 0 / 0.
    inverse = jnp.where(some, 1.0 / jnp.where(some, state.denominator, 1.0), 0.0)
    return state.total * inverse[..., None]


def _for_every_view(tree: Any, count: int) -> Any:
    repeat = lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], count, *x.shape[1:]))  # noqa: E731
    return jax.tree.map(repeat, tree)
