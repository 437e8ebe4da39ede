"""Evaluation by an index file, as published tables on RealEstate10K are made (protocol re10k).

The index names the inputs and targets of every scene. Images are prepared by `data.frames`
(8-bit Lanczos, centre crop), all targets of a scene are rendered in one call, so that a system
that normalises poses over all views sees the published set of them. PSNR is of clamped images,
SSIM of the "sample" flavour; the mean over a scene's targets, then over scenes.

No scene is dropped without a word: what is missing or cannot be read is in the result, by name.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from nvs_common import cameras, evaluate, outputs
from nvs_common.data import eval_index, frames, samples, scenes
from nvs_common.data.views import Choice
from nvs_common.errors import InputError
from nvs_common.types import Batch, Task, Variables

LABELS = {"psnr": "PSNR (dB)", "ssim_sample": "SSIM", "lpips": "LPIPS"}
_DIGITS = {"psnr": 3, "ssim_sample": 4, "lpips": 4}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How images are prepared and compared.

    Attributes:
      size: image rows of the model.
      patch: image columns are a multiple of it.
      square: crop to a square.
      normalize: the views over which the system normalises poses: "all", "inputs" or "none".
      lpips: parameters from `perceptual.load`, None leaves LPIPS out.
    """

    size: int = 256
    patch: int = 8
    square: bool = True
    normalize: str = "all"
    lpips: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class SceneScores:
    """Scores of a scene's targets: scores[k][metric] of view names[k]."""

    name: str
    inputs: tuple[str, ...]
    names: tuple[str, ...]
    scores: tuple[dict[str, float], ...]

    def mean(self, metric: str) -> float:
        """Mean over the scene's targets."""
        return float(np.mean([score[metric] for score in self.scores]))


@dataclasses.dataclass(frozen=True)
class Result:
    """An evaluation by an index.

    Attributes:
      scenes: those that were evaluated.
      null: scenes to which the index gives no views.
      missing: scenes of the index that are not in the folder.
      failed: scene -> reason, of those that could not be evaluated.
    """

    scenes: tuple[SceneScores, ...]
    null: tuple[str, ...]
    missing: tuple[str, ...]
    failed: Mapping[str, str]

    @property
    def complete(self) -> bool:
        """Whether every scene that the index gives views to was evaluated."""
        return not self.missing and not self.failed

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics of the tables."""
        return tuple(name for name in LABELS if name in self.scenes[0].scores[0])

    def mean(self, metric: str) -> float:
        """Mean over scenes of the scenes' means."""
        return float(np.mean([scene.mean(metric) for scene in self.scenes]))


