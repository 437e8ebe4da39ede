"""Camera geometry: conventions, inverses and what resizing and cropping must not change."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvs_common import cameras
from nvs_common.types import Cameras

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "lvsm_pose_normalization.npz"


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


def make_cameras(n: int = 3, height: int = 6, width: int = 8, seed: int = 0) -> Cameras:
    rng = np.random.default_rng(seed)
    pose = np.tile(np.eye(4, dtype=np.float32), (n, 1, 1))
    for i in range(n):
        pose[i, :3, :3] = random_rotation(rng)
        pose[i, :3, 3] = rng.normal(size=3)
    k = np.array([7.0, 9.0, 3.7, 3.3], np.float32) + rng.uniform(0, 0.5, (n, 4)).astype(np.float32)
    return Cameras(pose, k, np.ones(n, np.float32), np.full(n, 10, np.float32), height, width)


def test_projection_undoes_unprojection():
    cams = make_cameras()
    rng = np.random.default_rng(1)
    uv = rng.uniform(0, 8, (3, 5, 4, 2)).astype(np.float32)
    depth = rng.uniform(0.5, 4, (3, 5, 4)).astype(np.float32)
    back, z = cameras.project(cams, cameras.unproject(cams, uv, depth))
    np.testing.assert_allclose(back, uv, atol=2e-4)
    np.testing.assert_allclose(z, depth, rtol=1e-5)


def test_first_pixel_has_its_centre_at_one_half():
    cams = make_cameras(1)
    k = cams.intrinsics[0]
    _, directions = cameras.rays(cams)
    expected = np.array([(0.5 - k[2]) / k[0], (0.5 - k[3]) / k[1], 1.0])
    expected = cams.world_from_cam[0, :3, :3] @ (expected / np.linalg.norm(expected))
    np.testing.assert_allclose(directions[0, 0, 0], expected, atol=1e-6)


def test_rays_start_at_the_centre_and_are_unit_length():
    cams = make_cameras()
    origins, directions = cameras.rays(cams)
    assert origins.shape == directions.shape == (3, 6, 8, 3)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(origins[:, 2, 3], cams.world_from_cam[:, :3, 3], atol=0)


def test_plucker_coordinates_do_not_depend_on_the_point_on_the_ray():
    cams = make_cameras()
    origins, directions = cameras.rays(cams)
    moved = np.cross(origins + 2.5 * directions, directions)
    np.testing.assert_allclose(cameras.plucker(cams)[..., :3], moved, atol=1e-5)
    np.testing.assert_allclose(cameras.plucker(cams)[..., 3:], directions, atol=0)


def test_resize_moves_projections_with_the_image():
    cams = make_cameras()
    points = cameras.unproject(cams, np.full((3, 2), 2.0, np.float32), np.ones(3, np.float32))
    uv, _ = cameras.project(cameras.resize(cams, 3, 16), points)
    np.testing.assert_allclose(uv, np.tile([[4.0, 1.0]], (3, 1)), atol=1e-5)


def test_crop_shifts_projections():
    cams = make_cameras()
    points = cameras.unproject(cams, np.full((3, 2), 4.0, np.float32), np.ones(3, np.float32))
    cropped = cameras.crop(cams, top=1, left=2, height=4, width=5)
    uv, _ = cameras.project(cropped, points)
    np.testing.assert_allclose(uv, np.tile([[2.0, 3.0]], (3, 1)), atol=1e-5)
    assert (cropped.height, cropped.width) == (4, 5)


def test_gradient_is_finite_behind_the_camera():
    cams = make_cameras(1)

    def distance(points):
        uv, _ = cameras.project(cams, points)
        return jnp.sum(uv)

    behind = cams.world_from_cam[:, :3, 3] - cams.world_from_cam[:, :3, 2]
    on_plane = cams.world_from_cam[:, :3, 3] + 0 * behind
    for points in (behind, on_plane):
        assert np.all(np.isfinite(jax.grad(distance)(jnp.asarray(points))))


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_pose_normalization_matches_the_published_one(case):
    golden = np.load(GOLDEN)
    out = cameras.normalize_poses(jnp.asarray(golden[f"{case}_in"]))
    np.testing.assert_allclose(out, golden[f"{case}_out"], atol=2e-5)


def test_pose_normalization_ignores_where_the_world_is():
    cams = make_cameras(4)
    move = np.eye(4, dtype=np.float32)
    move[:3, :3], move[:3, 3] = random_rotation(np.random.default_rng(5)), [1, -2, 3]
    a = cameras.normalize_poses(jnp.asarray(cams.world_from_cam))
    b = cameras.normalize_poses(jnp.asarray(move @ cams.world_from_cam))
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert float(jnp.max(jnp.abs(a[:, :3, 3]))) == pytest.approx(1 / 1.35, abs=1e-5)


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1.0, np.pi - 1e-3, np.pi])
def test_interpolation_turns_at_constant_speed(angle):
    ends = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))
    c, s = np.cos(angle), np.sin(angle)
    ends[1, :2, :2] = [[c, -s], [s, c]]
    ends[1, :3, 3] = [2, 0, 0]
    out = cameras.interpolate(jnp.asarray(ends), jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(out[0], ends[0], atol=1e-6)
    np.testing.assert_allclose(out[2], ends[1], atol=1e-5)
    np.testing.assert_allclose(out[1, :3, 3], [1, 0, 0], atol=1e-6)
    half = np.arccos(np.clip((np.trace(out[1, :3, :3]) - 1) / 2, -1, 1))
    assert half == pytest.approx(angle / 2, abs=2e-3)
