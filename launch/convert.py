"""Converts published weights.

    python launch/convert.py --model=lvsm --input=x.pt --output=DIR
    python launch/convert.py --model=depth_decoder --input=svd.safetensors --output=DIR

The second reads the autoencoder of Stable Video Diffusion; with --config.init_from=DIR/weights.npz
the training of the depth-guided decoder starts from it.

Writes DIR/weights.npz, which launch/render.py and evaluate.py take as --weights=DIR/weights.npz
where it holds a whole model, and DIR/weights.md. Reads .pt, .pth and .ckpt (without PyTorch, and
without running anything that is in them), .safetensors and .npz. Sizes are read off the arrays;
resolution, inputs and the treatment of poses come from --settings.

Published weights keep the licence of their authors, also after the conversion: for LVSM's that is
CC BY-NC-SA 4.0, no commercial use. Whether your use is within it is for you to check.
Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import hashlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

# launch/ and configs/ belong to the checkout and are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from absl import flags

import depth_decoder_jax
import lvsm_jax
from launch import cli
from nvs_common import outputs, weights
from nvs_common.errors import InputError
from nvs_common.types import Variables

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAME = "weights.npz"


class Converted(NamedTuple):
    """What a converter makes of a file.

    Attributes:
      variables: {"params": ...}.
      model: the fields of `config.model` that the arrays tell.
      config: the config file and variant to start from where the user names none.
      licence: sentence about the licence of published weights.
    """

    variables: Variables
    model: dict[str, Any]
    config: str
    licence: str


def _lvsm(path: str) -> Converted:
    module, variables = lvsm_jax.load_torch(path)
    fields = {name: getattr(module, name) for name in ("width", "head_size", "patch", "mlp_ratio")}
    if isinstance(module, lvsm_jax.LVSMEncoderDecoder):
        architecture, own = "encoder_decoder", ("encoder_layers", "decoder_layers", "latents")
    else:
        architecture, own = "decoder_only", ("layers",)
    fields |= {"architecture": architecture} | {name: getattr(module, name) for name in own}
    return Converted(
        variables,
        fields,
        f"configs/lvsm.py:scene_{architecture}_256",
        "LVSM's published weights are CC BY-NC-SA 4.0 (no commercial use)",
    )


def _depth_decoder(path: str) -> Converted:
    module, variables = depth_decoder_jax.load_svd(path)
    names = ("channels", "num_resnets", "num_mid", "latent_channels")
    return Converted(
        {"params": {"vae": variables["params"]}},
        {"vae": {name: getattr(module, name) for name in names}},
        "configs/depth_decoder.py:svd",
        "Stable Video Diffusion's published weights have a licence of their own (LICENSE-SVD)",
    )


# Name of a system -> the converter of its published weights.
CONVERTERS: dict[str, Callable[[str], Converted]] = {
    "depth_decoder": _depth_decoder,
    "lvsm": _lvsm,
}

_MODEL = flags.DEFINE_enum("model", None, sorted(CONVERTERS), "Whose weights.", required=True)
_INPUT = flags.DEFINE_string(
    "input", None, "File of weights: .pt, .pth, .ckpt, .safetensors or .npz.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, f"Folder to write {NAME} into.", required=True)
_START = flags.DEFINE_string(
    "settings",
    "",
    "Config file and variant that say all but the sizes of the model, for example "
    "configs/lvsm.py:scene_decoder_only_512; the 256 setting of the architecture by default.",
)


def main(_) -> int:
    """Converts; returns the exit code."""
    folder = pathlib.Path(_OUTPUT.value)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output={folder} is a file; name a folder.")
    out = weights.check_path(folder / NAME)
    if out.exists():
        raise InputError(f"{out} is already there; name another --output, or remove the file.")
    converted = CONVERTERS[_MODEL.value](_INPUT.value)
    config = _config(_START.value or str(ROOT / converted.config), converted)
    source = pathlib.Path(_INPUT.value)
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    training = {"converted from": source.name, "SHA-256": digest, "licence": converted.licence}
    weights.write(out, weights.Weights(config, converted.variables, 0, training))
    card = out.with_suffix(".md")
    outputs.write_text(card, _card(source.name, digest, converted))
    count = weights.num_values(converted.variables)
    kind = converted.model.get("architecture", config.system)
    print(f"{out}: {kind}, {count:,} parameters")
    print(f"Licence: {converted.licence}; that your use is within it is for you to check.")
    return 0


def _config(value: str, converted: Converted) -> Any:
    """The named config with the model's sizes.

    Raises:
      InputError: no such config, one of another system, or of another architecture.
    """
    config: Any = cli.load_config(value)
    if config.system != _MODEL.value:
        raise InputError(f"--settings={value}: a config of {config.system}, not {_MODEL.value}.")
    for name, field in converted.model.items():
        if name not in config.model:
            raise InputError(
                f"--settings={value}: its model has no field {name!r}, so it is of another "
                f"architecture than {_INPUT.value}, {converted.model.get('architecture', '')}."
            )
        if isinstance(field, dict):
            config.model[name].update(field)
        else:
            config.model[name] = field
    return config


def _card(source: str, digest: str, converted: Converted) -> str:
    facts = "\n".join(f"- {name}: {field}" for name, field in converted.model.items())
    return f"""# Weights of {_MODEL.value}, converted from `{source}`

Licence: {converted.licence}.
Converting does not change it; that your use is within it is for you to check.

SHA-256 of `{source}`: `{digest}`

{facts}
"""


if __name__ == "__main__":
    cli.run(main)
