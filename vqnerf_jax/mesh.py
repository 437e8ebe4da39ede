"""Surface meshes of signed distances: marching cubes in blocks, and files.

Memory does not grow with the resolution but for the mesh itself: a block of the grid exists at a
time, and blocks that share a plane of samples have the same vertices on it. Needs scikit-image
(`pip install viewsynth-jax[mesh]`); .glb files need trimesh too.
"""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from nvs_common import outputs
from nvs_common.errors import InputError

BLOCK = 64
SUFFIXES = (".ply", ".obj", ".glb")


class NoSurface(InputError):
    """A distance that has one sign everywhere."""


class NoTriangles(InputError):
    """A file that holds points, and no triangles."""


class Mesh(NamedTuple):
    """Triangles.

    Attributes:
      vertices: [n, 3] float64.
      faces: [m, 3] int32 rows of vertices; counter-clockwise as seen from outside.
    """

    vertices: np.ndarray
    faces: np.ndarray


def extract(
    sdf: Callable[[np.ndarray], np.ndarray],
    resolution: int,
    *,
    low: tuple[float, float, float] = (-1.01, -1.01, -1.01),
    high: tuple[float, float, float] = (1.01, 1.01, 1.01),
    block: int = BLOCK,
) -> Mesh:
    """The surface where a signed distance is zero.

    Args:
      sdf: points [n, 3] float32 -> distances [n], negative inside. It is always asked for the
        same number of points, so that it is compiled once.
      resolution: cells of the grid along each axis.
      low: corner of the box that is searched.
      high: the opposite one.
      block: cells of a block along each axis.

    Returns:
      The mesh in the frame of the points.

    Raises:
      InputError: a distance that is not finite, or no scikit-image.
      NoSurface: no surface in the box.
    """
    if resolution < 1 or block < 1:
        raise InputError(f"mesh: resolution={resolution} and block={block} must be at least 1.")
    corner = np.asarray(low, np.float64)
    step = (np.asarray(high, np.float64) - corner) / resolution
    if not (step > 0).all():
        raise InputError(f"mesh: the box from {low} to {high} is empty.")
    vertices, faces, count = [], [], 0
    for first in itertools.product(range(0, resolution, block), repeat=3):
        piece = _block(sdf, corner, step, first, resolution, block)
        if piece is not None:
            vertices.append(piece.vertices)
            faces.append(piece.faces + count)
            count += len(piece.vertices)
    if not count:
        raise NoSurface(
            f"mesh: no surface between {low} and {high}; the distance has one sign there. Train "
            "longer, or choose another box."
        )
    return _merged(np.concatenate(vertices), np.concatenate(faces), corner, step)


def in_world(mesh: Mesh, center: tuple[float, ...], radius: float) -> Mesh:
    """A mesh of the unit sphere's frame in world units, where the sphere has this centre and
    radius (NeuS: the last column and the first entry of scale_mat)."""
    return Mesh(mesh.vertices * radius + np.asarray(center, np.float64), mesh.faces)


def moved(mesh: Mesh, transform: np.ndarray) -> Mesh:
    """A mesh after a rotation, one scale and a translation [4, 4], such as NeuS's scale_mat."""
    return Mesh(mesh.vertices @ transform[:3, :3].T + transform[:3, 3], mesh.faces)


