"""Scenes load to the same cameras whatever layout they are stored in."""

import json
import logging
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest

from nvs_common.data import image_folder, point_cloud, scenes
from nvs_common.errors import InputError
from tests import scene_writers as writers


@pytest.mark.parametrize("layout", writers.WRITERS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_layout_round_trips_cameras_and_images(tmp_path, layout, seed):
    rig = writers.make_rig(seed, count=5, simple=layout in writers.SIMPLE)
    path = writers.WRITERS[layout](rig, tmp_path)
    scene = scenes.load_scene(path)
    np.testing.assert_allclose(scene.cameras.world_from_cam, rig.poses, atol=1e-9)
    expected = np.tile(rig.intrinsics, (5, 1))
    np.testing.assert_allclose(scene.cameras.intrinsics, expected, atol=1e-9)
    assert scene.names == tuple(rig.names)
    assert (scene.cameras.height, scene.cameras.width) == (rig.height, rig.width)
    np.testing.assert_array_equal(
        scene.images([3, 1]), rig.images[[3, 1]].astype(np.float32) / np.float32(255)
    )
    assert np.all(0 < scene.cameras.near) and np.all(scene.cameras.near < scene.cameras.far)
    assert scene.cameras.world_from_cam.dtype == np.float64
    assert scene.bounds and scene.source


def test_a_loaded_scene_is_picklable_and_decodes_only_what_is_asked_for(tmp_path):
    rig = writers.make_rig()
    scene = scenes.load_scene(writers.write_opencv(rig, tmp_path))
    for name in rig.names[1:]:
        (tmp_path / "images" / name).unlink()
    scene = pickle.loads(pickle.dumps(scene)).resized(6, 8)
    assert scene.images([0]).shape == (1, 6, 8, 3)
    with pytest.raises(InputError, match="101.png.*does not exist"):
        scene.images([1])


def test_loading_starts_no_jax_backend(tmp_path):
    path = writers.write_transforms(writers.make_rig(), tmp_path)
    code = (
        f"from nvs_common.data import scenes; scenes.load_scene({str(path)!r}).images([0]);"
        "from jax._src import xla_bridge; assert not xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


def _environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def test_a_folder_with_several_layouts_uses_the_documented_order(tmp_path):
    rig = writers.make_rig(simple=True)
    order = [
        (writers.write_llff, "LLFF", "poses_bounds.npy"),
        (writers.write_neus, "NeuS", "cameras_sphere.npz"),
        (writers.write_spaces, "Spaces rig 0", "models.json"),
        (writers.write_transforms, "transforms.json", "transforms.json"),
        (writers.write_colmap_bin, "COLMAP", "sparse/0"),
        (writers.write_opencv, "opencv_cameras.json", "opencv_cameras.json"),
    ]
    for write, source, _ in order:
        write(rig, tmp_path)
        assert scenes.load_scene(tmp_path).source == source
    for _, source, file in order:
        assert scenes.load_scene(tmp_path / file).source == source


@pytest.mark.parametrize("folder", ["sparse/0", "sparse", ".", "sparse/1", "colmap/sparse/0"])
def test_a_colmap_model_is_found_wherever_tools_put_it(tmp_path, folder):
    rig = writers.make_rig()
    writers.write_colmap_txt(rig, tmp_path, folder=folder)
    # The new layout adds these; they say nothing that images.txt does not.
    (tmp_path / folder / "rigs.txt").write_text("1 1 CAMERA 7\n")
    path = tmp_path / folder if folder.startswith("colmap") else tmp_path
    for target in (path, tmp_path / folder / "images.txt"):
        scene = scenes.load_scene(target)
        np.testing.assert_allclose(scene.cameras.world_from_cam, rig.poses, atol=1e-9)


def test_smaller_copies_of_the_images_rescale_the_intrinsics(tmp_path):
    rig = writers.make_rig(height=24, width=32)
    writers.write_colmap_bin(rig, tmp_path)
    full = scenes.load_scene(tmp_path)
    small = writers.make_rig(height=6, width=8)
    writers.write_images(small, tmp_path / "images_4")
    scene = scenes.load_scene(tmp_path, image_folder="images_4")
    np.testing.assert_allclose(scene.cameras.intrinsics, full.cameras.intrinsics / 4)
    np.testing.assert_array_equal(scene.images([2])[0], small.images[2] / np.float32(255))
    # Without the full-size images the copy is found by itself, in both layouts that name it.
    writers.write_transforms(rig, tmp_path)
    for name in rig.names:
        (tmp_path / "images" / name).unlink()
    nerfstudio = scenes.load_scene(tmp_path / "transforms.json")
    (tmp_path / "images").rmdir()
    for scene in (nerfstudio, scenes.load_scene(tmp_path)):
        np.testing.assert_allclose(scene.cameras.intrinsics, full.cameras.intrinsics / 4)


def test_a_frame_may_have_its_own_intrinsics(tmp_path):
    rig = writers.make_rig()
    writers.write_transforms(rig, tmp_path)
    content = json.loads((tmp_path / "transforms.json").read_text())
    content["frames"][0]["fl_x"] = 33.0  # written in reverse: the last name
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    focal = scenes.load_scene(tmp_path).cameras.intrinsics[:, 0]
    np.testing.assert_allclose(focal, [rig.intrinsics[0]] * 3 + [33.0])


ANGLE = 20 / np.tan(0.5)  # focal length of 40 pixels seen under an angle of 1


@pytest.mark.parametrize(
    "shared, own, expected",
    [
        (dict(camera_angle_x=1, cx=15, cy=10), {}, [ANGLE, ANGLE, 15, 10]),
        (dict(camera_angle_x=1, cy=10), {}, [ANGLE, ANGLE, 20, 10]),
        (dict(camera_angle_x=1, fl_y=70), {}, [ANGLE, 70, 20, 15]),
        (dict(camera_angle_x=1, camera_angle_y=1), {}, [ANGLE, 0.75 * ANGLE, 20, 15]),
        (dict(fl_x=35, camera_angle_y=1), {}, [35, 0.75 * ANGLE, 20, 15]),
        (dict(fl_x=35, camera_angle_x=1, camera_angle_y=2, fl_y=36), {}, [35, 36, 20, 15]),
        (dict(fl_x=35, cx=15), dict(cx=16, camera_angle_y=1), [35, 0.75 * ANGLE, 16, 15]),
        (dict(fl_x=35, fl_y=36), dict(camera_angle_x=1), [ANGLE, 36, 20, 15]),
        (dict(camera_angle_x=1), dict(fl_x=35), [35, 35, 20, 15]),
    ],
)
@pytest.mark.parametrize("factor", [1, 2])
def test_each_of_the_intrinsics_is_settled_by_itself(tmp_path, shared, own, expected, factor):
    rig = writers.make_rig(height=30 // factor, width=40 // factor)
    file = writers.write_transforms(rig, tmp_path) / "transforms.json"
    frames = [frame | own for frame in json.loads(file.read_text())["frames"]]
    file.write_text(json.dumps(dict(w=40, h=30, frames=frames, **shared)))
    expected = [np.array(expected) / factor] * len(frames)
    np.testing.assert_allclose(scenes.load_scene(tmp_path).cameras.intrinsics, expected)


@pytest.mark.parametrize("layout", ["llff", "neus", "realestate", "colmap_txt"])
def test_hidden_files_of_a_file_system_are_no_images(tmp_path, layout):
    rig = writers.make_rig(simple=True)
    path = writers.WRITERS[layout](rig, tmp_path)
    for folder in [path for path in tmp_path.rglob("*") if path.is_dir()]:
        (folder / ".DS_Store").write_text("x")
        (folder / "._100.png").write_bytes(b"\0\5")
    assert scenes.load_scene(path).names == tuple(rig.names)
    for folder in (tmp_path / "images", tmp_path / "image", tmp_path / "clip"):
        if folder.is_dir():
            assert image_folder.load(str(folder), size=(6, 8)).names == tuple(rig.names)


def test_an_absolute_path_in_the_scene_is_taken(tmp_path):
    rig = writers.make_rig()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    file = writers.write_transforms(rig, tmp_path / "real") / "transforms.json"
    content = json.loads(file.read_text())
    for frame, root in zip(content["frames"], ["real", "link", "real", "real"], strict=True):
        frame["file_path"] = str(tmp_path / root / frame["file_path"])
    file.write_text(json.dumps(content))
    for root in ("real", "link"):
        assert scenes.load_scene(tmp_path / root).names == tuple(rig.names)


def test_a_colmap_model_beside_the_images_is_found(tmp_path):
    rig = writers.make_rig()
    writers.write_colmap_txt(rig, tmp_path / "a", folder="colmap/sparse/0")
    scene = scenes.load_scene(tmp_path / "a")
    assert scene.source == "COLMAP" and scene.names == tuple(rig.names)
    # nerfstudio's own file, in its own frame, comes first.
    writers.write_transforms(rig, tmp_path / "a")
    assert scenes.load_scene(tmp_path / "a").source == "transforms.json"
    # A folder of scenes is none, whatever they are called.
    writers.write_colmap_txt(rig, tmp_path / "b" / "colmap")
    assert scenes.find_scenes(tmp_path / "b") == [tmp_path / "b" / "colmap"]


def test_the_rig_position_of_a_spaces_scene_is_chosen(tmp_path):
    writers.write_spaces(writers.make_rig(), tmp_path)
    scene = scenes.load_scene(tmp_path / "models.json", rig=1)
    np.testing.assert_allclose(scene.cameras.world_from_cam[:, :3, 3], [[0, 0, 1.0]] * 4)
    with pytest.raises(InputError, match="no rig position 2; the file holds 2"):
        scenes.load_scene(tmp_path, rig=2)


def test_realestate_frames_keep_the_order_of_their_time_stamps(tmp_path):
    rig = writers.make_rig()
    writers.write_realestate(rig, tmp_path)
    # 99 comes before 100 in time and after it as a string.
    text = (tmp_path / "clip.txt").read_text().replace("\n102 ", "\n99 ")
    (tmp_path / "clip.txt").write_text(text)
    (tmp_path / "clip" / "102.png").rename(tmp_path / "clip" / "99.png")
    for path in (tmp_path / "clip.txt", tmp_path / "clip"):
        scene = scenes.load_scene(path)
        assert scene.names == ("99.png", "100.png", "101.png", "103.png")
        np.testing.assert_allclose(scene.cameras.world_from_cam, rig.poses[[2, 0, 1, 3]], atol=1e-9)


def test_missing_frames_are_skipped_and_counted_only_when_asked(tmp_path, caplog):
    rig = writers.make_rig()
    writers.write_transforms(rig, tmp_path)
    (tmp_path / "images" / rig.names[1]).unlink()
    with pytest.raises(InputError, match="images/101.png"):
        scenes.load_scene(tmp_path)
    with caplog.at_level(logging.WARNING):
        scene = scenes.load_scene(tmp_path, strict=False)
    assert "skipped 1 of 4 frames" in caplog.text and "101.png" in caplog.text
    np.testing.assert_allclose(scene.cameras.world_from_cam, rig.poses[[0, 2, 3]], atol=1e-9)


def test_find_scenes_lists_scene_folders_and_clips_by_name(tmp_path):
    rig = writers.make_rig(simple=True)
    for name in ("transforms", "llff", "colmap_bin", "realestate"):
        (tmp_path / name).mkdir()
        writers.WRITERS[name](rig, tmp_path / name)
    writers.write_realestate(rig, tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("not a clip")
    found = scenes.find_scenes(tmp_path)
    assert [p.name for p in found] == ["clip.txt", "colmap_bin", "llff", "transforms"]
    assert all(len(scenes.load_scene(p)) == 4 for p in found)
    # A scene, or its camera file, is a list of one.
    for one in (tmp_path / "llff", tmp_path / "llff" / "poses_bounds.npy"):
        assert scenes.find_scenes(one) == [one]
    assert scenes.find_scenes(tmp_path / "realestate") == [tmp_path / "realestate" / "clip.txt"]


def test_near_and_far_come_from_the_points_an_image_observes(tmp_path):
    rig = writers.make_rig()
    scene = scenes.load_scene(writers.write_colmap_bin(rig, tmp_path))
    assert "points" in scene.bounds
    seen = writers.observations(rig)[2]
    local = rig.points[seen] - rig.poses[2, :3, 3]
    depth = local @ rig.poses[2, :3, 2]
    near, far = np.percentile(depth, [1, 99])
    np.testing.assert_allclose(scene.cameras.near[2], 0.9 * near)
    np.testing.assert_allclose(scene.cameras.far[2], 1.1 * far)
    # Image 0 lists no observations: the points inside its frame count.
    local = (rig.points - rig.poses[0, :3, 3]) @ rig.poses[0, :3, :3]
    uv = local[:, :2] / local[:, 2:] * rig.intrinsics[:2] + rig.intrinsics[2:]
    inside = np.all((uv > 0) & (uv < [rig.width, rig.height]), axis=1)
    near, far = np.percentile(local[inside, 2], [1, 99])
    assert 10 <= inside.sum() < len(inside)
    np.testing.assert_allclose(scene.cameras.far[0], 1.1 * far)


def test_cameras_around_an_object_have_it_between_near_and_far(tmp_path):
    rig = writers.make_rig(count=8)
    angles = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    centres = np.stack([3 * np.cos(angles), np.full(8, -1.0), 3 * np.sin(angles)], axis=-1)
    rig.poses = np.stack([writers.look_at(c, np.array([0.0, 0.5, 0.0])) for c in centres])
    scene = scenes.load_scene(writers.write_opencv(rig, tmp_path))
    distance = np.hypot(3, 1.5)
    np.testing.assert_allclose(scene.cameras.near, 0.5 * distance)
    np.testing.assert_allclose(scene.cameras.far, 8 * distance)
    assert "axes meet" in scene.bounds


def test_parallel_cameras_have_bounds_from_their_spread(tmp_path):
    rig = writers.make_rig()
    rig.poses = np.tile(np.eye(4), (4, 1, 1))
    rig.poses[:, 2, 3] = [0, 1, 2, 3]
    scene = scenes.load_scene(writers.write_opencv(rig, tmp_path))
    np.testing.assert_allclose(scene.cameras.far, 10 * np.sqrt(1.25))
    assert "spread" in scene.bounds
    rig.poses[:, 2, 3] = 4
    scene = scenes.load_scene(writers.write_opencv(rig, tmp_path))
    assert "one centre" in scene.bounds and np.all(scene.cameras.near == 0.1)


def test_llff_bounds_are_the_files_own(tmp_path):
    scene = scenes.load_scene(writers.write_llff(writers.make_rig(simple=True), tmp_path))
    assert scene.bounds == "poses_bounds.npy"
    assert np.all(scene.cameras.near == 2) and np.all(scene.cameras.far == 9)


def test_near_and_far_may_be_given(tmp_path):
    path = writers.write_llff(writers.make_rig(simple=True), tmp_path)
    scene = scenes.load_scene(path, near_far=(0.5, 40))
    assert np.all(scene.cameras.near == 0.5) and np.all(scene.cameras.far == 40)
    assert scene.bounds == "given by the caller"
    for bad in ((0, 1), (2, 1), (1, np.inf), (np.nan, 1)):
        with pytest.raises(InputError, match="0 < near < far"):
            scenes.load_scene(path, near_far=bad)


@pytest.mark.parametrize("binary", [False, True])
def test_near_and_far_of_nerfstudio_come_from_its_points(tmp_path, binary):
    rig = writers.make_rig(count=3)
    writers.write_transforms(rig, tmp_path, ply_file_path="points.ply")
    kind = "binary_little_endian" if binary else "ascii"
    header = f"ply\nformat {kind} 1.0\nelement vertex {len(rig.points)}\nproperty uchar red\n"
    header += "property double x\nproperty double y\nproperty double z\nend_header\n"
    rows = [struct.pack("<Bddd", 7, *xyz) for xyz in rig.points]
    if not binary:
        rows = [f"7 {' '.join(repr(float(v)) for v in xyz)}\n".encode() for xyz in rig.points]
    (tmp_path / "points.ply").write_bytes(header.encode() + b"".join(rows))
    np.testing.assert_array_equal(point_cloud.read_ply(tmp_path / "points.ply"), rig.points)
    scene = scenes.load_scene(tmp_path)
    assert "points" in scene.bounds
    # All points, since the file does not say which image sees which: those inside the image.
    writers.write_colmap_bin(rig, tmp_path, seen=False)
    reference = scenes.load_scene(tmp_path / "sparse/0")
    np.testing.assert_allclose(scene.cameras.near, reference.cameras.near, rtol=1e-9)
    np.testing.assert_allclose(scene.cameras.far, reference.cameras.far, rtol=1e-9)
