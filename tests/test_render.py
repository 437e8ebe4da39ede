"""The programs that evaluate and render: flags, files, videos and one-line errors."""

import json
import pathlib
import subprocess
import sys

import imageio.v2 as imageio
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from configs import quark
from launch import trained
from nvs_common import rendering, video
from nvs_common.errors import InputError
from nvs_common.types import Aux, Cameras, Render, Task

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _toy_task(with_depth=True, value=None):
    """Renders the mean of the inputs, or a constant; depth is the far plane."""

    def render(variables, context, targets):
        mean = jnp.mean(context.images, axis=1, keepdims=True)
        mean = jnp.broadcast_to(mean, (*targets.far.shape, *mean.shape[2:]))
        images = mean if value is None else jnp.full_like(mean, value)
        depth = jnp.broadcast_to(targets.far[..., None, None], images.shape[:-1])
        return Render(images + 0 * variables["bias"], depth if with_depth else None)

    return Task(lambda key, batch: {}, lambda v, b, k: (jnp.zeros(()), Aux({})), render, {})


@pytest.fixture
def toy_run(monkeypatch):
    """A run whose checkpoint is a toy; `set_task` exchanges its task."""
    config = ml_collections.ConfigDict(
        {
            "system": "toy",
            "seed": 0,
            "data": {
                "source": "procedural",
                "height": 12,
                "width": 18,
                "num_context": 3,
                "views_per_scene": 9,
            },
            "eval": {"num_scenes": 1},
        }
    )
    tasks = [_toy_task()]

    def load(source):
        variables = {"bias": np.zeros((), np.float32)}
        path = pathlib.Path(source.workdir.value)
        return trained.Trained(config, tasks[0], variables, source.step.value or 7, path, {})

    monkeypatch.setattr(trained, "load", load)

    def set_task(task):
        tasks[0] = task

    return set_task


@pytest.fixture
def render(toy_run, program, tmp_path):
    """Runs launch/render.py on the toy with flags."""
    main = program("render").main

    def call(**values):
        values = {"workdir": str(tmp_path), "scene": "procedural:3", "frames": 4, **values}
        with flagsaver.flagsaver(**values):
            return main([])

    return call


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_video_has_every_frame_at_an_even_size(tmp_path, suffix):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (7, 33, 47, 3), dtype=np.uint8)
    path = tmp_path / "deep" / f"video{suffix}"
    assert video.write(path, iter(frames), fps=10) == 7
    read = imageio.mimread(path)
    assert len(read) == 7
    assert {frame.shape[:2] for frame in read} == {(34, 48)}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_gif_keeps_frames_that_are_equal(tmp_path):
    frames = np.zeros((5, 8, 8, 3), np.uint8)
    frames[3:] = 200
    video.write(tmp_path / "still.gif", frames, fps=20)
    with Image.open(tmp_path / "still.gif") as image:
        total = 0
        for index in range(image.n_frames):
            image.seek(index)
            total += image.info["duration"]
    assert total == 5 * 50


def test_a_failing_render_leaves_no_file(tmp_path):
    def frames():
        yield np.zeros((8, 8, 3), np.uint8)
        raise InputError("the second frame cannot be rendered")

    for name in ("a.mp4", "a.gif"):
        with pytest.raises(InputError, match="second frame"):
            video.write(tmp_path / name, frames(), fps=10)
    assert list(tmp_path.iterdir()) == []


def test_bad_videos_are_refused(tmp_path):
    with pytest.raises(InputError, match="mp4 or .gif"):
        video.write(tmp_path / "a.avi", [], 10)
    with pytest.raises(InputError, match="fps=0"):
        video.write(tmp_path / "a.mp4", [], 0)
    with pytest.raises(InputError, match="no frame"):
        video.write(tmp_path / "a.mp4", [], 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["orbit", "spiral", "interpolate"])
def test_rendering_a_procedural_scene_writes_every_frame(render, tmp_path, path):
    out = tmp_path / "video.mp4"
    assert render(path=path, out=str(out), chunk=3) == 0
    read = imageio.mimread(out)
    assert len(read) == 4 and read[0].shape == (12, 18, 3)


def test_rendering_follows_a_json_path_and_shows_depth(render, tmp_path):
    frames = [{"world_from_cam": np.eye(4).tolist()}] * 3
    (tmp_path / "path.json").write_text(json.dumps(frames))
    out = tmp_path / "video.gif"
    render(path=str(tmp_path / "path.json"), out=str(out), depth=True, size="10x14")
    with Image.open(out) as image:
        assert image.size == (14 + 2 + 14, 10)


