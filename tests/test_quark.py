"""Quark's network: attention folding, symmetry, variable inputs, ablations, sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import quark as quark_config
from nvs_common import sharding
from nvs_common.errors import InputError
from nvs_common.types import Batch, Cameras, Render, Views
from quark_jax import Quark, Stage, fusion, ldm, model, one_to_many, supervision, task

# Two levels, one collapse, one step up: everything that happens, as small as it gets.
STAGES = ((1, 1, 2, 1, False), (1, 1, 2, 1, False), (0, 1, 1, 1, True))
SMALL = dict(
    grid_area=8 * 12,
    layers=2,
    channels=8,
    stages=STAGES,
    encoder_blocks=(1, 1),
    update_blocks=1,
    appearance_channels=4,
)


def small(**changes) -> Quark:
    return task.make_module({**SMALL, **changes})


def make_cameras(lead, rng, height=16, width=24, behind=False) -> Cameras:
    pose = np.tile(np.eye(4, dtype=np.float32), (*lead, 1, 1))
    pose[..., :2, 3] = rng.normal(size=(*lead, 2)) * 0.2
    if behind:
        pose[..., 2, 3] = 50.0
    k = np.tile(np.array([20.0, 20.0, width / 2, height / 2], np.float32), (*lead, 1))
    near, far = np.full(lead, 1.0, np.float32), np.full(lead, 10.0, np.float32)
    return Cameras(pose, k, near, far, height, width)


def make_batch(scenes=1, views=3, targets=2, seed=0, **camera_options) -> Batch:
    rng = np.random.default_rng(seed)
    context = make_cameras((scenes, views), rng, **camera_options)
    target = make_cameras((scenes, targets), rng)
    images = rng.uniform(size=(scenes, views, 16, 24, 3)).astype(np.float32)
    truth = rng.uniform(size=(scenes, targets, 16, 24, 3)).astype(np.float32)
    depth = rng.uniform(1.5, 9, size=(scenes, targets, 16, 24)).astype(np.float32)
    return Batch(Views(images, context), Views(truth, target), {"depth": depth})


def randomized(variables, seed=1):
    """Random weights everywhere, so that no zero initialisation hides a path."""
    leaves, structure = jax.tree.flatten(variables)
    rng = np.random.default_rng(seed)
    noisy = [x + 0.2 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(structure, noisy)


@functools.cache
def apply_small(**changes):
    """A small module's jitted apply and random variables; the batch sets views and targets."""
    module = small(**changes)
    batch = make_batch()
    variables = jax.jit(module.init)(jax.random.key(0), batch.context, batch.target.cameras)
    return jax.jit(module.apply), randomized(variables)


def test_folded_attention_equals_standard_attention(x64):
    rng = np.random.default_rng(0)
    channels, heads, per_head = 8, 2, 4
    q, k, v = (jnp.asarray(rng.normal(size=(channels, heads, per_head))) for _ in range(3))
    out = jnp.asarray(rng.normal(size=(heads, per_head, channels)))
    element = jnp.asarray(rng.normal(size=(10, channels)))
    delta = jnp.asarray(rng.normal(size=(5, 10, channels)))
    valid = jnp.asarray(rng.uniform(size=(5, 10)) > 0.3)

    standard = one_to_many.attend(
        jnp.einsum("nc,caf->naf", element, q),
        jnp.einsum("vnc,caf->vnaf", delta, k),
        jnp.einsum("vnc,caf->vnaf", delta, v),
        valid,
        per_head**-0.5,
    )
    standard = jnp.einsum("naf,afc->nc", standard, out)
    folded_q, folded_out = fusion.fold(q, k, v, out)
    query = jnp.einsum("nc,cad->nad", element, folded_q)
    folded = one_to_many.attend(query, delta, delta, valid, channels**-0.5)
    folded = jnp.einsum("nac,acd->nd", folded, folded_out)
    # The softmax is float32 by contract; only the projections are folded.
    np.testing.assert_allclose(folded, standard, atol=1e-5)


