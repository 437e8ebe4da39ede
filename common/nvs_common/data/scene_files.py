"""Reading files that nobody vouches for: bounded sizes, no code, no path out of the scene.

Everything here raises `InputError` with one sentence that names the file, what was found and
what to do; nothing is unpickled.
"""

from __future__ import annotations

import io
import json
import math
import os
import pathlib
import struct
import tokenize
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np

from nvs_common.errors import InputError

# A camera file of 100,000 frames is about 60 MB: these bounds are far above honest use.
MAX_TEXT_BYTES = 512 * 2**20
MAX_ARRAY_BYTES = 512 * 2**20
MAX_BINARY_BYTES = 16 * 2**30
MAX_FRAMES = 1_000_000
# Bytes of a path and of one name in it: those of Linux, and no fewer elsewhere.
_MAX_PATH, _MAX_NAME = 4096, 255
# What a damaged archive makes Python's reader raise, besides the built-in kinds.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error)
# A zip archive's header of one entry: signature, then the lengths of its name and extra field.
_ENTRY_HEADER = struct.Struct("<4s22xHH")


class Packed(NamedTuple):
    """Part of an entry that a zip archive stores without compression; bytes.

    Attributes:
      archive: the archive.
      header: where the entry's header begins.
      size: of the whole entry.
      crc: checksum of the whole entry.
      first: where the part begins in the entry.
      count: size of the part.
    """

    archive: pathlib.Path
    header: int
    size: int
    crc: int
    first: int
    count: int


def read_bytes(path: pathlib.Path, limit: int) -> bytes:
    """Contents of a regular file of at most `limit` bytes; raises InputError."""
    try:
        if not path.is_file():
            raise InputError(f"{path}: there is no such file; check the path.")
        size = path.stat().st_size
        if size > limit:
            raise InputError(f"{path}: {size} bytes, more than the {limit} allowed.")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check it.") from error


def read_packed(packed: Packed, where: str) -> bytes:
    """At most MAX_ARRAY_BYTES from an archive, without looking at the rest of it.

    Args:
      packed: which bytes.
      where: what they are, for the message.

    Raises:
      InputError: the archive is gone, or no longer the one that `packed` was made for.
    """
    if packed.size > MAX_ARRAY_BYTES:
        raise InputError(f"{where}: {packed.size} bytes, more than the {MAX_ARRAY_BYTES} allowed.")
    try:
        with packed.archive.open("rb") as stream:
            stream.seek(packed.header)
            header = stream.read(_ENTRY_HEADER.size)
            if len(header) == _ENTRY_HEADER.size and header.startswith(b"PK\3\4"):
                stream.seek(sum(_ENTRY_HEADER.unpack(header)[1:]), os.SEEK_CUR)
            content = stream.read(packed.size)
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror}); check it.") from error
    if len(content) != packed.size or zlib.crc32(content) != packed.crc:
        raise InputError(f"{where}: damaged or cut short (bad CRC); get {packed.archive} again.")
    return content[packed.first : packed.first + packed.count]


def read_text(path: pathlib.Path) -> str:
    """A UTF-8 text file, with or without a byte-order mark; raises InputError."""
    try:
        return read_bytes(path, MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}).") from error


def read_json(path: pathlib.Path) -> Any:
    """Strict JSON: no NaN or Infinity, no duplicate keys, no deep nesting; raises InputError."""

    def refuse_constant(name: str) -> Any:
        raise ValueError(f"holds {name}, which is not a number in JSON")

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"holds {text}, which is too large for a number")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"holds the key {twice!r} twice in one object")
        return result

    text = read_text(path)
    try:
        return json.loads(
            text, parse_constant=refuse_constant, parse_float=finite, object_pairs_hook=unique
        )
    except RecursionError as error:
        raise InputError(f"{path}: bad JSON: nested too deeply.") from error
    except ValueError as error:
        raise InputError(f"{path}: bad JSON: {error}.") from error


