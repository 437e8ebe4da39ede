"""Images and intrinsics change together: resizing, cropping, undistorting; and decoding itself."""

import dataclasses
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from nvs_common.data import distortion, image_folder, images, scenes
from nvs_common.errors import InputError
from tests import scene_writers as writers

HEIGHT, WIDTH = 72, 96


def pattern(xy: np.ndarray) -> np.ndarray:
    """A smooth colour [..., 3] for every ray, given as normalised coordinates [..., 2]."""
    x, y = xy[..., 0], xy[..., 1]
    waves = [np.sin(9 * x + 2 * y), np.cos(7 * y - 3 * x), np.sin(6 * x * y + 5 * x + 4 * y)]
    return 0.5 + 0.4 * np.stack(waves, axis=-1)


def pixel_centres(height: int, width: int) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)


def seen_by(scene, i: int, shift: float = 0.0) -> np.ndarray:
    """What a pinhole camera of the scene sees of the pattern; shift moves the pixel centres."""
    uv = pixel_centres(scene.cameras.height, scene.cameras.width) + shift
    k = scene.cameras.intrinsics[i]
    return pattern((uv - k[2:]) / k[:2])


def pattern_rig(stored_rays=lambda xy: xy, intrinsics=(110.0, 104.0, 45.0, 38.5)):
    """A rig whose images show the pattern along `stored_rays` of their pinhole rays."""
    rig = writers.make_rig(count=2, height=HEIGHT, width=WIDTH)
    rig.intrinsics = np.array(intrinsics)
    xy = (pixel_centres(HEIGHT, WIDTH) - rig.intrinsics[2:]) / rig.intrinsics[:2]
    picture = np.round(255 * pattern(stored_rays(xy))).astype(np.uint8)
    return dataclasses.replace(rig, images=np.stack([picture] * 2))


@pytest.mark.parametrize(
    "size", [(36, 48), (48, 48), (30, 90), (72, 96), (71, 96), (24, 24), (100, 133), (50, 37)]
)
def test_resizing_and_cropping_commute_with_the_intrinsics(tmp_path, size):
    scene = scenes.load_scene(writers.write_opencv(pattern_rig(), tmp_path), size=size)
    image = scene.images([0])[0].astype(np.float64)
    assert image.shape == (*size, 3)
    # The filter's support is cut at the border.
    inner = (slice(4, -4), slice(4, -4))
    error = np.abs(image - seen_by(scene, 0))[inner].mean()
    shifted = np.abs(image - seen_by(scene, 0, shift=0.5))[inner].mean()
    # Rounding of the stored image to 8 bits alone is 0.001.
    assert error < 0.0015
    assert shifted > 4 * error


def test_resizing_twice_starts_from_the_cropped_view(tmp_path):
    scene = scenes.load_scene(writers.write_opencv(pattern_rig(), tmp_path))
    twice = scene.resized(60, 60).resized(30, 30)
    once = scene.resized(30, 30)
    np.testing.assert_allclose(twice.cameras.intrinsics, once.cameras.intrinsics)
    np.testing.assert_array_equal(twice.images([1]), once.images([1]))
    back = twice.resized(72, 96)
    assert np.abs(back.images([0])[0] - seen_by(back, 0))[4:-4, 4:-4].mean() < 0.0015
    # The crop's edges stay: the wider view is gone.
    assert back.cameras.intrinsics[0, 0] > scene.cameras.intrinsics[0, 0] * 1.2


def test_a_crop_without_scaling_copies_pixels(tmp_path):
    rig = writers.make_rig(height=13, width=16)
    scene = scenes.load_scene(writers.write_opencv(rig, tmp_path), size=(13, 9))
    expected = rig.images[0][:, 3:12] / np.float32(255)
    np.testing.assert_array_equal(scene.images([0])[0], expected)
    expected = rig.intrinsics - [0, 0, 3, 0]
    np.testing.assert_allclose(scene.cameras.intrinsics[0], expected)


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (-1, 5)])
def test_a_size_without_pixels_is_refused(tmp_path, size):
    path = writers.write_opencv(writers.make_rig(), tmp_path)
    with pytest.raises(InputError, match="expected at least 1 x 1"):
        scenes.load_scene(path, size=size)