def read(path: str | os.PathLike[str]) -> Mesh:
    """Reads a mesh that `write` or another program wrote.

    Raises:
      InputError: another ending, a file that cannot be read, or no trimesh.
      NoTriangles: a file of points alone.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: meshes are read from {', '.join(SUFFIXES)}.")
    trimesh = _trimesh()
    try:
        found = trimesh.load(path, process=False, force="mesh")
    except Exception as e:  # its readers raise whatever the bytes make them raise
        raise InputError(f"{path}: cannot be read as a mesh ({e!r}).") from e
    if not isinstance(found, trimesh.Trimesh) or not len(found.faces):
        raise NoTriangles(f"{path}: holds no triangles.")
    mesh = Mesh(np.asarray(found.vertices, np.float64), np.asarray(found.faces, np.int32))
    if not np.isfinite(mesh.vertices).all():
        raise InputError(f"{path}: holds vertices with NaN or infinity.")
    return mesh


def write(path: str | os.PathLike[str], mesh: Mesh) -> None:
    """Writes a mesh, whole or not at all, in the format of the name's ending.

    Raises:
      InputError: another ending, or the file cannot be written.
    """
    path = outputs.check_file(path, SUFFIXES)
    content = {".ply": _ply, ".obj": _obj, ".glb": _glb}[path.suffix.lower()](mesh)
    with outputs.whole(path) as temporary:
        temporary.write_bytes(content)


def _block(
    sdf: Callable[[np.ndarray], np.ndarray],
    corner: np.ndarray,
    step: np.ndarray,
    first: tuple[int, ...],
    resolution: int,
    block: int,
) -> Mesh | None:
    """The surface within a block of cells, vertices in cells of the whole grid."""
    volume = np.empty((block + 1,) * 3, np.float32)
    axes = [
        (np.arange(block + 1) + start) * s + c
        for start, s, c in zip(first, step, corner, strict=True)
    ]
    # A plane of the block at a time, beyond the grid's end as well: the shape stays the same.
    for i, x in enumerate(axes[0]):
        grid = np.stack(np.meshgrid([x], axes[1], axes[2], indexing="ij"), axis=-1)
        volume[i] = np.asarray(sdf(grid.reshape(-1, 3).astype(np.float32))).reshape(volume[i].shape)
    ends = [min(block, resolution - start) + 1 for start in first]
    volume = volume[: ends[0], : ends[1], : ends[2]]
    if not np.isfinite(volume).all():
        raise InputError(
            f"mesh: the distance is not finite in {int((~np.isfinite(volume)).sum())} points near "
            f"{tuple(float(axis[0]) for axis in axes)}; training has diverged, take an earlier "
            "checkpoint."
        )
    if not (volume.min() < 0 < volume.max()):
        return None
    try:
        from skimage import measure
    except ImportError as e:
        raise InputError("meshes need scikit-image: pip install 'viewsynth-jax[mesh]'.") from e
    vertices, faces, _, _ = measure.marching_cubes(volume, 0.0, gradient_direction="descent")
    return Mesh(vertices + np.asarray(first), faces)


def _merged(vertices: np.ndarray, faces: np.ndarray, corner: np.ndarray, step: np.ndarray) -> Mesh:
    """One vertex where blocks meet; triangles that thereby lose their area are dropped."""
    keys = np.round(vertices * 1e4).astype(np.int64)
    _, index, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    faces = inverse.reshape(-1)[faces]
    a, b, c = faces.T
    faces = faces[(a != b) & (b != c) & (c != a)]
    return Mesh(vertices[index].astype(np.float64) * step + corner, faces.astype(np.int32))


def _ply(mesh: Mesh) -> bytes:
    header = (
        "ply\nformat binary_little_endian 1.0\n"
        f"element vertex {len(mesh.vertices)}\n"
        "property float x\nproperty float y\nproperty float z\n"
        f"element face {len(mesh.faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    rows = np.empty(len(mesh.faces), [("count", "u1"), ("index", "<i4", 3)])
    rows["count"], rows["index"] = 3, mesh.faces
    return header.encode() + mesh.vertices.astype("<f4").tobytes() + rows.tobytes()


def _obj(mesh: Mesh) -> bytes:
    def lines() -> Iterator[str]:
        for x, y, z in mesh.vertices:
            yield f"v {x:.7g} {y:.7g} {z:.7g}\n"
        for a, b, c in mesh.faces + 1:
            yield f"f {a} {b} {c}\n"

    return "".join(lines()).encode()


def _trimesh() -> Any:
    try:
        import trimesh
    except ImportError as e:
        raise InputError(
            "reading meshes and writing .glb need trimesh: pip install 'viewsynth-jax[mesh]'."
        ) from e
    return trimesh


def _glb(mesh: Mesh) -> bytes:
    trimesh = _trimesh()
    content = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).export(file_type="glb")
    assert isinstance(content, bytes)
    return content
