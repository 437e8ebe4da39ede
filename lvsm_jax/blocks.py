"""Transformer blocks of LVSM as pure functions of stacked parameters (Sec. 3.2 and 3.3).

A block is x + attention(norm(x)), then x + mlp(norm(x)); queries and keys are RMS-normalised per
head and nothing has a bias. Parameters of l layers are stacked on axis 0 and looped over by a
scan. The residual stream is float32, matrix products have the compute type.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from lvsm_jax import relative
from nvs_common import attention, layers, sharding
from nvs_common.types import Array

# {"query": {"kernel": [l, d, a, f]}, ...}, see `init`; inside a block without l.
Params: TypeAlias = Mapping[str, Mapping[str, Array]]

EPSILON = 1e-5
INITIAL_DEVIATION = 0.02

# What the backward pass finds stored, and does not compute again.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """How blocks are computed.

    Attributes:
      dtype: compute type.
      attention: implementation, see `nvs_common.attention`.
      remat: a name of REMAT_POLICIES.
      unroll: layers that are written out in the body of the loop.
      residual_scale: factor on what a block adds.
    """

    dtype: Any = jnp.float32
    attention: str | None = None
    remat: str = "none"
    unroll: int = 1
    residual_scale: float = 1.0


def init(
    key: Array, num_layers: int, width: int, head_size: int, hidden: int, depth_init: bool
) -> Params:
    """Initial parameters of a stack of blocks.

    Args:
      key: random key.
      num_layers: l.
      width: d.
      head_size: f; the number of heads a is d / f.
      hidden: width of the MLP.
      depth_init: deviations fall with the layer, 0.02 / sqrt(2 (i + 1)) in layer i; otherwise
        they are 0.02 / sqrt(2 l) in all.
    """
    depth = jnp.arange(num_layers, dtype=jnp.float32) + 1 if depth_init else float(num_layers)
    deviation = jnp.broadcast_to(INITIAL_DEVIATION / jnp.sqrt(2.0 * depth), (num_layers,))
    heads = width // head_size
    shapes = {
        "query": (width, heads, head_size),
        "key_value": (width, 2, heads, head_size),
        "output": (heads, head_size, width),
        "mlp_in": (width, hidden),
        "mlp_out": (hidden, width),
    }
    norms = {
        "attention_norm": width,
        "query_norm": head_size,
        "key_norm": head_size,
        "mlp_norm": width,
    }
    params = {name: {"scale": jnp.ones((num_layers, size))} for name, size in norms.items()}
    for (name, shape), one in zip(shapes.items(), jax.random.split(key, len(shapes)), strict=True):
        normal = jax.random.normal(one, (num_layers, *shape), jnp.float32)
        params[name] = {"kernel": normal * deviation.reshape(-1, *(1,) * len(shape))}
    return params


def normalized(params: Params, name: str, x: Array, setting: Setting) -> Array:
    """The named layer norm of x [..., d], in the compute type."""
    return layers.layer_norm(x, params[name]["scale"], EPSILON).astype(setting.dtype)


def queries(params: Params, y: Array, setting: Setting, at: relative.Frames | None) -> Array:
    """Queries [..., n, a, f] of normalised tokens y [..., n, d], encoded by their frames."""
    q = _dense(y, params["query"]["kernel"], setting)
    q = layers.rms_norm(q, params["query_norm"]["scale"], EPSILON).astype(setting.dtype)
    return _constrain(relative.encode_query(q, at), "act_token", "act_heads", None)


def keys_values(
    params: Params, y: Array, setting: Setting, at: relative.Frames | None
) -> tuple[Array, Array]:
    """Keys and values [..., m, a, f] of normalised tokens y [..., m, d], encoded likewise."""
    both = _dense(y, params["key_value"]["kernel"], setting)
    k, v = both[..., 0, :, :], both[..., 1, :, :]
    k = layers.rms_norm(k, params["key_norm"]["scale"], EPSILON).astype(setting.dtype)
    k, v = (relative.encode_key_value(x, at) for x in (k, v))
    return _constrain(k, None, "act_heads", None), _constrain(v, None, "act_heads", None)


def add_attended(
    params: Params, x: Array, attended: Array, setting: Setting, at: relative.Frames | None
) -> Array:
    """x [..., n, d] plus the projection of what it attended to, [..., n, a, f]."""
    attended = relative.decode_attended(attended, at)
    return _add(x, _dense(attended, params["output"]["kernel"], setting, 2), setting)


def add_mlp(params: Params, x: Array, setting: Setting) -> Array:
    """x [..., n, d] plus the MLP of its norm; GELU is the exact one."""
    y = normalized(params, "mlp_norm", x, setting)
    hidden = _dense(y, params["mlp_in"]["kernel"], setting)
    hidden = layers.gelu(_constrain(hidden, "act_token", "act_mlp"))
    return _add(x, _dense(hidden, params["mlp_out"]["kernel"], setting), setting)


def block(
    params: Params,
    x: Array,
    setting: Setting,
    at: relative.Frames | None = None,
    keep: slice = slice(None),
) -> Array:
    """A block over tokens that all attend to each other.

    Args:
      params: of one layer.
      x: [b, n, d].
      setting: how it is computed.
      at: the tokens' frames, for relative encodings.
      keep: the tokens to return; no more than keys and values are computed of the others.

    Returns:
      [b, n, d] of the tokens to keep.
    """
    if at is None and attention.fuses_norm(setting.attention):
        return _block_with_fused_norms(params, x, setting, keep)
    return block_with_keys(params, x, setting, at, keep)[0]


def block_with_keys(
    params: Params,
    x: Array,
    setting: Setting,
    at: relative.Frames | None,
    keep: slice = slice(None),
) -> tuple[Array, tuple[Array, Array]]:
    """A block as above, and the keys and values [b, n, a, f] of all its tokens."""
    y = normalized(params, "attention_norm", x, setting)
    k, v = keys_values(params, y, setting, at)
    kept = relative.take(at, keep)
    q = queries(params, y[:, keep], setting, kept)
    attended = attention.attention(q, k, v, implementation=setting.attention)
    x = add_attended(params, x[:, keep], attended, setting, kept)
    return add_mlp(params, x, setting), (k, v)


def run(
    params: Params,
    x: Array,
    setting: Setting,
    at: relative.Frames | None = None,
    keep: slice = slice(None),
) -> Array:
    """A stack of blocks over tokens [b, n, d]; returns those to keep."""
    most, last = split(params, depth(params) - 1, 1)
    x = scan(lambda layer, x: block(layer, x, setting, at), most, x, setting)
    step = remat(lambda layer, x: block(layer, x, setting, at, keep), setting)
    return step(only(last), x)


def scan(step: Callable[[Params, Any], Any], params: Params, x: Any, setting: Setting) -> Any:
    """Applies step(parameters of a layer, x) layer after layer."""
    step = remat(step, setting, depth(params))
    unroll = max(1, min(setting.unroll, depth(params)))
    return jax.lax.scan(lambda x, layer: (step(layer, x), None), x, params, unroll=unroll)[0]


def remat(function: Callable[..., Any], setting: Setting, steps: int = 1) -> Callable[..., Any]:
    """The function of one of several steps, with the setting's policy for its backward pass."""
    if setting.remat == "none":
        return function
    # XLA could find that what is computed again is there already, and keep it; not where the two
    # passes are two loops.
    looped = setting.unroll < steps
    return jax.checkpoint(function, policy=REMAT_POLICIES[setting.remat], prevent_cse=not looped)


