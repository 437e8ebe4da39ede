"""Damaged or lying COLMAP models, arrays and tables are refused with the file and the reason."""

import io
import json
import os
import struct
import zipfile

import numpy as np
import pytest

from nvs_common.data import scene_files, scenes
from nvs_common.errors import InputError
from tests import scene_writers as writers
from tests.scene_writers import refused

FRAME = "102.png"


@pytest.fixture
def rig():
    return writers.make_rig(simple=True)


# ---- COLMAP.


@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
def test_colmap_binary_cut_short_anywhere(tmp_path, rig, name):
    writers.write_colmap_bin(rig, tmp_path)
    file = tmp_path / "sparse" / "0" / f"{name}.bin"
    data = file.read_bytes()
    for size in [0, 7, 8, 20, len(data) // 3, len(data) - 1]:
        file.write_bytes(data[:size])
        refused(tmp_path, str(file))


@pytest.mark.parametrize("count", [2**63, 2**64 - 1, 2**40])
@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
def test_colmap_binary_with_a_lying_count(tmp_path, rig, name, count):
    writers.write_colmap_bin(rig, tmp_path)
    file = tmp_path / "sparse" / "0" / f"{name}.bin"
    file.write_bytes(struct.pack("<Q", count) + file.read_bytes()[8:])
    refused(tmp_path, str(file), f"claims {count} records")


def test_colmap_binary_with_a_lying_inner_count(tmp_path, rig):
    writers.write_colmap_bin(rig, tmp_path)
    file = tmp_path / "sparse" / "0" / "images.bin"
    data = bytearray(file.read_bytes())
    where = 8 + 64 + len(rig.names[-1]) + 1
    data[where : where + 8] = struct.pack("<Q", 2**61)
    file.write_bytes(bytes(data))
    refused(tmp_path, str(file), f"claims {2**61} records")


@pytest.mark.parametrize("model", [7, 10, 99, -1])
def test_colmap_binary_with_an_unknown_model(tmp_path, rig, model):
    writers.write_colmap_bin(rig, tmp_path, model)
    refused(tmp_path, "cameras.bin", f"number {model}", "supported are")


def test_colmap_text_with_an_unknown_model(tmp_path, rig):
    writers.write_colmap_txt(rig, tmp_path, "FOV", [100, 8, 6, 0.5])
    refused(tmp_path, "cameras.txt", "line 2", "'FOV'", "supported are")


def test_colmap_with_a_wrong_number_of_parameters(tmp_path, rig):
    writers.write_colmap_txt(rig, tmp_path, "OPENCV", [100, 100, 8, 6])
    refused(tmp_path, "cameras.txt", "line 2", "4 parameters for OPENCV; expected 8")


@pytest.mark.parametrize(
    "file, old, new, reason",
    [
        ("images.txt", " 7 102.png", " 8 102.png", "uses camera 8"),
        ("images.txt", " 7 102.png", " 7 ../102.png", "leaves the scene"),
        ("images.txt", "6 0.", "6 7.", "quaternion"),
        ("images.txt", "6 ", "6 nan ", "not an image"),
        ("images.txt", "1.5 2.5 ", "1.5 ", "x, y, id"),
        ("cameras.txt", "16 12", "16 -12", "image size 16 x -12"),
        ("cameras.txt", "16 12", "sixteen 12", "not a camera"),
        ("points3D.txt", "12 ", "12 nan ", "NaN"),
        ("points3D.txt", "12 ", "twelve ", "not a point"),
    ],
)
def test_colmap_text_with_bad_values(tmp_path, rig, file, old, new, reason):
    writers.write_colmap_txt(rig, tmp_path)
    path = tmp_path / "sparse" / "0" / file
    assert old in path.read_text()
    if old.startswith("6 0."):  # the image whose rotation's first number is replaced
        lines = path.read_text().splitlines(keepends=True)
        lines[1] = " ".join([*lines[1].split()[:1], "7.5", *lines[1].split()[2:]]) + "\n"
        path.write_text("".join(lines))
    else:
        path.write_text(path.read_text().replace(old, new, 1))
    refused(tmp_path, file if file != "images.txt" or "leaves" not in reason else "102", reason)


# ---- Anything.

INSERTS = [
    b"null",
    b"-1",
    b"0",
    b"1e308",
    b"[]",
    b'""',
    b"true",
    b"9" * 30,
    b"nan",
    b"\n",
    b"\0",
    b"..",
]


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Up to three random changes: another byte, a gap, an insertion, an early end."""
    result = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        place, length = rng.integers(len(result) + 1), rng.integers(1, 30)
        kind = rng.integers(5)
        if kind == 0:
            result[place : place + 1] = bytes([rng.integers(256)])
        elif kind == 1:
            del result[place : place + length]
        elif kind == 2:
            result[place:place] = INSERTS[rng.integers(len(INSERTS))]
        elif kind == 3:
            result[place : place + length // 3] = INSERTS[rng.integers(len(INSERTS))]
        else:
            del result[place:]
    return bytes(result)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("layout", writers.WRITERS)
def test_random_damage_gives_a_good_scene_or_a_named_error(tmp_path, rig, layout):
    rng = np.random.default_rng(0)
    path = writers.WRITERS[layout](rig, tmp_path)
    files = sorted(f for f in tmp_path.rglob("*") if f.is_file() and f.name not in rig.names[1:])
    outcomes = set()
    for _ in range(40):
        file = files[rng.integers(len(files))]
        good = file.read_bytes()
        file.write_bytes(damaged(good, rng))
        try:
            scene = scenes.load_scene(path)
            assert np.isfinite(scene.images([0])).all()
            assert np.isfinite(scene.cameras.world_from_cam).all()
            assert np.isfinite(scene.cameras.intrinsics).all()
            assert np.all((0 < scene.cameras.near) & (scene.cameras.near < scene.cameras.far))
            outcomes.add("loaded")
        except InputError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            outcomes.add("refused")
        file.write_bytes(good)
    assert "refused" in outcomes
    assert len(scenes.load_scene(path)) == len(rig.names)  # nothing was changed for good


# ---- Arrays and tables.


@pytest.mark.parametrize("shape", [(4, 16), (17,), (4, 3, 5), (0, 17)])
def test_llff_array_of_another_shape(tmp_path, rig, shape):
    file = writers.write_llff(rig, tmp_path) / "poses_bounds.npy"
    np.save(file, np.ones(shape))
    refused(tmp_path, str(file))


def test_llff_with_another_number_of_images(tmp_path, rig):
    writers.write_llff(rig, tmp_path)
    (tmp_path / "images" / FRAME).unlink()
    refused(tmp_path, "poses_bounds.npy", "4 cameras but 3 images")


@pytest.mark.parametrize("near, far", [(0, 1), (-1, 2), (3, 2), (np.nan, 1), (1, np.inf)])
def test_llff_with_bad_bounds(tmp_path, rig, near, far):
    file = writers.write_llff(rig, tmp_path) / "poses_bounds.npy"
    rows = np.load(file)
    rows[2, 15:] = near, far
    np.save(file, rows)
    refused(tmp_path, "poses_bounds.npy", FRAME)


def test_arrays_of_objects_are_never_unpickled(tmp_path, rig):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    file = writers.write_llff(rig, tmp_path) / "poses_bounds.npy"
    np.save(file, np.array([Payload()], object), allow_pickle=True)
    refused(tmp_path, str(file), "object")
    assert not (tmp_path / "executed").exists()


def test_array_header_that_claims_terabytes(tmp_path, rig):
    file = writers.write_llff(rig, tmp_path) / "poses_bounds.npy"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (10**12, 17)}
    )
    file.write_bytes(header.getvalue() + b"\0" * 100)
    refused(tmp_path, str(file), "truncated")
    file.write_bytes(b"not an array")
    refused(tmp_path, str(file), "not a NumPy array")


def test_neus_archive_that_unpacks_to_too_much(tmp_path, rig, monkeypatch):
    file = writers.write_neus(rig, tmp_path) / "cameras_sphere.npz"
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big.npy", b"\0" * 2_000_000)
    monkeypatch.setattr(scene_files, "MAX_ARRAY_BYTES", 1_000_000)
    refused(tmp_path, str(file), "unpacks to")
    file.write_bytes(b"PK not a zip")
    refused(tmp_path, str(file), "not a readable .npz")


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda a: a.pop("scale_mat_2"), "scale_mat_2 is nothing"),
        (lambda a: a.update(world_mat_2=np.eye(3)), "(3, 3)"),
        (lambda a: a.update(world_mat_2=np.zeros((4, 4))), "singular"),
        (lambda a: a.update(world_mat_2=a["world_mat_2"] * np.nan), "singular or not finite"),
        (lambda a: a.update(world_mat_2=_skewed() @ a["world_mat_2"]), "skew"),
    ],
)
def test_neus_with_bad_matrices(tmp_path, rig, change, reason):
    file = writers.write_neus(rig, tmp_path) / "cameras_sphere.npz"
    arrays = dict(np.load(file))
    change(arrays)
    np.savez(file, **arrays)
    refused(tmp_path, str(file), FRAME, reason)


def _skewed() -> np.ndarray:
    matrix = np.eye(4)
    matrix[0, 1] = 0.3
    return matrix


@pytest.mark.parametrize(
    "old, new, reason",
    [
        ("\n102 ", "\n102 1 ", "line 4 holds 20 values"),
        ("\n102 ", "\n101 ", "appears twice"),
        ("\n102 ", "\n-102 ", "line 4"),
        ("\n102 1.1", "\n102 x", "line 4"),
        ("\n102 1.1", "\n102 nan", "frame '102'"),
        ("\n102 1.1", "\n102 0.0", "frame '102'"),
    ],
)
def test_realestate_with_bad_lines(tmp_path, rig, old, new, reason):
    file = writers.write_realestate(rig, tmp_path)
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    refused(file, str(file), reason)


def test_realestate_without_cameras_or_frames(tmp_path, rig):
    file = writers.write_realestate(rig, tmp_path)
    (tmp_path / "clip" / FRAME).unlink()
    refused(file, str(file), "'102'", "missing")
    file.write_text("https://example.invalid\n")
    refused(file, str(file), "empty")


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda c: c.clear(), "empty"),
        (lambda c: c[0].clear(), "empty"),
        (lambda c: c[0][1].update(focal_length=0), "not positive"),
        (lambda c: c[0][1].update(position=[1, 2]), "position"),
        (lambda c: c[0][1].update(relative_path="../a.png"), "leaves the scene"),
        (lambda c: c[0][1].pop("width"), "width"),
    ],
)
def test_spaces_with_bad_values(tmp_path, rig, change, reason):
    file = writers.write_spaces(rig, tmp_path) / "models.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    refused(tmp_path, str(file), reason)


@pytest.mark.parametrize(
    "old, new, reason",
    [
        ("vertex 2", "vertex 2000000000000", "claims 2000000000000 points"),
        ("vertex 2", "vertex 3", "2 of 3"),
        ("vertex 2", "vertex -2", "expected vertices"),
        ("ascii", "binary_big_endian", "binary_big_endian"),
        ("ascii", "binary_little_endian", "claims 2 points"),
        ("float x", "list uchar int x", "not a number"),
        ("float z", "float w", "x, y, z"),
        ("end_header", "end", "header does not end"),
        ("1 2 3", "1 2 x", "not a line of numbers"),
        ("1 2 3", "1 2 nan", "NaN"),
    ],
)
def test_bad_point_clouds(tmp_path, rig, old, new, reason):
    path = writers.write_transforms(rig, tmp_path, ply_file_path="points.ply")
    header = "ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\n"
    good = header + "property float z\nend_header\n1 2 3\n4 5 6    \n"
    (path / "points.ply").write_text(good)
    assert len(scenes.load_scene(path)) == 4
    assert old in good
    (path / "points.ply").write_text(good.replace(old, new))
    refused(path, "points.ply", reason)


def test_point_cloud_out_of_the_scene(tmp_path, rig):
    refused(writers.write_transforms(rig, tmp_path, ply_file_path="../p.ply"), "ply_file_path")
