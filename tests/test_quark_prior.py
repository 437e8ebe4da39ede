"""The plane sweep that Quark may start from: what it finds, and what the network makes of it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvs_common import cameras as camera_lib
from nvs_common import compositing, metrics, photoconsistency
from nvs_common.types import Cameras, Views
from quark_jax import ldm, prior, task

HEIGHT, WIDTH = 16, 24
PLANE = 4.0
MODEL = dict(
    grid_area=HEIGHT * WIDTH,
    layers=2,
    channels=8,
    stages=((1, 1, 2, 1, False), (0, 1, 1, 1, True)),
    encoder_blocks=(1, 1),
    update_blocks=1,
    appearance_channels=4,
    unseen="edge",
)


def cameras_at(offsets, near=2.0, far=16.0) -> Cameras:
    pose = np.tile(np.eye(4, dtype=np.float32), (len(offsets), 1, 1))
    pose[:, :2, 3] = offsets
    k = np.tile(np.array([20.0, 20.0, WIDTH / 2, HEIGHT / 2], np.float32), (len(offsets), 1))
    bounds = [np.full(len(offsets), value, np.float32) for value in (near, far)]
    return Cameras(pose, k, *bounds, HEIGHT, WIDTH)


def photographs(cams: Cameras, depth=PLANE) -> Views:
    """A smooth texture on the plane z = depth, as every camera sees it."""
    uv = camera_lib.pixel_grid(HEIGHT, WIDTH)
    at = jnp.full(uv.shape[:-1], depth)
    points = jax.vmap(lambda camera: camera_lib.unproject(camera, uv, at))(cams)
    x, y = points[..., 0], points[..., 1]
    waves = [jnp.sin(5 * x) * jnp.cos(4 * y), jnp.sin(3 * x + 4 * y), jnp.cos(6 * y - x)]
    return Views(0.5 + 0.4 * jnp.stack(waves, axis=-1), cams)


CONTEXT = photographs(cameras_at([(-0.5, 0.1), (0.4, -0.2), (0.1, 0.5)]))
TARGET = cameras_at([(0.0, 0.0)])


def test_the_sweep_finds_a_textured_plane():
    costs = prior.sweep_costs(CONTEXT, TARGET[0], 16)
    assert costs.shape == (len(prior.WINDOWS), 16, HEIGHT, WIDTH)
    # Disparity 1/4 lies at (1/4 - 1/16) / (1/2 - 1/16) = 3/7 of the range.
    best = (np.argmin(costs, axis=1) + 0.5) / 16
    inner = best[:, 4:-4, 6:-6]
    np.testing.assert_allclose(inner, 3 / 7, atol=1 / 16)


def test_sweeps_of_a_batch_are_those_of_its_scenes():
    scenes = [photographs(CONTEXT.cameras, depth) for depth in (PLANE, 7.0)]
    targets = cameras_at([(0.0, 0.0), (0.2, 0.1)])
    both = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *scenes)
    twice = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2), targets)
    volume = jnp.zeros((4, 2, HEIGHT, WIDTH, 1))
    found = prior.Sweep(both, twice, (HEIGHT, WIDTH), 8).features(volume)
    for number, (scene, target) in enumerate(itertools.product(scenes, (0, 1))):
        costs = prior.sweep_costs(scene, targets[target], 8)
        expected = prior.layer_features(costs, 2)
        np.testing.assert_allclose(found[number], expected, atol=1e-3)


def test_a_dim_scene_is_compared_as_a_bright_one_is():
    """Where contrast is within reach of the greatest gain, costs do not depend on exposure."""
    dim = CONTEXT.replace(images=0.4 * CONTEXT.images)
    dimmer = CONTEXT.replace(images=0.25 * CONTEXT.images)
    bright = prior.contrast_gain(CONTEXT, TARGET[0])
    np.testing.assert_array_equal(bright, 1.0)
    gain = prior.contrast_gain(dim, TARGET[0])
    assert jnp.all((gain > 1) & (gain < prior.MAX_GAIN))
    costs = [prior.sweep_costs(views, TARGET[0], 16) for views in (dim, dimmer)]
    np.testing.assert_allclose(costs[1], costs[0], rtol=0.05, atol=2e-4)
    # Nothing to tell planes apart: no division by zero, and the limit holds.
    flat = CONTEXT.replace(images=jnp.full_like(CONTEXT.images, 0.1))
    np.testing.assert_array_equal(prior.contrast_gain(flat, TARGET[0]), prior.MAX_GAIN)


def test_windows_grow_slower_than_the_map():
    sides = [side for side, _ in prior.WINDOWS]
    assert list(prior.window_sides(prior.WINDOW_ROWS)) == sides
    assert list(prior.window_sides(8)) == sides
    for rows in (72, 144, 288):
        wide = prior.window_sides(rows)
        assert all(side % 2 == 1 for side in wide)
        for side, base in zip(wide, sides, strict=True):
            assert base < side < base * rows / prior.WINDOW_ROWS


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_a_map_made_of_the_features_has_the_sweeps_depth(num_layers):
    """Depth and density logits composite to the plane with the least cost, in any layers."""
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, 16, size=(3, 5))
    costs = np.where(np.arange(16)[:, None, None] == chosen, 0.0, 1.0).astype(np.float32)
    features = prior.layer_features(jnp.tile(costs, (len(prior.WINDOWS), 1, 1, 1)), num_layers)
    assert features.shape == (num_layers, 3, 5, prior.NUM_FEATURES)
    near, far = jnp.float32(2.0), jnp.float32(16.0)
    depth = ldm.depths(features[..., prior.DEPTH], near, far)
    density = jax.nn.sigmoid(features[..., prior.DENSITY])
    disparity = compositing.expected_depth(1 / depth, density, 1 / far)
    expected = (chosen + 0.5) / 16 * (1 / 2 - 1 / 16) + 1 / 16
    np.testing.assert_allclose(disparity, expected, atol=0.01)


def test_planes_that_layers_cannot_share_are_refused():
    with pytest.raises(ValueError, match="sweep_planes=6"):
        prior.layer_features(jnp.zeros((len(prior.WINDOWS), 6, 2, 2)), 4)


def two_layers(view_offset: float) -> prior.BlendCues:
    """A near square in front of a far plane, with one input beside the target and one in it."""
    density = jnp.zeros((2, HEIGHT, WIDTH)).at[0].set(0.999)
    density = density.at[1, 5:11, 8:16].set(0.999)
    context = photographs(cameras_at([(view_offset, 0.0), (0.0, 0.0)]))
    return prior.blend_cues(jnp.zeros((2, HEIGHT, WIDTH)), density, TARGET[0], context)


@pytest.mark.thorough
def test_what_the_map_covers_is_hidden_from_a_view():
    cues = two_layers(0.5)
    # Far layer: fraction 1/4 of the disparity range, 1/5.8; near layer 3/4, 1/2.56. Seen from
    # 0.5 to the right, the square moves 20 * 0.5 * (1/2.56 - 1/5.8) = 2.2 pixels to the left of
    # the far plane, and covers what lies there.
    hidden = np.asarray(cues.hidden)
    assert hidden[0, 0, 7, 6] > 0.3  # covered in the moved view alone
    assert hidden[1, 0, 7, 6] < 0.01
    assert hidden[0, 0, 2, 6] < 0.01  # above the square
    assert hidden[:, 1, 6:10, 9:15].max() < 0.01  # the square itself is seen
    np.testing.assert_allclose(cues.remote[1], 0)


@pytest.mark.thorough
def test_a_view_that_differs_is_named_by_the_cues():
    context = photographs(cameras_at([(-0.2, 0.0), (0.2, 0.0), (0.0, 0.2), (0.0, -0.2)]))
    images = context.images.at[2].set(0.0)
    costs = prior.sweep_costs(context, TARGET[0], 16)
    features = prior.layer_features(costs, 2)
    density = jax.nn.sigmoid(features[..., prior.DENSITY])
    cues = prior.blend_cues(
        features[..., prior.DEPTH], density, TARGET[0], context.replace(images=images)
    )
    # Depth 4 lies in the far layer's band.
    inner = np.asarray(cues.differs)[:, 0, 5:-5, 7:-7].mean(axis=(1, 2))
    assert inner[2] > 3 * max(inner[0], inner[1], inner[3])


def batched(x):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], x)


def render(module, context=CONTEXT):
    variables = jax.jit(module.init)(jax.random.key(0), batched(context), batched(TARGET))
    return jax.jit(module.apply)(variables, batched(context), batched(TARGET)), variables


@pytest.mark.slow
def test_an_untrained_network_starts_near_the_sweep():
    truth = photographs(TARGET).images[0]
    with_sweep, _ = render(task.make_module({**MODEL, "sweep_planes": 32, "density_bias": 0.0}))
    without, _ = render(task.make_module(MODEL))
    score = lambda rendered: float(metrics.psnr(rendered.images[0, 0], truth))  # noqa: E731
    assert score(with_sweep) > 25
    assert score(with_sweep) > score(without) + 5


@pytest.mark.slow
def test_views_have_no_order_and_gradients_are_finite():
    module = task.make_module({**MODEL, "sweep_planes": 8})
    rendered, variables = render(module)
    order = jnp.array([2, 0, 1])
    shuffled = jax.tree.map(lambda x: jnp.asarray(x)[order], CONTEXT)
    again = jax.jit(module.apply)(variables, batched(shuffled), batched(TARGET))
    np.testing.assert_allclose(rendered.images, again.images, atol=2e-4)

    # A target at an input's very place, and one with an input behind it.
    hard = cameras_at([(-0.5, 0.1), (0.0, 0.0)])
    hard.world_from_cam[1, 2, 3] = 5.0

    def loss(variables, targets):
        return jnp.mean(jnp.square(module.apply(variables, batched(CONTEXT), targets).images))

    grads = jax.jit(jax.grad(loss))(variables, batched(hard))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_remoteness_is_zero_for_the_nearest_view_and_limited():
    apart = photoconsistency.remoteness(CONTEXT.cameras, TARGET[0])
    assert float(apart.min()) == 0
    at_input = cameras_at([(-0.5, 0.1)])[0]
    limited = photoconsistency.remoteness(CONTEXT.cameras, at_input, limit=7.0)
    np.testing.assert_allclose(limited, [0, 7, 7])
