"""One training sample: views of a scene, chosen and then read; and samples stacked to a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from nvs_common.data import sources, splits, views
from nvs_common.errors import InputError
from nvs_common.types import Batch, Cameras, Views

# How many scenes of a large folder are tried for one that is long enough.
_TRIED = 100
_CAMERA_ARRAYS = ("world_from_cam", "intrinsics", "near", "far")


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws one sample, a `Batch` without the scene axis, from a scene.

    Attributes:
      num_context: v.
      num_target: t.
      choice: how views are chosen: "nearest_random" (Quark), "window" (LVSM), "random".
      nearest: the pool of nearest views of "nearest_random".
      min_distance: least frame distance of "window".
      max_distance: greatest frame distance of "window".
      targets_may_be_context: of "nearest_random" and "window". Some of the drawn views are then
        targets too, or neither; extras["drawn_poses"] [v + t, 4, 4] has the poses of all of them.
      min_context: with 1 or more, every batch has a number of context views drawn from
        [min_context, num_context], the same for all of its scenes; 0: always num_context.
      crops: (height, width) of which one is drawn for every batch; its images are cropped to that
        size around their middle. Empty: no cropping.
      skip_short_scenes: leave out a folder's scenes with too few views, which are an error
        otherwise; in a large folder the next scene takes the place of one that is drawn.
      hold_out_every: of a folder's scene, every so-manieth view is kept for evaluation; 0: none.
      split: name of a published split that says which views of a folder's scene training has, in
        place of hold_out_every, see `splits`.
      with_depth: adds the targets' z-depth [t, h, w] as extras["depth"].
      with_mask: adds the share of the targets' pixels that the object covers, [t, h, w], as
        extras["mask"].
      max_bad_scenes: how many scenes that turn out to be unreadable, themselves or their images,
        one process may replace by the next scene before it stops.
    """

    num_context: int
    num_target: int
    choice: str = "nearest_random"
    nearest: int = 16
    min_distance: int = 25
    max_distance: int = 192
    targets_may_be_context: bool = False
    min_context: int = 0
    crops: tuple[tuple[int, int], ...] = ()
    skip_short_scenes: bool = False
    hold_out_every: int = 8
    split: str = ""
    with_depth: bool = False
    with_mask: bool = False
    max_bad_scenes: int = 0

    @classmethod
    def from_config(cls, config) -> Sampler:
        """Takes the fields of the same name from `config.data`, and defaults for absent ones."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: config.data[name] for name in names if name in config.data})

    def __post_init__(self):
        if self.num_context < 1 or self.num_target < 1:
            raise InputError(
                f"data.num_context={self.num_context} and data.num_target={self.num_target}, "
                "but both have to be at least 1."
            )
        if self.choice not in ("nearest_random", "window", "random"):
            raise InputError(
                f"data.choice={self.choice!r} is none of 'nearest_random', 'window', 'random'."
            )
        fewest = 2 if self.choice == "window" else 1
        if self.min_context and not fewest <= self.min_context <= self.num_context:
            raise InputError(
                f"data.min_context={self.min_context}: expected 0 (off) or a number from {fewest} "
                f"to data.num_context={self.num_context}."
            )
        if any(np.shape(size) != (2,) or min(size) < 1 for size in self.crops):
            raise InputError(f"data.crops={self.crops}: expected pairs (height, width) of pixels.")

    def allowed(self, scene: Any, *, folder: bool) -> np.ndarray:
        """Indices of the views that training may use."""
        if self.split and folder:
            return splits.choose(self.split, len(scene.names)).context
        every = self.hold_out_every if folder else 0
        return views.split_every(len(scene.names), every).context

    def choose(self, scene: Any, allowed: np.ndarray, rng: np.random.Generator) -> views.Choice:
        """Chooses context and targets among the allowed views.

        Raises:
          InputError: the scene is too small.
        """
        counts = {"num_context": self.num_context, "num_target": self.num_target}
        name = _name(scene)
        if self.choice == "nearest_random":
            cameras = scene.cameras[allowed]
            drawn = views.nearest_random(
                cameras,
                rng,
                pool=self.nearest,
                targets_may_be_context=self.targets_may_be_context,
                name=name,
                **counts,
            )
        elif self.choice == "window":
            drawn = views.window(
                len(allowed),
                rng,
                min_distance=self.min_distance,
                max_distance=self.max_distance,
                targets_may_be_context=self.targets_may_be_context,
                name=name,
                **counts,
            )
        else:
            drawn = views.random(len(allowed), rng, name=name, **counts)
        both = None if drawn.drawn is None else allowed[drawn.drawn]
        return views.Choice(allowed[drawn.context], allowed[drawn.target], both)

    @property
    def fewest_views(self) -> int:
        """How many views a scene has to offer."""
        if self.choice == "window":
            return views.shortest_window(self.num_context, self.num_target, self.min_distance)
        return self.num_context + self.num_target

    def usable(self, source: Any) -> Any:
        """The source, with `skip_short_scenes` without a folder's scenes that are too small.

        Where all are, it stays as it is: `check` then says what is too small for what. So does a
        large folder, whose scenes are not known yet.
        """
        if not self.skip_short_scenes or not isinstance(source, sources.FolderScenes):
            return source
        needed = self.fewest_views
        sizes = [len(self.allowed(scene, folder=True)) for scene in source.scenes]
        large = [s for s, size in zip(source.scenes, sizes, strict=True) if size >= needed]
        if not large or len(large) == len(source):
            return source
        logging.warning(
            "Leaving out %d of %d scenes with fewer than %d views (data.skip_short_scenes).",
            len(source) - len(large),
            len(source),
            needed,
        )
        return dataclasses.replace(source, scenes=tuple(large))

    def skips(self, scene: Any) -> bool:
        """Whether a folder's scene is left out for its size."""
        offered = len(self.allowed(scene, folder=True))
        return self.skip_short_scenes and offered < self.fewest_views

    def check(self, source: Any) -> None:
        """Tries the choice on every scene of a folder, on cameras only, before training starts.

        Of a large folder it tries one scene, and of the procedural world, whose scenes have the
        same number of views.

        Raises:
          InputError: a scene is too small, or depth is asked for where there is none.
        """
        folder = isinstance(source, sources.FOLDERS)
        tried = range(len(source) if isinstance(source, sources.FolderScenes) else 1)
        if isinstance(source, sources.LazyScenes):
            tried = [self._example(source)]
        for index in tried:
            scene = source[index]
            self.choose(scene, self.allowed(scene, folder=folder), np.random.default_rng(0))
            if self.with_depth and not getattr(scene, "has_depths", hasattr(scene, "depths")):
                raise InputError(
                    f"data.with_depth is set, but {_name(scene)} has no depth: unset it, put maps "
                    "into a folder 'depth' beside its images, or train on the procedural world. "
                    "With Quark: configs/quark.py:tiny,photos."
                )
            if self.with_mask and not getattr(scene, "has_masks", False):
                raise InputError(
                    f"data.with_mask is set, but {_name(scene)} has views without a mask: give "
                    "every image an alpha channel or a file in the folder 'mask' beside them, or "
                    "set data.with_mask=False and loss.mask_weight=0."
                )

    def _example(self, source: sources.LazyScenes) -> int:
        """One of the first scenes that is long enough; the first of all where none is."""
        for index in range(min(len(source), _TRIED)):
            try:
                if not self.skips(source[index]):
                    return index
            except InputError:
                continue  # bad: met again, and counted, when it is drawn
        return 0


