"""Released weights: the same pictures from one file, honest cards, and no file half believed."""

import io
import json
import os
import zipfile

import imageio.v2 as imageio
import jax
import numpy as np
import pytest
from absl.testing import flagsaver

from launch import trained
from nvs_common import errors, model_card, runs, weights
from nvs_common.types import Cameras, Views
from tests import conftest, small_quark


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = small_quark.config()
    config.loss.lpips_weights = "/home/me/lpips.npz"
    config.data.source = "procedural"
    small_quark.save_run(workdir, config)
    return workdir


@pytest.fixture(scope="module")
def released(run, tmp_path_factory):
    """A file of weights, written without the program."""
    path = tmp_path_factory.mktemp("released") / "w.npz"
    config = small_quark.config()
    weights.write(path, weights.Weights(config, small_quark.variables(config), 5, {}))
    return path


@pytest.fixture
def release(program, run):
    def call(**values):
        main = program("release").main
        with flagsaver.flagsaver(workdir=str(run), **{k: str(v) for k, v in values.items()}):
            return main([])

    return call


def load(program, **values):
    """What launch/render.py loads for flags."""
    module = program("render")
    with flagsaver.flagsaver(**values):
        return trained.load(module._SOURCE)


def rendered(model):
    rng = np.random.default_rng(2)
    pose = np.tile(np.eye(4, dtype=np.float32), (1, 4, 1, 1))
    pose[..., :2, 3] = 0.1 * rng.normal(size=(1, 4, 2))
    intrinsics = np.tile(np.float32([24, 24, 12, 8]), (1, 4, 1))
    near, far = np.full((1, 4), 1, np.float32), np.full((1, 4), 9, np.float32)
    cameras = Cameras(pose, intrinsics, near, far, 16, 24)
    images = rng.random((1, 3, 16, 24, 3), np.float32)
    context = Views(images, cameras[:, :3])
    return jax.device_get(jax.jit(model.task.render)(model.variables, context, cameras[:, 3:]))


@pytest.mark.thorough
def test_a_run_and_its_release_render_the_same_bit_for_bit(
    release, program, run, tmp_path, monkeypatch
):
    file = tmp_path / "deep" / "w.npz"
    assert release(out=file) == 0
    assert sorted(p.name for p in file.parent.iterdir()) == ["w.md", "w.npz"]
    assert release(out=file.with_name("again.npz")) == 0
    assert file.read_bytes() == file.with_name("again.npz").read_bytes()
    from_file = load(program, weights=str(file))
    monkeypatch.setattr(trained, "DEFAULT_WEIGHTS", file)
    by_default = load(program, weights="default")
    # The run's task would look for the weights of LPIPS, which are not on this machine.
    from_run = load(program, workdir=str(run), set=["loss.lpips_weights="])
    for model in (from_file, by_default):
        jax.tree.map(np.testing.assert_array_equal, model.variables, from_run.variables)
        jax.tree.map(np.testing.assert_array_equal, rendered(model), rendered(from_run))
    assert from_file.step == 5 and from_file.config == from_run.config


@pytest.mark.parametrize("pair", ["[0.1,0.4]", "(0.1, 0.4)"])
def test_a_pair_of_the_config_is_set_as_list_or_as_tuple(release, program, tmp_path, pair):
    release(out=tmp_path / "w.npz")
    model = load(program, weights=str(tmp_path / "w.npz"), set=[f"data.baseline={pair}"])
    assert tuple(model.config.data.baseline) == (0.1, 0.4)


def test_numpy_alone_reads_the_file(release, tmp_path):
    release(out=tmp_path / "w.npz")
    file = np.load(tmp_path / "w.npz", allow_pickle=False)
    about = json.loads(file["about"].tobytes())
    assert about["system"] == "quark" and about["config"]["model"]["channels"] == 8
    assert about["step"] == 5 and "jax" in about["versions"]
    averaged = small_quark.variables(small_quark.config())
    np.testing.assert_array_equal(file["params/seed"], averaged["params"]["seed"])
    assert set(about["arrays"]) == set(file.files) - {"about"}


def test_nothing_of_the_training_machine_is_in_the_file_or_the_card(release, tmp_path):
    release(out=tmp_path / "w.npz")
    about = np.load(tmp_path / "w.npz")["about"].tobytes().decode()
    for text in (about, (tmp_path / "w.md").read_text()):
        assert "/home/me" not in text and str(tmp_path) not in text and "SECRET" not in text
    assert "launch/train.py --config=c.py:tiny" in (tmp_path / "w.md").read_text()


def test_half_the_bytes_round_and_load_as_float32(release, tmp_path):
    release(out=tmp_path / "w.npz")
    release(out=tmp_path / "h.npz", dtype="float16")
    sizes = [
        sum(e.file_size for e in zipfile.ZipFile(tmp_path / n).infolist() if "params" in e.filename)
        for n in ("w.npz", "h.npz")
    ]
    headers = 128 * len(weights.read(tmp_path / "h.npz").variables["params"])
    assert sizes[1] < sizes[0] and sizes[0] - headers > sizes[1]
    full, half = (weights.read(tmp_path / n).variables for n in ("w.npz", "h.npz"))
    assert {x.dtype for x in jax.tree.leaves(half)} == {np.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 1e-6), full, half)


