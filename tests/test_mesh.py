"""Meshes of signed distances: position, closedness across blocks, files, bad input."""

import collections

import numpy as np
import pytest

from nvs_common import errors
from vqnerf_jax import mesh

pytest.importorskip("skimage")
CENTER = np.array([0.1, -0.05, 0.02])


def sphere(points):
    return np.linalg.norm(points - CENTER, axis=-1) - 0.5


def edges(faces):
    return collections.Counter((int(f[i]), int(f[i - 1])) for f in faces for i in range(3))


@pytest.mark.parametrize("block", [8, 5, 64])
def test_the_surface_is_where_the_distance_is_zero_and_closed_across_blocks(block):
    found = mesh.extract(sphere, 24, block=block)
    radii = np.linalg.norm(found.vertices - CENTER, axis=-1)
    np.testing.assert_allclose(radii, 0.5, atol=0.006)
    # Every edge has one triangle to each side, which run along it in opposite directions.
    seen = edges(found.faces)
    assert all(seen[b, a] == 1 for a, b in seen) and max(seen.values()) == 1
    corners = found.vertices[found.faces]
    volume = np.einsum("fi,fi->f", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6
    assert volume == pytest.approx(4 / 3 * np.pi * 0.125, rel=0.03)  # positive: seen from outside


def test_the_mesh_does_not_depend_on_the_blocks():
    one, many = mesh.extract(sphere, 20), mesh.extract(sphere, 20, block=7)
    assert len(one.vertices) == len(many.vertices) and len(one.faces) == len(many.faces)
    order = [m.vertices[np.lexsort(np.round(m.vertices, 4).T)] for m in (one, many)]
    np.testing.assert_allclose(*order, atol=1e-4)


def test_the_field_is_asked_for_one_plane_of_a_block_at_a_time():
    sizes = set()

    def watched(points):
        sizes.add(points.shape)
        return sphere(points)

    mesh.extract(watched, 20, block=8)
    assert sizes == {(81, 3)}


def test_world_units_come_back():
    found = mesh.extract(sphere, 16)
    moved = mesh.in_world(found, (10.0, 0, 0), 200.0)
    radii = np.linalg.norm(moved.vertices - (CENTER * 200 + [10, 0, 0]), axis=-1)
    np.testing.assert_allclose(radii, 100, atol=1.5)


def test_files_hold_the_mesh(tmp_path):
    found = mesh.extract(sphere, 8)
    mesh.write(tmp_path / "a.ply", found)
    content = (tmp_path / "a.ply").read_bytes()
    header, _, body = content.partition(b"end_header\n")
    assert f"element vertex {len(found.vertices)}\n".encode() in header
    split = 12 * len(found.vertices)
    vertices = np.frombuffer(body[:split], "<f4").reshape(-1, 3)
    np.testing.assert_allclose(vertices, found.vertices, rtol=1e-6)
    assert len(body) - split == 13 * len(found.faces)
    mesh.write(tmp_path / "a.obj", found)
    lines = (tmp_path / "a.obj").read_text().splitlines()
    assert lines[len(found.vertices)] == "f {} {} {}".format(*(found.faces[0] + 1))
    with pytest.raises(errors.InputError, match="written as .ply or .obj or .glb"):
        mesh.write(tmp_path / "a.stl", found)
    with pytest.raises(errors.InputError, match="cannot be written"):
        mesh.write(tmp_path / "a.obj" / "a.ply", found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.obj", "a.ply"]


def test_bad_fields_are_explained():
    for sdf, words in [
        (lambda p: sphere(p) + np.where(p[:, 0] > 0.9, np.nan, 0), "not finite in"),
        (lambda p: sphere(p) + 5, "no surface between"),
    ]:
        with pytest.raises(errors.InputError, match=words):
            mesh.extract(sdf, 8)
    with pytest.raises(errors.InputError, match="is empty"):
        mesh.extract(sphere, 8, low=(1, 1, 1), high=(1, 2, 2))
