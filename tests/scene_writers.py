"""Writes one set of posed images in every layout, each from that layout's own definition; and
holds loading a bad one to a good message."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nvs_common.data import scenes
from nvs_common.errors import InputError


@dataclasses.dataclass
class Rig:
    """World_from_cam [n, 4, 4], fx fy cx cy [4] of height x width, points [p, 3], images."""

    poses: np.ndarray
    intrinsics: np.ndarray
    height: int
    width: int
    points: np.ndarray
    images: np.ndarray

    @property
    def names(self) -> list[str]:
        # Names that are valid time stamps too, so that one set serves every layout.
        return [f"{100 + i}.png" for i in range(len(self.poses))]

    @property
    def world_to_cam(self) -> np.ndarray:
        return np.linalg.inv(self.poses)


def look_at(centre: np.ndarray, target: np.ndarray) -> np.ndarray:
    """World_from_cam [4, 4] with OpenCV axes; the world's up is -y."""
    forward = (target - centre) / np.linalg.norm(target - centre)
    right = np.cross([0.0, 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = centre
    return pose


def make_rig(
    seed: int = 0, count: int = 4, height: int = 12, width: int = 16, simple: bool = False
) -> Rig:
    """Cameras that look at a cloud of points in front of them; `simple` for LLFF's model."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count, 3)) * [1.0, 0.5, 0.3]
    poses = np.stack([look_at(c, rng.normal(size=3) * 0.2 + [0, 0, 5]) for c in centres])
    intrinsics = np.array([1.1 * width, 1.2 * width, 0.47 * width, 0.53 * height])
    if simple:
        intrinsics = np.array([1.1 * width, 1.1 * width, width / 2, height / 2])
    points = rng.normal(size=(40, 3)) * 0.8 + [0, 0, 5]
    images = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return Rig(poses, intrinsics, height, width, points, images)


def write_images(rig: Rig, folder: pathlib.Path, names: list[str] | None = None) -> None:
    for name, image in zip(names or rig.names, rig.images, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def write_transforms(rig: Rig, root: pathlib.Path, **extra) -> pathlib.Path:
    """nerfstudio; frames in reverse order, so that sorting is the loader's work."""
    write_images(rig, root / "images")
    opengl = rig.poses * np.array([1.0, -1, -1, 1])
    frames = [
        {"file_path": f"images/{name}", "transform_matrix": pose.tolist()}
        for name, pose in zip(rig.names, opengl, strict=True)
    ]
    keys = dict(zip(("fl_x", "fl_y", "cx", "cy"), rig.intrinsics.tolist(), strict=True))
    content = {"w": rig.width, "h": rig.height, **keys, "frames": frames[::-1], **extra}
    (root / "transforms.json").write_text(json.dumps(content))
    return root


def write_blender(rig: Rig, root: pathlib.Path) -> pathlib.Path:
    """NeRF-synthetic: three files, an angle for a focal length, no extension."""
    write_images(rig, root)
    angle = 2 * np.arctan(rig.width / (2 * rig.intrinsics[0]))
    opengl = rig.poses * np.array([1.0, -1, -1, 1])
    for k, split in enumerate(("train", "val", "test")):
        frames = [
            {"file_path": f"./{rig.names[i][:-4]}", "transform_matrix": opengl[i].tolist()}
            for i in range(k, len(rig.poses), 3)
        ]
        content = {"camera_angle_x": angle, "frames": frames}
        (root / f"transforms_{split}.json").write_text(json.dumps(content))
    return root


def write_opencv(rig: Rig, root: pathlib.Path, as_list: bool = False) -> pathlib.Path:
    write_images(rig, root / "images")
    keys = dict(zip(("fx", "fy", "cx", "cy"), rig.intrinsics.tolist(), strict=True))
    frames = [
        {"file_path": f"images/{n}", "w2c": m.tolist(), "h": rig.height, "w": rig.width, **keys}
        for n, m in zip(rig.names, rig.world_to_cam, strict=True)
    ]
    content = frames[::-1] if as_list else {"scene_name": "x", "frames": frames[::-1]}
    (root / "opencv_cameras.json").write_text(json.dumps(content))
    return root


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """w, x, y, z: the eigenvector of the largest eigenvalue of a symmetric matrix."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    k = np.array(
        [
            [a + e + i, h - f, c - g, d - b],
            [h - f, a - e - i, d + b, g + c],
            [c - g, d + b, e - a - i, h + f],
            [d - b, g + c, h + f, i - a - e],
        ]
    )
    return np.linalg.eigh(k)[1][:, -1]


def observations(rig: Rig) -> list[list[int]]:
    """For each image the indices of points it observes: all but every fifth."""
    return [[p for p in range(len(rig.points)) if (p + i) % 5] for i in range(len(rig.poses))]


def write_colmap_txt(
    rig: Rig, root: pathlib.Path, model: str = "PINHOLE", params=None, folder: str = "sparse/0"
) -> pathlib.Path:
    write_images(rig, root / "images")
    out = root / folder
    out.mkdir(parents=True, exist_ok=True)
    params = rig.intrinsics if params is None else params
    numbers = " ".join(repr(float(p)) for p in params)
    camera = f"7 {model} {rig.width} {rig.height} {numbers}\n"
    (out / "cameras.txt").write_text("# comment\n" + camera)
    lines = ["# comment\n"]
    for i in reversed(range(len(rig.poses))):
        pose = rig.world_to_cam[i]
        values = [*quaternion(pose[:3, :3]), *pose[:3, 3]]
        lines.append(f"{i + 3} {' '.join(repr(float(v)) for v in values)} 7 {rig.names[i]}\n")
        # The last image written has an empty line of observations.
        seen = observations(rig)[i] if i else []
        lines.append(" ".join(f"1.5 2.5 {p + 10}" for p in seen) + "\n")
    (out / "images.txt").write_text("".join(lines))
    rows = [
        f"{p + 10} {' '.join(repr(float(v)) for v in xyz)} 1 2 3 0.5 3 0\n"
        for p, xyz in enumerate(rig.points)
    ]
    (out / "points3D.txt").write_text("# comment\n" + "".join(rows))
    return root


def write_colmap_bin(
    rig: Rig, root: pathlib.Path, model: int = 1, params=None, seen: bool = True
) -> pathlib.Path:
    write_images(rig, root / "images")
    out = root / "sparse" / "0"
    out.mkdir(parents=True, exist_ok=True)
    params = [float(p) for p in (rig.intrinsics if params is None else params)]
    head = struct.pack("<QiiQQ", 1, 7, model, rig.width, rig.height)
    (out / "cameras.bin").write_bytes(head + struct.pack(f"<{len(params)}d", *params))
    data = struct.pack("<Q", len(rig.poses))
    for i in reversed(range(len(rig.poses))):
        pose = rig.world_to_cam[i]
        data += struct.pack("<i7di", i + 3, *quaternion(pose[:3, :3]), *pose[:3, 3], 7)
        ids = observations(rig)[i] if i and seen else []
        data += rig.names[i].encode() + b"\0" + struct.pack("<Q", len(ids))
        data += b"".join(struct.pack("<ddq", 1.5, 2.5, p + 10) for p in ids)
    (out / "images.bin").write_bytes(data)
    data = struct.pack("<Q", len(rig.points))
    for p, xyz in enumerate(rig.points):
        data += struct.pack("<q3d3BdQii", p + 10, *xyz, 1, 2, 3, 0.5, 1, 3, 0)
    (out / "points3D.bin").write_bytes(data)
    return root


def write_llff(rig: Rig, root: pathlib.Path) -> pathlib.Path:
    write_images(rig, root / "images")
    rows = []
    for pose in rig.poses:
        right, down, forward, centre = pose[:3].T
        size = np.array([rig.height, rig.width, rig.intrinsics[0]])
        rows.append([*np.stack([down, right, -forward, centre, size], 1).ravel(), 2.0, 9.0])
    np.save(root / "poses_bounds.npy", np.array(rows))
    return root


def write_neus(rig: Rig, root: pathlib.Path) -> pathlib.Path:
    """The world is twice as large and shifted; scale_mat leads from the unit sphere to it."""
    write_images(rig, root / "image")
    fx, fy, cx, cy = rig.intrinsics - [0, 0, 0.5, 0.5]  # integer pixel centres
    scale = np.diag([2.0, 2.0, 2.0, 1.0])
    scale[:3, 3] = 1, -2, 3
    arrays = {}
    for i, world_to_cam in enumerate(rig.world_to_cam):
        calibration = np.eye(4)
        calibration[:3, :3] = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]
        # Any common factor and sign of the projection is allowed.
        arrays[f"world_mat_{i}"] = -1.7 * calibration @ world_to_cam @ np.linalg.inv(scale)
        arrays[f"scale_mat_{i}"] = scale
    np.savez(root / "cameras_sphere.npz", **arrays)
    return root


def write_realestate(rig: Rig, root: pathlib.Path) -> pathlib.Path:
    write_images(rig, root / "clip")
    scale = np.array([rig.width, rig.height] * 2)
    lines = ["https://example.invalid/video"]
    for name, pose in zip(rig.names, rig.world_to_cam, strict=True):
        values = [*(rig.intrinsics / scale), 0, 0, *pose[:3].ravel()]
        lines.append(f"{name[:-4]} {' '.join(repr(float(v)) for v in values)}")
    (root / "clip.txt").write_text("\n".join(lines) + "\n")
    return root / "clip.txt"


def write_lvsm(rig: Rig, root: pathlib.Path, key: str = "clip") -> pathlib.Path:
    """LVSM's preprocessing: paths are those of the machine that it ran on."""
    write_images(rig, root / "images" / key)
    frames = [
        {
            "image_path": f"/elsewhere/train/images/{key}/{name}",
            "fxfycxcy": rig.intrinsics.tolist(),
            "w2c": pose.tolist(),
        }
        for name, pose in zip(rig.names, rig.world_to_cam, strict=True)
    ]
    path = root / "metadata" / f"{key}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"scene_name": key, "frames": frames}))
    with (root / "full_list.txt").open("a") as stream:
        stream.write(f"/elsewhere/train/metadata/{key}.json\n")
    return path


def packed_clip(rig: Rig, key: str) -> dict[str, Any]:
    """One clip of a chunk of pixelSplat's; images are JPEG files of full quality."""
    images = []
    for image in rig.images:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=100, subsampling=0)
        images.append(np.frombuffer(stream.getvalue(), np.uint8))
    scale = np.array([rig.width, rig.height] * 2)
    rows = [[*(rig.intrinsics / scale), 0, 0, *w[:3].ravel()] for w in rig.world_to_cam]
    return {
        "url": "https://example.invalid/video",
        "timestamps": np.arange(len(images)) * 33_000,
        "cameras": np.array(rows, np.float32),
        "images": images,
        "key": key,
    }


def write_spaces(rig: Rig, root: pathlib.Path) -> pathlib.Path:
    write_images(rig, root)
    fx, fy, cx, cy = rig.intrinsics
    cameras = []
    for name, pose in zip(rig.names, rig.poses, strict=True):
        w, *axis = quaternion(pose[:3, :3].T)
        sine = np.linalg.norm(axis)
        turn = np.array(axis) / sine * 2 * np.arctan2(sine, w)
        cameras.append(
            {
                "principal_point": [cx, cy],
                "pixel_aspect_ratio": fy / fx,
                "focal_length": fx,
                "position": pose[:3, 3].tolist(),
                "orientation": turn.tolist(),
                "width": float(rig.width),
                "height": float(rig.height),
                "relative_path": name,
            }
        )
    moved = [dict(camera, position=[0.0, 0.0, 1.0]) for camera in cameras]
    (root / "models.json").write_text(json.dumps([cameras[::-1], moved]))
    return root


WRITERS = {
    "transforms": write_transforms,
    "blender": write_blender,
    "opencv_dict": write_opencv,
    "opencv_list": lambda rig, root: write_opencv(rig, root, as_list=True),
    "colmap_txt": write_colmap_txt,
    "colmap_bin": write_colmap_bin,
    "llff": write_llff,
    "neus": write_neus,
    "realestate": write_realestate,
    "lvsm": write_lvsm,
    "spaces": write_spaces,
}
# One focal length and a centred principal point is all that these can say.
SIMPLE = ("blender", "llff")


def refused(path, *parts: str, **options) -> str:
    """Loads a scene that must be refused; every part must occur in its one-line message."""
    with pytest.raises(InputError) as caught:
        scene = scenes.load_scene(path, **options)
        scene.images(range(len(scene)))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message
