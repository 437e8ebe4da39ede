"""The VQGAN: recorded numbers, names of published weights, strictness, quantisers."""

import functools
import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvs_common import errors, sharding
from tests import conftest
from tests.small_vqgan import SMALL
from vqnerf_jax import VQGAN, codes, load_vqgan, vqgan, vqgan_to_torch

FILE = conftest.GOLDENS / "vq" / "vqmodel_mini_f4.npz"
recorded = pytest.mark.skipif(not FILE.is_file(), reason="no recorded numbers beside this")


@functools.cache
def golden():
    with np.load(FILE, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@functools.cache
def loaded():
    state = {k.removeprefix("w/"): x for k, x in golden().items() if k.startswith("w/")}
    return load_vqgan(state, norm_num_groups=4)


def channels_last(x):
    return np.moveaxis(x, 1, -1)


def close(got, name, tolerance=3e-5):
    np.testing.assert_allclose(got, channels_last(golden()[name]), rtol=0, atol=tolerance)


@functools.cache
def small(**changes):
    """A module and random variables; initialising it would compile for long."""
    module = VQGAN(**{**SMALL, **changes})
    image = jnp.zeros((1, 8, 8, module.in_channels))
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)
    return module, jax.tree.map(lambda x: draw.normal(size=x.shape).astype(x.dtype), shapes)


@functools.cache
def outputs():
    """Everything that is recorded, of one compiled function."""
    module, _ = loaded()

    @jax.jit
    def compute(variables, images):
        out, state = module.apply(variables, images, capture_intermediates=True)
        quantized, indices = module.apply(variables, out.latents, method="quantize")
        continuous = module.apply(variables, out.latents, method="decode")
        seen = flax.traverse_util.flatten_dict(state["intermediates"], sep="/")
        return out, quantized, indices, continuous, seen

    return compute


def float32_outputs():
    return outputs()(loaded()[1], channels_last(golden()["input"]))


@recorded
def test_latents_codes_and_pictures_are_the_recorded_ones():
    out, quantized, indices, continuous, _ = float32_outputs()
    close(out.latents, "latents")
    close(quantized, "quantized")
    np.testing.assert_array_equal(indices, golden()["indices"])
    close(out.images, "decoded")
    close(continuous, "decoded_no_quant")


@recorded
def test_loss_and_perplexity_are_the_recorded_ones():
    out, *_ = float32_outputs()
    np.testing.assert_allclose(out.quantized.loss, golden()["vq_loss_legacy_beta025"], rtol=1e-5)
    perplexity = codes.perplexity(out.quantized.counts)
    np.testing.assert_allclose(perplexity, golden()["perplexity"], rtol=1e-5)


@recorded
def test_activations_are_the_recorded_ones():
    *_, seen = float32_outputs()
    names = {
        "encoder/conv_in": "encoder.conv_in",
        "encoder/down_0": "encoder.down_blocks.0",
        "encoder/down_1": "encoder.down_blocks.1",
        "encoder/mid/attention_0": "encoder.mid_block.attentions.0",
        "encoder/mid": "encoder.mid_block",
        "encoder/conv_out": "encoder.conv_out",
        "post_quant_conv": None,
        "decoder/conv_in": "decoder.conv_in",
        "decoder/mid": "decoder.mid_block",
        "decoder/up_2": "decoder.up_blocks.0",
        "decoder/up_1": "decoder.up_blocks.1",
        "decoder/conv_out": "decoder.conv_out",
    }
    for ours, theirs in names.items():
        close(seen[f"{ours}/__call__"][0], f"act/{theirs}" if theirs else "post_quant")


@recorded
def test_float64_is_nearer_to_the_recorded_numbers_than_rounding(x64):
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), loaded()[1])
    out, *_ = outputs()(variables, channels_last(golden()["input"]).astype(np.float64))
    assert out.images.dtype == jnp.float64
    close(out.images, "decoded")


