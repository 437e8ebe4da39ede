"""Where scenes come from: the procedural world, folders of photographs, weighted mixtures.

A source is random access, `len(source)` and `source[i] -> scene`, and can be pickled to worker
processes. A scene has `cameras` [n], `names`, `source`, `bounds` and `images(indices)`, and
`depths(indices)` where depth is known; everything is NumPy.

`config.data.source` is one string:
  "procedural"                          the procedural world: no download, exact depth
  "/data/garden"                        one scene, or a folder of scenes, in any readable layout
  "procedural:0.5,/data/garden:0.5"     several of these, each with the share of samples it gets
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from absl import logging

from nvs_common.data import procedural, scenes
from nvs_common.errors import InputError

# Training worlds have seeds below this number and the evaluation world has exactly it, so no
# run, whatever its seed, trains on a scene that any run is evaluated on.
HELD_OUT_SEED = 2**31


@dataclasses.dataclass(frozen=True)
class FolderScenes:
    """Scenes of one folder; cameras are in memory, images are read when asked for.

    Attributes:
      scenes: the usable ones, in the order of their paths.
      skipped: path -> reason, of those that could not be loaded.
    """

    scenes: tuple[Any, ...]
    skipped: dict[str, str]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Any:
        return self.scenes[index]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several sources with the share of samples each gets; as a source, their concatenation."""

    parts: tuple[Any, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: int) -> Any:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


class Kept:
    """A source whose scenes and images stay in memory once they were made.

    For a procedural world of few scenes that training visits many times: then it waits for no
    rendering after the first visit. Every worker process keeps its own.
    """

    def __init__(self, source: Any):
        self._source = source
        self._scenes: dict[int, KeptScene] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> KeptScene:
        index = int(index)
        if index not in self._scenes:
            self._scenes[index] = KeptScene(self._source[index])
        return self._scenes[index]


class KeptScene:
    """A scene of `Kept`: what the other scene has, and its images so far."""

    def __init__(self, scene: Any):
        self._scene = scene
        self._images: dict[int, np.ndarray] = {}
        self.cameras, self.names = scene.cameras, scene.names
        self.source, self.bounds, self.depths = scene.source, scene.bounds, scene.depths

    def images(self, indices: Any) -> np.ndarray:
        """Images [k, h, w, 3] float32."""
        missing = [int(i) for i in indices if int(i) not in self._images]
        if missing:
            made = self._scene.images(missing)
            self._images.update(zip(missing, made, strict=True))
        return np.stack([self._images[int(i)] for i in indices])


def make_source(config) -> Any:
    """The training scenes that `config.data.source` names.

    Scenes of a folder that cannot be loaded are skipped, with a warning that names each, up to
    `config.data.max_bad_scenes` (0 if the config has none) in every folder.

    Raises:
      InputError: a source does not exist, or has more bad scenes than that.
    """
    seed = config.seed
    if not 0 <= seed < HELD_OUT_SEED:
        raise InputError(f"seed={seed}, but it has to lie in [0, {HELD_OUT_SEED}).")
    max_bad = config.data.get("max_bad_scenes", 0)
    return _make(config, config.data.source, seed, config.data.num_scenes, max_bad)


def held_out(config) -> Any:
    """The scenes to evaluate on; no bad scene is ever skipped.

    The procedural world gives `config.eval.num_scenes` scenes of a seed that no training run can
    have. Folders give all their scenes: there the held-out part is every
    `config.data.hold_out_every`-th view of each scene, which training never sees. The folders
    are those of `config.eval.source`, or of `config.data.source` where that is empty.

    Raises:
      InputError: a source does not exist, or one of its scenes is bad.
    """
    text = config.eval.get("source", "") or config.data.source
    return _make(config, text, HELD_OUT_SEED, config.eval.num_scenes, 0)


def parse(text: str) -> list[tuple[str, float]]:
    """Splits "name:weight,name:weight" into names and weights; one name alone has weight 1.

    Text that is the path of something that exists is one name, whatever it contains.

    Raises:
      InputError: a part without a positive weight, or an empty one.
    """
    if os.path.exists(text) or ("," not in text and not _weight(text)):
        return [(text, 1.0)]
    parts = []
    for part in text.split(","):
        name = part.strip().rpartition(":")[0]
        weight = _weight(part)
        if not name or weight is None:
            raise InputError(
                f"data.source={text!r}: {part!r} is neither an existing folder nor NAME:WEIGHT "
                "with a positive weight; write for example 'procedural:0.5,/data/garden:0.5'."
            )
        parts.append((name, weight))
    return parts


def _weight(part: str) -> float | None:
    try:
        weight = float(part.rpartition(":")[2])
    except ValueError:
        return None
    return weight if ":" in part and 0 < weight < math.inf else None


def _make(config, text: str, seed: int, num_scenes: int, max_bad: int) -> Any:
    if not text:
        raise InputError("data.source is empty: set it to 'procedural' or to a folder of scenes.")
    named = parse(text)
    parts = []
    for name, _ in named:
        if name == "procedural":
            training = seed != HELD_OUT_SEED
            made = world(config, seed, num_scenes, augment=training)
            keep = training and config.data.get("keep_in_memory", False)
            parts.append(Kept(made) if keep else made)
        else:
            size = (config.data.height, config.data.width)
            parts.append(load_folder(name, size=size, max_bad=max_bad))
    if len(parts) == 1:
        return parts[0]
    return Mixture(tuple(parts), tuple(weight for _, weight in named))


def world(
    config,
    seed: int,
    num_scenes: int,
    size: tuple[int, int] | None = None,
    *,
    augment: bool = False,
) -> procedural.World:
    """The procedural world of a config: its views a scene, baselines, rigs and, by default, size.

    With `augment`, which training asks for, also the config's sensor noise and exposure jitter.
    """
    height, width = size or (config.data.height, config.data.width)
    names = ("noise", "exposure_jitter") if augment else ()
    return procedural.World(
        seed=seed,
        num_scenes=num_scenes,
        height=height,
        width=width,
        num_views=config.data.views_per_scene,
        baseline=tuple(config.data.get("baseline", procedural.World.baseline)),
        rigs=tuple(config.data.get("rigs", procedural.World.rigs)),
        **{name: config.data.get(name, 0.0) for name in names},
    )


def load_folder(
    path: str,
    *,
    size: tuple[int, int] | None = None,
    max_bad: int = 0,
) -> FolderScenes:
    """Loads the cameras of every scene under a folder.

    Args:
      path: one scene or a folder of scenes.
      size: (height, width) that images are cropped and resized to; None leaves them.
      max_bad: how many scenes may be bad; each is skipped and named in a warning.

    Raises:
      InputError: no scene is found, none is usable, or more than `max_bad` are bad.
    """
    good, skipped = [], {}
    for found in scenes.find_scenes(path):
        try:
            good.append(scenes.load_measured(found, size=size))
        except InputError as error:
            if max_bad == 0:
                raise
            skipped[str(found)] = str(error)
            logging.warning("Skipping bad scene %d: %s", len(skipped), error)
        if len(skipped) > max_bad:
            raise InputError(
                f"{path} has more than data.max_bad_scenes={max_bad} bad scenes: "
                f"{_join(skipped.values())}"
            )
    if not good:
        raise InputError(f"{path} has no usable scene: {_join(skipped.values()) or 'it is empty.'}")
    if skipped:
        logging.warning("%s: %d scenes usable, %d skipped.", path, len(good), len(skipped))
    return FolderScenes(tuple(good), skipped)


def _join(reasons: Iterable[str]) -> str:
    return " | ".join(reasons)
