"""Attention over tokens that are split over a mesh axis: every device has n/s queries, m/s keys.

Two ways to bring keys and values to all s devices, which move the same bytes, 2 (s - 1)/s m a f for
each scene:

  "gather"  one all-gather, before the products. It uses the links of both directions, and every
            device holds all keys and values. The backward pass scatters their cotangents likewise.
  "ring"    s - 1 steps, in each of which keys and values go to the neighbour while those that are
            here are attended to; the results are merged by their denominators. A device holds two
            parts. The backward pass sends the cotangents along.

A step of the ring multiplies for 4 (n/s) (m/s) a f / P seconds and sends for 2 (m/s) a f z / L,
with P the products a second, L the bytes a second of a link in one direction and z the bytes of a
number. Both links halve the transfer of the gather, so the ring is ahead where its products take
more than half of its transfer: where a device has more than z P / (4 L) queries. That is 2,200
tokens on v5e (197 TFLOP/s, 45 GB/s) in bfloat16. It is taken as well where all keys and values
would need more than GATHER_BYTES.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nvs_common import attention, sharding
from nvs_common.attention import chunked, pallas_tpu
from nvs_common.errors import InputError
from nvs_common.types import Array

AXIS = "context"
GATHER_BYTES = 2**29

# Products a second (bfloat16) and bytes a second of a link in one direction, as published.
_RATES = {
    "TPU v4": (275e12, 45e9),
    "TPU v5 lite": (197e12, 45e9),
    "TPU v5": (459e12, 90e9),
    "TPU v6 lite": (918e12, 90e9),
}
_OTHER = (989e12, 450e9)  # H100 with NVLink

# Implementations whose results can be merged, and their cotangents for some of the keys.
_GRADIENTS = {"xla": chunked.gradients, "pallas_tpu": pallas_tpu.gradients}


def context_parallel(
    q: Array,
    k: Array,
    v: Array,
    mesh: Mesh,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    exchange: str | None = None,
) -> Array:
    """`nvs_common.attention.attention` with tokens split over the mesh's axis `context`.

    Scenes are split over `data` and `fsdp`, heads over `tensor`, where these divide them.

    Args:
      q: [b, n, a, f].
      k: [b, m, a, f].
      v: [b, m, a, f].
      mesh: with the axes of `nvs_common.sharding`.
      scale: factor on the logits, 1 / sqrt(f) by default.
      implementation: on each device, as in `attention`; the ring has "xla" and "pallas_tpu".
      exchange: "ring" or "gather"; by default what `choose` says.

    Returns:
      [b, n, a, f] of the type of v, split as q.

    Raises:
      InputError: the axis does not divide the tokens, or an unknown exchange.
      NotImplementedError: an implementation that the ring does not have.
    """
    chex.assert_rank([q, k, v], 4)
    attention.check_name(implementation)
    size = mesh.shape[AXIS]
    if q.shape[1] % size or k.shape[1] % size:
        raise InputError(
            f"attention over {size} devices of mesh axis {AXIS!r}: {q.shape[1]} queries and "
            f"{k.shape[1]} keys must be multiples of {size}; pad the tokens or change config.mesh."
        )
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    spec = _spec(q.shape, mesh)
    if exchange is None:
        exchange = choose(_local(q, spec, mesh), _local(k, spec, mesh), size, _kind(mesh))
    if exchange == "gather":
        one = functools.partial(_gather, scale=factor, implementation=implementation)
    elif exchange == "ring":
        name = implementation or "xla"
        if name not in _GRADIENTS:
            raise NotImplementedError(
                f"attention implementation {name!r} is not one of those the ring has, "
                f"{sorted(_GRADIENTS)}; use exchange='gather'."
            )
        one = lambda q, k, v: _ring(q, k, v, factor, size, name)[0]  # noqa: E731
    else:
        raise InputError(f"exchange {exchange!r} is unknown; choose 'ring', 'gather' or None.")
    split = jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return split(q, k, v)


def choose(q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct, size: int, kind: str) -> str:
    """ "ring" or "gather", from the arithmetic above.

    Args:
      q: what a device has of the queries, [b, n, a, f].
      k: what it has of the keys.
      size: devices of the axis.
      kind: of the devices, as in jax.Device.device_kind.
    """
    gathered = 2 * size * math.prod(k.shape) * k.dtype.itemsize
    products, link = _RATES.get(kind, _OTHER)
    enough = k.dtype.itemsize * products / (4 * link)
    return "ring" if size > 1 and (gathered > GATHER_BYTES or q.shape[1] > enough) else "gather"


def _gather(q: Array, k: Array, v: Array, *, scale: float, implementation: str | None) -> Array:
    k, v = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (k, v))
    return attention.attention(q, k, v, scale=scale, implementation=implementation)


def _ring_values(
    q: Array, k: Array, v: Array, scale: float, size: int, name: str
) -> tuple[Array, Array]:
    """The output and log-denominators of a device's queries, all in float32 until the end."""
    attend = functools.partial(attention.with_log_sum, q, scale=scale, implementation=name)

    def wide(part: attention.Partial) -> attention.Partial:
        return part._replace(out=part.out.astype(part.log_sum.dtype))

    def step(carry: Any, _: None) -> tuple[Any, None]:
        k, v, part = carry
        ahead = _send((k, v), size)  # while these are attended to
        return (*ahead, attention.merge_partial([part, wide(attend(k, v))])), None

    part = wide(attend(k, v))
    if size > 1:
        carry = (*_send((k, v), size), part)
        (k, v, part), _ = jax.lax.scan(step, carry, None, length=size - 2)
        part = attention.merge_partial([part, wide(attend(k, v))])
    return part.out.astype(v.dtype), part.log_sum


