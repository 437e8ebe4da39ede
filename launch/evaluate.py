"""Evaluates a run on held-out views: python launch/evaluate.py --workdir=runs/a [--data=PATH]

Every 8th view of a scene is rendered from the nearest of the other views and compared with the
photograph, beside three methods that learn nothing. Writes report.html (one file, opens in any
browser) and metrics.json, and prints the table. --weights=FILE takes released weights in place of
a run, --weights=default those of the checkout. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import pathlib
import shlex
import sys

# launch/ and configs/ belong to the checkout and are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import tqdm
from absl import flags

from launch import cli, trained
from nvs_common import evaluate, html_report, perceptual, runs
from nvs_common.data import sources
from nvs_common.errors import InputError

# Quark's protocol, arXiv 2411.16680, Sec. 3.4.
PUBLISHED_INPUTS = 8

_SOURCE = trained.define_source()
_DATA = flags.DEFINE_string(
    "data",
    "",
    "A scene folder (COLMAP, nerfstudio, LLFF, ...) or a folder of scenes. By default the held-out "
    "scenes of the run's own config.",
)
_NUM_SCENES = flags.DEFINE_integer(
    "num_scenes", None, "How many procedural scenes; config.eval.num_scenes by default."
)
_NUM_INPUTS = flags.DEFINE_integer(
    "num_inputs",
    None,
    "Input views of each target, the nearest by camera centre; by default 8 of photographs, as "
    "is published, and as many as in training (config.data.num_context) of procedural scenes.",
)
_HOLDOUT = flags.DEFINE_integer(
    "holdout",
    None,
    "Every so-manieth view, from the first, is a target and never an input; "
    "by default what the run's training held out (config.data.hold_out_every, 8 as published).",
)
_SIZE = flags.DEFINE_string(
    "size",
    "auto",
    "HEIGHTxWIDTH of the images, centre-cropped to this shape and resized; auto is "
    "config.eval.photo_size for photographs, else the training size; native that of the files.",
)
_BORDER = flags.DEFINE_integer("border", 0, "Pixels left out on each side of the comparison.")
_SSIM = flags.DEFINE_enum(
    "ssim",
    "gaussian",
    ["gaussian", "sample"],
    "SSIM of the table: gaussian (no sample covariance) or sample (scikit-image's default, as "
    "pixelSplat and LVSM publish). metrics.json holds both.",
)
_LPIPS = flags.DEFINE_string(
    "lpips_weights",
    "",
    "LPIPS weights (.npz or .safetensors); nvs_common/perceptual.py says how to make the file. "
    "Without it LPIPS is left out.",
)
_CHUNK = flags.DEFINE_integer("chunk", 1, "Targets rendered at once; more needs more memory.")
_OUT = flags.DEFINE_string(
    "out",
    "",
    "Folder for report.html and metrics.json; WORKDIR/evaluation by default, but required with "
    "--weights.",
)


def main(_) -> int:
    """Evaluates; returns the exit code."""
    lpips = perceptual.load(_LPIPS.value) if _LPIPS.value else None
    if _DATA.value and _NUM_SCENES.value is not None:
        raise InputError("--num_scenes is for procedural scenes; leave it out with --data.")
    if _CHUNK.value < 1:
        raise InputError(f"--chunk={_CHUNK.value}: expected 1 or more.")
    if _SOURCE.weights.value and not _OUT.value:
        raise InputError("pass --out=FOLDER: with --weights there is no run's folder to write to.")
    model = trained.load(_SOURCE)
    size = trained.size(_SIZE.value, model.config, photographs=bool(_DATA.value))
    asked = _NUM_INPUTS.value
    protocol = evaluate.Protocol(
        num_inputs=_default_inputs(model.config) if asked is None else asked,
        hold_out_every=_HOLDOUT.value or model.config.data.get("hold_out_every", 8) or 8,
        size=size,
        border=_BORDER.value,
        ssim=_SSIM.value,  # pyright: ignore[reportArgumentType]
        lpips=lpips,
    )
    scenes = trained.scenes_at(_DATA.value, size) if _DATA.value else _held_out(model.config)
    # disable=None: no bar where stderr is not a terminal.
    with tqdm.tqdm(desc="evaluating", unit="view", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        result = evaluate.evaluate(
            model.task,
            model.variables,
            scenes,
            protocol,
            progress=progress,
            chunk=_CHUNK.value,
        )
    out = pathlib.Path(_OUT.value or model.path / "evaluation")
    report = html_report.write(result, _about(model), out)
    print(html_report.text_table(result))
    print(f"{sum(len(s.views) for s in result.scenes)} views of {len(result.scenes)} scenes")
    print(f"report: {report}")
    return 0


def _default_inputs(config) -> int:
    return PUBLISHED_INPUTS if _DATA.value else config.data.num_context


def _held_out(config) -> list[tuple[str, object]]:
    """The scenes on which the run's config says that it is evaluated."""
    if _NUM_SCENES.value is not None:
        if _NUM_SCENES.value < 1:
            raise InputError(f"--num_scenes={_NUM_SCENES.value}: expected 1 or more.")
        config.eval.num_scenes = _NUM_SCENES.value
    source = sources.held_out(config)
    scenes = [source[number] for number in range(len(source))]
    return [(f"{number} {getattr(s, 'path', s.source)}", s) for number, s in enumerate(scenes)]


def _about(model: trained.Trained) -> html_report.About:
    device = jax.devices()[0]
    facts = {
        "weights" if _SOURCE.weights.value else "run": str(model.path.resolve()),
        "checkpoint": f"step {model.step}",
        "evaluated with": shlex.join(sys.argv),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "versions": ", ".join(f"{name} {number}" for name, number in runs.versions().items()),
    }
    if "command" in model.training:
        facts["trained with"] = shlex.join(model.training["command"])
    if "device_kind" in model.training:
        facts["trained on"] = f"{model.training['devices']} x {model.training['device_kind']}"
    title = f"{model.config.system}: {model.path.name}, step {model.step}"
    return html_report.About(title, facts, runs.to_json(model.config))


if __name__ == "__main__":
    cli.run(main)