class DrawSample:
    """Scene index and generator -> sample, as `random_map` calls it."""

    def __init__(self, source: Any, sampler: Sampler):
        self._source = source
        self._sampler = sampler
        self._folder = isinstance(source, sources.FOLDERS)
        self._bad: set[int] = set()

    def __call__(self, index: int, rng: np.random.Generator) -> Batch:
        """Draws a sample; a scene that is bad, or short, is replaced by the next scene.

        The same bad scene is met again whenever it is drawn, so that the order stays a function
        of (seed, step): what happened before only decides when to stop.
        """
        sampler = self._sampler
        name = "none"
        for attempt in range(len(self._source)):
            number = (int(index) + attempt) % len(self._source)
            try:
                scene = self._source[number]
            except InputError as error:
                self._replace(number, error)
                continue
            name = _name(scene)
            # Of a folder that was loaded whole, short scenes were left out at the start.
            if isinstance(self._source, sources.LazyScenes) and sampler.skips(scene):
                continue
            choice = sampler.choose(scene, sampler.allowed(scene, folder=self._folder), rng)
            try:
                extras = {"with_depth": sampler.with_depth, "with_mask": sampler.with_mask}
                return assemble(scene, choice, **extras)
            except InputError as error:
                self._replace(number, error)
            except Exception as error:
                error.add_note(f"While views {choice} of {name} were read.")
                raise
        raise InputError(
            f"No scene could be read of {len(self._source)}; the last one is {name}. Those with "
            f"fewer than {sampler.fewest_views} views are left out with data.skip_short_scenes."
        )

    def _replace(self, number: int, error: InputError) -> None:
        """Counts a bad scene, and raises its error where there are too many of them."""
        self._bad.add(number)
        most = self._sampler.max_bad_scenes
        if len(self._bad) > most:
            raise error
        logging.warning("Replacing bad scene (%d of at most %d): %s", len(self._bad), most, error)


class DrawShape:
    """Step and batch -> the batch with the number of inputs and the image size of that step.

    Both depend on (seed, step) alone, on every host; the first inputs stay, which are the ends of
    a `views.window`. A training step is compiled once for each shape.
    """

    def __init__(self, seed: int, sampler: Sampler, first_step: int):
        self._seed, self._sampler, self._first_step = seed, sampler, first_step

    def __call__(self, index: int, batch: Batch) -> Batch:
        sampler = self._sampler
        rng = np.random.default_rng([self._seed, self._first_step + int(index)])
        context, target, extras = batch.context, batch.target, dict(batch.extras)
        if sampler.min_context:
            count = int(rng.integers(sampler.min_context, context.images.shape[1] + 1))
            context = Views(context.images[:, :count], context.cameras[:, :count])
        if sampler.crops:
            size = sampler.crops[int(rng.integers(len(sampler.crops)))]
            for name in ("depth", "mask"):
                if name in extras:
                    extras[name] = extras[name][..., *crop_window(target.cameras, size)]
            context, target = crop(context, size), crop(target, size)
        return Batch(context, target, extras)


