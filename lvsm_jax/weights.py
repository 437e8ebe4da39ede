"""Published LVSM weights: from the names and layouts of PyTorch to this library's, and back.

The licence of published weights (CC BY-NC-SA 4.0 for those of the authors) stays with them: who
converts a file answers for its use.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lvsm_jax import model, tokens
from nvs_common import torch_weights
from nvs_common.errors import InputError
from nvs_common.types import Variables

# Training writes the frozen network of its loss beside the model.
IGNORED = "loss_computer."

# Names that an error lists one by one.
MAX_LISTED = 40

_LAYER_NAMES = {
    "norm1.weight": ("attention_norm", "scale"),
    "norm2.weight": ("mlp_norm", "scale"),
    "attn.q_norm.weight": ("query_norm", "scale"),
    "attn.k_norm.weight": ("key_norm", "scale"),
    "attn.to_qkv.weight": ("query", "kernel"),  # and key_value
    "attn.fc.weight": ("output", "kernel"),
    "mlp.mlp.0.weight": ("mlp_in", "kernel"),
    "mlp.mlp.2.weight": ("mlp_out", "kernel"),
}
_SHARED_NAMES = {
    "image_tokenizer.1.weight": ("image_tokenizer", "kernel"),
    "target_pose_tokenizer.1.weight": ("target_tokenizer", "kernel"),
    "image_token_decoder.0.weight": ("head_norm", "scale"),
    "image_token_decoder.1.weight": ("head", "kernel"),
}
# Of each kind: the stacks by their published names, and the norm of the tokens.
_STACKS = {
    model.LVSM: {"transformer_blocks": "blocks"},
    model.LVSMEncoderDecoder: {"transformer_encoder": "encoder", "transformer_decoder": "decoder"},
}
_INPUT_NORM = {
    model.LVSM: "transformer_input_layernorm.weight",
    model.LVSMEncoderDecoder: "transformer_input_layernorm_decoder.weight",
}
# Options that a state_dict does not tell.
_PUBLISHED = {"scale_residuals": False, "relative": "none", "input_sees_target": True}
_LATENTS = "n_light_field_latent"


def load_torch(
    source: str | os.PathLike[str] | Mapping[str, Any],
) -> tuple[model.LVSM | model.LVSMEncoderDecoder, Variables]:
    """Makes a module and its variables from published weights.

    Args:
      source: a file that `nvs_common.torch_weights` reads (.pt, .ckpt, .safetensors, .npz), or
        what is in it: name -> array, perhaps inside {"model": ...}.

    Returns:
      The module, every size of which is read off the arrays, and {"params": ...} in float32.

    Raises:
      InputError: a file that cannot be read, or arrays that are missing, unknown or misshapen.
    """
    if isinstance(source, Mapping):
        name, content = "the mapping", dict(source)
    else:
        name, content = str(source), torch_weights.read(source, wanted=_wanted)
    arrays = _arrays(content, name)
    module = _module(arrays, name)
    _check(arrays, _expected(module), name)
    params: dict[str, Any] = {
        path[0]: {path[1]: _from_torch(arrays[key])} for key, path in _SHARED_NAMES.items()
    }
    params["input_norm"] = {"scale": _from_torch(arrays[_INPUT_NORM[type(module)]])}
    if isinstance(module, model.LVSMEncoderDecoder):
        params["latents"] = jnp.asarray(arrays[_LATENTS])
    for theirs, ours in _STACKS[type(module)].items():
        params[ours] = _stack(arrays, theirs, module.head_size)
    return module, {"params": params}


def to_torch(
    module: model.LVSM | model.LVSMEncoderDecoder, variables: Variables
) -> dict[str, np.ndarray]:
    """The state_dict of variables, name -> float32 array: the inverse of `load_torch`.

    Raises:
      InputError: the module has parts that the published models lack.
    """
    if type(module) not in _STACKS:
        raise InputError(f"{type(module).__name__}: the published code has no such model.")
    for name, published in _PUBLISHED.items():
        if getattr(module, name, published) != published:
            raise InputError(
                f"{name}={getattr(module, name)!r}: the published code would read these weights as "
                f"those of another model ({name}={published!r})."
            )
    params = variables["params"]
    state = {key: _to_torch(params[a][b]) for key, (a, b) in _SHARED_NAMES.items()}
    state[_INPUT_NORM[type(module)]] = _to_torch(params["input_norm"]["scale"])
    if isinstance(module, model.LVSMEncoderDecoder):
        state[_LATENTS] = np.asarray(params["latents"])
    for theirs, ours in _STACKS[type(module)].items():
        state |= _unstack(params[ours], theirs)
    return state


def _wanted(name: str) -> bool:
    """Whether an array of a file is the model's: not the loss's, nor the optimiser's state."""
    return IGNORED not in name and not name.startswith("optimizer/")


