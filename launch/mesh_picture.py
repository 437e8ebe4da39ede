"""Draws a mesh without a graphics card: each pixel shows the triangle nearest to the camera."""

from __future__ import annotations

import numpy as np

from vqnerf_jax.mesh import Mesh

_LIGHT = np.array([0.36, -0.48, 0.8])
# Directions from which the mesh is seen, x and y of the ground and up.
_SIDES = ((1, 1, 0.6), (-1, 1, 0.6), (-1, -1, 0.6), (0.01, 0, 1))


def four_sides(mesh: Mesh, size: int = 256) -> np.ndarray:
    """The mesh from three sides and from above: uint8 [size, 4 size, 3]."""
    return np.concatenate([draw(mesh, np.array(side, float), size) for side in _SIDES], axis=1)


def draw(mesh: Mesh, side: np.ndarray, size: int) -> np.ndarray:
    """An orthographic view of the whole mesh from a direction [3]: uint8 [size, size, 3].

    Points on the triangles, closer together than pixels, are drawn in the order of their depth.
    """
    back = side / np.linalg.norm(side)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    axes = np.stack([right, -np.cross(back, right), back])
    middle = (mesh.vertices.max(axis=0) + mesh.vertices.min(axis=0)) / 2
    reach = np.linalg.norm(mesh.vertices - middle, axis=-1).max()
    first, second, third = np.moveaxis(mesh.vertices[mesh.faces], 1, 0)
    normals = np.cross(second - first, third - first)
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
    # A lamp that stands still and one at the camera.
    shade = 0.2 + 0.5 * np.maximum(normals @ _LIGHT, 0) + 0.3 * np.maximum(normals @ back, 0)
    corners = ((mesh.vertices - middle) @ axes.T / reach)[mesh.faces]
    steps = max(2, int(np.ceil(np.abs(np.diff(corners, axis=1)).max() * size)) + 1)
    u, v = np.meshgrid(np.linspace(0, 1, steps), np.linspace(0, 1, steps))
    u, v = (x[u + v <= 1 + 1e-9][:, None, None] for x in (u, v))
    points = (
        corners[:, 0] + u * (corners[:, 1] - corners[:, 0]) + v * (corners[:, 2] - corners[:, 0])
    )
    points, shades = points.reshape(-1, 3), np.tile(shade, len(u))
    pixel = np.clip(((points[:, :2] + 1) / 2 * size).astype(int), 0, size - 1)
    image = np.ones((size, size))
    order = np.argsort(points[:, 2], kind="stable")
    image[pixel[order, 1], pixel[order, 0]] = shades[order]
    return np.repeat((255 * image).astype(np.uint8)[..., None], 3, axis=-1)
