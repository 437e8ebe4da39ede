"""Looking at a scene from any pose: the part of an interactive viewer that knows no browser.

A client's pose becomes a camera, the nearest inputs are chosen, and the system renders. Each input
is read once and, where the system can (`Task.encode`), encoded once, whatever the camera does.
"""

from __future__ import annotations

import collections
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nvs_common import panels, rendering
from nvs_common.data import views
from nvs_common.errors import InputError
from nvs_common.types import Cameras, Render, Task, Variables, Views

Mode = Literal["image", "depth", "nearest input"]
MODES: tuple[Mode, ...] = ("image", "depth", "nearest input")
# A picture's width is a multiple of this: a window that changes its shape seldom compiles anew.
WIDTH_STEP = 16
MAX_ASPECT = 4.0
# A pause longer than this and than two frames is one of the user, not of the renderer.
_PAUSE_SECONDS = 0.5


class Pose(NamedTuple):
    """Where a client looks from, OpenCV axes.

    Attributes:
      wxyz: [4] rotation from the camera to the world, a quaternion of any length.
      position: [3] camera centre in the world.
      fov: vertical field of view in radians.
      aspect: width / height of the window.
    """

    wxyz: Any
    position: Any
    fov: float
    aspect: float


class Frame(NamedTuple):
    """What a client is shown: image [h, w, 3] uint8, the inputs [v] it is made from, nearest
    first, and the seconds that rendering took."""

    image: np.ndarray
    inputs: np.ndarray
    seconds: float


def camera(pose: Pose, height: int) -> Cameras:
    """The camera [1] of a pose, `height` pixels high.

    The picture is as wide as the aspect asks, to a multiple of WIDTH_STEP. It is to be stretched
    to the window, so its field of view is exact in both directions and its pixels are not quite
    square. Near and far are those of the inputs, see `SceneRenderer.frame`.

    Raises:
      InputError: a pose that is no pose: not finite, no rotation, no field of view.
    """
    numbers = np.hstack([pose.wxyz, pose.position, pose.fov, pose.aspect]).astype(np.float64)
    usable = np.isfinite(numbers).all() and np.linalg.norm(numbers[:4]) > 0
    if not usable or not 0 < pose.fov < np.pi or pose.aspect <= 0:
        raise InputError(
            f"the client's pose {tuple(pose)} is not one of a camera; reload the page."
        )
    aspect = float(np.clip(pose.aspect, 1 / MAX_ASPECT, MAX_ASPECT))
    width = max(1, round(height * aspect / WIDTH_STEP)) * WIDTH_STEP
    slope = np.tan(pose.fov / 2)
    focal = [width / 2 / (slope * pose.aspect), height / 2 / slope]
    world_from_cam = np.eye(4)
    world_from_cam[:3, :3] = rotation(np.asarray(pose.wxyz, np.float64))
    world_from_cam[:3, 3] = pose.position
    intrinsics = np.array([[*focal, width / 2, height / 2]])
    return Cameras(world_from_cam[None], intrinsics, np.ones(1), np.ones(1), height, width)


