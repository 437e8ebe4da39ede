"""LVSM: the fast forms equal the plain ones; targets, views and chunks; initial values; layout."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvsm_jax import LVSM, LVSMEncoderDecoder, blocks, model
from nvs_common import errors, layers, sharding
from nvs_common.types import Views
from tests import small_lvsm

KINDS = list(small_lvsm.KINDS)


@functools.cache
def rendered(kind, **options):
    """Pictures of a small model, its options changed but its weights and views the same."""
    module = small_lvsm.KINDS[kind](**options)
    variables = small_lvsm.variables(module)
    targets = small_lvsm.cameras((2, 3), height=8, width=8)
    return jax.jit(module.apply)(variables, small_lvsm.views(), targets)


def sequence(params, x, keep, mask=None):
    """Blocks over one sequence [b, n, d] as they are defined, in NumPy; returns what to keep."""

    def norm(x, scale, centre):
        x = x - x.mean(-1, keepdims=True) if centre else x
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

    erf = np.vectorize(math.erf)
    for i in range(params["mlp_in"]["kernel"].shape[0]):
        p = {name: next(iter(entry.values()))[i] for name, entry in params.items()}
        y = norm(x, p["attention_norm"], True)
        q = norm(np.einsum("bnd,daf->bnaf", y, p["query"]), p["query_norm"], False)
        k, v = (np.einsum("bnd,daf->bnaf", y, p["key_value"][:, j]) for j in range(2))
        k = norm(k, p["key_norm"], False)
        logits = np.einsum("bnaf,bmaf->banm", q, k) / np.sqrt(q.shape[-1])
        logits = logits if mask is None else np.where(mask, logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("banm,bmaf,afd->bnd", weights, v, p["output"], optimize=True)
        h = norm(x, p["mlp_norm"], True) @ p["mlp_in"]
        x = x + (h * 0.5 * (1 + erf(h / np.sqrt(2)))) @ p["mlp_out"]
    return x[:, keep]


def parts(module, variables, context, targets):
    """Parameters and tokens of the inputs [b, m, d] and targets [b, t, n, d] in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    inputs = module.apply(variables, context, method="context_tokens")
    own = module.apply(variables, targets, method="target_tokens")
    return params, np.asarray(inputs, np.float64), np.asarray(own, np.float64)


def input_norm(params, x):
    return np.asarray(layers.layer_norm(jnp.asarray(x), params["input_norm"]["scale"], 1e-5))


def exact(module, variables, context, targets):
    """Pictures of the fast form in float64, and a function from last tokens to pictures."""
    images = lambda own: module.apply(variables, own, 8, 8, method="images")  # noqa: E731
    return module.apply(variables, context, targets), images


@pytest.fixture
def scene(x64):
    """Small views, targets of another size, and a maker of a module with float64 variables."""

    def make(kind, **changes):
        module = small_lvsm.KINDS[kind](dtype=jnp.float64, **changes)
        variables = small_lvsm.variables(module, dtype=np.float64)
        context, targets = small_lvsm.views(), small_lvsm.cameras((2, 3), height=8, width=8)
        return module, variables, context, targets

    return make


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
@pytest.mark.parametrize("num_layers", [1, 2, 4])
@pytest.mark.thorough
def test_decoder_only_equals_one_sequence_for_each_target(
    scene, num_layers, implementation, monkeypatch
):
    if implementation == "cudnn":
        # The form without parts, on this device.
        monkeypatch.setattr("nvs_common.attention.merges", lambda *_: False)
    module, variables, context, targets = scene("decoder_only", layers=num_layers)
    got, images = exact(module, variables, context, targets)
    params, inputs, own = parts(module, variables, context, targets)
    for i in range(own.shape[1]):
        x = input_norm(params, np.concatenate([inputs, own[:, i]], axis=1))
        last = sequence(params["blocks"], x, slice(inputs.shape[1], None))
        np.testing.assert_allclose(got[:, i], images(last[:, None])[:, 0], rtol=0, atol=1e-9)