def test_scalars_and_whole_numbers_come_back_as_they_were(tmp_path):
    variables = {"params": {"a": np.float32(2.5)}, "counts": {"n": np.int32(7)}}
    given = weights.Weights(small_quark.config(), variables, 1, {}, "float16")
    weights.write(tmp_path / "w.npz", given)
    found = weights.read(tmp_path / "w.npz").variables
    assert found["params"]["a"].shape == () and found["params"]["a"] == 2.5
    assert found["counts"]["n"].dtype == np.int32 and found["counts"]["n"] == 7


@pytest.mark.parametrize(("value", "words"), [(1e6, "exceeds what float16"), (np.nan, "finite")])
def test_numbers_that_cannot_be_stored_are_refused(tmp_path, value, words):
    variables = {"params": {"a": np.float32([value])}}
    given = weights.Weights(small_quark.config(), variables, 1, {}, "float16")
    with pytest.raises(errors.InputError, match=f"params/a .*{words}"):
        weights.write(tmp_path / "w.npz", given)
    assert not list(tmp_path.iterdir())


def test_bad_places_to_write_are_one_sentence_and_leave_nothing(release, tmp_path):
    (tmp_path / "file").write_text("")
    for message, values in {
        "written as .npz": {"out": tmp_path / "w.safetensors"},
        "cannot be written": {"out": tmp_path / "file" / "w.npz"},
        "--card": {"out": tmp_path / "w.npz", "card": tmp_path},
    }.items():
        with pytest.raises(errors.InputError, match=message):
            release(**values)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def assert_same_or_refused(path, expected):
    """A file gives what was written or one line that names it; never anything else."""
    try:
        found = weights.read(path)
    except errors.InputError as e:
        assert str(path) in str(e) and "\n" not in str(e)
        return False
    jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)
    assert found.config == expected.config and found.step == expected.step
    return True


