"""Published VQGAN weights: names of diffusers, taming-transformers and latent diffusion, and back.

All are brought to the names of diffusers' VQModel, which the table `_RULES` makes of ours.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from nvs_common.errors import InputError
from nvs_common.types import Variables
from vqnerf_jax import state_dicts, vqgan

KIND = "a VQGAN"
NAMES = ("diffusers", "taming")
# A checkpoint of latent diffusion holds the auto-encoder of its first stage under this name.
_FIRST_STAGE = "first_stage_model."
# The discriminator and perceptual network of training, averages beside the weights, remapping.
_IGNORED = re.compile(r"(.*\.)?(loss|model_ema|optimizer_states|callbacks|lr_schedulers)\..*")

# Ours -> diffusers, in the order of application; L is replaced by the number of levels.
_RULES = (
    (r"^(encoder)/level_(\d+)/", r"\1.down_blocks.\2."),
    (r"^(encoder)/down_(\d+)/", r"\1.down_blocks.\2.downsamplers.0.conv."),
    (r"/mid/", ".mid_block."),
    (r"/norm_out/", ".conv_norm_out."),
    (r"^codebook/embedding$", "quantize.embedding.weight"),
    (r"block_(\d+)/", r"resnets.\1."),
    (r"attention_(\d+)/", r"attentions.\1."),
    (r"shortcut/", "conv_shortcut/"),
    (r"(attentions\.\d+\.)norm/", r"\1group_norm/"),
    (r"(attentions\.\d+\.)(query|key|value)/", lambda m: f"{m[1]}to_{m[2][0]}/"),
    (r"(attentions\.\d+\.)output/", r"\1to_out.0/"),
    (r"(kernel|scale)$", "weight"),
    (r"/", "."),
)
# taming -> diffusers, but for the order of the decoder's levels.
_TAMING = (
    (r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d+)\.attn\.(\d+)\.", r".down_blocks.\1.attentions.\2."),
    (r"\.down\.(\d+)\.downsample\.conv\.", r".down_blocks.\1.downsamplers.0.conv."),
    (r"\.up\.(\d+)\.block\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.up\.(\d+)\.attn\.(\d+)\.", r".up_blocks.\1.attentions.\2."),
    (r"\.up\.(\d+)\.upsample\.conv\.", r".up_blocks.\1.upsamplers.0.conv."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
# Names that diffusers gave attention before version 0.17.
_OLD_DIFFUSERS = (
    (r"(\.attentions\.\d+)\.(query|key|value)\.", lambda m: f"{m[1]}.to_{m[2][0]}."),
    (r"(\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
)
_BACK_TO_TAMING = (
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".down.\1.block.\2."),
    (r"\.down_blocks\.(\d+)\.attentions\.(\d+)\.", r".down.\1.attn.\2."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.conv\.", r".down.\1.downsample.conv."),
    (r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r".up.\1.block.\2."),
    (r"\.up_blocks\.(\d+)\.attentions\.(\d+)\.", r".up.\1.attn.\2."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.conv\.", r".up.\1.upsample.conv."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)
# Fields of published configurations that change nothing here.
_SILENT = (
    *("_class_name", "_diffusers_version", "sample_size", "scaling_factor", "force_upcast"),
    *("lookup_from_codebook", "dropout", "resolution", "attn_resolutions", "resamp_with_conv"),
    "attn_type",
)


def load_vqgan(
    source: str | os.PathLike[str] | Mapping[str, Any], **config: Any
) -> tuple[vqgan.VQGAN, Variables]:
    """Makes a VQGAN and its variables from published weights.

    Args:
      source: a file that `nvs_common.torch_weights` reads, or name -> array, with names of
        diffusers' VQModel, of taming-transformers or of latent diffusion.
      **config: fields of `VQGAN` that arrays do not tell (`groups`, 32 by default; `beta_on`,
        `dtype`, ...), or those of a published configuration (`norm_num_groups`,
        `num_vq_embeddings`, ..., `ch_mult`, `n_embed`, ...), which are compared with the arrays.

    Returns:
      The module and {"params": ...} in float32; float64 where the arrays and JAX are.

    Raises:
      InputError: a file that cannot be read, arrays that are missing, unknown or misshapen, or
        options that are unknown or contradict the arrays.
    """
    name, found = state_dicts.arrays(source, wanted=lambda key: not _IGNORED.fullmatch(key))
    if any(key.startswith(_FIRST_STAGE) for key in found):
        found = {k.removeprefix(_FIRST_STAGE): x for k, x in found.items() if _FIRST_STAGE in k}
    found = _renamed(found)
    fields = {field.name for field in dataclasses.fields(vqgan.VQGAN)} - {"parent", "name"}
    ours = {key: x for key, x in config.items() if key in fields}
    theirs = {key: x for key, x in config.items() if key not in fields and x is not None}
    if "norm_num_groups" in theirs:
        ours.setdefault("groups", theirs["norm_num_groups"])
    if "ch" in theirs and "ch_mult" in theirs:
        # Their products alone are sizes of arrays.
        width, factors = theirs.pop("ch"), theirs.pop("ch_mult")
        theirs.setdefault("block_out_channels", [width * factor for factor in factors])
    module = _module(found, name, ours)
    state_dicts.compare_config(theirs, _published_config(module), name, _SILENT)
    table = _table(module)
    found = {key: _squeezed(x, table.get(key)) for key, x in found.items()}
    state_dicts.check(found, {key: shape for key, (_, shape) in table.items()}, name, KIND)
    flat = {path: jnp.asarray(_from_torch(found[key], path)) for key, (path, _) in table.items()}
    return module, {"params": flax.traverse_util.unflatten_dict(flat, sep="/")}


def vqgan_to_torch(
    module: vqgan.VQGAN, variables: Variables, names: str = "diffusers"
) -> dict[str, np.ndarray]:
    """The state_dict of variables, name -> array: the inverse of `load_vqgan`.

    Args:
      module: a VQGAN with a codebook.
      variables: its parameters, and running means if its codes are those.
      names: "diffusers" or "taming", which latent diffusion shares.

    Raises:
      InputError: other names, or a module that the published code has not.
    """
    if names not in NAMES:
        raise InputError(f"names={names!r}; choose from {NAMES}.")
    if module.quantizer != "vq":
        raise InputError(f"quantizer={module.quantizer!r}: the published code has a codebook.")
    flat = flax.traverse_util.flatten_dict(dict(variables["params"]), sep="/")
    if module.update == "ema":
        flat["codebook/embedding"] = variables["codes"]["codebook"]["state"].codes
    plain = module.clone(update="gradient", restart_below=0.0, kmeans_steps=0)
    table = _table(plain)
    state = {key: _to_torch(np.asarray(flat[path]), path) for key, (path, _) in table.items()}
    if names == "diffusers":
        return state
    return {_to_taming(key, module): _as_taming(key, x) for key, x in state.items()}


def _renamed(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays with names of diffusers."""
    numbers = [re.match(r"decoder\.up\.(\d{1,3})\.", key) for key in found]
    levels = max((int(match[1]) + 1 for match in numbers if match), default=0)
    renamed = {}
    for key, x in found.items():
        key = _apply((*_TAMING, *_OLD_DIFFUSERS), key)
        if levels:
            key = re.sub(
                r"(decoder\.up_blocks)\.(\d+)", lambda m: f"{m[1]}.{levels - 1 - int(m[2])}", key
            )
        renamed[key] = x
    return renamed