def crop(part: Views, size: tuple[int, int]) -> Views:
    """The middle (height, width) pixels of views [...], whose rays stay what they were.

    Raises:
      InputError: see `crop_window`.
    """
    rows, columns = crop_window(part.cameras, size)
    intrinsics = np.array(part.cameras.intrinsics)
    intrinsics[..., 2:] -= np.array([columns.start, rows.start], intrinsics.dtype)
    cameras = dataclasses.replace(
        part.cameras, intrinsics=intrinsics, height=size[0], width=size[1]
    )
    return Views(part.images[..., rows, columns, :], cameras)


def crop_window(cameras: Cameras, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the middle of an image.

    Raises:
      InputError: the images are smaller.
    """
    if size[0] > cameras.height or size[1] > cameras.width:
        raise InputError(
            f"data.crops has {size[0]} x {size[1]} pixels, but images are {cameras.height} x "
            f"{cameras.width}: make data.height and data.width the largest sides of all crops."
        )
    top, left = (cameras.height - size[0]) // 2, (cameras.width - size[1]) // 2
    return slice(top, top + size[0]), slice(left, left + size[1])


def assemble(
    scene: Any, choice: views.Choice, *, with_depth: bool = False, with_mask: bool = False
) -> Batch:
    """Reads the chosen views of a scene, and no others.

    Targets take their near and far from the context, see `views.bounded`.

    Returns:
      A `Batch` without the scene axis: context Views [v], target Views [t], float32; with
      `with_depth` extras["depth"] [t, h, w] in z, with `with_mask` extras["mask"] [t, h, w], and
      extras["drawn_poses"] [v + t, 4, 4] where the choice says which views it was made from.
    """
    extras = {}
    if choice.drawn is not None:
        poses = scene.cameras[choice.drawn].world_from_cam
        extras["drawn_poses"] = np.asarray(poses, np.float32)
    if with_depth:
        extras["depth"] = np.asarray(scene.depths(choice.target), np.float32)
    if with_mask:
        extras["mask"] = np.asarray(scene.masks(choice.target), np.float32)
    context, target = _views(scene, choice.context), _views(scene, choice.target)
    # As in evaluation and rendering, where a target's own range is not known.
    inputs = np.tile(choice.context, (len(choice.target), 1))
    bounded = views.bounded(target.cameras, scene, inputs)
    near, far = bounded.near.astype(np.float32), bounded.far.astype(np.float32)
    cameras = dataclasses.replace(target.cameras, near=near, far=far)
    target = dataclasses.replace(target, cameras=cameras)
    return Batch(context, target, extras)


def stack(samples: Sequence[Batch]) -> Batch:
    """Stacks samples along a new leading scene axis b."""

    def stack_views(parts: Sequence[Views]) -> Views:
        first = parts[0].cameras
        arrays = {
            name: np.stack([getattr(part.cameras, name) for part in parts])
            for name in _CAMERA_ARRAYS
        }
        cameras = Cameras(**arrays, height=first.height, width=first.width)
        return Views(np.stack([part.images for part in parts]), cameras)

    extras = {name: np.stack([s.extras[name] for s in samples]) for name in samples[0].extras}
    return Batch(
        stack_views([s.context for s in samples]), stack_views([s.target for s in samples]), extras
    )


def copy(batch: Batch) -> Batch:
    """The same batch in arrays of its own."""

    def copy_views(part: Views) -> Views:
        cameras = part.cameras
        arrays = {name: np.array(getattr(cameras, name)) for name in _CAMERA_ARRAYS}
        cameras = Cameras(**arrays, height=cameras.height, width=cameras.width)
        return Views(np.array(part.images), cameras)

    extras = {name: np.array(value) for name, value in batch.extras.items()}
    return Batch(copy_views(batch.context), copy_views(batch.target), extras)


def _views(scene: Any, indices: np.ndarray) -> Views:
    cameras = scene.cameras[indices]
    images = np.asarray(scene.images(indices), np.float32)
    if images.shape != (len(indices), cameras.height, cameras.width, 3):
        raise InputError(
            f"{_name(scene)}: images {images.shape} were read, but {len(indices)} images of "
            f"{cameras.height} x {cameras.width} x 3 were expected."
        )
    single = [np.asarray(getattr(cameras, name), np.float32) for name in _CAMERA_ARRAYS]
    return Views(images, Cameras(*single, height=cameras.height, width=cameras.width))


def _name(scene: Any) -> str:
    """What messages call a scene: its path where it has one."""
    return f"scene {getattr(scene, 'path', scene.source)}"
