"""Baselines on scenes made of textured planes, rendered exactly by ray casting in NumPy."""

import jax
import numpy as np
import pytest

from nvs_common import baselines, metrics, photoconsistency
from nvs_common.types import Cameras, Views

SIZE = (32, 40)
NEAR, FAR = 1.0, 8.0


def _cameras(offsets, size=SIZE):
    """Cameras without rotation at (x, y, 0)."""
    n, (height, width) = len(offsets), size
    world_from_cam = np.tile(np.eye(4, dtype=np.float32), (n, 1, 1))
    world_from_cam[:, :2, 3] = offsets
    intrinsics = np.tile(np.float32([width, width, width / 2, height / 2]), (n, 1))
    near, far = np.full(n, NEAR, np.float32), np.full(n, FAR, np.float32)
    return Cameras(world_from_cam, intrinsics, near, far, height, width)


def _texture(x, y, phase):
    """A smooth colour pattern on a plane, [...] -> [..., 3]."""
    channels = [
        0.5 + 0.2 * np.sin(5 * x + 2 * k + phase) + 0.2 * np.sin(7 * y - 3 * x + k * phase)
        for k in range(3)
    ]
    return np.stack(channels, axis=-1)


def _render(cameras, depths):
    """Images of fronto-parallel planes; a nearer plane covers only x < 0."""
    images = []
    for pose, (fx, fy, cx, cy) in zip(cameras.world_from_cam, cameras.intrinsics, strict=True):
        u, v = np.meshgrid(np.arange(cameras.width) + 0.5, np.arange(cameras.height) + 0.5)
        image = np.zeros((cameras.height, cameras.width, 3))
        for order, depth in enumerate(sorted(depths, reverse=True)):
            x = (u - cx) / fx * depth + pose[0, 3]
            y = (v - cy) / fy * depth + pose[1, 3]
            seen = (x < 0) if order > 0 else np.ones_like(x, bool)
            image = np.where(seen[..., None], _texture(x, y, order * 2.0), image)
        images.append(image)
    return np.stack(images).astype(np.float32)


def _scene(depths, size=SIZE):
    """Context views around a target at the origin, and the target with its image."""
    grid = [(x, y) for x in (-0.3, 0.1, 0.3) for y in (-0.2, 0.2)]
    cameras = _cameras([*grid, (0.0, 0.0)], size)
    images = _render(cameras, depths)
    return Views(images[:-1], cameras[:-1]), cameras[-1], images[-1]


@pytest.fixture(scope="module")
def two_planes():
    return _scene([2.0, 6.0])


def test_nearest_view_is_an_input_untouched(two_planes):
    context, target, _ = two_planes
    image = baselines.nearest_view(context, target)
    np.testing.assert_array_equal(image, context.images[2])  # the one at (0.1, -0.2)


def test_planes_are_uniform_in_disparity_between_near_and_far(two_planes):
    depths = np.asarray(baselines.disparity_planes(two_planes[1], 64))
    assert depths[0] == pytest.approx(FAR) and depths[-1] == pytest.approx(NEAR)
    np.testing.assert_allclose(np.diff(1 / depths), (1 / NEAR - 1 / FAR) / 63, rtol=1e-3)


def test_single_plane_explains_a_plane():
    # A depth that is one of the 64, so that what remains is bilinear interpolation.
    disparity = 1 / FAR + 20 / 63 * (1 / NEAR - 1 / FAR)
    context, target, truth = _scene([1 / disparity])
    score = metrics.psnr(baselines.single_plane(context, target, truth), truth)
    assert score > 35


def test_single_plane_is_the_best_of_all_planes(two_planes):
    context, target, truth = two_planes
    chosen = metrics.psnr(baselines.single_plane(context, target, truth), truth)
    narrow = target.replace(near=np.float32(2.0), far=np.float32(2.0001))
    fixed = metrics.psnr(baselines.single_plane(context, narrow, truth), truth)
    assert chosen >= fixed - 0.1


def test_plane_sweep_beats_the_other_baselines_on_two_planes():
    context, target, truth = _scene([2.0, 6.0], (48, 64))
    sweep = metrics.psnr(baselines.plane_sweep(context, target), truth)
    assert sweep > metrics.psnr(baselines.nearest_view(context, target), truth) + 5
    assert sweep > metrics.psnr(baselines.single_plane(context, target, truth), truth) + 1


def test_plane_sweep_does_not_depend_on_the_order_of_views(two_planes):
    context, target, _ = two_planes
    order = np.array([4, 2, 0, 5, 1, 3])
    shuffled = Views(context.images[order], context.cameras[order])
    a, b = (baselines.plane_sweep(c, target) for c in (context, shuffled))
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_plane_sweep_of_an_input_camera_is_nearly_that_image(two_planes):
    context, _, _ = two_planes
    image = baselines.plane_sweep(context, context.cameras[0])
    assert np.isfinite(image).all()
    assert metrics.psnr(image, context.images[0]) > 40


def test_one_view_and_unseen_planes_give_finite_images(two_planes):
    context, target, truth = two_planes
    turned = np.diag(np.float32([-1, 1, -1, 1]))  # looks away from every input's field of view
    away = target.replace(world_from_cam=turned)
    alone = Views(context.images[:1], context.cameras[:1])
    for views in (context, alone):
        for camera in (target, away):
            for image in (
                baselines.plane_sweep(views, camera),
                baselines.single_plane(views, camera, truth),
            ):
                assert np.isfinite(image).all()
    # What no view sees continues the views' edges.
    unseen = np.asarray(baselines.plane_sweep(context, away))
    assert np.isfinite(unseen).all() and unseen.min() >= 0 and unseen.max() > 0


def test_box_is_the_mean_over_the_window_inside_the_image():
    x = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
    actual = jax.jit(lambda a: photoconsistency.box(a, 3))(x)
    for row in range(7):
        for column in range(5):
            window = x[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            expected = window.mean(axis=(1, 2))
            np.testing.assert_allclose(actual[:, row, column], expected, rtol=2e-5, atol=1e-6)
