"""What torch.save writes: a zip archive of a pickle and the bytes of tensors, read without PyTorch.

Pickles are programs; here they are interpreted by a small stack machine that knows plain values,
containers and the few names that tensors are described with (_REBUILD, _STORAGES). Nothing of a
file is ever imported, called or executed: a name that is not in those tables is an error.

Tensors come out as descriptions, `Tensor`; their bytes are read by those who want them.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from nvs_common.errors import InputError

# Far above what files of tensors need, and small enough to be refused in seconds.
_MAX_PICKLE_BYTES = 2**26
_MAX_NAME = 1024

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
    RuntimeError,  # of which NotImplementedError and RecursionError are kinds
    MemoryError,
)


class Name(NamedTuple):
    """A global of the pickle, never looked up: "module name"."""

    text: str


class Storage(NamedTuple):
    """The bytes of one or several tensors: entry of the archive, type and number of elements."""

    entry: str
    dtype: np.dtype
    size: int


class Tensor(NamedTuple):
    """A view of a storage, in elements; read only if it is wanted."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_MARK = Name("(mark)")


class Description(NamedTuple):
    """What a file holds, before any tensor is read.

    Attributes:
      content: what was saved, with a `Tensor` in place of every tensor.
      entries: the archive's entries by name, see `Storage.entry`.
    """

    content: Any
    entries: Mapping[str, zipfile.ZipInfo]


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[None]:
    """Turns what readers raise for a damaged file into one InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise InputError(
            f"{path}: not a whole {path.suffix} file ({reason}); get the file again."
        ) from e


def open_archive(path: pathlib.Path) -> zipfile.ZipFile:
    """The archive, to be closed by the caller.

    Raises:
      InputError: the file is no zip archive.
    """
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path}: not a zip archive: cut short, or written by PyTorch before 1.6; get the file "
            "again, or load it with PyTorch and torch.save it anew."
        )
    return zipfile.ZipFile(path)


def describe(archive: zipfile.ZipFile, path: pathlib.Path) -> Description:
    """Interprets the pickle of an archive; to be called within `whole`.

    Raises:
      InputError: no file of torch.save, or one that asks for code to be run.
    """
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise ValueError("two entries have the same name")
    # As PyTorch writes them: so no entry can unpack to more than the file's size.
    if any(
        entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size
        for entry in entries.values()
    ):
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
    return Description(Machine(str(path), root).run(archive.read(pickles[0])), entries)


def entry_of(storage: Storage, entries: Mapping[str, zipfile.ZipInfo]) -> zipfile.ZipInfo:
    """The entry that holds a storage; ValueError where there is none of its size."""
    size = storage.size * storage.dtype.itemsize
    if storage.entry not in entries or entries[storage.entry].file_size != size:
        raise ValueError(f"{storage.entry} has not the {size} bytes that it should have")
    return entries[storage.entry]


def check_view(tensor: Tensor, name: str) -> None:
    """ValueError where a tensor reaches beyond its storage."""
    storage, offset, shape, strides = tensor
    if len(shape) != len(strides) or min((offset, *shape, *strides)) < 0:
        raise ValueError(f"{name} has shape {shape}, strides {strides} and offset {offset}")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 not in shape and (last >= storage.size or math.prod(shape) > storage.size):
        raise ValueError(f"{name} {shape} reaches beyond its {storage.size} numbers")


def view(tensor: Tensor, flat: np.ndarray, name: str) -> np.ndarray:
    """The array of a tensor, a copy, from all numbers of its storage; raises as `check_view`."""
    check_view(tensor, name)
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, flat.dtype)
    steps = [s * flat.itemsize for s in tensor.strides]
    return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps).copy()


def _tensor(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    numbers = (offset, *shape, *strides)
    if not all(type(x) is int for x in numbers):
        raise ValueError("a tensor whose shape is not made of whole numbers")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError("a parameter that is no tensor")
    return tensor


def _dict(pairs: Any = ()) -> dict[Any, Any]:
    pairs = [(key, value) for key, value in pairs]
    for key, _ in pairs:
        # A small pickle can describe a tuple so deep that its hash is never done.
        if not isinstance(key, str | int | float | None):
            raise ValueError("it has a key that is neither a text nor a number")
        if isinstance(key, str) and len(key) > _MAX_NAME:
            raise ValueError(f"it has a key of more than {_MAX_NAME} characters")
    return dict(pairs)


# The only names that a pickle may apply to arguments, and what that means here.
_REBUILD: Mapping[str, Callable[..., Any]] = {
    "collections OrderedDict": _dict,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch Size": lambda sizes=(): tuple(sizes),
}


class Machine:
    """Interprets the opcodes that torch.save writes, on a stack of plain values.

    Attributes:
      rebuild: the names that a pickle may apply to arguments, and what that means.
      values: the names that it may give as arguments alone.
    """

    rebuild: Mapping[str, Callable[..., Any]] = _REBUILD
    values: frozenset[str] = frozenset()

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
            f"{self._file}: refused: its pickle uses {what[:120]}, which plain tensors do "
            "not need; it may want to run code. Load it where you trust it, and save a plain dict "
            "of tensors (torch.save or safetensors)."
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
        self._stack[-1].update(_dict(zip(items[::2], items[1::2], strict=True)))

    def _global(self, text: str) -> None:
        known = text in self.rebuild or text in self.values
        if not known and text.removeprefix("torch ") not in _STORAGES:
            self._refuse(f"the name {text.replace(' ', '.')!r}")
        self._stack.append(Name(text))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("it names something by what is no text")
        self._global(f"{module} {name}")

    def _reduce(self) -> None:
        arguments, name = self._pop(), self._pop()
        if not isinstance(name, Name) or name.text not in self.rebuild:
            # Not the value itself: a small pickle can describe one that is never printed.
            self._refuse(f"a call of {name if isinstance(name, Name) else type(name)}")
        self._stack.append(self.rebuild[name.text](*arguments))

    def _build(self) -> None:
        # Attributes of a state_dict, its `_metadata`: versions of layers, which nothing needs.
        state = self._pop()
        if isinstance(self._stack[-1], Stateful):
            self._stack[-1].set_state(state)
        elif type(self._stack[-1]) is not dict or type(state) is not dict:
            self._refuse("attributes of an object")

    def _storage(self) -> None:
        kind, name, key, _, size = self._pop()
        dtype = _STORAGES.get(name.text.removeprefix("torch ")) if type(name) is Name else None
        if kind != "storage" or dtype is None or type(key) is not str:
            raise ValueError("it describes a storage of unknown type")
        if type(size) is not int or size < 0:
            raise ValueError("it describes a storage without a size")
        self._stack.append(Storage(f"{self._root}/data/{key}", dtype, size))


class Stateful:
    """What a name of `Machine.rebuild` may make: a description that a state is set of later."""

    def set_state(self, state: Any) -> None:
        """Takes in what the pickle says; raises ValueError where it makes no sense."""
        raise NotImplementedError


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
    "SHORT_BINBYTES BYTEARRAY8".split()
)
_ACTIONS: Mapping[str, Callable[[Machine, Any], None]] = {
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