def _apply(rules: Any, key: str) -> str:
    for pattern, new in rules:
        key = re.sub(pattern, new, key)
    return key


def _module(found: Mapping[str, np.ndarray], name: str, given: Mapping[str, Any]) -> vqgan.VQGAN:
    """The module that has arrays of these shapes."""

    def shape(key: str, rank: int = 4) -> tuple[int, ...]:
        return state_dicts.get(found, key, rank, name, KIND).shape

    def count(pattern: str) -> int:
        numbers = (re.match(pattern, key) for key in found)
        return max((int(match[1]) + 1 for match in numbers if match), default=1)

    levels = count(r"encoder\.down_blocks\.(\d{1,2})\.")
    keys = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(levels)]
    num_codes, code_width = shape("quantize.embedding.weight", 2)
    attends = [
        tuple(i for i in range(levels) if f"{where(i)}.attentions.0.to_q.weight" in found)
        for where in (
            lambda i: f"encoder.down_blocks.{i}",
            lambda i: f"decoder.up_blocks.{levels - 1 - i}",
        )
    ]
    sizes: dict[str, Any] = dict(
        channels=tuple(shape(key)[0] for key in keys),
        blocks=count(r"encoder\.down_blocks\.0\.resnets\.(\d{1,2})\."),
        latent_channels=shape("encoder.conv_out.weight")[0],
        num_codes=num_codes,
        code_width=code_width,
        in_channels=shape("encoder.conv_in.weight")[1],
        out_channels=shape("decoder.conv_out.weight")[0],
        mid_attention="encoder.mid_block.attentions.0.to_q.weight" in found,
        encoder_attention=attends[0],
        decoder_attention=attends[1],
    )
    state_dicts.compare_config({k: x for k, x in given.items() if k in sizes}, sizes, name)
    groups = given.get("groups", 32)
    if bad := [width for width in sizes["channels"] if width % groups]:
        raise InputError(
            f"{name}: {groups} groups do not divide channels {bad}, and arrays do not tell the "
            "number of groups; pass groups=..., the norm_num_groups of the published config."
        )
    return vqgan.VQGAN(**{**sizes, **given})