def _arrays(content: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint's content, without wrappers and what is not the model's."""
    while isinstance(content.get("model"), Mapping):
        content = content["model"]
    arrays = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise InputError(f"{name}: {key!r} is no name of an array; expected a state_dict.")
        short = torch_weights.unwrapped(key)
        if short.startswith(IGNORED):
            continue
        if short in arrays:
            raise InputError(f"{name}: {short} is there twice, with and without 'module.'.")
        arrays[short] = torch_weights.floats(value, f"{name}: {key}", np.float32)
    return arrays


def _module(arrays: Mapping[str, np.ndarray], name: str) -> Any:
    """The module that has arrays of these shapes.

    Raises:
      InputError: the arrays that tell are missing or of another rank.
    """
    kind = model.LVSMEncoderDecoder if _LATENTS in arrays else model.LVSM
    stacks = {ours: _num_layers(arrays, theirs) for theirs, ours in _STACKS[kind].items()}
    first = f"{next(iter(_STACKS[kind]))}.0"
    telling = {
        "image_token_decoder.1.weight": 2,
        f"{first}.attn.q_norm.weight": 1,
        f"{first}.mlp.mlp.0.weight": 2,
    }
    if kind is model.LVSMEncoderDecoder:
        telling[_LATENTS] = 2
    for key, rank in telling.items():
        if key not in arrays or arrays[key].ndim != rank:
            found = f"shape {arrays[key].shape}" if key in arrays else "no such array"
            raise InputError(
                f"{name}: expected {key} of rank {rank}, found {found}; this is no LVSM that the "
                "published code has written."
            )
    rows, width = arrays["image_token_decoder.1.weight"].shape
    (head_size,) = arrays[f"{first}.attn.q_norm.weight"].shape
    patch = math.isqrt(rows // 3)
    if rows != 3 * patch**2 or 0 in (rows, width, head_size) or width % head_size:
        raise InputError(
            f"{name}: image_token_decoder.1.weight is ({rows}, {width}) and heads have "
            f"{head_size} features; expected (3 p p, d) with d a multiple of the head's."
        )
    hidden = arrays[f"{first}.mlp.mlp.0.weight"].shape[0]
    ratio = hidden / width
    sizes = dict(width=width, head_size=head_size, patch=patch, mlp_ratio=ratio)
    if kind is model.LVSM:
        return model.LVSM(layers=stacks["blocks"], **sizes)
    return model.LVSMEncoderDecoder(
        encoder_layers=stacks["encoder"],
        decoder_layers=stacks["decoder"],
        latents=arrays[_LATENTS].shape[0],
        **sizes,
    )


def _num_layers(arrays: Iterable[str], stack: str) -> int:
    """One more than the highest layer that has a name; what is missing below is found later."""
    found = (re.match(rf"{stack}\.(\d{{1,4}})\.", key) for key in arrays)
    return max((int(match[1]) + 1 for match in found if match), default=1)


def _expected(module: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state_dict of a module."""
    d, area = module.width, module.patch**2
    hidden = round(d * module.mlp_ratio)
    shapes: dict[str, tuple[int, ...]] = {
        "image_tokenizer.1.weight": (d, area * tokens.POSED_CHANNELS),
        "target_pose_tokenizer.1.weight": (d, area * tokens.RAY_CHANNELS),
        "image_token_decoder.0.weight": (d,),
        "image_token_decoder.1.weight": (3 * area, d),
        _INPUT_NORM[type(module)]: (d,),
    }
    if isinstance(module, model.LVSMEncoderDecoder):
        shapes[_LATENTS] = (module.latents, d)
    layer = {
        "norm1.weight": (d,),
        "norm2.weight": (d,),
        "attn.q_norm.weight": (module.head_size,),
        "attn.k_norm.weight": (module.head_size,),
        "attn.to_qkv.weight": (3 * d, d),
        "attn.fc.weight": (d, d),
        "mlp.mlp.0.weight": (hidden, d),
        "mlp.mlp.2.weight": (d, hidden),
    }
    for theirs, ours in _STACKS[type(module)].items():
        count = module.layers if ours == "blocks" else getattr(module, f"{ours}_layers")
        shapes |= {f"{theirs}.{i}.{key}": s for i in range(count) for key, s in layer.items()}
    return shapes


def _check(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, Any], name: str) -> None:
    missing, unknown = sorted(shapes.keys() - arrays), sorted(arrays.keys() - shapes)
    if missing or unknown:
        raise InputError(
            f"{name}: not the arrays of an LVSM; missing: {_listed(missing)}; unknown: "
            f"{_listed(unknown)}."
        )
    for key, shape in shapes.items():
        if arrays[key].shape != shape:
            raise InputError(f"{name}: {key} has shape {arrays[key].shape}, expected {shape}.")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return (", ".join(names[:MAX_LISTED]) or "none") + more


