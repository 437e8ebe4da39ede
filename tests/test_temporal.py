"""Flicker of a path: nothing where nothing changes, and what is hidden does not count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvs_common import cameras as geometry
from nvs_common import temporal
from nvs_common.types import Cameras

HEIGHT, WIDTH = 24, 36
NORMAL, OFFSET = np.array([0.2, -0.1, 1.0]), 4.0


def camera(x: float = 0.0, yaw: float = 0.0) -> Cameras:
    """At (x, 0, 0), turned by yaw about the vertical axis."""
    pose = np.eye(4, dtype=np.float32)
    pose[:3, :3] = [[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]]
    pose[0, 3] = x
    intrinsics = np.array([30, 30, WIDTH / 2, HEIGHT / 2], np.float32)
    return Cameras(pose, intrinsics, np.float32(1), np.float32(10), HEIGHT, WIDTH)


def plane(cam: Cameras) -> temporal.Frame:
    """A slanted plane with smooth waves, drawn exactly."""
    rays = geometry.camera_rays(jnp.asarray(cam.intrinsics), geometry.pixel_grid(HEIGHT, WIDTH))
    directions = np.asarray(rays) @ cam.world_from_cam[:3, :3].T
    depth = (OFFSET - NORMAL @ cam.world_from_cam[:3, 3]) / (directions @ NORMAL)
    points = cam.world_from_cam[:3, 3] + depth[..., None] * directions
    waves = [np.sin(k * points[..., i] + k) for k, i in ((2, 0), (1.5, 1), (1, 0))]
    image = 0.5 + 0.3 * np.stack(waves, axis=-1)
    return temporal.Frame(jnp.float32(image), jnp.float32(depth), cam)


def test_a_static_camera_and_picture_do_not_flicker():
    frame = plane(camera())
    found = temporal.flicker(frame, frame)
    # The outermost pixels lie on the border, to rounding.
    assert found.share > 0.8
    assert found.absolute < 1e-5 and found.decibels > 90


@pytest.mark.parametrize("yaw", [0.0, 0.05])
def test_a_plane_seen_by_a_moving_camera_does_not_flicker_up_to_resampling(yaw):
    before, frame = plane(camera()), plane(camera(0.3, yaw))
    found = temporal.flicker(before, frame)
    unwarped = temporal.compare(before.images, frame.images, jnp.ones((HEIGHT, WIDTH), bool))
    assert 0.6 < found.share < 1
    assert found.absolute < 2e-3 < 0.1 * unwarped.absolute


def test_flicker_is_measured_and_grows_with_its_size():
    before, frame = plane(camera()), plane(camera(0.1))
    sizes = [0.0, 0.01, 0.05]
    found = [
        temporal.flicker(before, dataclasses.replace(frame, images=frame.images + s)) for s in sizes
    ]
    for size, one in zip(sizes, found, strict=True):
        assert one.absolute == pytest.approx(size, abs=1e-3)
    assert found[0].decibels > found[1].decibels > found[2].decibels
    assert found[2].decibels == pytest.approx(-20 * np.log10(0.05), abs=0.3)


def test_pixels_that_the_frame_before_did_not_see_do_not_count():
    before, frame = plane(camera()), plane(camera())
    hidden = np.zeros((HEIGHT, WIDTH), bool)
    hidden[8:16, 10:20] = True
    # A near thing stood there in the frame before, of another colour.
    covered = temporal.Frame(
        jnp.where(hidden[..., None], 5.0, before.images),
        jnp.where(hidden, 1.0, before.depth),
        before.cameras,
    )
    _, same = temporal.warp(covered, frame)
    assert not np.any(np.asarray(same)[hidden])
    found = temporal.flicker(covered, frame)
    assert found.absolute < 1e-4 and found.share > 0.6


def test_points_behind_the_other_camera_and_outside_its_image_do_not_count():
    frame = plane(camera())
    for other in (camera(0.0, np.pi), camera(50.0)):
        found = temporal.flicker(dataclasses.replace(frame, cameras=other), frame)
        assert found.share == 0 and np.isnan(found.absolute)


def test_what_does_not_count_may_be_anything():
    before, frame = plane(camera()), plane(camera(0.3))
    _, same = temporal.warp(before, frame)
    images = jnp.where(same[..., None], frame.images, jnp.nan)
    found, clean = (
        temporal.flicker(before, frame.replace(images=x)) for x in (images, frame.images)
    )
    assert found.absolute == clean.absolute


def test_a_path_is_its_pairs():
    frames = [plane(camera(x)) for x in (0.0, 0.1, 0.25)]
    path = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(a) for a in x]), *frames)
    found = jax.jit(temporal.path_flicker)(path)
    assert found.absolute.shape == found.share.shape == (2,)
    for i in range(2):
        one = temporal.flicker(frames[i], frames[i + 1])
        np.testing.assert_allclose(found.absolute[i], one.absolute, rtol=1e-3)