@pytest.mark.thorough
def test_encoder_decoder_equals_plain_sequences(scene):
    module, variables, context, targets = scene("encoder_decoder")
    got, images = exact(module, variables, context, targets)
    params, inputs, own = parts(module, variables, context, targets)
    start = np.tile(params["latents"], (2, 1, 1))
    latents = sequence(params["encoder"], np.concatenate([start, inputs], axis=1), slice(5))
    for i in range(own.shape[1]):
        x = input_norm(params, np.concatenate([own[:, i], latents], axis=1))
        last = sequence(params["decoder"], x, slice(own.shape[2]))
        np.testing.assert_allclose(got[:, i], images(last[:, None])[:, 0], rtol=0, atol=1e-9)


def test_the_cache_equals_all_targets_packed_in_one_masked_sequence(scene):
    module, variables, context, targets = scene("cached")
    got, images = exact(module, variables, context, targets)
    params, inputs, own = parts(module, variables, context, targets)
    (m, n), count = (inputs.shape[1], own.shape[2]), own.shape[1]
    x = np.concatenate([inputs, own.reshape(2, count * n, -1)], axis=1)
    group = np.concatenate([np.zeros(m), np.repeat(np.arange(count) + 1, n)])
    mask = (group[None, :] == 0) | (group[:, None] == group[None, :])
    last = sequence(params["blocks"], input_norm(params, x), slice(m, None), mask)
    np.testing.assert_allclose(got, images(last.reshape(own.shape)), rtol=0, atol=1e-9)


def test_the_cross_attention_decoder_sees_all_encoded_inputs_and_nothing_else(scene):
    module, variables, context, targets = scene("cross_attention", decoder_layers=1)
    got, images = exact(module, variables, context, targets)
    params, inputs, own = parts(module, variables, context, targets)
    features = input_norm(params, sequence(params["encoder"], inputs, slice(None)))
    cache = module.apply(variables, context, method="encode")
    layer = blocks.only(params["decoder"])
    keys, values = blocks.keys_values(layer, features, blocks.Setting(jnp.float64), None)
    np.testing.assert_allclose(cache.key[0], keys, rtol=0, atol=1e-9)
    np.testing.assert_allclose(cache.value[0], values, rtol=0, atol=1e-9)
    # Half of a target's rows are rendered the same without the other half.
    top = dataclasses.replace(targets, height=4)
    half = module.apply(variables, cache, top, method="decode")
    np.testing.assert_allclose(half, got[:, :, :4], rtol=0, atol=1e-9)
    assert np.abs(images(own) - got).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.thorough
def test_options_that_save_memory_change_nothing(kind):
    plain = rendered(kind)
    assert plain.shape == (2, 3, 8, 8, 3) and plain.dtype == jnp.float32
    saving = rendered(kind, target_chunk=2, unroll=2, remat="full")
    np.testing.assert_allclose(saving, plain, rtol=0, atol=2e-6)


def test_parameters_are_made_where_targets_come_in_chunks():
    module = small_lvsm.decoder_only(layers=1, target_chunk=2, remat="full")
    init = jax.jit(lambda key: module.init(key, small_lvsm.views(1), small_lvsm.cameras((1, 3))))
    # Of what was made inside the loop over chunks nothing would be left here.
    made = init(jax.random.key(0))
    wanted = small_lvsm.variables(module)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, wanted)


def temporaries(change=lambda f: f, num_targets=8, **options):
    """Bytes that XLA plans for a small model beside arguments and results."""
    context, targets = small_lvsm.views(1), small_lvsm.cameras((1, num_targets))
    module = small_lvsm.decoder_only(layers=6, **options)
    variables = small_lvsm.variables(module)
    render = lambda v: jnp.sum(module.apply(v, context, targets) ** 2)  # noqa: E731
    compiled = jax.jit(change(render)).lower(variables).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_remat_stores_less():
    assert temporaries(jax.grad, remat="full") < 0.6 * temporaries(jax.grad, remat="none")


