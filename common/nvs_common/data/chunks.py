"""RealEstate10K as pixelSplat distributes it: chunks of clips, <split>/<number>.torch.

A chunk is what torch.save makes of a list of clips, dicts with `key`, `cameras` [n, 18] (numbers as
in RealEstate10K's text files) and `images`, n byte tensors that are JPEG files. `index.json` beside
the chunks, {key: chunk}, tells without opening any which clip is where.

A clip's path is that of its chunk, then its key: test/000000.torch/5aca87f95a9412c6. Of a chunk its
description is read (the places of its tensors), and kept for the chunks that were read last;
images are read, alone, when they are decoded.
"""

from __future__ import annotations

import functools
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from nvs_common import torch_archive
from nvs_common.data import array_formats, scene_files, scene_formats
from nvs_common.data.scene_files import Packed
from nvs_common.data.scene_formats import Loaded, Options
from nvs_common.errors import InputError
from nvs_common.torch_archive import Description, Tensor

log = logging.getLogger(__name__)

SUFFIX = ".torch"
INDEX = "index.json"
# Descriptions in memory, 3 MB for each chunk of 100 MB.
_KEPT = 4


def split(path: pathlib.Path) -> tuple[pathlib.Path, str] | None:
    """Chunk and key of a clip's path, None for other paths."""
    chunk = path.parent
    return (chunk, path.name) if chunk.suffix == SUFFIX and chunk.is_file() else None


def keys(chunk: pathlib.Path) -> tuple[str, ...]:
    """Keys of a chunk's clips, in their order; raises InputError."""
    return tuple(_describe(chunk).content)


