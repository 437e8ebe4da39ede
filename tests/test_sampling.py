"""Gather and splat: exact adjoints, conventions, borders, gradients."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from nvs_common import sampling


def positions(rng, count: int, height: int, width: int) -> np.ndarray:
    """Inside, on the borders and far outside of the image."""
    uv = rng.uniform(-3, max(height, width) + 3, (count, 2))
    uv[:4] = [[0, 0], [0.5, 0.5], [width, height], [width - 0.5, height - 0.5]]
    uv[4:6] = [[-1e6, 2], [2, 1e30]]
    return uv


def test_splat_is_the_adjoint_of_gather(x64):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 7, 3)), rng.normal(size=(40, 3))
    uv = jnp.asarray(positions(rng, 40, 5, 7))
    left = jnp.vdot(sampling.gather(jnp.asarray(x), uv), y)
    right = jnp.vdot(x, sampling.splat(jnp.asarray(y), uv, 5, 7))
    assert abs(left - right) < 1e-10 * abs(left)


def test_splat_is_the_transpose_jax_finds(x64):
    rng = np.random.default_rng(1)
    uv = jnp.asarray(positions(rng, 30, 4, 6))
    y = jnp.asarray(rng.normal(size=(30, 2)))
    image = jnp.zeros((4, 6, 2))
    (transposed,) = jax.linear_transpose(lambda a: sampling.gather(a, uv), image)(y)
    np.testing.assert_allclose(sampling.splat(y, uv, 4, 6), transposed, atol=1e-12)


def test_pixel_centres_are_at_one_half():
    image = jnp.arange(12.0).reshape(3, 4, 1)
    uv = jnp.array([[0.5, 0.5], [3.5, 2.5], [1.0, 0.5], [0.5, 1.0]])
    np.testing.assert_allclose(sampling.gather(image, uv)[:, 0], [0, 11, 0.5, 2], atol=1e-6)


def test_gather_of_a_linear_image_is_exact():
    v, u = np.mgrid[:5, :6] + 0.5
    image = jnp.asarray(2 * u - 3 * v + 1, jnp.float32)[..., None]
    uv = np.random.default_rng(0).uniform(0.5, 4.5, (20, 2)).astype(np.float32)
    expected = 2 * uv[:, 0] - 3 * uv[:, 1] + 1
    np.testing.assert_allclose(sampling.gather(image, uv)[:, 0], expected, atol=1e-5)


def test_borders_are_zero_or_the_edge():
    image = jnp.ones((4, 4, 1))
    uv = jnp.array([[0.0, 2.0], [-0.5, 2.0], [-9.0, 2.0]])
    np.testing.assert_allclose(sampling.gather(image, uv)[:, 0], [0.5, 0, 0])
    np.testing.assert_allclose(sampling.gather(image, uv, border="edge")[:, 0], [1, 1, 1])
    with pytest.raises(ValueError, match="border"):
        sampling.gather(image, uv, border="wrap")


@pytest.mark.thorough
def test_gradients_match_finite_differences_and_are_finite_outside(x64):
    rng = np.random.default_rng(2)
    image = jnp.asarray(rng.normal(size=(5, 6, 2)))
    uv = jnp.asarray(rng.uniform(0.6, 4.4, (8, 2)))
    weight = jnp.asarray(rng.normal(size=(8, 2)))

    def score(image, uv):
        return jnp.sum(weight * sampling.gather(image, uv) ** 2)

    jax.test_util.check_grads(score, (image, uv), order=1, modes=["rev"], eps=1e-6)
    outside = jnp.array([[-1e9, 3.0], [0.0, 0.0], [6.0, 5.0], [jnp.inf, 1.0]])
    gradient = jax.grad(lambda uv: jnp.sum(sampling.gather(image, uv)))(outside)
    assert np.all(np.isfinite(gradient))


def test_leading_axes_are_free():
    rng = np.random.default_rng(3)
    image = jnp.asarray(rng.normal(size=(4, 5, 3)), jnp.float32)
    uv = jnp.asarray(rng.uniform(0, 5, (2, 3, 4, 2)), jnp.float32)
    out = sampling.gather(image, uv)
    assert out.shape == (2, 3, 4, 3)
    np.testing.assert_allclose(out.reshape(-1, 3), sampling.gather(image, uv.reshape(-1, 2)))
