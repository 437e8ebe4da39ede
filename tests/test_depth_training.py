"""The depth-guided decoder as a task: stages, frozen parts, noise, configs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import depth_decoder as depth_config
from depth_decoder_jax import task
from nvs_common import optim, sharding
from nvs_common.errors import InputError
from nvs_common.types import Batch, Views
from tests import small_depth

KEY = jax.random.key(3)


def small_config(setting="tiny"):
    config = depth_config.get_config(setting)
    config.model.vae.update(channels=(32, 32), num_resnets=1, num_mid=1)
    config.model.update(levels=1, samples=(2,))
    return config


def batch():
    """One scene of 8 x 8 pixels: the front view and two targets with depth."""
    rng = np.random.default_rng(0)
    cams = small_depth.ring(3, 8)
    images = rng.random((1, 3, 8, 8, 3), np.float32)
    depth = np.float32(1.4 + 0.1 * rng.random((1, 2, 8, 8)))
    front, targets = Views(images[:, :1], cams[:, :1]), Views(images[:, 1:], cams[:, 1:])
    return jax.tree.map(jnp.asarray, Batch(front, targets, {"depth": depth}))


def initial(made):
    """Variables with small random numbers, without compiling their initialisation."""
    shapes = jax.eval_shape(made.init, jax.random.key(0), batch())
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        is_scale = sharding.path_name(path).endswith("scale")
        return jnp.asarray(0.1 * rng.standard_normal(leaf.shape) + is_scale, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, dict(shapes))


@functools.cache
def gradients(setting):
    made = task.make(small_config(setting))
    variables = initial(made)
    value = jax.jit(jax.value_and_grad(made.loss, has_aux=True))
    return made, variables, value(variables, batch(), jax.random.key(3))


def largest(tree):
    return max(float(np.abs(x).max()) for x in jax.tree.leaves(tree))


@pytest.mark.thorough
def test_the_decoder_learns_and_the_encoder_is_frozen():
    made, variables, ((total, aux), found) = gradients("tiny")
    params = found["params"]
    wanted = aux.metrics["l1"] + 20 * aux.metrics["mse"]
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    assert largest(params["vae"]["encoder"]) == largest(params["vae"]["quant_conv"]) == 0
    for part in (params["vae"]["decoder"], params["cross_0"], params["pyramid"]["conv_1"]):
        assert largest(part) > 0
    sharding.param_specs(variables["params"], made.param_axes)


@pytest.mark.thorough
def test_the_autoencoder_learns_whole_and_without_attention():
    _, _, ((total, aux), found) = gradients("tiny_autoencoder")
    config = small_config("tiny_autoencoder")
    wanted = aux.metrics["l1"] + 20 * aux.metrics["mse"]
    wanted += config.loss.kl_weight * aux.metrics["kl"]
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    params = found["params"]
    assert largest(params["vae"]["encoder"]) > 0 and largest(params["cross_0"]) == 0


@pytest.mark.thorough
def test_the_plain_decoder_learns_from_the_same_noisy_latents_without_attention():
    config = small_config()
    config.loss.stage = "plain_decoder"
    made = task.make(config)
    shapes = jax.eval_shape(jax.grad(made.loss, has_aux=True), initial(made), batch(), KEY)
    assert set(shapes[1].metrics) == {"loss", "l1", "mse", "psnr"}
    _, variables, ((_, guided), _) = gradients("tiny")
    silent = jax.tree.map(lambda x: x, variables)
    kernel = silent["params"]["cross_0"]["output"]["kernel"]
    silent["params"]["cross_0"]["output"]["kernel"] = jnp.zeros_like(kernel)
    total, found = jax.jit(jax.value_and_grad(lambda v: made.loss(v, batch(), KEY)[0]))(silent)
    # Other numbers than with attention; without its output there is no other difference.
    assert abs(float(total) - float(guided.metrics["loss"])) > 1e-6
    params = found["params"]
    assert largest(params["cross_0"]) == largest(params["vae"]["encoder"]) == 0
    assert largest(params["vae"]["decoder"]) > 0


def test_the_foreground_has_depth_and_is_covered():
    depth = batch().extras["depth"].at[:, :, 0].set(0.0).at[:, 0, 1].set(jnp.inf)
    coverage = jnp.ones_like(depth).at[:, :, 2].set(0.2)
    mask = task.foreground(dataclasses.replace(batch(), extras={"depth": depth}))
    assert not mask[:, :, 0].any() and not mask[:, 0, 1].any() and mask[:, :, 2:].all()
    extras = {"depth": depth, "mask": coverage}
    covered = task.foreground(dataclasses.replace(batch(), extras=extras))
    np.testing.assert_array_equal(covered, mask & (coverage > 0.5))


def test_parts_have_rates_of_their_own():
    config = small_config()
    config.optim.update(warmup_steps=0, schedule="constant", weight_decay=0.5, clip_norm=0.0)
    params = {
        "vae": {part: {"kernel": jnp.ones((2, 2))} for part in ("encoder", "quant_conv", "decoder")}
    } | {"cross_0": {"kernel": jnp.ones((2, 2))}}
    tx = optim.make(config)
    updates, _ = tx.update(params, tx.init(params), params)
    step = {part: float(x["kernel"][0, 0]) for part, x in updates["vae"].items()}
    assert step["encoder"] == step["quant_conv"] == 0
    rate = dict(config.optim.rates)["vae/decoder"]
    assert 0 < rate < 1
    np.testing.assert_allclose(
        step["decoder"], rate * updates["cross_0"]["kernel"][0, 0], rtol=1e-6
    )
    np.testing.assert_allclose(
        updates["cross_0"]["kernel"], -1.5 * config.optim.learning_rate, rtol=1e-5
    )
    with pytest.raises(InputError, match="nothing"):
        optim.scale_by_rates(params, (("nothing", 0.1),))


def test_half_of_the_latents_have_noise():
    latents = jnp.zeros((400, 4, 4, 4))
    noisy = np.asarray(task.noisy_latents(jax.random.key(0), latents, 0.1))
    deviation = noisy.std((1, 2, 3)) * 0.18215
    assert 160 < np.sum(deviation > 0) < 240
    assert 0.08 < deviation.max() < 0.13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(loss=dict(stage="both")), "config.loss.stage='both'"),
        (dict(data=dict(with_depth=False)), "needs data.with_depth"),
        (dict(model=dict(depth=1)), r"config.model has unknown fields \['depth'\]"),
        (dict(model=dict(vae=dict(width=1))), r"config.model.vae has unknown fields \['width'\]"),
        (dict(model=dict(vae=dict(dtype="int8"))), "config.model.vae.dtype='int8'"),
    ],
)
def test_wrong_configs_are_named(change, message):
    config = small_config()
    with config.unlocked():
        config.update(change)
    with pytest.raises(InputError, match=message):
        task.make(config)


def test_other_views_than_those_given_are_refused():
    made = task.make(small_config())
    shapes = jax.eval_shape(made.init, jax.random.key(0), batch())
    given = batch().target
    rendered = jax.eval_shape(made.render, shapes, given, given.cameras)
    assert rendered.images.shape == given.images.shape
    with pytest.raises(InputError, match="1 targets, but 2 inputs"):
        jax.eval_shape(made.render, shapes, given, given.cameras[:, :1])
