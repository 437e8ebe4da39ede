"""Which views of a scene a model sees and which it has to render: pure NumPy, cameras only.

Images are decoded after this choice, so only the chosen ones are ever read. All chance comes
from the `numpy.random.Generator` argument. n is the number of views of a scene.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from nvs_common.data import sparse_points
from nvs_common.errors import InputError
from nvs_common.types import Cameras


@dataclasses.dataclass(frozen=True)
class Choice:
    """Indices into a scene's views.

    Attributes:
      context: [v] in the order the model sees them.
      target: [t].
      drawn: [v + t] the different views of which both were drawn, where views may be both, or
        neither; None where they are the two above.
    """

    context: np.ndarray
    target: np.ndarray
    drawn: np.ndarray | None = None


def centers(cameras: Cameras) -> np.ndarray:
    """Camera centres in the world, [n, 3] float64."""
    return np.asarray(cameras.world_from_cam, np.float64)[..., :3, 3]


def nearest(
    cameras: Cameras,
    point: np.ndarray,
    count: int,
    *,
    allowed: np.ndarray | None = None,
    name: str = "scene",
) -> np.ndarray:
    """The `count` cameras whose centres are nearest to a point: Quark's choice at inference.

    Args:
      cameras: [n].
      point: [3] in the world; for a target view, its camera centre.
      count: how many.
      allowed: [m] indices to choose among; all of them if None. Leave the target itself out.
      name: the scene's name, for the error.

    Returns:
      [count] indices, the nearest first; equal distances keep the order of `allowed`.

    Raises:
      InputError: fewer than `count` views are allowed.
    """
    allowed = np.arange(len(centers(cameras))) if allowed is None else np.asarray(allowed)
    _require(len(allowed), count, 0, name)
    distance = np.linalg.norm(centers(cameras)[allowed] - np.asarray(point, np.float64), axis=-1)
    return allowed[np.argsort(distance, kind="stable")[:count]]


def nearest_random(
    cameras: Cameras,
    rng: np.random.Generator,
    *,
    num_context: int,
    num_target: int = 1,
    pool: int = 16,
    targets_may_be_context: bool = False,
    name: str = "scene",
) -> Choice:
    """A random target and context drawn from the views nearest to it (Quark, section 3.4).

    One target: the context is drawn at random, in random order, from the `pool` cameras nearest
    to it by distance of centres. Several targets share the context: the further t - 1 targets
    are drawn from the pool + t - 1 nearest cameras and the context from the `pool` that remain,
    so no context view is ever a target. A scene too small for the pool offers all it has.

    Args:
      cameras: [n].
      rng: source of all chance.
      num_context: v.
      num_target: t.
      pool: how many nearest cameras the context is drawn from; the config's `nearest`.
      targets_may_be_context: in the end draw the targets among all drawn views.
      name: the scene's name, for the error.

    Raises:
      InputError: n < num_context + num_target, or pool < num_context.
    """
    points = centers(cameras)
    _require(len(points), num_context, num_target, name)
    if pool < num_context:
        raise InputError(
            f"data.nearest={pool} is smaller than data.num_context={num_context}: the context "
            "is drawn from the nearest views, so set data.nearest to at least data.num_context."
        )
    first = int(rng.integers(len(points)))
    others = np.delete(np.arange(len(points)), first)
    distance = np.linalg.norm(points[others] - points[first], axis=-1)
    near = others[np.argsort(distance, kind="stable")[: pool + num_target - 1]]
    drawn = rng.permutation(near)
    target = np.concatenate([[first], drawn[: num_target - 1]])
    context = drawn[num_target - 1 :][:num_context]
    if not targets_may_be_context:
        return Choice(context, target)
    drawn = np.concatenate([context, target])
    return Choice(context, rng.permutation(drawn)[:num_target], drawn)


def bounded(targets: Cameras, scene: Any, inputs: np.ndarray) -> Cameras:
    """Targets [t] with a near and far from what their inputs know.

    Where the scene has sparse points, from those that the inputs observe, as the target sees
    them; the far is at least the greatest of the inputs'. Otherwise the near is the geometric
    mean of the inputs' nears, weighted by the inverse square of their distance, and the far the
    greatest of all: one input that has walked up to a wall does not spend most of the disparity
    range on what the target does not see, and the range changes smoothly along a path.

    The near and far stored with a held-out view may come from its own image (from points
    triangulated in it), which a renderer does not have: they are never used.

    Args:
      targets: [t].
      scene: with cameras [n], and perhaps `points`, see `scenes.Scene`.
      inputs: [t, v] indices into the scene's cameras.
    """
    near, far = _range_of_inputs(targets, scene.cameras, inputs)
    points = getattr(scene, "points", None)
    if points is not None:
        size = targets.height, targets.width
        for i, row in enumerate(inputs):
            pose, intrinsics = np.asarray(targets.world_from_cam)[i], targets.intrinsics[i]
            depth = sparse_points.z_depths_in_image(points.of(row), pose, intrinsics, size)
            found = sparse_points.depth_range(depth)
            if found is not None:
                near[i], far[i] = found[0], max(far[i], found[1])
    return dataclasses.replace(targets, near=near, far=far)


def _range_of_inputs(
    targets: Cameras, cameras: Cameras, inputs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Near and far [t] from those of the inputs alone."""
    centers = np.asarray(cameras.world_from_cam)[inputs][..., :3, 3]
    offset = centers - np.asarray(targets.world_from_cam)[:, None, :3, 3]
    distance = np.linalg.norm(offset, axis=-1)
    # An input at the target's centre decides alone, and where all are there, all count alike.
    scale = np.maximum(distance.max(axis=1, keepdims=True), 1e-12)
    weights = 1 / np.maximum(distance / scale, 1e-6) ** 2
    logs = np.log(np.asarray(cameras.near)[inputs])
    near = np.exp(np.sum(weights * logs, axis=1) / np.sum(weights, axis=1))
    return near, np.asarray(cameras.far)[inputs].max(axis=1)


