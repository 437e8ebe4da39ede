"""The viewer: cameras from poses, inputs encoded once, and a page that is really served."""

import sys
import types
import urllib.request

import jax.numpy as jnp
import numpy as np
import pytest

from nvs_common import rendering, viewing
from nvs_common.data import procedural, views
from nvs_common.errors import InputError
from nvs_common.types import Aux, Render, Task
from quark_jax import task as quark_task
from tests import small_quark

VIEWS = 6


def scene(**changes):
    sizes = {"height": 16, "width": 24, "num_views": VIEWS, **changes}
    return procedural.World(seed=3, num_scenes=1, **sizes)[0]


def toy_task(encodes=True, depth=True, value=None):
    """Shows the mean of the inputs' mean colours, which are its features; depth is far."""

    def encode(variables, context):
        return {"mean": jnp.mean(context.images, axis=(2, 3))}

    def render_encoded(variables, context, features, targets):
        shape = (*targets.near.shape, targets.height, targets.width, 3)
        color = jnp.mean(features["mean"], axis=1)[:, None, None, None]
        image = jnp.broadcast_to(color if value is None else jnp.full_like(color, value), shape)
        far = jnp.broadcast_to(targets.far[..., None, None], shape[:-1])
        return Render(image, far if depth else None)

    def render(variables, context, targets):
        return render_encoded(variables, context, encode(variables, context), targets)

    parts = (encode, render_encoded) if encodes else (None, None)
    return Task(lambda key, batch: {}, lambda v, b, k: (jnp.zeros(()), Aux({})), render, {}, *parts)


def renderer(task=None, **changes):
    return viewing.SceneRenderer(task or toy_task(), {}, scene(**changes), "room")


def quaternion(rotation):
    """wxyz of a rotation matrix [3, 3] away from half turns."""
    w = np.sqrt(max(1e-12, 1 + np.trace(rotation))) / 2
    skew = rotation - rotation.T
    return np.array([w, skew[2, 1] / (4 * w), skew[0, 2] / (4 * w), skew[1, 0] / (4 * w)])


def pose_of(cameras, index, aspect=None):
    """The pose of one of the scene's cameras, as a client would send it."""
    matrix = np.asarray(cameras.world_from_cam, np.float64)[index]
    aspect = cameras.width / cameras.height if aspect is None else aspect
    fov = float(viewing.field_of_view(cameras)[index])
    return viewing.Pose(2 * quaternion(matrix[:3, :3]), matrix[:3, 3], fov, aspect)


def test_the_pose_of_an_input_gives_its_camera():
    cameras = scene(width=32).cameras
    for index in range(VIEWS):
        found = viewing.camera(pose_of(cameras, index), 16)
        assert (found.height, found.width) == (16, 32)
        np.testing.assert_allclose(
            found.world_from_cam[0], cameras.world_from_cam[index], atol=1e-6
        )
        # A window's principal point is in its middle, whatever the input's is.
        fx, fy = np.asarray(cameras.intrinsics[index], np.float64)[:2]
        np.testing.assert_allclose(found.intrinsics[0], [fx, fy, 16, 8], rtol=1e-5)


@pytest.mark.parametrize("aspect", [0.31, 0.5, 1.0, 1.73, 3.9])
def test_the_field_of_view_is_exact_whatever_the_window(aspect):
    pose = viewing.Pose(np.array([1, 0, 0, 0]), np.zeros(3), 1.2, aspect)
    found = viewing.camera(pose, 64)
    fx, fy, cx, cy = found.intrinsics[0]
    assert found.width % viewing.WIDTH_STEP == 0 and abs(found.width - 64 * aspect) <= 8
    assert cy / fy == pytest.approx(np.tan(0.6))
    assert cx / fx == pytest.approx(np.tan(0.6) * aspect)


def test_poses_that_are_none_are_refused():
    good = viewing.Pose(np.array([1.0, 0, 0, 0]), np.zeros(3), 1.0, 1.5)
    for changes in (
        {"wxyz": np.zeros(4)},
        {"position": np.array([0, np.nan, 0])},
        {"fov": 0.0},
        {"fov": 3.2},
        {"aspect": 0.0},
    ):
        with pytest.raises(InputError, match="reload the page"):
            viewing.camera(good._replace(**changes), 64)


def test_each_input_is_encoded_once_however_the_camera_moves():
    shown = renderer()
    for index in [*range(VIEWS), *range(VIEWS)]:
        frame = shown.frame(viewing.camera(pose_of(shown.cameras, index), 16), 3)
        assert frame.inputs[0] == index and len(set(frame.inputs)) == 3
    assert shown.encoded == VIEWS
    shown.frame(viewing.camera(pose_of(shown.cameras, 0), 32), 2)
    assert shown.encoded == VIEWS


def test_features_are_forgotten_where_memory_is_short(monkeypatch):
    shown = renderer()
    monkeypatch.setattr(rendering, "CACHE_BYTES", 1)
    for index in (0, VIEWS - 1, 0):
        shown.frame(viewing.camera(pose_of(shown.cameras, index), 16), 1)
    assert shown.encoded == 3


