"""The layered depth map: published numbers and properties of its pure functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvs_common import cameras, compositing
from nvs_common.types import Cameras, Views
from quark_jax import encoder, ldm


def camera(position=(0.0, 0.0, 0.0), height=8, width=12, near=1.0, far=10.0, turn=0.0) -> Cameras:
    pose = np.eye(4, dtype=np.float32)
    c, s = np.cos(turn), np.sin(turn)
    pose[:3, :3] = [[c, 0, s], [0, 1, 0], [-s, 0, c]]
    pose[:3, 3] = position
    k = np.array([10.0, 10.0, width / 2, height / 2], np.float32)
    return Cameras(
        jnp.asarray(pose), jnp.asarray(k), jnp.float32(near), jnp.float32(far), height, width
    )


def test_bands_are_those_of_the_worked_example():
    logits = jnp.stack([jnp.full(6, -1e3), jnp.full(6, 1e3)], axis=-1)
    bands = ldm.depths(logits, jnp.float32(0.5), jnp.float32(3.0))
    edges = [3.0, 1.636, 1.125, 0.857, 0.692, 0.581, 0.5]
    np.testing.assert_allclose(bands[:, 0], edges[:-1], atol=1e-3)
    np.testing.assert_allclose(bands[:, 1], edges[1:], atol=1e-3)


def test_layers_never_cross_and_stay_between_near_and_far():
    logits = 50 * jax.random.normal(jax.random.key(0), (6, 40))
    depth = np.asarray(ldm.depths(logits, jnp.float32(1.0), jnp.float32(100.0)))
    # Bands touch: two layers at their common edge may differ by rounding.
    assert np.all(np.diff(depth, axis=0) <= 1e-6 * depth[1:])
    assert depth.min() >= 1 - 1e-5 and depth.max() <= 100 * (1 + 1e-5)


def test_zero_logits_are_planes_uniform_in_disparity():
    depth = ldm.depths(jnp.zeros((4, 1)), jnp.float32(1.0), jnp.float32(1e9))
    np.testing.assert_allclose(1 / depth[:, 0], [0.125, 0.375, 0.625, 0.875], rtol=1e-5)


def test_collapsed_bands_are_unions_of_two():
    fine = ldm.depths(jnp.full((8, 1), 1e3), jnp.float32(0.7), jnp.float32(9.0))
    coarse = ldm.depths(jnp.full((4, 1), 1e3), jnp.float32(0.7), jnp.float32(9.0))
    np.testing.assert_allclose(coarse, fine[1::2], rtol=1e-5)


def test_a_map_projects_onto_itself_in_its_own_camera():
    target = camera()
    depth = jnp.full((2, 8, 12), 3.0)
    projection = ldm.project(depth, target, target)
    grid = cameras.pixel_grid(8, 12) / jnp.array([12.0, 8.0]).reshape(1, 1, 2)
    np.testing.assert_allclose(projection.uv[1], grid, atol=1e-5)
    assert np.all(projection.valid)


def test_splat_to_own_view_gives_the_composite():
    rng = np.random.default_rng(0)
    target = camera()
    appearance = jnp.asarray(rng.uniform(size=(3, 8, 12, 2)), jnp.float32)
    density = jnp.asarray(rng.uniform(size=(3, 8, 12)), jnp.float32)
    uv = ldm.project(jnp.full((3, 8, 12), 2.0), target, target).uv
    expected = compositing.over(appearance, density)
    for normalize in (False, True):
        seen = ldm.splat_to_view(appearance, density, uv, 8, 12, normalize=normalize)
        np.testing.assert_allclose(seen, expected, atol=1e-4)


def test_normalized_splat_averages_what_piles_up():
    uv = jnp.full((1, 4, 4, 2), 0.5)
    appearance, density = jnp.full((1, 4, 4, 1), 0.6), jnp.full((1, 4, 4), 0.5)
    literal = ldm.splat_to_view(appearance, density, uv, 1, 1)
    averaged = ldm.splat_to_view(appearance, density, uv, 1, 1, normalize=True)
    assert float(averaged[0, 0, 0]) == pytest.approx(0.3, abs=1e-5)
    # 16 elements of alpha 0.5 saturate at one; their appearance adds up to 9.6.
    assert float(literal[0, 0, 0]) == pytest.approx(9.6, rel=1e-4)


def test_ray_encoding_of_parallel_cameras_is_the_published_difference():
    baseline = 0.3
    view, target = camera((baseline, 0, 0)), camera(near=1.0, far=4.0)
    difference = ldm.ray_difference(view, target)
    # In units where the image spans [-1, 1]: focal 10 px over half a width of 6 px.
    expected = baseline * (1 / 1.0 - 1 / 4.0) * 10 / 6
    np.testing.assert_allclose(difference[..., 0], expected, atol=1e-5)
    np.testing.assert_allclose(difference[..., 1], 0, atol=1e-5)


def test_ray_encoding_is_zero_for_cameras_that_share_a_centre():
    difference = ldm.ray_difference(camera(turn=0.4), camera())
    np.testing.assert_allclose(difference, 0, atol=1e-5)
    np.testing.assert_array_equal(encoder.sinusoids(jnp.zeros((3, 2)), 8), 0)


def test_ray_encoding_is_finite_for_rays_along_the_planes():
    waves = encoder.sinusoids(ldm.ray_difference(camera(turn=np.pi / 2), camera()), 8)
    assert waves.shape == (8, 12, 32)
    assert np.all(np.isfinite(waves))


def test_post_activation_keeps_edges_sharp():
    """Logits of -6 and +6 side by side, upsampled 3.75 times: 1.37 pixels, not 3.0."""
    row = jnp.where(jnp.arange(16) < 8, -6.0, 6.0)
    logits = jnp.broadcast_to(row[None, :], (16, 16))[..., None]
    upsampled = ldm.resize(logits, 60, 60)[30, :, 0]
    soft = ldm.resize(jax.nn.sigmoid(logits), 60, 60)[30, :, 0]
    fine = np.linspace(0, 59, 59_001)

    def width(alpha) -> float:
        return np.sum((alpha > 0.1) & (alpha < 0.9)) / 1000

    crisp = jax.nn.sigmoid(np.interp(fine, np.arange(60), np.asarray(upsampled)))
    assert width(np.asarray(crisp)) == pytest.approx(1.37, abs=0.02)
    assert width(np.interp(fine, np.arange(60), np.asarray(soft))) == pytest.approx(3.0, abs=0.05)


def test_blend_weights_ignore_views_that_do_not_see():
    logits = jnp.array([5.0, 0.0, 1.0]).reshape(3, 1)
    valid = jnp.array([False, True, True]).reshape(3, 1)
    weights = ldm.blend_weights(logits, valid)
    np.testing.assert_allclose(weights[0], 0, atol=0)
    np.testing.assert_allclose(weights.sum(0), 1, atol=1e-6)
    nobody = ldm.blend_weights(logits, jnp.zeros((3, 1), bool))
    np.testing.assert_allclose(nobody, jax.nn.softmax(logits, axis=0), atol=1e-6)


def test_what_no_view_sees_is_black_or_the_edge():
    target, view = camera(), camera((100.0, 0, 0))
    context = Views(jnp.full((1, 8, 12, 3), 0.7), jax.tree.map(lambda x: x[None], view))
    depth, blend = jnp.full((1, 8, 12), 2.0), jnp.zeros((1, 1, 8, 12))
    black = ldm.blended_color(depth, blend, target, context)
    edge = ldm.blended_color(depth, blend, target, context, unseen="edge")
    np.testing.assert_array_equal(black, 0)
    np.testing.assert_allclose(edge, 0.7, atol=1e-6)


@pytest.mark.thorough
def test_rendering_through_the_right_depth_reproduces_a_plane():
    """One opaque textured plane at depth 4, seen from two sides, rendered in the middle."""
    target, depth = camera(near=3.0, far=5.0), 4.0

    def texture(points):
        x, y = points[..., 0], points[..., 1]
        return jnp.stack([jnp.sin(x * 2), jnp.cos(y * 3), jnp.sin(x + y)], -1) * 0.4 + 0.5

    def photograph(cam: Cameras):
        _, directions = cameras.rays(cam)
        origin = cam.world_from_cam[:3, 3].reshape(1, 1, 3)
        along = (depth - origin[..., 2:]) / directions[..., 2:]
        return texture(origin + along * directions)

    views = [camera((-0.4, 0.1, 0), 32, 48), camera((0.4, 0, 0), 32, 48)]
    views = [v.replace(intrinsics=jnp.array([40.0, 40.0, 24.0, 16.0])) for v in views]
    target = camera(height=32, width=48, near=3.0, far=5.0)
    target = target.replace(intrinsics=jnp.array([40.0, 40.0, 24.0, 16.0]))
    context = Views(
        jnp.stack([photograph(v) for v in views]), jax.tree.map(lambda *x: jnp.stack(x), *views)
    )
    fraction = (1 / depth - 1 / 5.0) / (1 / 3.0 - 1 / 5.0)
    logit = (
        np.arctanh((fraction - 0.25) * 4) if fraction < 0.5 else np.arctanh((fraction - 0.75) * 4)
    )
    layer = 0 if fraction < 0.5 else 1
    logits = ldm.Logits(
        depth=jnp.full((2, 8, 12), logit),
        density=jnp.full((2, 8, 12), -30.0).at[layer].set(30.0),
        blend=jnp.zeros((2, 2, 8, 12)),
    )
    rendered = ldm.upsample_activate(logits, target, context)
    error = np.abs(rendered.images - photograph(target))[2:-2, 6:-6]
    assert error.max() < 0.01
    np.testing.assert_allclose(rendered.depth, depth, rtol=1e-4)
    np.testing.assert_allclose(rendered.alpha, 1, atol=1e-5)


@pytest.mark.thorough
def test_gradient_is_finite_behind_cameras_and_at_borders():
    target = camera(near=0.5, far=50.0)
    poses = [camera((0, 0, 1.0)), camera((0, 0, 20.0), turn=np.pi), camera((3.0, 0, 0.5), turn=1.5)]
    context = Views(jnp.ones((3, 8, 12, 3)) * 0.5, jax.tree.map(lambda *x: jnp.stack(x), *poses))
    shape = (3, 4, 6)
    logits = ldm.Logits(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros((3, *shape)))

    def score(logits: ldm.Logits) -> jax.Array:
        return jnp.sum(ldm.upsample_activate(logits, target, context).images ** 2)

    for leaf in jax.tree.leaves(jax.grad(score)(logits)):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize(
    "height, width, expected",
    [(1080, 1920, (288, 512)), (768, 1024, (336, 440)), (1920, 1080, (512, 288))],
)
def test_grid_keeps_its_area_at_any_aspect_ratio(height, width, expected):
    assert ldm.grid_size(height, width, 288 * 512, 8) == expected


def test_density_is_upsampled_before_it_is_activated():
    target = camera(height=60, width=60)
    context = Views(jnp.ones((1, 60, 60, 3)), jax.tree.map(lambda x: x[None], target))
    density = jnp.broadcast_to(jnp.where(jnp.arange(16) < 8, -6.0, 6.0), (1, 16, 16))
    logits = ldm.Logits(jnp.zeros((1, 16, 16)), density, jnp.zeros((1, 1, 16, 16)))
    alpha = np.asarray(ldm.upsample_activate(logits, target, context).alpha)[30]
    # Activated first, three pixels would lie between one and nine tenths.
    assert np.sum((alpha > 0.1) & (alpha < 0.9)) <= 2


@pytest.mark.thorough
def test_opaque_background_leaves_nothing_open():
    target = camera()
    context = Views(jnp.ones((1, 8, 12, 3)), jax.tree.map(lambda x: x[None], target))
    empty = jnp.full((2, 4, 6), -20.0)
    logits = ldm.Logits(jnp.zeros((2, 4, 6)), empty, jnp.zeros((1, 2, 4, 6)))
    closed = ldm.upsample_activate(logits, target, context, opaque_background=True)
    np.testing.assert_allclose(closed.alpha, 1, atol=1e-6)
    np.testing.assert_allclose(ldm.upsample_activate(logits, target, context).alpha, 0, atol=1e-6)


def test_views_that_do_not_see_take_part_only_unmasked():
    target, aside = camera(), camera((100.0, 0, 0))
    context = Views(
        jnp.stack([jnp.full((8, 12, 3), 0.8), jnp.full((8, 12, 3), 0.4)]),
        jax.tree.map(lambda *x: jnp.stack(x), target, aside),
    )
    depth, blend = jnp.full((1, 8, 12), 2.0), jnp.zeros((2, 1, 8, 12))
    masked = ldm.blended_color(depth, blend, target, context)
    unmasked = ldm.blended_color(depth, blend, target, context, mask_invalid=False)
    np.testing.assert_allclose(masked, 0.8, atol=1e-6)
    np.testing.assert_allclose(unmasked, 0.4, atol=1e-6)


def test_what_lies_behind_every_view_is_black():
    target, beyond = camera(), camera((0.0, 0, 50.0))
    context = Views(jnp.ones((1, 8, 12, 3)), jax.tree.map(lambda x: x[None], beyond))
    depth, blend = jnp.full((1, 8, 12), 2.0), jnp.zeros((1, 1, 8, 12))
    color = ldm.blended_color(depth, blend, target, context, unseen="edge")
    np.testing.assert_array_equal(color, 0)
