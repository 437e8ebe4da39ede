"""Real scenes load, agree across layouts, and their poses fit what the photographs show."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from nvs_common.data import array_formats, matching, scenes
from tests import scene_writers as writers


def test_four_layouts_of_one_reconstruction_agree(shared_data):
    root = shared_data / "lund_street"
    binary = scenes.load_scene(root / "sparse" / "0")
    default = scenes.load_scene(root)
    text = scenes.load_scene(root / "sparse" / "0_txt")
    transforms = scenes.load_scene(root / "transforms.json")
    llff = scenes.load_scene(root / "poses_bounds.npy")
    assert default.source == binary.source == text.source == "COLMAP"
    reference = binary.cameras
    assert len(binary) == 29 and (reference.height, reference.width) == (383, 512)
    for scene, tolerance in ((default, 0), (text, 1e-9), (transforms, 1e-9), (llff, 1e-9)):
        assert scene.names == binary.names
        np.testing.assert_allclose(
            scene.cameras.world_from_cam, reference.world_from_cam, atol=tolerance
        )
    for scene in (default, text, transforms):
        np.testing.assert_allclose(scene.cameras.intrinsics, reference.intrinsics, atol=1e-6)
    # LLFF has one focal length (the mean of the two) and a centred principal point.
    np.testing.assert_allclose(llff.cameras.intrinsics, reference.intrinsics, atol=0.15)
    np.testing.assert_allclose(text.cameras.near, reference.near, rtol=1e-5)
    np.testing.assert_allclose(text.cameras.far, reference.far, rtol=1e-5)
    np.testing.assert_array_equal(llff.images([7]), binary.images([7]))


def test_near_and_far_from_points_lie_within_the_files_extremes(shared_data):
    """poses_bounds.npy holds nearly the nearest and farthest point of each image."""
    root = shared_data / "lund_street"
    points, llff = scenes.load_scene(root), scenes.load_scene(root / "poses_bounds.npy")
    assert np.all(points.cameras.near > 0.85 * llff.cameras.near)
    assert np.all(points.cameras.far < 1.15 * llff.cameras.far)


def test_mydesk_loads(shared_data):
    scene = scenes.load_scene(shared_data / "mydesk")
    assert len(scene) == 166 and (scene.cameras.height, scene.cameras.width) == (288, 512)
    assert list(scene.names) == sorted(scene.names)
    image = scene.images([5])
    assert image.dtype == np.float32 and 0 <= image.min() < image.max() <= 1


def test_transparent_renders_have_a_white_background(shared_data):
    scene = scenes.load_scene(shared_data / "gso_toy")
    assert len(scene) == 64
    distance = np.linalg.norm(scene.cameras.world_from_cam[:, :3, 3], axis=-1)
    np.testing.assert_allclose(distance, 2.7, rtol=1e-5)
    corners = scene.images([0, 40])[:, [0, -1], [0, -1]]
    np.testing.assert_array_equal(corners, 1.0)
    # The toy fits into the unit sphere around the origin.
    assert np.all(scene.cameras.near < 1.7) and np.all(scene.cameras.far > 3.7)


def test_a_telephoto_model_follows_its_smaller_grey_images(shared_data):
    scene = scenes.load_scene(shared_data / "vesta")
    assert scene.cameras.height == scene.cameras.width == 512
    np.testing.assert_allclose(scene.cameras.intrinsics[0, 0], 10715 / 2, rtol=1e-3)
    image = scene.images([2])[0]
    np.testing.assert_array_equal(image[..., 0], image[..., 2])
    assert np.all(scene.cameras.far < 1.5 * scene.cameras.near)


def test_real_camera_files_of_realestate_load_with_their_frames(shared_data, tmp_path):
    for source in sorted((shared_data / "re10k_cameras").glob("*.txt")):
        shutil.copy(source, tmp_path)
        folder = tmp_path / source.stem
        folder.mkdir()
        for timestamp, _ in array_formats.realestate_rows(source):
            Image.new("RGB", (64, 36)).save(folder / f"{timestamp}.jpg")
    found = scenes.find_scenes(tmp_path)
    assert len(found) == 10
    for path in found:
        scene = scenes.load_scene(path)
        stamps = [int(name.removesuffix(".jpg")) for name in scene.names]
        assert len(scene) == 16 and stamps == sorted(stamps)
        k = scene.cameras.intrinsics
        np.testing.assert_allclose(k[:, 0], k[:, 1], rtol=2e-3)  # square pixels at 16:9
        np.testing.assert_allclose(k[:, 2:], [[32, 18]] * 16, rtol=1e-6)


def test_a_real_spaces_file_follows_the_real_image_size(shared_data, tmp_path):
    shutil.copy(shared_data / "spaces_format" / "models.json", tmp_path)
    for rig in json.loads((tmp_path / "models.json").read_text()):
        for camera in rig:
            path = tmp_path / camera["relative_path"]
            path.parent.mkdir(exist_ok=True)
            # The file states sizes for a width of 2048; the published images are 800 wide.
            Image.new("RGB", (800, round(camera["height"] * 800 / 2048))).save(path)
    scene = scenes.load_scene(tmp_path)
    assert (scene.cameras.height, scene.cameras.width) == (468, 800)
    # 477 rows and 468: the first loses 4 at the top.
    k = scene.cameras.intrinsics
    np.testing.assert_allclose(k[0, 0], 571.727052349009 * 800 / 2048)
    np.testing.assert_allclose(k[0, 3], 622.5127987757851 * 477 / 1221 - 4)
    np.testing.assert_allclose(k[:, 1] / k[:, 0], 1, rtol=2e-3)
    assert np.all(scene.cameras.near == 1) and np.all(scene.cameras.far == 100)
    # Cameras of the rig stand side by side, looking the same way.
    pose = scene.cameras.world_from_cam
    assert pose[0, :3, 2] @ pose[1, :3, 2] > 0.99


def _consecutive(scene, step: int, gap: int) -> list[tuple[int, int]]:
    """Pairs of frames that follow each other by the number in their names."""
    order = np.argsort([int("".join(c for c in name if c.isdigit())) for name in scene.names])
    return [(int(order[k]), int(order[k + gap])) for k in range(0, len(order) - gap, step)]


@pytest.fixture(scope="module", params=[("mydesk", 14, 2), ("lund_street", 2, 1)])
def matched(request, shared_data):
    name, step, gap = request.param
    scene = scenes.load_scene(shared_data / name)
    pairs = []
    for i, j in _consecutive(scene, step, gap):
        first, second = scene.images([i, j]).mean(axis=-1)
        pairs.append((i, j, *matching.match(first, second)))
    return scene, pairs


def _median_error(cameras, pairs) -> float:
    errors = [matching.sampson(cameras, *pair) for pair in pairs]
    assert sum(len(e) for e in errors) > 300
    return float(np.median(np.concatenate(errors)))


def test_loaded_poses_satisfy_the_epipolar_constraint_of_photographs(matched):
    scene, pairs = matched
    assert _median_error(scene.cameras, pairs) < 1.5


@pytest.mark.parametrize("mistake", ["opengl", "swapped"])
def test_convention_errors_break_the_epipolar_constraint(matched, mistake):
    scene, pairs = matched
    poses = scene.cameras.world_from_cam
    wrong = poses @ np.diag([1.0, -1, -1, 1]) if mistake == "opengl" else np.linalg.inv(poses)
    right = _median_error(scene.cameras, pairs)
    cameras = dataclasses.replace(scene.cameras, world_from_cam=wrong)
    assert _median_error(cameras, pairs) > max(4 * right, 4.0)


@pytest.mark.thorough
def test_measured_depths_bracket_the_reconstruction(shared_data):
    """Without its points, a scene's near and far from matched corners still cover the points."""
    root = shared_data / "lund_street"
    truth = scenes.load_scene(root).cameras
    scene = scenes.load_scene(root / "transforms.json")
    measured = scenes.measure_depths(scene)
    assert measured.bounds != scene.bounds
    c = measured.cameras
    # Overlap in disparity of [near, far] with the points' own: most of it, for most images.
    low = np.maximum(1 / c.far, 1 / truth.far)
    high = np.minimum(1 / c.near, 1 / truth.near)
    covered = np.maximum(high - low, 0) / (1 / truth.near - 1 / truth.far)
    assert np.median(covered) > 0.6
    assert np.median(c.far / c.near) < 0.9 * np.median(scene.cameras.far / scene.cameras.near)


