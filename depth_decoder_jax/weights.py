"""Published weights of the Stable Video Diffusion autoencoder, to this library's names and back.

Two sets of names are in use: those of diffusers' AutoencoderKLTemporalDecoder and those of sgm,
in which the released .safetensors of the whole diffusion model are written. Who converts a file
answers for its licence.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from depth_decoder_jax import vae
from nvs_common import sharding, torch_weights
from nvs_common.errors import InputError
from nvs_common.types import Variables

# The autoencoder's part of a file that holds a whole diffusion model.
PREFIXES = ("first_stage_model.", "vae.")

# Names that an error lists one by one.
MAX_LISTED = 40

# From our names to those of diffusers, in this order.
_TO_DIFFUSERS = (
    (r"/(kernel|scale)$", ".weight"),
    (r"/bias$", ".bias"),
    (r"/mix_factor$", "/time_mixer.mix_factor"),
    (r"(down|up)_(\d+)/", r"\1_blocks.\2/"),
    (r"(down|up)sample/", r"\1samplers.0/"),
    (r"resnet_(\d+)/", r"resnets.\1/"),
    (r"(spatial|temporal)/", r"\1_res_block/"),
    (r"/shortcut\.", "/conv_shortcut."),
    (r"/norm_out\.", "/conv_norm_out."),
    (r"mid/", "mid_block/"),
    (r"attention/norm\.", "attention/group_norm."),
    (r"attention/output\.", "attention/to_out.0."),
    (r"attention/(q|k|v)[a-z]+\.", r"attention/to_\1."),
    (r"attention/", "attentions.0/"),
    (r"/", "."),
)
# From the names of diffusers to those of sgm; levels of the decoder are counted from the finest.
_TO_SGM = (
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.time_conv_out\.", ".conv_out.time_mix_conv."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.(down|up)_blocks\.(\d+)\.resnets\.", r".\1.\2.block."),
    (r"\.(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.", r".\1.\2.\3sample."),
    (r"\.spatial_res_block\.", "."),
    (r"\.temporal_res_block\.norm1\.", ".time_stack.in_layers.0."),
    (r"\.temporal_res_block\.conv1\.", ".time_stack.in_layers.2."),
    (r"\.temporal_res_block\.norm2\.", ".time_stack.out_layers.0."),
    (r"\.temporal_res_block\.conv2\.", ".time_stack.out_layers.3."),
    (r"\.time_mixer\.mix_factor", ".mix_factor"),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)
# Names that older exports of diffusers use.
_OLDER = (
    (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
    (r"\.downsamplers\.0\.op\.", ".downsamplers.0.conv."),
)
# Where sizes are read: first convolution of a level of the encoder, and blocks in the middle.
_TELLING = {
    "diffusers": (r"encoder\.down_blocks\.{}\.resnets\.{}\.conv1\.weight", "mid_block.resnets.{}."),
    "sgm": (r"encoder\.down\.{}\.block\.{}\.conv1\.weight", "mid.block_{}."),
}


def load_svd(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[vae.SVDVAE, Variables]:
    """Makes the autoencoder and its variables from published weights.

    Args:
      source: a file that `nvs_common.torch_weights` reads (.safetensors, .bin, .pt, .ckpt, .npz),
        or what is in it: name -> array, in the names of diffusers or of sgm. Of a whole diffusion
        model the arrays under "first_stage_model." or "vae." are taken. Where there is no
        quant_conv, which sgm's engine has not, it is the identity.

    Returns:
      The module, every size of which is read off the arrays, and {"params": ...} in float32.

    Raises:
      InputError: a file that cannot be read, or arrays that are missing, unknown or misshapen.
    """
    if isinstance(source, Mapping):
        name, content = "the mapping", dict(source)
    else:
        name, content = str(source), torch_weights.read(source)
    arrays = _arrays(content, name)
    naming = "sgm" if any(".mid.block_" in key for key in arrays) else "diffusers"
    module = _module(arrays, naming, name)
    if naming == "sgm" and not any(key.startswith("quant_conv.") for key in arrays):
        size = 2 * module.latent_channels
        arrays["quant_conv.weight"] = np.eye(size, dtype=np.float32)[:, :, None, None]
        arrays["quant_conv.bias"] = np.zeros(size, np.float32)
    tree = _shapes(module)
    names = _names(tree, naming)
    _check(arrays, {names[path]: _published(leaf, naming) for path, leaf in tree.items()}, name)
    params: dict[str, Any] = {}
    for path, shape in tree.items():
        entry, (*parents, leaf) = params, path.split("/")
        for parent in parents:
            entry = entry.setdefault(parent, {})
        entry[leaf] = jnp.asarray(_from_torch(arrays[names[path]], shape))
    return module, {"params": params}


def to_torch(
    variables: Variables, naming: Literal["diffusers", "sgm"] = "diffusers"
) -> dict[str, np.ndarray]:
    """The state_dict of variables, name -> float32 array: the inverse of `load_svd`.

    Raises:
      InputError: an unknown naming, or a module that sgm's code has not.
    """
    if naming not in _TELLING:
        raise InputError(f"naming={naming!r}: choose from {sorted(_TELLING)}.")
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    tree = {sharding.path_name(path): np.asarray(leaf) for path, leaf in leaves}
    num_mid = _count(tree, r"decoder/mid/resnet_(\d+)/.*")
    if naming == "sgm" and num_mid != 2:
        raise InputError(f"num_mid={num_mid}: sgm's decoder has 2 blocks in its middle.")
    names = _names(tree, naming)
    return {
        names[path]: _to_torch(leaf).reshape(_published(leaf.shape, naming))
        for path, leaf in tree.items()
    }


def _arrays(content: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    """The arrays of the autoencoder among a checkpoint's content, in float32."""
    while isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    unwrapped = {torch_weights.unwrapped(str(key)): x for key, x in content.items()}
    if len(unwrapped) < len(content):
        raise InputError(f"{name}: holds arrays twice, with and without {torch_weights.WRAPPERS}.")
    content = unwrapped
    for part in PREFIXES:
        if any(key.startswith(part) for key in content):
            content = {k.removeprefix(part): x for k, x in content.items() if k.startswith(part)}
    arrays: dict[str, np.ndarray] = {}
    for key, value in content.items():
        x = torch_weights.floats(value, f"{name}: {key}", np.float32)
        for pattern, replacement in _OLDER:
            key = re.sub(pattern, replacement, key)
        if key in arrays:
            raise InputError(f"{name}: {key} is there twice, by an older name and by this one.")
        arrays[key] = x
    return arrays


