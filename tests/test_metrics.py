"""Losses and image metrics against scikit-image, NumPy and published numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.metrics

from nvs_common import losses, metrics
from nvs_common.errors import InputError


def _pair(seed, shape=(24, 31, 3), noise=0.1):
    rng = np.random.default_rng(seed)
    truth = rng.uniform(size=shape)
    pred = np.clip(truth + rng.normal(scale=noise, size=shape), 0, 1)
    return pred.astype(np.float32), truth.astype(np.float32)


def _skimage_ssim(pred, truth, sample):
    return skimage.metrics.structural_similarity(
        pred.astype(np.float64),
        truth.astype(np.float64),
        win_size=11,
        gaussian_weights=True,
        use_sample_covariance=sample,
        data_range=1.0,
        channel_axis=-1,
    )


@pytest.mark.parametrize("flavour", ["gaussian", "sample"])
@pytest.mark.parametrize("noise", [1e-3, 0.02, 0.3])
def test_ssim_equals_scikit_image(flavour, noise):
    pred, truth = _pair(0, noise=noise)
    expected = _skimage_ssim(pred, truth, flavour == "sample")
    assert abs(float(metrics.ssim(pred, truth, flavour)) - expected) < 1e-6


@pytest.mark.parametrize("flavour", ["gaussian", "sample"])
def test_ssim_of_smooth_bright_images_equals_scikit_image(flavour):
    # Small variances on a large mean: where float32 moments about zero lose their digits.
    ramp = np.linspace(0.9, 0.92, 40)[None, :, None] * np.ones((30, 1, 3))
    pred = (ramp + 1e-3 * np.sin(np.arange(40))[None, :, None]).astype(np.float32)
    ramp = ramp.astype(np.float32)
    expected = _skimage_ssim(pred, ramp, flavour == "sample")
    assert abs(float(metrics.ssim(pred, ramp, flavour)) - expected) < 1e-6


def test_psnr_and_ssim_equal_the_numbers_lvsm_publishes_with(shared_data):
    golden = np.load(shared_data.parent / "goldens" / "lvsm" / "pipeline.npz")
    pred, truth = (golden[f"metric/{k}"].transpose(0, 2, 3, 1) for k in ("pred", "gt"))
    np.testing.assert_allclose(metrics.psnr(pred, truth), golden["metric/psnr"], atol=1e-4)
    np.testing.assert_allclose(
        metrics.ssim(pred, truth, "sample"), golden["metric/ssim"], atol=1e-6
    )
    assert (metrics.ssim(pred, truth, "gaussian") > golden["metric/ssim"]).all()


def test_identical_images_score_one_and_the_psnr_ceiling():
    _, truth = _pair(1)
    assert float(metrics.psnr(truth, truth)) == pytest.approx(100.0)
    assert float(metrics.ssim(truth, truth)) == pytest.approx(1.0, abs=1e-6)
    assert float(metrics.ssim(truth, truth, "sample")) == pytest.approx(1.0, abs=1e-6)


def test_psnr_of_a_constant_offset_is_its_definition():
    truth = np.full((4, 4, 3), 0.25, np.float32)
    assert float(metrics.psnr(truth + 0.1, truth)) == pytest.approx(20.0, abs=1e-4)


def test_psnr_clamps_to_the_displayable_range():
    truth = np.ones((4, 4, 3), np.float32)
    assert float(metrics.psnr(truth + 3.0, truth)) == pytest.approx(100.0)


def test_leading_axes_are_images():
    pairs = [_pair(seed) for seed in range(6)]
    pred = np.stack([p for p, _ in pairs]).reshape(2, 3, 24, 31, 3)
    truth = np.stack([t for _, t in pairs]).reshape(2, 3, 24, 31, 3)
    for function in (metrics.psnr, metrics.ssim):
        together = function(pred, truth)
        assert together.shape == (2, 3)
        alone = function(pred[1, 2], truth[1, 2])
        np.testing.assert_allclose(together[1, 2], alone, rtol=1e-5)


def test_ssim_refuses_small_images_and_unknown_flavours():
    small = np.zeros((10, 40, 3), np.float32)
    with pytest.raises(InputError, match="10x40"):
        metrics.ssim(small, small)
    pred, truth = _pair(2)
    with pytest.raises(InputError, match="flavour"):
        metrics.ssim(pred, truth, "uniform")


def test_losses_equal_numpy_in_float64():
    pred, truth = _pair(3)
    difference = pred.astype(np.float64) - truth
    np.testing.assert_allclose(losses.l1(pred, truth), np.abs(difference).mean(), rtol=2e-6)
    np.testing.assert_allclose(losses.l2(pred, truth), (difference**2).mean(), rtol=2e-6)
    expected = np.sqrt(difference**2 + 0.05**2).mean()
    np.testing.assert_allclose(losses.charbonnier(pred, truth, 0.05), expected, rtol=2e-6)


def test_losses_are_the_mean_over_all_leading_axes():
    pairs = [_pair(seed) for seed in range(4)]
    pred = np.stack([p for p, _ in pairs]).reshape(2, 2, 24, 31, 3)
    truth = np.stack([t for _, t in pairs]).reshape(2, 2, 24, 31, 3)
    for function in (losses.l1, losses.l2, losses.charbonnier):
        expected = np.mean([function(p, t) for p, t in pairs])
        np.testing.assert_allclose(function(pred, truth), expected, rtol=1e-5)


def test_losses_are_float32_whatever_the_prediction():
    pred, truth = _pair(4)
    for function in (losses.l1, losses.l2, losses.charbonnier):
        assert function(
            jnp.asarray(pred, jnp.bfloat16), jnp.asarray(truth, jnp.bfloat16)
        ).dtype == (jnp.float32)


def test_charbonnier_gradient_is_finite_at_equality():
    truth = jnp.full((4, 4, 3), 0.5)
    gradient = jax.grad(lambda x: losses.charbonnier(x, truth))(truth)
    assert np.isfinite(gradient).all()