@recorded
def test_the_published_configuration_is_accepted_and_compared():
    state = {k.removeprefix("w/"): x for k, x in golden().items() if k.startswith("w/")}
    config = json.loads(str(golden()["config"]))
    assert load_vqgan(state, **config)[0] == loaded()[0]
    for change, words in [
        ({"num_vq_embeddings": 8192}, "num_vq_embeddings=8192 was given, but the arrays say 48"),
        ({"norm_num_groups": 3}, "3 groups do not divide"),
        ({"codes": 3}, r"unknown options \['codes'\]"),
        ({"num_codes": 3}, "num_codes=3 was given, but the arrays say 48"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "but the arrays say"),
    ]:
        with pytest.raises(errors.InputError, match=words):
            load_vqgan(state, **{**config, **change})
    with pytest.raises(errors.InputError, match="pass groups="):
        load_vqgan(state)
    # A whole configuration of diffusers, or one of taming with other factors of the same sizes.
    whole = {**config, "_class_name": "VQModel", "_name_or_path": "x"}
    channels = loaded()[0].channels
    factors = {"ch": 2, "ch_mult": tuple(c // 2 for c in channels), "tanh_out": False}
    assert load_vqgan(state, **whole)[0] == load_vqgan(state, **(factors | config))[0]
    plain = {key: x for key, x in config.items() if key != "block_out_channels"}
    assert load_vqgan(state, **plain, **factors)[0] == loaded()[0]
    with pytest.raises(errors.InputError, match="block_out_channels"):
        load_vqgan(state, **plain, **{**factors, "ch": 4})
    with pytest.raises(errors.InputError, match="tanh_out=True was given"):
        load_vqgan(state, **config, tanh_out=True)
    wrapped = {f"module.{key}": x for key, x in state.items()}
    assert load_vqgan(wrapped, **config)[0] == loaded()[0]
    with pytest.raises(errors.InputError, match="arrays twice"):
        load_vqgan({**wrapped, **state}, **config)


@pytest.mark.parametrize("names", ["diffusers", "taming"])
@pytest.mark.parametrize(
    "changes",
    [
        {"mid_attention": False},
        {"encoder_attention": (1,), "decoder_attention": (0, 1), "blocks": 2},
        {"channels": (4, 2, 4), "in_channels": 1, "out_channels": 2},
    ],
)
def test_the_round_trip_is_exact_and_finds_every_size(names, changes):
    module, variables = small(**changes)
    state = vqgan_to_torch(module, variables, names)
    got, read = load_vqgan({"state_dict": {**state, "loss.logvar": np.zeros(())}}, groups=2)
    assert got == module
    jax.tree.map(np.testing.assert_array_equal, dict(read), dict(variables))
    first_stage = {f"first_stage_model.{k}": x for k, x in state.items()}
    other = {"model.diffusion_model.out.weight": np.zeros(2)}
    got, read = load_vqgan({**first_stage, **other}, groups=2)
    jax.tree.map(np.testing.assert_array_equal, dict(read), dict(variables))


def test_names_are_those_of_the_published_code():
    module, variables = small(encoder_attention=(1,))
    names = vqgan_to_torch(module, variables, "taming")
    assert names["encoder.down.1.attn.0.q.weight"].shape == (8, 8, 1, 1)
    assert names["decoder.up.1.block.1.conv1.weight"].shape == (8, 8, 3, 3)
    assert names["decoder.up.1.upsample.conv.weight"].shape == (8, 8, 3, 3)
    assert names["encoder.mid.block_2.norm2.bias"].shape == (8,)
    names = vqgan_to_torch(module, variables)
    assert names["decoder.up_blocks.1.resnets.0.conv_shortcut.weight"].shape == (4, 8, 1, 1)
    assert names["decoder.up_blocks.0.upsamplers.0.conv.bias"].shape == (8,)
    assert names["quantize.embedding.weight"].shape == (7, 5)
    assert names["encoder.conv_out.weight"].shape == (3, 8, 3, 3)
    assert names["quant_conv.weight"].shape == (5, 3, 1, 1)


def test_arrays_that_do_not_fit_are_explained():
    state = vqgan_to_torch(*small())
    kernel = "decoder.mid_block.resnets.1.conv2.weight"
    for change, words in [
        ({kernel: None, "extra.bias": np.ones(3)}, f"missing: {kernel}; unknown: extra.bias"),
        ({kernel: np.ones((8, 8, 1, 1))}, r"shape \(8, 8, 1, 1\), expected \(8, 8, 3, 3\)"),
        ({kernel: np.full((8, 8, 3, 3), np.nan)}, "not finite"),
        ({"quantize.embedding.weight": None}, "found no such array, but .*; this is not a VQGAN"),
        (
            {"quantize.embedding.weight": np.ones((7, 4), np.float32)},
            r"expected \(\d, [34], 1, 1\)",
        ),
        ({"conv.bias": np.array(["a"])}, "expected an array of floats"),
    ]:
        changed = {name: x for name, x in {**state, **change}.items() if x is not None}
        with pytest.raises(errors.InputError, match=words):
            load_vqgan(changed, groups=2)


@pytest.mark.thorough
def test_encoder_and_decoder_get_gradients_through_the_codes():
    module, variables = small(distance="cosine", gradient="rotation")
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1)

    @jax.jit
    @jax.grad
    def gradients(params):
        out = module.apply({"params": params}, images)
        return jnp.mean(jnp.square(out.images - images)) + out.quantized.loss

    for path, gradient in flax.traverse_util.flatten_dict(gradients(variables["params"])).items():
        # Softmax takes no notice of a bias of the keys.
        assert jnp.isfinite(gradient).all(), path
        assert path[-2:] == ("key", "bias") or jnp.any(gradient != 0), path


@pytest.mark.parametrize("quantizer", ["fsq", "lfq", "vq"])
def test_every_quantizer_looks_up_what_it_chose(quantizer):
    module, variables = small(quantizer=quantizer, fsq_levels=(3, 2, 4, 3, 2))
    latents = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4, 5)), jnp.float32)
    values, indices = module.apply(variables, latents, method="quantize")
    found = module.apply(variables, indices, method=lambda self, i: self.codebook.lookup(i))
    np.testing.assert_allclose(found, values, atol=1e-6)
    with pytest.raises(errors.InputError, match="continuous latents"):
        small(quantizer="none")[0].apply(variables, latents, method="quantize")