def test_measured_depths_of_a_desk_are_far_tighter_than_geometry(shared_data):
    scene = scenes.load_scene(shared_data / "mydesk")
    cameras = scenes.measure_depths(scene, pairs=16).cameras
    width = np.median(1 / cameras.near - 1 / cameras.far)
    assert width < 0.2 * np.median(1 / scene.cameras.near - 1 / scene.cameras.far)
    # The desk stands 12 to 25 units from most cameras (triangulated with other software).
    assert np.median(cameras.near) < 13 and np.median(cameras.far) > 22


def test_depths_are_left_alone_where_nothing_matches(tmp_path):
    scene = scenes.load_scene(writers.write_opencv(writers.make_rig(), tmp_path))
    assert scenes.measure_depths(scene) is scene


def test_triangulated_corners_lie_where_the_points_are():
    """Exact projections of known points come back, whatever the two cameras."""
    rig = writers.make_rig(height=300, width=400)
    k = rig.intrinsics
    uv = []
    for pose in rig.poses[:2]:
        local = (rig.points - pose[:3, 3]) @ pose[:3, :3]
        uv.append(local[:, :2] / local[:, 2:] * k[:2] + k[2:])
    cameras = scenes.Cameras(rig.poses, np.tile(k, (4, 1)), np.ones(4), np.ones(4), 300, 400)
    np.testing.assert_allclose(matching.triangulate(cameras, 0, 1, *uv), rig.points, atol=1e-9)
    assert matching.sampson(cameras, 0, 1, *uv).max() < 1e-9


def test_the_epipolar_error_is_in_pixels():
    """Parallel cameras side by side: the error is vertical, shared between the two images."""
    poses = np.tile(np.eye(4), (2, 1, 1))
    poses[1, 0, 3] = 0.3
    k = np.tile([300.0, 300.0, 200.0, 150.0], (2, 1))
    cameras = scenes.Cameras(poses, k, np.ones(2), np.ones(2), 300, 400)
    points = np.array([[50.0, 60.0], [310.0, 200.0]])
    errors = matching.sampson(cameras, 0, 1, points, points + [-7.0, 2.0])
    np.testing.assert_allclose(errors, 2 / np.sqrt(2))
