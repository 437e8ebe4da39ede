"""Quality, time and memory of a trained model against the number of its inputs."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from launch import measuring, trained
from nvs_common import evaluate
from nvs_common.data import views
from nvs_common.errors import InputError

COUNTS = (2, 4, 8, 16, 32, 64)
HEAD = ("inputs", "scenes", "PSNR", "SSIM", "forward, ms", "planned memory, MiB")


def with_views(config: Any, count: int) -> Any:
    """The config, with enough views in a procedural scene for `count` inputs of a held-out one.

    All counts are measured in these same scenes; more views make a longer rig, not a denser one.
    """
    config = config.copy_and_resolve_references()
    every = _every(config)
    # One view in `every` is held out, the first of all among them.
    needed = count + math.ceil(count / (every - 1))
    config.data.views_per_scene = max(config.data.views_per_scene, needed)
    return config


def study(
    model: trained.Trained,
    scenes: Sequence[tuple[str, Any]],
    counts: Sequence[int],
    *,
    targets: int | None = None,
    repeats: int = 5,
) -> list[str]:
    """The table's lines: each number of inputs, the nearest ones of each held-out view.

    A scene with fewer views than that is left out of the row, and a remark says so. Rows go to
    stderr as they are measured.

    Args:
      model: a trained model.
      scenes: (name, scene) pairs.
      counts: numbers of inputs.
      targets: held-out views of each scene, evenly spread; all by default.
      repeats: timed forward passes.

    Raises:
      InputError: no scene has enough views for any of the counts.
    """
    config = model.config.copy_and_resolve_references()
    kept = [(name, measuring.Kept(scene)) for name, scene in scenes]
    offered = {name: _offered(scene, _every(config)) for name, scene in kept}
    rows, remarks = [], []
    for count in sorted(set(counts)):
        enough = [scene for name, scene in kept if offered[name] >= count]
        short = [f"{name} ({offered[name]})" for name, _ in kept if offered[name] < count]
        if short:
            remarks.append(f"{count} inputs: left out are {_listed(short)}, with fewer views.")
        if enough:
            rows.append(_measure(model, config, enough, count, targets, repeats))
            print(measuring.row(rows[-1]), file=sys.stderr, flush=True)
    if not rows:
        raise InputError(f"no scene has views for {min(counts)} inputs: {_listed(remarks)}")
    cameras, trained_with = scenes[0][1].cameras, model.config.data.num_context
    title = f"`{model.path.name}`, step {model.step}, trained with {trained_with} inputs"
    title += f"; {cameras.height}x{cameras.width}"
    return [title, "", *measuring.table(HEAD, rows), *([""] if remarks else []), *remarks]


def _measure(
    model: trained.Trained,
    config: Any,
    scenes: Sequence[measuring.Kept],
    count: int,
    targets: int | None,
    repeats: int,
) -> tuple[str, ...]:
    """A row of the table."""
    cameras = scenes[0].cameras
    with config.unlocked():
        # What `evaluate.quick` reads.
        config.data.update(num_context=count, height=cameras.height, width=cameras.width)
        config.eval.update(num_scenes=len(scenes), views=targets or 2**30)
    quality = evaluate.quick(model.task, model.variables, scenes, config).metrics
    passed = measuring.forward(model.task, model.variables, scenes[0], count, repeats)
    cells = (f"{count}", f"{len(scenes)}", f"{quality['psnr']:.2f}", f"{quality['ssim']:.3f}")
    return *cells, f"{1e3 * passed.seconds:.1f}", f"{passed.peak:.1f}"


def _offered(scene: Any, every: int) -> int:
    """How many views of a scene may be inputs."""
    return len(views.split_every(len(scene.names), every).context)


def _every(config: Any) -> int:
    return config.data.get("hold_out_every", 8) or 8


def _listed(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - 4} more" if len(texts) > 4 else ""
    return ", ".join(texts[:4]) + more
