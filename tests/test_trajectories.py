"""Camera paths: ends, what they look at, smoothness, and that they stay where cameras were."""

import json

import numpy as np
import pytest

from nvs_common import quaternions, trajectories
from nvs_common.errors import InputError
from nvs_common.types import Cameras


def _cameras(poses, size=(30, 40)):
    n, (height, width) = len(poses), size
    k = np.tile([35.0, 36.0, width / 2, height / 2], (n, 1))
    return Cameras(np.asarray(poses), k, np.full(n, 1.0), np.full(n, 9.0), height, width)


def _looking(centre, target, down=(0, 1, 0)):
    """The pose at a centre whose z axis points at a target, written apart from the library."""
    z = np.subtract(target, centre) / np.linalg.norm(np.subtract(target, centre))
    x = np.cross(down, z) / np.linalg.norm(np.cross(down, z))
    pose = np.eye(4)
    pose[:3] = np.stack([x, np.cross(z, x), z, centre], axis=-1)
    return pose


def _ring(angles, radius=4.0, target=(0, 0, 0), height=-1.0):
    centres = [
        np.add(target, (radius * np.cos(a), height, radius * np.sin(a)))
        for a in np.atleast_1d(angles)
    ]
    return _cameras([_looking(c, target) for c in centres])


def _grid(rows=4, columns=5):
    """Parallel cameras on a plane, all looking along z."""
    poses = np.tile(np.eye(4), (rows * columns, 1, 1))
    poses[:, 0, 3] = np.tile(np.linspace(-1, 1, columns), rows)
    poses[:, 1, 3] = np.repeat(np.linspace(-0.6, 0.6, rows), columns)
    return _cameras(poses)


def _axis_distance(cameras, point):
    """Distance [t] of a point from the optical axes, and its depth [t]."""
    offset = point - cameras.world_from_cam[:, :3, 3]
    depth = np.einsum("ti,ti->t", offset, cameras.world_from_cam[:, :3, 2])
    return np.linalg.norm(
        offset - depth[:, None] * cameras.world_from_cam[:, :3, 2], axis=-1
    ), depth


def _assert_rigid(cameras):
    rotations = cameras.world_from_cam[:, :3, :3]
    identity = np.broadcast_to(np.eye(3), rotations.shape)
    np.testing.assert_allclose(rotations @ np.swapaxes(rotations, 1, 2), identity, atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(rotations), 1, atol=1e-9)


CAPTURES = {
    "ring": _ring(np.arange(12) * np.pi / 6),
    "arc": _ring(np.linspace(0.2, 1.4, 9)),
    "grid": _grid(),
    "one": _grid(1, 1),
    "same": _cameras(np.tile(np.eye(4), (5, 1, 1))),
    "outward": _cameras([_looking((0, 0, 0), (np.cos(a), 0.1, np.sin(a))) for a in range(6)]),
}


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("path", [trajectories.orbit, trajectories.spiral])
def test_paths_are_rigid_finite_and_as_long_as_asked(path, capture):
    cameras = CAPTURES[capture]
    result = path(cameras, 13)
    assert result.world_from_cam.shape == (13, 4, 4) and result.intrinsics.shape == (13, 4)
    assert result.world_from_cam.dtype == np.float64
    assert (result.height, result.width) == (30, 40)
    _assert_rigid(result)
    np.testing.assert_array_equal(result.near, 1.0)
    np.testing.assert_array_equal(result.far, 9.0)


def test_orbit_of_a_ring_is_the_ring():
    target = np.array([1.0, 2.0, 3.0])
    cameras = _ring(np.arange(24) * np.pi / 12, target=target)
    path = trajectories.orbit(cameras, 48)
    distance, depth = _axis_distance(path, target)
    np.testing.assert_allclose(distance, 0, atol=1e-6)
    np.testing.assert_allclose(depth, np.hypot(4, 1), rtol=1e-6)
    offsets = path.world_from_cam[:, :3, 3] - target
    np.testing.assert_allclose(offsets[:, 1], -1, atol=1e-6)
    # Once around: 48 equal steps of 7.5 degrees.
    steps = np.linalg.norm(np.diff(offsets, axis=0, append=offsets[:1]), axis=-1)
    np.testing.assert_allclose(steps, 8 * np.sin(np.pi / 48), rtol=1e-6)


