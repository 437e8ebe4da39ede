"""Every bad scene is refused with one sentence that names the file, the frame and the reason."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from nvs_common.data import distortion, scene_files, scenes
from nvs_common.errors import InputError
from tests import scene_writers as writers
from tests.scene_writers import refused


@pytest.fixture
def rig():
    return writers.make_rig(simple=True)


@pytest.fixture(params=["transforms.json", "opencv_cameras.json"])
def edit(request, tmp_path, rig):
    """A function that changes the JSON of a good scene: edit(change) -> path."""
    write = {"transforms.json": writers.write_transforms}.get(request.param, writers.write_opencv)
    file = write(rig, tmp_path) / request.param

    def apply(change):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        return tmp_path

    apply.file, apply.pose = file, "transform_matrix" if "trans" in request.param else "w2c"
    return apply


def set_in_frame(key, value):
    def change(content):
        content["frames"][1][key] = value

    return change


def change_pose(key, matrix):
    def change(content):
        pose = np.array(content["frames"][1][key])
        content["frames"][1][key] = (np.array(matrix) @ pose).tolist()

    return change


# The second frame in the file, which is written in reverse.
FRAME = "102.png"


def test_missing_frame(edit, tmp_path):
    (tmp_path / "images" / FRAME).unlink()
    refused(tmp_path, str(edit.file), FRAME, "missing", "load_scene(path, strict=False)")


def test_empty_scene(edit):
    path = edit(lambda content: content["frames"].clear())
    refused(path, str(edit.file), "empty")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_pose_with_nan_or_infinity(edit, tmp_path, text):
    edit(lambda content: content["frames"][1][edit.pose][0].__setitem__(3, 12345.5))
    edit.file.write_text(edit.file.read_text().replace("12345.5", text))
    refused(tmp_path, str(edit.file), text)


def test_rotation_with_shear(edit):
    shear = np.eye(4)
    shear[0, 1] = 0.1
    refused(edit(change_pose(edit.pose, shear)), str(edit.file), FRAME, "not orthonormal")


def test_rotation_with_scale(edit):
    path = edit(change_pose(edit.pose, np.diag([1.5, 1.5, 1.5, 1.0])))
    refused(path, str(edit.file), FRAME, "not orthonormal")


def test_mirror(edit):
    path = edit(change_pose(edit.pose, np.diag([-1.0, 1, 1, 1])))
    refused(path, str(edit.file), FRAME, "determinant -1")


def test_pose_that_is_not_a_transform(edit):
    path = edit(lambda content: content["frames"][1][edit.pose].__setitem__(3, [0, 0, 0.1, 1]))
    refused(path, str(edit.file), FRAME, "last row")
    path = edit(set_in_frame(edit.pose, [1.0] * 16))
    refused(path, str(edit.file), FRAME, edit.pose, "expected (4, 4) numbers")


def test_pose_at_an_absurd_distance(edit):
    path = edit(lambda content: content["frames"][1][edit.pose][0].__setitem__(3, 1e30))
    refused(path, str(edit.file), FRAME, "too large")


@pytest.mark.parametrize("focal", [0, -500.0, 0.2, "500", None, True, [500]])
def test_focal_length(edit, focal):
    key = "fl_x" if edit.pose == "transform_matrix" else "fx"
    refused(edit(set_in_frame(key, focal)), str(edit.file), FRAME, "foc" if focal else "")


def test_principal_point_far_outside(edit):
    refused(edit(set_in_frame("cx", 1e4)), str(edit.file), FRAME, "principal point")


def test_same_frame_twice(edit):
    path = edit(lambda content: content["frames"].append(content["frames"][1]))
    refused(path, str(edit.file), FRAME, "twice")


def test_images_of_another_aspect(edit, tmp_path):
    Image.new("RGB", (10, 10)).save(tmp_path / "images" / FRAME)
    refused(tmp_path, str(edit.file), FRAME, "10 x 10", "16 x 12", "aspect")


def test_mixed_image_sizes_need_a_size(edit, tmp_path):
    Image.new("RGB", (32, 24)).save(tmp_path / "images" / FRAME)
    refused(tmp_path, str(tmp_path), FRAME, "32 x 24", "16 x 12", "size=")
    assert scenes.load_scene(tmp_path, size=(12, 16)).images([2]).shape == (1, 12, 16, 3)


@pytest.mark.parametrize(
    "escape", ["../secret.png", "/etc/passwd", "images/../../secret.png", "..\\secret.png", "a\0b"]
)
def test_path_out_of_the_scene(edit, tmp_path, escape):
    Image.new("RGB", (16, 12)).save(tmp_path.parent / "secret.png")
    refused(edit(set_in_frame("file_path", escape)), str(edit.file))


@pytest.mark.parametrize("escape", ["https://example.invalid/a.png", "", 7, None])
def test_path_that_is_no_path(edit, escape):
    refused(edit(set_in_frame("file_path", escape)), str(edit.file))


def test_link_out_of_the_scene(edit, tmp_path):
    target = tmp_path.parent / "elsewhere.png"
    Image.new("RGB", (16, 12)).save(target)
    (tmp_path / "images" / FRAME).unlink()
    (tmp_path / "images" / FRAME).symlink_to(target)
    refused(tmp_path, str(edit.file), FRAME, "link out of the scene", f"the file {tmp_path}")


def test_folder_of_images_that_is_a_link_out_of_the_scene(edit, tmp_path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "pictures"
    (tmp_path / "images").rename(elsewhere)
    (tmp_path / "images").symlink_to(elsewhere)
    link = f"the folder {tmp_path / 'images'} is a link out of the scene's folder, to {elsewhere}"
    refused(tmp_path, str(edit.file), link, "put a copy in the link's place")


@pytest.mark.parametrize("name", ["images", "./images"])
def test_image_that_is_a_folder(edit, name):
    refused(edit(set_in_frame("file_path", name)), str(edit.file), "missing")


@pytest.mark.parametrize(
    "name",
    [".", "/a" * 5000, "a" * 300, "\ud800.png"],
    ids=["scene", "deep", "long", "half letter"],
)
def test_image_paths_that_no_file_can_have(edit, name):
    refused(edit(set_in_frame("file_path", name)), str(edit.file), "image path")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "bad JSON"),
        ('{"frames": []} extra', "bad JSON"),
        ('{"frames": [], "frames": []}', "'frames' twice"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("7", "expected"),
        ('{"frames": {}}', "expected"),
        ('{"frames": [3]}', "expected an object"),
        ('{"frames": [{}]}', "path of its image"),
        ('{"frames": [], "w": 1' + "0" * 5000 + "}", "bad JSON"),
    ],
)
def test_bad_json(edit, tmp_path, text, reason):
    edit.file.write_text(text)
    refused(tmp_path, str(edit.file), reason)
    refused(edit.file, str(edit.file))


def test_text_that_is_not_utf8(edit, tmp_path):
    edit.file.write_bytes(b"\xff\xfe{\x00}")
    refused(tmp_path, str(edit.file), "UTF-8")


def test_a_file_larger_than_any_honest_one(edit, tmp_path, monkeypatch):
    monkeypatch.setattr(scene_files, "MAX_TEXT_BYTES", 100)
    refused(tmp_path, str(edit.file), "more than the 100 allowed")


def test_unknown_camera_model(tmp_path, rig):
    path = writers.write_transforms(rig, tmp_path, camera_model="EQUIRECTANGULAR")
    refused(path, "transforms.json", "EQUIRECTANGULAR", "expected one of")


def test_distortion_that_folds_the_image(tmp_path, rig):
    path = writers.write_transforms(rig, tmp_path, k1=-44.0)
    refused(path, "transforms.json", "103.png", "folds")


def test_distortion_around_a_point_outside_of_the_image(tmp_path, rig):
    with pytest.raises(InputError, match="principal point -6, 15 is outside of the image") as error:
        lens = distortion.Distortion((-0.05, 0.0, 0.0, 0.0))
        distortion.pinhole(lens, np.array([40.0, 40.0, -6.0, 15.0]), 30, 40)
    assert "folds" not in str(error.value)
    # A lens that folds there too is still said to fold.
    path = writers.write_transforms(rig, tmp_path, k1=-44.0, cx=-1.0)
    refused(path, "transforms.json", "103.png", "folds")


@pytest.mark.parametrize("axis", ["x", "y"])
def test_angle_of_view(tmp_path, rig, axis):
    file = writers.write_blender(rig, tmp_path) / "transforms_val.json"
    content = json.loads(file.read_text())
    content[f"camera_angle_{axis}"] = 40.0
    file.write_text(json.dumps(content))
    refused(tmp_path, str(file), f"camera_angle_{axis} 40")


def test_a_focal_length_that_is_nowhere(tmp_path, rig):
    file = writers.write_blender(rig, tmp_path) / "transforms_val.json"
    content = json.loads(file.read_text())
    del content["camera_angle_x"]
    file.write_text(json.dumps(content))
    refused(tmp_path, str(file), "neither fl_x nor camera_angle_x")


# ---- Images.


@pytest.fixture
def image(tmp_path, rig):
    """The image of one frame of a good scene, and the scene's folder as its parent's parent."""
    return writers.write_opencv(rig, tmp_path) / "images" / FRAME


def test_image_of_zero_bytes(image):
    image.write_bytes(b"")
    refused(image.parent.parent, FRAME, "zero bytes")


def test_image_that_is_something_else(image):
    image.write_text("<html>404</html>")
    refused(image.parent.parent, FRAME, "not an image")


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_image_cut_short(tmp_path, extension):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    rig = writers.make_rig(height=64, width=64)
    path = writers.write_opencv(rig, tmp_path) / "images" / FRAME
    buffer = io.BytesIO()
    noise.save(buffer, {"jpg": "JPEG", "png": "PNG"}[extension])
    # A file is read by its contents, so a JPEG named .png is no obstacle.
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    assert len(scenes.load_scene(tmp_path)) == 4  # the header is whole
    refused(tmp_path, FRAME, "cannot be decoded", "cut short")


def test_image_with_a_huge_header(image):
    data = bytearray(image.read_bytes())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    # The checksum of the header chunk is made to fit.
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    image.write_bytes(bytes(data))
    refused(image.parent.parent, FRAME)


@pytest.mark.parametrize("turn", [3, 6])
def test_square_image_turned_by_exif(tmp_path, turn):
    path = writers.write_opencv(writers.make_rig(height=16, width=16), tmp_path) / "images" / FRAME
    save_turned(path, turn)
    refused(tmp_path, FRAME, f"EXIF orientation {turn}")


def test_image_turned_by_exif_without_a_declared_size(tmp_path, rig):
    path = writers.write_blender(rig, tmp_path) / FRAME
    save_turned(path, 6)
    refused(tmp_path, FRAME, "EXIF orientation 6", "rotate the pixels")


def test_image_turned_by_exif_of_another_aspect_than_declared(image):
    with Image.open(image) as stored:
        stored.crop((0, 0, 10, 4)).save(image)
    save_turned(image, 6)
    refused(image.parent.parent, FRAME, "EXIF orientation 6")


def test_tiff_turned_by_exif(image):
    """Pillow turns it by itself, whatever the camera is for."""
    save_turned(image, 6, format="TIFF")
    refused(image.parent.parent, FRAME, "EXIF orientation 6")


def save_turned(path, turn, **options):
    """Gives an image an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = turn
    with Image.open(path) as image:
        image.save(path, exif=exif, **options)


