"""The autoencoder against recorded numbers: values, activations, gradients, names, clips."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depth_decoder_jax import SVDVAE, load_svd, to_torch, weights
from depth_decoder_jax import vae as vae_module
from nvs_common import sharding
from nvs_common.errors import InputError
from tests import conftest

FOLDER = conftest.GOLDENS / "svd_vae"
NAME, NUM_CLIPS, NUM_FRAMES = "tiny_l2", 2, 3
recorded_numbers = pytest.mark.skipif(not FOLDER.is_dir(), reason="no recorded numbers beside this")


@functools.cache
def archive(kind):
    with np.load(FOLDER / f"{NAME}_{kind}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@functools.cache
def loaded():
    return load_svd(archive("params"))


def clips(name, frames=NUM_FRAMES):
    """A recorded array (n, c, h, w) as clips [b, t, h, w, c]."""
    x = np.moveaxis(archive("io")[name], 1, -1)
    return x.reshape(-1, frames, *x.shape[1:])


def close(got, wanted, relative=0.0):
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=relative, atol=3e-5)


@functools.cache
def encoded():
    """Mean, log-variance and what every layer gives for the recorded images."""
    module, variables = loaded()
    apply = functools.partial(module.apply, method="encode", capture_intermediates=True)
    (mean, logvar), state = jax.jit(apply)(variables, clips("images"))
    return mean, logvar, state["intermediates"]


@functools.cache
def decoded(name, frames):
    module, variables = loaded()
    apply = functools.partial(module.apply, method="decode", capture_intermediates=True)
    images, state = jax.jit(apply)(variables, clips(name, frames))
    return images, state["intermediates"]


@recorded_numbers
def test_latents_are_the_recorded_ones():
    mean, logvar, _ = encoded()
    close(mean, clips("enc_mean"))
    close(logvar, clips("enc_logvar"))
    close(mean, clips("f64/enc_mean"))
    close(logvar, clips("f64/enc_logvar"))


@recorded_numbers
@pytest.mark.parametrize("frames", [1, 3, 6])
def test_frames_are_the_recorded_ones(frames):
    images, _ = decoded("latent_random", frames)
    close(images, clips(f"dec_random_T{frames}", frames))
    if frames == 3:
        close(images, clips("f64/dec_random_T3"))


ENCODER_ACTIVATIONS = {
    "enc.conv_in": "encoder/conv_in",
    "enc.down_blocks.0": "encoder/down_0",
    "enc.down_blocks.1": "encoder/down_1",
    "enc.mid_block": "encoder/mid",
    "enc.conv_out": "encoder/conv_out",
}
DECODER_ACTIVATIONS = {
    "dec.conv_in": "decoder/conv_in",
    "dec.mid_block.resnets.0.spatial_res_block": "decoder/mid/resnet_0/spatial",
    "dec.mid_block.resnets.0": "decoder/mid/resnet_0",
    "dec.mid_block.attentions.0": "decoder/mid/attention",
    "dec.mid_block": "decoder/mid",
    "dec.up_blocks.0.resnets_last": "decoder/up_0/resnet_2",
    "dec.up_blocks.0": "decoder/up_0",
    "dec.up_blocks.1.resnets_last": "decoder/up_1/resnet_2",
    "dec.up_blocks.1": "decoder/up_1",
    "dec.conv_norm_out": "decoder/norm_out",
    "dec.conv_out_before_time_conv": "decoder/conv_out",
}


@recorded_numbers
def test_activations_are_the_recorded_ones():
    names = {key.removeprefix("act/") for key in archive("io") if key.startswith("act/")}
    assert names == {*ENCODER_ACTIVATIONS, *DECODER_ACTIVATIONS}
    layers = [(encoded()[2], ENCODER_ACTIVATIONS), (decoded("enc_mean", 3)[1], DECODER_ACTIVATIONS)]
    for found, table in layers:
        for theirs, ours in table.items():
            entry = found
            for part in ours.split("/"):
                entry = entry[part]
            wanted = clips(f"act/{theirs}")
            # Inside the network values reach 10, of which float32 has 1e-6.
            close(entry["__call__"][0].reshape(wanted.shape), wanted, relative=3e-6)
    close(decoded("enc_mean", 3)[0], clips("dec_from_mean_T3"))


@recorded_numbers
def test_gradients_are_the_recorded_ones():
    module, variables = loaded()

    def loss(variables, latents):
        images = module.apply(variables, latents, method="decode")
        return jnp.sum(clips("cotangent") * images)

    of_params, of_latents = jax.jit(jax.grad(loss, (0, 1)))(variables, clips("latent_random"))
    recorded = {k.removeprefix("grad/"): x for k, x in archive("io").items() if "grad/" in k}
    got = to_torch(of_params)
    got["latent_random"] = np.moveaxis(of_latents, -1, 2).reshape(recorded["latent_random"].shape)
    for key, wanted in recorded.items():
        error = np.linalg.norm(got[key] - wanted) / np.linalg.norm(wanted)
        assert error < 3e-5, f"{key}: {error}"


@recorded_numbers
def test_a_clip_does_not_depend_on_the_others_but_on_all_of_its_frames():
    module, variables = loaded()
    latents = clips("latent_random")
    decode = jax.jit(functools.partial(module.apply, method="decode"))
    images = decode(variables, latents)
    changed = decode(variables, latents.copy() + np.eye(2)[1].reshape(2, 1, 1, 1, 1))
    np.testing.assert_array_equal(changed[0], images[0])
    assert np.abs(changed[1] - images[1]).max() > 0.1
    late = latents.copy()
    late[0, -1] += 1
    assert np.abs(decode(variables, late)[0, 0] - images[0, 0]).max() > 1e-3


@recorded_numbers
@pytest.mark.parametrize(
    "naming, prefix",
    [("diffusers", "first_stage_model."), ("diffusers", "module.vae."), ("sgm", "_orig_mod.")],
)
def test_weights_come_back_as_they_were(naming, prefix):
    module, variables = loaded()
    state = to_torch(variables, naming)
    again, copy = load_svd({f"{prefix}{key}": x for key, x in state.items()})
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, copy, variables)
    if naming == "diffusers":
        assert state.keys() == archive("params").keys()
        for key, wanted in archive("params").items():
            np.testing.assert_array_equal(state[key], wanted)


@recorded_numbers
def test_the_released_model_has_the_published_names_and_shapes():
    lines = (FOLDER / "svd_vae_keys.txt").read_text().split("\n")
    wanted = dict(line.split("\t")[:2] for line in lines if line)
    tree = weights._shapes(SVDVAE())
    names = weights._names(tree, "diffusers")
    got = {names[p]: str(weights._published(shape, "diffusers")) for p, shape in tree.items()}
    assert got == wanted
    assert len(got) == 374


def zeros(**sizes):
    """A state_dict of a module of these sizes."""
    tree = weights._shapes(SVDVAE(**sizes))
    names = weights._names(tree, "diffusers")
    return {names[p]: np.zeros(weights._published(s, "diffusers")) for p, s in tree.items()}


@pytest.mark.parametrize(
    "sizes",
    [
        dict(channels=(32,), num_resnets=1, num_mid=1),
        dict(channels=(32, 64, 96), num_resnets=3, num_mid=3, latent_channels=8, out_channels=4),
    ],
)
def test_sizes_are_read_off_names_and_shapes(sizes):
    module, variables = load_svd(zeros(**sizes))
    assert module == SVDVAE(**sizes)
    sharding.param_specs(variables["params"], vae_module.PARAM_AXES)


def test_without_a_second_middle_block_there_is_no_attention():
    state = zeros(channels=(32,), num_resnets=1, num_mid=1)
    state = {key: np.full(x.shape, 0.1) for key, x in state.items()}
    module, variables = load_svd(state)
    latents = jax.random.normal(jax.random.key(0), (1, 2, 2, 2, 4))
    decode = functools.partial(module.apply, method="decode", capture_intermediates=True)
    _, layers = jax.eval_shape(decode, variables, latents)
    assert "attention" not in layers["intermediates"]["decoder"]["mid"]
    assert "attention" in variables["params"]["decoder"]["mid"]


def test_names_of_sgm_are_those_of_its_modules():
    sizes = dict(channels=(32, 64), num_resnets=2, num_mid=2)
    names = set(weights._names(weights._shapes(SVDVAE(**sizes)), "sgm").values())
    assert {
        "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.down.0.downsample.conv.bias",
        "encoder.mid.attn_1.proj_out.weight",
        "encoder.norm_out.weight",
        "quant_conv.weight",
        "decoder.mid.block_2.time_stack.in_layers.2.weight",
        "decoder.mid.block_1.mix_factor",
        "decoder.up.1.upsample.conv.weight",
        "decoder.up.0.block.0.nin_shortcut.weight",
        "decoder.up.0.block.2.time_stack.out_layers.3.bias",
        "decoder.conv_out.time_mix_conv.weight",
    } <= names
    assert len(names) == len(zeros(**sizes))


def test_what_sgm_lacks_is_not_written_in_its_names():
    _, variables = load_svd(zeros(channels=(32,), num_resnets=1, num_mid=3))
    with pytest.raises(InputError, match="num_mid=3: sgm's decoder has 2 blocks"):
        to_torch(variables, "sgm")


def older(name):
    """The name in an older export."""
    for new, old in (("to_q", "query"), ("to_out.0", "proj_attn"), ("0.conv.", "0.op.")):
        if "attentions" in name or "downsamplers" in name:
            name = name.replace(new, old)
    return name


def test_older_names_and_files_without_quant_conv_are_read():
    state = zeros(channels=(32, 64))
    module, variables = load_svd({older(key): x for key, x in state.items()})
    state = to_torch(variables, "sgm")
    state = {key: x for key, x in state.items() if not key.startswith("quant_conv")}
    again, copy = load_svd(state)
    assert again == module
    np.testing.assert_array_equal(copy["params"]["quant_conv"]["kernel"][0, 0], np.eye(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("decoder.conv_out.bias"), "missing: decoder.conv_out.bias; unknown: none"),
        (lambda s: s.update(extra=np.zeros(2)), "unknown: extra"),
        (lambda s: s.update({"quant_conv.bias": np.zeros(7)}), "quant_conv.bias has shape (7,)"),
        (lambda s: s.update({"quant_conv.bias": np.full(8, np.nan)}), "not finite"),
        (lambda s: s.update({"quant_conv.bias": np.zeros(8, int)}), "expected an array of floats"),
        (lambda s: s.pop("decoder.conv_in.weight"), "expected decoder.conv_in.weight of rank 4"),
        (lambda s: s.clear(), "no weights of an autoencoder"),
    ],
)
def test_wrong_weights_are_named(change, message):
    state = zeros(channels=(32,))
    change(state)
    with pytest.raises(InputError, match=re.escape(message)):
        load_svd(state)


def test_images_and_latents_of_another_shape_are_refused():
    module, variables = load_svd(zeros(channels=(32,)))
    with pytest.raises(InputError, match="images have shape"):
        module.apply(variables, jnp.zeros((2, 8, 8, 3)), method="encode")
    with pytest.raises(InputError, match="latents have shape .* 4 channels"):
        module.apply(variables, jnp.zeros((1, 2, 8, 8, 3)), method="decode")
    with pytest.raises(InputError, match="multiple of 32"):
        jax.eval_shape(SVDVAE(channels=(48,)).init, jax.random.key(0), jnp.zeros((1, 1, 4, 4, 3)))
