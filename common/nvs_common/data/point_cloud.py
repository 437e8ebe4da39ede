"""Reads the vertices of a .ply file, ASCII or binary little-endian."""

from __future__ import annotations

import pathlib

import numpy as np

from nvs_common.data import scene_files
from nvs_common.errors import InputError

_TYPES = {
    "char": "i1",
    "uchar": "u1",
    "short": "<i2",
    "ushort": "<u2",
    "int": "<i4",
    "uint": "<u4",
    "float": "<f4",
    "double": "<f8",
    "int8": "i1",
    "uint8": "u1",
    "int16": "<i2",
    "uint16": "<u2",
    "int32": "<i4",
    "uint32": "<u4",
    "float32": "<f4",
    "float64": "<f8",
}
MAX_HEADER_BYTES = 64 * 2**10


def read_ply(path: pathlib.Path) -> np.ndarray:
    """Vertex positions [p, 3] float64; vertices must be the file's first element.

    Raises:
      InputError: another format, a count that the file cannot hold, or values that are no
        finite numbers.
    """
    data = scene_files.read_bytes(path, scene_files.MAX_ARRAY_BYTES)
    end = data.find(b"end_header\n", 0, MAX_HEADER_BYTES)
    if not data.startswith(b"ply") or end < 0:
        raise InputError(f"{path}: not a .ply file (its header does not end).")
    layout, count, dtype = _header(path, data[:end].decode("ascii", "replace"))
    names = list(dtype.names or ())
    body = data[end + len(b"end_header\n") :]
    # A line of ASCII has at least one character and a separator for each value.
    least = dtype.itemsize if layout == "binary_little_endian" else 2 * len(names) - 1
    if count * least > len(body):
        raise InputError(f"{path}: claims {count} points, more than its {len(body)} bytes hold.")
    if layout == "binary_little_endian":
        rows = np.frombuffer(body, dtype, count)
        points = np.stack([rows[axis].astype(np.float64) for axis in "xyz"], axis=-1)
    else:
        points = _ascii(path, body, count, [names.index(axis) for axis in "xyz"])
    if not np.all(np.isfinite(points)):
        raise InputError(f"{path}: holds points with NaN or infinity.")
    return points


def _header(path: pathlib.Path, text: str) -> tuple[str, int, np.dtype]:
    """Format, number of vertices and their fields."""
    layout, count, fields, elements = "", -1, [], 0
    for words in (line.split() for line in text.splitlines()):
        if words[:1] == ["format"] and len(words) == 3:
            layout = words[1]
        elif words[:1] == ["element"] and len(words) == 3:
            elements += 1
            if words[1] == "vertex" and elements == 1 and words[2].isdigit():
                count = int(words[2])
        elif words[:1] == ["property"] and elements == 1:
            if len(words) != 3 or words[1] not in _TYPES:
                raise InputError(f"{path}: vertex property {' '.join(words)!r} is not a number.")
            fields.append((words[2], _TYPES[words[1]]))
    names = [name for name, _ in fields]
    if layout not in ("ascii", "binary_little_endian"):
        raise InputError(f"{path}: format {layout!r}; expected ascii or binary_little_endian.")
    if count < 0 or len(set(names)) < len(names) or not {"x", "y", "z"} <= set(names):
        raise InputError(f"{path}: expected vertices with x, y, z as the first element.")
    return layout, count, np.dtype(fields)


def _ascii(path: pathlib.Path, body: bytes, count: int, columns: list[int]) -> np.ndarray:
    rows = [line.split() for line in body.split(b"\n", count)[:count]]
    whole = sum(len(row) > max(columns) for row in rows)
    if whole < count:
        raise InputError(f"{path}: {whole} of {count} points are whole; the file is damaged.")
    try:
        points = [[float(row[column]) for column in columns] for row in rows]
    except ValueError as error:
        raise InputError(f"{path}: a vertex is not a line of numbers ({error}).") from error
    return np.array(points, np.float64).reshape(-1, 3)
