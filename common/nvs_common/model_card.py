"""The card of released weights: what they are, what they were trained on, what was measured.

Figures are read from evaluation reports (`metrics.json`) of the same run and step; what no report
holds, no card says.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nvs_common import runs, weights
from nvs_common.errors import InputError

# Scenes that a row of figures names one by one.
_MAX_NAMED = 3


class Figures(NamedTuple):
    """What one evaluation report measured.

    Attributes:
      data: phrase, which scenes.
      protocol: phrase, size, inputs and what was set differently from the weights' config.
      scores: method -> metric -> mean over the scenes; the model first.
      command: that measured it.
    """

    data: str
    protocol: str
    scores: Mapping[str, Mapping[str, float]]
    command: str


def figures(workdir: pathlib.Path, step: int, config: Mapping[str, Any]) -> list[Figures]:
    """Figures of every report in a folder of the run that was made from this step.

    Args:
      workdir: folder of the run.
      step: the step that is released.
      config: the run's config as JSON values.

    Raises:
      InputError: a metrics.json that is not one of our reports.
    """
    found = []
    for path in sorted(workdir.glob("*/metrics.json")):
        try:
            report = json.loads(path.read_text())
            if report["facts"]["checkpoint"] == f"step {step}":
                found.append(_figures(report, config))
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise InputError(
                f"{path}: not a report of launch/evaluate.py ({type(e).__name__}: {e}); evaluate "
                "again, or move the file away."
            ) from e
    return found


def text(
    path: pathlib.Path,
    released: weights.Weights,
    measured: Sequence[Figures],
    *,
    date: str,
    command: str,
) -> str:
    """The card as Markdown.

    Args:
      path: the file of weights, already written.
      released: what it holds.
      measured: rows of figures.
      date: of the release.
      command: that released it.
    """
    system = runs.to_json(released.config)["system"]
    name = _config_name(released.training)
    parts = [
        f"# {path.stem}",
        f"Weights of `{system}`{f', {name}' if name else ''}, for viewsynth-jax.",
        "## File",
        _table(_file_facts(path, released, date)),
        "## Training",
        _table(_training_facts(released)),
        "## Measured",
        _measured(measured, released.dtype),
        "## Use",
        _use(path),
        f"Written by `{command}`.",
    ]
    return "\n\n".join(parts) + "\n"


def _file_facts(path: pathlib.Path, released: weights.Weights, date: str) -> dict[str, str]:
    return {
        "file": f"`{path.name}`",
        "bytes": f"{path.stat().st_size:,}",
        "SHA-256": f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`",
        "parameters": f"{weights.num_values(released.variables):,} ({released.dtype} in the file)",
        "format": f"{weights.FORMAT}: .npz, read by NumPy alone",
        "date": date,
        "written with": _versions(runs.versions()),
    }


def _training_facts(released: weights.Weights) -> dict[str, str]:
    """What the config and the record of the run say; a field that they lack is left out."""
    config, training = runs.to_json(released.config), released.training
    data = config.get("data", {})
    facts = {"data": _data(config), "steps": f"{released.step:,}"}
    if "batch_size" in config:
        facts["scenes a step"] = str(config["batch_size"] * config.get("accumulate", 1))
    if "num_context" in data:
        facts["views of a scene"] = f"{data['num_context']} inputs, {data.get('num_target', 1)} "
        facts["views of a scene"] += "rendered and compared"
    if "height" in data:
        facts["image size"] = f"{data['height']} x {data['width']} pixels (height x width)"
    if config.get("ema"):
        facts["parameters"] = f"exponential moving average, decay {config['ema']}"
    if "started" in training:
        facts["started"] = training["started"]
    if "command" in training:
        facts["command"] = f"`{shlex.join(training['command'])}`"
    if "device_kind" in training:
        facts["devices"] = f"{training['devices']} x {training['device_kind']}"
    if "versions" in training:
        facts["versions"] = _versions(training["versions"])
    if git := training.get("git"):
        changed = ", with changes that were not committed" if git["changed"] else ""
        facts["commit"] = f"`{git['commit']}`{changed}"
    return facts


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _data(config: Mapping[str, Any]) -> str:
    data = config.get("data", {})
    phrase = f"`{data.get('source', 'not recorded')}`"
    if data.get("source") == "procedural":
        phrase = "the procedural world (made from a seed, nothing downloaded)"
        if "num_scenes" in data:
            phrase += f", seed {config['seed']}, {data['num_scenes']:,} scenes"
        if data.get("with_depth"):
            phrase += ", with its true depth"
    return phrase


def _config_name(training: Mapping[str, Any]) -> str:
    """The config that the training's command names, "" where it does not say."""
    words = training.get("command", [])
    for word, following in itertools.pairwise([*words, ""]):
        if word.lstrip("-").startswith("config="):
            return f"config `{word.partition('=')[2]}`"
        if word in ("--config", "-config"):
            return f"config `{following}`"
    return ""


def _figures(report: Mapping[str, Any], config: Mapping[str, Any]) -> Figures:
    scenes = report["scenes"]
    names = [scene["name"] for scene in scenes]
    views = sum(len(scene["views"]) for scene in scenes)
    data = ", ".join(names)
    if len(names) > _MAX_NAMED:
        data = f"{len(names)} scenes ({', '.join(sorted({s['source'] for s in scenes}))})"
    sizes = sorted({f"{scene['height']} x {scene['width']}" for scene in scenes})
    inputs = {len(view["inputs"]) for scene in scenes for view in scene["views"]}
    protocol = [" / ".join(sizes), f"{'/'.join(map(str, sorted(inputs)))} inputs"]
    protocol += runs.differences(config, report["config"])
    command = report["facts"]["evaluated with"]
    return Figures(f"{data}: {views} views", ", ".join(protocol), report["mean"], command)


def _measured(measured: Sequence[Figures], dtype: str) -> str:
    if not measured:
        return (
            "Nothing: the run holds no evaluation report of this step. Make one with "
            "`launch/evaluate.py` and release again."
        )
    methods = list(measured[0].scores)
    rows = [["held-out views", "protocol", *methods], ["---"] * (2 + len(methods))]
    for row in measured:
        rows.append([row.data, row.protocol, *(_scores(row.scores[m]) for m in methods)])
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    about = "PSNR in dB, SSIM (gaussian) and, where it was measured, LPIPS; mean over scenes."
    if dtype != "float32":
        about += f" Measured with the run's float32 parameters, not with this file's {dtype}."
    commands = "\n".join(f"    {row.command}" for row in measured)
    return "\n\n".join([about, "\n".join(lines), "Measured by:", commands])


def _scores(scores: Mapping[str, float]) -> str:
    parts = [f"{scores['psnr']:.2f}", f"{scores['ssim_gaussian']:.3f}"]
    return " / ".join(parts + ([f"{scores['lpips']:.3f}"] if "lpips" in scores else []))


def _use(path: pathlib.Path) -> str:
    return f"""```bash
python launch/render.py --weights={path.name} --scene=PATH --path=spiral --out=video.mp4
python launch/evaluate.py --weights={path.name} --data=PATH --out=report
```

Without this library:

```python
file = numpy.load("{path.name}")
about = json.loads(file["about"].tobytes())  # config, step, versions, a digest of each array
arrays = {{name: file[name] for name in about["arrays"]}}
```"""


def _table(facts: Mapping[str, str]) -> str:
    rows = [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(text: str) -> str:
    """Text that cannot break out of its cell."""
    return " ".join(text.split()).replace("|", "\\|")
