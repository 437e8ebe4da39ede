"""Arrays of foreign checkpoints (.pt, .pth, .ckpt, .safetensors, .npz), read without PyTorch.

A .pt file is a zip archive: a pickle that describes the tensors, and their bytes. Pickles are
programs; here they are interpreted by a small stack machine that knows plain values, containers
and the few names that tensors are described with (_REBUILD, _STORAGES). Nothing of a file is ever
imported, called or executed: a name that is not in those tables is an error.
"""

from __future__ import annotations

import math
import os
import pathlib
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from nvs_common.errors import InputError

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors", ".npz")

# Far above what checkpoints need, and small enough to be refused in seconds.
_MAX_PICKLE_BYTES = 2**26
_MAX_VALUES = 2**22
_MAX_DEPTH = 64

_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

# What the readers of zip archives, pickles and arrays raise for a file that is not whole.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OSError,
    OverflowError,
    RecursionError,
    NotImplementedError,
    MemoryError,
)


class _Name(NamedTuple):
    """A global of the pickle, never looked up: "module name"."""

    text: str


class _Storage(NamedTuple):
    """The bytes of one or several tensors: entry of the archive, type and number of elements."""

    entry: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """A view of a storage, in elements; read only if it is wanted."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_MARK = _Name("(mark)")


def read(
    path: str | os.PathLike[str], *, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Any]:
    """Reads the content of a file of weights.

    Args:
      path: a .pt, .pth or .ckpt that torch.save has written (zip format, PyTorch 1.6 or newer), a
        .safetensors or an .npz file.
      wanted: name of an array ("model/blocks.0.weight", levels separated by /) -> whether to
        read it; the others are left out.

    Returns:
      What was saved: nested dicts of arrays, and for .pt files lists and plain values as well.

    Raises:
      InputError: no such file, another format, a damaged file, or one that asks for code to be
        run.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a file of weights ({', '.join(SUFFIXES)}).")
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    readers |= dict.fromkeys(TORCH_SUFFIXES, _read_torch)
    if path.suffix not in readers:
        raise InputError(f"{path}: weights are read from {', '.join(SUFFIXES)} files.")
    try:
        return readers[path.suffix](path, wanted)
    except InputError:
        raise
    except _DAMAGE as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise InputError(
            f"{path}: not a whole {path.suffix} file ({reason}); get the file again."
        ) from e


