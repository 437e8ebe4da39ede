"""LPIPS (Zhang et al. 2018) on VGG16 or AlexNet features, from a weights file the user gives.

The trained weights are not part of this library. A weights file is an .npz or .safetensors
with torchvision's names for the trunk and one linear head per feature level:

    features.N.weight  [out, in, kh, kw]   features.N.bias  [out]
        VGG16:   N = 0 2 5 7 10 12 14 17 19 21 24 26 28
        AlexNet: N = 0 3 6 8 10
    linK  [c] or [1, c, 1, 1]              K = 0 1 2 3 4  (also accepted: linK.model.1.weight)

Which network it is follows from the first kernel (3x3 or 11x11). Where PyTorch, torchvision and
the lpips package are installed, this writes such a file (`net = "alex"` and `alexnet` for the
other one):

    import lpips, numpy, torchvision
    net, trunk = "vgg", torchvision.models.vgg16(weights="IMAGENET1K_V1").features
    arrays = {f"features.{k}": v.numpy() for k, v in trunk.state_dict().items()}
    heads = lpips.LPIPS(net=net)
    for k in range(5):
        arrays[f"lin{k}"] = getattr(heads, f"lin{k}").model[1].weight.detach().numpy()
    numpy.savez(f"lpips_{net}.npz", **arrays)

Parameters are a plain nested dict of arrays, so that they pass through `jax.jit` and are held
fixed in training: they are constants of the loss, not variables of the model.
"""

from __future__ import annotations

import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from nvs_common.errors import InputError
from nvs_common.types import Array


class _Conv(NamedTuple):
    """One convolution of a trunk; `level` marks the layers whose output LPIPS compares."""

    index: int
    channels_in: int
    channels_out: int
    kernel: int
    stride: int
    padding: int
    pool_before: bool
    level: int | None


def _vgg16() -> tuple[_Conv, ...]:
    blocks = ((64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14)), (512, (17, 19, 21)))
    layers, channels = [], 3
    for level, (width, indices) in enumerate((*blocks, (512, (24, 26, 28)))):
        for position, index in enumerate(indices):
            last = level if position == len(indices) - 1 else None
            pool = position == 0 and level > 0
            layers.append(_Conv(index, channels, width, 3, 1, 1, pool, last))
            channels = width
    return tuple(layers)


_ALEXNET = (
    _Conv(0, 3, 64, 11, 4, 2, False, 0),
    _Conv(3, 64, 192, 5, 1, 2, True, 1),
    _Conv(6, 192, 384, 3, 1, 1, True, 2),
    _Conv(8, 384, 256, 3, 1, 1, False, 3),
    _Conv(10, 256, 256, 3, 1, 1, False, 4),
)
_TRUNKS = {3: _vgg16(), 11: _ALEXNET}
# Max pooling between levels: (window, stride), and the smallest image that reaches the end.
_POOLS = {3: (2, 2), 11: (3, 2)}
_MIN_SIZE = {3: 16, 11: 31}
_NAMES = {3: "VGG16", 11: "AlexNet"}
# ImageNet statistics for images in [-1, 1], as in the lpips package.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


