"""Training of a VQGAN: who learns from which loss, the adaptive weight, codes in use, export."""

import dataclasses
import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import vqgan as vqgan_config
from nvs_common import errors, sharding
from nvs_common.types import Batch, Cameras, Views
from vqnerf_jax import discriminator, load_vqgan, vqgan_task, vqgan_to_torch


def config(setting="tiny", **loss):
    config = vqgan_config.get_config(setting)
    config.model.update(channels=(4, 4), groups=2, num_codes=8, code_width=3, latent_channels=4)
    config.model.update(blocks=1, mid_attention=False)
    config.discriminator.update(channels=4, layers=1, groups=2)
    config.loss.update(perceptual_weight=0.0, gan_weight=0.5, gan_start=2, quantizer_start=0)
    config.loss.update(**loss)
    return config


def batch():
    draw = np.random.default_rng(0)
    images = draw.uniform(size=(2, 1, 8, 8, 3)).astype(np.float32)
    pose, ones = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1, 1)), np.ones((2, 1), np.float32)
    cams = Cameras(pose, np.ones((2, 1, 4), np.float32), ones, 2 * ones, 8, 8)
    views = Views(images, cams)
    return Batch(views, views)


@functools.cache
def stepped(update):
    """Gradients and metrics of a step after the discriminator's start, and the state before."""
    settings = config()
    if update == "gradient":
        settings = config("tiny,gradient")
    made = vqgan_task.make(settings)
    variables = made.init(jax.random.key(0), batch())
    variables["schedule"]["step"] = jnp.asarray(5)

    @jax.jit
    def run(params):
        def loss(params):
            return made.loss({**variables, "params": params}, batch(), jax.random.key(1))

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, aux), gradients = run(variables["params"])
    return made, variables, value, aux, gradients


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.thorough
def test_all_parts_learn(update):
    _, variables, value, aux, gradients = stepped(update)
    assert jnp.isfinite(value)
    for part in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
        leaves = jax.tree.leaves(gradients["vqgan"][part])
        assert any(jnp.any(x != 0) for x in leaves), part
    # The last bias has none while the logits of both kinds lie within the margin.
    assert jnp.any(gradients["discriminator"]["logits"]["kernel"] != 0)
    assert jnp.any(gradients["discriminator"]["conv_0"]["kernel"] != 0)
    assert aux.collections["schedule"]["step"] == 6
    if update == "gradient":
        assert jnp.any(gradients["vqgan"]["codebook"]["embedding"] != 0)
        assert "codes" not in aux.collections
    else:
        before = variables["codes"]["codebook"]["state"].codes
        assert jnp.any(aux.collections["codes"]["codebook"]["state"].codes != before)


@pytest.mark.parametrize("step", [3, 4])
def test_latents_are_quantised_from_the_start_of_quantisation_on(step):
    made = vqgan_task.make(config(gan_weight=0.0, quantizer_start=4))
    variables = made.init(jax.random.key(0), batch())
    variables["schedule"]["step"] = jnp.asarray(step)
    _, aux = jax.jit(made.loss)(variables, batch(), jax.random.key(1))
    before, after = variables["codes"]["codebook"]["state"], aux.collections["codes"]["codebook"]
    module = vqgan_task.make_parts(config()).module
    images = batch().target.images[:, 0]
    held = {"params": variables["params"]["vqgan"]}
    latents = module.apply(held, 2 * images - 1, method="encode")
    plain = (module.apply(held, latents, method="decode") + 1) / 2
    l1 = np.mean(np.abs(plain - images))
    if step < 4:
        assert np.isclose(aux.metrics["l1"], l1, rtol=1e-5)
        assert aux.metrics["quantizer"] == 0 and after["state"].steps == 0
        assert aux.metrics["usage"] == 0
        np.testing.assert_array_equal(after["state"].codes, before.codes)
    else:
        assert not np.isclose(aux.metrics["l1"], l1, rtol=1e-3)
        assert aux.metrics["quantizer"] > 0 and after["state"].steps == 1
        assert aux.metrics["usage"] > 0
        # k-means has started the codes among the latents of this batch.
        flat = np.asarray(latents).reshape(-1, latents.shape[-1])
        low, high = flat.min(axis=0) - 1e-3, flat.max(axis=0) + 1e-3
        codes = np.asarray(after["state"].codes)
        assert np.all((codes >= low) & (codes <= high))