def test_spaces_images_of_different_heights_are_cropped_to_the_common_one(tmp_path):
    rig = pattern_rig()
    writers.write_spaces(rig, tmp_path)
    # The second camera's image lacks rows at the bottom, and its file entry says so.
    Image.fromarray(rig.images[1][:-6]).save(tmp_path / rig.names[1])
    content = json.loads((tmp_path / "models.json").read_text())
    for camera in content[0]:
        if camera["relative_path"] == rig.names[1]:
            camera["height"] -= 6
    (tmp_path / "models.json").write_text(json.dumps(content))
    scene = scenes.load_scene(tmp_path)
    assert (scene.cameras.height, scene.cameras.width) == (HEIGHT - 6, WIDTH)
    assert scene.cameras.intrinsics[0, 3] == rig.intrinsics[3] - 3
    assert scene.cameras.intrinsics[1, 3] == rig.intrinsics[3]
    both = scene.images([0, 1])
    for i in range(2):
        np.testing.assert_allclose(both[i], seen_by(scene, i), atol=1 / 255)


# Parameters of each model, and its definition for one ray (x, y), written out once more.
def _radial(x, y, factor, p1=0.0, p2=0.0):
    r2 = x * x + y * y
    return np.stack(
        [
            x * factor + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * factor + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
        ],
        axis=-1,
    )


def _brown(k1, k2=0.0, p1=0.0, p2=0.0, k3=0.0, *denominator):
    def distort(xy):
        x, y = xy[..., 0], xy[..., 1]
        r2 = x * x + y * y
        factor = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
        if denominator:
            k4, k5, k6 = denominator
            factor = factor / (1 + k4 * r2 + k5 * r2**2 + k6 * r2**3)
        return _radial(x, y, factor, p1, p2)

    return distort


def _fisheye(k1=0.0, k2=0.0, k3=0.0, k4=0.0):
    def distort(xy):
        r = np.linalg.norm(xy, axis=-1)
        t = np.arctan(r)
        bent = t + k1 * t**3 + k2 * t**5 + k3 * t**7 + k4 * t**9
        return xy * (bent / r)[..., None]

    return distort


MODELS = {
    "SIMPLE_RADIAL": ((-0.2,), _brown(-0.2), True),
    "SIMPLE_RADIAL pincushion": ((0.15,), _brown(0.15), True),
    "RADIAL": ((-0.25, 0.08), _brown(-0.25, 0.08), True),
    "OPENCV": ((-0.2, 0.05, 0.01, -0.02), _brown(-0.2, 0.05, 0.01, -0.02), False),
    "OPENCV_FISHEYE": ((0.03, -0.01, 0.004, -0.001), _fisheye(0.03, -0.01, 0.004, -0.001), False),
    "FULL_OPENCV": (
        (-0.1, 0.02, 0.004, 0.003, 0.01, 0.1, 0.02, 0.01),
        _brown(-0.1, 0.02, 0.004, 0.003, 0.01, 0.1, 0.02, 0.01),
        False,
    ),
    "SIMPLE_RADIAL_FISHEYE": ((0.04,), _fisheye(0.04), True),
    "RADIAL_FISHEYE": ((0.04, -0.02), _fisheye(0.04, -0.02), True),
}
NUMBERS = {
    "SIMPLE_RADIAL": 2,
    "RADIAL": 3,
    "OPENCV": 4,
    "OPENCV_FISHEYE": 5,
    "FULL_OPENCV": 6,
    "SIMPLE_RADIAL_FISHEYE": 8,
    "RADIAL_FISHEYE": 9,
}


