"""Where scenes come from: the procedural world, folders of photographs, weighted mixtures.

A source is random access, `len(source)` and `source[i] -> scene`, and can be pickled to worker
processes. A scene has `cameras` [n], `names`, `source`, `bounds` and `images(indices)`, and
`depths(indices)` where depth is known; everything is NumPy.

`config.data.source` is one string:
  "procedural"                          the procedural world: no download, exact depth
  "objects"                             single objects before white on an orbit, with masks
  "/data/garden"                        one scene, or a folder of scenes, in any readable layout
  "procedural_object"                   one object with masks and a known surface; number
                                        `config.data.object`
  "procedural_objects"                  `config.data.num_scenes` others of these
  "images:/data/photos"                 all images of a folder, without cameras
  "procedural:0.5,/data/garden:0.5"     several of these, each with the share of samples it gets
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from nvs_common.data import image_folder, objects, procedural, procedural_object, scenes
from nvs_common.errors import InputError

# Training worlds have seeds below this number and the evaluation world has exactly it, so no
# run, whatever its seed, trains on a scene that any run is evaluated on.
HELD_OUT_SEED = 2**31
# Objects of "procedural_objects" have this number and those after it.
OTHER_OBJECTS = 100_000
IMAGES = "images:"
# Of a folder of more scenes, each is loaded when it is asked for.
LOADED_AT_START = 64
# Views of such a folder whose cameras stay in memory, 1 kB each.
KEPT_VIEWS = 50_000


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


class LazyScenes:
    """Scenes of a large folder, loaded when they are asked for; only their paths are in memory.

    `source[i]` raises InputError for a scene that cannot be loaded, every time. The scenes asked
    for last are kept, up to KEPT_VIEWS views in every process.

    Attributes:
      paths: of the scenes, in their order.
      size: (height, width) of the views, None for that of the files.
      skipped: path -> reason, of scenes that were found bad at the start and left out.
    """

    def __init__(
        self,
        paths: Sequence[pathlib.Path],
        size: tuple[int, int] | None,
        skipped: Mapping[str, str] | None = None,
    ):
        self.paths, self.size, self.skipped = tuple(paths), size, dict(skipped or {})
        self._forget()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> scenes.Scene:
        path = self.paths[index]
        with self._lock:
            if path in self._kept:
                self._kept.move_to_end(path)
                return self._kept[path]
        scene = scenes.load_measured(path, size=self.size, check="first")
        with self._lock:
            if path not in self._kept:
                self._kept[path] = scene
                self._views += len(scene)
            while self._views > KEPT_VIEWS and len(self._kept) > 1:
                self._views -= len(self._kept.popitem(last=False)[1])
        return scene

    def __getstate__(self) -> dict[str, Any]:
        # What was loaded stays in its process.
        return {"paths": self.paths, "size": self.size, "skipped": self.skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._lock, self._views = threading.Lock(), 0
        self._kept: collections.OrderedDict[pathlib.Path, scenes.Scene] = collections.OrderedDict()


# Sources of photographs, of which some views may be held out.
FOLDERS = (FolderScenes, LazyScenes)


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
        self._masks: dict[int, np.ndarray] = {}
        self.cameras, self.names = scene.cameras, scene.names
        self.source, self.bounds = scene.source, scene.bounds
        if hasattr(scene, "depths"):
            self.depths = scene.depths
        self.points = getattr(scene, "points", None)
        if hasattr(scene, "path"):
            self.path = scene.path

    @property
    def has_masks(self) -> bool:
        """Whether the scene has masks."""
        return getattr(self._scene, "has_masks", False)

    def images(self, indices: Any) -> np.ndarray:
        """Images [k, h, w, 3] float32."""
        return _keep(self._images, self._scene.images, indices)

    def masks(self, indices: Any) -> np.ndarray:
        """Masks [k, h, w] float32."""
        return _keep(self._masks, self._scene.masks, indices)

    def resized(self, height: int, width: int) -> Any:
        """The scene at another size; nothing of it is kept."""
        return self._scene.resized(height, width)


def _keep(kept: dict[int, np.ndarray], read: Any, indices: Any) -> np.ndarray:
    """What `read` gives of indices [k], read once."""
    missing = sorted({int(i) for i in indices} - set(kept))
    if missing:
        kept.update(zip(missing, read(missing), strict=True))
    return np.stack([kept[int(i)] for i in indices])


def make_source(config) -> Any:
    """The training scenes that `config.data.source` names.

    Scenes of a folder that cannot be loaded are skipped, with a warning that names each, up to
    `config.data.max_bad_scenes` (0 if the config has none) in every folder; in a large folder, see
    `load_folder`, when they are drawn.

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
        training = seed != HELD_OUT_SEED
        keep = training and config.data.get("keep_in_memory", False)
        if name in ("procedural", "objects"):
            if name == "objects":
                made = orbits(config, seed, num_scenes)
            else:
                made = world(config, seed, num_scenes, training=training)
            parts.append(Kept(made) if keep else made)
            continue
        made = _folder(config, name, max_bad)
        if keep and isinstance(made, FolderScenes):
            made = dataclasses.replace(made, scenes=tuple(KeptScene(one) for one in made.scenes))
        parts.append(made)
    if len(parts) == 1:
        return parts[0]
    return Mixture(tuple(parts), tuple(weight for _, weight in named))


