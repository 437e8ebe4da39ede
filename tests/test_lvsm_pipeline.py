"""What surrounds LVSM's network, against the numbers of the published code: poses, paths, frames,
perceptual loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io

import lvsm_jax
from nvs_common import cameras, trajectories, vgg19
from nvs_common.data import frames
from nvs_common.errors import InputError
from nvs_common.types import Cameras, Views
from tests import random_vgg


@pytest.fixture(scope="module")
def golden(request):
    path = request.getfixturevalue("shared_data").parent / "goldens" / "lvsm" / "pipeline.npz"
    return dict(np.load(path))


@pytest.fixture(scope="module")
def vgg():
    return random_vgg.arrays()


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_poses_are_normalised_as_published(golden, case):
    found = cameras.normalize_poses(jnp.asarray(golden[f"pose/{case}/in_c2w"]))
    np.testing.assert_allclose(found, golden[f"pose/{case}/out_c2w"], atol=2e-5)


def test_poses_normalised_over_the_inputs_do_not_depend_on_the_targets(golden):
    poses = jnp.asarray(golden["pose/a/in_c2w"])
    inputs = poses[:2]
    alone = cameras.normalize_poses(inputs)
    together = cameras.normalize_poses(poses, reference=inputs)
    np.testing.assert_allclose(together[:2], alone, atol=1e-6)
    relative = np.linalg.inv(poses[0]) @ np.asarray(poses[5])
    found = np.linalg.inv(together[0]) @ np.asarray(together[5])
    np.testing.assert_allclose(found[:3, :3], relative[:3, :3], atol=1e-5)
    ratio = np.linalg.norm(found[:3, 3]) / np.linalg.norm(relative[:3, 3])
    apart = [np.linalg.norm(x[1, :3, 3] - x[0, :3, 3]) for x in (alone, inputs)]
    assert ratio == pytest.approx(apart[0] / apart[1], rel=1e-4)


@pytest.mark.parametrize("centre", [[0, 0, 0], [107.3, -3.1, 52.9]])
def test_cameras_at_one_place_keep_their_scale_and_stay_finite(centre):
    poses = np.tile(np.eye(4, dtype=np.float32), (3, 1, 1))
    turn = np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]], np.float32)
    poses[1, :3, :3], poses[2, :3, :3] = turn, turn.T
    poses[:, :3, 3] = centre
    found = cameras.normalize_poses(jnp.asarray(poses))
    assert np.isfinite(found).all()
    # Not rounding errors blown up to the size of a scene.
    np.testing.assert_allclose(found[:, :3, 3], 0, atol=1e-4)


def test_opposite_cameras_have_an_average_all_the_same():
    poses = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))
    poses[1, :3, :3] = np.diag([1.0, -1.0, -1.0])
    poses[:, 2, 3] = [-2, 2]
    found = np.asarray(cameras.normalize_poses(jnp.asarray(poses)))
    assert np.isfinite(found).all()
    turns = found[:, :3, :3]
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.tile(np.eye(3), (2, 1, 1)))
    assert np.abs(found[:, :3, 3]).max() == pytest.approx(1 / 1.35, rel=1e-5)


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("ordered", [False, True])
def test_transitions_are_those_of_published_videos(golden, case, ordered):
    pose, k = golden[f"traj/{case}/c2w"], golden[f"traj/{case}/K"]
    intrinsics = k[:, [0, 1, 0, 1], [0, 1, 2, 2]]
    ones = np.ones(len(pose))
    inputs = Cameras(pose, intrinsics, ones, 9 * ones, 40, 40)
    path = trajectories.transitions(inputs, 7, ordered=ordered)
    prefix = f"traj/{case}/{'ordered_' if ordered else ''}out_"
    np.testing.assert_allclose(path.world_from_cam[:, :3], golden[f"{prefix}c2w34"], atol=2e-6)
    expected = golden[f"{prefix}K"][:, [0, 1, 0, 1], [0, 1, 2, 2]]
    np.testing.assert_allclose(path.intrinsics, expected, rtol=1e-6)


def test_ordered_transitions_go_to_the_nearest_camera_and_a_loop_comes_back():
    pose = np.tile(np.eye(4), (4, 1, 1))
    pose[:, 0, 3] = [0, 3, 1, 2]
    ones = np.ones(4)
    inputs = Cameras(pose, np.ones((4, 4)), ones, 9 * ones, 8, 8)
    path = trajectories.transitions(inputs, 2, ordered=True, loop=True)
    assert path.world_from_cam[:, 0, 3].tolist() == [0, 1, 1, 2, 2, 3, 3, 0]
    with pytest.raises(InputError, match="1 cameras and 2 frames"):
        trajectories.transitions(inputs[:1], 2)


@pytest.mark.parametrize("square", [True, False])
def test_frames_are_those_of_the_published_preparation(golden, square):
    stored, k = golden["frames/raw_uint8"], golden["frames/fxfycxcy"]
    made = frames.layout(*stored.shape[1:3], 32, 8, square=square)
    found = np.stack([frames.image(picture, made) for picture in stored])
    expected = golden[f"frames/crop{int(square)}/image"].transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(
        frames.intrinsics(k, stored.shape[1:3], made),
        golden[f"frames/crop{int(square)}/fxfycxcy"],
        rtol=1e-6,
    )


def test_realestate_frames_are_cropped_from_256_x_456():
    made = frames.layout(360, 640, 256, 8)
    assert made == frames.Layout(256, 456, 0, 100, 256, 256)
    # Halves round to the even multiple, as Python does: 36 columns of patches of 8 are 4 or 5.
    assert frames.layout(32, 36, 32, 8, square=False).width == 32
    with pytest.raises(InputError, match="32 is not a multiple of the patch size 5"):
        frames.layout(360, 640, 32, 5)


def test_a_scene_of_frames_reads_and_moves_the_camera_with_the_picture(golden):
    stored = golden["frames/raw_uint8"]

    class Stored:
        names, source = ("a", "b", "c"), "test"
        cameras = Cameras(
            golden["frames/crop1/c2w"], golden["frames/fxfycxcy"], np.ones(3), np.ones(3), 45, 80
        )

        def images(self, indices):
            return stored[list(indices)].astype(np.float32) / 255

    scene = frames.prepare(Stored(), 32, 8)
    assert (scene.cameras.height, scene.cameras.width) == (32, 32)
    expected = golden["frames/crop1/image"][[2, 0]].transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(scene.images([2, 0]), expected)


def test_the_perceptual_loss_and_its_gradient_are_the_published_ones(golden, vgg):
    pred, truth = (golden[f"perc/{k}"].transpose(0, 2, 3, 1) for k in ("pred", "target"))
    params = vgg19.from_arrays(vgg, "random")

    @jax.jit
    def value(pred):
        terms = vgg19.terms(params, pred, truth)
        return vgg19.loss(params, pred, truth), terms

    (loss, terms), gradient = jax.value_and_grad(value, has_aux=True)(jnp.asarray(pred))
    np.testing.assert_allclose(terms, golden["perc/raw_terms"], rtol=1e-4)
    np.testing.assert_allclose(loss, golden["perc/loss"], rtol=1e-4)
    expected = golden["perc/grad_pred"].transpose(0, 2, 3, 1)
    error = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
    assert error < 1e-3


def test_weights_survive_both_kinds_of_file(vgg, tmp_path):
    small = {n: a for n, a in vgg.items() if int(n.split(".")[1]) <= 30}
    np.savez(tmp_path / "vgg.npz", **small)
    expected = vgg19.from_arrays(vgg, "random")
    found = vgg19.load(tmp_path / "vgg.npz")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    # MatConvNet: cells of layers, each a struct whose third field is a cell of two arrays.
    layers = np.empty((1, 36), object)
    for number in range(36):
        layer = {"type": "relu", "name": str(number), "weights": np.empty((1, 0), object)}
        if f"features.{number}.weight" in small:
            cell = np.empty((1, 2), object)
            cell[0, 0] = small[f"features.{number}.weight"].transpose(2, 3, 1, 0)
            cell[0, 1] = small[f"features.{number}.bias"][:, None]
            layer = {"type": "conv", "name": str(number), "weights": cell}
        layers[0, number] = layer
    scipy.io.savemat(tmp_path / "vgg.mat", {"layers": layers, "meta": 1})
    found = vgg19.load(tmp_path / "vgg.mat")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_bad_weights_of_the_perceptual_loss_are_explained(vgg, tmp_path):
    with pytest.raises(InputError, match="loss.perceptual_weights.*loss.perceptual_weight to 0"):
        vgg19.load("")
    with pytest.raises(InputError, match=r"missing arrays: features.30.bias; unknown arrays: x"):
        without = {k: v for k, v in vgg.items() if k != "features.30.bias"}
        vgg19.from_arrays(without | {"x": 1}, "f")
    wrong = dict(vgg, **{"features.5.bias": np.zeros(7, np.float32)})
    with pytest.raises(InputError, match=r"features.5.bias has shape \(7,\), expected \(128,\)"):
        vgg19.from_arrays(wrong, "f")
    (tmp_path / "x.mat").write_bytes(b"no matrix")
    with pytest.raises(InputError, match="x.mat: not MatConvNet's"):
        vgg19.load(tmp_path / "x.mat")
    params = vgg19.from_arrays(vgg, "random")
    small = jnp.zeros((1, 8, 40, 3))
    with pytest.raises(InputError, match="8x40"):
        vgg19.loss(params, small, small)


@pytest.mark.parametrize("kind", ["decoder_only", "encoder_decoder"])
@pytest.mark.parametrize("loop", [False, True])
def test_videos_between_the_inputs_are_the_published_ones(shared_data, kind, loop):
    path = shared_data.parent / "goldens" / "lvsm" / f"{kind}_tiny.npz"
    arrays = dict(np.load(path))
    weights = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    module, variables = lvsm_jax.load_torch(weights)
    count = int(arrays["in/num_input_views"])
    images = arrays["in/image"][:, :count].transpose(0, 1, 3, 4, 2)
    height, width = images.shape[2:4]
    expected = arrays[f"out/video_loop{int(loop)}"].transpose(0, 1, 3, 4, 2)
    ones = np.ones(count)
    for scene, video in enumerate(expected):
        pose, k = (arrays[f"in/{name}"][scene, :count] for name in ("c2w", "fxfycxcy"))
        inputs = Cameras(pose, k, ones, 9 * ones, height, width)
        path = trajectories.transitions(inputs, 3, loop=loop)
        context = Views(images[scene], inputs)
        context, targets = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float32)[None], (context, path)
        )
        found = jax.jit(module.apply)(variables, context, targets)
        np.testing.assert_allclose(found[0], video, atol=2e-5)
