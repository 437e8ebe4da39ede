"""Agreement of views by depth; distances of surfaces and solids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import depth_costs
from nvs_common import cameras, consistency, reconstruction
from nvs_common.errors import InputError

SIZE = 24


def sphere():
    """Cameras [3] around a sphere, 45 degrees apart, and its depth [3, h, w], 0 beside it."""
    known = depth_costs.orbit(8, SIZE, SIZE)
    depth = jnp.where(known.mask, known.depth, 0.0)[0, :3]
    return known.cameras[0, :3], depth


def test_views_that_agree_have_nothing_between_them_and_a_change_of_one_is_found():
    cams, depth = sphere()
    same = jnp.full((3, SIZE, SIZE, 3), 0.5)
    found = consistency.cross_view(same, depth, cams)
    assert found.decibels > 99 and 0.2 < found.share < 0.8
    changed = same.at[1].add(0.1)
    found = consistency.cross_view(changed, depth, cams)
    # The middle view is in the pairs that have the most in common.
    assert 0.1**2 * 0.6 < found.squared < 0.1**2 * 0.95


def test_a_picture_on_the_surface_agrees_but_for_its_sampling():
    cams, depth = sphere()
    uv = jnp.broadcast_to(cameras.pixel_grid(SIZE, SIZE)[None], (3, SIZE, SIZE, 2))
    points = cameras.unproject(cams, uv, depth)
    painted = 0.5 + 0.4 * jnp.sin(4 * points)
    found = consistency.cross_view(painted, depth, cams)
    assert found.decibels > 35
    shifted = consistency.cross_view(jnp.roll(painted, 2, axis=2), depth, cams)
    assert shifted.decibels < 25


def test_background_does_not_count():
    cams, depth = sphere()
    images = jnp.where(
        depth[..., None] > 0, 0.5, jax.random.uniform(jax.random.key(0), (3, 1, 1, 3))
    )
    assert consistency.cross_view(images, depth, cams).decibels > 60
    mask = np.zeros(depth.shape)
    mask[0] = 1
    lone = consistency.cross_view(images, depth, cams, mask)
    assert lone.squared < 1e-6 or np.isnan(lone.squared)
    assert np.isnan(consistency.cross_view(images, depth, cams, 0 * mask).squared)


def test_maps_and_cameras_have_to_be_those_of_the_images():
    cams, depth = sphere()
    images = jnp.full((3, SIZE, SIZE, 3), 0.5)
    for args, name in (
        ((images, depth[:2], cams), "depth"),
        ((images, depth, cams[:2]), "cameras"),
        ((images, depth, cams, np.ones((3, SIZE, 2))), "mask"),
    ):
        with pytest.raises(InputError, match=f"'{name}': "):
            consistency.cross_view(*args)


def test_chamfer_distance_of_shifted_spheres():
    way = np.random.default_rng(0).normal(size=(4000, 3))
    sphere = way / np.linalg.norm(way, axis=-1, keepdims=True)
    larger = reconstruction.chamfer(1.1 * sphere, sphere)
    np.testing.assert_allclose([larger.accuracy, larger.completeness], 0.1, atol=0.01)
    half = sphere[sphere[:, 2] > 0]
    found = reconstruction.chamfer(half, sphere)
    # What is there is right; what is missing counts in one direction alone.
    assert found.accuracy == 0 and found.completeness > 0.2
    assert found.mean == found.completeness / 2


def test_thinned_clouds_have_one_point_a_cell():
    points = np.array([[0.01, 0.01, 0.01], [0.03, 0.01, 0.01], [0.95, 0.01, 0.01], [-0.01, 0, 0]])
    found = reconstruction.thinned(points, 0.1)
    np.testing.assert_allclose(np.sort(found[:, 0]), [-0.01, 0.02, 0.95])


def test_intersection_over_union_of_boxes():
    box = lambda shift: lambda p: np.all(np.abs(p - [shift, 0, 0]) < 0.25, axis=-1)  # noqa: E731
    found = reconstruction.volume_iou(box(0.0), box(0.125), half=0.5, resolution=32)
    np.testing.assert_allclose(found, 0.375 / 0.625, rtol=0.1)
    assert reconstruction.volume_iou(box(0.0), box(0.0), half=0.5) == 1


def test_clouds_and_solids_without_content_are_refused():
    with pytest.raises(InputError, match=r"points has shape \(0, 3\)"):
        reconstruction.chamfer(np.zeros((0, 3)), np.zeros((2, 3)))
    with pytest.raises(InputError, match="truth holds coordinates"):
        reconstruction.chamfer(np.zeros((2, 3)), np.full((2, 3), np.nan))
    nothing = lambda points: np.zeros(len(points), bool)  # noqa: E731
    with pytest.raises(InputError, match="neither solid"):
        reconstruction.volume_iou(nothing, nothing, half=0.5, resolution=4)
