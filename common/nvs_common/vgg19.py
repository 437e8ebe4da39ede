"""The perceptual loss of LVSM and GS-LRM: L1 between VGG-19 features of prediction and truth.

Not LPIPS: max pooling is replaced by average pooling, features are not normalised, and nothing was
trained for it. The weights are those of the original network of Simonyan and Zisserman (ICLR
2015), which takes 255 * RGB minus a mean colour; the user gives them as

- `imagenet-vgg-verydeep-19.mat`, as MatConvNet distributes it; or
- an .npz or .safetensors with torchvision's names `features.N.weight` [out, in, 3, 3] and
  `features.N.bias` [out], N = 0 2 5 7 10 12 14 16 19 21 23 25 28 30. Later layers are ignored.

The weights that torchvision itself distributes were trained for other inputs (divided by a
standard deviation): under the same names they give another loss.

Parameters are a plain nested dict of arrays: constants of the loss, not variables of the model.
"""

from __future__ import annotations

import os
import pathlib
import re
import zlib
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from nvs_common import perceptual
from nvs_common.errors import InputError
from nvs_common.types import Array

# Index and width of the convolutions of each block, after which features are compared: relu1_2,
# relu2_2, relu3_2, relu4_2 and relu5_2. A block ends in the middle of a resolution.
_BLOCKS = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256)),
    ((14, 256), (16, 256), (19, 512), (21, 512)),
    ((23, 512), (25, 512), (28, 512), (30, 512)),
)
# Pooling comes before these convolutions.
_POOLED = (5, 10, 19, 28)
# Weights of the pixels' term and of each block's.
_TERMS = (1.0, 1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)
# Mean colour of the training images, RGB of 255.
_MEAN = (123.68, 116.779, 103.939)
MIN_SIZE = 16
_KNOWN = re.compile(r"(features|classifier)\.\d+\.(weight|bias)")


