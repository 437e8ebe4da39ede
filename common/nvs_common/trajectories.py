"""Camera paths through a captured scene: orbit, spiral, interpolation, or a JSON file.

NumPy float64. Paths take the cameras [n] of a scene and return cameras [t] of the same image
size, with the median intrinsics, near and far (rendering replaces near and far by those of each
frame's inputs). Orbit and spiral follow the cameras' own distances, so they stay inside the
region that was captured; view synthesis cannot see beyond it.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np

from nvs_common import quaternions
from nvs_common.data import scene_files, views
from nvs_common.errors import InputError
from nvs_common.types import Cameras

# A spiral follows this many cameras around the one in the middle of the capture.
NEIGHBOURS = 16
# A part of the cameras' spread (90th percentile) that a spiral reaches.
REACH = 0.7
# Cameras whose directions leave a gap below this angle go all the way round.
_FULL_CIRCLE_GAP = np.radians(120)


def spiral(cameras: Cameras, num_frames: int, *, turns: float = 2.0) -> Cameras:
    """A spiral around the middle of the capture that looks at one point; it closes on itself.

    The frame of reference is the average of the cameras nearest to the most central one; the
    path is an ellipse in its x, y with a slow wave in z, within 0.7 of those cameras' spread.
    It looks at the point in front of that average at the harmonic mean of near and far.

    Args:
      cameras: [n] of the scene.
      num_frames: t.
      turns: whole ellipses on the way.

    Raises:
      InputError: num_frames < 1.
    """
    _check(cameras, num_frames)
    local = _central(cameras)
    average = average_pose(np.asarray(local.world_from_cam, np.float64))
    target = average[:3, 3] + average[:3, 2] * focus_depth(local)
    offsets = (views.centers(local) - average[:3, 3]) @ average[:3, :3]
    radii = REACH * np.percentile(np.abs(offsets), 90, axis=0)
    phase = 2 * np.pi * np.arange(num_frames) / num_frames
    angle = turns * phase
    steps = np.stack([np.cos(angle), -np.sin(angle), -np.sin(phase * turns / 2)], axis=-1) * radii
    centres = average[:3, 3] + steps @ average[:3, :3].T
    return _cameras(cameras, _look_at(centres, target, average[:3, 1]))


def orbit(cameras: Cameras, num_frames: int) -> Cameras:
    """Around the point that the cameras look at, as far round as they went; closes on itself.

    Height and distance at each angle are the weighted mean of the cameras' at similar angles.
    Cameras all around give a full circle; otherwise the path swings to and fro over their arc.

    Args:
      cameras: [n] of the scene.
      num_frames: t.

    Raises:
      InputError: num_frames < 1.
    """
    _check(cameras, num_frames)
    target = look_at_point(cameras)
    if target is None:
        # They look past each other (or outwards): orbit what lies before the central ones.
        cameras = _central(cameras)
        average = average_pose(np.asarray(cameras.world_from_cam, np.float64))
        target = average[:3, 3] + average[:3, 2] * focus_depth(cameras)
    poses = np.asarray(cameras.world_from_cam, np.float64)
    down = _unit(poses[:, :3, 1].mean(axis=0), fallback=poses[0, :3, 1])
    # Cylinder coordinates about the vertical axis through the target.
    offsets = poses[:, :3, 3] - target
    height = offsets @ down
    flat = offsets - height[:, None] * down
    first = _unit(flat[np.argmax(np.linalg.norm(flat, axis=-1))], fallback=poses[0, :3, 0])
    second = np.cross(down, first)
    angle = np.arctan2(flat @ second, flat @ first)
    radius = np.linalg.norm(flat, axis=-1)
    path = _angles(angle, num_frames)
    difference = (path[:, None] - angle + np.pi) % (2 * np.pi) - np.pi
    # Wide enough to be smooth, and so that there is always a camera in reach.
    width = max(np.radians(10), 2 * np.pi / len(angle))
    weights = np.exp(-0.5 * (difference / width) ** 2) + 1e-12
    weights /= weights.sum(axis=1, keepdims=True)
    radius, height = weights @ radius, weights @ height
    around = np.cos(path)[:, None] * first + np.sin(path)[:, None] * second
    centres = target + radius[:, None] * around + height[:, None] * down
    return _cameras(cameras, _look_at(centres, target, down))


def interpolate(cameras: Cameras, num_frames: int, *, loop: bool = False) -> Cameras:
    """A smooth path through all cameras in their order.

    A Catmull-Rom curve built from linear interpolation of centres and intrinsics and spherical
    interpolation of rotations, at a steady pace (of translation and rotation together). Without
    `loop` the first and last frame are the first and last camera.

    Args:
      cameras: [n] of the scene, n >= 2.
      num_frames: t.
      loop: go on from the last camera to the first; the first is not repeated at the end.

    Raises:
      InputError: num_frames < 1 or fewer than two cameras.
    """
    _check(cameras, num_frames)
    poses = np.asarray(cameras.world_from_cam, np.float64)
    if len(poses) < 2:
        raise InputError("interpolate: the scene has 1 camera, but 2 or more are needed.")
    keys = np.concatenate([poses[:, :3, 3], np.asarray(cameras.intrinsics, np.float64)], axis=-1)
    turns = quaternions.from_rotation(poses[:, :3, :3])
    if loop:
        order = np.arange(-1, len(poses) + 2) % len(poses)
        keys, turns = keys[order], turns[order]
        place = np.arange(num_frames) / num_frames
    else:
        # Straight on before the first and after the last camera.
        keys = np.concatenate([2 * keys[:1] - keys[1:2], keys, 2 * keys[-1:] - keys[-2:-1]])
        ends = [quaternions.slerp(turns[a], turns[b], 2.0) for a, b in ((1, 0), (-2, -1))]
        turns = np.concatenate([ends[0][None], turns, ends[1][None]])
        place = np.arange(num_frames) / max(num_frames - 1, 1)
    turns = quaternions.continuous(turns)
    knots = _knots(keys[:, :3], turns)
    time = knots[1] + place * (knots[-2] - knots[1])
    segment = np.clip(np.searchsorted(knots, time, side="right") - 1, 1, len(knots) - 3)
    moments = list(zip(segment, time, strict=True))
    curve = np.stack([_catmull_rom(keys, knots, s, t, _lerp) for s, t in moments])
    turned = [_catmull_rom(turns, knots, s, t, quaternions.slerp) for s, t in moments]
    path = np.tile(np.eye(4), (num_frames, 1, 1))
    path[:, :3, :3] = quaternions.to_rotation(np.stack(turned))
    path[:, :3, 3] = curve[:, :3]
    return _cameras(cameras, path, curve[:, 3:])


def transitions(
    cameras: Cameras, num_frames: int, *, loop: bool = False, ordered: bool = False
) -> Cameras:
    """From each camera straight to the next: what LVSM's videos show between their inputs.

    Centres and intrinsics go along a line, rotations along the shorter arc, at a constant pace
    in each transition. Every transition holds the frames at both of its ends, so that the frame
    where two of them meet comes twice, as published.

    Args:
      cameras: [n] of the inputs, n >= 2.
      num_frames: of each transition, 2 or more.
      loop: go on from the last camera to the first.
      ordered: go from the first camera always to the nearest that was not visited yet.

    Returns:
      Cameras [(n - 1) * num_frames], with `loop` n * num_frames.

    Raises:
      InputError: fewer than two cameras or frames.
    """
    count = len(views.centers(cameras))
    if count < 2 or num_frames < 2:
        raise InputError(
            f"transitions: {count} cameras and {num_frames} frames a transition, but 2 or more "
            "of both are needed."
        )
    cameras = cameras[_greedy_order(views.centers(cameras))] if ordered else cameras
    order = np.append(np.arange(count), 0) if loop else np.arange(count)
    poses, intrinsics = (
        np.asarray(x, np.float64)[order] for x in (cameras.world_from_cam, cameras.intrinsics)
    )
    turns, fractions = quaternions.from_rotation(poses[:, :3, :3]), np.linspace(0, 1, num_frames)
    steps = [(k, fraction) for k in range(len(order) - 1) for fraction in fractions]
    path = np.tile(np.eye(4), (len(steps), 1, 1))
    turned = np.stack([quaternions.slerp(turns[k], turns[k + 1], f) for k, f in steps])
    path[:, :3, :3] = quaternions.to_rotation(turned)
    path[:, :3, 3] = [_lerp(poses[k, :3, 3], poses[k + 1, :3, 3], f) for k, f in steps]
    k_path = np.stack([_lerp(intrinsics[k], intrinsics[k + 1], f) for k, f in steps])
    return _cameras(cameras, path, k_path)


def from_json(path: str | os.PathLike[str], cameras: Cameras) -> Cameras:
    """A path from a JSON file: a list of frames, or an object with such a list under "frames".

    A frame holds "world_from_cam", a rigid 4x4 matrix in rows with OpenCV axes (x right, y down,
    z forward), or its inverse "w2c" (as in opencv_cameras.json), in the scene's world. Optional
    are "fx", "fy", "cx", "cy" in pixels (all four), of an image of "w" x "h" pixels if these are
    given, of the rendered size otherwise; without them the scene's median intrinsics are used.

    Args:
      path: the file.
      cameras: [n] of the scene.

    Returns:
      Cameras [t] in the order of the file.

    Raises:
      InputError: names the file, the frame and what is wrong.
    """
    path = pathlib.Path(path)
    frames = scene_files.read_json(path)
    frames = frames.get("frames") if isinstance(frames, dict) else frames
    if not isinstance(frames, list) or not frames:
        raise InputError(
            f"{path}: expected a list of frames, or an object with it under 'frames', that holds "
            "one or more frames."
        )
    median = np.median(np.asarray(cameras.intrinsics, np.float64), axis=0)
    poses, intrinsics = [], []
    for number, frame in enumerate(frames):
        where = f"{path}: frame {number}"
        if not isinstance(frame, dict):
            raise InputError(f"{where} is {frame!r:.50}; expected an object with world_from_cam.")
        poses.append(_frame_pose(frame, where))
        given = [key for key in ("fx", "fy", "cx", "cy") if key in frame]
        if not given:
            intrinsics.append(median)
            continue
        size = _numbers(
            [frame.get("w", cameras.width), frame.get("h", cameras.height)], (2,), f"{where}: w, h"
        )
        k = _numbers(
            [frame.get(key) for key in ("fx", "fy", "cx", "cy")], (4,), f"{where}: {given}"
        )
        if min(*size, *k[:2]) <= 0:
            raise InputError(f"{where}: fx, fy, w and h must be positive, found {k[:2]}, {size}.")
        scale = np.array([cameras.width, cameras.height]) / size
        intrinsics.append(k * np.tile(scale, 2))
    return _cameras(cameras, np.stack(poses), np.stack(intrinsics))


def average_pose(poses: np.ndarray) -> np.ndarray:
    """The average [4, 4] of poses [n, 4, 4]: mean centre, mean forward and down axes."""
    mean = poses.mean(axis=0)
    forward = _unit(mean[:3, 2], fallback=poses[0, :3, 2])
    return _look_at(mean[None, :3, 3], mean[:3, 3] + forward, mean[:3, 1])[0]


def focus_depth(cameras: Cameras) -> float:
    """Harmonic mean of the median near and far: the middle of the scene in disparity."""
    near, far = np.median(np.asarray(cameras.near)), np.median(np.asarray(cameras.far))
    return float(2.0 / (1.0 / near + 1.0 / far))


def look_at_point(cameras: Cameras) -> np.ndarray | None:
    """The point [3] nearest to all optical axes, or None if the cameras do not share one.

    They share one if it lies before nearly all cameras, at a depth between half the smallest
    near and the greatest far.
    """
    poses = np.asarray(cameras.world_from_cam, np.float64)
    centres, forward = poses[:, :3, 3], poses[:, :3, 2]
    # Distance to an axis is |(I - d d^T) (x - c)|: least squares, 3 x 3.
    across = np.eye(3) - forward[:, :, None] * forward[:, None, :]
    matrix, right = across.sum(axis=0), np.einsum("nij,nj->i", across, centres)
    # Nearly parallel axes cross anywhere.
    if np.linalg.eigvalsh(matrix)[0] < 1e-3 * len(poses):
        return None
    point = np.linalg.solve(matrix, right)
    depth = np.einsum("ni,ni->n", point - centres, forward)
    near, far = np.min(np.asarray(cameras.near)), np.max(np.asarray(cameras.far))
    before = (depth > 0.5 * near) & (depth < far)
    return point if before.mean() > 0.9 else None


def _check(cameras: Cameras, num_frames: int) -> None:
    if num_frames < 1:
        raise InputError(f"frames={num_frames}: a path has 1 frame or more.")
    if len(views.centers(cameras)) == 0:
        raise InputError("the scene has no cameras to lead a path through.")


def _greedy_order(centres: np.ndarray) -> np.ndarray:
    """Indices [n] from the first centre always to the nearest that is left."""
    order, left = [0], list(range(1, len(centres)))
    while left:
        distance = np.linalg.norm(centres[left] - centres[order[-1]], axis=-1)
        order.append(left.pop(int(np.argmin(distance))))
    return np.array(order)


def _frame_pose(frame: dict, where: str) -> np.ndarray:
    if "world_from_cam" in frame:
        key = "world_from_cam"
    elif "w2c" in frame:
        key = "w2c"
    else:
        raise InputError(f"{where} has neither world_from_cam nor w2c; it has {sorted(frame)}.")
    pose = _numbers(frame[key], (4, 4), f"{where}: {key}")
    turn = pose[:3, :3]
    rigid = np.allclose(turn @ turn.T, np.eye(3), atol=1e-3) and np.linalg.det(turn) > 0
    if not rigid or not np.allclose(pose[3], [0, 0, 0, 1], atol=1e-6):
        raise InputError(
            f"{where}: {key} is not a rotation and a translation with (0, 0, 0, 1) below; scaled "
            "or mirrored cameras cannot be rendered."
        )
    return pose if key == "world_from_cam" else np.linalg.inv(pose)


def _numbers(value: object, shape: tuple[int, ...], where: str) -> np.ndarray:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        array = np.array(np.nan)
    if array.shape != shape or not np.isfinite(array).all():
        size = " x ".join(str(n) for n in shape)
        raise InputError(f"{where}: expected {size} finite numbers, found {value!r:.60}.")
    return array


def _central(cameras: Cameras) -> Cameras:
    """The camera in the middle of the capture and its nearest, up to NEIGHBOURS in all."""
    centres = views.centers(cameras)
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    middle = np.argmin(distance.sum(axis=1))
    return cameras[np.argsort(distance[middle], kind="stable")[:NEIGHBOURS]]


def _angles(angle: np.ndarray, count: int) -> np.ndarray:
    """Angles [count] of an orbit over cameras at `angle` [n]: a circle, or to and fro."""
    ordered = np.sort(angle)
    gaps = np.diff(np.append(ordered, ordered[0] + 2 * np.pi))
    widest = int(np.argmax(gaps))
    phase = 2 * np.pi * np.arange(count) / count
    start = ordered[(widest + 1) % len(ordered)]
    if gaps[widest] < _FULL_CIRCLE_GAP:
        return start + phase
    arc = 2 * np.pi - gaps[widest]
    return start + arc * (0.5 - 0.5 * np.cos(phase))


def _look_at(centres: np.ndarray, target: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Poses [t, 4, 4] at centres [t, 3] whose optical axis goes through the target [3]."""
    poses = np.tile(np.eye(4), (len(centres), 1, 1))
    for pose, centre in zip(poses, centres, strict=True):
        forward = _unit(target - centre, fallback=np.array([0.0, 0.0, 1.0]))
        right = np.cross(down, forward)
        # Looking along the vertical: any horizontal will do.
        right = _unit(right, fallback=np.cross(np.roll(forward, 1), forward))
        pose[:3, 0], pose[:3, 1], pose[:3, 2] = right, np.cross(forward, right), forward
        pose[:3, 3] = centre
    return poses


