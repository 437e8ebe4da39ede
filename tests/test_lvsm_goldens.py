"""LVSM against recorded numbers of the published code: pictures, activations, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvsm_jax import LVSM, blocks, load_torch, to_torch, tokens
from nvs_common import cameras, layers
from nvs_common.types import Cameras, Views
from tests import conftest

FOLDER = conftest.GOLDENS / "lvsm"
DECODER_ONLY, ENCODER_DECODER = "decoder_only_tiny", "encoder_decoder_tiny"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no recorded numbers beside this")


@functools.cache
def golden(name):
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@functools.cache
def loaded(name):
    prefix = "param/"
    state = {k.removeprefix(prefix): x for k, x in golden(name).items() if k.startswith(prefix)}
    return load_torch(state)


def channels_last(x):
    return np.moveaxis(x, -3, -1)


def views(name):
    """Context and target views."""
    recorded = golden(name)
    images, poses = channels_last(recorded["in/image"]), recorded["in/c2w"]
    near = np.ones(poses.shape[:2], np.float32)
    cams = Cameras(poses, recorded["in/fxfycxcy"], near, 9 * near, *images.shape[2:4])
    count = int(recorded["in/num_input_views"])
    return Views(images[:, :count], cams[:, :count]), Views(images[:, count:], cams[:, count:])


def close(got, wanted, tolerance=2e-5):
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)


@functools.cache
def loss_and_gradients(name, **options):
    module, variables = loaded(name)
    module = module.clone(**options)
    context, target = views(name)

    def loss(variables):
        images = module.apply(variables, context, target.cameras)
        return jnp.mean(jnp.square(images - target.images)), images

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)


@pytest.mark.parametrize("name", [DECODER_ONLY, ENCODER_DECODER])
def test_pictures_are_the_recorded_ones(name):
    (value, images), _ = loss_and_gradients(name)
    close(images, channels_last(golden(name)["out/render"]))
    np.testing.assert_allclose(value, golden(name)["out/l2_loss"], rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"remat": "full", "target_chunk": 1, "unroll": 2}])
@pytest.mark.parametrize("name", [DECODER_ONLY, ENCODER_DECODER])
def test_gradients_are_the_recorded_ones(name, options):
    module, _ = loaded(name)
    gradients = to_torch(module, loss_and_gradients(name, **options)[1])
    assert {f"grad/{key}" for key in gradients} == {k for k in golden(name) if "grad/" in k}
    for key, got in gradients.items():
        wanted = golden(name)[f"grad/{key}"]
        error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
        assert error < 1e-5, f"{key}: {error}"


@pytest.mark.parametrize("name", [DECODER_ONLY, ENCODER_DECODER])
def test_rays_and_tokens_are_the_recorded_ones(name):
    module, variables = loaded(name)
    recorded = golden(name)
    context, target = views(name)
    for kind, cams in (("input", context.cameras), ("target", target.cameras)):
        origins, directions = cameras.rays(cams)
        close(origins, channels_last(recorded[f"mid/{kind}_ray_o"]), 1e-6)
        close(directions, channels_last(recorded[f"mid/{kind}_ray_d"]), 1e-6)
        close(cameras.plucker(cams), channels_last(recorded[f"mid/{kind}_plucker"]), 2e-6)
    posed = channels_last(recorded["mid/input_posed_image"])
    close(tokens.of_views(context, module.patch), tokens.patchify(posed, module.patch), 2e-6)
    got = module.apply(variables, context, method="context_tokens")
    close(got.reshape(recorded["mid/image_tokens"].shape), recorded["mid/image_tokens"])
    got = module.apply(variables, target.cameras, method="target_tokens")
    close(got.reshape(recorded["mid/target_tokens"].shape), recorded["mid/target_tokens"])


def check_blocks(name, stack, theirs, x):
    """Compares each block, and what attention adds in it; returns the last block's output."""
    params, setting = loaded(name)[1]["params"][stack], blocks.Setting()
    for index, layer in enumerate(blocks.split(params, *[1] * blocks.depth(params))):
        recorded = {k: golden(name)[f"mid/{theirs}.{index}.{k}"] for k in ("in", "attn_out", "out")}
        close(x, recorded["in"], 5e-5)
        layer, without_mlp = blocks.only(layer), dict(blocks.only(layer))
        without_mlp["mlp_out"] = jax.tree.map(jnp.zeros_like, layer["mlp_out"])
        close(blocks.block(without_mlp, x, setting) - x, recorded["attn_out"], 5e-5)
        x = blocks.block(layer, x, setting)
        close(x, recorded["out"], 5e-5)
    return x


def normalized(name, x):
    return layers.layer_norm(x, loaded(name)[1]["params"]["input_norm"]["scale"], blocks.EPSILON)


def check_head(name, x, target):
    module, variables = loaded(name)
    recorded = golden(name)
    close(x, recorded["mid/head_in"], 5e-5)
    scale = variables["params"]["head_norm"]["scale"]
    close(layers.layer_norm(x, scale, blocks.EPSILON), recorded["mid/head_ln"], 5e-5)
    own = x.reshape(*target.cameras.near.shape, *x.shape[1:])
    size = (target.cameras.height, target.cameras.width)
    images = module.apply(variables, own, *size, method="images")
    close(images, channels_last(recorded["out/render"]))


def test_blocks_of_the_decoder_only_model_are_the_recorded_ones():
    module, variables = loaded(DECODER_ONLY)
    assert type(module) is LVSM
    context, target = views(DECODER_ONLY)
    inputs = module.apply(variables, context, method="context_tokens")
    own = module.apply(variables, target.cameras, method="target_tokens")
    count = own.shape[1]
    own = own.reshape(-1, *own.shape[2:])
    # As it is defined: a sequence of its own, inputs first, for each target.
    x = jnp.concatenate([jnp.repeat(inputs, count, axis=0), own], axis=1)
    x = check_blocks(DECODER_ONLY, "blocks", "transformer_blocks", normalized(DECODER_ONLY, x))
    check_head(DECODER_ONLY, x[:, inputs.shape[1] :], target)


def test_blocks_of_the_encoder_decoder_are_the_recorded_ones():
    name = ENCODER_DECODER
    module, variables = loaded(name)
    context, target = views(name)
    inputs = module.apply(variables, context, method="context_tokens")
    start = jnp.broadcast_to(variables["params"]["latents"], (2, module.latents, module.width))
    x = check_blocks(name, "encoder", "transformer_encoder", jnp.concatenate([start, inputs], 1))
    latents = x[:, : module.latents]
    close(jax.jit(lambda: module.apply(variables, context, method="encode"))(), latents, 5e-5)
    own = module.apply(variables, target.cameras, method="target_tokens")
    count, num_own = own.shape[1:3]
    own = own.reshape(-1, *own.shape[2:])
    x = jnp.concatenate([own, jnp.repeat(latents, count, axis=0)], axis=1)
    x = check_blocks(name, "decoder", "transformer_decoder", normalized(name, x))
    check_head(name, x[:, :num_own], target)


@pytest.mark.parametrize("name", [DECODER_ONLY, ENCODER_DECODER])
def test_the_state_dict_comes_back_as_it_was(name):
    module, variables = loaded(name)
    state = to_torch(module, variables)
    recorded = {k.removeprefix("param/"): x for k, x in golden(name).items() if "param/" in k}
    assert state.keys() == recorded.keys()
    for key, wanted in recorded.items():
        np.testing.assert_array_equal(state[key], wanted)
