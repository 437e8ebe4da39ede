"""Writes sets of clips of RealEstate10K as they are distributed; the same clips in each layout."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from tests import scene_writers, torch_files

COUNT, HEIGHT, WIDTH = 7, 12, 20
KEYS = ("0a1", "0b2", "0c3")


def rig(seed: int, count: int = COUNT) -> scene_writers.Rig:
    """The cameras and images of a clip."""
    return scene_writers.make_rig(seed, count=count, height=HEIGHT, width=WIDTH)


def clips() -> list[dict[str, Any]]:
    """The clips of a chunk."""
    return [scene_writers.packed_clip(rig(seed), key) for seed, key in enumerate(KEYS)]


def save(path: pathlib.Path, content: Any) -> pathlib.Path:
    """Writes a chunk."""
    return torch_files.save(path, content, root=path.stem)


def write_split(root: pathlib.Path, *, index: bool = True) -> pathlib.Path:
    """Two clips in a chunk, one in another."""
    root.mkdir()
    first, second, third = clips()
    save(root / "000000.torch", [second, first])
    save(root / "000001.torch", [third])
    if index:
        names = dict(zip(KEYS, ("000000.torch", "000000.torch", "000001.torch"), strict=True))
        (root / "index.json").write_text(json.dumps(names))
    return root


def write_all(root: pathlib.Path) -> None:
    """The same clips in three layouts."""
    write_split(root / "chunks")
    for seed, key in enumerate(KEYS):
        (root / "text").mkdir(exist_ok=True)
        scene_writers.write_realestate(rig(seed), root / "text")
        (root / "text" / "clip").rename(root / "text" / key)
        (root / "text" / "clip.txt").rename(root / "text" / f"{key}.txt")
        scene_writers.write_lvsm(rig(seed), root / "lvsm", key)
