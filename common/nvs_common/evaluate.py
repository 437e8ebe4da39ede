"""Image quality on held-out views: a model beside baselines that learn nothing.

The protocol is Quark's (section 4.1): every 8th view of a scene is a target, and each target is
rendered from the 8 nearest of the other views by distance of camera centres. A held-out view's
image and its stored near and far are never given to a method (`single_plane`, an upper bound,
is told the truth and says so in its name). Nothing is skipped: what cannot be evaluated raises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nvs_common import baselines, metrics, panels, rendering
from nvs_common.data import splits, views
from nvs_common.errors import InputError
from nvs_common.types import Task, Variables, Views

MODEL = "model"
BASELINES = ("plane_sweep", "single_plane (oracle)", "nearest_view")
METHODS = (MODEL, *BASELINES)


class Evaluation(NamedTuple):
    """What the periodic evaluation in training reports.

    Attributes:
      metrics: name -> value.
      images: name -> uint8 [h, w, 3].
    """

    metrics: dict[str, float]
    images: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How views are chosen and compared.

    Attributes:
      num_inputs: inputs of each target, the nearest by distance of camera centres.
      hold_out_every: every so-manieth view, from the first, is a target and never an input.
      split: name of a published split, in place of hold_out_every; see `data.splits`.
      size: (height, width) that scenes are resized to, None for their own.
      border: pixels cut off on each side before images are compared.
      ssim: the flavour that tables show, "gaussian" or "sample"; both are computed.
      lpips: parameters from `perceptual.load`, None leaves LPIPS out.
    """

    num_inputs: int = 8
    hold_out_every: int = 8
    split: str = ""
    size: tuple[int, int] | None = None
    border: int = 0
    ssim: metrics.SSIMFlavour = "gaussian"
    lpips: Mapping[str, Any] | None = None

    def __post_init__(self):
        if self.num_inputs < 1 or self.hold_out_every < 2 or self.border < 0:
            raise InputError(
                f"num_inputs={self.num_inputs} must be 1 or more, holdout={self.hold_out_every} "
                f"2 or more (every view would be held out) and border={self.border} 0 or more."
            )
        if self.ssim not in ("gaussian", "sample"):
            raise InputError(f"ssim={self.ssim!r} is none of 'gaussian', 'sample'.")


@dataclasses.dataclass(frozen=True)
class ViewResult:
    """Scores of one held-out view: scores[method][metric]."""

    name: str
    index: int
    inputs: tuple[str, ...]
    scores: dict[str, dict[str, float]]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Panel:
    """Pictures of one held-out view, uint8 [h, w, 3]; depth is None where there is none."""

    view: str
    why: str
    truth: np.ndarray
    prediction: np.ndarray
    error: np.ndarray
    depth: np.ndarray | None
    inputs: np.ndarray


@dataclasses.dataclass(frozen=True)
class SceneResult:
    """All held-out views of a scene, and pictures of the model's worst and best."""

    name: str
    source: str
    bounds: str
    num_views: int
    size: tuple[int, int]
    views: tuple[ViewResult, ...]
    panels: tuple[Panel, ...]

    def mean(self, method: str, metric: str) -> float:
        """Mean over the scene's held-out views."""
        return float(np.mean([view.scores[method][metric] for view in self.views]))


