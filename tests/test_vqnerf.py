"""VQ-NeRF as a task: rays of latents, deferred gradients, losses, what learns, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import vqnerf as vqnerf_config
from nvs_common import cameras, errors, sharding
from nvs_common.types import Batch, Cameras, Views
from tests import small_vqgan
from vqnerf_jax import SDFField, image_rays, inspection, model, supervision, task, vqgan_to_torch

FIELD = dict(layers=2, hidden=8, features=4, octaves=1, skips=(), color_layers=1)
FIELD |= dict(color_hidden=8, color_octaves=1, samples=6, importance=2, rounds=1)
FIELD |= dict(grids=(), precision="highest")


def orbit(count, size=8, distance=2.5):
    """Cameras [count] around the origin that look at it."""
    poses = []
    for angle in np.linspace(0, 2, count):
        back = np.array([np.sin(angle), 0.2, -np.cos(angle)])
        forward = -back / np.linalg.norm(back)
        right = np.cross([0.0, 1, 0], forward)
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=-1)
        pose[:3, 3] = -distance * forward
        poses.append(pose)
    ones = np.ones(count, np.float32)
    k = np.tile(np.float32([size * 1.2, size * 1.1, size / 2 + 0.3, size / 2]), (count, 1))
    return Cameras(np.float32(poses), k, ones, 5 * ones, size, size)


def config(**changes):
    config = vqnerf_config.get_config("tiny")
    config.model.update(chunk=5)
    config.model.field.update(FIELD)
    config.model.vqgan.update(**{**small_vqgan.SMALL, "mid_attention": False})
    config.loss.update(latent_crop=3, global_rays=7, mask_weight=0.0, shape_from="both")
    for name, value in changes.items():
        section, _, leaf = name.partition("__")
        config[section][leaf] = value
    return config


def batch(size=8, mask=False):
    draw = np.random.default_rng(0)
    images = draw.uniform(size=(1, 2, size, size, 3)).astype(np.float32)
    cams = jax.tree.map(lambda x: x[None], orbit(2, size))
    views = Views(images, cams)
    extras = {"mask": np.ones((1, 2, size, size), np.float32)} if mask else {}
    return Batch(views, views, extras)


def random_params(ours):
    """Of the shapes that initialisation gives; only the field starts as a sphere."""
    shapes = jax.eval_shape(functools.partial(model.init, ours), jax.random.key(0))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.3 * draw.normal(size=x.shape).astype(np.float32), shapes)
    params["field"]["deviation"] = np.float32(0.3)
    return params


@functools.cache
def small():
    return task.make_model(config().model)[0]


def test_rays_of_latents_pass_through_the_middle_of_their_block():
    cams = orbit(3, size=16)
    grid = image_rays.latent_cameras(cams, 4)
    assert (grid.height, grid.width) == (4, 4)
    origins, directions = cameras.rays(grid)
    uv, _ = cameras.project(cams, origins + 2 * directions)
    middle = 4 * np.stack(np.meshgrid(np.arange(4), np.arange(4)), axis=-1) + 2.0
    np.testing.assert_allclose(uv, np.broadcast_to(middle, uv.shape), atol=2e-5)
    with pytest.raises(errors.InputError, match="have no whole latents of 3 x 3"):
        image_rays.latent_cameras(cams, 3)


def test_pixels_and_their_rays_belong_together():
    cams = orbit(1)[0]
    whole = image_rays.of_cameras(cams, jnp.zeros(3), 2.0)
    uv = jnp.asarray([[0.5, 0.5], [3.5, 6.5]])
    rays = image_rays.at_pixels(cams, uv, jnp.zeros(3), 2.0)
    for got, wanted in zip(jax.tree.leaves(rays), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, np.stack([wanted[0, 0], wanted[6, 3]]), atol=1e-6)
    # A sphere of radius 2 about the origin: the camera at 2.5 is at 1.25 in its frame.
    np.testing.assert_allclose(jnp.linalg.norm(rays.origins, axis=-1), 1.25, rtol=1e-5)


@pytest.mark.thorough
def test_a_window_shows_what_its_cameras_see():
    targets = jax.tree.map(lambda x: x[0], batch().target)
    u = np.broadcast_to(np.arange(8.0)[None, :, None], (8, 8, 1))
    uv = np.concatenate([u, u.transpose(1, 0, 2), 0 * u], axis=-1).astype(np.float32) + 0.5
    targets = targets.replace(images=np.stack([uv, uv]))
    cut = supervision.crops(small(), targets, 3, jax.random.key(1))
    assert cut.images.shape == (2, 6, 6, 3)
    origins, directions = cameras.rays(cut.cameras)
    seen, _ = cameras.project(targets.cameras, origins + 2 * directions)
    blocks = cut.images.reshape(2, 3, 2, 3, 2, 3).mean(axis=(2, 4))[..., :2]
    np.testing.assert_allclose(seen, blocks, atol=2e-5)
    pixels = supervision.random_pixels(small(), targets, None, 5, jax.random.key(2))
    points = (pixels.rays.origins + 2 * pixels.rays.directions).reshape(2, 5, 3)
    seen, _ = cameras.project(targets.cameras, points)
    np.testing.assert_allclose(seen, pixels.colors.reshape(2, 5, 3)[..., :2], atol=2e-5)


def loss_and_gradient(chunk, params, data):
    settings = config(model__chunk=chunk)
    made = task.make(settings)
    variables = {"params": params, "schedule": {"step": jnp.asarray(3)}}

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        return made.loss({**variables, "params": params}, data, jax.random.key(4))

    return loss(params)


@pytest.mark.thorough
def test_deferred_gradients_are_those_of_all_rays_at_once():
    params, data = random_params(small()), batch()
    (value, aux), gradients = loss_and_gradient(5, params, data)
    (wanted, _), whole = loss_and_gradient(10_000, params, data)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert aux.collections["schedule"]["step"] == 4
    assert {"decoded", "global", "eikonal", "quantizer", "perplexity"} <= set(aux.metrics)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(whole), strict=True
    ):
        size = max(float(jnp.linalg.norm(b)), 1e-4)
        assert float(jnp.linalg.norm(a - b)) / size < 2e-4, sharding.path_name(path)
    assert jnp.any(gradients["empty"] != 0)
    assert jnp.any(gradients["vqgan"]["codebook"]["embedding"] != 0)
    assert jnp.any(gradients["field"]["latent"]["layer_0"]["kernel"] != 0)


def test_parts_of_rays_need_less_memory_for_gradients():
    ours = small()
    params = random_params(ours)
    rays = image_rays.of_cameras(orbit(1, size=24)[0], jnp.zeros(3), 1.5)
    rays = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rays)

    def compiled(chunk):
        part = dataclasses.replace(ours, chunk=chunk)

        def loss(params):
            keep = lambda out: out.latents  # noqa: E731
            return jnp.sum(model.render_rays(part, params, rays, keep))

        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis()

    assert 4 * compiled(32).temp_size_in_bytes < compiled(576).temp_size_in_bytes


@pytest.mark.parametrize("decoder", ["frozen", "last", "full"])
@pytest.mark.thorough
def test_the_decoder_learns_as_far_as_it_is_said(decoder):
    params = random_params(small())
    gradients = jax.grad(
        lambda p: sum(jnp.sum(x) for x in jax.tree.leaves(model.hold_fixed(p, decoder)))
    )(params)
    learns = {
        sharding.path_name(path).removeprefix("vqgan/").split("/")[0]
        for path, x in jax.tree_util.tree_leaves_with_path(gradients)
        if jnp.any(x != 0) and sharding.path_name(path).startswith("vqgan")
    }
    full = {"decoder", "post_quant_conv", "codebook"}
    assert learns == {"frozen": set(), "last": {"decoder"}, "full": full}[decoder]
    deep = gradients["vqgan"]["decoder"]["conv_in"]["kernel"]
    assert jnp.any(deep != 0) == (decoder == "full")
    assert jnp.all(gradients["empty"] == 1)


@pytest.mark.slow
def test_views_are_rendered_at_full_size_by_both_ways():
    params = random_params(small())
    targets = jax.tree.map(lambda x: x[None], orbit(2))
    for full in (False, True):
        made = task.make(config(model__full_resolution=full))
        out = jax.jit(made.render)({"params": params}, batch().context, targets)
        assert out.images.shape == (1, 2, 8, 8, 3)
        assert out.depth.shape == out.alpha.shape == (1, 2, 8, 8)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(out))


def test_masks_teach_opacity_and_are_checked():
    settings = config(loss__mask_weight=0.5)
    made, params = task.make(settings), random_params(small())
    variables = {"params": params, "schedule": {"step": jnp.asarray(0)}}
    shapes = jax.eval_shape(made.loss, variables, batch(mask=True), jax.random.key(0))
    assert "mask" in shapes[1].metrics
    with pytest.raises(errors.InputError, match="the batch has no masks"):
        jax.eval_shape(made.loss, variables, batch(), jax.random.key(0))
    wrong = batch(mask=True)
    wrong.extras["mask"] = wrong.extras["mask"][:, :, :4]
    with pytest.raises(errors.InputError, match=r"masks have shape \(1, 2, 4, 8\)"):
        jax.eval_shape(made.loss, variables, wrong, jax.random.key(0))
    value = supervision.cross_entropy(jnp.asarray([0.0, 1.0]), jnp.asarray([0.0, 1.0]))
    assert 0 < value < 0.01


def test_cameras_inside_the_object_and_diverged_fields_are_named():
    ours, params, names = small(), random_params(small()), ["a.png", "b.png"]
    last = params["field"]["sdf"]["layer_2"]
    # The distance is then the last layer's bias.
    last["scale"] = 0 * last["scale"]
    last["bias"] = np.full_like(last["bias"], 0.25)
    inspection.check_cameras(ours, params, orbit(2, distance=0.5), names)
    last["bias"] = -last["bias"]
    inspection.check_cameras(ours, params, orbit(2, distance=1.5), names)
    with pytest.raises(errors.InputError, match="a.png: its camera is inside the object"):
        inspection.check_cameras(ours, params, orbit(2, distance=0.5), names)
    last["bias"] = np.nan * last["bias"]
    with pytest.raises(errors.InputError, match="a.png: .* training has diverged"):
        inspection.check_cameras(ours, params, orbit(2), names)


@pytest.mark.slow
def test_eight_devices_give_the_gradient_of_one():
    params, data = random_params(small()), batch()
    _, wanted = loss_and_gradient(5, params, data)
    mesh = sharding.make_mesh({"data": 8})
    with jax.set_mesh(mesh), sharding.axis_rules():
        on_all = jax.device_put(params, sharding.replicated(mesh))
        _, got = loss_and_gradient(5, on_all, jax.device_put(data, sharding.replicated(mesh)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize(
    "changes, missing",
    [
        ({"loss__decoded_weight": 0.0}, "decoded"),
        ({"loss__global_rays": 0}, "global"),
    ],
)
def test_a_branch_without_weight_is_not_rendered(changes, missing):
    made = task.make(config(**changes))
    variables = {"params": random_params(small()), "schedule": {"step": jnp.asarray(0)}}
    shapes = jax.eval_shape(made.loss, variables, batch(), jax.random.key(0))
    both = {"decoded", "global"}
    assert both - {missing} <= set(shapes[1].metrics) and missing not in shapes[1].metrics
    none = task.make(config(loss__decoded_weight=0.0, loss__global_weight=0.0))
    with pytest.raises(errors.InputError, match="no branch is trained"):
        jax.eval_shape(none.loss, variables, batch(), jax.random.key(0))


@pytest.mark.thorough
def test_the_shape_learns_from_pixels_alone_if_it_is_said():
    params = random_params(small())

    def gradients(**changes):
        # All rays at once compile in a fraction of the time.
        made = task.make(config(loss__shape_from="pixels", model__chunk=10_000, **changes))
        variables = {"schedule": {"step": jnp.asarray(3)}}

        def loss(params):
            terms = made.loss({**variables, "params": params}, batch(), jax.random.key(4))[1]
            return terms.metrics["decoded"] + terms.metrics["quantizer"]

        return jax.jit(jax.grad(loss))(params)["field"]

    found = gradients()
    for name in ("sdf", "deviation"):
        assert all(not jnp.any(x) for x in jax.tree.leaves(found[name])), name
    for name in ("color", "latent"):
        assert any(jnp.any(x) for x in jax.tree.leaves(found[name])), name
    with pytest.raises(errors.InputError, match="none are rendered: the shape would not learn"):
        gradients(loss__global_rays=0)


@pytest.mark.thorough
def test_a_share_of_pixels_is_drawn_within_the_mask():
    targets = jax.tree.map(lambda x: x[0], batch().target)
    mask = jnp.zeros((2, 8, 8)).at[:, 2, 3:5].set(1.0)
    draw = lambda m: supervision.random_pixels(  # noqa: E731
        small(), targets, m, 400, jax.random.key(2), foreground=0.5
    )
    inside = draw(mask).mask
    assert abs(inside.mean() - (0.5 + 0.5 * 2 / 64)) < 0.06
    pixels = draw(jnp.zeros_like(mask))
    assert pixels.mask.max() == 0 and len(np.unique(pixels.colors[:, 0])) > 40


def test_what_is_behind_colours_is_the_chosen_background():
    # No surface anywhere: the distance is the last layer's bias.
    params = random_params(small())
    last = params["field"]["sdf"]["layer_2"]
    last["scale"], last["bias"] = 0 * last["scale"], np.full_like(last["bias"], 3.0)
    white = dataclasses.replace(small(), background=(1.0, 0.5, 0.0), chunk=64)
    render = jax.jit(lambda p: model.render_views(white, p, orbit(1), full_resolution=True))
    out = render(params)
    np.testing.assert_allclose(out.images[0, 4, 4], [1, 0.5, 0], atol=0.02)


def test_an_auto_encoder_of_another_size_is_named(tmp_path):
    ours = small()
    file = tmp_path / "codes.npz"
    np.savez(file, **vqgan_to_torch(ours.vqgan, {"params": random_params(ours)["vqgan"]}))
    fits = config(model__vqgan_weights=str(file), model__decoder="frozen")
    assert task.make_model(fits.model)[0].vqgan.num_codes == ours.vqgan.num_codes
    fits.model.vqgan.num_codes = 9
    with pytest.raises(errors.InputError, match="has num_codes=9 but the file has 7; make them"):
        task.make(fits)


def test_every_parameter_has_one_layout():
    for setting in ("tiny", "tiny,fsq", "tiny,volsdf", "object"):
        settings = vqnerf_config.get_config(setting)
        ours, _ = task.make_model(settings.model)
        shapes = jax.eval_shape(functools.partial(model.init, ours), jax.random.key(0))
        sharding.param_specs(shapes, model.param_axes(ours))


def test_bad_settings_are_explained():
    for name, value, words in [
        ("model__decoder", "frozen", "name its file in model.vqgan_weights"),
        ("model__latent", "fsq", "has quantizer='vq'"),
        ("model__radius", 0.0, "must be positive"),
        ("model__vqgan_weights", "absent.pt", "no such file"),
        ("loss__clip_weights", "absent.pt", "no such file"),
    ]:
        settings = config(**{name: value})
        with pytest.raises(errors.InputError, match=words):
            task.make(settings)
    settings = config()
    settings.model.field.latent_channels = 3
    with pytest.raises(errors.InputError, match="the field renders 3 numbers a latent"):
        task.make(settings)
    settings = config()
    settings.model.field.depth = 3
    with pytest.raises(errors.InputError, match=r"unknown fields \['depth'\]"):
        task.make(settings)
    assert SDFField(**FIELD).importance == 2
