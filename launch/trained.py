"""What evaluation and rendering share: a trained model, a size, scenes from a path."""

from __future__ import annotations

import ast
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from launch import tasks
from nvs_common import checkpoint, runs, weights
from nvs_common.data import layouts, scenes, sources
from nvs_common.errors import InputError
from nvs_common.types import Batch, Cameras, Task, Variables, Views

# The flags belong to the program that asks for them, so that its `--help` lists them.
flags.disclaim_key_flags()


# Weights that come with the checkout.
DEFAULT = "default"
DEFAULT_WEIGHTS = pathlib.Path(__file__).resolve().parent.parent / "weights" / "quark_small.npz"


# A scene of the procedural world: procedural:SEED.
PROCEDURAL = "procedural:"


class Source(NamedTuple):
    """The flags that say where a trained model comes from; see `define_source`."""

    workdir: Any
    step: Any
    weights: Any
    set: Any


class Trained(NamedTuple):
    """A trained model: its config, its task, and the variables of one step.

    Attributes:
      config: of the run, with the changes of `--set`.
      task: made from it.
      variables: EMA parameters where there are any, and collections.
      step: of the training.
      path: the run's folder or the weights' file.
      training: JSON mapping, what is known of the training: command, devices, versions; {} where
        nothing is.
    """

    config: Any
    task: Task
    variables: Variables
    step: int
    path: pathlib.Path
    training: Mapping[str, Any]


def define_source() -> Source:
    """Defines `--workdir`, `--step`, `--weights` and `--set` for the program that calls."""
    return Source(
        flags.DEFINE_string("workdir", None, "Folder of a training run; or pass --weights."),
        flags.DEFINE_integer("step", None, "Checkpoint of the run; the newest by default."),
        flags.DEFINE_string(
            "weights",
            None,
            "Weights that launch/release.py has written, in place of --workdir; default means "
            "those of the checkout, weights/quark_small.npz.",
        ),
        flags.DEFINE_multi_string(
            "set",
            [],
            "FIELD=VALUE changes the run's config for this program, e.g. model.upsampling=1.5 for "
            "a finer map than in training, or model.dtype=bfloat16. Repeat it for several fields.",
        ),
    )


def load(source: Source) -> Trained:
    """Loads what the flags name: a checkpoint of a run, or released weights.

    Raises:
      InputError: not exactly one of `--workdir` and `--weights`, no such run, step or file, a
        damaged one, a system that is unknown here, a field that the config does not have, or
        parameters of another model than the config's.
    """
    workdir, step, file = source.workdir.value, source.step.value, source.weights.value
    if bool(workdir) == bool(file):
        raise InputError(
            "pass --workdir=RUN (a training run) or --weights=FILE (released weights, or default), "
            f"exactly one of the two; {'both' if file else 'neither'} was given."
        )
    if file and step is not None:
        raise InputError(f"--step={step}: released weights are of one step; leave the flag out.")
    found = _released(file) if file else load_run(workdir, step)
    path = DEFAULT_WEIGHTS if file == DEFAULT else pathlib.Path(file or workdir)
    return _prepare(found, path, source.set.value)


def load_path(text: str, changes: Sequence[str] = ()) -> Trained:
    """Loads the newest checkpoint of a run's folder, or released weights, or "default".

    Args:
      text: the folder or file.
      changes: as `--set`.

    Raises:
      InputError: as `load`.
    """
    if pathlib.Path(text).is_dir():
        return _prepare(load_run(text, None), pathlib.Path(text), changes)
    path = DEFAULT_WEIGHTS if text == DEFAULT else pathlib.Path(text)
    return _prepare(_released(text), path, changes)


def _prepare(found: weights.Weights, path: pathlib.Path, changes: Sequence[str]) -> Trained:
    """The task of loaded weights, with changes of the config, checked against each other."""
    config, variables = found.config, found.variables
    if config.system not in tasks.TASKS:
        raise InputError(
            f"{path}: its system {config.system!r} is unknown here; known are "
            f"{sorted(tasks.TASKS)}."
        )
    for text in changes:
        _change(config, text)
    runs.check_sizes(config)
    task = tasks.TASKS[config.system](config)
    check_shapes(task, config, variables, path)
    return Trained(config, task, variables, found.step, path, found.training)