def load(path: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Reads the weights file (.mat, .npz or .safetensors; see the module's docstring).

    Returns:
      {"N": {"kernel" [3, 3, in, out], "bias" [out]}} in float32.

    Raises:
      InputError: no path, a file that cannot be read, or missing, unknown or misshapen arrays.
    """
    if not path:
        raise InputError(
            "the perceptual loss needs the weights of VGG-19 and none were given: set "
            "loss.perceptual_weights to your imagenet-vgg-verydeep-19.mat "
            "(nvs_common/vgg19.py says which files serve), or loss.perceptual_weight to 0."
        )
    path = pathlib.Path(path)
    if path.suffix == ".mat":
        return from_arrays(_read_mat(path), str(path))
    return from_arrays(perceptual.read_arrays(path, "VGG-19"), str(path))


def from_arrays(arrays: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Checks arrays with torchvision's names and arranges them; `name` is for messages.

    Raises:
      InputError: missing, unknown, misshapen or non-finite arrays.
    """
    params, channels = {}, 3
    unknown = sorted(key for key in arrays if not _KNOWN.fullmatch(key))
    wanted = [f"features.{n}.{kind}" for n, _ in _convolutions() for kind in ("weight", "bias")]
    missing = [key for key in wanted if key not in arrays]
    if missing or unknown:
        raise InputError(
            f"{name}: not the weights of VGG-19; missing arrays: {', '.join(missing) or 'none'}; "
            f"unknown arrays: {', '.join(unknown) or 'none'}."
        )
    for number, width in _convolutions():
        shapes = {"weight": (width, channels, 3, 3), "bias": (width,)}
        for kind, shape in shapes.items():
            key, array = (
                f"features.{number}.{kind}",
                np.asarray(arrays[f"features.{number}.{kind}"]),
            )
            if array.shape != shape:
                raise InputError(f"{name}: {key} has shape {array.shape}, expected {shape}.")
            if array.dtype.kind != "f" or not np.isfinite(array).all():
                raise InputError(f"{name}: {key} must hold finite floating-point numbers.")
        weight, bias = (arrays[f"features.{number}.{kind}"] for kind in shapes)
        params[str(number)] = {
            "kernel": jnp.asarray(np.asarray(weight).transpose(2, 3, 1, 0), jnp.float32),
            "bias": jnp.asarray(bias, jnp.float32),
        }
        channels = width
    return params


def loss(params: Mapping[str, Any], pred: Array, truth: Array) -> Array:
    """The perceptual loss of images [..., h, w, 3] in [0, 1]; a scalar.

    The sum of `terms` with their published weights, divided by 255.

    Raises:
      InputError: images smaller than MIN_SIZE.
    """
    weights = jnp.asarray(_TERMS, jnp.float32)
    return jnp.sum(weights * terms(params, pred, truth)) / 255


def terms(params: Mapping[str, Any], pred: Array, truth: Array) -> Array:
    """Mean absolute differences [6] of pixels of 255 and of the five blocks' features.

    Args:
      params: from `load`.
      pred: [..., h, w, 3] in [0, 1].
      truth: [..., h, w, 3] in [0, 1].

    Raises:
      InputError: images smaller than MIN_SIZE.
    """
    chex.assert_equal_shape([pred, truth])
    if min(pred.shape[-3:-1]) < MIN_SIZE:
        raise InputError(
            f"the perceptual loss needs images of at least {MIN_SIZE} pixels a side, found "
            f"{pred.shape[-3]}x{pred.shape[-2]}."
        )
    both = jnp.stack([jnp.asarray(x, jnp.float32) for x in (pred, truth)])
    both = 255 * both.reshape(-1, *both.shape[-3:])
    levels = [both, *features(params, both)]
    differences = [jnp.abs(jnp.subtract(*jnp.split(x, 2))) for x in levels]
    return jnp.stack([jnp.mean(x) for x in differences])


def features(params: Mapping[str, Any], images: Array) -> list[Array]:
    """Activations of the five blocks, for images [b, h, w, 3] in [0, 255]; [b, y, x, c] each."""
    x = images - jnp.asarray(_MEAN, jnp.float32).reshape(1, 1, 1, 3)
    levels = []
    for block in _BLOCKS:
        for number, _ in block:
            x = _mean_pool(x) if number in _POOLED else x
            weights = params[str(number)]
            x = jax.lax.conv_general_dilated(
                x,
                weights["kernel"],
                (1, 1),
                [(1, 1)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision="highest",
            )
            x = jax.nn.relu(x + weights["bias"].reshape(1, 1, 1, -1))
        levels.append(x)
    return levels


def _mean_pool(x: Array) -> Array:
    """Means of 2 x 2 pixels; an odd last row or column is left out."""
    height, width = (n // 2 for n in x.shape[1:3])
    x = x[:, : 2 * height, : 2 * width]
    return jnp.mean(x.reshape(x.shape[0], height, 2, width, 2, x.shape[-1]), axis=(2, 4))


def _convolutions() -> list[tuple[int, int]]:
    return [convolution for block in _BLOCKS for convolution in block]


def _read_mat(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Arrays of MatConvNet's file, named and laid out as torchvision's."""
    if not path.is_file():
        raise InputError(f"{path}: no such file of VGG-19 weights.")
    # Comes with JAX; imported where it is used, for training seldom needs it.
    import scipy.io
    import scipy.io.matlab

    try:
        layers = scipy.io.loadmat(path, variable_names=["layers"])["layers"]
        arrays = {}
        for number, _ in _convolutions():
            # The third field of a layer is a cell of kernel [h, w, in, out] and bias.
            kernel, bias = layers[0][number][0][0][2][0][:2]
            arrays[f"features.{number}.weight"] = np.asarray(kernel).transpose(3, 2, 0, 1)
            arrays[f"features.{number}.bias"] = np.asarray(bias).reshape(-1)
    except (
        *(OSError, ValueError, TypeError, LookupError, NotImplementedError, zlib.error),
        scipy.io.matlab.MatReadError,
    ) as error:
        raise InputError(
            f"{path}: not MatConvNet's imagenet-vgg-verydeep-19.mat ({error}); download it again."
        ) from error
    return arrays
