"""Evaluates a trained VQGAN on held-out images, and writes its weights for VQ-NeRF.

    python launch/reconstruct.py --workdir=runs/codes --out=report [--export=codes.npz]

Prints PSNR and SSIM of the reconstructions, and perplexity and usage of the codes over all held-out
images (--data=SOURCE for others: a source as in config.data.source, all of whose images are taken).
OUT receives pictures.png (images above, reconstructions below) and metrics.json. The exported file
has the array names of diffusers' VQModel: pass it as --config.model.vqgan_weights.
Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator
from typing import Any

# launch/ and configs/ belong to the checkout and are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from launch import cli, trained
from nvs_common import metrics, outputs, panels
from nvs_common.data import sources, views
from nvs_common.errors import InputError
from vqnerf_jax import codes, vqgan_task, vqgan_weights

_SOURCE = trained.define_source()
_DATA = flags.DEFINE_string("data", "", "Other images than the run's held-out ones.")
_OUT = flags.DEFINE_string("out", None, "Folder for pictures.png and metrics.json.", required=True)
_EXPORT = flags.DEFINE_string("export", "", "File for the weights: .npz.")
_SHOWN = flags.DEFINE_integer("shown", 8, "Images in pictures.png.", lower_bound=1)
_MOST = flags.DEFINE_integer("most", 256, "Images that are evaluated at most.", lower_bound=1)


def main(_) -> int:
    """Evaluates; returns the exit code."""
    out = outputs.check_folder(_OUT.value)
    if _EXPORT.value:
        outputs.check_file(_EXPORT.value, (".npz",))
    model = trained.load(_SOURCE)
    if model.config.system != "vqgan":
        raise InputError(f"{model.path}: {model.config.system} is no auto-encoder of images.")
    start = model.config.loss.get("quantizer_start", 0)
    if model.step < start:
        raise InputError(
            f"{model.path}: latents are quantised from step {start} on (loss.quantizer_start), and "
            f"this is step {model.step}: its codes have not learnt anything; train on."
        )
    module = vqgan_task.make_parts(model.config).module

    @jax.jit
    def apply(variables: Any, image: Any) -> Any:
        made = vqgan_task.reconstruct(module, variables, image)
        return made, metrics.psnr(made.images, image)[0], metrics.ssim(made.images, image)[0]

    scores, shown, total = [], [], 0.0
    for image in _images(model.config):
        made, *score = apply(model.variables, image[None])
        scores.append([float(x) for x in score])
        if made.quantized is not None:
            total = total + np.asarray(made.quantized.counts, np.float64)
        if len(shown) < _SHOWN.value:
            shown.append(np.concatenate([image, np.asarray(made.images[0])]))
    psnr, ssim = np.mean(scores, axis=0)
    found = {"images": len(scores), "psnr": psnr, "ssim": ssim, "step": model.step}
    if np.ndim(total):
        counts = jnp.asarray(total, jnp.float32)
        found |= {
            "perplexity": float(codes.perplexity(counts)),
            "usage": float(codes.usage(counts)),
        }
    outputs.write_image(out / "pictures.png", panels.to_uint8(np.concatenate(shown, axis=1)))
    outputs.write_json(out / "metrics.json", found)
    print(", ".join(f"{k} {v:.4g}" for k, v in found.items()))
    if _EXPORT.value:
        _export(module, model.variables)
    return 0


def _images(config: Any) -> Iterator[np.ndarray]:
    """Images [h, w, 3] that training has not seen, or all of --data."""
    if _DATA.value:
        config.eval.source = _DATA.value
    source, left = sources.held_out(config), _MOST.value
    every = 0 if _DATA.value else config.data.hold_out_every
    folder = isinstance(source, sources.FOLDERS)
    for number in range(len(source)):
        scene = source[number]
        count = len(scene.names)
        held = views.split_every(count, every).target if folder and every else np.arange(count)
        for index in held[:left]:
            yield np.asarray(scene.images([int(index)]), np.float32)[0]
        left -= len(held)
        if left <= 0:
            return


def _export(module: Any, variables: Any) -> None:
    """Writes the auto-encoder's arrays, whole or not at all."""
    held = vqgan_task.autoencoder(variables)
    path = pathlib.Path(_EXPORT.value)
    outputs.write_arrays(path, vqgan_weights.vqgan_to_torch(module, held))
    print(
        f"{path}: --config.model.vqgan_weights={path} --config.model.vqgan.groups={module.groups}"
    )


if __name__ == "__main__":
    cli.run(main)
