"""Folders of renders of objects: SyncDreamer's, OpenLRM's and LGM's layouts, with depth."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from nvs_common import array_pickles
from nvs_common.data import objects, samples, scenes, sources
from nvs_common.errors import InputError

SIDE, COUNT = 12, 3


@pytest.fixture(scope="module")
def truth():
    return objects.Objects(seed=3, num_scenes=1, height=SIDE, width=SIDE, num_views=COUNT)[0]


def write_images(folder, truth, depth="npy"):
    folder.mkdir(parents=True, exist_ok=True)
    maps = truth.depths(np.arange(COUNT))
    for i, (image, mask) in enumerate(
        zip(truth.images(range(COUNT)), truth.masks(range(COUNT)), strict=True)
    ):
        rgba = np.concatenate([image, mask[..., None]], axis=-1)
        Image.fromarray(np.uint8(np.round(255 * rgba))).save(folder / f"{i:03d}.png")
        (folder / "depth").mkdir(exist_ok=True)
        if depth == "npy":
            np.save(folder / "depth" / f"{i:03d}.npy", maps[i])
        elif depth == "png":
            thousandths = np.uint16(np.round(1000 * maps[i]))
            Image.fromarray(thousandths).save(folder / "depth" / f"{i:03d}.png")


def calibration(truth, side):
    fx, fy, cx, cy = np.asarray(truth.cameras.intrinsics)[0] * side / SIDE
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def syncdreamer(root, truth, protocol=4, **options):
    """SyncDreamer's layout."""
    write_images(root, truth, **options)
    poses = np.linalg.inv(np.asarray(truth.cameras.world_from_cam))[:, :3]
    angles = np.linspace(0, 1, COUNT).astype(np.float32)
    content = [calibration(truth, 256), angles, angles, angles + 1.5, np.float32(poses)]
    (root / "meta.pkl").write_bytes(pickle.dumps(content, protocol=protocol))


def openlrm(root, truth):
    """OpenLRM's layout."""
    write_images(root / "rgba", truth)
    (root / "pose").mkdir()
    k = calibration(truth, SIDE)
    np.save(root / "intrinsics.npy", [[k[0, 0], k[1, 1]], [k[0, 2], k[1, 2]], [float(SIDE)] * 2])
    for i, pose in enumerate(np.asarray(truth.cameras.world_from_cam)):
        np.save(root / "pose" / f"{i:03d}.npy", (pose @ np.diag([1, -1, -1, 1]))[:3])


def lgm(root, truth):
    """LGM's layout."""
    write_images(root / "rgb", truth)
    (root / "pose").mkdir()
    for i, pose in enumerate(np.asarray(truth.cameras.world_from_cam)):
        (root / "pose" / f"{i:03d}.txt").write_text(" ".join(map(str, pose.ravel())))


@pytest.mark.parametrize("write", [syncdreamer, openlrm, lgm])
def test_cameras_and_depth_are_those_that_were_written(write, truth, tmp_path):
    write(tmp_path, truth)
    scene = scenes.load_scene(tmp_path)
    close = dict(rtol=0, atol=1e-5)
    np.testing.assert_allclose(scene.cameras.world_from_cam, truth.cameras.world_from_cam, **close)
    np.testing.assert_allclose(scene.cameras.intrinsics, truth.cameras.intrinsics, **close)
    assert scene.has_depths and np.all(scene.cameras.near < 1) and np.all(scene.cameras.far > 2)
    np.testing.assert_array_equal(scene.depths([2, 0]), truth.depths([2, 0]))
    # Half the side: every second pixel's depth, never a mean.
    small = scene.resized(SIDE // 2, SIDE // 2)
    np.testing.assert_array_equal(small.depths([1])[0], truth.depths([1])[0, 1::2, 1::2])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_arrays_are_read_in_all_protocols(protocol, tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    value = [array, array.T, array.astype(">f8"), np.float64(2.5), {"a": (1, None, "x")}, True]
    file = tmp_path / "meta.pkl"
    file.write_bytes(pickle.dumps(value, protocol=protocol))
    found = array_pickles.read(file)
    for got, wanted in zip(found[:3], value[:3], strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert found[3:] == value[3:]


class Bad:
    """Runs a program where it is unpickled."""

    def __init__(self, run, *arguments):
        self.made = (run, arguments)

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Bad(os.system, "touch ran"), "'posix.system'"),
        (Bad(eval, "1"), "eval"),
        (np.array([Bad(os.getcwd)], object), "something else than numbers"),
        (np.dtype("U4"), "something else than numbers"),
    ],
)
def test_pickles_that_want_more_than_arrays_are_refused(value, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in (2, 4):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps([value], protocol=protocol))
        with pytest.raises(InputError, match=message):
            array_pickles.read(tmp_path / "meta.pkl")
    assert not (tmp_path / "ran").exists()


