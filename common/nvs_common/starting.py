"""What a run starts from where `config.init_from` names another run, or released weights."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Sequence
from typing import Any

from nvs_common import checkpoint, errors, weights
from nvs_common.types import Variables

_log = logging.getLogger(__name__)


def initial_params(source: str | pathlib.Path, like: Any, new: Sequence[str] = ()) -> Any:
    """The parameters of `initial_variables`."""
    return initial_variables(source, {"params": like}, new)["params"]


def initial_variables(
    source: str | pathlib.Path, like: Variables, new: Sequence[str] = ()
) -> dict[str, Any]:
    """What a run starts from: a run's newest checkpoint, or a file of released weights.

    Of a run they are the EMA parameters where it has them. Collections, such as codes that are
    running means, come along where they have the same arrays; "schedule" counts the steps of a
    run and never does.

    Args:
      source: a run's folder, or a file that `weights.write` has written.
      like: the new run's variables, or their shapes.
      new: starts of names, such as "cross_", of top-level parts that the source need not have.

    Returns:
      "params", without those of these parts that the source lacks, and collections.

    Raises:
      InputError: nothing whole there, or its parameters have other names or shapes.
    """
    if pathlib.Path(source).is_file():
        variables = weights.read(source).variables
    else:
        variables = checkpoint.load_variables(source)[1]
    params, wanted = (
        _without(variables["params"], like["params"], new),
        _without(like["params"], variables["params"], new),
    )
    if wrong := _differences(params, wanted):
        raise errors.InputError(
            f"init_from={source} holds another model: {wrong}; start from one whose "
            "config.model has the same network, or name in config.init_new what it may lack."
        )
    found = {"params": params}
    for name in sorted(set(like) - {"params", "schedule"}):
        if wrong := _differences(variables.get(name, {}), like[name]):
            _log.warning("init_from=%s: %r starts anew: %s", source, name, wrong)
        else:
            found[name] = variables[name]
    return found


def _without(tree: Any, other: Any, new: Sequence[str]) -> dict[str, Any]:
    """A tree without the parts that may be new and that another tree lacks."""
    lacks = lambda name: name not in other and name.startswith(tuple(new))  # noqa: E731
    return {name: part for name, part in tree.items() if not lacks(name)}


def _differences(there: Any, here: Any) -> str:
    shapes = checkpoint.array_shapes(there), checkpoint.array_shapes(here)
    return checkpoint.shape_differences(*shapes)