@pytest.mark.parametrize("one_for_all_heads", [True, False])
def test_attention_gradient_is_the_one_of_plain_attention(x64, one_for_all_heads):
    rng = np.random.default_rng(3)
    shape = (3, 6, 4) if one_for_all_heads else (3, 6, 2, 4)
    query, keys, values = (jnp.asarray(rng.normal(size=s)) for s in ((6, 2, 4), shape, shape))
    valid = jnp.asarray(rng.uniform(size=(3, 6)) > 0.4).at[:, 0].set(False)

    def plain(query, keys, values):
        heads = "" if one_for_all_heads else "a"
        logits = jnp.einsum(f"naf,vn{heads}f->vna", query, keys) * 0.5
        logits = jnp.where(one_to_many.masked(valid)[..., None], logits, -1e9)
        weights = jax.nn.softmax(logits, axis=0)
        return jnp.einsum(f"vna,vn{heads}c->nac", weights, values)

    def score(function):
        return jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(function(*x))), (0, 1, 2))

    ours = score(lambda q, k, v: one_to_many.attend(q, k, v, valid, 0.5))(query, keys, values)
    for a, b in zip(
        jax.tree.leaves(ours), jax.tree.leaves(score(plain)(query, keys, values)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_folding_is_exact_algebra(x64):
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(8, 2, 4))) for _ in range(3))
    out = jnp.asarray(rng.normal(size=(2, 4, 8)))
    element, key = jnp.asarray(rng.normal(size=8)), jnp.asarray(rng.normal(size=8))
    folded_q, folded_out = fusion.fold(q, k, v, out)
    standard = jnp.einsum("c,caf,d,daf->a", element, q, key, k) / 4**0.5
    folded = jnp.einsum("c,cad,d->a", element, folded_q, key) / 8**0.5
    np.testing.assert_allclose(folded, standard, atol=1e-12)
    standard = jnp.einsum("c,caf,afd->ad", key, v, out)
    np.testing.assert_allclose(jnp.einsum("c,acd->ad", key, folded_out), standard, atol=1e-12)


@pytest.mark.thorough
def test_order_of_the_views_does_not_matter():
    apply, variables = apply_small()
    batch = make_batch()
    order = np.array([2, 0, 1])
    permuted = jax.tree.map(lambda x: x[:, order], batch.context)
    a = apply(variables, batch.context, batch.target.cameras)
    b = apply(variables, permuted, batch.target.cameras)
    np.testing.assert_allclose(a.images, b.images, atol=2e-5)
    np.testing.assert_allclose(a.depth, b.depth, rtol=1e-4)


@pytest.mark.parametrize("views", [1, 2, 16])
@pytest.mark.thorough
def test_any_number_of_views(views):
    apply, variables = apply_small()
    batch = make_batch(views=views)
    rendered = apply(variables, batch.context, batch.target.cameras)
    assert rendered.images.shape == (1, 2, 16, 24, 3)
    assert np.all(np.isfinite(rendered.images))


@pytest.mark.thorough
def test_targets_are_rendered_independently():
    apply, variables = apply_small()
    batch = make_batch(scenes=2)
    both = apply(variables, batch.context, batch.target.cameras)
    one = apply(variables, batch.context, batch.target.cameras[:, 1:])
    np.testing.assert_allclose(both.images[:, 1:], one.images, atol=1e-5)


def test_output_size_is_the_targets_own():
    apply, variables = apply_small()
    batch = make_batch()
    targets = make_cameras((1, 1), np.random.default_rng(0), height=30, width=20)
    rendered = apply(variables, batch.context, targets)
    assert rendered.images.shape == (1, 1, 30, 20, 3)
    assert rendered.depth.shape == rendered.alpha.shape == (1, 1, 30, 20)


def test_encoded_inputs_serve_many_targets():
    module, batch = small(), make_batch()
    apply, variables = apply_small()
    features = jax.jit(lambda v, c: module.apply(v, c, method="encode"))(variables, batch.context)
    render = jax.jit(lambda *a: module.apply(*a, method="render"))
    rendered = render(variables, batch.context, features, batch.target.cameras)
    expected = apply(variables, batch.context, batch.target.cameras)
    np.testing.assert_allclose(rendered.images, expected.images, atol=1e-6)