def test_the_loss_is_the_sum_of_its_terms():
    _, _, value, aux, _ = stepped("ema")
    said = aux.metrics
    wanted = said["l1"] + said["quantizer"] + said["discriminator"]
    wanted += 0.5 * said["adaptive_weight"] * said["adversarial"]
    np.testing.assert_allclose(value, wanted, rtol=1e-5)


@pytest.mark.thorough
def test_decoder_and_discriminator_are_constants_to_each_other():
    parts = vqgan_task.make_parts(config())
    draw = np.random.default_rng(1)
    decoded, real = (jnp.asarray(draw.uniform(size=(2, 8, 8, 3)), jnp.float32) for _ in range(2))
    assert parts.opponent is not None
    params = {"discriminator": parts.opponent.init(jax.random.key(0), decoded)["params"]}

    def gradients(name):
        def one(params, decoded):
            return vqgan_task._adversarial(parts, params, decoded, real)[name]

        of_params, of_images = jax.grad(one, argnums=(0, 1))(params, decoded)
        return any(jnp.any(x != 0) for x in jax.tree.leaves(of_params)), jnp.any(of_images != 0)

    assert gradients("adversarial") == (False, True)
    assert gradients("discriminator") == (True, False)


def test_hinge_losses_and_their_balance():
    real, fake = jnp.asarray([2.0, 0.5]), jnp.asarray([-2.0, 0.0])
    assert discriminator.hinge(real, fake) == pytest.approx(0.5 * (0.25 + 0.5))
    assert discriminator.deceive(fake) == 1.0
    weight = discriminator.adaptive_weight(jnp.full(4, 3.0), jnp.full(4, 0.5))
    assert weight == pytest.approx(6.0, rel=1e-3)
    assert discriminator.adaptive_weight(jnp.full(4, 3.0), jnp.zeros(4)) == discriminator.LARGEST


def test_codes_count_as_used_for_a_while():
    made, variables, _, aux, _ = stepped("ema")
    last = np.asarray(aux.collections["schedule"]["last_used"])
    used = last == 5
    assert used.any() and (last[~used] == -vqgan_task.RECENT_STEPS).all()
    assert aux.metrics["usage"] == pytest.approx(used.mean())
    later = {**variables, "schedule": {"step": jnp.asarray(7), "last_used": jnp.full(8, 6)}}
    shapes = jax.eval_shape(made.loss, later, batch(), jax.random.key(0))
    assert shapes[1].metrics["usage"].shape == ()


def test_what_is_exported_decodes_the_same():
    made, variables, *_ = stepped("ema")
    module = vqgan_task.make_parts(config()).module
    images = batch().target.images[:, 0]
    wanted = vqgan_task.reconstruct(module, variables, images).images
    # As a checkpoint is read.
    plain = {**variables, "codes": flax.serialization.to_state_dict(variables["codes"])}
    assert isinstance(plain["codes"]["codebook"]["state"], dict)
    held = vqgan_task.autoencoder(plain)
    again, loaded = load_vqgan(vqgan_to_torch(module, held), groups=2)
    out = again.apply(loaded, 2 * images - 1)
    np.testing.assert_allclose((out.images + 1) / 2, wanted, atol=1e-5)
    shown = made.render(variables, batch().context, batch().target.cameras)
    np.testing.assert_allclose(shown.images[:, 0], wanted, atol=1e-5)


@pytest.mark.parametrize("setting", [*vqgan_config.SETTINGS, "tiny,gradient"])
def test_every_parameter_has_one_layout(setting):
    settings = vqgan_config.get_config(f"{setting},no_perceptual")
    made = vqgan_task.make(settings)
    shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), batch()))
    sharding.param_specs(shapes["params"], made.param_axes)


def test_bad_settings_are_explained():
    settings = config()
    settings.loss.perceptual_weight = 1.0
    with pytest.raises(errors.InputError, match="needs a file of LPIPS in loss.lpips_weights"):
        vqgan_task.make(settings)
    settings = config()
    settings.model.depth = 3
    with pytest.raises(errors.InputError, match=r"unknown fields \['depth'\]"):
        vqgan_task.make(settings)
    made, variables, *_ = stepped("ema")
    more = dataclasses.replace(batch().target.cameras, near=np.ones((2, 3), np.float32))
    with pytest.raises(errors.InputError, match="3 targets, but 1 inputs: an auto-encoder decodes"):
        made.render(variables, batch().context, more)