def test_orbit_of_an_arc_stays_on_the_arc_and_closes():
    path = trajectories.orbit(CAPTURES["arc"], 40)
    centres = path.world_from_cam[:, :3, 3]
    angles = np.arctan2(centres[:, 2], centres[:, 0])
    assert angles.min() >= 0.2 - 1e-6 and angles.max() <= 1.4 + 1e-6
    assert angles.max() - angles.min() > 1.1
    steps = np.linalg.norm(np.diff(centres, axis=0, append=centres[:1]), axis=-1)
    assert steps.max() < 0.5


def test_orbit_keeps_the_cameras_upright():
    for name in ("ring", "arc", "grid"):
        down = trajectories.orbit(CAPTURES[name], 9).world_from_cam[:, :3, 1]
        assert (down[:, 1] > 0.5).all()


def test_spiral_stays_within_the_cameras_and_looks_at_one_point():
    cameras = _grid()
    path = trajectories.spiral(cameras, 30)
    centres = path.world_from_cam[:, :3, 3]
    low, high = (f(cameras.world_from_cam[:, :3, 3], axis=0) for f in (np.min, np.max))
    assert (centres >= low - 1e-9).all() and (centres <= high + 1e-9).all()
    assert np.ptp(centres[:, 0]) > 0.5
    distance, _ = _axis_distance(path, np.array([*centres[:, :2].mean(axis=0), 1.8]))
    assert distance.max() < 0.15  # 1.8 is the harmonic mean of near 1 and far 9


def test_spiral_closes_on_itself():
    centres = trajectories.spiral(_grid(), 60).world_from_cam[:, :3, 3]
    steps = np.linalg.norm(np.diff(centres, axis=0, append=centres[:1]), axis=-1)
    assert steps[-1] < 1.5 * steps.mean()


@pytest.mark.parametrize("capture", ["ring", "arc", "grid", "same"])
def test_interpolate_begins_and_ends_at_cameras(capture):
    cameras = CAPTURES[capture]
    path = trajectories.interpolate(cameras, 17)
    np.testing.assert_allclose(path.world_from_cam[0], cameras.world_from_cam[0], atol=1e-9)
    np.testing.assert_allclose(path.world_from_cam[-1], cameras.world_from_cam[-1], atol=1e-9)
    _assert_rigid(path)


def test_interpolate_goes_through_every_camera():
    cameras = CAPTURES["arc"]
    path = trajectories.interpolate(cameras, 2001)
    difference = path.world_from_cam[:, None] - cameras.world_from_cam[None]
    assert np.abs(difference).max(axis=(-1, -2)).min(axis=0).max() < 5e-3


def test_interpolate_between_two_cameras_is_a_line_and_a_slerp():
    axis_turn = np.radians(50)
    second = np.eye(4)
    second[:3, 3] = (2, 0, 1)
    c, s = np.cos(axis_turn), np.sin(axis_turn)
    second[:3, :3] = [[c, 0, s], [0, 1, 0], [-s, 0, c]]
    cameras = _cameras([np.eye(4), second])
    cameras.intrinsics[1] *= 2
    path = trajectories.interpolate(cameras, 5)
    for frame, fraction in zip(path.world_from_cam, np.linspace(0, 1, 5), strict=True):
        c, s = np.cos(fraction * axis_turn), np.sin(fraction * axis_turn)
        np.testing.assert_allclose(frame[:3, :3], [[c, 0, s], [0, 1, 0], [-s, 0, c]], atol=1e-9)
        np.testing.assert_allclose(frame[:3, 3], fraction * second[:3, 3], atol=1e-9)
    np.testing.assert_allclose(path.intrinsics[2], 1.5 * cameras.intrinsics[0])