@dataclasses.dataclass(frozen=True)
class Result:
    """An evaluation: its protocol and its scenes."""

    protocol: Protocol
    scenes: tuple[SceneResult, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that were computed in all scenes."""
        of_each = [scene.views[0].scores[MODEL] for scene in self.scenes]
        return tuple(name for name in of_each[0] if all(name in one for one in of_each))

    def mean(self, method: str, metric: str) -> float:
        """Mean over scenes of the scenes' means, so that a long capture does not outweigh."""
        return float(np.mean([scene.mean(method, metric) for scene in self.scenes]))


def evaluate(
    task: Task,
    variables: Variables,
    scenes: Sequence[tuple[str, Any]],
    protocol: Protocol,
    *,
    progress: Callable[[int, int], None] | None = None,
    chunk: int = 1,
) -> Result:
    """Scores the model and the baselines on every held-out view of every scene.

    Args:
      task: the system.
      variables: of the model.
      scenes: (name, scene) pairs.
      protocol: the views and metrics.
      progress: called with (views done, views in all) after each view.
      chunk: targets the model renders a call.

    Raises:
      InputError: a scene has too few views (found before anything is rendered), an image cannot
        be read, or the model's output is not finite.
    """
    if not scenes:
        raise InputError("there is no scene to evaluate; pass a folder that holds at least one.")
    if protocol.size is not None:
        scenes = [(name, scene.resized(*protocol.size)) for name, scene in scenes]
    plans = [_plan(name, scene, protocol) for name, scene in scenes]
    total, done = sum(len(plan.targets) for plan in plans), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    results = [_scene(task, variables, plan, protocol, step, chunk) for plan in plans]
    return Result(protocol, tuple(results))


def quick(task: Task, variables: Variables, source: Any, config) -> Evaluation:
    """The periodic evaluation in training: a few held-out views, PSNR, SSIM and pictures.

    Renders `config.eval.views` (1 if absent) targets of each of the first
    `config.eval.num_scenes` scenes from their `config.data.num_context` nearest inputs.

    Args:
      task: the system.
      variables: of the model.
      source: held-out scenes, `len(source)` and `source[i]`.
      config: a run's config.

    Raises:
      InputError: a scene has too few views.
    """
    size = (config.data.height, config.data.width)
    every = config.data.get("hold_out_every", 8) or 8
    protocol = Protocol(config.data.num_context, every, config.data.get("split", ""))
    per_scene = config.eval.get("views", 1)
    values, images = [], {}
    for number in range(min(len(source), config.eval.num_scenes)):
        scene = source[number]
        if (scene.cameras.height, scene.cameras.width) != size:
            scene = scene.resized(*size)
        plan = _plan(f"{number} ({scene.source})", scene, protocol)
        # Evenly spread, and the middle one where it is one.
        count = min(per_scene, len(plan.targets))
        chosen = ((np.arange(count) + 0.5) * len(plan.targets) / count).astype(int)
        plan = plan._replace(targets=plan.targets[chosen], inputs=plan.inputs[chosen])
        for view in _views(task, variables, plan, chunk=1):
            values.append(scores(view.rendered.image, view.truth, protocol, view.mask))
            panel = _panel(view, "", "")
            parts = (panel.truth, panel.prediction, panel.error, panel.depth)
            name = f"scene_{number}_view_{view.index}"
            images[name] = panels.strip([part for part in parts if part is not None])
    if not values:
        raise InputError("there is no held-out scene: set eval.num_scenes to 1 or more.")
    shown = {"psnr": "psnr", "psnr_masked": "psnr_masked", "ssim_gaussian": "ssim"}
    # Masks may be known of some scenes alone.
    found = {name: [v[key] for v in values if key in v] for key, name in shown.items()}
    return Evaluation({name: float(np.mean(v)) for name, v in found.items() if v}, images)


def scores(
    pred: np.ndarray, truth: np.ndarray, protocol: Protocol, mask: np.ndarray | None = None
) -> dict[str, float]:
    """All metrics of one image [h, w, 3], after the protocol's border crop: name -> value.

    With a mask [h, w] of the object there is also "psnr_masked"; all others are of the whole image.
    """
    height, width = truth.shape[:2]
    rows = slice(protocol.border, height - protocol.border)
    columns = slice(protocol.border, width - protocol.border)
    values = _compare(pred[rows, columns], truth[rows, columns])
    if protocol.lpips is not None:
        values["lpips"] = _lpips(protocol.lpips, pred[rows, columns], truth[rows, columns])
    if mask is not None:
        parts = (pred[rows, columns], truth[rows, columns], mask[rows, columns])
        values["psnr_masked"] = metrics.masked_psnr(*map(jnp.asarray, parts))
    return {name: float(value) for name, value in values.items()}


class _Plan(NamedTuple):
    """Targets [t] of a scene and the inputs [t, v] of each."""

    name: str
    scene: Any
    targets: np.ndarray
    inputs: np.ndarray


class _View(NamedTuple):
    """A rendered target: its index, its inputs' indices [v] and images, the truth and its mask."""

    index: int
    inputs: np.ndarray
    images: np.ndarray
    rendered: rendering.Rendered
    truth: np.ndarray
    mask: np.ndarray | None


def _plan(name: str, scene: Any, protocol: Protocol) -> _Plan:
    count = len(scene.names)
    split = views.split_every(count, protocol.hold_out_every)
    if protocol.split:
        split = splits.choose(protocol.split, count)
    cameras = scene.cameras
    inputs = rendering.nearest_inputs(
        cameras, cameras[split.target], protocol.num_inputs, allowed=split.context, name=name
    )
    smallest = min(cameras.height, cameras.width) - 2 * protocol.border
    if smallest < metrics.SSIM_WINDOW:
        raise InputError(
            f"scene {name}: {cameras.height}x{cameras.width} images without a border of "
            f"{protocol.border} pixels are smaller than SSIM's window of {metrics.SSIM_WINDOW}; "
            "evaluate at a larger size."
        )
    return _Plan(name, scene, split.target, inputs)


def _views(task: Task, variables: Variables, plan: _Plan, chunk: int) -> Iterator[_View]:
    """Renders the targets of a plan and checks the renderings."""
    scene, read = plan.scene, rendering.ImageReader(plan.scene)
    targets = scene.cameras[plan.targets]
    renders = rendering.render_targets(
        task.render, variables, scene, targets, plan.inputs, read=read, chunk=chunk
    )
    for index, inputs, rendered in zip(plan.targets, plan.inputs, renders, strict=True):
        if not np.isfinite(rendered.image).all():
            raise InputError(
                f"scene {plan.name}, view {scene.names[index]}: the model rendered values that "
                "are not finite; the training may have diverged, use an earlier checkpoint."
            )
        # Not through `read`: the reader holds nothing but inputs.
        truth = np.asarray(scene.images([int(index)]), np.float32)[0]
        mask = None
        if getattr(scene, "has_masks", False):
            mask = np.asarray(scene.masks([int(index)]), np.float32)[0]
        yield _View(int(index), inputs, read(inputs), rendered, truth, mask)


def _scene(
    task: Task,
    variables: Variables,
    plan: _Plan,
    protocol: Protocol,
    step: Callable[[], None],
    chunk: int,
) -> SceneResult:
    scene = plan.scene
    results: list[ViewResult] = []
    worst = best = None
    lowest, highest = np.inf, -np.inf
    for view in _views(task, variables, plan, chunk):
        images = {MODEL: view.rendered.image, **_baselines(scene, view)}
        by_method = {
            n: scores(image, view.truth, protocol, view.mask) for n, image in images.items()
        }
        inputs = tuple(scene.names[i] for i in view.inputs)
        name, psnr = scene.names[view.index], by_method[MODEL]["psnr"]
        results.append(ViewResult(name, view.index, inputs, by_method, view.rendered.seconds))
        if psnr < lowest:
            worst, lowest = _panel(view, name, "worst"), psnr
        if psnr > highest:
            best, highest = _panel(view, name, "best"), psnr
        step()
    shown = tuple(panel for panel in (worst, best) if panel is not None)
    if len(results) == 1:
        shown = (dataclasses.replace(shown[0], why="only"),)
    size = (scene.cameras.height, scene.cameras.width)
    return SceneResult(
        name=plan.name,
        source=str(scene.source),
        bounds=scene.bounds,
        num_views=len(scene.names),
        size=size,
        views=tuple(results),
        panels=shown,
    )


def _baselines(scene: Any, view: _View) -> dict[str, np.ndarray]:
    """Images of every baseline, given the same inputs and the same near and far."""
    target = scene.cameras[np.array([view.index])]
    target = rendering.take(views.bounded(target, scene, view.inputs[None]), 0)
    context = Views(view.images, rendering.take(scene.cameras, view.inputs))
    images = (
        baselines.plane_sweep(context, target),
        baselines.single_plane(context, target, view.truth),
        baselines.nearest_view(context, target),
    )
    return {name: np.asarray(image) for name, image in zip(BASELINES, images, strict=True)}


@jax.jit
def _compare(pred: jax.Array, truth: jax.Array) -> dict[str, jax.Array]:
    return {
        "psnr": metrics.psnr(pred, truth),
        "ssim_gaussian": metrics.ssim(pred, truth, "gaussian"),
        "ssim_sample": metrics.ssim(pred, truth, "sample"),
    }


@jax.jit
def _lpips(params: Mapping[str, Any], pred: jax.Array, truth: jax.Array) -> jax.Array:
    return metrics.lpips(pred, truth, params)


def _panel(view: _View, name: str, why: str) -> Panel:
    rendered, truth = view.rendered, view.truth
    height = max(16, truth.shape[0] // 4)
    return Panel(
        view=name,
        why=why,
        truth=panels.to_uint8(truth),
        prediction=panels.to_uint8(rendered.image),
        error=panels.error_image(rendered.image, truth),
        depth=None if rendered.depth is None else panels.depth_image(rendered.depth),
        inputs=panels.strip([panels.thumbnail(panels.to_uint8(x), height) for x in view.images]),
    )
