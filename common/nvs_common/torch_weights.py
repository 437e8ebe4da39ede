"""Arrays of foreign checkpoints (.pt, .pth, .ckpt, .bin, .safetensors, .npz), without PyTorch.

Nothing of a file is ever imported, called or executed, see `torch_archive`.
"""

from __future__ import annotations

import math
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nvs_common import torch_archive
from nvs_common.errors import InputError
from nvs_common.torch_archive import Name, Storage, Tensor

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors", ".npz")

# What data parallelism and compilation put before every name.
WRAPPERS = ("module.", "_orig_mod.")

# Far above what checkpoints need, and small enough to be refused in seconds.
_MAX_VALUES = 2**22
_MAX_DEPTH = 64
# Tensors may be views of one storage; all of them together are no more than this many files.
_MAX_COPIES = 16
# Compressed arrays unpack to no more than this many files, or to this many bytes. Weights hardly
# shrink at all; a few that are all zero do.
_MAX_EXPANSION, _SMALL = 16, 2**28


def read(
    path: str | os.PathLike[str], *, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Any]:
    """Reads the content of a file of weights.

    Args:
      path: a .pt, .pth, .ckpt or .bin that torch.save has written (zip format, PyTorch 1.6 or
        newer), a .safetensors or an .npz file.
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
    with torch_archive.whole(path):
        return readers[path.suffix](path, wanted)


def floats(value: Any, where: str, dtype: Any = None) -> np.ndarray:
    """A checkpoint's value as an array: float64 stays, what has fewer bits becomes float32.

    Args:
      value: an array, or a tensor of PyTorch.
      where: the file and the array's name, for the error.
      dtype: of the result, in place of these.

    Raises:
      InputError: no floats, or some that are not finite.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no type for these, and PyTorch does not convert them.
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    x = np.asarray(value)
    if x.dtype.kind != "f" and x.dtype.name != "bfloat16":
        raise InputError(f"{where} is {x.dtype}, expected an array of floats.")
    with np.errstate(over="ignore"):
        x = x.astype(dtype or (np.float64 if x.dtype == np.float64 else np.float32))
    if not np.isfinite(x).all():
        raise InputError(f"{where} holds values that are not finite.")
    return x


def unwrapped(name: str) -> str:
    """The name of an array without what `WRAPPERS` put before it."""
    while short := next((w for w in WRAPPERS if name.startswith(w)), ""):
        name = name.removeprefix(short)
    return name


def _read_npz(path: pathlib.Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("a single array, not an archive")
    with archive:
        # Reading an entry stops at the size that is written here. Open inside of this block.
        assert archive.zip is not None
        unpacked = sum(entry.file_size for entry in archive.zip.infolist())
        if unpacked > max(_SMALL, _MAX_EXPANSION * path.stat().st_size):
            raise InputError(
                f"{path}: its compressed arrays would unpack to {unpacked / 1e9:.1f} GB, far more "
                "than weights compress to; write them with numpy.savez, uncompressed."
            )
        return {name: archive[name] for name in archive.files if wanted(name)}


def _read_safetensors(path: pathlib.Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    # Imported where it is used: importing a model must not load file readers.
    import safetensors

    try:
        with safetensors.safe_open(path, "np") as file:
            names = [name for name in file.keys() if wanted(name)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, AttributeError) as e:  # a type that NumPy lacks
        raise ValueError(str(e)) from e


def _read_torch(path: pathlib.Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    with torch_archive.open_archive(path) as archive:
        content, entries = torch_archive.describe(archive, path)
        if not isinstance(content, dict):
            raise InputError(f"{path}: holds no dictionary; expected a state_dict of weights.")
        budget = _MAX_COPIES * path.stat().st_size
        return _Reader(archive, entries, wanted, budget).resolve(content, "", 0)


class _Reader:
    """Replaces descriptions of tensors by arrays."""

    def __init__(
        self,
        archive: zipfile.ZipFile,
        entries: Mapping[str, zipfile.ZipInfo],
        wanted: Callable[[str], bool],
        budget: int,
    ):
        self._archive, self._entries, self._wanted = archive, entries, wanted
        self._budget = budget
        self._storages: dict[Storage, np.ndarray] = {}
        self._visited = 0

    def resolve(self, value: Any, name: str, level: int) -> Any:
        """The value with arrays for tensors; unwanted ones are left out of their dict or list."""
        self._visited += 1
        # A pickle may contain itself, or refer to a list so often that it never ends.
        if level > _MAX_DEPTH or self._visited > _MAX_VALUES:
            raise ValueError("its description is nested too deeply or too large")
        if isinstance(value, Tensor):
            return self._array(value, name)
        if isinstance(value, dict):
            below = {k: f"{name}/{k}" if name else str(k) for k in value}
            kept = {k: x for k, x in value.items() if self._keeps(x, below[k])}
            return {k: self.resolve(x, below[k], level + 1) for k, x in kept.items()}
        if isinstance(value, list | tuple) and not isinstance(value, Name | Storage):
            kept = [(f"{name}/{i}", x) for i, x in enumerate(value)]
            kept = [(below, x) for below, x in kept if self._keeps(x, below)]
            return type(value)([self.resolve(x, below, level + 1) for below, x in kept])
        if isinstance(value, Name | Storage):
            raise ValueError(f"{name} is no array but {value}")
        return value

    def _keeps(self, value: Any, name: str) -> bool:
        return not isinstance(value, Tensor) or self._wanted(name)

    def _array(self, tensor: Tensor, name: str) -> np.ndarray:
        # Before anything is read: a description may claim more than there is.
        torch_archive.check_view(tensor, name)
        storage = tensor.storage
        self._budget -= math.prod(tensor.shape) * storage.dtype.itemsize
        if self._budget < 0:
            raise ValueError("its tensors repeat the same numbers without end")
        if storage not in self._storages:
            content = self._archive.read(torch_archive.entry_of(storage, self._entries))
            self._storages[storage] = np.frombuffer(content, storage.dtype)
        return torch_archive.view(tensor, self._storages[storage], name)