def test_running_means_learn_while_parameters_do_not_hold_codes():
    module, variables = small(update="ema", decay=0.5)
    assert "codebook" not in variables["params"]
    start = variables["codes"]["codebook"]["state"]
    zeros = jax.tree.map(np.zeros_like, start).replace(codes=start.codes)
    variables = {**variables, "codes": {"codebook": {"state": zeros}}}
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1)
    step = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["codes"])[1])
    new = step(variables, images)
    state = new["codes"]["codebook"]["state"]
    assert state.steps == 1 and float(jnp.sum(state.counts)) == 0.5 * 2 * 4 * 4
    published = vqgan_to_torch(module, {**variables, **new})
    np.testing.assert_array_equal(published["quantize.embedding.weight"], state.codes)


def test_bad_sizes_and_choices_are_explained():
    for changes, shape, words in [
        ({}, (1, 9, 8, 3), "multiples of 2"),
        ({}, (1, 8, 8, 1), "channels 3"),
        ({"groups": 3}, (1, 8, 8, 3), r"does not divide channels \[4, 8\]"),
        ({"quantizer": "rq"}, (1, 8, 8, 3), "quantizer='rq'"),
        ({"quantizer": "fsq"}, (1, 8, 8, 3), "fsq_levels has 4"),
    ]:
        with pytest.raises(errors.InputError, match=words):
            jax.eval_shape(VQGAN(**{**SMALL, **changes}).init, jax.random.key(0), jnp.zeros(shape))


def test_every_parameter_has_one_layout():
    module = VQGAN(encoder_attention=(1,), decoder_attention=(0,))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    specs = sharding.param_specs(shapes, vqgan.PARAM_AXES, mesh)
    assert specs["codebook"]["embedding"] == jax.sharding.PartitionSpec("tensor", None)