def _inverse(distort):
    """Ideal rays of stored ones by fixed-point iteration, checked to have converged."""

    def rays(stored):
        ideal = stored.copy()
        for _ in range(200):
            ideal = ideal + 0.7 * (stored - distort(ideal))
        assert np.abs(distort(ideal) - stored).max() < 1e-9
        return ideal

    return rays


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_distortion_is_undone_in_the_images(tmp_path, name, text):
    params, distort, one_focal = MODELS[name]
    intrinsics = (100.0, 100.0, 45.0, 38.5) if one_focal else (100.0, 104.0, 45.0, 38.5)
    rig = pattern_rig(_inverse(distort), intrinsics)
    numbers = [*rig.intrinsics[1 if one_focal else 0 :], *params]
    model = name.split()[0]
    if text:
        writers.write_colmap_txt(rig, tmp_path, model, numbers)
    else:
        writers.write_colmap_bin(rig, tmp_path, NUMBERS[model], numbers)
    scene = scenes.load_scene(tmp_path)
    image = scene.images([0])[0]
    # Every pixel, the border too: the undistorted camera sees nothing that was not stored.
    assert np.abs(image - seen_by(scene, 0)).max() < 0.03
    assert np.abs(image - seen_by(scene, 0)).mean() < 0.0025
    xy = (pixel_centres(HEIGHT, WIDTH) - rig.intrinsics[2:]) / rig.intrinsics[:2]
    ignored = np.abs(rig.images[0] / 255 - pattern(xy)).mean()
    assert ignored > 4 * np.abs(image - seen_by(scene, 0)).mean()


@pytest.mark.parametrize(
    "extra, distort",
    [
        ({"k1": -0.2, "k2": 0.05, "p1": 0.01, "p2": -0.02}, _brown(-0.2, 0.05, 0.01, -0.02)),
        ({"camera_model": "OPENCV_FISHEYE", "k1": 0.03, "k2": -0.01}, _fisheye(0.03, -0.01)),
    ],
)
def test_distortion_of_transforms_json_is_undone_after_a_resize_too(tmp_path, extra, distort):
    rig = pattern_rig(_inverse(distort))
    path = writers.write_transforms(rig, tmp_path, **extra)
    scene = scenes.load_scene(path, size=(36, 36))
    error = np.abs(scene.images([0])[0] - seen_by(scene, 0))
    assert error[2:-2, 2:-2].mean() < 0.002


def test_the_undistorted_camera_keeps_as_much_of_the_view_as_has_pixels():
    lens = distortion.Distortion((-0.2, 0.05, 0.0, 0.0))
    stored = np.array([100.0, 104.0, 45.0, 38.5])
    ideal = distortion.pinhole(lens, stored, HEIGHT, WIDTH)
    uv = pixel_centres(HEIGHT, WIDTH)
    source = distortion.to_stored(lens, stored, ideal, uv)
    assert source.min() >= 0 and np.all(source <= [WIDTH, HEIGHT])
    wider = ideal * [0.99, 0.99, 1, 1]
    source = distortion.to_stored(lens, stored, wider, uv)
    assert source.min() < 0 or np.any(source > [WIDTH, HEIGHT])


def test_transparency_is_composited_on_white_before_resizing(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 0] = 255  # hidden red everywhere; the left half is transparent
    rgba[:, 4:, 3] = 255
    rgba[0, 0] = 0, 0, 255, 128
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = images.decode(tmp_path / "a.png")
    np.testing.assert_array_equal(image[1:, :4], 1.0)
    np.testing.assert_array_equal(image[1:, 4:], np.array([1.0, 0, 0]) + np.zeros((7, 4, 3)))
    np.testing.assert_allclose(image[0, 0], [127 / 255, 127 / 255, 1.0], atol=1e-6)
    small = images.resample(image, images.Window(0, 0, 8, 8), 2, 2)
    # Half white, half red at most; never a red fringe in the white part.
    assert small[1, 0].min() > 0.85


@pytest.mark.parametrize("kind", ["16 bit", "grey", "grey alpha", "palette", "1 bit", "cmyk"])
def test_other_kinds_of_pixels_keep_their_values(tmp_path, kind):
    ramp = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    path = tmp_path / ("a.tif" if kind == "cmyk" else "a.png")
    expected = np.repeat(ramp[..., None] / 255, 3, axis=-1)
    grey = Image.fromarray(ramp)
    if kind == "16 bit":
        Image.fromarray(ramp.astype(np.uint16) * 257).save(path)
    elif kind == "1 bit":
        expected = (expected > 0.5).astype(float)
        Image.fromarray(ramp > 127).save(path)
    else:
        mode = {"grey": "L", "grey alpha": "LA", "palette": "P", "cmyk": "CMYK"}[kind]
        (grey.convert("RGB") if mode == "CMYK" else grey).convert(mode).save(path)
    np.testing.assert_allclose(images.decode(path), expected, atol=0.006)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colours_of_16_bits_are_read_to_8(tmp_path, mode):
    channels = len(mode)
    pixels = np.full((3, 4, channels), 40_000, ">u2")
    pixels[..., 3 if mode == "RGBA" else 1 if mode == "LA" else 3 :] = 65_535
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 4, 3, 16, {"LA": 4, "RGB": 2, "RGBA": 6}[mode], 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + checksum
    (tmp_path / "a.png").write_bytes(content)
    np.testing.assert_array_equal(images.decode(tmp_path / "a.png"), np.float32(156) / 255)


