"""Evaluation by an index file, and what the programs do with runs of LVSM."""

import csv
import dataclasses
import json

import imageio.v2 as imageio
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.metrics
from absl.testing import flagsaver
from PIL import Image

from launch import cli
from nvs_common import index_evaluation
from nvs_common.data import eval_index, views
from nvs_common.errors import InputError
from nvs_common.types import Aux, Render, Task
from tests import clip_writers, conftest, scene_writers, small_quark

SIZE, PATCH = 16, 4


def config(setting="tiny"):
    """configs/lvsm.py at 16 x 16 pixels, two small layers."""
    c = cli.load_config(f"{conftest.ROOT / 'configs' / 'lvsm.py'}:{setting}")
    c.data.update(height=SIZE, width=SIZE, num_context=2, views_per_scene=6)
    c.eval.update(num_scenes=1, photo_size=(SIZE, SIZE))
    c.model.update(width=16, head_size=8, patch=PATCH)
    return c


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three clips of RealEstate10K: a, b, and c, whose cameras all stand in one place."""
    root = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate("abc"):
        rig = scene_writers.make_rig(seed, count=6, height=24, width=40)
        if name == "c":
            rig.poses[:, :3, 3] = [3.0, -1.0, 7.0]
        scene_writers.write_realestate(rig, root)
        (root / "clip").rename(root / name)
        (root / "clip.txt").rename(root / f"{name}.txt")
    return root


def write_index(path, **entries):
    path.write_text(json.dumps(entries))
    return path


def entry(context, target):
    return {"context": context, "target": target}


def copy_task(seen):
    """Renders the first input for every target, and notes the cameras it was given."""

    def render(variables, context, targets):
        seen.append((context.images.shape, targets.near.shape))
        images = jnp.broadcast_to(context.images[:, :1], (*targets.near.shape, SIZE, SIZE, 3))
        return Render(images + 0 * variables["bias"])

    return Task(lambda k, b: {}, lambda v, b, k: (jnp.zeros(()), Aux({})), render, {})


PROTOCOL = index_evaluation.Protocol(SIZE, PATCH)
VARIABLES = {"bias": np.zeros((), np.float32)}


def evaluate(index, found, task=None, protocol=PROTOCOL):
    return index_evaluation.evaluate_index(task or copy_task([]), VARIABLES, index, found, protocol)


def published_frame(path):
    """A frame prepared from the text of the protocol, apart from the library."""
    width = round(int(SIZE / 24 * 40) / PATCH) * PATCH
    image = Image.open(path).convert("RGB").resize((width, SIZE), Image.Resampling.LANCZOS)
    left = (width - SIZE) // 2
    return np.asarray(image)[:, left : left + SIZE] / 255.0


def test_scores_are_those_of_the_indexed_frames(clips, tmp_path):
    path = write_index(tmp_path / "i.json", a=entry([4, 1], [0, 4, 2]), b=None)
    index, seen = eval_index.read(path), []
    result = evaluate(index, eval_index.find(clips, index.choices), copy_task(seen))
    # All targets of a scene in one call: poses may be normalised over all of its views.
    assert seen == [((1, 2, SIZE, SIZE, 3), (1, 3))]
    (scene,) = result.scenes
    assert scene.inputs == ("104.png", "101.png")
    assert scene.names == ("100.png", "104.png", "102.png")
    pred = published_frame(clips / "a" / "104.png")
    for name, score in zip(scene.names, scene.scores, strict=True):
        truth = published_frame(clips / "a" / name)
        if name == "104.png":
            assert score["psnr"] == pytest.approx(100)
            continue
        mse = np.mean((pred - truth) ** 2)
        assert score["psnr"] == pytest.approx(-10 * np.log10(mse), abs=1e-4)
        expected = skimage.metrics.structural_similarity(
            pred, truth, win_size=11, gaussian_weights=True, channel_axis=-1, data_range=1.0
        )
        assert score["ssim_sample"] == pytest.approx(expected, abs=1e-5)
    assert result.null == ("b",) and result.complete
    assert result.mean("psnr") == pytest.approx(np.mean([s["psnr"] for s in scene.scores]))


def test_what_is_missing_or_bad_is_in_the_result_by_name(clips, tmp_path):
    names = {"a": entry([0, 1], [2]), "gone": entry([0, 1], [2]), "b": entry([0, 1], [6])}
    names["c"] = entry([0, 1], [2])
    index = eval_index.read(write_index(tmp_path / "i.json", **names))
    result = evaluate(index, eval_index.find(clips, index.choices))
    assert [scene.name for scene in result.scenes] == ["a"]
    assert result.missing == ("gone",) and not result.complete
    assert "asks for frame 6, but scene b has 6 frames" in result.failed["b"]
    assert "stand in one place" in result.failed["c"]
    text = index_evaluation.summary(result)
    assert text.startswith("INCOMPLETE") and "1 of 4 scenes" in text
    assert "missing: 1 scenes: gone" in text and "failed: b: " in text
    index_evaluation.write(result, {"index": "i"}, tmp_path)
    rows = list(csv.reader((tmp_path / "scenes.csv").open()))
    assert rows[0] == ["scene", "psnr", "ssim_sample"] and rows[1][0] == "a"
    assert rows[2:] == [["gone", "missing"], ["b", "failed"], ["c", "failed"]]
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["missing"] == ["gone"] and set(stored["failed"]) == {"b", "c"}
    assert stored["complete"] is False and stored["evaluated"] == 1


def test_cameras_in_one_place_are_no_fault_where_poses_stay_as_they_are(clips, tmp_path):
    index = eval_index.read(write_index(tmp_path / "i.json", c=entry([0, 1], [2])))
    plain = dataclasses.replace(PROTOCOL, normalize="none")
    found = eval_index.find(clips, index.choices)
    assert evaluate(index, found, protocol=plain).complete
    with pytest.raises(InputError, match="no scene of the index.*stand in one place"):
        evaluate(index, found)


def test_a_frame_that_is_missing_fails_the_scene_and_shifts_nothing(clips, tmp_path):
    rig = scene_writers.make_rig(7, count=6, height=24, width=40)
    scene_writers.write_realestate(rig, tmp_path)
    (tmp_path / "clip" / "102.png").unlink()
    index = eval_index.read(write_index(tmp_path / "i.json", clip=entry([0, 1], [4])))
    with pytest.raises(InputError, match="102"):
        evaluate(index, eval_index.find(tmp_path, index.choices))


@pytest.mark.parametrize(
    "content, says",
    [
        ([], "expected an object"),
        ({"a": {"context": [0]}}, "scene 'a': target is None"),
        ({"a": {"context": [0, -1], "target": [1]}}, "scene 'a': context"),
        ({"a": {"context": [True], "target": [1]}}, "scene 'a': context"),
        ({"../a": {"context": [0], "target": [1]}}, "no name of a folder"),
        ({"a": 3}, "scene 'a' is 3"),
        ({"a": None}, "every scene of the index is null"),
    ],
)
def test_bad_indices_are_explained(tmp_path, content, says):
    path = tmp_path / "index.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"index.json: .*{says}"):
        eval_index.read(path)


def test_the_published_indices_read(shared_data):
    folder = shared_data / "eval_indices"
    index = eval_index.read(folder / "evaluation_index_re10k.json")
    assert (len(index.choices), len(index.null)) == (6474, 720)
    gaps = [np.ptp(choice.context) for choice in index.choices.values()]
    assert min(gaps) >= 45 and isinstance(next(iter(index.choices.values())), views.Choice)
    found = eval_index.find(shared_data / "re10k_cameras", index.choices)
    assert (len(found.paths), len(found.missing)) == (10, 6464)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    small_quark.save_run(workdir, config())
    return workdir


def test_the_program_evaluates_by_an_index(run, clips, tmp_path, program, capsys):
    index = write_index(
        tmp_path / "i.json", a=entry([0, 1], [2, 3]), b=entry([2, 0], [1, 5]), x=entry([0], [1])
    )
    main, out = program("evaluate").main, tmp_path / "out"
    flags = dict(workdir=str(run), data=str(clips), index=str(index), out=str(out))
    with flagsaver.flagsaver(protocol="re10k", **flags):
        with pytest.raises(InputError, match="1 of 3 scenes of the index are missing: x"):
            main([])
        assert not out.exists()
        with flagsaver.flagsaver(allow_missing=True):
            assert main([]) == 0
    said = capsys.readouterr().out
    assert "INCOMPLETE" in said and "2 of 3 scenes" in said and "missing: 1 scenes: x" in said
    stored = json.loads((out / "metrics.json").read_text())
    assert stored["facts"]["poses normalised over"] == "inputs"
    assert [scene["name"] for scene in stored["scenes"]] == ["a", "b"]
    assert 3 < stored["mean"]["psnr"] < 30


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    """The same clips as pixelSplat's chunks, as LVSM's metadata and as text files."""
    root = tmp_path_factory.mktemp("distributed")
    clip_writers.write_all(root)
    return root


@pytest.mark.parametrize("layout", ["chunks", "lvsm"])
def test_the_program_evaluates_clips_as_they_are_distributed(
    run, distributed, layout, tmp_path, program, capsys
):
    first, second, third = clip_writers.KEYS
    entries = {key: entry([0, 3], [1, 2]) for key in (third, first)}
    index = write_index(tmp_path / "i.json", **entries, **{second: None}, absent=entry([0, 1], [2]))
    main, out = program("evaluate").main, tmp_path / "out"
    flags = dict(workdir=str(run), data=str(distributed / layout), index=str(index))
    with flagsaver.flagsaver(protocol="re10k", allow_missing=True, out=str(out), **flags):
        assert main([]) == 0
    said = capsys.readouterr().out
    assert "2 of 3 scenes evaluated; to 1 more" in said and "missing: 1 scenes: absent" in said
    rows = list(csv.reader((out / "scenes.csv").open()))
    assert [row[0] for row in rows] == ["scene", third, first, "absent"]
    stored = json.loads((out / "metrics.json").read_text())
    assert stored["null"] == [second] and not stored["failed"]
    # As from the text files, whose frames are losslessly the same.
    flags |= dict(data=str(distributed / "text"), out=str(tmp_path / "text"))
    with flagsaver.flagsaver(protocol="re10k", allow_missing=True, **flags):
        assert main([]) == 0
    plain = json.loads((tmp_path / "text" / "metrics.json").read_text())
    assert stored["mean"]["psnr"] == pytest.approx(plain["mean"]["psnr"], abs=0.05)


def test_a_scene_that_cannot_be_read_fails_the_program_after_the_others(
    run, clips, tmp_path, program, capsys
):
    index = write_index(tmp_path / "i.json", a=entry([0, 1], [2]), b=entry([0, 1], [99]))
    flags = dict(workdir=str(run), data=str(clips), index=str(index), out=str(tmp_path / "o"))
    main = program("evaluate").main
    with flagsaver.flagsaver(protocol="re10k", **flags):
        with pytest.raises(InputError, match="1 scenes could not be evaluated: b"):
            main([])
    assert "failed: b" in capsys.readouterr().out
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["evaluated"] == 1


def test_flags_that_the_protocol_fixes_are_refused(run, clips, program):
    main = program("evaluate").main
    with flagsaver.as_parsed(protocol="re10k", workdir=str(run), size="8x8"):
        with pytest.raises(InputError, match="--size: --protocol=re10k fixes them"):
            main([])
    with flagsaver.flagsaver(protocol="re10k", workdir=str(run), data=str(clips)):
        with pytest.raises(InputError, match="needs --data=CLIPS and --index"):
            main([])
    with flagsaver.flagsaver(workdir=str(run), index="i.json"):
        with pytest.raises(InputError, match="belong to --protocol=re10k"):
            main([])


@pytest.mark.parametrize("path, frames", [("orbit", 3), ("spiral", 3), ("interpolate", 3)])
def test_videos_of_a_run(run, tmp_path, program, path, frames):
    out = tmp_path / "video.gif"
    flags = dict(workdir=str(run), scene="procedural:3", path=path, frames=frames, out=str(out))
    main = program("render").main
    with flagsaver.flagsaver(**flags):
        assert main([]) == 0
    assert imageio.mimread(out)[0].shape[:2] == (SIZE, SIZE)


def test_transitions_show_both_ends_of_each(run, tmp_path, program, capsys):
    out = tmp_path / "video.gif"
    flags = dict(workdir=str(run), scene="procedural:3", path="transitions", frames=2)
    main = program("render").main
    with flagsaver.flagsaver(**flags, out=str(out), loop=True):
        assert main([]) == 0
    # Six cameras, six transitions of two frames.
    assert "12 frames" in capsys.readouterr().out


@pytest.mark.thorough
def test_the_default_protocol_evaluates_a_run(tmp_path, program, capsys):
    small_quark.save_run(tmp_path / "run", config("tiny_encoder_decoder"))
    main = program("evaluate").main
    with flagsaver.flagsaver(workdir=str(tmp_path / "run")):
        assert main([]) == 0
    assert "nearest_view" in capsys.readouterr().out
