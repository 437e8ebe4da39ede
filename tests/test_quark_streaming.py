"""Streaming is the stored form in less memory: the same values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvs_common.types import Cameras, Views
from quark_jax import drawing, ldm, one_to_many
from tests import test_quark

LAYERS, ROWS, COLUMNS, CHANNELS = 3, 4, 5, 6


def make_cameras(count: int, rng, height=9, width=13, spread=0.4) -> Cameras:
    pose = np.tile(np.eye(4), (count, 1, 1))
    pose[:, :2, 3] = rng.normal(size=(count, 2)) * spread
    k = np.tile([10.0, 10.0, width / 2, height / 2], (count, 1))
    near, far = np.full(count, 1.0), np.full(count, 8.0)
    return Cameras(*(jnp.asarray(x) for x in (pose, k, near, far)), height, width)


def assert_same(function, other, *args):
    """Equal values and gradients in float64, but for rounding."""
    number = tuple(range(len(args)))

    def score(f):
        weighted = lambda *x: sum(jnp.sum(jnp.sin(2 * y)) for y in jax.tree.leaves(f(*x)))  # noqa: E731
        return jax.jit(jax.value_and_grad(weighted, number))(*args)

    pairs = zip(jax.tree.leaves(score(function)), jax.tree.leaves(score(other)), strict=True)
    for a, b in pairs:
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, atol=1e-10 * max(1.0, float(np.abs(b).max())))


def gather_all(features, uv):
    return jax.vmap(jax.vmap(ldm.back_project))(features, uv)


@functools.cache
def elements(views: int):
    """Queries, features, positions (some outside) and visibility (some seen by no view)."""
    rng = np.random.default_rng(views)
    grid = (2, LAYERS, ROWS, COLUMNS)
    query = rng.normal(size=(*grid, CHANNELS))
    features = rng.normal(size=(views, 2, 7, 8, CHANNELS))
    uv = rng.uniform(-0.2, 1.2, size=(views, *grid, 2))
    valid = rng.uniform(size=(views, *grid)) > 0.4
    valid[:, :, 0, 0] = False
    return query, features, uv, valid


def attend(query, delta, valid):
    heads = jnp.stack([query, 2 * query], axis=-2)
    return one_to_many.attend(heads, delta, delta, valid, 0.7)


@pytest.mark.parametrize("views", [2, 16])
def test_streamed_attention_equals_stored(x64, views):
    query, features, uv, valid = (jnp.asarray(x) for x in elements(views))
    streamed = one_to_many.over_delta(attend, query, one_to_many.Unstored(features, uv), valid)
    stored = one_to_many.over_delta(attend, query, gather_all(features, uv), valid)
    np.testing.assert_allclose(streamed, stored, atol=1e-12)


@pytest.mark.parametrize("views", [1, 3])
def test_gradients_of_streamed_attention_equal_stored(x64, views):
    query, features, uv, valid = (jnp.asarray(x) for x in elements(views))
    assert_same(
        lambda q, f, u: one_to_many.over_delta(attend, q, one_to_many.Unstored(f, u), valid),
        lambda q, f, u: one_to_many.over_delta(attend, q, gather_all(f, u), valid),
        query,
        features,
        uv,
    )


def test_streamed_blend_logits_equal_stored(x64):
    query, features, uv, valid = (jnp.asarray(x) for x in elements(3))
    streamed = one_to_many.over_delta(
        one_to_many.agreement, query, one_to_many.Unstored(features, uv), valid
    )
    expected = jnp.einsum("n...c,vn...c->n...v", query, gather_all(features, uv))
    np.testing.assert_allclose(streamed, expected, atol=1e-12)


def test_streamed_attention_holds_one_layer_of_the_features():
    views, many, grid, channels = 8, 12, (32, 48), 32
    shape = jax.ShapeDtypeStruct
    arguments = (
        shape((1, many, *grid, channels), jnp.float32),
        shape((views, 1, 8, 12, channels), jnp.float32),
        shape((views, 1, many, *grid, 2), jnp.float32),
        shape((views, 1, many, *grid), jnp.bool),
    )

    def streamed(query, features, uv, valid):
        return one_to_many.over_delta(attend, query, one_to_many.Unstored(features, uv), valid)

    plan = jax.jit(streamed).lower(*arguments).compile().memory_analysis()
    layer = views * grid[0] * grid[1] * channels * 4
    # The layer, what is being gathered, queries and results; never all twelve layers.
    assert plan.temp_size_in_bytes < many * layer / 2


def make_map(views: int, rng, colors=False) -> ldm.Logits:
    shape = (LAYERS, ROWS, COLUMNS)
    return ldm.Logits(
        jnp.asarray(rng.normal(size=shape)),
        jnp.asarray(rng.normal(size=shape)),
        None if colors else jnp.asarray(3 * rng.normal(size=(views, *shape))),
        jnp.asarray(rng.normal(size=(*shape, 3))) if colors else None,
    )


def scene(views: int, seed=0):
    """A map, its target, and views of which one looks away and one stands behind the scene."""
    rng = np.random.default_rng(seed)
    cams = make_cameras(views, rng, spread=0.8)
    pose = np.array(cams.world_from_cam)
    pose[-1, 0, 3] += 30.0 if views > 1 else 0.0
    pose[-2 if views > 2 else 0, 2, 3] = 4.0
    cams = cams.replace(world_from_cam=jnp.asarray(pose))
    images = jnp.asarray(rng.uniform(size=(views, 9, 13, 3)))
    target = jax.tree.map(lambda x: x[0], make_cameras(1, rng, 12, 18, spread=0.1))
    return make_map(views, rng), target, Views(images, cams)


@pytest.mark.parametrize(
    "views, options",
    [
        (1, {}),
        (16, {"unseen": "edge"}),
        (3, {"unseen": "edge", "mask_invalid": False, "opaque_background": True}),
    ],
)
@pytest.mark.thorough
def test_drawing_by_layer_and_view_equals_the_stored_form(x64, views, options):
    logits, target, context = scene(views)

    def pictures(draw):
        return lambda logits, images: draw(
            logits, target, context.replace(images=images), **options
        )

    assert_same(pictures(drawing.draw), pictures(ldm.upsample_activate), logits, context.images)


def test_drawing_decoded_colours_equals_the_stored_form(x64):
    _, target, context = scene(2)
    logits = make_map(2, np.random.default_rng(1), colors=True)
    assert_same(
        lambda x: drawing.draw(x, target, context),
        lambda x: ldm.upsample_activate(x, target, context),
        logits,
    )


@pytest.mark.parametrize("draw", [drawing.draw, ldm.upsample_activate])
@pytest.mark.thorough
def test_a_window_is_a_part_of_the_picture(draw):
    logits, target, context = scene(3)
    whole = draw(logits, target, context)
    part = jax.jit(
        lambda top, left: draw(logits, target, context, window=ldm.Window(top, left, 5, 7))
    )(4, 9)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        np.testing.assert_allclose(a[4:9, 9:16], b, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"folded_attention": False, "output": "rgb"}])
def test_a_streaming_model_is_the_same_model(changes):
    batch = test_quark.make_batch(scenes=2)
    apply, variables = test_quark.apply_small(**changes)
    streamed, _ = test_quark.apply_small(stream=True, **changes)
    a = apply(variables, batch.context, batch.target.cameras)
    b = streamed(variables, batch.context, batch.target.cameras)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


def test_streaming_changes_no_parameter():
    batch = test_quark.make_batch()
    args = (jax.random.key(0), batch.context, batch.target.cameras)
    a, b = (jax.eval_shape(test_quark.small(stream=s).init, *args) for s in (False, True))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [x.shape for x in jax.tree.leaves(a)] == [x.shape for x in jax.tree.leaves(b)]


@pytest.mark.slow
def test_gradients_of_a_streaming_model_are_the_same():
    stages = ((1, 1, 2, 1, False), (0, 1, 1, 1, True))
    batch = test_quark.make_batch(views=2, targets=1)
    init = jax.jit(test_quark.small(stages=stages).init)
    variables = test_quark.randomized(init(jax.random.key(0), batch.context, batch.target.cameras))

    def gradient(stream: bool):
        module = test_quark.small(stages=stages, stream=stream)

        def loss(variables):
            rendered = module.apply(variables, batch.context, batch.target.cameras)
            return jnp.sum(jnp.sin(3 * rendered.images))

        return jax.jit(jax.grad(loss))(variables)

    for a, b in zip(jax.tree.leaves(gradient(False)), jax.tree.leaves(gradient(True)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, float(np.abs(a).max())))


@pytest.mark.slow
def test_targets_one_after_another_are_those_of_a_batch():
    batch = test_quark.make_batch(scenes=2, targets=3)
    streamed, variables = test_quark.apply_small(stream=True)
    together = streamed(variables, batch.context, batch.target.cameras)
    for t in range(3):
        one = streamed(variables, batch.context, batch.target.cameras[:, t : t + 1])
        np.testing.assert_allclose(together.images[:, t : t + 1], one.images, atol=1e-5)