def test_damaged_pickles_are_named(truth, tmp_path):
    syncdreamer(tmp_path, truth)
    file = tmp_path / "meta.pkl"
    whole = file.read_bytes()
    for content in (whole[:-40], b"", b"\x80\x04K\x01.", whole.replace(b"f8", b"f4")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"meta\.pkl"):
            scenes.load_scene(tmp_path)
    # A list that holds itself.
    loop = []
    loop.append(loop)
    file.write_bytes(pickle.dumps(loop))
    with pytest.raises(InputError, match="nested too deeply"):
        array_pickles.read(file)


def test_depth_of_sixteen_bits_is_in_thousandths(truth, tmp_path):
    syncdreamer(tmp_path, truth, depth="png")
    found = scenes.load_scene(tmp_path).depths([0, 1])
    np.testing.assert_allclose(found, truth.depths([0, 1]), atol=6e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: np.save(f, np.zeros((4, 4), np.float32)), r"001\.npy: depth of 4 x 4"),
        (lambda f: np.save(f, np.full((SIDE, SIDE), -1.0)), r"001\.npy: 144 depths are negative"),
        (lambda f: np.save(f, np.zeros((SIDE, SIDE), int)), "expected floats"),
        (lambda f: f.write_bytes(b"no"), r"001\.npy: not a NumPy array"),
        (lambda f: f.unlink(), r"001\.png: no depth; expected depth/001\.npy"),
    ],
)
def test_bad_depth_is_named(change, message, truth, tmp_path):
    syncdreamer(tmp_path, truth)
    scene = scenes.load_scene(tmp_path)
    change(tmp_path / "depth" / "001.npy")
    with pytest.raises(InputError, match=message):
        scene.depths([0, 1])


@pytest.mark.parametrize(
    ("write", "change", "message"),
    [
        (syncdreamer, lambda p: (p / "001.png").unlink(), "3 poses, but 2 images"),
        (syncdreamer, lambda p: rewrite(p, lambda v: v[:4]), "expected a list of five"),
        (syncdreamer, lambda p: rewrite(p, lambda v: [np.eye(4), *v[1:]]), "intrinsics have shape"),
        (syncdreamer, lambda p: rewrite(p, lambda v: [*v[:4], 2 * v[4]]), "not orthonormal"),
        (openlrm, lambda p: np.save(p / "pose" / "001.npy", np.eye(4)), "001.npy: the pose have"),
        (openlrm, lambda p: (p / "rgba" / "001.png").unlink(), "its image is missing"),
        (lgm, lambda p: (p / "pose" / "001.txt").write_text("1 2 x"), "001.txt: could not"),
        (lgm, lambda p: [f.unlink() for f in (p / "pose").iterdir()], "no pose"),
    ],
)
def test_bad_renders_are_named(write, change, message, truth, tmp_path):
    write(tmp_path, truth)
    change(tmp_path)
    with pytest.raises(InputError, match=message):
        scenes.load_scene(tmp_path)


def rewrite(folder, change):
    file = folder / "meta.pkl"
    file.write_bytes(pickle.dumps(change(pickle.loads(file.read_bytes()))))


def test_folders_of_renders_train_with_depth_and_those_without_say_so(truth, tmp_path):
    for name in ("a", "b"):
        syncdreamer(tmp_path / name, truth)
    source = sources.load_folder(str(tmp_path), size=(SIDE, SIDE))
    sampler = samples.Sampler(1, 2, "random", hold_out_every=0, with_depth=True)
    sampler.check(source)
    batch = samples.DrawSample(source, sampler)(1, np.random.default_rng(0))
    assert batch.extras["depth"].shape == (2, SIDE, SIDE)
    for file in (tmp_path / "b" / "depth").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"b has no depth.*folder 'depth'"):
        sampler.check(sources.load_folder(str(tmp_path), size=(SIDE, SIDE)))
