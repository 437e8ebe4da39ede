"""Rendering many target views of a scene from its nearest input images.

Shared by evaluation, by the periodic evaluation in training and by camera-path videos: choose
the inputs of each target, read each image once, run the jitted model on chunks of one shape.
"""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from nvs_common import sharding
from nvs_common.data import views
from nvs_common.errors import InputError
from nvs_common.types import Cameras, Render, Variables, Views

# Decoded input images that are kept for the next target, in bytes.
CACHE_BYTES = 2**30
_CAMERA_ARRAYS = ("world_from_cam", "intrinsics", "near", "far")

RenderFunction = Callable[[Variables, Views, Cameras], Render]


class Rendered(NamedTuple):
    """One rendered target, NumPy.

    Attributes:
      image: [h, w, 3] float32, clamped to [0, 1].
      depth: [h, w] float32 z-depth in world units, or None where the system has none.
      seconds: time of the model's call, shared equally among the targets of a chunk.
    """

    image: np.ndarray
    depth: np.ndarray | None
    seconds: float


def nearest_inputs(
    cameras: Cameras, targets: Cameras, count: int, *, allowed: np.ndarray, name: str
) -> np.ndarray:
    """The `count` allowed cameras nearest to each target by distance of centres, nearest first.

    Args:
      cameras: [n] of the scene.
      targets: [t].
      count: v.
      allowed: [m] indices that may be inputs.
      name: the scene's name, for the error.

    Returns:
      [t, v] indices.

    Raises:
      InputError: fewer than `count` cameras are allowed.
    """
    if count < 1:
        raise InputError(f"scene {name}: {count} inputs are asked for; ask for 1 or more.")
    if len(allowed) < count:
        raise InputError(
            f"scene {name}: {len(allowed)} of its {len(views.centers(cameras))} views may be "
            f"inputs, but {count} are asked for; ask for at most {len(allowed)} inputs."
        )
    points = views.centers(targets)
    chosen = [views.nearest(cameras, p, count, allowed=allowed, name=name) for p in points]
    return np.stack(chosen)


class ImageReader:
    """Reads images of a scene, keeping the last ones: neighbouring targets share inputs."""

    def __init__(self, scene: Any):
        cameras = scene.cameras
        self._scene = scene
        self._room = max(1, CACHE_BYTES // (cameras.height * cameras.width * 3 * 4))
        self._kept: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Images [k, h, w, 3] float32."""
        missing = [int(i) for i in indices if int(i) not in self._kept]
        if missing:
            read = np.asarray(self._scene.images(missing), np.float32)
            self._kept.update(zip(missing, read, strict=True))
        images = np.stack([self._kept[int(i)] for i in indices])
        for i in indices:
            self._kept.move_to_end(int(i))
        while len(self._kept) > self._room:
            self._kept.popitem(last=False)
        return images


def take(cameras: Cameras, indices: Any) -> Cameras:
    """Cameras at indices of any shape, as float32."""
    single = [np.asarray(getattr(cameras, name))[indices] for name in _CAMERA_ARRAYS]
    single = [x.astype(np.float32) for x in single]
    return Cameras(*single, height=cameras.height, width=cameras.width)


def render_targets(
    render: RenderFunction,
    variables: Variables,
    scene: Any,
    targets: Cameras,
    inputs: np.ndarray,
    *,
    read: ImageReader | None = None,
    chunk: int = 1,
) -> Iterator[Rendered]:
    """Renders targets one after the other, each from its own inputs.

    Args:
      render: `task.render`; it is jitted once per shape.
      variables: of the model.
      scene: with cameras [n] and images(indices).
      targets: [t], of the size to render; near and far are set from the inputs, see `bounded`.
      inputs: [t, v] indices of the scene's views.
      read: reader of the scene's images, to share its cache.
      chunk: targets a call; the last chunk is filled up, so that there are two shapes at most:
        targets with the same inputs, which are read and encoded once, and with different ones.

    Yields:
      t results in the order of the targets.
    """
    read = ImageReader(scene) if read is None else read
    targets = views.bounded(targets, scene, inputs)
    function = _jitted(render, _mesh(variables))
    count, shared = len(inputs), True
    for start in range(0, count, chunk):
        index = np.minimum(np.arange(start, start + chunk), count - 1)
        # A chunk that is filled up keeps to the form that is already compiled.
        shared = _same(inputs[index]) and (shared or start + chunk <= count)
        rows, columns = (inputs[index[:1]], chunk) if shared else (inputs[index], 1)
        images = np.stack([read(row) for row in rows])
        context = Views(images, take(scene.cameras, rows))
        began = time.perf_counter()
        result = function(variables, context, take(targets, index.reshape(len(rows), columns)))
        rendered, depth = jax.device_get((result.images, result.depth))
        seconds = (time.perf_counter() - began) / chunk
        for k in range(min(chunk, count - start)):
            at = divmod(k, columns)
            image = np.clip(np.asarray(rendered[at], np.float32), 0.0, 1.0)
            yield Rendered(image, None if depth is None else np.asarray(depth[at]), seconds)


def _same(inputs: np.ndarray) -> bool:
    """Whether all targets have the same inputs [t, v], in any order."""
    ordered = np.sort(inputs, axis=1)
    return bool(np.all(ordered == ordered[:1]))


@functools.lru_cache(maxsize=8)
def _jitted(render: RenderFunction, mesh: Mesh | None) -> RenderFunction:
    # With several processes every one of them needs the whole result.
    if mesh is not None and jax.process_count() > 1:
        return jax.jit(render, out_shardings=sharding.replicated(mesh))
    return jax.jit(render)


def _mesh(variables: Variables) -> Mesh | None:
    for leaf in jax.tree.leaves(variables):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            return leaf.sharding.mesh  # pyright: ignore[reportReturnType]
    return None