def _module(arrays: Mapping[str, np.ndarray], naming: str, name: str) -> vae.SVDVAE:
    """The module that has arrays of these names and shapes.

    Raises:
      InputError: the arrays that tell are missing or of another rank.
    """
    block, middle = _TELLING[naming]
    levels = _count(arrays, block.format(r"(\d{1,3})", "0"))
    firsts = [block.format(i, 0).replace("\\", "") for i in range(levels)]
    ends = ["encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"]
    for key in firsts + ends:
        if key not in arrays or arrays[key].ndim != 4:
            found = f"no such array, but {', '.join(sorted(arrays)[:3])}, ..."
            found = f"shape {arrays[key].shape}" if key in arrays else found
            raise InputError(
                f"{name}: expected {key} of rank 4, found {found}; these are no weights of an "
                "autoencoder with a temporal decoder, in the names of diffusers or of sgm."
            )
    channels = tuple(arrays[key].shape[0] for key in firsts)
    if any(width == 0 or width % vae.SVDVAE.groups for width in channels):
        raise InputError(
            f"{name}: blocks have {channels} channels; expected multiples of {vae.SVDVAE.groups}, "
            "the number of groups of the published norms."
        )
    first_mid = 1 if naming == "sgm" else 0
    counted = _count(arrays, re.escape(f"decoder.{middle}").replace(r"\{\}", r"(\d{1,3})") + ".*")
    return vae.SVDVAE(
        channels=channels,
        num_resnets=_count(arrays, block.format("0", r"(\d{1,3})")),
        num_mid=max(counted - first_mid, 1),
        latent_channels=arrays[ends[1]].shape[1],
        in_channels=arrays[ends[0]].shape[1],
        out_channels=arrays[ends[2]].shape[0],
    )


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the highest number in the names; what is missing below is found later."""
    found = (re.fullmatch(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=1)


def _shapes(module: vae.SVDVAE) -> dict[str, tuple[int, ...]]:
    """Path and shape of every parameter of a module."""
    size = 2 ** (len(module.channels) - 1)
    images = jax.ShapeDtypeStruct((1, 1, size, size, module.in_channels), jnp.float32)
    tree = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): leaf.shape for path, leaf in leaves}


def _names(paths: Iterable[str], naming: str) -> dict[str, str]:
    """Published names of our paths."""
    paths = list(paths)
    last = _count(paths, r"decoder/up_(\d+)/.*") - 1
    names = {}
    for path in paths:
        name = path
        for pattern, replacement in _TO_DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        if naming == "sgm":
            name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up_blocks.{last - int(m[1])}", name)
            for pattern, replacement in _TO_SGM:
                name = re.sub(pattern, replacement, name)
        names[path] = name
    return names


def _published(shape: tuple[int, ...], naming: str) -> tuple[int, ...]:
    """The published shape of a parameter of ours."""
    if len(shape) == 4:
        return shape[3], shape[2], *shape[:2]
    if len(shape) == 3:
        return shape[2], shape[1], shape[0], 1, 1
    if len(shape) == 2:
        # sgm's attention is made of 1x1 convolutions.
        return (*shape[::-1], 1, 1) if naming == "sgm" else shape[::-1]
    return shape


def _from_torch(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Kernels from (out, in, ...) to (..., in, out); a vector as it is."""
    if len(shape) < 2:
        return x
    return np.ascontiguousarray(np.moveaxis(x, (1, 0), (-2, -1)).reshape(shape))


def _to_torch(x: np.ndarray) -> np.ndarray:
    return x if x.ndim < 2 else np.ascontiguousarray(np.moveaxis(x, (-2, -1), (1, 0)))


def _check(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, Any], name: str) -> None:
    missing, unknown = sorted(shapes.keys() - arrays), sorted(arrays.keys() - shapes)
    if missing or unknown:
        raise InputError(
            f"{name}: not the arrays of this autoencoder; missing: {_listed(missing)}; unknown: "
            f"{_listed(unknown)}."
        )
    for key, shape in shapes.items():
        if arrays[key].shape != tuple(shape):
            raise InputError(f"{name}: {key} has shape {arrays[key].shape}, expected {shape}.")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return (", ".join(names[:MAX_LISTED]) or "none") + more
