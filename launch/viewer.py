"""Looks at a scene in the browser: python launch/viewer.py --workdir=runs/a --scene=PATH

Serves a page in which the mouse moves the camera and the model renders what it sees, from the
inputs nearest to it; those are highlighted among the scene's cameras. Click on a camera to stand
there. --weights=FILE takes released weights in place of a run, --weights=default those of the
checkout. Needs viser: pip install -e '.[viewer]'. Ctrl-C ends it. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import pathlib
import sys
import threading
import time
from typing import Any, NoReturn

# launch/ and configs/ belong to the checkout and are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
from absl import flags

from launch import cli, trained
from nvs_common import trajectories, viewing
from nvs_common.data import views
from nvs_common.errors import InputError

_SOURCE = trained.define_source()
_SCENE = flags.DEFINE_string(
    "scene",
    None,
    "A scene folder (COLMAP, nerfstudio, LLFF, ...) or procedural:SEED.",
    required=True,
)
_SIZE = flags.DEFINE_string(
    "size",
    "auto",
    "HEIGHTxWIDTH of the inputs, auto (photographs: config.eval.photo_size; else the "
    "training size) or native (of the stored images). The "
    "size of what is shown is chosen in the page.",
)
_NUM_INPUTS = flags.DEFINE_integer(
    "num_inputs",
    None,
    "Input views of each picture, the nearest by camera centre; as many as in training "
    "(config.data.num_context) by default. The page can change it.",
)
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Address to serve on; 0.0.0.0 lets other machines look."
)
_PORT = flags.DEFINE_integer("port", 8080, "Port to serve on; the next free one if it is taken.")

NORMAL, USED = (120, 120, 120), (255, 120, 20)
# Heights of the picture that the page offers, as shares of the inputs' height.
SCALES = (0.5, 0.75, 1.0, 1.5, 2.0)
MOST_INPUTS = 16


class Viewer:
    """A page on a viser server that shows one scene; `run` renders what its visitors look at.

    Visitors share what the page's controls say; each has its own camera.
    """

    def __init__(self, server: Any, renderer: viewing.SceneRenderer, num_inputs: int):
        """Fills the page and waits for visitors.

        Args:
          server: a viser.ViserServer.
          renderer: of the scene.
          num_inputs: inputs of each picture at the start.
        """
        self._server, self._renderer = server, renderer
        self._rate = viewing.Rate()
        self._changed = threading.Event()
        self._waiting: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._used: set[int] = set()
        self._compiled: set[tuple[int, ...]] = set()
        self._add_controls(num_inputs)
        self._cameras = self._add_cameras()
        server.on_client_connect(self._connect)
        server.on_client_disconnect(self._disconnect)

    def run(self) -> NoReturn:
        """Renders until it is interrupted."""
        while True:
            self._changed.wait()
            self.step()

    def step(self) -> int:
        """Renders for everyone whose camera or controls have changed; how many that were."""
        self._changed.clear()
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for client in waiting.values():
            self.show(client)
        return len(waiting)

    def show(self, client: Any) -> viewing.Frame | None:
        """Renders what a client sees and sends it; what cannot be rendered is said in the page."""
        eye = client.camera
        pose = viewing.Pose(eye.wxyz, eye.position, eye.fov, eye.aspect)
        try:
            target = viewing.camera(pose, int(self.height.value))
            count = int(self.num_inputs.value)
            self._announce((target.height, target.width, count))
            frame = self._renderer.frame(target, count, self.mode.value)
        except InputError as error:
            self.status.content = f"**{error}**"
            return None
        client.scene.set_background_image(frame.image, format="jpeg", jpeg_quality=90)
        self._highlight(frame.inputs)
        self._make_room(np.asarray(eye.position))
        rate = self._rate.tick(time.perf_counter(), frame.seconds)
        height, width = frame.image.shape[:2]
        names = ", ".join(self._renderer.names[index] for index in frame.inputs)
        self.status.content = (
            f"{1e3 * frame.seconds:.0f} ms, {rate:.1f} frames/s  \n{height} x {width} pixels, "
            f"{self._renderer.encoded} inputs encoded  \nfrom {names}"
        )
        return frame

    def _announce(self, shape: tuple[int, ...]) -> None:
        """Says why the first picture of a height, width and number of inputs takes long."""
        if shape not in self._compiled:
            self.status.content = f"compiling for {shape[0]} x {shape[1]} pixels, {shape[2]} inputs"
            self._compiled.add(shape)

    def ask(self, client: Any) -> None:
        """Notes that a client's picture is out of date; only its newest camera will be rendered."""
        with self._lock:
            self._waiting[client.client_id] = client
        self._changed.set()

    def _connect(self, client: Any) -> None:
        client.camera.on_update(lambda _: self.ask(client))
        self.ask(client)

    def _disconnect(self, client: Any) -> None:
        with self._lock:
            self._waiting.pop(client.client_id, None)

    def _add_controls(self, num_inputs: int) -> None:
        gui, cameras = self._server.gui, self._renderer.cameras
        heights = [str(max(8, round(cameras.height * scale))) for scale in SCALES]
        self.height = gui.add_dropdown("height", heights, initial_value=heights[2])
        most = min(len(cameras.near), max(MOST_INPUTS, num_inputs))
        self.num_inputs = gui.add_slider("inputs", 1, most, 1, num_inputs)
        self.mode = gui.add_dropdown("mode", viewing.MODES, initial_value=viewing.MODES[0])
        self.show_cameras = gui.add_checkbox("cameras", True)
        self.status = gui.add_markdown("waiting for a visitor's camera")
        for control in (self.height, self.num_inputs, self.mode):
            control.on_update(lambda _: self._ask_all())
        self.show_cameras.on_update(lambda _: self._ask_all())

    def _ask_all(self) -> None:
        for client in self._server.get_clients().values():
            self.ask(client)

    def _make_room(self, eye: np.ndarray) -> None:
        """Shows the cameras, if the page asks for them, but not those that a visitor stands in."""
        apart = np.linalg.norm(self._centres - eye, axis=-1)
        shown = self.show_cameras.value & (apart > 3 * self._scale)
        for handle, visible in zip(self._cameras, shown.tolist(), strict=True):
            if handle.visible != visible:
                handle.visible = visible

    def _add_cameras(self) -> list[Any]:
        """Shows the inputs as frusta and puts visitors at the most central of them."""
        cameras, scene = self._renderer.cameras, self._server.scene
        poses, fov = np.asarray(cameras.world_from_cam), viewing.field_of_view(cameras)
        scene.set_up_direction(-poses[:, :3, 1].mean(axis=0))
        self._centres = views.centers(cameras)
        # Length of the pyramids that stand for cameras.
        self._scale = 0.3 * _spacing(self._centres)
        handles = []
        for index in range(len(poses)):
            # Without a picture in it: whoever stands at a camera would see that and no render.
            handle = scene.add_camera_frustum(
                f"/inputs/{index}",
                float(fov[index]),
                cameras.width / cameras.height,
                scale=self._scale,
                color=NORMAL,
                wxyz=_quaternion(poses[index, :3, :3]),
                position=poses[index, :3, 3],
            )
            handle.on_click(lambda event, k=index: self._stand_at(event.client, k))
            handles.append(handle)
        self._stand_at_first(viewing.central(cameras), fov)
        return handles

    def _stand_at_first(self, index: int, fov: np.ndarray) -> None:
        start, pose = self._server.initial_camera, self._renderer.cameras.world_from_cam[index]
        start.position, start.up = pose[:3, 3], -pose[:3, 1]
        start.look_at, start.fov = self._focus(pose), float(fov[index])

    def _stand_at(self, client: Any, index: int) -> None:
        pose = self._renderer.cameras.world_from_cam[index]
        with client.atomic():
            client.camera.position = pose[:3, 3]
            client.camera.up_direction = -pose[:3, 1]
            client.camera.look_at = self._focus(pose)

    def _focus(self, pose: np.ndarray) -> np.ndarray:
        """The point in front of a camera that the mouse turns around."""
        return pose[:3, 3] + pose[:3, 2] * trajectories.focus_depth(self._renderer.cameras)

    def _highlight(self, inputs: np.ndarray) -> None:
        used = {int(index) for index in inputs}
        for index in used ^ self._used:
            self._cameras[index].color = USED if index in used else NORMAL
        self._used = used


