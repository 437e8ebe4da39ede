"""What a program leaves: asked about before the work begins, then written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from nvs_common.errors import InputError

PathLike: TypeAlias = str | os.PathLike[str]


def check_file(path: PathLike, suffixes: Sequence[str] = ()) -> pathlib.Path:
    """The path, once it is sure that a file can be written there.

    Args:
      path: the file to be written.
      suffixes: endings that it may have, any by default.

    Raises:
      InputError: another ending, a folder of that name, or a place that cannot be written to.
    """
    path = pathlib.Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        endings = " or ".join(suffixes)
        raise InputError(f"{path}: is written as {endings}; change the ending of the name.")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file.")
    check_folder(path.parent)
    return path


def check_folder(path: PathLike) -> pathlib.Path:
    """The path, once it is sure that files can be written to such a folder.

    Missing folders are made when a file is written, so that work that fails leaves none behind.

    Raises:
      InputError: there is a file of that name, or it cannot be made or written to.
    """
    path = pathlib.Path(path)
    with _named(path):
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        # Permissions alone do not tell: file systems are mounted read-only, or full.
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"0")
    return path


@contextlib.contextmanager
def whole(path: PathLike) -> Iterator[pathlib.Path]:
    """A path to write to, beside `path` and with its ending, which takes its name at the end.

    Missing folders are made. If the body fails, what it wrote is removed and a file that was there
    before stays.

    Raises:
      InputError: the file cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: PathLike, text: str) -> None:
    """Writes text in UTF-8.

    Raises:
      InputError: the file cannot be written.
    """
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: PathLike, value: Any) -> None:
    """Writes JSON; NaN and infinity, for which it has no word, become null.

    Raises:
      InputError: the file cannot be written.
    """
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def write_image(path: PathLike, image: np.ndarray | Image.Image) -> None:
    """Writes a picture, uint8 [h, w, 3] or Pillow's, in the format of the name's ending.

    Raises:
      InputError: the file cannot be written.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with whole(path) as temporary:
        picture.save(temporary)


def write_arrays(path: PathLike, arrays: Mapping[str, Any]) -> None:
    """Writes named arrays as numpy.savez does.

    Raises:
      InputError: the file cannot be written.
    """
    # To an open file: NumPy adds .npz to names that end otherwise, .NPZ among them.
    with whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        reason = e.strerror or e
        raise InputError(f"{path}: cannot be written ({reason}); name another place.") from e


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(field) for name, field in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(field) for field in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
