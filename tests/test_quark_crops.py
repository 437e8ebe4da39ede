"""Random crops: what is drawn and compared of a map solved for the whole target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quark as quark_config
from nvs_common.errors import InputError
from nvs_common.types import Render
from quark_jax import crops, supervision, task
from tests import test_quark


def config_of(crop: int, **loss):
    config = test_quark.config_of()
    config.loss.update(crop=crop, depth_weight=0.0, **loss)
    return config


def test_windows_are_a_function_of_the_key_and_lie_inside():
    targets = test_quark.make_cameras((50, 2), np.random.default_rng(0))
    key = jax.random.key(3)
    window, again = (crops.random_windows(key, targets, 6) for _ in range(2))
    other = crops.random_windows(jax.random.key(4), targets, 6)
    np.testing.assert_array_equal(window.top, again.top)
    assert np.any(window.top != other.top)
    # Both ends are reached, and targets of a scene share their window.
    assert (window.top.min(), window.top.max()) == (0, 10)
    assert (window.left.min(), window.left.max()) == (0, 18)
    np.testing.assert_array_equal(window.left[:, 0], window.left[:, 1])


def test_cut_views_see_the_same_rays():
    batch = test_quark.make_batch(scenes=2)
    window = crops.random_windows(jax.random.key(1), batch.target.cameras, 5)
    part = crops.cut(batch.target, window)
    for b in range(2):
        top, left = int(window.top[b, 0]), int(window.left[b, 0])
        expected = batch.target.images[b, :, top : top + 5, left : left + 5]
        np.testing.assert_array_equal(part.images[b], expected)
        shift = batch.target.cameras.intrinsics[b] - part.cameras.intrinsics[b]
        np.testing.assert_allclose(shift, [[0, 0, left, top]] * 2, atol=1e-5)


@pytest.mark.thorough
def test_loss_of_a_crop_is_that_of_the_pictures_part():
    batch = test_quark.make_batch(scenes=2)
    apply, variables = test_quark.apply_small()
    key = jax.random.key(5)
    made = task.make(config_of(6, temporal_weight=1.0))
    _, aux = jax.jit(made.loss)(variables, batch, key)
    window = crops.random_windows(key, batch.target.cameras, 6)
    whole = apply(variables, batch.context, batch.target.cameras)
    error = jnp.abs(whole.images - batch.target.images)
    parts = [
        error[b, t, y : y + 6, x : x + 6]
        for b in range(2)
        for t in range(2)
        for y, x in [(int(window.top[b, t]), int(window.left[b, t]))]
    ]
    assert float(aux.metrics["l1"]) == pytest.approx(float(jnp.mean(jnp.stack(parts))), rel=1e-3)
    assert np.isfinite(aux.metrics["temporal"])


def test_temporal_loss_of_cropped_photographs_is_zero():
    batch = test_quark.make_batch()
    window = crops.random_windows(jax.random.key(0), batch.target.cameras, 8)
    target = crops.cut(batch.target, window)
    depth = jnp.full((1, 2, 8, 8), 3.0)
    assert float(supervision.temporal_difference(Render(target.images, depth), target)) == 0


@pytest.mark.parametrize("crop", [-1, 17, 1000])
def test_windows_larger_than_the_target_are_refused(crop):
    targets = test_quark.make_cameras((1, 1), np.random.default_rng(0))
    with pytest.raises(InputError, match=f"loss.crop={crop}"):
        crops.random_windows(jax.random.key(0), targets, crop)


def test_the_published_phases_differ_in_resolution_crop_and_length():
    half, full = (quark_config.get_config(name) for name in ("quark,half", "quark"))
    assert (half.num_steps, full.num_steps) == (250_000, 350_000)
    assert (half.loss.crop, full.loss.crop) == (256, 512)
    assert (half.data.height, full.data.height) == (540, 1080)
    assert half.model.grid_area * 4 == full.model.grid_area
    shapes = []
    for config in (half, full):
        module = task.make_module(config.model)
        batch = test_quark.make_batch(targets=1)
        init = jax.eval_shape(module.init, jax.random.key(0), batch.context, batch.target.cameras)
        shapes.append(jax.tree.map(lambda x: x.shape, init))
    # The same network: the second phase starts from the first one's weights.
    assert shapes[0] == shapes[1]