def main(_) -> int:
    """Serves the page until it is interrupted; returns the exit code."""
    viser = import_viser()
    model = trained.load(_SOURCE)
    photographs = not _SCENE.value.startswith(trained.PROCEDURAL)
    size = trained.size(_SIZE.value, model.config, photographs=photographs)
    scene = trained.scene(_SCENE.value, model.config, size)
    asked = _NUM_INPUTS.value
    num_inputs = model.config.data.num_context if asked is None else asked
    if not 1 <= num_inputs <= len(scene.names):
        raise InputError(
            f"--num_inputs={num_inputs}: {_SCENE.value} has {len(scene.names)} views; ask for 1 "
            "to as many."
        )
    renderer = viewing.SceneRenderer(model.task, model.variables, scene, _SCENE.value)
    server = viser.ViserServer(_HOST.value, _PORT.value, label=_SCENE.value, verbose=False)
    try:
        viewer = Viewer(server, renderer, num_inputs)
        print(
            f"open http://{_HOST.value}:{server.get_port()} in a browser; Ctrl-C ends", flush=True
        )
        viewer.run()
    except KeyboardInterrupt:
        return 0
    finally:
        server.stop()


def import_viser() -> Any:
    """viser, which is optional.

    Raises:
      InputError: it is not installed.
    """
    try:
        import viser  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise InputError(
            f"the viewer needs viser ({e}); install it with: pip install -e '.[viewer]'"
        ) from e
    return viser


def _spacing(centres: np.ndarray) -> float:
    """Median distance of camera centres [n, 3] to their nearest neighbour."""
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    nearest = distance.min(axis=1)
    usable = nearest[np.isfinite(nearest) & (nearest > 0)]
    return float(np.median(usable)) if usable.size else 1.0


def _quaternion(rotation: np.ndarray) -> np.ndarray:
    return import_viser().transforms.SO3.from_matrix(rotation).wxyz


if __name__ == "__main__":
    cli.run(main)
