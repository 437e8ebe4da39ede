"""The depth-guided decoder: equal to the plain one before training, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depth_decoder_jax import SVDVAE, DepthGuidedDecoder, decode_with_depth, model, two_pass
from nvs_common import sharding
from nvs_common.errors import InputError
from nvs_common.types import Views
from tests import small_depth

VAE = SVDVAE(channels=(32, 32), num_resnets=1, num_mid=1)
DESIGNS = {
    "view": dict(),
    "broadcast": dict(front="broadcast", visibility=0.1),
    "none": dict(front="none", levels=1),
    "concat_mlp": dict(aggregate="concat_mlp", num_views=3, levels=1),
    "full_epipolar": dict(mode="full_epipolar", front="none", levels=1),
    "full_cross_view": dict(mode="full_cross_view", levels=1),
}


def built(design):
    options = dict(levels=2, samples=(2, 2), head_size=16) | DESIGNS[design]
    return DepthGuidedDecoder(vae=VAE, **options)


def views():
    """Latents [1, 3], cameras, depth and a front picture."""
    latents = jax.random.normal(jax.random.key(0), (1, 3, 4, 4, 4))
    cams = small_depth.ring(3, 8)
    depth = 1.3 + 0.2 * jax.random.uniform(jax.random.key(1), (1, 3, 8, 8))
    picture = jax.random.uniform(jax.random.key(2), (1, 8, 8, 3))
    return latents, cams, depth, Views(picture, cams[:, 0])


@functools.cache
def initial(design):
    """A module and parameters, all drawn, but for those that start at zero."""
    module = built(design)
    latents, cams, depth, front = views()
    init = functools.partial(module.init, cams=cams, depth=depth, front=front)
    shapes = jax.eval_shape(init, jax.random.key(0), latents)["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = sharding.path_name(path)
        if name.endswith("output/kernel") and name.startswith("cross"):
            return np.zeros(leaf.shape, np.float32)
        if name.startswith("broadcast"):
            return np.zeros(leaf.shape, np.float32)
        deviation = 1 / np.sqrt(max(np.prod(leaf.shape[:-1]), 1))
        return np.float32(rng.standard_normal(leaf.shape) * deviation + ("scale" in name))

    return module, {"params": jax.tree_util.tree_map_with_path(draw, shapes)}


@functools.partial(jax.jit, static_argnums=0)
def decode(module, variables, latents, cams, depth, mask, front):
    return module.apply(variables, latents, cams, depth, mask, front)


@functools.partial(jax.jit, static_argnums=0)
def decode_plain(module, variables, latents):
    return module.apply(variables, latents, method="decode_plain")


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.thorough
def test_before_training_it_is_the_plain_decoder_bit_for_bit(design):
    module, variables = initial(design)
    latents, cams, depth, front = views()
    guided = decode(module, variables, latents, cams, depth, None, front)
    np.testing.assert_array_equal(guided, decode_plain(module, variables, latents))
    assert guided.dtype == jnp.float32 and guided.std() > 0.1


@pytest.mark.parametrize("design", DESIGNS)
def test_what_starts_at_zero_does(design):
    module = built(design)
    latents, cams, depth, front = views()
    init = functools.partial(module.init, cams=cams, depth=depth, front=front)
    # Compiled, only what is asked for is drawn.
    params = jax.jit(lambda key: new_zeros(init(key, latents)["params"]))(jax.random.key(0))
    assert params and all(not np.any(x) for x in params.values())


def new_zeros(params):
    """What is added to features goes through these."""
    found = {name: params[name]["output"]["kernel"] for name in params if "cross" in name}
    return found | {name: params[name]["kernel"] for name in params if "broadcast" in name}


def moved(variables, names):
    """The variables with other values in place of zeros."""

    def draw(path, leaf):
        name = sharding.path_name(path)
        return np.full_like(leaf, 0.1) if any(part in name for part in names) else leaf

    return jax.tree_util.tree_map_with_path(draw, variables)


@pytest.mark.parametrize("design", ["view", "broadcast"])
def test_the_front_picture_and_depth_reach_the_pictures(design):
    module, variables = initial(design)
    variables = moved(variables, ["cross_0/output", "cross_1/output", "broadcast"])
    latents, cams, depth, front = views()
    images = decode(module, variables, latents, cams, depth, None, front)
    other = dataclasses.replace(front, images=1 - front.images)
    changed = decode(module, variables, latents, cams, depth, None, other) - images
    assert np.all(np.abs(changed).max((2, 3, 4)) > 1e-4)
    changed = decode(module, variables, latents, cams, depth + 0.3, None, front) - images
    assert np.abs(changed).max() > 1e-4


def test_each_parameter_has_its_axes():
    for design in DESIGNS:
        params = initial(design)[1]["params"]
        sharding.param_specs(params, model.PARAM_AXES)
        assert "encoder" in params["vae"] and "decoder" in params["vae"]


@pytest.mark.thorough
def test_gradients_are_finite_without_foreground():
    module, variables = initial("view")
    variables = moved(variables, ["cross_0/output", "cross_1/output"])
    latents, cams, depth, front = views()

    @jax.jit
    def value_and_gradients(latents, variables, depth):
        def loss(latents, variables):
            return jnp.sum(jnp.square(module.apply(variables, latents, cams, depth, None, front)))

        return jax.value_and_grad(loss, (0, 1))(latents, variables)

    for wrong in (jnp.zeros_like(depth), depth.at[0, 0].set(-1).at[0, 1, 2].set(jnp.nan)):
        found = value_and_gradients(latents, variables, wrong)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    away = small_depth.ring(3, 8, away=True)
    nothing = decode(module, variables, latents, cams, jnp.zeros_like(depth), None, front)
    looking_away = decode(
        module,
        variables,
        latents,
        away,
        depth,
        None,
        dataclasses.replace(front, cameras=away[:, 2]),
    )
    np.testing.assert_array_equal(nothing, decode_plain(module, variables, latents))
    assert np.isfinite(looking_away).all()


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        (dict(), dict(depth=np.ones((1, 3, 4, 4))), r"depth has shape \(1, 3, 4, 4\)"),
        (dict(), dict(mask=np.ones((1, 2, 8, 8))), r"mask has shape \(1, 2, 8, 8\)"),
        (dict(), dict(latents=np.zeros((1, 3, 8, 8, 4))), "decode to images of"),
        (dict(), dict(latents=np.zeros((1, 2, 4, 4, 4))), r"there are cameras \(1, 3\)"),
        (dict(), dict(front=None), "needs the front picture"),
        (dict(aggregate="concat_mlp", num_views=4), dict(), "built for num_views=4"),
        (dict(front="left"), dict(), "front='left'"),
        (dict(levels=3), dict(), "levels=3"),
    ],
)
def test_wrong_input_is_named(options, change, message):
    latents, cams, depth, front = views()
    arguments = dict(latents=latents, cams=cams, depth=depth, mask=None, front=front) | change
    module = DepthGuidedDecoder(vae=VAE, **(dict(levels=2) | options))
    with pytest.raises(InputError, match=message):
        jax.eval_shape(functools.partial(module.init, **arguments), jax.random.key(0))


def test_a_front_picture_of_another_size_is_refused_by_broadcast_alone():
    latents, cams, depth, front = views()
    large = Views(np.zeros((1, 16, 16, 3)), dataclasses.replace(front.cameras, height=16, width=16))
    for design, refused in (("broadcast", True), ("view", False)):
        module = built(design)
        init = functools.partial(module.init, cams=cams, depth=depth, front=large)
        if refused:
            with pytest.raises(InputError, match="needs it in the size"):
                jax.eval_shape(init, jax.random.key(0), latents)
        else:
            jax.eval_shape(init, jax.random.key(0), latents)


@pytest.mark.thorough
def test_two_passes_decode_with_the_depth_of_the_first_pictures():
    module, variables = initial("view")
    variables = moved(variables, ["cross_0/output", "cross_1/output"])
    latents, cams, depth, front = views()
    seen = []

    def depth_fn(images, cams):
        seen.append(images)
        return two_pass.DepthMaps(depth, depth > 1.35)

    found = decode_with_depth(module, variables, latents, cams, front, depth_fn, rounds=2)
    plain = np.clip((decode_plain(module, variables, latents) + 1) / 2, 0, 1)
    guided = decode(module, variables, latents, cams, depth, depth > 1.35, front)
    np.testing.assert_allclose(found.first, plain, atol=1e-5)
    np.testing.assert_allclose(found.images, np.clip((guided + 1) / 2, 0, 1), atol=1e-5)
    np.testing.assert_array_equal(seen[0], found.first)
    np.testing.assert_array_equal(seen[1], found.images)
    assert np.abs(found.images - found.first).max() > 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d[..., :4], d > 0), "depth has shape"),
        (lambda d: (d, d > 9), "no foreground in any view"),
        (lambda d: (d.at[0, 1, 0, 0].set(-1), d > 0), "scene 0, view 1: 1 pixels"),
        (lambda d: (d.at[0, 2, :2].set(jnp.inf), d > 0), "scene 0, view 2: 16 pixels"),
    ],
)
def test_bad_depth_of_a_source_is_named(change, message):
    module, variables = initial("view")
    latents, cams, depth, front = views()
    with pytest.raises(InputError, match=message):
        source = lambda images, cams: change(depth)  # noqa: E731
        decode_with_depth(module, variables, latents, cams, front, source)
