"""Attention along short rays: against recorded numbers, a plain definition, and its properties."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depth_decoder_jax import DepthTruncatedAttention, cross_view, epipolar
from nvs_common import sharding
from nvs_common.errors import InputError
from nvs_common.types import Cameras
from tests import conftest, small_depth

FILE = conftest.GOLDENS / "depth_trunc" / "depth_trunc_sphere.npz"
recorded_numbers = pytest.mark.skipif(not FILE.is_file(), reason="no recorded numbers beside this")
# Middles of five strata of +-0.15 are the recorded samples, -0.12 ... 0.12 in steps of 0.06.
RECORDED = dict(samples=5, delta=0.15, head_size=4, octaves=0, normalize=False)


@functools.cache
def golden():
    with np.load(FILE, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def recorded_surfaces():
    """The recorded scene [1, 4]; background has the depth of the camera's distance there."""
    z = golden()
    k = z["K"]
    intrinsics = np.stack([k[:, 0, 0], k[:, 1, 1], k[:, 0, 2], k[:, 1, 2]], axis=-1)
    near = np.ones((1, 4))
    cams = Cameras(z["c2w"][None], intrinsics[None], near, 3 * near, 16, 20)
    return epipolar.surfaces(cams, z["depth"][None])


def features():
    return jnp.asarray(np.moveaxis(golden()["features"], 1, -1)[None], jnp.float32)


def close(got, wanted, tolerance=1e-5):
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)


@recorded_numbers
def test_samples_and_where_views_see_them_are_the_recorded_ones():
    z, known, views = golden(), recorded_surfaces(), features()
    samples = epipolar.around_depth(known, 0.15, epipolar.strata(5))
    close(samples.points[0], z["points_world"])
    see = jax.jit(lambda shift: looked(known, samples, views, shift))
    for shift in range(4):
        seen, sampled, depth, share, visible = see(shift)
        rows = (np.arange(4), (np.arange(4) + shift) % 4)
        mask = z["mask"][rows]
        np.testing.assert_array_equal(seen.mask[0], mask)
        # Pixels far outside are large numbers.
        np.testing.assert_allclose(seen.uv[0][mask], z["uv"][rows][mask], rtol=1e-6, atol=1e-5)
        close(seen.depth[0], z["z_in_view"][rows])
        # Features change by 5 between pixels. Cameras and depth that are rounded to float32, with
        # everything else exact, move pixels by 4.6e-6 and these samples by 1.5e-5 already.
        close(sampled[0][mask], z["sampled"][rows][mask], 3e-5)
        close(depth[0], z["other_depth_at_uv"][rows], 2e-5)
        # At the border of the image the recorded depth fades to zero.
        inner = mask & (np.asarray(share[0]) > 1 - 1e-5)
        found = np.asarray(visible[0])[inner] > np.exp(-0.5)
        assert found.any() and inner.mean() > 0.5
        np.testing.assert_array_equal(found, z["visible_0p05"][rows][inner])


@recorded_numbers
def test_sampling_in_float64_is_the_recorded_one(x64):
    z = golden()
    maps, uv = jnp.asarray(np.moveaxis(z["features"], 1, -1)[None]), jnp.asarray(z["uv"][:1, :])
    close(epipolar.gather(maps, uv)[0], z["sampled"][0], 1e-10)


def looked(known, samples, views, shift):
    there, maps = epipolar.turn((known, views), shift)
    seen = epipolar.see(there.cameras, samples)
    plain = epipolar.gather(there.depth[..., None], seen.uv)[..., 0]
    _, share = epipolar.other_depth(there, seen.uv)
    # exp(-0.5) at the tolerance itself.
    visible = epipolar.visibility(there, seen, 0.05)
    return seen, epipolar.gather(maps, seen.uv), plain, share, visible


def change(module, params, *args):
    """What a module adds to features."""
    x = args[0]
    return (jax.jit(module.apply)({"params": params}, *args) - x)[0]


def matrices(*names):
    table = {"query": "Wq", "key": "Wk", "value": "Wv", "output": "Wo"}
    z = golden()
    return {k: {"kernel": jnp.asarray(z[w], jnp.float32)} for k, w in table.items() if k in names}


