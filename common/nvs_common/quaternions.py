"""Rotations as unit quaternions (w, x, y, z): conversion and slerp. NumPy float64."""

from __future__ import annotations

import numpy as np


def from_rotation(rotations: np.ndarray) -> np.ndarray:
    """Unit quaternions [..., 4] (w, x, y, z) of rotations [..., 3, 3]."""
    r = rotations
    trace = np.trace(r, axis1=-2, axis2=-1)
    # The matrix whose largest eigenvector is the quaternion: safe at every angle.
    k = np.empty((*r.shape[:-2], 4, 4))
    k[..., 0, 0] = trace
    skew = np.stack(
        [r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]], -1
    )
    k[..., 0, 1:] = k[..., 1:, 0] = skew
    k[..., 1:, 1:] = r + np.swapaxes(r, -1, -2) - trace[..., None, None] * np.eye(3)
    return np.linalg.eigh(k)[1][..., -1]


def to_rotation(quaternions: np.ndarray) -> np.ndarray:
    """Rotations [..., 3, 3] of unit quaternions [..., 4] (w, x, y, z)."""
    w, x, y, z = np.moveaxis(quaternions, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def slerp(a: np.ndarray, b: np.ndarray, fraction: float) -> np.ndarray:
    """Along the shorter arc between unit quaternions [4]; fractions outside [0, 1] go on."""
    cosine = a @ b
    if cosine < 0:
        b, cosine = -b, -cosine
    angle = np.arctan2(np.linalg.norm(b - cosine * a), cosine)
    if angle < 1e-9:
        return a
    return (np.sin((1 - fraction) * angle) * a + np.sin(fraction * angle) * b) / np.sin(angle)


def continuous(quaternions: np.ndarray) -> np.ndarray:
    """The same rotations with signs such that neighbours are on the same side."""
    signs = np.sign(np.sum(quaternions[1:] * quaternions[:-1], axis=-1))
    signs = np.concatenate([[1.0], np.where(signs == 0, 1.0, signs)])
    return quaternions * np.cumprod(signs)[:, None]
