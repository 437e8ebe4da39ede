"""Chamfer distances: known surfaces, DTU's protocol, files read back, bad input."""

import numpy as np
import pytest

from nvs_common.errors import InputError
from vqnerf_jax import chamfer, mesh

pytest.importorskip("scipy")
pytest.importorskip("skimage")


def ball(radius=0.5, center=(0.0, 0, 0)):
    return mesh.extract(lambda p: np.linalg.norm(p - np.array(center), axis=-1) - radius, 32)


def square(side=1.0, height=0.0):
    corners = np.array([[0, 0, height], [side, 0, height], [side, side, height], [0, side, height]])
    return mesh.Mesh(corners.astype(float), np.array([[0, 1, 2], [0, 2, 3]], np.int32))


def test_points_are_uniform_on_the_area():
    small_and_large = mesh.Mesh(
        np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 0, 0], [8, 0, 0], [5, 3, 0.0]]),
        np.array([[0, 1, 2], [3, 4, 5]], np.int32),
    )
    points = chamfer.sample_area(small_and_large, 20_000, np.random.default_rng(0))
    assert np.mean(points[:, 0] >= 5) == pytest.approx(0.9, abs=0.01)
    first = points[points[:, 0] < 5]
    np.testing.assert_allclose(first.mean(axis=0), [1 / 3, 1 / 3, 0], atol=0.02)
    assert (first[:, :2].sum(axis=-1) <= 1 + 1e-9).all()


def test_both_directions_of_two_spheres():
    rng = np.random.default_rng(0)
    inner, outer = (chamfer.sample_area(ball(r), 20_000, rng) for r in (0.5, 0.6))
    found = chamfer.chamfer(inner, outer)
    assert found.accuracy == pytest.approx(0.1, abs=0.004)
    assert found.completeness == pytest.approx(0.1, abs=0.004)
    # Half of the truth is missing: only the other direction notices.
    part = chamfer.chamfer(inner[inner[:, 0] > 0], inner)
    assert part.accuracy == 0 and part.completeness > 0.05
    assert part.mean == pytest.approx(part.completeness / 2)


def test_thinning_keeps_no_two_that_are_near():
    points = np.random.default_rng(0).uniform(size=(3000, 3))
    kept = chamfer.thin(points, 0.1)
    gaps = np.linalg.norm(kept[:, None] - kept[None], axis=-1) + np.eye(len(kept))
    assert gaps.min() > 0.1
    assert chamfer.distances(points, kept).max() <= 0.1


def observed(**changes):
    """A box of 40 mm whose lower half was seen, above a table at z = 0."""
    mask = np.zeros((5, 5, 5), bool)
    mask[:, :, :3] = True
    fields = dict(mask=mask, low=np.zeros(3), high=np.full(3, 40.0), resolution=10.0)
    return chamfer.Observed(**{**fields, "plane": np.array([0, 0, 1.0, 0.5]), **changes})


def test_dtu_counts_what_was_seen_within_20_mm_above_the_plane():
    rng = np.random.default_rng(0)
    truth = chamfer.sample_area(square(10.0, 5.0), 20_000, rng)
    up = np.eye(4)
    up[2, 3] = 6.0
    ours = mesh.moved(square(10.0), up)
    found = chamfer.dtu(ours, truth, observed(), rng)
    assert found.accuracy == pytest.approx(1.0, abs=0.02)
    assert found.completeness == pytest.approx(1.0, abs=0.02)
    # Below the plane and 20 mm away: neither counts.
    more = np.concatenate([truth, truth - [0, 0, 8.0], truth + [0, 0, 29.0]])
    assert chamfer.dtu(ours, more, observed(), rng).completeness == pytest.approx(1.0, abs=0.02)
    # Nothing of the mesh was seen.
    unseen = observed(mask=np.zeros((5, 5, 5), bool))
    with pytest.raises(InputError, match="0 points of the mesh lie in the observed volume"):
        chamfer.dtu(ours, truth, unseen, rng)
    # 26 mm above the truth.
    far = mesh.Mesh(ours.vertices + [0, 0, 25.0], ours.faces)
    everything = observed(mask=np.ones((5, 5, 5), bool))
    with pytest.raises(InputError, match="none within 20 mm of the others; is the mesh in the mil"):
        chamfer.dtu(far, truth, everything, rng)


def test_dtu_files_are_read(tmp_path):
    from scipy import io

    folder = tmp_path / "ObsMask"
    folder.mkdir()
    want = observed()
    box = np.stack([want.low, want.high])
    io.savemat(folder / "ObsMask24_10.mat", {"ObsMask": want.mask, "BB": box, "Res": 10.0})
    io.savemat(folder / "Plane24.mat", {"P": want.plane[:, None]})
    seen = chamfer.read_observed(tmp_path, 24)
    for got, wanted in zip(seen, want, strict=True):
        np.testing.assert_array_equal(got, wanted)
    io.savemat(folder / "Plane24.mat", {"Q": want.plane[:, None]})
    with pytest.raises(InputError, match="Plane24.mat: holds no P"):
        chamfer.read_observed(tmp_path, 24)
    with pytest.raises(InputError, match="ObsMask25_10.mat: cannot be read"):
        chamfer.read_observed(tmp_path, 25)


@pytest.mark.parametrize("suffix", mesh.SUFFIXES)
def test_files_give_the_mesh_back(tmp_path, suffix):
    pytest.importorskip("trimesh")
    found, path = ball(), tmp_path / f"a{suffix}"
    mesh.write(path, found)
    back = mesh.read(path)
    assert back.faces.shape == found.faces.shape
    np.testing.assert_allclose(back.vertices[back.faces], found.vertices[found.faces], atol=1e-6)
    path.write_bytes(b"ply\nformat nothing 1.0\nend_header\n")
    with pytest.raises(InputError):
        mesh.read(path)


def test_points_alone_are_no_mesh(tmp_path):
    pytest.importorskip("trimesh")
    mesh.write(tmp_path / "a.ply", mesh.Mesh(np.eye(3), np.zeros((0, 3), np.int32)))
    with pytest.raises(mesh.NoTriangles, match="holds no triangles"):
        mesh.read(tmp_path / "a.ply")
