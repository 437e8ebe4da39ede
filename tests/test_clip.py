"""CLIP's image encoder and resizing against recorded numbers; published names."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvs_common import errors, sharding
from tests import conftest
from vqnerf_jax import clip, load_clip, resizing

FOLDER = conftest.GOLDENS / "vq"
recorded = pytest.mark.skipif(not FOLDER.is_dir(), reason="no recorded numbers beside this")


@functools.cache
def golden(name):
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def state():
    arrays = golden("clip_vision_tiny")
    return {k.removeprefix("w/"): x for k, x in arrays.items() if k.startswith("w/")}


def channels_last(x):
    return np.moveaxis(x, 1, -1)


def close(got, wanted, tolerance=1e-5):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)


@recorded
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_embeddings_and_the_pixel_gradient_are_the_recorded_ones(dtype):
    wanted = golden("clip_vision_tiny")
    with jax.enable_x64(dtype == "float64"):
        module, variables = load_clip(state(), heads=4)
        variables = jax.tree.map(lambda x: jnp.asarray(x, dtype), variables)
        pixels = jnp.asarray(channels_last(wanted["pixel_values"]), dtype)

        @jax.jit
        @functools.partial(jax.value_and_grad, has_aux=True)
        def distance(first, rest):
            pixels = jnp.concatenate([first, rest])
            raw = module.apply(variables, pixels)
            states = module.apply(variables, pixels, method="hidden_states")
            return clip.cosine_distance(raw[:1], raw[1:2]), (raw, jnp.stack(states))

        (value, (raw, states)), gradient = distance(pixels[:1], pixels[1:])
        assert raw.dtype == dtype
        close(states, wanted["hidden_states"])
        close(raw, wanted["image_embeds_unnormalised"])
        close(clip.codes.unit(raw), wanted["image_embeds"])
        close(value, wanted["cosine_loss_0_vs_1"], 1e-6)
        close(gradient, channels_last(wanted["grad_pixel_values_0"]))


@recorded
@pytest.mark.parametrize("size", [32, 14])
@pytest.mark.parametrize("method", resizing.METHODS)
def test_resized_images_are_the_recorded_ones(method, size):
    wanted = golden("resize_torch")
    kind, _, antialias = method.partition("_")
    image = channels_last(wanted["image"])
    got = resizing.resize(jnp.asarray(image), size, size, method)
    close(got, channels_last(wanted[f"{kind}_{size}_aa{int(bool(antialias))}"]), 2e-6)


@recorded
def test_normalised_pixels_are_the_recorded_ones():
    wanted = golden("resize_torch")
    image = channels_last(wanted["image"])
    got = jnp.clip(resizing.resize(jnp.asarray(image), 32, 32, "bicubic"), 0, 1)
    close(clip.normalize(got), channels_last(wanted["normalised_bicubic_32"]), 2e-6)


@recorded
def test_openai_names_give_the_same():
    _, variables = load_clip(state(), heads=4)
    renamed = {"visual.proj": state()["visual_projection.weight"].T, "logit_scale": np.ones(())}
    for key, x in state().items():
        key = key.replace("vision_model.encoder.layers", "visual.transformer.resblocks")
        key = key.replace("vision_model.embeddings.patch_embedding", "visual.conv1")
        key = key.replace("vision_model.embeddings.class_", "visual.class_")
        key = key.replace(
            "vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"
        )
        key = key.replace("vision_model.pre_layrnorm", "visual.ln_pre")
        key = key.replace("vision_model.post_layernorm", "visual.ln_post")
        key = key.replace("layer_norm", "ln_").replace("fc1", "c_fc").replace("fc2", "c_proj")
        key = key.replace("self_attn", "attn")
        if "visual_projection" not in key:
            renamed[key] = x
    for i in range(2):
        for leaf in ("weight", "bias"):
            where = f"visual.transformer.resblocks.{i}.attn"
            parts = [renamed.pop(f"{where}.{part}_proj.{leaf}") for part in "qkv"]
            renamed[f"{where}.in_proj_{leaf}"] = np.concatenate(parts)
    _, read = load_clip(renamed, heads=4)
    jax.tree.map(np.testing.assert_array_equal, dict(read), dict(variables))


@recorded
def test_the_published_configuration_is_accepted_and_compared():
    config = json.loads(str(golden("clip_vision_tiny")["config"]))
    assert load_clip(state(), **config)[0] == load_clip(state(), heads=4)[0]
    for change, words in [
        ({"image_size": 224}, "image_size=224 was given, but the arrays say 32"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"depth": 2}, r"unknown options \['depth'\]"),
        ({"model_type": "clip", "activaton": "gelu"}, r"unknown options \['activaton'\]"),
        ({"vision_config": {"hidden_size": 9}}, "hidden_size=9 was given"),
    ]:
        with pytest.raises(errors.InputError, match=words):
            load_clip(state(), **{**config, **change})
    # All that transformers writes, and patches that leave a border of the image.
    whole = {"model_type": "clip", "dtype": "float16", "_commit": "x", "vision_config": config}
    patch = load_clip(state(), **config)[0].patch
    assert (
        load_clip(
            state(),
            **whole,
        )[0]
        == load_clip(state(), heads=4)[0]
    )
    module, variables = load_clip(state(), **{**config, "image_size": 32 + patch - 1})
    assert module.size == 32 + patch - 1
    pixels = np.random.default_rng(0).normal(size=(1, module.size, module.size, 3)).astype("f4")
    inner = module.clone(size=32).apply(variables, jnp.asarray(pixels[:, :32, :32]))
    np.testing.assert_array_equal(module.apply(variables, jnp.asarray(pixels)), inner)
    with pytest.raises(errors.InputError, match="pass heads="):
        load_clip(state())
    short = state()
    del short["vision_model.encoder.layers.1.mlp.fc2.bias"]
    short["vision_model.head.weight"] = np.ones(3)
    words = r"missing: blocks_1/mlp_out/bias; unknown: vision_model.head.weight"
    with pytest.raises(errors.InputError, match=words):
        load_clip(short, heads=4)


def test_images_of_any_size_are_embedded_on_the_unit_sphere():
    module = clip.VisionTransformer(8, 4, 12, 1, 2, 8, 5)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    draw = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: draw.normal(size=x.shape).astype("f4"), shapes)
    images = jnp.asarray(draw.uniform(size=(2, 9, 13, 3)), jnp.float32)
    got = jax.jit(functools.partial(clip.embed, module))(variables, images)
    assert got.shape == (2, 5)
    close(jnp.linalg.norm(got, axis=-1), np.ones(2))
    with pytest.raises(errors.InputError, match="use clip.embed"):
        module.apply(variables, images)
    sharding.param_specs(shapes["params"], clip.PARAM_AXES)
    with pytest.raises(errors.InputError, match="method='lanczos'"):
        resizing.resize(images, 3, 3, "lanczos")