def find(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Paths of all clips of a folder of chunks, by key; empty where it holds no chunk.

    Clips that index.json puts into chunks that are not there are left out with one counted
    warning. Without index.json every chunk is opened.

    Raises:
      InputError: a bad index.json, or without one a bad chunk; or no chunk of the index is there.
    """
    files = [file.name for file in scene_files.entries(folder) if file.suffix == SUFFIX]
    if not files:
        return {}
    index = folder / INDEX
    if index.is_file():
        found = _read_index(index)
        there = set(files)
        missing = {key: name for key, name in found.items() if name not in there}
        if len(missing) == len(found):
            raise InputError(f"{index}: none of its chunks is in {folder}; get them again.")
        if missing:
            log.warning(
                "%s: %d of %d clips are in chunks that are not there (first: %s)",
                *(index, len(missing), len(found), next(iter(missing.values()))),
            )
        found = {key: name for key, name in found.items() if key not in missing}
    else:
        log.info("%s: no %s, so all %d chunks are opened", folder, INDEX, len(files))
        found = {}
        for name in files:
            for key in keys(folder / name):
                if key in found:
                    raise InputError(
                        f"{folder / name}: scene {key!r} is in {found[key]} as well; remove one."
                    )
                found[key] = name
    ordered = sorted(found, key=lambda key: (found[key], key))
    return {key: folder / found[key] / key for key in ordered}


def read(chunk: pathlib.Path, key: str | None, options: Options) -> Loaded:
    """One clip of a chunk; without a key, the only one.

    Raises:
      InputError: no such clip, or a bad one; names the chunk, the key and the frame.
    """
    options.refuse("RealEstate10K", "rig", "image_folder")
    clips, entries = _describe(chunk)
    some = ", ".join(list(clips)[:3])
    if key is None and len(clips) > 1:
        raise InputError(
            f"{chunk}: holds {len(clips)} scenes; name one by its key: {chunk}/{next(iter(clips))}."
        )
    key = next(iter(clips)) if key is None else key
    if key not in clips:
        raise InputError(
            f"{chunk}: holds no scene {key!r} among its {len(clips)} ({some}, ...); if "
            f"{INDEX} says so, it belongs to other chunks."
        )
    root = chunk / key
    with torch_archive.whole(chunk):
        rows = _cameras(chunk, clips[key], entries)
        images = _images(chunk, clips[key], entries)
    if len(rows) != len(images):
        raise InputError(f"{root}: {len(rows)} cameras but {len(images)} images; get it again.")
    posed = [
        array_formats.realestate_frame(f"{i:05d}", row, image)
        for i, (row, image) in enumerate(zip(rows, images, strict=True))
    ]
    frames = scene_formats.build_frames(posed, root, root, check=options.check)
    bounds = array_formats.REALESTATE_BOUNDS
    return Loaded(tuple(frames), "RealEstate10K", root, bounds, ordered=True)


def _read_index(path: pathlib.Path) -> dict[str, str]:
    content = scene_files.read_json(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: expected an object of keys, each with the name of its chunk.")
    for key, name in content.items():
        _check_key(key, str(path))
        if not isinstance(name, str) or pathlib.PurePosixPath(name).name != name or "\0" in name:
            raise InputError(f"{path}: scene {key!r} is in {name!r:.60}; expected a file name.")
    return content


def _describe(chunk: pathlib.Path) -> Description:
    """Content {key: clip} with tensors described, and the archive's entries."""
    try:
        status = chunk.stat()
    except OSError as error:
        raise InputError(f"{chunk}: cannot be read ({error.strerror}); check it.") from error
    return _described(chunk, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=_KEPT)
def _described(chunk: pathlib.Path, size: int, modified: int) -> Description:
    del size, modified  # another file of the same name is read anew
    with torch_archive.whole(chunk), torch_archive.open_archive(chunk) as archive:
        content, entries = torch_archive.describe(archive, chunk)
    if not isinstance(content, list) or not content:
        raise InputError(f"{chunk}: holds no list of scenes; expected a chunk of pixelSplat's.")
    clips: dict[str, Any] = {}
    for number, clip in enumerate(content):
        where = f"{chunk}: scene number {number}"
        if not isinstance(clip, dict):
            raise InputError(f"{where} is {type(clip).__name__}; expected a dict.")
        key = _check_key(clip.get("key"), where)
        if key in clips:
            raise InputError(f"{where}: the key {key!r} appears twice.")
        clips[key] = clip
    return Description(clips, entries)


def _check_key(key: Any, where: str) -> str:
    """The key, which is part of a path and of messages; raises InputError."""
    if not isinstance(key, str) or key in ("", ".", "..") or set(key) & set("/\\\0\n"):
        raise InputError(f"{where} has the key {key!r:.60}; expected a name.")
    return key


def _cameras(
    chunk: pathlib.Path, clip: Mapping[str, Any], entries: Mapping[str, Any]
) -> np.ndarray:
    """Rows [n, 18] float64."""
    where = f"{chunk / clip['key']}: cameras"
    tensor = clip.get("cameras")
    shape = tensor.shape if isinstance(tensor, Tensor) else "absent"
    if not isinstance(tensor, Tensor) or len(tensor.shape) != 2 or tensor.shape[1] != 18:
        raise InputError(f"{where}: {shape}; expected a tensor [frames, 18].")
    if tensor.storage.dtype.kind != "f":
        raise InputError(f"{where}: {tensor.storage.dtype} numbers; expected floating point.")
    torch_archive.check_view(tensor, where)
    packed = _packed(chunk, tensor, entries)
    flat = np.frombuffer(scene_files.read_packed(packed, where), tensor.storage.dtype)
    return torch_archive.view(tensor, flat, where).astype(np.float64)


def _images(
    chunk: pathlib.Path, clip: Mapping[str, Any], entries: Mapping[str, Any]
) -> list[Packed]:
    """Where each image is in the file."""
    root, images = chunk / clip["key"], clip.get("images")
    if not isinstance(images, list):
        found = "absent" if images is None else type(images).__name__
        raise InputError(f"{root}: images: {found}; expected a list of byte tensors.")
    result = []
    for number, image in enumerate(images):
        where = f"{root}: frame '{number:05d}'"
        if (
            not isinstance(image, Tensor)
            or image.storage.dtype != np.uint8
            or len(image.shape) != 1
            or (image.shape[0] > 1 and image.strides != (1,))
        ):
            raise InputError(f"{where}: its image is no tensor [bytes] of uint8.")
        torch_archive.check_view(image, where)
        whole = _packed(chunk, image, entries)
        result.append(whole._replace(first=image.offset, count=image.shape[0]))
    return result


def _packed(chunk: pathlib.Path, tensor: Tensor, entries: Mapping[str, Any]) -> Packed:
    """The bytes of a tensor's whole storage."""
    entry = torch_archive.entry_of(tensor.storage, entries)
    size = entry.file_size
    return Packed(chunk, entry.header_offset, size, entry.CRC, first=0, count=size)