def test_bad_requests_of_rendering_are_one_sentence(render, toy_run, tmp_path):
    out = str(tmp_path / "video.mp4")
    for message, values in {
        "--path='circle'": {"path": "circle"},
        "frames=0": {"frames": 0},
        "9 of its 9 views may be inputs, but 10": {"num_inputs": 10},
        "procedural:SEED": {"scene": "procedural:x"},
        "--size='big'": {"size": "big"},
        "--chunk=0": {"chunk": 0},
        "absent": {"scene": str(tmp_path / "absent")},
        "mp4 or .gif": {"out": str(tmp_path / "video.mkv")},
    }.items():
        with pytest.raises(InputError, match=message):
            render(**{"out": out, **values})
    toy_run(_toy_task(with_depth=False))
    with pytest.raises(InputError, match="renders no depth"):
        render(out=out, depth=True)
    toy_run(_toy_task(value=np.nan))
    with pytest.raises(InputError, match="frame 0 of procedural:3.*not finite"):
        render(out=out)
    assert list(tmp_path.iterdir()) == []


def test_evaluating_a_run_writes_report_and_numbers(toy_run, program, tmp_path, capsys):
    main = program("evaluate").main
    with flagsaver.flagsaver(workdir=str(tmp_path), num_scenes=2, holdout=4):
        assert main([]) == 0
    saved = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert [scene["name"] for scene in saved["scenes"]] == ["0 procedural", "1 procedural"]
    assert [view["index"] for view in saved["scenes"][0]["views"]] == [0, 4, 8]
    assert saved["facts"]["checkpoint"] == "step 7" and saved["config"]["system"] == "toy"
    printed = capsys.readouterr().out
    assert "plane_sweep" in printed and str(tmp_path / "evaluation" / "report.html") in printed


def test_evaluating_photographs_names_the_scene(toy_run, program, tmp_path, shared_data):
    scene = shared_data / "lund_street"
    values = {"data": str(scene), "out": str(tmp_path / "out"), "size": "24x32", "num_inputs": 2}
    main = program("evaluate").main
    with flagsaver.flagsaver(workdir=str(tmp_path), holdout=16, **values):
        main([])
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [scene["name"] for scene in saved["scenes"]] == ["lund_street"]
    assert saved["scenes"][0]["height"] == 24 and len(saved["scenes"][0]["views"]) == 2


def test_set_of_the_cameras_to_show_reaches_a_procedural_scene():
    spans = []
    for change in ("data.baseline=[0.5,0.5]", "eval.baseline=[0.1,0.1]", "eval.baseline=[0.5,0.5]"):
        config = quark.get_config("tiny")
        config.update(data=dict(rigs=("grid",)), eval=dict(baseline=(0.1, 0.1)))
        trained._change(config, change)
        scene = trained.scene("procedural:3", config, (12, 18))
        spans.append(np.ptp(scene.cameras.world_from_cam[:, 0, 3]))
    # Cameras of training are not those that are shown.
    assert spans[0] == spans[1] and spans[2] > 3 * spans[1]


def test_scenes_at_finds_one_scene_or_several(shared_data):
    (one,) = trained.scenes_at(str(shared_data / "lund_street"), (24, 32))
    assert one[0] == "lund_street"
    with pytest.raises(InputError, match="not a scene"):
        trained.scenes_at(str(shared_data / "eval_indices"), (24, 32))


@pytest.mark.thorough
def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    for program, arguments in (
        ("evaluate.py", [f"--workdir={tmp_path}/none"]),
        ("render.py", [f"--workdir={tmp_path}/none", "--scene=procedural:1", "--out=a.avi"]),
        ("render.py", ["--scene=procedural:1", "--out=a.mp4"]),
        ("release.py", [f"--workdir={tmp_path}/none", "--out=a.npz"]),
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / "launch" / program), *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 2 and done.stdout == ""
        assert len(done.stderr.strip().splitlines()) == 1
        assert done.stderr.startswith(f"{program}: error: ")
    assert list(tmp_path.iterdir()) == []


class _PlainScene:
    """Six cameras in a row; the images show their number."""

    cameras = Cameras(
        np.tile(np.eye(4, dtype=np.float32), (6, 1, 1)),
        np.tile(np.array([8, 8, 4, 3], np.float32), (6, 1)),
        np.ones(6, np.float32),
        np.full(6, 9, np.float32),
        6,
        8,
    )

    def images(self, indices):
        return np.stack([np.full((6, 8, 3), i / 10, np.float32) for i in indices])


def test_targets_with_the_same_inputs_are_one_scene():
    shapes = []

    def render(variables, context, targets):
        del variables
        shapes.append((context.images.shape[:2], targets.near.shape))
        mean = jnp.mean(context.images, axis=1, keepdims=True)
        images = jnp.broadcast_to(mean, (*targets.near.shape, 6, 8, 3))
        return Render(images + 0.01 * targets.near[..., None, None, None])

    scene = _PlainScene()
    inputs = np.array([[0, 1], [1, 0], [0, 1], [2, 3], [4, 5]])
    targets = scene.cameras[:5]
    whole = list(rendering.render_targets(render, {}, scene, targets, inputs, chunk=2))
    single = list(rendering.render_targets(render, {}, scene, targets, inputs))
    # Traced once a shape: two targets of one scene, two of different ones, and one at a time.
    assert shapes == [((1, 2), (1, 2)), ((2, 2), (2, 1)), ((1, 2), (1, 1))]
    for a, b in zip(whole, single, strict=True):
        np.testing.assert_allclose(a.image, b.image, atol=1e-6)