def _stack(arrays: Mapping[str, np.ndarray], stack: str, head_size: int) -> dict[str, Any]:
    """The parameters of a stack, layers on axis 0."""
    params: dict[str, Any] = {}
    for key, (name, leaf) in _LAYER_NAMES.items():
        count = _num_layers(arrays, stack)
        params[name] = {leaf: np.stack([arrays[f"{stack}.{i}.{key}"] for i in range(count)])}
    # Rows of to_qkv are q, k, v, each head after head.
    num_layers, rows, width = params["query"]["kernel"].shape
    heads = rows // 3 // head_size
    qkv = params["query"]["kernel"].transpose(0, 2, 1)
    qkv = qkv.reshape(num_layers, width, 3, heads, head_size)
    out = params["output"]["kernel"].transpose(0, 2, 1)
    out = out.reshape(num_layers, heads, head_size, width)
    kernels = {"query": qkv[:, :, 0], "key_value": qkv[:, :, 1:], "output": out}
    for name in ("mlp_in", "mlp_out"):
        kernels[name] = params[name]["kernel"].transpose(0, 2, 1)
    params |= {name: {"kernel": kernel} for name, kernel in kernels.items()}
    return {name: {k: jnp.asarray(x) for k, x in entry.items()} for name, entry in params.items()}


def _unstack(params: Mapping[str, Any], stack: str) -> dict[str, np.ndarray]:
    """The inverse of `_stack`."""
    plain = {name: np.asarray(x) for name, entry in params.items() for x in entry.values()}
    num_layers, width = plain["query"].shape[:2]
    qkv = np.concatenate([plain["query"][:, :, None], plain["key_value"]], axis=2)
    plain["query"] = qkv.reshape(num_layers, width, 3 * width)
    plain["output"] = plain["output"].reshape(num_layers, width, width)
    state = {}
    for key, (name, _) in _LAYER_NAMES.items():
        for i in range(num_layers):
            state[f"{stack}.{i}.{key}"] = _to_torch(plain[name][i])
    return state


def _from_torch(x: np.ndarray) -> Any:
    """A vector as it is, a matrix (out, in) transposed."""
    return jnp.asarray(x.T)


def _to_torch(x: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(x).T)
