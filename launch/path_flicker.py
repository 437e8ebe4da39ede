"""Flicker of trained models along a camera path, where the set of inputs changes and elsewhere."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from launch import measuring, trained
from nvs_common import rendering, temporal, trajectories
from nvs_common.data import views
from nvs_common.errors import InputError
from nvs_common.types import Cameras

PATHS = {
    "spiral": trajectories.spiral,
    "orbit": trajectories.orbit,
    "interpolate": trajectories.interpolate,
}
OWN, TRUE = "its own", "true"
HEAD = (
    *("frames of", "warped by depth", "mean difference x 1000", "PSNR", "compared"),
    *("input switches", "x 1000 at switches", "x 1000 elsewhere"),
)
_flicker = jax.jit(temporal.flicker)


class Walk(NamedTuple):
    """A path through a scene: its cameras [t], inputs [t, v], true images and depths or None."""

    name: str
    scene: Any
    cameras: Cameras
    inputs: np.ndarray
    truth: list[temporal.Frame] | None

    @property
    def switches(self) -> np.ndarray:
        """Whether a frame's set of inputs differs from the frame's before: bool [t - 1]."""
        sets = np.sort(self.inputs, axis=1)
        return np.any(sets[1:] != sets[:-1], axis=1)


def study(
    models: Sequence[trained.Trained],
    scenes: Sequence[tuple[str, Any]],
    path: str,
    frames: int,
    num_inputs: int,
) -> list[str]:
    """The table's lines: every model along the same path with the same inputs.

    A model with a wrong depth hides from the comparison what it does not find again. In procedural
    scenes all models are therefore also compared by the true depth, on the same pixels, and the
    true frames give the floor. Rows go to stderr as they are measured.

    Args:
      models: trained models.
      scenes: (name, scene) pairs.
      path: of PATHS.
      frames: of the path in each scene.
      num_inputs: of each frame, the nearest of all views of the scene.

    Raises:
      InputError: a scene has too few views, or a model renders no depth.
    """
    walks = [_walk(name, scene, PATHS[path], frames, num_inputs) for name, scene in scenes]
    switches = np.concatenate([walk.switches for walk in walks])
    rows = []

    def add(name: str, depth: str, pairs: list[temporal.Flicker]) -> None:
        rows.append(_row(name, depth, pairs, switches))
        print(measuring.row(rows[-1]), file=sys.stderr, flush=True)

    known = all(walk.truth is not None for walk in walks)
    for model in models:
        name = f"`{model.path.name}`, step {model.step}"
        drawn = [list(_frames(model, walk)) for walk in walks]
        add(name, OWN, [pair for each in drawn for pair in _pairs(each)])
        if known:
            exact = [_with_depth(a, walk.truth) for a, walk in zip(drawn, walks, strict=True)]
            add(name, TRUE, [pair for each in exact for pair in _pairs(each)])
    if known:
        add("the truth (floor)", TRUE, [p for walk in walks for p in _pairs(walk.truth or [])])
    size = f"{walks[0].cameras.height}x{walks[0].cameras.width}"
    title = f"`{path}` of {frames} frames in {len(walks)} scenes, {num_inputs} inputs, {size}"
    return [title, "", *measuring.table(HEAD, rows), "", NOTE]


NOTE = (
    "Mean absolute difference, in thousandths of the image's range, and PSNR between each frame "
    "and the one before it, warped to it; over the pixels whose point is in sight in both frames "
    f"(depths within {100 * temporal.TOLERANCE:g} %), whose share is the column `compared`."
)


def _walk(name: str, scene: Any, path: Any, frames: int, num_inputs: int) -> Walk:
    cameras = path(scene.cameras, frames)
    inputs = rendering.nearest_inputs(
        scene.cameras, cameras, num_inputs, allowed=np.arange(len(scene.names)), name=name
    )
    truth = None
    if hasattr(scene, "stage"):
        # The procedural world has an image and a depth from wherever one looks.
        there = dataclasses.replace(scene, cameras=cameras)
        every = np.arange(frames)
        truth = list(_split(there.images(every), there.depths(every), cameras))
    return Walk(name, measuring.Kept(scene), cameras, inputs, truth)


def _frames(model: trained.Trained, walk: Walk) -> Iterator[temporal.Frame]:
    """The frames of a path as a model renders them."""
    renders = rendering.render_targets(
        model.task.render, model.variables, walk.scene, walk.cameras, walk.inputs
    )
    cameras = views.bounded(walk.cameras, walk.scene, walk.inputs)
    for number, rendered in enumerate(renders):
        if rendered.depth is None:
            raise InputError(f"{model.path}: this system renders no depth to warp frames by.")
        if not np.isfinite(rendered.image).all():
            raise InputError(
                f"{model.path}, frame {number} of scene {walk.name}: the model rendered values "
                "that are not finite; the training may have diverged, use an earlier checkpoint."
            )
        yield temporal.Frame(rendered.image, rendered.depth, rendering.take(cameras, number))


def _split(images: np.ndarray, depths: np.ndarray, cameras: Cameras) -> Iterator[temporal.Frame]:
    for number, (image, depth) in enumerate(zip(images, depths, strict=True)):
        yield temporal.Frame(image, depth, rendering.take(cameras, number))


def _with_depth(
    frames: Sequence[temporal.Frame], truth: Sequence[temporal.Frame] | None
) -> list[temporal.Frame]:
    """The frames with the depth of others."""
    return [dataclasses.replace(a, depth=b.depth) for a, b in zip(frames, truth or [], strict=True)]


def _pairs(frames: Sequence[temporal.Frame]) -> list[temporal.Flicker]:
    return [jax.device_get(_flicker(a, b)) for a, b in zip(frames[:-1], frames[1:], strict=True)]


def _row(
    name: str, depth: str, pairs: Sequence[temporal.Flicker], switches: np.ndarray
) -> tuple[str, ...]:
    absolute, squared, share = (
        np.array([getattr(pair, field) for pair in pairs], np.float64)
        for field in ("absolute", "squared", "share")
    )

    def mean(values: np.ndarray, chosen: np.ndarray) -> float:
        # Pairs without a pixel in common have no difference.
        chosen = chosen & (share > 0)
        return float(values[chosen].mean()) if chosen.any() else float("nan")

    everywhere = np.ones_like(switches)
    decibels = -10 * np.log10(max(mean(squared, everywhere), temporal.MIN_MSE))
    cells = [name, depth, f"{1e3 * mean(absolute, everywhere):.2f}", f"{decibels:.2f}"]
    cells += [f"{100 * share.mean():.1f} %", f"{switches.sum()} of {len(switches)}"]
    for chosen in (switches, ~switches):
        value = mean(absolute, chosen)
        cells.append("-" if np.isnan(value) else f"{1e3 * value:.2f}")
    return tuple(cells)