def load(path: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Reads an LPIPS weights file (.npz or .safetensors; format in the module's docstring).

    Returns:
      {"features": {"N": {"kernel" [kh, kw, in, out], "bias" [out]}}, "heads": {"K": [c]}} in
      float32.

    Raises:
      InputError: no path, a file that cannot be read, or missing, unknown or misshapen arrays.
    """
    if not path:
        raise InputError(
            "LPIPS needs a weights file and none was given; set loss.lpips_weights or pass "
            "--lpips_weights=FILE (nvs_common/perceptual.py says how to write one), or set "
            "loss.lpips_weight to 0."
        )
    path = pathlib.Path(path)
    return from_arrays(read_arrays(path, "LPIPS"), str(path))


def from_arrays(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
    """Checks arrays named as in a weights file and arranges them; `name` is for messages.

    Raises:
      InputError: missing, unknown, misshapen or non-finite arrays.
    """
    first = arrays.get("features.0.weight")
    kernel = first.shape[-1] if first is not None and first.ndim == 4 else None
    if kernel not in _TRUNKS:
        found = "no such array" if first is None else f"shape {first.shape}"
        raise InputError(
            f"{name}: expected features.0.weight of VGG16 (64, 3, 3, 3) or AlexNet "
            f"(64, 3, 11, 11), found {found}; write the file as nvs_common/perceptual.py shows."
        )
    shapes = _expected_shapes(kernel)
    arrays = {k.removesuffix(".model.1.weight"): np.asarray(v) for k, v in arrays.items()}
    missing, unknown = sorted(shapes.keys() - arrays), sorted(arrays.keys() - shapes)
    if missing or unknown:
        raise InputError(
            f"{name}: not an LPIPS file for {_NAMES[kernel]}; missing arrays: "
            f"{', '.join(missing) or 'none'}; unknown arrays: {', '.join(unknown) or 'none'}."
        )
    for key, shape in shapes.items():
        array = arrays[key]
        array = array.reshape(-1) if array.shape == (1, *shape, 1, 1) else array
        if array.shape != shape:
            raise InputError(f"{name}: {key} has shape {array.shape}, expected {shape}.")
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise InputError(f"{name}: {key} must hold finite floating-point numbers.")
        arrays[key] = array.astype(np.float32)
    features = {
        str(layer.index): {
            "kernel": jnp.asarray(arrays[f"features.{layer.index}.weight"].transpose(2, 3, 1, 0)),
            "bias": jnp.asarray(arrays[f"features.{layer.index}.bias"]),
        }
        for layer in _TRUNKS[kernel]
    }
    heads = {str(k): jnp.asarray(arrays[f"lin{k}"]) for k in range(5)}
    return {"features": features, "heads": heads}


def features(params: Mapping[str, Any], images: Array) -> list[Array]:
    """Activations after the last ReLU of each of the five levels.

    Args:
      params: from `load`.
      images: [b, h, w, 3] in [0, 1].

    Returns:
      five arrays [b, y, x, c], coarser and coarser.
    """
    chex.assert_shape(images, (None, None, None, 3))
    kernel = params["features"]["0"]["kernel"].shape[0]
    if min(images.shape[1:3]) < _MIN_SIZE[kernel]:
        raise InputError(
            f"LPIPS with {_NAMES[kernel]} needs images of at least {_MIN_SIZE[kernel]} pixels a "
            f"side, found {images.shape[1]}x{images.shape[2]}."
        )
    shift = jnp.asarray(_SHIFT, jnp.float32).reshape(1, 1, 1, 3)
    scale = jnp.asarray(_SCALE, jnp.float32).reshape(1, 1, 1, 3)
    x = (2.0 * jnp.asarray(images, jnp.float32) - 1.0 - shift) / scale
    levels = []
    for layer in _TRUNKS[kernel]:
        if layer.pool_before:
            x = _max_pool(x, *_POOLS[kernel])
        weights = params["features"][str(layer.index)]
        x = jax.lax.conv_general_dilated(
            x,
            weights["kernel"],
            (layer.stride, layer.stride),
            [(layer.padding, layer.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )
        x = jax.nn.relu(x + weights["bias"].reshape(1, 1, 1, -1))
        if layer.level is not None:
            levels.append(x)
    return levels


def lpips(params: Mapping[str, Any], pred: Array, truth: Array) -> Array:
    """LPIPS distance (version 0.1) of images [..., h, w, 3] in [0, 1], per image [...].

    Squared differences of unit-normalised features, weighted by the heads, averaged over
    pixels and summed over levels; what `lpips.LPIPS(...)(pred, truth, normalize=True)` gives.

    Raises:
      InputError: images too small for the network.
    """
    chex.assert_equal_shape([pred, truth])
    lead, shape = pred.shape[:-3], pred.shape[-3:]
    # Leading axes are counted, not left to -1, so that an empty batch is accepted.
    both = jnp.concatenate([jnp.reshape(x, (int(np.prod(lead)), *shape)) for x in (pred, truth)])
    total = jnp.zeros((both.shape[0] // 2,), jnp.float32)
    for level, activation in enumerate(features(params, both)):
        unit_pred, unit_truth = jnp.split(_unit(activation), 2)
        weighted = jnp.square(unit_pred - unit_truth) @ params["heads"][str(level)]
        total = total + jnp.mean(weighted, axis=(-2, -1))
    return total.reshape(lead)


def read_arrays(path: pathlib.Path, what: str) -> dict[str, np.ndarray]:
    """Arrays of an .npz (without pickles) or a .safetensors file; `what` is for messages.

    Raises:
      InputError: no such file, another kind of file, or one that cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such {what} weights file; give an .npz or .safetensors.")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
        if path.suffix == ".safetensors":
            # Imported where it is used: importing a model must not load file readers.
            import safetensors
            import safetensors.numpy

            try:
                return safetensors.numpy.load_file(path)
            except safetensors.SafetensorError as error:
                raise ValueError(str(error)) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read as {what} weights: {error}") from error
    raise InputError(f"{path}: {what} weights must be an .npz or .safetensors file.")


def _unit(x: Array) -> Array:
    """Divides features [..., c] by their length plus 1e-10, as the lpips package does."""
    # The floor keeps the gradient of the square root finite where all features are zero.
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / (jnp.sqrt(jnp.maximum(squared, 1e-20)) + 1e-10)


def _max_pool(x: Array, window: int, stride: int) -> Array:
    shape, strides = (1, window, window, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, shape, strides, "VALID")


def _expected_shapes(kernel: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in _TRUNKS[kernel]:
        shape = (layer.channels_out, layer.channels_in, layer.kernel, layer.kernel)
        shapes[f"features.{layer.index}.weight"] = shape
        shapes[f"features.{layer.index}.bias"] = (layer.channels_out,)
        if layer.level is not None:
            shapes[f"lin{layer.level}"] = (layer.channels_out,)
    return shapes