def _cameras(cameras: Cameras, poses: np.ndarray, intrinsics: np.ndarray | None = None) -> Cameras:
    count = len(poses)
    if intrinsics is None:
        median = np.median(np.asarray(cameras.intrinsics, np.float64), axis=0)
        intrinsics = np.tile(median, (count, 1))
    near, far = (np.median(np.asarray(x, np.float64)) for x in (cameras.near, cameras.far))
    return Cameras(
        poses,
        intrinsics,
        np.full(count, near),
        np.full(count, far),
        height=cameras.height,
        width=cameras.width,
    )


def _unit(vector: np.ndarray, *, fallback: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vector)
    return vector / length if length > 1e-9 else fallback / np.linalg.norm(fallback)


def _lerp(a: np.ndarray, b: np.ndarray, fraction: float) -> np.ndarray:
    return a + fraction * (b - a)


def _knots(centres: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Times [n] at which a steady traveller passes keys: distance and angle, both to scale."""
    distance = np.linalg.norm(np.diff(centres, axis=0), axis=-1)
    cosine = np.abs(np.sum(turns[1:] * turns[:-1], axis=-1))
    angle = 2 * np.arccos(np.clip(cosine, 0.0, 1.0))
    steps = sum(x / x.mean() if x.mean() > 1e-9 else np.zeros_like(x) for x in (distance, angle))
    # Keys at one place still take a moment each: equal knots would divide by zero.
    return np.concatenate([[0.0], np.cumsum(np.maximum(steps, 1e-3))])


def _catmull_rom(keys: np.ndarray, knots: np.ndarray, segment: int, time: float, mix) -> np.ndarray:
    """The curve through keys at a time in [knots[segment], knots[segment + 1]].

    Barry and Goldman's pyramid of two-point interpolations (SIGGRAPH 1988), so that the same
    code serves vectors (`_lerp`) and quaternions (`slerp`).
    """
    k = knots[segment - 1 : segment + 3]
    level = list(keys[segment - 1 : segment + 3])
    for spans in (((0, 1), (1, 2), (2, 3)), ((0, 2), (1, 3)), ((1, 2),)):
        level = [
            mix(level[i], level[i + 1], (time - k[a]) / (k[b] - k[a]))
            for i, (a, b) in enumerate(spans)
        ]
    return level[0]
