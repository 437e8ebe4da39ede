"""Writes files as torch.save does, opcode by opcode, for PyTorch is not installed here."""

from __future__ import annotations

import pathlib
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def save(path: pathlib.Path, value: Any, **changes: Any) -> pathlib.Path:
    """Writes a value of dicts, lists, plain values and arrays as a .pt file; see `write`."""
    storages: dict[str, bytes] = {}
    return write(path, program(value, storages), storages, **changes)


def write(
    path: pathlib.Path,
    pickled: bytes,
    storages: Mapping[str, bytes],
    *,
    root: str = "archive",
    compression: int = zipfile.ZIP_STORED,
    byteorder: bytes = b"little",
) -> pathlib.Path:
    """Writes the archive of a pickle and its storages."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", pickled)
        archive.writestr(f"{root}/byteorder", byteorder)
        for key, content in storages.items():
            archive.writestr(f"{root}/data/{key}", content)
        archive.writestr(f"{root}/version", b"3\n")
    return path


def program(value: Any, storages: dict[str, bytes]) -> bytes:
    """The whole pickle of a value; storages are added to the dictionary."""
    return b"\x80\x02" + _code(value, storages) + b"."


class Parameter:
    """An array that is saved as torch.nn.Parameter."""

    def __init__(self, array: np.ndarray):
        self.array = array


def _code(value: Any, storages: dict[str, bytes]) -> bytes:
    one = lambda x: _code(x, storages)  # noqa: E731
    if isinstance(value, Parameter):
        arguments = one(value.array) + b"\x88" + ORDERED_DICT
        return b"ctorch._utils\n_rebuild_parameter\n(" + arguments + b"tR"
    if isinstance(value, np.ndarray):
        return _tensor(value, storages)
    if isinstance(value, dict):
        items = b"".join(one(k) + one(x) for k, x in value.items())
        return ORDERED_DICT + b"(" + items + b"u"
    if isinstance(value, list | tuple):
        items = b"".join(map(one, value))
        return b"](" + items + b"e" if isinstance(value, list) else b"(" + items + b"t"
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    return b"J" + struct.pack("<i", value)


def _tensor(array: np.ndarray, storages: dict[str, bytes]) -> bytes:
    """A tensor that views a storage of its own; a transposed array keeps its strides."""
    base = array.copy(order="K")
    key = str(len(storages))
    storages[key] = base.tobytes(order="A")
    return tensor(key, array.dtype.name, array.size, 0, array.shape, base.strides, storages)


def tensor(
    key: str,
    dtype: str,
    size: int,
    offset: int,
    shape: tuple[int, ...],
    byte_strides: tuple[int, ...],
    storages: dict[str, bytes],
) -> bytes:
    """The code of a tensor that views `size` numbers of a storage."""
    kind = f"ctorch\n{STORAGES[dtype]}\n".encode()
    described = _code("storage", storages) + kind + _code(key, storages) + _code("cpu", storages)
    storage = b"(" + described + _code(size, storages) + b"tQ"
    item = 2 if dtype == ml_dtypes.bfloat16 else np.dtype(dtype).itemsize
    strides = tuple(step // item for step in byte_strides)
    view = _code(offset, storages) + _code(shape, storages) + _code(strides, storages)
    arguments = storage + view + b"\x89" + ORDERED_DICT
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
