"""Published NeuS checkpoints: from the names and layouts of PyTorch to this library's, and back.

A checkpoint holds four networks; `PREFIXES` lists what they are called. Weight norm is stored as
length and direction (weight_g and weight_v, or parametrizations.weight.original0 and 1).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from nvs_common.errors import InputError
from nvs_common.types import Variables
from vqnerf_jax import field, state_dicts

KIND = "a NeuS checkpoint"
# Ours -> theirs; the first is what released checkpoints say.
PREFIXES = {
    "sdf": ("sdf_network_fine", "sdf_network", "sdf"),
    "color": ("color_network_fine", "color_network", "rendering_network", "color"),
    "deviation": ("variance_network_fine", "variance_network", "deviation_network", "var"),
    "background": ("nerf", "nerf_outside", "background"),
}
_IGNORED = ("optimizer", "iter_step")
_NORM = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}
_HEADS = {
    "density": "alpha_linear",
    "feature": "feature_linear",
    "view": "views_linears.0",
    "rgb": "rgb_linear",
}
# Published names of our fields, by network.
_CONFIG = {
    "sdf": {"d_hidden": "hidden", "n_layers": "layers", "multires": "octaves", "skip_in": "skips"}
    | {"bias": "radius", "scale": "scale", "weight_norm": "weight_norm"},
    "color": {"d_hidden": "color_hidden", "n_layers": "color_layers", "mode": "color_inputs"}
    | {"multires_view": "color_octaves", "d_feature": "features"},
    "deviation": {"init_val": "deviation"},
    "background": {"D": "background_layers", "W": "background_hidden", "skips": "background_skips"}
    | {"multires": "background_octaves", "multires_view": "background_view_octaves"},
    "renderer": {"n_samples": "samples", "n_importance": "importance", "up_sample_steps": "rounds"}
    | {"n_outside": "outside"},
}
_CONFIG_PREFIXES = {**PREFIXES, "renderer": ("neus_renderer", "renderer")}
# Published options that say what is given here anyway, with the only value that is supported.
_FIXED = {
    **{"d_in": (3, 4, 9, 6), "d_out": None, "geometric_init": None, "inside_outside": (False,)},
    **{"squeeze_out": (True,), "d_in_view": (3,), "output_ch": None, "use_viewdirs": (True,)},
    **{"perturb": None, "weight_norm": None},
}


def load_neus(
    source: str | os.PathLike[str] | Mapping[str, Any], **config: Any
) -> tuple[field.SDFField, Variables]:
    """Makes a field and its variables from a published NeuS checkpoint.

    Args:
      source: a file that `nvs_common.torch_weights` reads, or what is in it: for each network its
        state_dict, nested or with the network's name before each array's.
      **config: fields of `SDFField` that arrays do not tell (`samples`, `outside`, ...), or
        sections of the published configuration (`sdf_network=dict(...)`, `neus_renderer=...`),
        which are compared with the arrays. A colour with six inputs beside the features has mode
        "no_view_dir" unless it is said to have "no_normal". `color_space` is "bgr256" for names
        of released checkpoints, whose images were BGR bytes over 256, else "rgb": pass it to
        overrule that.

    Returns:
      The field, with as many `outside` samples as were asked for (by default 32 where there is a
      background's network), and {"params": ...} in float32; float64 where the arrays and JAX are.

    Raises:
      InputError: a file that cannot be read, arrays that are missing, unknown or misshapen, or
        options that are unknown or contradict the arrays.
    """
    name, found = state_dicts.arrays(source, wanted=lambda key: not key.startswith(_IGNORED))
    released = any(key.startswith("sdf_network_fine.") for key in found)
    found = {_renamed(key, name): x for key, x in found.items()}
    given = _fields(config, name)
    sizes = _sizes(found, name, given.get("color_inputs"))
    if isinstance(given.get("skips"), list | tuple):
        # NeuS has no use for one behind the last layer.
        given["skips"] = [i for i in given["skips"] if i <= sizes["layers"]]
    told = {key: x for key, x in sizes.items() if key not in _untold(sizes)}
    state_dicts.compare_config({k: x for k, x in given.items() if k in told}, told, name)
    defaults = {"color_space": "bgr256" if released else "rgb"}
    given = {key: tuple(x) if isinstance(x, list) else x for key, x in given.items()}
    module = field.SDFField(**{**defaults, **sizes, **given})
    if module.outside and not sizes["outside"]:
        raise InputError(f"{name}: outside={module.outside}, but it has no background's network.")
    if not module.outside:
        found = {key: x for key, x in found.items() if not key.startswith("background.")}
    table = _table(module)
    state_dicts.check(found, {key: shape for key, (_, shape) in table.items()}, name, KIND)
    flat = {}
    for key, (path, _) in table.items():
        flat[path] = jnp.asarray(_from_torch(found[key], path))
    return module, {"params": flax.traverse_util.unflatten_dict(flat, sep="/")}


def neus_to_torch(module: field.SDFField, variables: Variables) -> dict[str, np.ndarray]:
    """The arrays of a published checkpoint, "network.array" -> array: the inverse of `load_neus`.

    Raises:
      InputError: the field has parts that NeuS lacks.
    """
    plain = {"renderer": "neus", "rgb_layers": 1, "latent_channels": 0, "grids": ()}
    for name, value in plain.items():
        if getattr(module, name) != value:
            raise InputError(f"{name}={getattr(module, name)!r}: NeuS has {name}={value!r} alone.")
    flat = flax.traverse_util.flatten_dict(dict(variables["params"]), sep="/")
    state = {}
    for key, (path, shape) in _table(module).items():
        network, _, rest = key.partition(".")
        x = np.asarray(flat[path])
        x = x.T if path.endswith("kernel") else x
        state[f"{PREFIXES[network][0]}.{rest}"] = np.ascontiguousarray(x).reshape(shape)
    return state


def _renamed(key: str, name: str) -> str:
    """The array's name with our name of its network before it."""
    prefix, _, rest = key.partition(".")
    for ours, theirs in PREFIXES.items():
        if prefix in theirs:
            for new, old in _NORM.items():
                rest = rest.replace(new, old)
            return f"{ours}.{rest}"
    known = [prefix for prefixes in PREFIXES.values() for prefix in prefixes]
    raise InputError(f"{name}: {key} belongs to no network of NeuS; these are called {known}.")


def _fields(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Our fields from ours and sections of the published configuration."""
    known = {one.name for one in dataclasses.fields(field.SDFField)} - {"parent", "name"}
    sections = {theirs: ours for ours, many in _CONFIG_PREFIXES.items() for theirs in many}
    given: dict[str, Any] = {}
    for key, value in config.items():
        # `renderer` is a section of theirs and a field of ours.
        if key in sections and isinstance(value, Mapping):
            given |= _section(sections[key], key, value, name)
        elif key in known:
            given[key] = value
        else:
            raise InputError(
                f"{name}: unknown option {key!r}; known are {sorted(known)} and the sections "
                f"{sorted(sections)}."
            )
    return given


def _section(network: str, said: str, values: Mapping[str, Any], name: str) -> dict[str, Any]:
    given, names = {}, _CONFIG[network]
    for key, value in values.items():
        if key in names:
            given[names[key]] = value
        elif key not in _FIXED or (_FIXED[key] is not None and value not in _FIXED[key]):
            raise InputError(f"{name}: {said}.{key}={value!r} is no option that is supported here.")
    if network == "sdf" and "d_out" in values:
        given["features"] = values["d_out"] - 1
    return given


def _untold(sizes: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields among `_sizes` that are no more than defaults."""
    return ("outside", "color_octaves") if sizes["color_inputs"] == "no_view_dir" else ("outside",)


def _sizes(found: Mapping[str, np.ndarray], name: str, said: str | None) -> dict[str, Any]:
    """Fields that the arrays tell; `said` is what was said of the colour's inputs."""

    def width(network: str, layer: str) -> tuple[int, ...]:
        key = f"{network}.{layer}.weight_v"
        key = key if key in found else f"{network}.{layer}.weight"
        return state_dicts.get(found, key, 2, name, KIND).shape

    layers, color_layers = (_count(found, rf"{n}\.lin(\d{{1,2}})\.") - 1 for n in ("sdf", "color"))
    if layers < 1 or color_layers < 1:
        raise InputError(f"{name}: sdf and color networks need two layers, lin0 and lin1, or more.")
    encoded, features = width("sdf", "lin0")[1], width("sdf", f"lin{layers}")[0] - 1
    widths = [width("sdf", f"lin{i}")[0] for i in range(layers)]
    hidden = width("sdf", f"lin{layers}")[1]
    inputs = width("color", "lin0")[1] - features
    # Point, gradient and encoded direction are 3, 3 and 3 + 6 per octave.
    mode = {3: "idr", 0: "no_normal"}.get(inputs % 6, "?")
    # Six are a point and a gradient, or a point and a direction that is not encoded.
    if inputs == 6:
        mode = "no_normal" if said == "no_normal" else "no_view_dir"
    if encoded % 6 != 3 or mode == "?" or inputs < 6:
        raise InputError(
            f"{name}: the distance has {encoded} inputs and the colour {inputs} beside the "
            "features; these are no encodings of points and directions."
        )
    octaves = {"idr": (inputs - 9) // 6, "no_normal": (inputs - 6) // 6}
    sizes: dict[str, Any] = dict(
        layers=layers,
        hidden=hidden,
        features=features,
        octaves=(encoded - 3) // 6,
        skips=tuple(i + 1 for i, w in enumerate(widths) if w == hidden - encoded),
        weight_norm="sdf.lin0.weight_v" in found,
        color_layers=color_layers,
        color_hidden=width("color", "lin0")[0],
        color_inputs=mode,
        color_octaves=octaves.get(mode, 4),
        outside=0,
    )
    if any(key.startswith("background.") for key in found):
        sizes |= _background_sizes(found, width)
    return sizes


def _background_sizes(found: Mapping[str, np.ndarray], width: Any) -> dict[str, Any]:
    layers = _count(found, r"background\.pts_linears\.(\d{1,2})\.")
    hidden, encoded = width("background", "pts_linears.0")
    inputs = [width("background", f"pts_linears.{i}")[1] for i in range(1, layers)]
    inputs.append(width("background", "feature_linear")[1])
    views = width("background", "views_linears.0")[1] - hidden
    return dict(
        outside=32,
        background_layers=layers,
        background_hidden=hidden,
        background_octaves=(encoded - 4) // 8,
        background_view_octaves=(views - 3) // 6,
        background_skips=tuple(i for i, w in enumerate(inputs) if w == hidden + encoded),
    )


def _count(found: Mapping[str, np.ndarray], pattern: str) -> int:
    numbers = (re.match(pattern, key) for key in found)
    return max((int(match[1]) + 1 for match in numbers if match), default=0)


def _table(module: field.SDFField) -> dict[str, tuple[str, tuple[int, ...]]]:
    """ "network.array", with our name of the network -> our path and the shape there."""
    ray = jax.ShapeDtypeStruct((1, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), ray, ray)["params"]
    table = {}
    flat: Any = flax.traverse_util.flatten_dict(shapes, sep="/")
    for path, leaf in flat.items():
        network, _, rest = path.partition("/")
        layer, _, kind = rest.partition("/")
        shape = leaf.shape[::-1]
        if network == "deviation":
            key = "deviation.variance"
        elif network == "background":
            published = _HEADS.get(layer, layer.replace("layer_", "pts_linears."))
            key = f"background.{published}.{'bias' if kind == 'bias' else 'weight'}"
        else:
            number = int(layer.removeprefix("layer_"))
            number += module.color_layers if network == "rgb" else 0
            weight = "weight_v" if module.weight_norm else "weight"
            kind = {"kernel": weight, "scale": "weight_g", "bias": "bias"}[kind]
            key = f"{'color' if network == 'rgb' else network}.lin{number}.{kind}"
            shape = (*shape, 1) if kind == "weight_g" else shape
        table[key] = (path, shape)
    return table


def _from_torch(x: np.ndarray, path: str) -> np.ndarray:
    if path.endswith("scale"):
        return x.reshape(-1)
    return x.T if path.endswith("kernel") else x
