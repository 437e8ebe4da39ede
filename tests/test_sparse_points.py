"""The range of depths of a target, from the points that its inputs observe."""

import dataclasses

import numpy as np
import pytest

from nvs_common.data import scenes, sources, sparse_points, views
from nvs_common.data.sparse_points import SparsePoints
from nvs_common.types import Cameras
from tests import scene_writers as writers


@dataclasses.dataclass(frozen=True)
class PosedScene:
    """What `views.bounded` reads of a scene."""

    cameras: Cameras
    points: SparsePoints | None = None


def _cameras(count: int = 4) -> Cameras:
    """Cameras in a row along x that look along z, 20 pixels of focal length, 40 x 30 pixels."""
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, 0, 3] = np.arange(count)
    intrinsics = np.tile([20.0, 20.0, 20.0, 15.0], (count, 1))
    return Cameras(poses, intrinsics, np.full(count, 0.5), np.full(count, 30.0), 30, 40)


def _cloud(rng: np.random.Generator, count: int, near: float, far: float) -> np.ndarray:
    """Points of depths near to far that the cameras 0 to 3 all see."""
    depth = rng.uniform(near, far, count)
    across = rng.uniform(-0.3, 0.3, (count, 2)) * depth[:, None]
    return np.column_stack([across[:, 0] + 1.5, across[:, 1], depth])


def _bounded(points: SparsePoints | None, inputs=((0, 2),)) -> tuple[float, float]:
    cameras = _cameras()
    found = views.bounded(cameras[[1]], PosedScene(cameras, points), np.array(inputs))
    return float(found.near[0]), float(found.far[0])


def test_a_targets_near_is_that_of_the_points_its_inputs_observe():
    rng = np.random.default_rng(0)
    wanted, others = _cloud(rng, 200, 5, 40), _cloud(rng, 200, 1, 2)
    seen = (np.arange(0, 120), np.arange(400), np.arange(80, 200), np.arange(200, 400))
    near, far = _bounded(SparsePoints(np.concatenate([wanted, others]), seen))
    depth = wanted[:, 2]
    np.testing.assert_allclose(near, 0.9 * np.percentile(depth, 1))
    np.testing.assert_allclose(far, 1.1 * np.percentile(depth, 99))
    # Input 3 knows the others: the near comes closer. All count where nobody knows who sees what.
    assert _bounded(SparsePoints(np.concatenate([wanted, others]), seen), ((0, 3),))[0] < 2
    assert _bounded(SparsePoints(np.concatenate([wanted, others])))[0] < 2


def test_points_outside_the_targets_image_do_not_count():
    rng = np.random.default_rng(1)
    ahead = _cloud(rng, 50, 5, 9)
    beside, behind = ahead + [40.0, 0, 0], ahead * [1, 1, -1]
    expected = _bounded(SparsePoints(ahead))
    assert _bounded(SparsePoints(np.concatenate([ahead, beside, behind]))) == expected


def test_the_far_is_at_least_the_inputs():
    points = SparsePoints(_cloud(np.random.default_rng(2), 50, 5, 9))
    assert _bounded(points)[1] == 30.0


@pytest.mark.parametrize("count", [0, sparse_points.MIN_POINTS - 1])
def test_too_few_points_leave_the_inputs_own_range(count):
    points = SparsePoints(_cloud(np.random.default_rng(3), count, 5, 9))
    assert _bounded(points) == _bounded(None) == pytest.approx((0.5, 30.0))


def test_a_target_pulled_back_from_the_scene_keeps_near_before_far():
    cameras = _cameras()
    pose = np.array(cameras.world_from_cam[:1])
    pose[:, 2, 3] = -100
    target = dataclasses.replace(cameras[[0]], world_from_cam=pose)
    points = SparsePoints(_cloud(np.random.default_rng(4), 50, 5, 9))
    found = views.bounded(target, PosedScene(cameras, points), np.array([[0, 1]]))
    assert 90 < found.near[0] < 105 < found.far[0]


def test_observations_follow_the_order_of_the_names(tmp_path):
    """The file lists images from last to first; a scene sorts them, and its points with them."""
    rig = writers.make_rig()
    scene = scenes.load_scene(writers.write_colmap_txt(rig, tmp_path))
    assert scene.points is not None
    for view, seen in list(enumerate(writers.observations(rig)))[1:]:
        np.testing.assert_allclose(scene.points.of([view]), rig.points[seen])
    # Image 0 lists none; alone it might see any, with others it adds nothing.
    assert len(scene.points.of([0])) == len(rig.points)
    np.testing.assert_array_equal(scene.points.of([0, 1]), scene.points.of([1]))


def test_given_depths_are_not_overruled_by_points(tmp_path):
    path = writers.write_colmap_bin(writers.make_rig(), tmp_path)
    scene = scenes.load_scene(path, near_far=(0.25, 64.0))
    inputs = np.array([[1, 2]])
    found = views.bounded(scene.cameras[[0]], scene, inputs)
    np.testing.assert_allclose([found.near[0], found.far[0]], [0.25, 64.0])


def test_a_kept_scene_has_the_points_of_its_scene(tmp_path):
    scene = scenes.load_scene(writers.write_colmap_bin(writers.make_rig(), tmp_path))
    assert sources.KeptScene(scene).points is scene.points