def window(
    num_views: int,
    rng: np.random.Generator,
    *,
    num_context: int,
    num_target: int,
    min_distance: int,
    max_distance: int,
    targets_may_be_context: bool = False,
    name: str = "scene",
) -> Choice:
    """Views from a random stretch of a video (LVSM's choice on RealEstate10K).

    The stretch's length in frames is uniform in [min_distance, max_distance], cut to what the
    video has. Its two ends and different random frames between them are drawn; the context is the
    two ends and then random ones.

    Args:
      num_views: n; view i is frame i of the video.
      rng: source of all chance.
      num_context: v.
      num_target: t.
      min_distance: least number of frames between the first and the last view.
      max_distance: greatest such number.
      targets_may_be_context: draw targets among all drawn views instead of the new ones only
        (LVSM's `target_has_input`).
      name: the scene's name, for the error.

    Returns:
      Context: first view, last view, then random ones; targets in the order of the video.

    Raises:
      InputError: the video is shorter than the stretch needs.
    """
    # Without overlap every context and target view is a different frame of the stretch.
    distinct = num_context + num_target
    shortest = shortest_window(num_context, num_target, min_distance) - 1
    if not 0 < min_distance <= max_distance or shortest > max_distance:
        raise InputError(
            f"data.min_distance={min_distance} and data.max_distance={max_distance} leave no "
            f"stretch of {distinct} different frames: 0 < min_distance <= max_distance and "
            f"max_distance >= {distinct - 1} are needed."
        )
    if num_context < 2:
        raise InputError(f"data.num_context={num_context}, but a window has two ends: set 2.")
    _require(num_views, num_context, num_target, name)
    if num_views - 1 < shortest:
        raise InputError(
            f"{name} has {num_views} views, but a stretch of data.min_distance={min_distance} "
            f"frames needs {shortest + 1}: lower data.min_distance or leave the scene out."
        )
    length = int(rng.integers(shortest, min(max_distance, num_views - 1) + 1))
    start = int(rng.integers(num_views - length))
    between = rng.permutation(np.arange(start + 1, start + length))[: distinct - 2]
    context = np.concatenate([[start, start + length], between[: num_context - 2]])
    target = between[num_context - 2 :]
    if not targets_may_be_context:
        return Choice(context, np.sort(target))
    drawn = np.concatenate([context, target])
    return Choice(context, np.sort(rng.permutation(drawn)[:num_target]), drawn)


def shortest_window(num_context: int, num_target: int, min_distance: int) -> int:
    """How many views a video needs for `window`."""
    return max(min_distance, num_context + num_target - 1) + 1


def random(
    num_views: int,
    rng: np.random.Generator,
    *,
    num_context: int,
    num_target: int,
    name: str = "scene",
) -> Choice:
    """Context and targets drawn from all views without repetition, for views around an object.

    Raises:
      InputError: the scene has fewer than num_context + num_target views.
    """
    _require(num_views, num_context, num_target, name)
    drawn = rng.permutation(num_views)
    return Choice(drawn[:num_context], drawn[num_context:][:num_target])


def split_every(num_views: int, every: int) -> Choice:
    """Every `every`-th view, from the first, is a target; the others may be context.

    This is the usual split of a capture into test and training images (every = 8); every = 0
    keeps all of them as context and none as targets.
    """
    indices = np.arange(num_views)
    if every == 0:
        return Choice(indices, indices[:0])
    return Choice(indices[indices % every != 0], indices[::every])


def _require(num_views: int, num_context: int, num_target: int, name: str) -> None:
    needed = num_context + num_target
    if num_views < needed:
        parts = f"{num_context} context" + (f" + {num_target} target" if num_target else "")
        raise InputError(
            f"{name} offers {num_views} views, but {parts} = {needed} are asked for: "
            "lower data.num_context or data.num_target, or leave the scene out."
        )