def test_a_system_that_does_not_encode_shows_the_same():
    one, other = renderer(toy_task()), renderer(toy_task(encodes=False))
    target = viewing.camera(pose_of(one.cameras, 2), 16)
    np.testing.assert_array_equal(one.frame(target, 3).image, other.frame(target, 3).image)
    assert other.encoded == 0


def test_modes_show_what_they_say():
    shown = renderer()
    target = viewing.camera(pose_of(shown.cameras, 4), 16)
    np.testing.assert_array_equal(shown.frame(target, 2, "nearest input").image, shown.picture(4))
    depth = shown.frame(target, 2, "depth").image
    assert (
        depth.shape == (16, target.width, 3) and len(np.unique(depth.reshape(-1, 3), axis=0)) == 1
    )


def test_what_cannot_be_shown_is_one_sentence():
    shown = renderer(toy_task(depth=False))
    target = viewing.camera(pose_of(shown.cameras, 0), 16)
    with pytest.raises(InputError, match="renders no depth"):
        shown.frame(target, 2, "depth")
    with pytest.raises(InputError, match="room: 6 of its 6 views may be inputs, but 7"):
        shown.frame(target, 7)
    with pytest.raises(InputError, match="room: .*not finite"):
        renderer(toy_task(value=np.nan)).frame(target, 2)


@pytest.mark.thorough
def test_quark_from_cached_features_is_quark():
    config = small_quark.config()
    task, variables = quark_task.make(config), small_quark.variables(config)
    room = scene()
    shown = viewing.SceneRenderer(task, variables, room, "room")
    target = viewing.camera(pose_of(room.cameras, 1), 16)
    frame = shown.frame(target, 3)
    inputs = frame.inputs[None]
    assert shown.encoded == 3
    (expected,) = rendering.render_targets(task.render, variables, room, target, inputs)
    difference = np.abs(frame.image / 255.0 - expected.image).max()
    assert difference < 0.5 / 255 + 1e-4


def test_a_visitor_starts_in_the_middle():
    cameras = scene().cameras
    centres = views.centers(cameras)
    distance = np.linalg.norm(centres - centres.mean(axis=0), axis=-1)
    assert viewing.central(cameras) == np.argmin(distance)


def test_the_rate_leaves_pauses_out():
    rate = viewing.Rate()
    assert rate.tick(0.0, 0.01) == 0.0
    times = [0.1, 0.2, 0.3, 60.0, 60.1]
    assert [rate.tick(t, 0.01) for t in times][-1] == pytest.approx(10.0)
    slow = viewing.Rate()
    assert [slow.tick(t, 3.0) for t in (0.0, 4.0, 8.0)][-1] == pytest.approx(0.25)


class Client:
    """A visitor without a browser; keeps the pictures it is sent."""

    def __init__(self, pose, number=0):
        self.client_id, self.pictures = number, []
        self.camera = types.SimpleNamespace(**pose._asdict())
        self.scene = types.SimpleNamespace(
            set_background_image=lambda image, **_: self.pictures.append(image)
        )


@pytest.fixture
def viewer(program):
    """A page on a free port, and the program."""
    pytest.importorskip("viser")
    module = program("viewer")
    server = module.import_viser().ViserServer("127.0.0.1", 8190, verbose=False)
    yield module.Viewer(server, renderer(), 3), server
    server.stop()


def test_the_page_is_served_and_a_visitor_is_shown_what_it_looks_at(viewer):
    page, server = viewer
    html = urllib.request.urlopen(f"http://127.0.0.1:{server.get_port()}/", timeout=20).read()
    assert b"<html" in html.lower()
    client = Client(pose_of(renderer().cameras, 2, aspect=2.0))
    page.ask(client)
    page.ask(client)
    assert page.step() == 1 and page.step() == 0
    (picture,) = client.pictures
    assert picture.shape == (16, 32, 3) and picture.dtype == np.uint8
    colors = [handle.color for handle in page._cameras]
    used = [k for k, color in enumerate(colors) if tuple(color) != (120, 120, 120)]
    assert len(used) == 3 and 2 in used
    assert "3 inputs encoded" in page.status.content and " ms" in page.status.content


def test_controls_change_what_is_shown(viewer):
    page, _ = viewer
    client = Client(pose_of(renderer().cameras, 2))
    page.height.value, page.num_inputs.value, page.mode.value = "32", 1, "depth"
    frame = page.show(client)
    assert frame.image.shape[0] == 32 and list(frame.inputs) == [2]
    # The camera that the visitor stands in would hide the picture.
    assert not page._cameras[2].visible and any(handle.visible for handle in page._cameras)
    assert page.show(client) and renderer().names[2] in page.status.content
    page.show_cameras.value = False
    page.show(client)
    assert not any(handle.visible for handle in page._cameras)
    client.camera.fov = 0.0
    assert page.show(client) is None and "reload the page" in page.status.content


def test_without_viser_the_command_that_installs_it_is_named(program, monkeypatch):
    module = program("viewer")
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[viewer\]'"):
        module.import_viser()