def test_interpolate_is_smooth_where_a_polyline_has_corners():
    poses = np.tile(np.eye(4), (5, 1, 1))
    poses[:, :3, 3] = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 1, 0), (2, 2, 0)]
    centres = trajectories.interpolate(_cameras(poses), 400).world_from_cam[:, :3, 3]
    steps = np.diff(centres, axis=0)
    turn = np.linalg.norm(np.diff(steps, axis=0), axis=-1) / np.linalg.norm(steps[1:], axis=-1)
    assert turn.max() < 0.1  # a corner of 90 degrees would be 1.4


def test_a_loop_returns_to_the_first_camera_without_repeating_it():
    cameras = CAPTURES["ring"]
    path = trajectories.interpolate(cameras, 48, loop=True).world_from_cam
    np.testing.assert_allclose(path[0], cameras.world_from_cam[0], atol=1e-9)
    steps = np.linalg.norm(np.diff(path[:, :3, 3], axis=0, append=path[:1, :3, 3]), axis=-1)
    assert steps.min() > 0.5 * steps.mean() and steps.max() < 1.5 * steps.mean()


def test_quaternions_and_rotations_are_inverse_at_every_angle():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(50, 4))
    q[:5, 0] = 0  # turns of 180 degrees
    q[5] = (1, 0, 0, 0)
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    r = quaternions.to_rotation(q)
    again = quaternions.from_rotation(r)
    np.testing.assert_allclose(np.abs(np.sum(q * again, axis=-1)), 1, atol=1e-9)
    np.testing.assert_allclose(quaternions.to_rotation(again), r, atol=1e-9)


def test_json_frames_give_poses_and_intrinsics(tmp_path):
    cameras = CAPTURES["ring"]
    poses = cameras.world_from_cam[:3]
    frames = [
        {"world_from_cam": poses[0].tolist()},
        {"w2c": np.linalg.inv(poses[1]).tolist(), "fx": 10, "fy": 11, "cx": 12, "cy": 13},
        {
            **{"world_from_cam": poses[2].tolist(), "w": 80, "h": 60},
            **{"fx": 20, "fy": 22, "cx": 24, "cy": 26},
        },
    ]
    for content in (frames, {"frames": frames}):
        file = tmp_path / "path.json"
        file.write_text(json.dumps(content))
        path = trajectories.from_json(file, cameras)
        np.testing.assert_allclose(path.world_from_cam, poses, atol=1e-12)
        np.testing.assert_allclose(path.intrinsics[0], cameras.intrinsics[0])
        np.testing.assert_allclose(path.intrinsics[1:], [[10, 11, 12, 13]] * 2)


_EYE = np.eye(4).tolist()


@pytest.mark.parametrize(
    "content,message",
    [
        ("[]", "expected a list of frames"),
        ("[3]", "frame 0 is 3"),
        ('[{"pose": 1}]', "frame 0 has neither"),
        (json.dumps([{"world_from_cam": _EYE}, {"w2c": [[1]]}]), "frame 1: w2c: expected 4 x 4"),
        (json.dumps([{"w2c": (np.eye(4) * 2).tolist()}]), "not a rotation"),
        (json.dumps([{"w2c": np.diag([-1.0, 1, 1, 1]).tolist()}]), "not a rotation"),
        (json.dumps([{"w2c": _EYE, "fx": 3}]), "frame 0: .*expected 4 finite"),
        (json.dumps([{"w2c": _EYE, "fx": -1, "fy": 1, "cx": 1, "cy": 1}]), "must be positive"),
        ("[{", "bad JSON"),
    ],
)
def test_bad_json_names_file_frame_and_reason(tmp_path, content, message):
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        trajectories.from_json(file, CAPTURES["ring"])
    assert "bad.json" in str(caught.value)


def test_paths_without_frames_or_cameras_are_refused():
    for path in (trajectories.orbit, trajectories.spiral, trajectories.interpolate):
        with pytest.raises(InputError, match="frames=0"):
            path(CAPTURES["ring"], 0)
    with pytest.raises(InputError, match="1 camera"):
        trajectories.interpolate(CAPTURES["one"], 5)