def depth(params: Params) -> int:
    """The number of layers of a stack."""
    return params["mlp_in"]["kernel"].shape[0]


def split(params: Params, *sizes: int) -> list[Params]:
    """Cuts a stack into stacks of the given numbers of layers."""
    leaves, structure = jax.tree.flatten(params)
    # The gradient of `split` is one concatenation; that of slices would be a sum of padded arrays.
    parts = zip(*(jax.lax.split(x, sizes) for x in leaves), strict=True)
    return [jax.tree.unflatten(structure, part) for part in parts]


def only(params: Params) -> Params:
    """The parameters of a stack's only layer."""
    return jax.tree.map(lambda x: x.reshape(x.shape[1:]), params)


def cast(params: Params, dtype: Any) -> Params:
    """The stack with kernels of the compute type, so that a loop over layers reads no more."""
    return {
        name: {leaf: x.astype(dtype) if leaf == "kernel" else x for leaf, x in entry.items()}
        for name, entry in params.items()
    }


def _block_with_fused_norms(params: Params, x: Array, setting: Setting, keep: slice) -> Array:
    """A block whose kernel of attention normalises queries and keys; their norms are not stored."""
    y = normalized(params, "attention_norm", x, setting)
    q = _constrain(
        _dense(y[:, keep], params["query"]["kernel"], setting), "act_token", "act_heads", None
    )
    both = _dense(y, params["key_value"]["kernel"], setting)
    k, v = (_constrain(both[..., i, :, :], None, "act_heads", None) for i in (0, 1))
    norm = attention.QKNorm(params["query_norm"]["scale"], params["key_norm"]["scale"], EPSILON)
    attended = attention.attention(q, k, v, norm=norm, implementation=setting.attention)
    return add_mlp(params, add_attended(params, x[:, keep], attended, setting, None), setting)


def _dense(x: Array, kernel: Array, setting: Setting, num_axes: int = 1) -> Array:
    """Contracts the last axes of x with the first ones of a kernel, in the compute type."""
    kernel = kernel.astype(setting.dtype)
    if not jax.sharding.get_abstract_mesh().empty:
        # Scenes and tokens stay apart: each may be sharded.
        return jnp.tensordot(x, kernel, num_axes)
    # As one matrix product, whose gradient needs no transposed copies on a CPU.
    size = math.prod(kernel.shape[:num_axes])
    out = x.reshape(-1, size) @ kernel.reshape(size, -1)
    return out.reshape(*x.shape[:-num_axes], *kernel.shape[num_axes:])


def _add(x: Array, branch: Array, setting: Setting) -> Array:
    branch = branch.astype(x.dtype)
    if setting.residual_scale != 1.0:
        branch = branch * setting.residual_scale
    return _constrain(x + branch, "act_token", "act_embed")


def _constrain(x: Array, *names: str | None) -> Array:
    """Lays out [b, ...] by the names of its last axes."""
    unnamed = (None,) * (x.ndim - len(names) - 1)
    return sharding.constrain(x, ("act_batch", *unnamed, *names))
