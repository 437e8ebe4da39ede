"""Procedural objects: masks, depth, the true solid and its surface agree with each other."""

import pickle

import numpy as np
import pytest

from nvs_common import cameras
from nvs_common.data import objects, samples, shapes, sources
from nvs_common.errors import InputError
from nvs_common.types import Cameras

SOURCE = objects.Objects(seed=5, num_scenes=6, height=24, width=24, num_views=4)


@pytest.fixture(scope="module")
def scenes():
    return [SOURCE[i] for i in range(4)]


def points_of(scene):
    """World points that the depth of all views shows."""
    depth = scene.depths(np.arange(4))
    uv = np.broadcast_to(cameras.pixel_grid(24, 24), (4, 24, 24, 2))
    return np.asarray(cameras.unproject(scene.cameras, uv, depth))[depth > 0]


def test_depth_lies_on_the_solid(scenes):
    for scene in scenes:
        points = points_of(scene)
        towards = points / np.linalg.norm(points, axis=-1, keepdims=True)
        assert len(points) > 100
        near = np.any([scene.inside(points + s * towards * 2e-3) for s in (-1, 0, 1)], axis=0)
        assert near.mean() > 0.9
        assert np.linalg.norm(points, axis=-1).max() < objects.RADIUS
        assert not scene.inside(2 * objects.RADIUS * towards).any()


def test_the_surface_is_that_of_the_union(scenes):
    for scene in scenes:
        points = scene.surface(400, np.random.default_rng(0))
        out = np.random.default_rng(1).normal(size=(64, 1, 3))
        out *= 1e-3 / np.linalg.norm(out, axis=-1, keepdims=True)
        inside = scene.inside(points + out)
        # Beside a point of the surface there is inside and outside.
        assert (inside.any(0) & ~inside.all(0)).mean() > 0.97


def test_every_solid_has_its_share_of_the_surface(scenes):
    for scene in scenes:
        solids, rng = scene.stage.solids, np.random.default_rng(2)
        every, of = objects._on_solids(solids, 40_000, rng)
        every = every[~(objects._in_solids(solids, every) & of).any(axis=-1)]
        points = scene.surface(10_000, np.random.default_rng(0))
        np.testing.assert_allclose(points.mean(axis=0), every.mean(axis=0), atol=0.02)
        np.testing.assert_allclose(points.std(axis=0), every.std(axis=0), atol=0.02)
        assert scene.surface(0, rng).shape == (0, 3)


@pytest.mark.parametrize("kind", [shapes.BOX, shapes.ELLIPSOID, shapes.CYLINDER])
def test_points_on_a_shape_are_uniform(kind):
    half, count = np.array([0.5, 0.2, 1.0]), 40_000
    points = objects._on_shape(kind, half, count, np.random.default_rng(0))
    # Through every patch of a closed surface as much goes in as out: the mean normal is zero, and
    # the mean of normal times position is the volume over the area (Gauss).
    scaled = points / half
    if kind == shapes.BOX:
        normal = np.where(np.abs(scaled) > 1 - 1e-9, np.sign(scaled), 0)
        volume = 8 * half.prod()
    elif kind == shapes.CYLINDER:
        cap = np.abs(scaled[:, 2]) > 1 - 1e-9
        side = np.stack([scaled[:, 0] / half[0], scaled[:, 1] / half[1], np.zeros(count)], -1)
        normal = np.where(cap[:, None], [0, 0, 1] * np.sign(scaled[:, 2:]), side)
        volume = 2 * np.pi * half.prod()
    else:
        normal, volume = scaled / half, 4 / 3 * np.pi * half.prod()
    normal = normal / np.linalg.norm(normal, axis=-1, keepdims=True)
    np.testing.assert_allclose(normal.mean(axis=0), 0, atol=0.02)
    flux = np.mean(np.sum(normal * points, axis=-1)) * objects._area(kind, half)
    np.testing.assert_allclose(flux, 3 * volume, rtol=0.03)


def test_masks_are_the_coverage_and_the_background_is_white(scenes):
    for scene in scenes:
        mask, image, depth = scene.masks([1])[0], scene.images([1])[0], scene.depths([1])[0]
        assert np.all(image[mask == 0] == 1) and set(np.unique(4 * mask)) <= {0, 1, 2, 3, 4}
        assert np.all(depth[mask == 1] > 0) and np.all(depth[mask == 0] == 0)
        assert 0.05 < mask.mean() < 0.6
        inner = image[mask == 1]
        assert inner.std() > 0.02 and inner.mean() < 0.95


def test_cameras_go_around_and_see_the_whole_object(scenes):
    for scene in scenes:
        cams: Cameras = scene.cameras
        centres = np.asarray(cams.world_from_cam)[:, :3, 3]
        np.testing.assert_allclose(np.linalg.norm(centres, axis=-1), objects.DISTANCE)
        np.testing.assert_allclose(centres[:, :2].mean(0), 0, atol=1e-9)
        for name in ("masks", "depths"):
            border = getattr(scene, name)(range(4))
            border[:, 1:-1, 1:-1] = 0
            assert not border.any()
        depth = scene.depths([0])[0]
        assert cams.near[0] < depth[depth > 0].min() and depth.max() < cams.far[0]


def test_objects_depend_on_seed_and_number_alone(scenes):
    again = pickle.loads(pickle.dumps(SOURCE))[2]
    np.testing.assert_array_equal(again.images([3]), scenes[2].images([3]))
    other = objects.Objects(6, 3, 24, 24, 4)[2]
    assert not np.array_equal(other.images([3]), scenes[2].images([3]))
    large = scenes[2].resized(48, 48)
    assert abs(large.masks([3]).mean() - scenes[2].masks([3]).mean()) < 0.01


def test_samples_have_masks_beside_depth():
    sampler = samples.Sampler(1, 2, "random", with_depth=True, with_mask=True)
    sampler.check(SOURCE)
    batch = samples.DrawSample(sources.Kept(SOURCE), sampler)(0, np.random.default_rng(0))
    assert batch.extras["mask"].shape == batch.extras["depth"].shape == (2, 24, 24)


@pytest.mark.parametrize(
    "options", [dict(num_scenes=0), dict(height=0), dict(elevation=(0, 90)), dict(seed=-1)]
)
def test_bad_options_are_named(options):
    with pytest.raises(InputError, match=f"objects: {next(iter(options))}"):
        objects.Objects(**options)