def save_turned(image: np.ndarray, path, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(image).save(path, exif=exif)


@pytest.mark.parametrize("layout", ["transforms", "opencv_dict", "colmap_txt", "llff", "spaces"])
@pytest.mark.parametrize("turn", [5, 6])
def test_stored_rows_of_the_declared_size_are_kept_whatever_exif_says(tmp_path, layout, turn):
    rig = writers.make_rig(simple=True)
    path = writers.WRITERS[layout](rig, tmp_path)
    for file in tmp_path.rglob("*.png"):
        save_turned(rig.images[rig.names.index(file.name)], file, turn)
    scene = scenes.load_scene(path)
    np.testing.assert_array_equal(scene.images([2])[0], rig.images[2] / np.float32(255))


@pytest.mark.parametrize("turn", [5, 6, 7, 8])
def test_an_image_is_turned_where_only_that_gives_the_declared_size(tmp_path, turn):
    rig = writers.make_rig()
    path = writers.write_transforms(rig, tmp_path)
    rgba = np.concatenate([rig.images, rig.images[..., :1]], axis=-1)
    for name, image in zip(rig.names, rgba, strict=True):
        save_turned(np.swapaxes(image, 0, 1), path / "images" / name, turn)
    scene = scenes.load_scene(path)
    assert (scene.cameras.height, scene.cameras.width) == (rig.height, rig.width)
    with Image.open(path / "images" / rig.names[1]) as image:
        expected = np.asarray(ImageOps.exif_transpose(image), np.float32) / 255
    np.testing.assert_array_equal(scene.masks([1])[0], expected[..., 3])
    white = expected[..., :3] * expected[..., 3:] + (1 - expected[..., 3:])
    np.testing.assert_array_equal(scene.images([1])[0], white)


def test_aspects_decide_how_a_smaller_copy_is_turned(tmp_path):
    rig = writers.make_rig(height=66, width=98)
    small = writers.make_rig(height=17, width=25)
    path = writers.write_transforms(rig, tmp_path)
    for i, name in enumerate(rig.names):
        picture = small.images[i] if i < 2 else np.rot90(small.images[i])
        (path / "images" / name).unlink()
        (path / "images_4").mkdir(exist_ok=True)
        save_turned(picture, path / "images_4" / name, 6)
    scene = scenes.load_scene(path)
    np.testing.assert_array_equal(scene.images(range(4)), small.images / np.float32(255))
    expected = rig.intrinsics * [25 / 98, 17 / 66, 25 / 98, 17 / 66]
    np.testing.assert_allclose(scene.cameras.intrinsics, [expected] * 4)


def test_the_very_size_decides_where_rounding_would_let_both_pass(tmp_path):
    image = writers.make_rig(height=40, width=41).images[0]
    save_turned(image, tmp_path / "a.png", 8)
    assert images.probe(tmp_path / "a.png", declared=(40, 41)) == (40, 41)
    assert images.probe(tmp_path / "a.png", declared=(41, 40)) == (41, 40)
    with pytest.raises(InputError, match="EXIF orientation 8"):
        images.probe(tmp_path / "a.png", declared=(400, 402))


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_images_without_cameras_are_put_upright(tmp_path, turn, ending):
    image = writers.make_rig(height=12, width=20).images[0]
    for name in ("a", "b"):
        save_turned(image, tmp_path / f"{name}.{ending}", turn)
    with Image.open(tmp_path / f"a.{ending}") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored), np.float32) / 255
    folder = image_folder.load(str(tmp_path), size=expected.shape[:2])
    np.testing.assert_array_equal(folder.images([1])[0], expected)
    assert expected.shape[0] == (12 if turn < 5 else 20)