def evaluate_index(
    task: Task,
    variables: Variables,
    index: eval_index.Index,
    found: eval_index.Found,
    protocol: Protocol,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Evaluates every scene of an index that was found.

    Args:
      task: the system.
      variables: of the model.
      index: the views of every scene.
      found: where the scenes are.
      protocol: how images are prepared and compared.
      progress: called with (scenes done, scenes in all) after each scene.

    Raises:
      InputError: no scene could be evaluated, or the model's output is not finite.
    """
    render = jax.jit(lambda variables, batch: _render(task, variables, batch))
    results, failed = [], {}
    for number, (name, path) in enumerate(found.paths.items(), 1):
        try:
            batch, names = load(name, path, index.choices[name], protocol)
        except InputError as error:
            failed[name] = str(error)
        else:
            images = np.asarray(jax.device_get(render(variables, batch)), np.float32)
            results.append(_compare(name, images, batch, names, protocol))
        if progress is not None:
            progress(number, len(found.paths))
    if not results:
        reasons = " | ".join(list(failed.values())[:3]) or "none of its scenes is there"
        raise InputError(f"no scene of the index could be evaluated: {reasons}")
    return Result(tuple(results), index.null, found.missing, failed)


def load(
    name: str, path: pathlib.Path, choice: Choice, protocol: Protocol
) -> tuple[Batch, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Reads the views of one scene.

    Returns:
      A batch of this scene, with the scene axis, and the names of its inputs and targets.

    Raises:
      InputError: the scene cannot be read (a frame that is missing would shift all numbers of
        the index), is too short, or its cameras have no extent to normalise by.
    """
    scene = scenes.load_scene(path)
    last = int(max(choice.context.max(), choice.target.max()))
    if last >= len(scene):
        raise InputError(
            f"{path}: the index asks for frame {last}, but scene {name} has {len(scene)} frames; "
            "the index belongs to complete clips."
        )
    made = frames.prepare(scene, protocol.size, protocol.patch, square=protocol.square)
    batch = samples.assemble(made, choice)
    parts = [batch.context.cameras, batch.target.cameras]
    reference = {"all": parts, "inputs": parts[:1], "none": []}[protocol.normalize]
    if reference:
        centres = np.concatenate([part.world_from_cam[:, :3, 3] for part in reference])
        if np.ptp(centres, axis=0).max() <= 2 * cameras.SAME_PLACE * np.abs(centres).max():
            raise InputError(
                f"{path}: the cameras that poses are normalised by all stand in one place: there "
                "is no distance to normalise with."
            )
    names = tuple(tuple(scene.names[i] for i in part) for part in (choice.context, choice.target))
    return samples.stack([batch]), names  # pyright: ignore[reportReturnType]


def write(result: Result, facts: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes metrics.json (everything) and scenes.csv (the table by scene), each all at once."""
    content = {
        "facts": {key: str(value) for key, value in facts.items()},
        "complete": result.complete,
        "mean": {name: result.mean(name) for name in result.metrics},
        "evaluated": len(result.scenes),
        "null": list(result.null),
        "missing": list(result.missing),
        "failed": dict(result.failed),
        "scenes": [dataclasses.asdict(scene) for scene in result.scenes],
    }
    outputs.write_json(folder / "metrics.json", content)
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["scene", *result.metrics])
    for scene in result.scenes:
        rows.writerow([scene.name, *(_format(name, scene.mean(name)) for name in result.metrics)])
    for name in result.missing:
        rows.writerow([name, "missing"])
    for name in result.failed:
        rows.writerow([name, "failed"])
    outputs.write_text(folder / "scenes.csv", table.getvalue())


def summary(result: Result) -> str:
    """The means and what they are means of, for the terminal."""
    asked = len(result.scenes) + len(result.missing) + len(result.failed)
    means = "  ".join(f"{LABELS[n]} {_format(n, result.mean(n))}" for n in result.metrics)
    lines = [
        means,
        f"{len(result.scenes)} of {asked} scenes evaluated; to {len(result.null)} more the index "
        "gives no views",
    ]
    if not result.complete:
        lines.insert(0, "INCOMPLETE: these are not the numbers of the whole index")
    if result.missing:
        lines.append(f"missing: {len(result.missing)} scenes: {' '.join(result.missing)}")
    lines += [f"failed: {name}: {reason}" for name, reason in result.failed.items()]
    return "\n".join(lines)


def _render(task: Task, variables: Variables, batch: Batch) -> jax.Array:
    return task.render(variables, batch.context, batch.target.cameras).images[0]


def _compare(name, images, batch: Batch, names, protocol: Protocol) -> SceneScores:
    if not np.isfinite(images).all():
        raise InputError(
            f"scene {name}: the model rendered values that are not finite; the training may have "
            "diverged, use an earlier checkpoint."
        )
    published = evaluate.Protocol(ssim="sample", lpips=protocol.lpips)
    scores = [
        evaluate.scores(pred, truth, published)
        for pred, truth in zip(images, batch.target.images[0], strict=True)
    ]
    return SceneScores(name, names[0], names[1], tuple(scores))


def _format(metric: str, value: float) -> str:
    return f"{value:.{_DIGITS[metric]}f}"