def test_image_without_a_known_range(image):
    Image.fromarray(np.ones((12, 16), np.float32)).save(image, format="TIFF")
    refused(image.parent.parent, FRAME, "without a known range")


def test_image_that_changes_after_loading(image):
    scene = scenes.load_scene(image.parent.parent)
    Image.new("RGB", (32, 24)).save(image)
    with pytest.raises(InputError, match="102.png.*32 x 24 but was 16 x 12"):
        scene.images([2])


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_image_that_is_a_pipe(image):
    image.unlink()
    os.mkfifo(image)
    refused(image.parent.parent, FRAME)


# ---- Paths.


def test_path_that_does_not_exist(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no such file or folder")


def test_folder_that_is_no_scene(tmp_path):
    refused(tmp_path, str(tmp_path), "not a scene", "transforms.json")
    (tmp_path / "a.csv").write_text("1,2")
    refused(tmp_path / "a.csv", "a.csv", "not a scene")
    with pytest.raises(InputError, match="no scene folders"):
        scenes.find_scenes(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        scenes.find_scenes(tmp_path / "nowhere")


@pytest.mark.parametrize("target", [".", "opencv_cameras.json", "images/102.png"])
def test_path_without_permission(image, target):
    path = image.parent.parent / target
    path.chmod(0)
    try:
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
        refused(image.parent.parent, path.name if target != "." else str(path), "ermission")
    finally:
        path.chmod(0o700)


def test_read_errors_of_the_system_are_named(image, monkeypatch):
    """What a file without permission gives, also where tests run as root."""

    def deny(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(scene_files.pathlib.Path, "read_bytes", deny)
    refused(image.parent.parent, "opencv_cameras.json", "Permission denied")


@pytest.mark.parametrize("options", [{"rig": 1}, {"image_folder": "images"}])
def test_option_without_meaning_for_the_layout(image, options):
    refused(image.parent.parent, next(iter(options)), "no meaning", **options)


def test_image_folder_that_is_not_there(tmp_path, rig):
    path = writers.write_colmap_bin(rig, tmp_path)
    refused(path, "images_16", image_folder="images_16")
    refused(path, "leaves the scene", image_folder="../images")
    (tmp_path / "images").rename(tmp_path / "photos")
    refused(path, "103.png", "missing")
    assert len(scenes.load_scene(path, image_folder="photos")) == 4
