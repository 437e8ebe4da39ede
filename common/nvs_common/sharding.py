"""Mesh, the table from logical names to mesh axes, and the one constraint for activations.

Modules hold plain parameters; how they are laid out is said in two tables. A system lists the
logical names of its parameters (`PARAM_AXES`: regex on the path -> names, one row each) and
`RULES` maps names to mesh axes. Names of activations start with `act_`, so that a parameter
dimension and an activation dimension may go to the same mesh axis without a clash.

A dimension that its mesh axes do not divide is replicated where that is cheap (activations,
and parameters below REPLICATE_BELOW elements: biases, RGB heads); a larger parameter is an error.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nvs_common import errors
from nvs_common.types import Array, Names

AXES = ("data", "fsdp", "tensor", "context")
Rules: TypeAlias = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
    # Parameters.
    "embed": "fsdp",  # model width: the dimension that is gathered for use
    "in": "fsdp",  # input features of a convolution or a dense layer
    "out": "tensor",  # its output features
    "mlp": "tensor",  # hidden width of an MLP
    "heads": "tensor",  # attention heads, or heads x features merged
    "codes": "tensor",  # rows of a codebook
    "layer": None,  # layers stacked by a scan
    # Activations.
    "act_batch": ("data", "fsdp"),
    "act_view": "context",
    "act_token": "context",
    "act_embed": None,
    "act_mlp": "tensor",
    "act_heads": "tensor",
}

# A parameter with fewer elements may be replicated where its axis does not divide (256 KiB).
REPLICATE_BELOW = 2**16

# Rules are not part of jit's cache key: set them once around everything that is compiled.
_RULES: contextvars.ContextVar[Rules | None] = contextvars.ContextVar("axis_rules", default=None)


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh over (data, fsdp, tensor, context), every axis of type Auto.

    Args:
      axes: size of each axis; a missing one is 1 and one may be -1 (what is left).
      devices: the devices to use, all by default.

    Raises:
      InputError: an unknown axis, or sizes that do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    unknown = sorted(set(axes) - set(AXES))
    if unknown:
        raise errors.InputError(f"mesh: unknown axes {unknown}; the axes are {list(AXES)}.")
    sizes = {name: int(axes.get(name, 1)) for name in AXES}
    said = " x ".join(f"{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise errors.InputError(f"mesh {said}: sizes are at least 1, and only one may be -1.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % known or (not free and known != len(devices)):
        raise errors.InputError(
            f"mesh {said} needs {'a multiple of ' if free else ''}{known} devices, but "
            f"{len(devices)} are here; change config.mesh, one size may be -1."
        )
    if free:
        sizes[free[0]] = len(devices) // known
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


@contextlib.contextmanager
def axis_rules(rules: Rules = RULES) -> Iterator[None]:
    """Sets the table from logical names to mesh axes for what is traced inside."""
    token = _RULES.set(rules)
    try:
        yield
    finally:
        _RULES.reset(token)


def constrain(x: Array, names: Names) -> Array:
    """Pins the layout of an activation; without a mesh or rules it returns x.

    Args:
      x: any array.
      names: one logical name (or None) for each dimension of x.

    Raises:
      ValueError: as many names as x has dimensions are needed, and each must be in the rules.
    """
    rules = _RULES.get()
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty or not mesh.are_all_axes_auto:
        return x
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} names {tuple(names)} for an array of shape {x.shape}")
    wanted = [_mesh_axes(name, rules) for name in names]
    spec = [
        axes if _divides(dim, axes, mesh.shape) else None
        for dim, axes in zip(x.shape, wanted, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, P(*spec))


def param_specs(
    params: Any, axes: Mapping[str, Names], mesh: Mesh | None = None, rules: Rules = RULES
) -> Any:
    """The PartitionSpec of every parameter.

    Args:
      params: tree of arrays or of ShapeDtypeStructs.
      axes: regex on the whole path ("blocks/attn/qkv/kernel") -> a logical name for each
        dimension; each parameter matches exactly one row, and each row matches something.
      mesh: checks divisibility; without it no dimension is replicated for its size.
      rules: logical name -> mesh axes.

    Returns:
      The same tree with a PartitionSpec for each leaf.

    Raises:
      ValueError: names the parameters that match no row or several, rows that match nothing,
        rows of the wrong length and unknown logical names.
      InputError: a large parameter has a dimension that the mesh does not divide.
    """
    used, wrong = set(), []

    def one(path, leaf):
        name = path_name(path)
        hits = [pattern for pattern in axes if re.fullmatch(pattern, name)]
        used.update(hits)
        if len(hits) != 1:
            wrong.append(f"{name} {leaf.shape} matches {hits or 'no row'}")
            return P()
        if len(axes[hits[0]]) != leaf.ndim:
            wrong.append(f"{name} {leaf.shape} has another rank than {tuple(axes[hits[0]])}")
            return P()
        wanted = [_mesh_axes(logical, rules) for logical in axes[hits[0]]]
        if twice := _used_twice(wanted):
            wrong.append(f"{name} {tuple(axes[hits[0]])}: two dimensions go to axis {twice!r}")
            return P()
        return P(*wanted) if mesh is None else _fit(name, leaf.shape, wanted, mesh)

    specs = jax.tree_util.tree_map_with_path(one, params)
    if unused := sorted(set(axes) - used):
        wrong.append(f"rows that match nothing: {unused}")
    if wrong:
        raise ValueError("parameters and their axes disagree: " + "; ".join(wrong))
    return specs


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Layout of a batch: scenes over data and fsdp, all other dimensions whole."""
    return NamedSharding(mesh, P(RULES["act_batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Layout of what every device holds whole."""
    return NamedSharding(mesh, P())


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as one string, "blocks/attn/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _mesh_axes(name: str | None, rules: Rules) -> str | tuple[str, ...] | None:
    if name is None:
        return None
    if name not in rules:
        raise ValueError(f"no rule for the logical axis {name!r}; there are {sorted(rules)}")
    return rules[name]


def _divides(dim: int, axes: str | tuple[str, ...] | None, sizes: Mapping[str, int]) -> bool:
    return dim % math.prod(sizes[name] for name in _as_tuple(axes)) == 0


def _used_twice(wanted: Sequence[str | tuple[str, ...] | None]) -> str | None:
    """A mesh axis that two dimensions ask for, if there is one."""
    used = [axis for part in wanted for axis in _as_tuple(part)]
    return next((axis for axis in used if used.count(axis) > 1), None)


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else (axes or ())


def _fit(name: str, shape: tuple[int, ...], wanted: Sequence[Any], mesh: Mesh) -> P:
    """The spec, with None for dimensions that do not divide; large parameters must divide."""
    fits = [_divides(dim, axes, mesh.shape) for dim, axes in zip(shape, wanted, strict=True)]
    if not all(fits) and math.prod(shape) >= REPLICATE_BELOW:
        index = fits.index(False)
        raise errors.InputError(
            f"parameter {name} {shape}: dimension {index} does not divide over mesh axis "
            f"{wanted[index]!r} (mesh {dict(mesh.shape)}); change config.mesh or the model's width."
        )
    return P(*(axes if ok else None for axes, ok in zip(wanted, fits, strict=True)))