def _published_config(module: vqgan.VQGAN) -> dict[str, Any]:
    """What configurations of diffusers and taming say of such a module."""
    levels = len(module.channels)
    down = ["AttnDown" if i in module.encoder_attention else "Down" for i in range(levels)]
    up = ["AttnUp" if i in module.decoder_attention else "Up" for i in range(levels)][::-1]
    first = module.channels[0]
    return dict(
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        down_block_types=[f"{kind}EncoderBlock2D" for kind in down],
        up_block_types=[f"{kind}DecoderBlock2D" for kind in up],
        block_out_channels=list(module.channels),
        layers_per_block=module.blocks,
        latent_channels=module.latent_channels,
        num_vq_embeddings=module.num_codes,
        norm_num_groups=module.groups,
        vq_embed_dim=module.code_width,
        norm_type="group",
        act_fn="silu",
        mid_block_add_attention=module.mid_attention,
        **dict.fromkeys(("double_z", "tanh_out", "give_pre_end", "use_linear_attn"), False),
        z_channels=module.latent_channels,
        out_ch=module.out_channels,
        ch=first,
        ch_mult=[width // first for width in module.channels],
        num_res_blocks=module.blocks,
        n_embed=module.num_codes,
        embed_dim=module.code_width,
    )


def _table(module: vqgan.VQGAN) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in diffusers -> our path and the array's shape there."""
    image = jax.ShapeDtypeStruct((1, module.factor, module.factor, module.in_channels), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    levels, table = len(module.channels), {}
    flat: Any = flax.traverse_util.flatten_dict(shapes, sep="/")
    for path, leaf in flat.items():
        key = re.sub(
            r"^decoder/(level|up)_(\d+)/",
            lambda m: (
                f"decoder.up_blocks.{levels - 1 - int(m[2])}."
                + ("upsamplers.0.conv." if m[1] == "up" else "")
            ),
            path,
        )
        key, shape = _apply(_RULES, key), leaf.shape
        if len(shape) == 4:
            shape = (shape[3], shape[2], shape[0], shape[1])
        elif len(shape) == 2 and path.endswith("kernel"):
            shape = shape[::-1]
        table[key] = (path, shape)
    return table


def _squeezed(x: np.ndarray, entry: tuple[str, tuple[int, ...]] | None) -> np.ndarray:
    """Attention's 1x1 convolutions (c, c, 1, 1) as matrices."""
    if entry is not None and x.ndim == 4 and len(entry[1]) == 2 and x.shape[2:] == (1, 1):
        return x[:, :, 0, 0]
    return x


def _from_torch(x: np.ndarray, path: str) -> np.ndarray:
    """Convolutions OIHW to HWIO, matrices (out, in) transposed; codes are no matrix."""
    if x.ndim == 4:
        return x.transpose(2, 3, 1, 0)
    return x.T if path.endswith("kernel") else x


def _to_torch(x: np.ndarray, path: str) -> np.ndarray:
    if x.ndim == 4:
        return np.ascontiguousarray(x.transpose(3, 2, 0, 1))
    return np.ascontiguousarray(x.T if path.endswith("kernel") else x)


def _to_taming(key: str, module: vqgan.VQGAN) -> str:
    levels = len(module.channels)
    key = re.sub(r"(decoder\.up_blocks)\.(\d+)", lambda m: f"{m[1]}.{levels - 1 - int(m[2])}", key)
    return _apply(_BACK_TO_TAMING, key)


def _as_taming(key: str, x: np.ndarray) -> np.ndarray:
    return x[:, :, None, None] if ".attentions." in key and x.ndim == 2 else x
