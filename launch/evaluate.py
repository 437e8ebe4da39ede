"""Evaluates a run on held-out views: python launch/evaluate.py --workdir=runs/a [--data=PATH]

Every 8th view of a scene is rendered from the nearest of the other views and compared with the
photograph, beside three methods that learn nothing. Writes report.html (one file, opens in any
browser) and metrics.json, and prints the table. --weights=FILE takes released weights in place of
a run, --weights=default those of the checkout.

--protocol=re10k --data=CLIPS --index=evaluation_index_re10k.json evaluates as published tables on
RealEstate10K do: views, image preparation and metrics are the protocol's. Writes metrics.json and
scenes.csv. A scene of the index that is missing makes it fail before anything is rendered, unless
--allow_missing counts it; so does, at the end, a scene that cannot be read.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import contextlib
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator

# launch/ and configs/ belong to the checkout and are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import tqdm
from absl import flags

from launch import cli, trained
from nvs_common import evaluate, html_report, index_evaluation, outputs, perceptual, runs
from nvs_common.data import eval_index, sources
from nvs_common.errors import InputError

# Quark's protocol, arXiv 2411.16680, Sec. 3.4.
PUBLISHED_INPUTS = 8

_SOURCE = trained.define_source()
_PROTOCOL = flags.DEFINE_enum(
    "protocol",
    "held_out",
    ["held_out", "re10k"],
    "held_out: every so-manieth view from the nearest others. re10k: the views of --index.",
)
_INDEX = flags.DEFINE_string(
    "index",
    "",
    "Of --protocol=re10k: a JSON file of scenes with their context and target frames, such as "
    "pixelSplat's evaluation_index_re10k.json.",
)
_ALLOW_MISSING = flags.DEFINE_bool(
    "allow_missing",
    False,
    "Of --protocol=re10k: evaluate the scenes that are there, and say how many are not.",
)
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
    if _PROTOCOL.value == "re10k":
        return _by_index(lpips)
    if _INDEX.value or _ALLOW_MISSING.value:
        raise InputError("--index and --allow_missing belong to --protocol=re10k.")
    model = trained.load(_SOURCE)
    out = outputs.check_folder(_OUT.value or model.path / "evaluation")
    size = trained.size(_SIZE.value, model.config, photographs=bool(_DATA.value))
    asked = _NUM_INPUTS.value
    protocol = evaluate.Protocol(
        num_inputs=_default_inputs(model.config) if asked is None else asked,
        hold_out_every=_HOLDOUT.value or model.config.data.get("hold_out_every", 8) or 8,
        split="" if _HOLDOUT.value else model.config.data.get("split", ""),
        size=size,
        border=_BORDER.value,
        ssim=_SSIM.value,  # pyright: ignore[reportArgumentType]
        lpips=lpips,
    )
    scenes = trained.scenes_at(_DATA.value, size) if _DATA.value else _held_out(model.config)
    with _bar("view") as progress:
        result = evaluate.evaluate(
            model.task,
            model.variables,
            scenes,
            protocol,
            progress=progress,
            chunk=_CHUNK.value,
        )
    report = html_report.write(result, _about(model), out)
    print(html_report.text_table(result))
    print(f"{sum(len(s.views) for s in result.scenes)} views of {len(result.scenes)} scenes")
    print(f"report: {report}")
    return 0


def _by_index(lpips) -> int:
    """Evaluates by an index file; returns the exit code."""
    fixed = ("num_scenes", "num_inputs", "holdout", "size", "border", "ssim", "chunk")
    if given := [f"--{name}" for name in fixed if flags.FLAGS[name].present]:
        raise InputError(f"{', '.join(given)}: --protocol=re10k fixes them; leave them out.")
    if not _DATA.value or not _INDEX.value:
        raise InputError("--protocol=re10k needs --data=CLIPS and --index=FILE.json.")
    index = eval_index.read(pathlib.Path(_INDEX.value))
    found = eval_index.find(pathlib.Path(_DATA.value), index.choices)
    if found.missing and not _ALLOW_MISSING.value:
        raise InputError(
            f"{_DATA.value}: {len(found.missing)} of {len(index.choices)} scenes of the index are "
            f"missing: {', '.join(found.missing)}; add them, or pass --allow_missing for "
            "numbers of the others."
        )
    model = trained.load(_SOURCE)
    out = outputs.check_folder(_OUT.value or model.path / "evaluation_re10k")
    config = model.config
    protocol = index_evaluation.Protocol(
        size=config.data.height,
        patch=config.model.get("patch", 1),
        square=config.data.height == config.data.width,
        normalize=config.get("poses", {}).get("normalize", "none"),
        lpips=lpips,
    )
    with _bar("scene") as progress:
        result = index_evaluation.evaluate_index(
            model.task, model.variables, index, found, protocol, progress=progress
        )
    facts = {"poses normalised over": protocol.normalize, "index": _INDEX.value}
    index_evaluation.write(result, {**_about(model).facts, **facts}, out)
    print(index_evaluation.summary(result))
    print(f"table by scene: {out / 'scenes.csv'}")
    if result.failed:
        raise InputError(
            f"{len(result.failed)} scenes could not be evaluated: {', '.join(result.failed)}; the "
            f"reasons are above and in {out / 'metrics.json'}."
        )
    return 0


@contextlib.contextmanager
def _bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; gives the function to call with (done, total)."""
    # disable=None: no bar where stderr is not a terminal.
    with tqdm.tqdm(desc="evaluating", unit=unit, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        yield progress


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
