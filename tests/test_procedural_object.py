"""The procedural object: its surface, pictures, masks and depth agree, and so do its sources."""

import numpy as np
import pytest

from configs import vqgan as vqgan_config
from configs import vqnerf as vqnerf_config
from nvs_common.data import pipeline, procedural_object, sources
from nvs_common.errors import InputError


def scene(size=24):
    return procedural_object.orbit(3, size, size, 9)


def test_points_of_the_surface_lie_on_it_and_evenly():
    points = scene().surface(4000, np.random.default_rng(0))
    assert points.shape == (4000, 3)
    assert np.abs(scene().distance(points)).max() < 1e-3
    assert np.linalg.norm(points, axis=-1).max() < 0.95
    # A sphere's height is uniform on it.
    ball = procedural_object.Part(
        "sphere", np.zeros(3), np.eye(3), np.full(3, 0.5), np.ones((2, 3)), np.zeros(3)
    )
    only = procedural_object.ObjectScene(scene().cameras, scene().names, (ball,), 0)
    heights = only.surface(4000, np.random.default_rng(1))[:, 2]
    assert abs(np.mean(np.abs(heights)) - 0.25) < 0.01


@pytest.mark.parametrize("kind", procedural_object.KINDS)
def test_distances_of_parts_have_gradients_of_length_one(kind):
    draw = np.random.default_rng(4)
    axes, _ = np.linalg.qr(draw.normal(size=(3, 3)))
    size = np.array([0.3, 0.1, 0.2])
    part = procedural_object.Part(kind, np.full(3, 0.1), axes, size, np.ones((2, 3)), np.zeros(3))
    points = draw.uniform(-1, 1, (500, 3))
    points = points[part.distance(points) > 0.02]
    step = 1e-5 * np.eye(3)
    slope = [(part.distance(points + s) - part.distance(points - s)) / 2e-5 for s in step]
    lengths = np.linalg.norm(slope, axis=0)
    assert np.mean(np.abs(lengths - 1) < 1e-3) > 0.97  # but where two points are equally near


def test_depth_leads_to_the_surface_where_the_mask_is():
    one = scene()
    depth, mask = one.depths([4])[0], one.masks([4])[0]
    assert 0.1 < mask.mean() < 0.6
    fx, fy, cx, cy = one.cameras.intrinsics[4]
    v, u = np.nonzero(mask == 1)
    z = depth[v, u].astype(float)
    local = np.stack([(u + 0.5 - cx) / fx * z, (v + 0.5 - cy) / fy * z, z, 1 + 0 * z])
    points = (one.cameras.world_from_cam[4] @ local)[:3].T
    assert np.abs(one.distance(points)).max() < 2e-3
    np.testing.assert_array_equal(depth[mask == 0], one.cameras.far[4].astype(np.float32))
    np.testing.assert_allclose(one.images([4])[0][mask == 0], 1.0)


def test_the_source_holds_views_of_the_same_object_out():
    config = vqnerf_config.get_config("tiny")
    config.data.update(height=16, width=16, views_per_scene=9, object=5)
    training, held = sources.make_source(config), sources.held_out(config)
    assert isinstance(training, sources.FOLDERS) and len(training) == len(held) == 1
    np.testing.assert_array_equal(training[0].images([1]), held[0].images([1]))
    batches = pipeline.training_batches(config, source=training)
    batch = next(batches)
    batches.close()
    assert batch.target.images.shape == (1, 2, 16, 16, 3)
    assert batch.extras["mask"].shape == (1, 2, 16, 16)
    held_out = np.asarray(held[0].images([0, 8]))
    for image in batch.target.images[0]:
        assert all(np.abs(image - other).max() > 0 for other in held_out)


def test_many_objects_are_none_of_the_single_ones():
    config = vqgan_config.get_config("tiny")
    config.data.num_scenes = 3
    many = sources.make_source(config)
    assert [one._scene.seed for one in many.scenes] == [100_000, 100_001, 100_002]


def test_no_views_are_refused():
    with pytest.raises(InputError, match="0 views of 8 x 8"):
        procedural_object.orbit(0, 8, 8, 0)


def test_a_folder_of_images_is_a_source(tmp_path):
    from PIL import Image

    (tmp_path / "sub").mkdir()
    for i in range(3):
        Image.fromarray(np.full((6, 9, 3), 50 * i, np.uint8)).save(tmp_path / f"sub/{i}.png")
    config = vqgan_config.get_config("tiny")
    config.data.update(source=f"images:{tmp_path}", height=4, width=4, hold_out_every=0)
    source = sources.make_source(config)
    images = source[0].images([2, 0])
    assert images.shape == (2, 4, 4, 3)
    np.testing.assert_allclose(images[:, 0, 0, 0], [100 / 255, 0])
    config.data.source = f"images:{tmp_path}/absent"
    with pytest.raises(InputError, match="no such folder"):
        sources.make_source(config)
    (tmp_path / "empty").mkdir()
    config.data.source = f"images:{tmp_path}/empty"
    with pytest.raises(InputError, match="0 images; expected from 2"):
        sources.make_source(config)