@recorded_numbers
def test_attention_to_each_view_is_the_recorded_one():
    params = matrices("query", "key", "value", "output")
    module = DepthTruncatedAttention(**RECORDED)
    close(change(module, params, features(), recorded_surfaces()), golden()["A_out"])


@recorded_numbers
def test_attention_to_merged_views_is_the_recorded_one():
    z, params = golden(), matrices("query", "key", "value", "output")
    params |= {"first": jnp.asarray(z["B_W1"], jnp.float32), "first_bias": jnp.float32(z["B_b1"])}
    params["second"] = {"kernel": jnp.float32(z["B_W2"]), "bias": jnp.float32(z["B_b2"])}
    options = dict(aggregate="concat_mlp", num_views=4, mlp_ratio=2.0)
    module = DepthTruncatedAttention(**RECORDED, **options)
    close(change(module, params, features(), recorded_surfaces()), z["B_out"])


MODULES = {
    "per_view": dict(visibility=0.1),
    "concat_mlp": dict(aggregate="concat_mlp", num_views=3, visibility=0.1),
    "full_epipolar": dict(mode="full_epipolar"),
    "full_cross_view": dict(mode="full_cross_view"),
}


@functools.cache
def trained(name, front=False):
    """A module, and random parameters for all of it."""
    module = DepthTruncatedAttention(samples=3, head_size=16, **MODULES[name])
    more = (small_depth.front_view(),) if front else ()
    shapes = jax.eval_shape(module.init, jax.random.key(0), *small_depth.scene(), *more)["params"]
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    values = [np.float32(rng.standard_normal(x.shape) * x.shape[0] ** -0.5) for x in leaves]
    return module, jax.tree.unflatten(structure, values)


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("name", ["per_view", "concat_mlp"])
@pytest.mark.thorough
def test_projecting_before_sampling_is_the_same_as_after_it(name, front):
    module, params = trained(name, front)
    x, known = small_depth.scene()
    more = (small_depth.front_view(),) if front else ()
    got = change(module, params, x, known, *more)
    close(got, small_depth.reference(module, params, x, [known], *more), 2e-5)


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_added_before_training(name, front):
    module, params = trained(name, front)
    params = params | {"output": {"kernel": np.zeros((32, 32), np.float32)}}
    more = (small_depth.front_view(),) if front else ()
    np.testing.assert_array_equal(change(module, params, *small_depth.scene(), *more), 0)
    sharding.param_specs(params, axes(params))


def axes(params):
    """The rows of the table that a module of these options has a parameter for."""
    return {
        row: names
        for row, names in cross_view.PARAM_AXES.items()
        if names != (None,) or "norm" in params
    }


@pytest.mark.parametrize("name", ["per_view", "full_epipolar", "full_cross_view"])
def test_views_permute(name):
    module, params = trained(name)
    x, known = small_depth.scene()
    order = np.array([2, 0, 1])
    swapped = jax.tree.map(lambda a: a[:, order], (x, known))
    got = change(module, params, *swapped)
    close(got, change(module, params, x, known)[order])


def test_merged_views_turn_in_a_circle():
    module, params = trained("concat_mlp")
    x, known = small_depth.scene()
    got = change(module, params, *epipolar.turn((x, known), 1))
    close(got, np.roll(change(module, params, x, known), -1, axis=0))


@pytest.mark.parametrize("name", ["per_view", "concat_mlp"])
def test_background_and_what_no_view_sees_stay_as_they_are(name):
    module, params = trained(name)
    x, known = small_depth.scene()
    np.testing.assert_array_equal(change(module, params, x, known)[:, :, 0], 0)
    inner = np.s_[:, 2:-2, 2:-2]
    assert np.all(np.any(change(module, params, x, known)[inner], axis=-1))
    none = dataclasses.replace(known, mask=jnp.zeros_like(known.mask))
    np.testing.assert_array_equal(change(module, params, x, none), 0)


