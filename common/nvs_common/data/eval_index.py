"""Evaluation indices of the field: which views of which scene are inputs and which are targets.

A JSON object {scene: {"context": [frame, ...], "target": [frame, ...]} or null}; frames count from
0 in the order of the clip. null marks a scene for which its makers found no views.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from nvs_common.data import scene_files, views
from nvs_common.errors import InputError


class Index(NamedTuple):
    """The contents of an index file.

    Attributes:
      choices: scene -> views, in the order of the file.
      null: names of the scenes without views.
    """

    choices: Mapping[str, views.Choice]
    null: tuple[str, ...]


class Found(NamedTuple):
    """Where the scenes of an index are.

    Attributes:
      paths: scene -> path for `scenes.load_scene`.
      missing: names of the scenes that are not there.
    """

    paths: Mapping[str, pathlib.Path]
    missing: tuple[str, ...]


def read(path: pathlib.Path) -> Index:
    """Reads an index file.

    Raises:
      InputError: not JSON, or an entry that is neither null nor lists of frame numbers; names it.
    """
    content = scene_files.read_json(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: expected an object of scenes, each with context and target.")
    choices, null = {}, []
    for name, entry in content.items():
        where = f"{path}: scene {name!r}"
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise InputError(f"{where} is no name of a folder.")
        if entry is None:
            null.append(name)
            continue
        if not isinstance(entry, dict):
            raise InputError(f"{where} is {entry!r:.60}; expected context and target, or null.")
        choices[name] = views.Choice(*(_frames(entry, key, where) for key in ("context", "target")))
    if not choices:
        raise InputError(f"{path}: every scene of the index is null.")
    return Index(choices, tuple(null))


def find(folder: pathlib.Path, names: Iterable[str]) -> Found:
    """Finds scenes by name in a folder: `<name>.txt` beside its frames, or a folder `<name>`.

    Raises:
      InputError: no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected the scenes of the index in it.")
    paths, missing = {}, []
    for name in names:
        candidates = (folder / f"{name}.txt", folder / name)
        there = next((path for path in candidates if path.exists()), None)
        if there is None:
            missing.append(name)
        else:
            paths[name] = there
    return Found(paths, tuple(missing))


def _frames(entry: dict[str, Any], key: str, where: str) -> np.ndarray:
    value = entry.get(key)
    if (
        not isinstance(value, list)
        or not value
        or not all(type(frame) is int and 0 <= frame < scene_files.MAX_FRAMES for frame in value)
    ):
        raise InputError(f"{where}: {key} is {value!r:.60}; expected a list of frame numbers.")
    return np.array(value)
