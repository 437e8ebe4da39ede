"""Image quality as it is published: PSNR, SSIM in two flavours, LPIPS. One value per image.

Images are [..., h, w, 3] with intensities in [0, 1]; results are float32 [...].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from nvs_common import perceptual
from nvs_common.errors import InputError
from nvs_common.types import Array

SSIMFlavour = Literal["gaussian", "sample"]

# Smallest mean squared error that is told apart from zero: identical images score 100 dB, so
# that a mean over views stays finite.
MIN_MSE = 1e-10

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
_SAMPLES = SSIM_WINDOW**2
_K1, _K2 = 0.01, 0.03


def psnr(pred: Array, truth: Array) -> Array:
    """Peak signal-to-noise ratio in dB, per image [...]; identical images give 100.

    Both images [..., h, w, 3] are clamped to [0, 1] first, as published evaluations do.
    """
    chex.assert_equal_shape([pred, truth])
    pred, truth = (jnp.clip(jnp.asarray(x, jnp.float32), 0.0, 1.0) for x in (pred, truth))
    mse = jnp.mean(jnp.square(pred - truth), axis=(-3, -2, -1))
    return -10.0 * jnp.log10(jnp.maximum(mse, MIN_MSE))


def masked_psnr(pred: Array, truth: Array, mask: Array) -> Array:
    """PSNR of the pixels that the object covers, in dB, per image [...].

    The error of each pixel counts by its share in the mask [..., h, w]; without an object it is
    that of identical images. A picture of a small object on a plain ground has a far higher PSNR
    as a whole: published numbers are of either kind.
    """
    chex.assert_equal_shape([pred, truth])
    chex.assert_equal_shape([pred[..., 0], mask])
    pred, truth = (jnp.clip(jnp.asarray(x, jnp.float32), 0.0, 1.0) for x in (pred, truth))
    weights = jnp.asarray(mask, jnp.float32)
    errors = jnp.mean(jnp.square(pred - truth), axis=-1)
    covered = jnp.maximum(jnp.sum(weights, axis=(-2, -1)), 1e-6)
    mse = jnp.sum(errors * weights, axis=(-2, -1)) / covered
    return -10.0 * jnp.log10(jnp.maximum(mse, MIN_MSE))


def ssim(pred: Array, truth: Array, flavour: SSIMFlavour = "gaussian") -> Array:
    """Structural similarity, per image [...]; 1 for identical images.

    An 11x11 gaussian window with sigma 1.5, K1 = 0.01, K2 = 0.03, data range 1; the mean over
    the pixels whose window lies in the image and over channels. Both flavours equal
    `skimage.metrics.structural_similarity(gaussian_weights=True, win_size=11, data_range=1,
    channel_axis=-1)`:

    - "gaussian": `use_sample_covariance=False`, Wang et al. 2004 and the Spaces evaluation.
    - "sample": `use_sample_covariance=True`, skimage's default, which pixelSplat and LVSM
      publish. It is about 0.0005 lower.

    Args:
      pred: [..., h, w, 3].
      truth: [..., h, w, 3].
      flavour: "gaussian" or "sample".

    Raises:
      InputError: on another flavour, or images smaller than the window.
    """
    chex.assert_equal_shape([pred, truth])
    if flavour not in ("gaussian", "sample"):
        raise InputError(f"SSIM flavour is {flavour!r}; use 'gaussian' or 'sample'.")
    height, width = pred.shape[-3:-1]
    if min(height, width) < SSIM_WINDOW:
        raise InputError(
            f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, found "
            f"{height}x{width}; evaluate at a larger size or with a smaller border crop."
        )
    # Written as 1 minus what differs, with var(x) + var(y) - 2 cov(x, y) = var(x - y): in float32
    # the textbook form loses digits where images agree. Moments are about 0.5 for that reason.
    x = jnp.asarray(pred, jnp.float32) - 0.5
    y = jnp.asarray(truth, jnp.float32) - 0.5
    mean_x, mean_y, mean_d = _window_mean(x), _window_mean(y), _window_mean(x - y)
    norm = _SAMPLES / (_SAMPLES - 1) if flavour == "sample" else 1.0
    var_d = norm * (_window_mean(jnp.square(x - y)) - mean_d**2)
    var_sum = norm * (_window_mean(x * x + y * y) - mean_x**2 - mean_y**2)
    power = (mean_x + 0.5) ** 2 + (mean_y + 0.5) ** 2
    luminance = mean_d**2 / (power + _K1**2)
    structure = var_d / (var_sum + _K2**2)
    lost = luminance + structure - luminance * structure  # 1 - (1 - luminance) (1 - structure)
    return 1 - jnp.mean(lost, axis=(-3, -2, -1))


def lpips(pred: Array, truth: Array, weights: Mapping[str, Any]) -> Array:
    """LPIPS distance, per image [...]; `weights` come from `perceptual.load(path)`."""
    return perceptual.lpips(weights, pred, truth)


def _window_mean(x: Array) -> Array:
    """Gaussian mean over the windows that lie in the image: [..., h, w, c] -> h - 10, w - 10."""
    radius = SSIM_WINDOW // 2
    offsets = np.arange(-radius, radius + 1)
    taps = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    taps = taps / taps.sum()
    # Separable sums of slices: exact float32 on every backend, unlike a convolution.
    for axis in (-3, -2):
        length, axis = x.shape[axis] - 2 * radius, axis % x.ndim
        slices = (jax.lax.slice_in_dim(x, k, k + length, axis=axis) for k in range(SSIM_WINDOW))
        x = sum((float(t) * s for t, s in zip(taps, slices, strict=True)), jnp.float32(0))
    return x