def _ring_forward(q: Array, k: Array, v: Array, scale: float, size: int, name: str):
    out, log_sum = _ring_values(q, k, v, scale, size, name)
    return (out, log_sum), (q, k, v, out, log_sum)


def _ring_backward(scale: float, size: int, name: str, saved, cotangents):
    q, k, v, out, log_sum = saved
    wide = log_sum.dtype

    def add(k: Array, v: Array, sums: Any) -> Any:
        grads = _GRADIENTS[name]((q, k, v, out, log_sum), cotangents, scale)
        return jax.tree.map(lambda total, grad: total + grad.astype(wide), sums, grads)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        k, v, sums = carry
        ahead = _send((k, v), size)
        d_q, *of_keys = add(k, v, sums)
        return (*ahead, (d_q, *_send(of_keys, size))), None

    sums = tuple(jnp.zeros(x.shape, wide) for x in (q, k, v))
    # The last step sends cotangents home, and no keys.
    (k, v, sums), _ = jax.lax.scan(step, (k, v, sums), None, length=size - 1)
    d_q, *of_keys = add(k, v, sums)
    sums = (d_q, *_send(of_keys, size))
    return tuple(x.astype(like.dtype) for x, like in zip(sums, (q, k, v), strict=True))


_ring: Any = jax.custom_vjp(_ring_values, nondiff_argnums=(3, 4, 5))
_ring.defvjp(_ring_forward, _ring_backward)


def _send(arrays: Any, size: int) -> Any:
    """What the neighbour before this device has."""
    to_next = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, to_next), arrays)


def _spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    """Scenes over data and fsdp, tokens over context, heads over tensor, where these divide."""
    scenes, heads = sharding.RULES["act_batch"], sharding.RULES["act_heads"]
    fits = lambda dim, axes: dim % math.prod(mesh.shape[name] for name in axes) == 0  # noqa: E731
    assert isinstance(scenes, tuple) and isinstance(heads, str)
    scenes = scenes if fits(shape[0], scenes) else None
    return P(scenes, AXIS, heads if fits(shape[2], (heads,)) else None)


def _local(x: Array, spec: P, mesh: Mesh) -> jax.ShapeDtypeStruct:
    local = jax.sharding.NamedSharding(mesh, spec).shard_shape(x.shape)
    return jax.ShapeDtypeStruct(local, x.dtype)


def _kind(mesh: Mesh) -> str:
    return mesh.devices.flat[0].device_kind
