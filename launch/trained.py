"""What evaluation and rendering share: a trained model, a size, scenes from a path."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any, NamedTuple

from absl import flags

from launch import tasks
from nvs_common import checkpoint
from nvs_common.data import layouts, scenes, sources
from nvs_common.errors import InputError
from nvs_common.types import Task, Variables


class Trained(NamedTuple):
    """A run's config, its task, and the variables of one of its checkpoints."""

    config: Any
    task: Task
    variables: Variables
    step: int


SET = flags.DEFINE_multi_string(
    "set",
    [],
    "FIELD=VALUE changes the run's config for this program, e.g. model.grid_area=28672 for a finer "
    "map than in training, or model.dtype=bfloat16. Repeat it for several fields.",
)


def load(workdir: str, step: int | None) -> Trained:
    """Loads a checkpoint of a run, the newest if `step` is None; `--set` changes its config.

    Raises:
      InputError: no such run or step, a damaged checkpoint, a system that is unknown here, or a
        field that the config does not have.
    """
    folder = pathlib.Path(workdir) / checkpoint.FOLDER
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdecimal()]
    step = max(steps, default=None) if step is None else step
    config, variables = checkpoint.load_variables(workdir, step)
    if config.system not in tasks.TASKS:
        raise InputError(
            f"{workdir}: the run's system {config.system!r} is unknown here; known are "
            f"{sorted(tasks.TASKS)}."
        )
    for text in SET.value:
        _change(config, text)
    assert step is not None  # load_variables has refused a run without steps
    return Trained(config, tasks.TASKS[config.system](config), variables, step)


def _change(config: Any, text: str) -> None:
    """Sets one field of the config to the value of "FIELD=VALUE", of the type it has."""
    name, equals, value = text.partition("=")
    *path, last = name.split(".")
    section: Any = config
    for part in path:
        section = section.get(part, None) if hasattr(section, "get") else {}
    if not equals or not hasattr(section, "get") or last not in section.keys():
        raise InputError(f"--set={text}: expected FIELD=VALUE with a field of the run's config.")
    try:
        # JSON has the numbers, booleans and lists; all else is text.
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    try:
        section[last] = parsed
    except TypeError as error:
        raise InputError(f"--set={text}: {error}") from error


def size(text: str, config: Any) -> tuple[int, int] | None:
    """(height, width) of `--size`: HxW, "auto" the training size, "native" None.

    Raises:
      InputError: something else.
    """
    if text == "auto":
        return config.data.height, config.data.width
    if text == "native":
        return None
    if match := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text):
        return int(match[1]), int(match[2])
    raise InputError(f"--size={text!r}: expected HEIGHTxWIDTH such as 288x512, auto or native.")


def scene(text: str, config: Any, size: tuple[int, int] | None) -> Any:
    """One scene: a folder, or "procedural:SEED" with as many views as the run trained on.

    Raises:
      InputError: no scene there, or it cannot be loaded; a seed that is not a number.
    """
    if not text.startswith("procedural:"):
        return scenes.load_measured(text, size=size)
    seed = text.removeprefix("procedural:")
    if not seed.isdecimal():
        raise InputError(f"--scene={text!r}: expected procedural:SEED with a whole number.")
    return sources.world(config, int(seed), 1, size)[0]


def scenes_at(path: str, size: tuple[int, int] | None) -> list[tuple[str, Any]]:
    """(name, scene) of a scene folder, or of every scene inside a folder; a bad one raises.

    Raises:
      InputError: names the scene and the reason.
    """
    place = pathlib.Path(path)
    try:
        layouts.recognise(place)
        found = [place]
    except InputError as error:
        if not place.is_dir():
            raise
        try:
            found = scenes.find_scenes(place)
        except InputError:
            raise error from None  # says which layouts are known
    return [(p.resolve().name, scenes.load_measured(p, size=size)) for p in found]