def config_of(**changes) -> ConfigDict:
    config = quark_config.get_config("tiny")
    with config.unlocked():
        config.model = ConfigDict({**SMALL, **changes})
    return config


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.thorough
def test_gradients_are_finite_even_with_every_view_behind(behind):
    made = task.make(config_of())
    batch = make_batch(behind=behind)
    _, variables = apply_small()
    step = jax.jit(jax.grad(lambda v: made.loss(v, batch, jax.random.key(0))[0]))
    for leaf in jax.tree.leaves(step(variables)):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize(
    "ablation",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "no_sweep" else name
        for name in sorted(quark_config.ABLATIONS)
    ],
)
@pytest.mark.thorough
def test_every_ablation_changes_the_picture_or_the_network(ablation):
    # Only what is there can be removed.
    changes = dict(sweep_planes=8, density_bias=0.0) if ablation == "no_sweep" else {}
    config = config_of(**changes)
    before = task.make_module(config.model)
    quark_config.ABLATIONS[ablation](config)
    after = task.make_module(config.model)
    assert before != after
    batch = make_batch()
    init = jax.jit(after.init)
    variables = randomized(init(jax.random.key(0), batch.context, batch.target.cameras))
    rendered = jax.jit(after.apply)(variables, batch.context, batch.target.cameras)
    plain, plain_variables = apply_small(**changes)
    reference = plain(plain_variables, batch.context, batch.target.cameras)
    assert np.all(np.isfinite(rendered.images))
    assert float(jnp.max(jnp.abs(rendered.images - reference.images))) > 1e-3


def test_without_render_and_refine_the_map_is_never_rendered_to_the_views():
    apply, variables = apply_small(render_and_refine=False)
    batch = make_batch()
    changed = jax.tree.map(lambda x: x, variables)
    for name in ("decoders_0", "decoders_1"):
        changed["params"][name]["appearance"]["kernel"] += 1.0
    a = apply(variables, batch.context, batch.target.cameras)
    b = apply(changed, batch.context, batch.target.cameras)
    np.testing.assert_array_equal(a.images, b.images)


def test_every_parameter_has_one_sharding_row():
    for changes in ({}, {"output": "rgb"}, {"folded_attention": False}):
        module, batch = small(**changes), make_batch()
        shapes = jax.eval_shape(module.init, jax.random.key(0), batch.context, batch.target.cameras)
        specs = sharding.param_specs(shapes["params"], model.PARAM_AXES)
        assert len(jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, jax.P))) > 50


@pytest.mark.thorough
def test_eight_devices_give_the_result_of_one():
    made = task.make(config_of())
    batch = make_batch(scenes=8, targets=1)
    _, variables = apply_small()
    value = jax.value_and_grad(lambda v, b: made.loss(v, b, jax.random.key(0))[0])
    loss_one, grads_one = jax.jit(value)(variables, batch)
    mesh = sharding.make_mesh(dict(data=8))
    spread = jax.NamedSharding(mesh, jax.P("data"))
    loss_eight, grads_eight = jax.jit(value)(
        jax.device_put(variables, jax.NamedSharding(mesh, jax.P())), jax.device_put(batch, spread)
    )
    assert float(loss_eight) == pytest.approx(float(loss_one), rel=1e-5)
    for a, b in zip(jax.tree.leaves(grads_one), jax.tree.leaves(grads_eight), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, float(np.abs(a).max())))


def test_photos_variant_needs_no_depth():
    config = quark_config.get_config("tiny,photos")
    config.model = config_of().model
    batch = make_batch()
    _, variables = apply_small()
    loss, aux = jax.jit(task.make(config).loss)(
        variables, batch.replace(extras={}), jax.random.key(0)
    )
    assert np.isfinite(loss) and "depth" not in aux.metrics


def test_fewer_iterations_work_at_every_aspect_ratio():
    config = quark_config.get_config("tiny,fewer_iterations")
    assert [tuple(stage) for stage in config.model.stages] == [(0, 2, 2, 1, False)]
    published = quark_config.get_config("quark,fewer_iterations").model.stages
    assert [stage[0] for stage in published] == [2, 2, 1, 0]
    module = task.make_module(config.model)
    context = Views(
        jnp.zeros((1, 2, 96, 144, 3)), make_cameras((1, 2), np.random.default_rng(0), 96, 144)
    )
    jax.eval_shape(module.init, jax.random.key(0), context, context.cameras[:, :1])


