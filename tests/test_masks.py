"""Masks of scene folders: where they come from, that they follow the images, bad ones."""

import json

import numpy as np
import pytest
from PIL import Image

from nvs_common.data import samples, scenes, sources, views
from nvs_common.errors import InputError


def half(height=12, width=16):
    """A mask whose left half is the object."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return mask


def opencv(folder, alpha):
    """Three views in opencv_cameras.json, RGBA or RGB."""
    folder.mkdir()
    frames = []
    for i in range(3):
        pixels = np.full((12, 16, 4), 40 * i, np.uint8)
        pixels[..., 3] = half()
        image = Image.fromarray(pixels, "RGBA")
        (image if alpha else image.convert("RGB")).save(folder / f"{i}.png")
        w2c = np.eye(4)
        w2c[:3, 3] = [0.1 * i, 0, 3]
        lens = dict(w=16, h=12, fx=20.0, fy=20.0, cx=8.0, cy=6.0)
        frames.append({**lens, "w2c": w2c.tolist(), "file_path": f"{i}.png"})
    (folder / "opencv_cameras.json").write_text(json.dumps(frames))
    return folder


def neus(folder, count=3):
    """Three views in NeuS's layout, a scene of radius 2 about (1, 0, 0)."""
    arrays = {}
    for name in ("image", "mask"):
        (folder / name).mkdir(parents=True)
    scale = np.diag([2.0, 2, 2, 1])
    scale[0, 3] = 1.0
    for i in range(3):
        Image.fromarray(np.full((12, 16, 3), 30 * i, np.uint8)).save(folder / f"image/{i}.png")
        if i < count:
            Image.fromarray(np.repeat(half()[..., None], 3, -1)).save(folder / f"mask/{i}.png")
        k = np.array([[20.0, 0, 7.5, 0], [0, 20, 5.5, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        pose = np.eye(4)
        pose[:3, 3] = [-1.0, 0, 6]
        arrays |= {f"world_mat_{i}": k @ pose, f"scale_mat_{i}": scale}
    np.savez(folder / "cameras_sphere.npz", **arrays)
    return folder


def test_alpha_is_a_mask_that_follows_the_image(tmp_path):
    scene = scenes.load_scene(opencv(tmp_path / "a", alpha=True))
    assert scene.has_masks
    np.testing.assert_array_equal(scene.masks([0, 2]), np.stack([half() / 255.0] * 2))
    small = scene.resized(6, 6)
    # The image is white where the mask is zero.
    assert small.masks([1]).shape == (1, 6, 6)
    np.testing.assert_allclose(small.masks([1])[0][:, [0, -1]], [[1, 0]] * 6, atol=0.05)
    white = 1 - small.images([0])[0].mean(-1)
    np.testing.assert_allclose(white, small.masks([0])[0], atol=1e-5)


def test_files_are_masks_and_units_come_back(tmp_path):
    scene = scenes.load_scene(neus(tmp_path / "a"))
    assert scene.has_masks
    np.testing.assert_array_equal(scene.masks([1])[0], half() / 255.0)
    # The camera's centre in the units of the file: -R^T t of world_mat.
    center = scene.world_from_scene @ scene.cameras.world_from_cam[0, :, 3]
    np.testing.assert_allclose(center, [1.0, 0, -6, 1], atol=1e-9)


def test_masks_reach_the_batch(tmp_path):
    scene = scenes.load_scene(neus(tmp_path / "a"))
    for one in (scene, sources.KeptScene(scene)):
        choice = views.Choice(np.array([0]), np.array([2, 1]))
        batch = samples.assemble(one, choice, with_mask=True)
        np.testing.assert_array_equal(batch.extras["mask"], np.stack([half() / 255.0] * 2))
        assert "mask" not in samples.assemble(one, choice).extras


def test_a_missing_mask_is_named(tmp_path):
    with pytest.raises(InputError, match="3 cameras but 2 masks in"):
        scenes.load_scene(neus(tmp_path / "a", count=2))
    scene = scenes.load_scene(opencv(tmp_path / "b", alpha=False))
    assert not scene.has_masks
    with pytest.raises(InputError, match=r"1.png: no mask: the image has no alpha"):
        scene.masks([1])
    sampler = samples.Sampler(1, 1, choice="random", hold_out_every=0, with_mask=True)
    with pytest.raises(InputError, match=r"data.with_mask is set, but scene .*b has views without"):
        sampler.check(sources.FolderScenes((scene,), {}))


def test_a_mask_of_another_size_is_named(tmp_path):
    root = neus(tmp_path / "a")
    Image.fromarray(half(6, 8)).save(root / "mask/1.png")
    scene = scenes.load_scene(root)
    with pytest.raises(InputError, match=r"1.png: the mask is 8 x 6 but its image 1.png is 16"):
        scene.masks([1])


def test_masks_of_nerfstudio_are_files_of_their_own(tmp_path):
    root = opencv(tmp_path / "a", alpha=False)
    (root / "opencv_cameras.json").unlink()
    Image.fromarray(half()).save(root / "mask_0.png")
    frames = []
    for i in range(2):
        pose = np.eye(4)
        pose[:3, 3] = [0.2 * i, 0, 3]
        frames.append({"file_path": f"{i}.png", "transform_matrix": pose.tolist()})
        frames[-1]["mask_path"] = "mask_0.png"
    camera = dict(fl_x=20.0, fl_y=20.0, cx=8.0, cy=6.0, w=16, h=12, frames=frames)
    (root / "transforms.json").write_text(json.dumps(camera))
    scene = scenes.load_scene(root)
    np.testing.assert_array_equal(scene.masks([1])[0], half() / 255.0)
    (root / "mask_0.png").unlink()
    with pytest.raises(InputError, match=r"frame '0.png': its mask .*mask_0.png is missing"):
        scenes.load_scene(root)


def test_a_scene_without_scale_is_named(tmp_path):
    root = neus(tmp_path / "a")
    arrays = dict(np.load(root / "cameras_sphere.npz"))
    del arrays["scale_mat_1"]
    np.savez(root / "cameras_sphere.npz", **arrays)
    with pytest.raises(InputError, match=r"frame '1.png': scale_mat_1 is nothing; expected a 4"):
        scenes.load_scene(root)


def test_the_toy_has_masks(shared_data):
    scene = scenes.load_scene(shared_data / "gso_toy", size=(32, 32))
    mask = scene.masks([0])[0]
    assert scene.has_masks and 0.05 < mask.mean() < 0.5
    image = scene.images([0])[0]
    np.testing.assert_allclose(image[mask == 0], 1.0, atol=0.02)
