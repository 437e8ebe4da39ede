"""Pickles of plain values and NumPy arrays, read without running anything that is in them.

Renders of objects are published with their cameras in such files. They are interpreted by the
machine of `torch_archive`, with the few names that NumPy writes in place of those of PyTorch.
"""

from __future__ import annotations

import math
import pathlib
from typing import Any

import numpy as np

from nvs_common import torch_archive
from nvs_common.errors import InputError

# Cameras of a thousand views take some 100 kB.
MAX_BYTES = 2**24


class _Dtype(torch_archive.Stateful):
    """A type of numbers in the making: its code such as "f8", then its byte order."""

    def __init__(self, code: Any, *_: Any):
        if type(code) is not str or len(code) > 4 or code[:1] not in "fiub":
            raise ValueError("it has an array of something else than numbers")
        self.dtype = np.dtype(code)

    def set_state(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "=", "|", ">"):
            raise ValueError("it has a type of numbers without a byte order")
        if state[1] != "|":
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(torch_archive.Stateful):
    """An array in the making."""

    def __init__(self) -> None:
        self.array = np.zeros(0)

    def set_state(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise ValueError("it has an array without a state")
        _, shape, dtype, fortran, content = state
        if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("it has an array without a shape")
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes | bytearray):
            raise ValueError("it has an array without numbers")
        if math.prod(shape) * dtype.dtype.itemsize != len(content):
            raise ValueError(f"it has an array of shape {shape} in {len(content)} bytes")
        flat = np.frombuffer(content, dtype.dtype)
        self.array = flat.reshape(shape, order="F" if fortran else "C").copy()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """What the newest kind of pickle has in place of an empty array and its state."""
    found = _Array()
    found.set_state((1, shape, dtype, order == "F", content))
    return found


def _scalar(dtype: Any, content: Any) -> float | int | bool:
    if not isinstance(dtype, _Dtype) or type(content) is not bytes:
        raise ValueError("it has a number without a type")
    if len(content) != dtype.dtype.itemsize:
        raise ValueError("it has a number of the wrong size")
    return np.frombuffer(content, dtype.dtype)[0].item()


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """Older pickles write bytes as a text."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError("it has bytes in another encoding than latin1")
    return text.encode("latin1")


_ARRAY = "numpy ndarray"
# NumPy 2 has moved them.
_MODULES = ("numpy.core", "numpy._core")


class _Machine(torch_archive.Machine):
    rebuild = {
        "numpy dtype": _Dtype,
        "_codecs encode": _encoded,
        **{f"{module}.multiarray _reconstruct": lambda *_: _Array() for module in _MODULES},
        **{f"{module}.multiarray scalar": _scalar for module in _MODULES},
        **{f"{module}.numeric _frombuffer": _from_buffer for module in _MODULES},
    }
    values = frozenset((_ARRAY,))


def read(path: pathlib.Path) -> Any:
    """What a pickle holds: None, numbers, texts, lists, tuples, dicts and arrays of these.

    Raises:
      InputError: no such file, too large, damaged, or it asks for anything but values and arrays.
    """
    with torch_archive.whole(path):
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"{path}: {size} bytes, more than the {MAX_BYTES} allowed.")
        return _finished(_Machine(str(path), "").run(path.read_bytes()), set())


def _finished(value: Any, above: set[int]) -> Any:
    """The value with arrays in place of their descriptions."""
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, torch_archive.Stateful | torch_archive.Name):
        raise ValueError("it holds a name that is no value")
    if isinstance(value, list | tuple | dict):
        # A pickle can describe a list that holds itself.
        if id(value) in above or len(above) > 20:
            raise ValueError("its values are nested too deeply")
        above = above | {id(value)}
        if isinstance(value, dict):
            return {key: _finished(item, above) for key, item in value.items()}
        return type(value)(_finished(item, above) for item in value)
    return value
