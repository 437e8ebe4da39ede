"""Published arrays by name: reading, flattening, and checking them against what is expected."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nvs_common import torch_weights
from nvs_common.errors import InputError

# Names that an error lists one by one.
MAX_LISTED = 40
# What checkpoints keep their state_dict in.
_WRAPPERS = ("state_dict", "model")


def arrays(
    source: str | os.PathLike[str] | Mapping[str, Any], *, wanted: Callable[[str], bool]
) -> tuple[str, dict[str, np.ndarray]]:
    """The floating-point arrays of a file or mapping.

    Args:
      source: a file that `nvs_common.torch_weights` reads, or what is in it: name -> array,
        perhaps nested or inside {"state_dict": ...}.
      wanted: name of an array, levels separated by dots, as below -> whether it is of use.

    Returns:
      What to call the source in a message, and name -> array. Levels are separated by dots;
      float64 stays, what has fewer bits becomes float32.

    Raises:
      InputError: a file that cannot be read, or wanted arrays that are no finite floats.
    """
    if isinstance(source, Mapping):
        name, content = "the mapping", dict(source)
    else:
        name = str(source)
        content = torch_weights.read(source, wanted=lambda key: _is_wanted(key, wanted))
    for wrapper in _WRAPPERS:
        while isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    flat = _flat(content, "")
    found = {torch_weights.unwrapped(key): x for key, x in flat.items()}
    if len(found) < len(flat):
        raise InputError(f"{name}: holds arrays twice, with and without {torch_weights.WRAPPERS}.")
    found = {key: x for key, x in found.items() if wanted(key)}
    return name, {key: torch_weights.floats(x, f"{name}: {key}") for key, x in found.items()}


def check(
    found: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], name: str, kind: str
) -> None:
    """Compares names and shapes with those of a module.

    Raises:
      InputError: lists what is missing, unknown or misshapen; `kind` says what was expected.
    """
    missing, unknown = sorted(expected.keys() - found), sorted(found.keys() - expected)
    if missing or unknown:
        raise InputError(
            f"{name}: not the arrays of {kind}; missing: {listed(missing)}; unknown: "
            f"{listed(unknown)}."
        )
    for key, shape in expected.items():
        if found[key].shape != shape:
            raise InputError(f"{name}: {key} has shape {found[key].shape}, expected {shape}.")


def get(found: Mapping[str, np.ndarray], key: str, rank: int, name: str, kind: str) -> np.ndarray:
    """An array that tells a size, of the given rank.

    Raises:
      InputError: it is missing, empty or of another rank.
    """
    if key not in found or found[key].ndim != rank or 0 in found[key].shape:
        there = ", ".join(sorted(found)[:3])
        was = f"shape {found[key].shape}" if key in found else f"no such array, but {there}, ..."
        raise InputError(f"{name}: expected {key} of rank {rank}, found {was}; this is not {kind}.")
    return found[key]


def listed(names: list[str]) -> str:
    """Names for a message, not too many."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return (", ".join(names[:MAX_LISTED]) or "none") + more


def compare_config(
    given: Mapping[str, Any], known: Mapping[str, Any], name: str, ignored: tuple[str, ...] = ()
) -> None:
    """Compares a published configuration with what the arrays say.

    Raises:
      InputError: a field that is unknown, or differs from the arrays. Names with an underscore
        before them are notes of the library that wrote the configuration.
    """
    unknown = [key for key in sorted(given.keys() - known.keys()) if key not in ignored]
    if unknown := [key for key in unknown if not key.startswith("_")]:
        raise InputError(f"{name}: unknown options {unknown}; known are {sorted(known)}.")
    for key in given.keys() & known.keys():
        value = given[key]
        value = list(value) if isinstance(value, tuple) else value
        told = list(known[key]) if isinstance(known[key], tuple) else known[key]
        if value != told:
            raise InputError(
                f"{name}: {key}={given[key]!r} was given, but the arrays say {known[key]!r}; give "
                "the configuration that belongs to these weights, or leave the option out."
            )


def _is_wanted(key: str, wanted: Callable[[str], bool]) -> bool:
    """Asks about an array of a file by the name that it gets here."""
    name = key.replace("/", ".")
    for wrapper in _WRAPPERS:
        name = name.removeprefix(f"{wrapper}.")
    return wanted(torch_weights.unwrapped(name))


def _flat(content: Mapping[str, Any], above: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{above}{key}".replace("/", ".")
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat
