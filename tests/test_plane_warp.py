"""Warping by planes is projecting the plane's points and sampling bilinearly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvs_common import cameras as camera_lib
from nvs_common import plane_warp, sampling
from nvs_common.types import Cameras, Views

TARGET = Cameras(
    np.eye(4, dtype=np.float32), np.float32([11, 12, 6.2, 4.1]), np.float32(1), np.float32(9), 9, 13
)


def views(count, height, width, away=False):
    rng = np.random.default_rng(3)
    poses = np.tile(np.eye(4, dtype=np.float32), (count, 1, 1))
    for pose in poses:
        turn, _ = np.linalg.qr(np.eye(3) + 0.1 * rng.normal(size=(3, 3)))
        pose[:3, :3] = turn * np.sign(np.diag(turn))
        pose[:3, 3] = rng.normal(size=3) * [0.4, 0.4, 0.2]
    if away:
        poses[0, :3, :3] = np.diag([-1.0, 1.0, -1.0]) @ poses[0, :3, :3]
    intrinsics = np.tile(np.float32([width, width, width / 2, height / 2]), (count, 1))
    ends = np.ones(count, np.float32)
    images = rng.random((count, height, width, 3), np.float32)
    return Views(images, Cameras(poses, intrinsics, ends, 9 * ends, height, width))


def expected(context, depth):
    uv = camera_lib.pixel_grid(TARGET.height, TARGET.width)
    points = camera_lib.unproject(TARGET, uv, jnp.full(uv.shape[:-1], depth))
    for image, pose, k in zip(
        context.images, context.cameras.world_from_cam, context.cameras.intrinsics, strict=True
    ):
        own = Cameras(pose, k, np.float32(1), np.float32(9), *image.shape[:2])
        pixels, z = camera_lib.project(own, points)
        seen = sampling.inside(pixels, *image.shape[:2]) & (z > camera_lib.MIN_DEPTH)
        yield sampling.gather(jnp.asarray(image), pixels, border="edge"), seen


@pytest.mark.parametrize("size", [(9, 13), (5, 22), (1, 1)])
@pytest.mark.parametrize("depth", [0.9, 2.5, 30.0])
def test_planes_are_projected_and_sampled(size, depth):
    context = views(3, *size, away=True)
    colors, valid = plane_warp.warp(plane_warp.prepare(context, TARGET), jnp.float32(depth))
    assert not valid[0].any() and (size == (1, 1) or valid[1:].any())
    for view, (truth, seen) in enumerate(expected(context, depth)):
        np.testing.assert_array_equal(valid[view], seen)
        for channel in range(3):
            np.testing.assert_allclose(colors[channel][view], truth[..., channel], atol=2e-5)


def test_a_plane_without_a_depth_gives_no_colour():
    warps = plane_warp.prepare(views(2, 6, 7), TARGET)
    colors, valid = plane_warp.warp(warps, jnp.float32(np.nan))
    assert not valid.any() and np.isnan(colors[0]).all()


def test_scenes_and_targets_may_be_batched():
    scenes = [views(2, 6, 7), views(2, 7, 6)]
    for context in scenes:
        both = jax.tree.map(lambda x: jnp.stack([x, x]), context)
        many = jax.vmap(lambda c: plane_warp.warp(plane_warp.prepare(c, TARGET), 2.0))(both)
        one = plane_warp.warp(plane_warp.prepare(context, TARGET), jnp.float32(2))
        jax.tree.map(lambda m, o: np.testing.assert_allclose(m[1], o, atol=1e-6), many, one)