def test_paper_sizes_have_the_published_schedule():
    """Tab. 8: volumes of each stage, 15 attentions and 24 convolution blocks."""
    module = task.make_module(quark_config.get_config("quark").model)
    assert module.stages == model.PAPER_STAGES
    assert sum(s.blocks for s in module.stages) == 15
    assert sum(s.blocks * s.convs for s in module.stages) == 24
    grid = (288, 512)
    layers = module.layers * 4
    elements = []
    for stage in module.stages:
        layers //= 2 if stage.collapse else 1
        elements.append(layers * (grid[0] >> stage.level) * (grid[1] >> stage.level))
    assert elements == [55_296, 55_296, 221_184, 221_184, 442_368, 884_736]


def test_true_depth_has_the_least_depth_loss():
    """One surface in each of two layers; the map that knows them beats its neighbours."""
    near, far = jnp.float32(1.0), jnp.float32(4.0)
    anchors = ldm.depths(jnp.zeros((2, 8, 8)), near, far)
    left = jnp.broadcast_to(jnp.arange(8).reshape(1, 8) < 4, (8, 8))
    depth = jnp.where(left, anchors[0], anchors[1])
    density = jnp.stack([jnp.full((8, 8), 6.0), jnp.where(left, -6.0, 6.0)])
    right_map = ldm.Logits(jnp.zeros((2, 8, 8)), density)
    best = supervision.depth_loss(right_map, depth, near, far)
    assert float(best) < 0.05
    moved = right_map._replace(depth=jnp.full((2, 8, 8), 0.5))
    swapped = right_map._replace(density=density[:, :, ::-1])
    assert float(supervision.depth_loss(moved, depth, near, far)) > best + 0.2
    assert float(supervision.depth_loss(swapped, depth, near, far)) > best + 0.5


def test_where_depth_is_not_known_nothing_is_learnt():
    near, far = jnp.float32(1.0), jnp.float32(4.0)
    keys = jax.random.split(jax.random.key(0), 2)
    logits = ldm.Logits(*(jax.random.normal(key, (4, 8, 8)) for key in keys))
    depth = jnp.full((8, 8), 2.0)
    whole = supervision.depth_loss(logits, depth, near, far)
    for hole in (0.0, jnp.inf, jnp.nan):
        with_hole = depth.at[:, :5].set(hole)
        value, slope = jax.value_and_grad(supervision.depth_loss)(logits, with_hole, near, far)
        right = jax.tree.map(lambda x: x[..., 5:], ldm.Logits(logits.depth, logits.density))
        own = supervision.depth_loss(right, depth[:, 5:], near, far)
        np.testing.assert_allclose(value, own, rtol=1e-5)
        assert not np.any(slope.density[..., :5]) and np.all(np.isfinite(slope.density))
        assert not np.any(supervision.depth_loss(logits, jnp.full((8, 8), hole), near, far))
        assert value != whole


def test_temporal_loss_is_zero_for_the_photographs_themselves():
    batch = make_batch()
    perfect = Render(jnp.asarray(batch.target.images), jnp.asarray(batch.extras["depth"]))
    assert float(supervision.temporal_difference(perfect, batch.target)) == 0
    flicker = perfect.replace(images=perfect.images.at[:, 1].add(0.1))
    assert float(supervision.temporal_difference(flicker, batch.target)) > 0.02
    with pytest.raises(InputError, match="num_target"):
        first = jax.tree.map(lambda x: x[:, :1], perfect)
        supervision.temporal_difference(first, batch.target)


def test_unknown_model_fields_are_named():
    with pytest.raises(InputError, match="chanels"):
        task.make_module({"chanels": 3})
    for field, value in (("dtype", "float16"), ("output", "mesh"), ("unseen", "mirror")):
        with pytest.raises(InputError, match=f"{field}='{value}'"):
            task.make_module({**SMALL, field: value})
    with pytest.raises(InputError, match="with_depth"):
        config = config_of()
        config.data.with_depth = False
        task.make(config)


@pytest.mark.thorough
def test_bfloat16_stays_close_to_float32():
    apply, variables = apply_small()
    half = small(dtype="bfloat16")
    batch = make_batch()
    a = apply(variables, batch.context, batch.target.cameras)
    b = jax.jit(half.apply)(variables, batch.context, batch.target.cameras)
    assert b.images.dtype == jnp.float32
    assert float(jnp.mean(jnp.abs(a.images - b.images))) < 0.02


def test_stage_rows_are_stages():
    assert small().stages[2] == Stage(0, 1, 1, 1, True)
