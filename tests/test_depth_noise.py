"""Structured noise on depth: its moments, its bands, and scales found from errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depth_decoder_jax import depth_noise, structured_depth_noise
from nvs_common.errors import InputError

# Share of the variance s^2 / 3 of a grid's noise that bilinear enlargement to 256 x 256 leaves.
LEFT = {3: 0.600, 64: 0.439, 128: 0.395}
draw = jax.jit(structured_depth_noise, static_argnames="scales")


class Scales(dict):
    """A table that a compiled function takes as it is."""

    def __hash__(self):
        return hash(tuple(self.items()))


@functools.cache
def noise(side, scale=0.1, count=64):
    key = jax.random.key(side)
    return draw(key, jnp.full((count, 256, 256), 2.0), scales=Scales({side: scale})) - 2.0


@pytest.mark.parametrize("side", LEFT)
def test_noise_has_mean_zero_and_the_variance_of_its_grid(side):
    scale = 0.1
    # The coarsest grid has nine numbers a map.
    drawn = np.asarray(noise(side, scale, 512 if side == 3 else 16))
    assert np.abs(drawn).max() <= scale + 1e-6
    np.testing.assert_allclose(drawn.var(), LEFT[side] * scale**2 / 3, rtol=0.05)
    assert abs(drawn.mean()) < 0.05 * scale


def test_each_grid_has_noise_of_its_own_frequency():
    neighbours = {side: np.asarray(noise(side, count=16)) for side in LEFT}
    change = {
        side: np.square(np.diff(x, axis=-1)).mean() / x.var() for side, x in neighbours.items()
    }
    assert change[3] < 1e-3 < 0.05 < change[64] < change[128]


def test_background_stays_and_depth_stays_between_near_and_far():
    depth = jnp.full((2, 3, 16, 16), 1.0)
    mask = np.zeros(depth.shape, bool)
    mask[..., :8] = True
    far = np.full((2, 3), 1.01)
    limited = jax.jit(functools.partial(structured_depth_noise, near=0.98, far=far))
    noisy = limited(jax.random.key(0), depth, mask)
    np.testing.assert_array_equal(noisy[..., 8:], depth[..., 8:])
    assert noisy.min() >= 0.98 and noisy.max() <= np.float32(1.01)
    assert np.std(noisy[..., :8]) > 0.003
    maps = np.asarray(noisy[..., :8]).reshape(6, -1)
    assert np.abs(np.corrcoef(maps) - np.eye(6)).max() < 0.99
    np.testing.assert_array_equal(noisy, limited(jax.random.key(0), depth, mask))


@pytest.mark.parametrize("scales", [{3: 0.05, 64: 0.02, 128: 0.02}, {3: 0.0, 64: 0.06, 128: 0.01}])
def test_scales_are_found_from_errors(scales):
    shape, mask = (24, 128, 128), np.zeros((24, 128, 128), bool)
    mask[:, 16:112, 24:104] = True
    depth = jnp.full(shape, 2.0)
    errors = draw(jax.random.key(5), depth, scales=Scales(scales)) - depth
    found = depth_noise.calibrate(errors, mask)
    for side, scale in scales.items():
        np.testing.assert_allclose(found[side], scale, rtol=0.15, atol=0.004, err_msg=side)


def test_wrong_input_is_named():
    key, depth = jax.random.key(0), jnp.ones((1, 4, 4))
    with pytest.raises(InputError, match="mask has shape"):
        structured_depth_noise(key, depth, np.ones((4, 4)))
    with pytest.raises(InputError, match="scales=.*not negative"):
        structured_depth_noise(key, depth, scales={3: -0.1})
    for scales in ({3: float("nan")}, {3.5: 0.1}):
        with pytest.raises(InputError, match="sides are whole"):
            structured_depth_noise(key, depth, scales=Scales(scales))
    with pytest.raises(InputError, match=r"expected \[..., h, w\]"):
        structured_depth_noise(key, depth[0, 0])
    with pytest.raises(InputError, match=r"near \(3,\)"):
        structured_depth_noise(key, depth, near=np.ones(3))
    with pytest.raises(InputError, match="no pixel is in the mask"):
        depth_noise.calibrate(depth, np.zeros((1, 4, 4)))
    with pytest.raises(InputError, match=r"expected one \[n, h, w\]"):
        depth_noise.calibrate(depth, np.ones((2, 4, 4)))
