"""Which views of DTU, BlendedMVS and H3DS are trained on, as CoCo-INR (NeurIPS 2022) splits them.

VQ-NeRF (arXiv 2310.14487) is compared with CoCo-INR and does not say which views it takes; these
are presumably the same. A split is named DATASET/SCENE/COUNT, such as dtu/scan24/32, or
FILE.toml/SCENE/COUNT for a file in CoCo-INR's form, `train_val_split.toml`, which is the way for
H3DS. Views of the list are trained on, all others are held out.

Errors of the published lists, which are refused here and not repaired:

- "4" and "16" of DTU and BlendedMVS are those of an H3DS head, with numbers up to 65;
- "32" of BlendedMVS's scan3 names view 36 of 36 (numbers start at 0);
- in H3DS's file, two lists of 32 name a view twice (eef826f0c1f6deb0: 2, 0cd3f3c0bc34a287: 28).

A "32" of a scan of 49 views has 25 views, an "8" of it 7.
"""

from __future__ import annotations

import pathlib
import tomllib
from typing import Any

import numpy as np

from nvs_common.data import scene_files
from nvs_common.data.views import Choice
from nvs_common.errors import InputError

_DTU_THREE = {
    **{24: (8, 24, 40), 37: (0, 22, 34), 40: (8, 24, 40), 55: (0, 28, 34), 63: (10, 23, 35)},
    **{65: (8, 24, 40), 69: (35, 30, 43), 83: (10, 21, 56), 97: (26, 33, 63), 105: (10, 50, 54)},
    **{106: (49, 61, 42), 110: (27, 44, 40), 114: (29, 43, 54), 118: (11, 59, 56)},
    **{122: (55, 59, 5)},
}
# Scans with fewer views than the other ones' 64.
_DTU_SMALL = (24, 37, 40, 55, 63, 65, 69)


def choose(name: str, num_views: int) -> Choice:
    """Views to train on, and the others as targets.

    Args:
      name: DATASET/SCENE/COUNT, see above.
      num_views: of the scene that was loaded.

    Raises:
      InputError: an unknown split, one that is wrong as published, or another number of views.
    """
    source, _, rest = name.rpartition("/")
    source, _, scene = source.rpartition("/")
    if not source or not rest.isdecimal():
        raise InputError(f"split {name!r}: expected DATASET/SCENE/COUNT, such as dtu/scan24/32.")
    expected, listed = _listed(source, scene, int(rest), name)
    if expected != num_views:
        raise InputError(
            f"split {name!r} is of a scene with {expected} views, but {num_views} were loaded; "
            "the images must be complete."
        )
    wrong = [i for i in listed if not 0 <= i < num_views]
    if wrong or len(set(listed)) != len(listed) or not listed:
        raise InputError(
            f"split {name!r} is wrong as published: of its {len(listed)} views, {wrong} are not "
            f"among the {num_views}" + (" and some are named twice" if not wrong else "") + "."
        )
    return Choice(np.array(sorted(listed)), np.setdiff1d(np.arange(num_views), listed))


def _listed(source: str, scene: str, count: int, name: str) -> tuple[int, list[int]]:
    """Number of views of a scene, and those to train on."""
    if source.endswith(".toml"):
        return _from_file(pathlib.Path(source), scene, count)
    number = scene.removeprefix("scan")
    if source != "dtu" or not number.isdecimal() or int(number) not in _DTU_THREE:
        raise InputError(
            f"split {name!r}: built in are dtu/scanN/3, 8 and 32 with N of {sorted(_DTU_THREE)}; "
            "for others give the path of a train_val_split.toml as DATASET."
        )
    views = 49 if int(number) in _DTU_SMALL else 64
    lists = {3: list(_DTU_THREE[int(number)]), 8: list(range(0, views, 8))}
    lists[32] = list(range(0, views, 2))
    if count not in lists:
        raise InputError(
            f"split {name!r}: DTU has 3, 8 and 32; the published lists of 4 and 16 are those of "
            "another data set."
        )
    return views, lists[count]


def _from_file(path: pathlib.Path, scene: str, count: int) -> tuple[int, list[int]]:
    text = scene_files.read_text(path)
    try:
        scenes: Any = tomllib.loads(text).get("scenes", {})
    except tomllib.TOMLDecodeError as e:
        raise InputError(f"{path}: not a TOML file ({e}).") from e
    entry = scenes.get(scene) if isinstance(scenes, dict) else None
    if not isinstance(entry, dict) or not isinstance(entry.get("views"), int):
        raise InputError(f"{path}: no scene {scene!r} with a number of views.")
    listed = entry.get("default_views_configs", {}).get(str(count))
    if not isinstance(listed, list) or not all(isinstance(i, int) for i in listed):
        raise InputError(f"{path}: scene {scene!r} has no list of {count} views.")
    return entry["views"], listed