def load_run(workdir: str, step: int | None) -> weights.Weights:
    """Loads a checkpoint of a run, the newest if `step` is None, and what its run.json says.

    Raises:
      InputError: no such run or step, or a damaged checkpoint.
    """
    step = checkpoint.newest_step(workdir) if step is None else step
    config, variables = checkpoint.load_variables(workdir, step)
    assert step is not None  # load_variables has refused a run without steps
    return weights.Weights(config, variables, step, _session(pathlib.Path(workdir), step))


def _session(workdir: pathlib.Path, step: int) -> Mapping[str, Any]:
    """What run.json says of the session that saved a step; {} where it says nothing."""
    record = workdir / "run.json"
    if not record.is_file():
        return {}
    try:
        sessions = json.loads(record.read_text())["sessions"]
        return [s for s in sessions if s["start_step"] < step][-1]
    except (ValueError, LookupError, TypeError) as e:
        raise InputError(f"{record}: not the record of this run ({e}); remove the file.") from e


def _released(file: str) -> weights.Weights:
    if file != DEFAULT:
        return weights.read(file)
    if not DEFAULT_WEIGHTS.is_file():
        raise InputError(
            f"--weights=default: {DEFAULT_WEIGHTS} does not exist yet; make it from a run with "
            "python launch/release.py --workdir=RUN --out=weights/quark_small.npz"
        )
    return weights.read(DEFAULT_WEIGHTS)


def check_shapes(task: Task, config: Any, variables: Variables, path: pathlib.Path) -> None:
    """Compares variables with those that the task would make, without computing any.

    Raises:
      InputError: names the first arrays that are missing, unknown or of another shape.
    """
    data = config.data
    made = abstract_variables(task, data.num_context, data.height, data.width)
    there, here = checkpoint.array_shapes(dict(variables)), checkpoint.array_shapes(dict(made))
    if wrong := checkpoint.shape_differences(there, here):
        raise InputError(
            f"{path}: its parameters are not those of its config: {wrong}; fields that change the "
            "parameters cannot be --set, and a file that was changed by hand has to be released "
            "again."
        )


def abstract_variables(task: Task, num_inputs: int, height: int, width: int) -> Variables:
    """Shapes of the variables that a task makes for inputs and targets of a size."""
    inputs, targets = (_abstract_views(count, height, width) for count in (num_inputs, 1))
    return jax.eval_shape(task.init, jax.random.key(0), Batch(inputs, targets))


def _abstract_views(count: int, height: int, width: int) -> Views:
    """Shapes of views [1, count]."""

    def shape(*sides: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, count, *sides), np.float32)

    cameras = Cameras(shape(4, 4), shape(4), shape(), shape(), height, width)
    return Views(shape(height, width, 3), cameras)


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
        section[last] = _parse(value)
    except TypeError as error:
        raise InputError(f"--set={text}: {error}") from error


def _parse(value: str) -> Any:
    """JSON has the numbers, booleans and lists, Python the tuples of configs; all else is text."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        pass
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def size(text: str, config: Any, *, photographs: bool) -> tuple[int, int] | None:
    """(height, width) of `--size`: HxW; "native" is None.

    "auto" is the size of training, or for photographs `config.eval.photo_size` where the config
    has one.

    Raises:
      InputError: something else.
    """
    if text == "auto":
        photo_size = config.eval.get("photo_size") if photographs and "eval" in config else None
        return tuple(photo_size) if photo_size else (config.data.height, config.data.width)
    if text == "native":
        return None
    if match := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text):
        return int(match[1]), int(match[2])
    raise InputError(f"--size={text!r}: expected HEIGHTxWIDTH such as 288x512, auto or native.")


def scene(text: str, config: Any, size: tuple[int, int] | None) -> Any:
    """One scene: a folder, or "procedural:SEED" with the cameras that the model is evaluated with.

    Raises:
      InputError: no scene there, or it cannot be loaded; a seed that is not a number.
    """
    if not text.startswith(PROCEDURAL):
        return scenes.load_measured(text, size=size)
    seed = text.removeprefix(PROCEDURAL)
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
        if not place.exists():
            raise
        try:
            found = scenes.find_scenes(place)
        except InputError:
            raise error from None  # says which layouts are known
    return [(p.resolve().name, scenes.load_measured(p, size=size)) for p in found]