def world(
    config,
    seed: int,
    num_scenes: int,
    size: tuple[int, int] | None = None,
    *,
    training: bool = False,
) -> procedural.World:
    """The procedural world of a config: its views a scene, baselines, rigs and, by default, size.

    Training alone has the config's sensor noise and exposure jitter; everything else has the
    cameras of `config.eval.baseline` and `config.eval.rigs` where these are not empty.
    """
    height, width = size or (config.data.height, config.data.width)
    names = ("noise", "exposure_jitter") if training else ()
    cameras = {name: config.data.get(name, None) for name in ("baseline", "rigs")}
    if not training:
        cameras |= {name: own for name in cameras if (own := config.eval.get(name, None))}
    return procedural.World(
        seed=seed,
        num_scenes=num_scenes,
        height=height,
        width=width,
        num_views=config.data.views_per_scene,
        **{name: tuple(value) for name, value in cameras.items() if value},
        **{name: config.data.get(name, 0.0) for name in names},
    )


def orbits(
    config, seed: int, num_scenes: int, size: tuple[int, int] | None = None
) -> objects.Objects:
    """The procedural objects of a config: its views a scene, elevations and, by default, size."""
    height, width = size or (config.data.height, config.data.width)
    elevation = tuple(config.data.get("elevation", objects.Objects.elevation))
    return objects.Objects(seed, num_scenes, height, width, config.data.views_per_scene, elevation)


def load_folder(
    path: str,
    *,
    size: tuple[int, int] | None = None,
    max_bad: int = 0,
) -> FolderScenes | LazyScenes:
    """Loads the cameras of every scene under a folder.

    Of a folder of more than LOADED_AT_START scenes only as many are loaded as it takes to find a
    good one; each of the others when it is asked for, of videos with a look at one frame.

    Args:
      path: one scene or a folder of scenes.
      size: (height, width) that images are cropped and resized to; None leaves them.
      max_bad: how many scenes may be bad; each is skipped and named in a warning.

    Raises:
      InputError: no scene is found, none is usable, or more than `max_bad` are bad.
    """
    good, skipped = [], {}
    found = scenes.find_scenes(path)
    lazy = len(found) > LOADED_AT_START
    for place in found:
        try:
            check = "first" if lazy else "all"
            good.append(scenes.load_measured(place, size=size, check=check))
            if lazy:
                break
        except InputError as error:
            if max_bad == 0:
                raise
            skipped[str(place)] = str(error)
            logging.warning("Skipping bad scene %d: %s", len(skipped), error)
        if len(skipped) > max_bad:
            raise InputError(
                f"{path} has more than data.max_bad_scenes={max_bad} bad scenes: "
                f"{_join(skipped.values())}"
            )
    if not good:
        raise InputError(f"{path} has no usable scene: {_join(skipped.values()) or 'it is empty.'}")
    if lazy:
        return LazyScenes(found[len(skipped) :], size, skipped)
    if skipped:
        logging.warning("%s: %d scenes usable, %d skipped.", path, len(good), len(skipped))
    return FolderScenes(tuple(good), skipped)


def _folder(config, name: str, max_bad: int) -> FolderScenes | LazyScenes:
    """Scenes of which some views are held out: folders, and procedural objects."""
    size = (config.data.height, config.data.width)
    if name.startswith(IMAGES):
        return FolderScenes((image_folder.load(name.removeprefix(IMAGES), size=size),), {})
    if name == "procedural_object":
        numbers = [config.data.get("object", 0)]
    elif name == "procedural_objects":
        numbers = range(OTHER_OBJECTS, OTHER_OBJECTS + config.data.num_scenes)
    else:
        return load_folder(name, size=size, max_bad=max_bad)
    views = config.data.views_per_scene
    return FolderScenes(tuple(procedural_object.orbit(n, *size, views) for n in numbers), {})


def _join(reasons: Iterable[str]) -> str:
    return " | ".join(reasons)