def _read_npz(path: pathlib.Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("a single array, not an archive")
    with archive:
        return {name: archive[name] for name in archive.files if wanted(name)}


def _read_safetensors(path: pathlib.Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    # Imported where it is used: importing a model must not load file readers.
    import safetensors

    try:
        with safetensors.safe_open(path, "np") as file:
            names = [name for name in file.keys() if wanted(name)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as e:
        raise ValueError(str(e)) from e


def _read_torch(path: pathlib.Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path}: not a zip archive: cut short, or written by PyTorch before 1.6; get the file "
            "again, or load it with PyTorch and torch.save it anew."
        )
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise ValueError("two entries have the same name")
        # As PyTorch writes them: so no entry can unpack to more than the file's size.
        if any(entry.file_size != entry.compress_size for entry in entries.values()):
            raise ValueError("it holds compressed entries")
        pickles = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise InputError(f"{path}: an archive without one data.pkl: no file of torch.save.")
        root = pickles[0].partition("/")[0]
        order = f"{root}/byteorder"
        if order in entries and archive.read(order) != b"little":
            raise InputError(f"{path}: big-endian tensors; save the file on another machine.")
        if entries[pickles[0]].file_size > _MAX_PICKLE_BYTES:
            raise ValueError(f"its description exceeds {_MAX_PICKLE_BYTES} bytes")
        content = _Machine(str(path), root).run(archive.read(pickles[0]))
        if not isinstance(content, dict):
            raise InputError(f"{path}: holds no dictionary; expected a state_dict of weights.")
        return _Reader(archive, entries, wanted).resolve(content, "", 0)


class _Reader:
    """Replaces descriptions of tensors by arrays."""

    def __init__(
        self,
        archive: zipfile.ZipFile,
        entries: Mapping[str, zipfile.ZipInfo],
        wanted: Callable[[str], bool],
    ):
        self._archive, self._entries, self._wanted = archive, entries, wanted
        self._storages: dict[_Storage, np.ndarray] = {}
        self._visited = 0

    def resolve(self, value: Any, name: str, level: int) -> Any:
        """The value with arrays for tensors; unwanted ones are left out of their dict or list."""
        self._visited += 1
        # A pickle may contain itself, or refer to a list so often that it never ends.
        if level > _MAX_DEPTH or self._visited > _MAX_VALUES:
            raise ValueError("its description is nested too deeply or too large")
        if isinstance(value, _Tensor):
            return self._array(value, name)
        if isinstance(value, dict):
            below = {k: f"{name}/{k}" if name else str(k) for k in value}
            kept = {k: x for k, x in value.items() if self._keeps(x, below[k])}
            return {k: self.resolve(x, below[k], level + 1) for k, x in kept.items()}
        if isinstance(value, list | tuple) and not isinstance(value, _Name | _Storage):
            kept = [(f"{name}/{i}", x) for i, x in enumerate(value)]
            kept = [(below, x) for below, x in kept if self._keeps(x, below)]
            return type(value)([self.resolve(x, below, level + 1) for below, x in kept])
        if isinstance(value, _Name | _Storage):
            raise ValueError(f"{name} is no array but {value}")
        return value

    def _keeps(self, value: Any, name: str) -> bool:
        return not isinstance(value, _Tensor) or self._wanted(name)

    def _array(self, tensor: _Tensor, name: str) -> np.ndarray:
        storage, offset, shape, strides = tensor
        if len(shape) != len(strides) or min((offset, *shape, *strides)) < 0:
            raise ValueError(f"{name} has shape {shape}, strides {strides} and offset {offset}")
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if 0 not in shape and (last >= storage.size or math.prod(shape) > storage.size):
            raise ValueError(f"{name} {shape} reaches beyond its {storage.size} numbers")
        flat = self._storage(storage)
        if 0 in shape:
            return np.zeros(shape, flat.dtype)
        steps = [s * flat.itemsize for s in strides]
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps).copy()

    def _storage(self, storage: _Storage) -> np.ndarray:
        if storage not in self._storages:
            size = storage.size * storage.dtype.itemsize
            if storage.entry not in self._entries or self._entries[storage.entry].file_size != size:
                raise ValueError(f"{storage.entry} has not the {size} bytes that it should have")
            content = self._archive.read(storage.entry)
            self._storages[storage] = np.frombuffer(content, storage.dtype)
        return self._storages[storage]


def _tensor(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    numbers = (offset, *shape, *strides)
    if not all(type(x) is int for x in numbers):
        raise ValueError("a tensor whose shape is not made of whole numbers")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *_: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise ValueError("a parameter that is no tensor")
    return tensor


# The only names that a pickle may apply to arguments, and what that means here.
_REBUILD: Mapping[str, Callable[..., Any]] = {
    "collections OrderedDict": lambda pairs=(): dict(pairs),
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch Size": lambda sizes=(): tuple(sizes),
}


class _Machine:
    """Interprets the opcodes that torch.save writes, on a stack of plain values."""

    def __init__(self, file: str, root: str):
        self._file, self._root = file, root
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """The value that the pickle describes."""
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return self._pop()
            if opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name]())
            elif opcode.name in _LITERALS:
                self._stack.append(argument)
            elif opcode.name in _ACTIONS:
                _ACTIONS[opcode.name](self, argument)
            elif opcode.name not in ("PROTO", "FRAME"):
                self._refuse(f"the operation {opcode.name}")
        raise EOFError("its description does not end")

    def _refuse(self, what: str) -> None:
        raise InputError(
            f"{self._file}: refused: its pickle uses {what[:120]}, which weights do not need; it "
            "may want to run code. Load it where you trust it, and save the plain state_dict "
            "(torch.save or safetensors)."
        )

    def _pop(self) -> Any:
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _tuple(self, count: int) -> None:
        items = [self._stack.pop() for _ in range(count)]
        self._stack.append(tuple(items[::-1]))

    def _put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def _append(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("it appends to something that is no list")
        self._stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not dict or len(items) % 2:
            raise ValueError("it sets items of something that is no dict")
        self._stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _global(self, text: str) -> None:
        if text not in _REBUILD and text.removeprefix("torch ") not in _STORAGES:
            self._refuse(f"the name {text.replace(' ', '.')!r}")
        self._stack.append(_Name(text))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._global(f"{module} {name}")

    def _reduce(self) -> None:
        arguments, name = self._pop(), self._pop()
        if not isinstance(name, _Name) or name.text not in _REBUILD:
            self._refuse(f"a call of {name!r}")
        self._stack.append(_REBUILD[name.text](*arguments))

    def _build(self) -> None:
        # Attributes of a state_dict, its `_metadata`: versions of layers, which nothing needs.
        state = self._pop()
        if type(self._stack[-1]) is not dict or type(state) is not dict:
            self._refuse("attributes of an object")

    def _storage(self) -> None:
        kind, name, key, _, size = self._pop()
        dtype = _STORAGES.get(name.text.removeprefix("torch ")) if type(name) is _Name else None
        if kind != "storage" or dtype is None or type(size) is not int or size < 0:
            raise ValueError("it describes a storage of unknown type")
        self._stack.append(_Storage(f"{self._root}/data/{key}", dtype, size))


_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_LITERALS = frozenset(
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES "
    "SHORT_BINBYTES".split()
)
_ACTIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "POP": lambda m, _: m._stack.__delitem__(-1),
    "TUPLE": lambda m, _: m._stack.append(tuple(m._pop_to_mark())),
    "TUPLE1": lambda m, _: m._tuple(1),
    "TUPLE2": lambda m, _: m._tuple(2),
    "TUPLE3": lambda m, _: m._tuple(3),
    "BINPUT": lambda m, index: m._put(index),
    "LONG_BINPUT": lambda m, index: m._put(index),
    "MEMOIZE": lambda m, _: m._put(None),
    "BINGET": lambda m, index: m._stack.append(m._memo[index]),
    "LONG_BINGET": lambda m, index: m._stack.append(m._memo[index]),
    "APPEND": lambda m, _: m._append([m._pop()]),
    "APPENDS": lambda m, _: m._append(m._pop_to_mark()),
    "SETITEM": lambda m, _: m._set([m._pop(), m._pop()][::-1]),
    "SETITEMS": lambda m, _: m._set(m._pop_to_mark()),
    "GLOBAL": lambda m, text: m._global(text),
    "STACK_GLOBAL": lambda m, _: m._stack_global(),
    "REDUCE": lambda m, _: m._reduce(),
    "BUILD": lambda m, _: m._build(),
    "BINPERSID": lambda m, _: m._storage(),
}