def parse_array(data: bytes, where: str) -> np.ndarray:
    """An array in .npy format, whose header may claim no more than the bytes that follow it.

    Args:
      data: the file's contents.
      where: file (and member) for the message.

    Raises:
      InputError: not .npy data, an object array (a pickle), or a header that lies.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(stream)
        else:
            header = np.lib.format.read_array_header_2_0(stream)
    except (ValueError, EOFError, SyntaxError, TypeError, tokenize.TokenError) as error:
        raise InputError(f"{where}: not a NumPy array ({error}).") from error
    shape, fortran, dtype = header
    if dtype.hasobject or dtype.kind not in "fiub":
        raise InputError(f"{where}: holds {dtype} values; expected numbers.")
    size = math.prod(shape)
    if min(shape, default=0) < 0 or size * dtype.itemsize != len(data) - stream.tell():
        raise InputError(
            f"{where}: the header says {shape} of {dtype} but {len(data) - stream.tell()} bytes "
            "follow; the file is truncated or damaged."
        )
    array = np.frombuffer(data, dtype, size, stream.tell())
    return array.reshape(shape, order="F" if fortran else "C")


def read_npy(path: pathlib.Path) -> np.ndarray:
    """One array of numbers from a .npy file; raises InputError."""
    return parse_array(read_bytes(path, MAX_ARRAY_BYTES), str(path))


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of numbers of an .npz file, unpacked to a bounded size; raises InputError."""
    data = read_bytes(path, MAX_ARRAY_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            total = sum(item.file_size for item in archive.infolist())
            if total > MAX_ARRAY_BYTES:
                raise InputError(f"{path}: unpacks to {total} bytes; at most {MAX_ARRAY_BYTES}.")
            return {
                name.removesuffix(".npy"): parse_array(archive.read(name), f"{path}: {name}")
                for name in archive.namelist()
            }
    except InputError:
        raise
    except (*_ZIP_ERRORS, ValueError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a readable .npz archive ({error}).") from error


def inside(root: pathlib.Path, relative: Any, where: str) -> pathlib.Path:
    """Joins a path from a file to the scene's folder, refusing every way out of it.

    Backslashes count as separators (files written on Windows). An absolute path is taken where
    it lies in the folder.

    Args:
      root: the scene's folder.
      relative: what the file says.
      where: file and frame for the message.

    Raises:
      InputError: not a string, absolute and outside, with `..`, or a link that leads outside.
    """
    if not isinstance(relative, str) or not relative or "\0" in relative:
        raise InputError(f"{where}: image path {relative!r} is not a file name.")
    if not _is_path(relative):
        raise InputError(
            f"{where}: image path {relative[:40]!r} ... of {len(relative)} characters is no path "
            "that a file can have."
        )
    parts = _below(root, pathlib.PurePosixPath(relative.replace("\\", "/")))
    if not parts.parts:
        raise InputError(f"{where}: image path {relative!r} is the scene's folder, not a file.")
    if parts.is_absolute() or ".." in parts.parts or "://" in relative:
        raise InputError(
            f"{where}: path {relative!r} leaves the scene's folder; use paths relative to {root}."
        )
    path = root / parts
    # A link anywhere on the way may lead out of the scene.
    if not _leads_inside(path, root):
        link = next(way for way in _ways(path, root) if not _leads_inside(way, root))
        kind = "folder" if link.is_dir() else "file"
        raise InputError(
            f"{where}: path {relative!r} leaves the scene: the {kind} {link} is a link out of the "
            f"scene's folder, to {os.path.realpath(link)}; put a copy in the link's place, or move "
            "the scene's camera files beside what it leads to."
        )
    return path


def _is_path(text: str) -> bool:
    """Whether a file system may have such a path: no longer than one can be, and no half letter."""
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        return False
    parts = encoded.replace(b"\\", b"/").split(b"/")
    return len(encoded) <= _MAX_PATH and max(map(len, parts)) <= _MAX_NAME


def _ways(path: pathlib.Path, root: pathlib.Path) -> list[pathlib.Path]:
    """The path and the folders that lead to it from the root, outermost first."""
    return [way for way in [*reversed(path.parents), path] if way.is_relative_to(root)]


def _below(root: pathlib.Path, path: pathlib.PurePosixPath) -> pathlib.PurePosixPath:
    """A path relative to the folder where it is absolute and lies in it, else as it is."""
    if not path.is_absolute():
        return path
    # The file may know the folder by the path that the caller gave, or by any other.
    for known, way in ((path, root.absolute()), (_real(path), _real(root))):
        if known.is_relative_to(way):
            return known.relative_to(way)
    return path


def _real(path: pathlib.PurePath) -> pathlib.PurePosixPath:
    return pathlib.PurePosixPath(os.path.realpath(path))


def _leads_inside(path: pathlib.Path, root: pathlib.Path) -> bool:
    real, top = os.path.realpath(path), os.path.realpath(root)
    return os.path.commonpath([real, top]) == top


def entries(folder: pathlib.Path) -> list[pathlib.Path]:
    """What a folder holds, sorted by name, without hidden files (macOS leaves `._a.png`).

    Raises:
      InputError: it cannot be listed.
    """
    try:
        visible = (path for path in folder.iterdir() if not path.name.startswith("."))
        return sorted(visible, key=lambda path: path.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); check it.") from error


def number(value: Any, what: str) -> float:
    """A finite number from JSON (no strings, no booleans); raises InputError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{what} is {_short(value)}; expected a number.")
    if abs(value) > 1e300 or not math.isfinite(value):
        raise InputError(f"{what} is {value}; expected a finite number.")
    return float(value)


def matrix(value: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """A float64 array of one given shape from JSON lists of numbers; raises InputError."""
    if not shape:
        return np.float64(number(value, what))  # type: ignore[return-value]
    if not isinstance(value, list) or len(value) != shape[0]:
        raise InputError(f"{what} is {_short(value)}; expected {shape} numbers.")
    return np.array([matrix(row, shape[1:], what) for row in value], np.float64)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