def rotation(wxyz: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] of a quaternion [4] of any length."""
    w, x, y, z = wxyz / np.linalg.norm(wxyz)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def field_of_view(cameras: Cameras) -> np.ndarray:
    """Vertical field of view [...] in radians."""
    return 2 * np.arctan(cameras.height / 2 / np.asarray(cameras.intrinsics)[..., 1])


def central(cameras: Cameras) -> int:
    """Index of the camera [n] nearest to the middle of all: where a visitor starts."""
    centres = views.centers(cameras)
    return int(views.nearest(cameras, centres.mean(axis=0), 1)[0])


class SceneRenderer:
    """Renders one scene from any camera, on demand.

    Attributes:
      cameras: [n] of the scene.
      names: of its views.
      encoded: how many times an input was encoded so far.
    """

    def __init__(self, task: Task, variables: Variables, scene: Any, name: str):
        """Reads and renders nothing yet.

        Args:
          task: the system.
          variables: of the model.
          scene: with cameras [n], names and images(indices).
          name: the scene's, for errors.
        """
        self.cameras: Cameras = scene.cameras
        self.names: tuple[str, ...] = tuple(scene.names)
        self.encoded = 0
        self._variables, self._name, self._scene = variables, name, scene
        self._read = rendering.ImageReader(scene)
        # Features of each view, the last used at the end.
        self._features: collections.OrderedDict[int, Any] = collections.OrderedDict()
        # Inputs and features of the last frame: neighbouring frames mostly share them.
        self._last: tuple[bytes, Views, Any] | None = None
        self._encode = None if task.encode is None else jax.jit(task.encode)
        self._render_encoded = jax.jit(task.render_encoded) if task.render_encoded else None
        self._render = jax.jit(task.render)

    def picture(self, index: int) -> np.ndarray:
        """An input as it is, [h, w, 3] uint8."""
        return panels.to_uint8(self._read(np.array([index]))[0])

    def frame(self, target: Cameras, num_inputs: int, mode: Mode = "image") -> Frame:
        """Renders one camera [1] from its nearest inputs.

        Its near and far come from the inputs, see `views.bounded`; the depth's colours span them,
        so that they mean nearly the same in neighbouring frames.

        Raises:
          InputError: more inputs than the scene has, a mode that the system does not have, or
            the model's output is not finite.
        """
        allowed = np.arange(len(self.cameras.near))
        inputs = rendering.nearest_inputs(
            self.cameras, target, num_inputs, allowed=allowed, name=self._name
        )
        began = time.perf_counter()
        if mode == "nearest input":
            image = self.picture(inputs[0, 0])
            return Frame(image, inputs[0], time.perf_counter() - began)
        target = views.bounded(target, self._scene, inputs)
        shown = self._run(inputs[0], rendering.take(target, np.array([[0]])))
        if mode == "depth" and shown.depth is None:
            raise InputError("this system renders no depth; choose another mode.")
        values = np.asarray(jax.device_get(shown.depth if mode == "depth" else shown.images))[0, 0]
        if not np.isfinite(values).all():
            raise InputError(
                f"{self._name}: the model rendered values that are not finite; the training may "
                "have diverged, use an earlier --step."
            )
        if mode == "depth":
            image = panels.depth_image(values, (1 / target.far[0], 1 / target.near[0]))
        else:
            image = panels.to_uint8(values)
        return Frame(image, inputs[0], time.perf_counter() - began)

    def _run(self, inputs: np.ndarray, target: Cameras) -> Render:
        """Renders a target [1, 1] from inputs [v]."""
        key = inputs.tobytes()
        if self._last is None or self._last[0] != key:
            images = jnp.asarray(self._read(inputs)[None])
            context = Views(images, rendering.take(self.cameras, inputs[None]))
            self._last = (key, context, self._gather(inputs))
        _, context, features = self._last
        if self._render_encoded is None or features is None:
            return self._render(self._variables, context, target)
        return self._render_encoded(self._variables, context, features, target)

    def _gather(self, inputs: np.ndarray) -> Any:
        """Features [1, v, ...] of the inputs; only views that are new are encoded."""
        if self._encode is None:
            return None
        for index in map(int, inputs):
            if index not in self._features:
                images = jnp.asarray(self._read(np.array([index]))[None])
                view = Views(images, rendering.take(self.cameras, np.array([[index]])))
                self._features[index] = self._encode(self._variables, view)
                self.encoded += 1
            self._features.move_to_end(index)
        chosen = [self._features[int(index)] for index in inputs]
        self._forget(len(inputs))
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *chosen)

    def _forget(self, least: int) -> None:
        """Keeps as many features as fit into the memory for inputs, the last used ones."""
        leaves = jax.tree.leaves(next(iter(self._features.values())))
        room = rendering.CACHE_BYTES // max(1, sum(x.nbytes for x in leaves))
        while len(self._features) > max(least, room):
            self._features.popitem(last=False)


class Rate:
    """Frames a second over the last frames, pauses of the user left out."""

    def __init__(self, window: int = 20):
        """Averages over the last `window` frames."""
        self._gaps: collections.deque[float] = collections.deque(maxlen=window)
        self._last: float | None = None

    def tick(self, now: float, seconds: float) -> float:
        """Counts a frame.

        Args:
          now: time in seconds.
          seconds: that the frame took.

        Returns:
          Frames a second, 0 before it is known.
        """
        longest = max(_PAUSE_SECONDS, 2 * seconds)
        if self._last is not None and 0 < now - self._last <= longest:
            self._gaps.append(now - self._last)
        self._last = now
        return len(self._gaps) / sum(self._gaps) if self._gaps else 0.0