def test_no_flipped_bit_and_no_cut_gives_other_weights(released, tmp_path):
    whole, expected = released.read_bytes(), weights.read(released)
    path = tmp_path / "bad.npz"
    rng = np.random.default_rng(0)
    ends = [*range(0, 300, 7), *(len(whole) - 1 - k for k in range(0, 600, 11))]
    places = [*ends, *rng.integers(0, len(whole), 60)]
    refused = 0
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        refused += not assert_same_or_refused(path, expected)
    assert refused > len(places) // 3  # the rest are fields that no reader looks at
    for length in [0, 1, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert not assert_same_or_refused(path, expected)


def rewritten(released, path, change):
    """A copy of a file whose description or arrays were changed by hand."""
    entries = dict(np.load(released))
    about = json.loads(entries["about"].tobytes())
    change(about, entries)
    entries["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with open(path, "wb") as file:
        np.savez(file, **entries)
    return path


def test_foreign_and_changed_files_are_named(released, tmp_path):
    def text(path):
        path.write_text("not weights")

    def compressed(path):
        np.savez_compressed(path, **dict(np.load(released)))

    def objects(path):
        path.write_bytes(released.read_bytes())
        with zipfile.ZipFile(path, "a") as archive:
            content = io.BytesIO()
            np.save(content, np.array([{}], object), allow_pickle=bool(1))
            archive.writestr("params/x.npy", content.getvalue())

    cases = {
        "not a whole .npz": text,
        "has no entry 'about'": lambda p: np.savez(p, a=np.ones(2)),
        "compressed entries": compressed,
        "dtype object": objects,
        "its format is 'other'": lambda p: rewritten(
            released, p, lambda about, _: about.update(format="other")
        ),
        "description differs": lambda p: rewritten(
            released, p, lambda about, _: about.update(step=6)
        ),
        r"params/seed is float32 \[4\], float32 \[8\] was saved": lambda p: rewritten(
            released, p, lambda _, e: e.update({"params/seed": np.ones(4, np.float32)})
        ),
        "params/seed has digest": lambda p: rewritten(
            released, p, lambda _, e: e.update({"params/seed": np.ones(8, np.float32)})
        ),
        "params/seed is missing": lambda p: rewritten(
            released, p, lambda _, e: e.pop("params/seed")
        ),
        "params/new is unknown": lambda p: rewritten(
            released, p, lambda _, e: e.update({"params/new": np.ones(1)})
        ),
    }
    for k, (words, make) in enumerate(cases.items()):
        path = tmp_path / f"{k}.npz"
        make(path)
        with pytest.raises(errors.InputError, match=f"{path}.*{words}") as e:
            weights.read(path)
        assert "\n" not in str(e.value)


def test_parameters_of_another_model_are_named(program, tmp_path):
    config = small_quark.config()
    variables = small_quark.variables(config)
    config.model.channels = 16
    path = tmp_path / "w.npz"
    weights.write(path, weights.Weights(config, variables, 1, {}))
    with pytest.raises(errors.InputError, match=rf"{path}: .* \(8, .* there and \(16, .* here"):
        load(program, weights=str(path))


def test_the_source_of_a_model_is_named_once(program, tmp_path, released, monkeypatch):
    monkeypatch.setattr(trained, "DEFAULT_WEIGHTS", tmp_path / "none.npz")
    for words, values in {
        "exactly one of the two; neither": {},
        "exactly one of the two; both": {"workdir": "a", "weights": "b"},
        "--step=3: released weights are of one step": {"weights": str(released), "step": 3},
        "does not exist yet; make it from a run with python launch/release.py": {
            "weights": "default"
        },
        "nowhere.npz: no such file": {"weights": str(tmp_path / "nowhere.npz")},
    }.items():
        with pytest.raises(errors.InputError, match=words):
            load(program, **values)


@pytest.mark.thorough
def test_weights_render_and_evaluate_from_the_command_line(program, released, tmp_path):
    main, video = program("render").main, tmp_path / "v.mp4"
    values = {"weights": str(released), "scene": "procedural:3", "out": str(video), "frames": 2}
    with flagsaver.flagsaver(**values):
        assert main([]) == 0
    assert [frame.shape[:2] for frame in imageio.mimread(video)] == [(16, 24)] * 2
    main = program("evaluate").main
    with (
        flagsaver.flagsaver(weights=str(released)),
        pytest.raises(errors.InputError, match="--out"),
    ):
        main([])
    with flagsaver.flagsaver(weights=str(released), out=str(tmp_path / "report"), holdout=5):
        assert main([]) == 0
    saved = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert saved["facts"]["weights"] == str(released) and "run" not in saved["facts"]


def report(workdir, step, config, psnr, folder="evaluation"):
    """Writes the part of an evaluation report that cards read."""
    scene = {"name": "garden", "source": "COLMAP", "height": 16, "width": 24}
    scene["views"] = [{"inputs": ["a", "b"]}] * 3
    scores = {"psnr": psnr, "ssim_gaussian": 0.5, "ssim_sample": 0.4}
    saved = {
        "facts": {
            "checkpoint": f"step {step}",
            "evaluated with": "/x/launch/evaluate.py --data=/d/g",
        },
        "mean": {"model": scores, "plane_sweep": scores},
        "scenes": [scene],
        "config": config,
    }
    (workdir / folder).mkdir()
    (workdir / folder / "metrics.json").write_text(json.dumps(saved))


def test_a_card_shows_what_was_measured_of_this_step_and_nothing_else(program, tmp_path):
    workdir, config = tmp_path / "run", small_quark.config()
    small_quark.save_run(workdir, config)
    plain = runs.to_json(config)
    main, card = program("release").main, tmp_path / "CARD.md"
    values = {"workdir": str(workdir), "out": str(tmp_path / "w.npz"), "card": str(card)}
    with flagsaver.flagsaver(**values):
        main([])
    assert "Nothing: the run holds no evaluation report" in card.read_text()
    report(workdir, 5, plain, 21.25)
    report(workdir, 4, plain, 31.25, "old")
    finer = {**plain, "model": {**plain["model"], "grid_area": 384}}
    report(workdir, 5, finer, 22.75, "finer")
    with flagsaver.flagsaver(**values):
        main([])
    text = card.read_text()
    assert "| garden: 3 views | 16 x 24, 2 inputs | 21.25 / 0.500 |" in text
    assert "2 inputs, model.grid_area: 96 -> 384 | 22.75" in text and "31.25" not in text
    assert "    launch/evaluate.py --data=g" in text and "config `c.py:tiny`" in text
    with flagsaver.flagsaver(**values, dtype="float16"):
        main([])
    assert "not with this file's float16" in card.read_text()
    (workdir / "old" / "metrics.json").write_text("{}")
    os.remove(tmp_path / "w.npz")
    with (
        flagsaver.flagsaver(**values),
        pytest.raises(errors.InputError, match=r"old/metrics.json: not a report"),
    ):
        main([])
    assert not (tmp_path / "w.npz").exists()


def test_a_card_says_only_what_is_recorded(tmp_path):
    path = tmp_path / "w.npz"
    given = weights.Weights(runs.from_json({"system": "x", "seed": 0}), {"params": {}}, 3, {})
    path.write_bytes(b"weights")
    text = model_card.text(path, given, [], date="2026-01-01", command="c")
    assert "| bytes | 7 |" in text and "| steps | 3 |" in text and "devices" not in text


def test_the_default_weights_are_a_file_of_the_checkout():
    assert trained.DEFAULT_WEIGHTS == conftest.ROOT / "weights" / "quark_small.npz"