@pytest.mark.parametrize("name", ["per_view", "concat_mlp"])
def test_gradients_are_finite_where_nothing_is_seen(name):
    module, params = trained(name)
    x, known = small_depth.scene()
    away = epipolar.surfaces(small_depth.ring(away=True), known.depth, known.mask)
    depth = jnp.asarray(known.depth).at[0, 0].set(-1.0).at[0, 1, 3].set(jnp.nan)
    broken = epipolar.surfaces(small_depth.ring(), depth, known.mask)

    @jax.jit
    def gradients(params, x, known):
        def loss(params, x):
            return jnp.sum(jnp.square(module.apply({"params": params}, x, known)))

        return jax.grad(loss, (0, 1))(params, x)

    for known in (away, broken):
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients(params, x, known)))
    if name == "per_view":
        np.testing.assert_array_equal(change(module, params, x, away), 0)
    np.testing.assert_array_equal(change(module, params, x, broken)[0], 0)


def test_with_true_depth_and_a_narrow_interval_all_views_take_the_same():
    # Every view of a plane of constant features sees the same, from wherever it looks.
    module, params = trained("per_view")
    module = module.clone(octaves=0, visibility=0.0, delta=1e-4)
    params = {key: value for key, value in params.items() if key != "description"}
    x, known = small_depth.scene()
    same = jnp.broadcast_to(x[:, :1, :1, :1], x.shape)
    whole = dataclasses.replace(known, mask=jnp.ones_like(known.mask))
    # The centre of the image, that all of them see away from their borders.
    middle = change(module, params, same, whole)[:, 3:5, 3:5].reshape(-1, 32)
    close(middle, np.broadcast_to(middle[:1], middle.shape))


def test_jitter_stays_within_its_stratum():
    jitter = jax.random.uniform(jax.random.key(0), (100, 4))
    offsets = np.asarray(epipolar.strata(4, jitter))
    edges = np.linspace(-1, 1, 5)
    assert np.all((offsets >= edges[:-1]) & (offsets < edges[1:]))
    np.testing.assert_allclose(epipolar.strata(4), [-0.75, -0.25, 0.25, 0.75])


def test_pooled_depth_is_the_mean_of_the_foreground():
    _, known = small_depth.scene(size=8)
    pooled = epipolar.pool(known, 4, 4)
    depth = np.asarray(known.depth).reshape(1, 3, 4, 2, 4, 2)
    mask = np.asarray(known.mask).reshape(1, 3, 4, 2, 4, 2)
    wanted = (depth * mask).sum((3, 5)) / mask.sum((3, 5))
    close(pooled.depth, wanted, 1e-6)
    assert np.all(pooled.mask)
    assert pooled.cameras.height == pooled.cameras.width == 4
    close(pooled.cameras.intrinsics, known.cameras.intrinsics / 2, 1e-6)


def test_wrong_input_is_named():
    x, known = small_depth.scene()
    with pytest.raises(InputError, match=r"depth has shape \(1, 3, 4, 4\)"):
        epipolar.surfaces(small_depth.ring(), np.ones((1, 3, 4, 4)))
    with pytest.raises(InputError, match="does not divide into a grid"):
        epipolar.pool(known, 3, 3)
    for options, message in (
        (dict(mode="none"), "mode='none'"),
        (dict(aggregate="mean"), "aggregate='mean'"),
        (dict(samples=0), "samples=0"),
        (dict(head_size=0), "head_size=0"),
        (dict(delta=float("nan")), "delta=nan"),
        (dict(octaves=-1), "octaves=-1"),
        (dict(visibility=-1.0), "visibility=-1.0"),
        (dict(aggregate="concat_mlp", num_views=4), "3 views, but .* num_views=4"),
    ):
        with pytest.raises(InputError, match=message):
            module = DepthTruncatedAttention(**options)
            jax.eval_shape(module.init, jax.random.key(0), x, known)


def test_features_of_all_samples_in_all_views_are_never_held():
    module, params = trained("per_view")
    module = module.clone(samples=16)
    count, size, channels = 8, 8, 32
    x, known = small_depth.scene(count, size)
    grad = jax.grad(lambda x: jnp.sum(jnp.square(module.apply({"params": params}, x, known))))
    memory = jax.jit(grad).lower(x).compile().memory_analysis()
    # All samples of all pairs of views, as float32 keys and values.
    held = count * (count - 1) * size**2 * module.samples * 2 * channels * 4
    assert memory.temp_size_in_bytes < held
