"""The over operator."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np

from nvs_common import compositing


def layers(seed: int = 0):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.uniform(size=(5, 3, 4, 3)), jnp.float32),
        jnp.asarray(rng.uniform(size=(5, 3, 4)), jnp.float32),
    )


def test_over_matches_the_recursion_back_to_front():
    colors, alphas = layers()
    expected = np.zeros((3, 4, 3))
    for color, alpha in zip(np.asarray(colors), np.asarray(alphas), strict=True):
        expected = alpha[..., None] * color + (1 - alpha[..., None]) * expected
    np.testing.assert_allclose(compositing.over(colors, alphas), expected, atol=1e-6)


def test_over_of_an_opaque_front_is_the_front():
    colors, alphas = layers()
    out = compositing.over(colors, alphas.at[-1].set(1.0))
    np.testing.assert_allclose(out, colors[-1], atol=1e-6)


def test_weights_sum_to_the_accumulated_alpha():
    _, alphas = layers()
    weights = compositing.over_weights(alphas)
    np.testing.assert_allclose(weights.sum(0), compositing.accumulated(alphas), atol=1e-6)


def test_depth_of_nothing_is_far_and_of_an_opaque_layer_its_own():
    depths = jnp.array([4.0, 2.0])[:, None]
    empty = compositing.expected_depth(depths, jnp.zeros((2, 1)), jnp.float32(9.0))
    front = compositing.expected_depth(depths, jnp.array([[0.3], [1.0]]), jnp.float32(9.0))
    np.testing.assert_allclose([empty[0], front[0]], [9.0, 2.0])


def test_gradient_is_finite_where_alphas_are_zero_or_one():
    colors, _ = layers()
    for alpha in (0.0, 1.0):
        alphas = jnp.full((5, 3, 4), alpha)
        gradient = jax.grad(lambda a: jnp.sum(compositing.over(colors, a)))(alphas)
        assert np.all(np.isfinite(gradient))


def test_gradient_matches_finite_differences(x64):
    rng = np.random.default_rng(1)
    colors, alphas = rng.uniform(size=(3, 2, 3)), rng.uniform(size=(3, 2))
    score = lambda c, a: jnp.sum(jnp.sin(compositing.over(c, a)))  # noqa: E731
    jax.test_util.check_grads(score, (jnp.asarray(colors), jnp.asarray(alphas)), 1, ["rev"])