@pytest.mark.thorough
def test_chunks_need_no_memory_for_more_targets_but_their_pictures():
    pictures = 16 * 8 * 12 * 3 * 4
    grown = {
        chunk: temporaries(num_targets=24, target_chunk=chunk)
        - temporaries(num_targets=8, target_chunk=chunk)
        for chunk in (0, 1)
    }
    assert grown[1] < 3 * pictures < grown[0] / 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_does_not_see_the_others(kind):
    module = small_lvsm.KINDS[kind]()
    variables, context = small_lvsm.variables(module), small_lvsm.views()
    targets = small_lvsm.cameras((2, 3), height=8, width=8)
    alone = jax.jit(module.apply)(variables, context, targets[:, 1:2])
    np.testing.assert_allclose(alone, rendered(kind)[:, 1:2], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_views_permute(kind):
    module = small_lvsm.KINDS[kind]()
    variables, context = small_lvsm.variables(module), small_lvsm.views()
    swapped = Views(context.images[:, ::-1], context.cameras[:, ::-1])
    targets = small_lvsm.cameras((2, 3), height=8, width=8)
    got = jax.jit(module.apply)(variables, swapped, targets)
    np.testing.assert_allclose(got, rendered(kind), rtol=0, atol=2e-6)
    images = Views(context.images[:, ::-1], context.cameras)
    assert np.abs(jax.jit(module.apply)(variables, images, targets) - got).max() > 1e-3


@pytest.mark.parametrize("kind", ["encoder_decoder", "cached", "cross_attention"])
def test_encode_then_decode_is_the_whole(kind):
    module = small_lvsm.KINDS[kind]()
    variables, context = small_lvsm.variables(module), small_lvsm.views()
    encoded = jax.jit(lambda: module.apply(variables, context, method="encode"))()
    targets = small_lvsm.cameras((2, 3), height=8, width=8)
    got = jax.jit(lambda e: module.apply(variables, e, targets, method="decode"))(encoded)
    np.testing.assert_allclose(got, rendered(kind), rtol=0, atol=2e-6)


def test_an_lvsm_whose_inputs_see_targets_cannot_be_encoded():
    module = small_lvsm.decoder_only()
    with pytest.raises(errors.InputError, match="input_sees_target=False"):
        module.apply(small_lvsm.variables(module), small_lvsm.views(), method="encode")


def test_residuals_are_divided_by_the_root_of_the_layers(scene):
    scaled, variables, context, targets = scene("decoder_only", scale_residuals=True)
    plain, *_ = scene("decoder_only")
    divided = jax.tree.map(lambda x: x, variables)
    for name in ("output", "mlp_out"):
        kernel = divided["params"]["blocks"][name]["kernel"]
        divided["params"]["blocks"][name] = {"kernel": kernel / np.sqrt(3)}
    got = scaled.apply(variables, context, targets)
    np.testing.assert_allclose(got, plain.apply(divided, context, targets), rtol=0, atol=1e-12)
    assert np.abs(got - plain.apply(variables, context, targets)).max() > 1e-3


def test_bfloat16_is_near_and_keeps_rays_tokens_and_pictures_in_float32():
    module = small_lvsm.decoder_only(dtype=jnp.bfloat16)
    variables = small_lvsm.variables(module)
    plain = small_lvsm.decoder_only()
    for method, argument in [
        ("context_tokens", small_lvsm.views()),
        ("target_tokens", small_lvsm.cameras((2, 3))),
    ]:
        got, wanted = (m.apply(variables, argument, method=method) for m in (module, plain))
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == jnp.float32
    low, full = rendered("decoder_only", dtype=jnp.bfloat16), rendered("decoder_only")
    assert low.dtype == jnp.float32
    difference = np.abs(low - full).max()
    assert 1e-6 < difference < 0.1


@pytest.mark.parametrize("depth_init", [True, False])
def test_initial_deviations_follow_the_depth_of_each_stack(depth_init):
    module = LVSM(layers=4, width=64, head_size=16, depth_init=depth_init)
    make = functools.partial(module.init, context=small_lvsm.views(1, 1, height=8, width=8))
    targets = small_lvsm.cameras((1, 1), height=8, width=8)
    params = jax.jit(lambda key: make(key, targets=targets))(jax.random.key(0))["params"]
    for name, entry in params["blocks"].items():
        for i in range(4):
            if "norm" in name:
                np.testing.assert_array_equal(entry["scale"][i], 1)
                continue
            wanted = 0.02 / np.sqrt(2 * (i + 1 if depth_init else 4))
            np.testing.assert_allclose(np.std(entry["kernel"][i]), wanted, rtol=0.05)
    for name in ("image_tokenizer", "target_tokenizer", "head"):
        np.testing.assert_allclose(np.std(params[name]["kernel"]), 0.02, rtol=0.03)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_the_defaults_have_the_published_numbers_of_parameters():
    views, targets = small_lvsm.views(1, 1, height=8, width=8), small_lvsm.cameras((1, 1), 8, 8)
    for module, count in [(LVSM(), 170_795_520), (LVSMEncoderDecoder(), 173_154_816)]:
        shapes = jax.eval_shape(module.init, jax.random.key(0), views, targets)
        assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("rows", [3, 1100])
def test_the_gradient_of_a_product_of_many_rows_is_exact(rows):
    rng = np.random.default_rng(0)
    x, kernel, weight = (rng.normal(size=size) for size in ((rows, 5), (5, 7), (rows, 7)))
    loss = lambda x, kernel: jnp.sum(layers.product(x, kernel) * weight)  # noqa: E731
    found = jax.jit(jax.grad(loss, (0, 1)))(jnp.float32(x), jnp.float32(kernel))
    np.testing.assert_allclose(found[0], weight @ kernel.T, atol=1e-4)
    np.testing.assert_allclose(found[1], x.T @ weight, atol=1e-4)


def test_sizes_that_do_not_fit_are_explained():
    views, targets = small_lvsm.views(1, 1), small_lvsm.cameras((1, 1))
    for changes, words in [
        ({"width": 0}, "width=0 is"),
        ({"head_size": 5}, "width=16 is not a multiple of head_size=5"),
        ({"remat": "some"}, "remat='some' is unknown"),
        ({"target_chunk": -3}, "target_chunk=-3: expected 0 or more"),
        ({"unroll": 0}, "unroll=0: expected 1 or more"),
        ({"layers": 0}, "blocks has 0 layers"),
        ({"attention": "fast"}, "'fast' is unknown"),
        ({"patch": 5}, "8 x 12 pixels: both sides must be multiples of the patch, 5"),
        ({"relative": "cape"}, "relative='cape' is unknown"),
        ({"relative": "gta", "head_size": 4}, "divisible by 8"),
    ]:
        module = small_lvsm.decoder_only(**changes)
        with pytest.raises(errors.InputError, match=words):
            jax.eval_shape(module.init, jax.random.key(0), views, targets)


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_equals_single_device(kind):
    module = small_lvsm.KINDS[kind](remat="dots")
    variables, context = small_lvsm.variables(module), small_lvsm.views()
    targets = small_lvsm.cameras((2, 3), height=8, width=8)
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2, "context": 2})
    specs = sharding.param_specs(variables["params"], model.PARAM_AXES, mesh)
    placed = jax.tree.map(
        lambda x, spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)),
        variables["params"],
        specs,
    )
    with jax.set_mesh(mesh), sharding.axis_rules():
        got = jax.jit(module.apply)({"params": placed}, context, targets)
    np.testing.assert_allclose(got, rendered(kind), rtol=0, atol=5e-6)
