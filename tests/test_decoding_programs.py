"""Programs that decode: kinds of depth compared on held-out orbits, and decoding in two passes."""

import dataclasses
import functools
import json
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from configs import depth_decoder as depth_config
from depth_decoder_jax import SVDVAE, task, to_torch
from launch import sdf_fit, trained
from nvs_common import sharding, starting, weights
from nvs_common.data import objects
from nvs_common.errors import InputError

SIZE = 16


@functools.cache
def model(stage="decoder"):
    """A model with random numbers for parameters, also where training starts at zero."""
    config = depth_config.get_config("tiny")
    config.data.update(height=SIZE, width=SIZE, num_target=2, views_per_scene=4)
    config.model.vae.update(channels=(32, 32), num_mid=1)
    config.model.update(levels=1, samples=(2,), front="none")
    config.loss.stage = stage
    made = task.make(config)
    shapes = trained.abstract_variables(made, 1, SIZE, SIZE)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        is_scale = sharding.path_name(path).endswith("scale")
        return jnp.asarray(0.1 * rng.standard_normal(leaf.shape) + is_scale, jnp.float32)

    variables = jax.tree_util.tree_map_with_path(draw, dict(shapes))
    return trained.Trained(config, made, variables, 3, pathlib.Path(stage), {})


@pytest.fixture
def depth_quality(program):
    return program("depth_quality")


@pytest.fixture
def decode(program):
    return program("decode")


@pytest.mark.slow
def test_kinds_of_depth_are_what_they_say(depth_quality):
    orbit = depth_quality.held_out(model().config, 1)[0]
    true, mask = depth_quality.given(depth_quality.TRUE, orbit, 0.1)
    noisy, _ = depth_quality.given(depth_quality.NOISY, orbit, 0.1)
    wrong, _ = depth_quality.given(depth_quality.WRONG, orbit, 0.1)
    _, nothing = depth_quality.given(depth_quality.NONE, orbit, 0.1)
    inside = np.asarray(mask)
    assert inside.any() and not nothing.any() and np.all(np.asarray(true)[inside] > 0.9)
    assert 1e-3 < np.abs(noisy - true)[inside].max() <= 0.09
    np.testing.assert_allclose((wrong - true)[inside], 0.3, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(noisy)[~inside], np.asarray(true)[~inside])


@pytest.mark.slow
def test_decoders_are_compared_on_the_same_noisy_latents(depth_quality):
    runs, orbits = [model(), model("plain_decoder")], depth_quality.held_out(model().config, 1)
    cases = depth_quality.study(runs, orbits, [0.0, 0.3])
    by_name = {(case.model, case.depth, case.noise): case for case in cases}
    assert len(by_name) == len(cases) == 2 * (len(depth_quality.KINDS) + 1)
    # Without foreground nothing is added: the same parameters decode alike.
    for noise in (0.0, 0.3):
        plain = by_name["plain_decoder", "-", noise]
        np.testing.assert_allclose(
            by_name["decoder", depth_quality.NONE, noise].images, plain.images, atol=1e-6
        )
        changed = by_name["decoder", depth_quality.TRUE, noise].images - plain.images
        assert np.abs(changed).max() > 1e-3
    lines = depth_quality.table(runs[0].config, orbits, cases)
    assert len(lines) == 2 + 2 + 1 + len(cases) and "agreement" in lines[2]
    picture = depth_quality.picture(orbits[0], cases, 0.3)
    # The truth, and two decoders with their errors; two views.
    assert picture.size == (2 * SIZE * depth_quality.SCALE, 5 * SIZE * depth_quality.SCALE)
    scores = depth_quality.scores(orbits[0].batch.target.images, orbits[0], None)
    assert scores["psnr"] == scores["object_psnr"] == 100 and scores["l1"] == 0


def test_autoencoders_and_other_systems_are_refused(depth_quality):
    run = model()
    config = run.config.copy_and_resolve_references()
    config.loss.stage = "autoencoder"
    with pytest.raises(InputError, match="second stage"):
        depth_quality.study([run._replace(config=config)], [], [0.0])


@pytest.fixture
def flags(decode, monkeypatch):
    """The program's flags, as they would be parsed."""
    given = dict(LATENTS=None, NOISE=0.0, STEPS=2, SCENE="objects:3", ROUNDS=1)

    def change(**changes):
        for name, value in (given | changes).items():
            monkeypatch.setattr(decode, f"_{name}", types.SimpleNamespace(value=value))

    change()
    return change


def decoded(decode, chosen, source):
    run = model()
    module = task.make_module(run.config.model)
    latents = decode.find_latents(module, run.variables, chosen)
    cams = decode._batched(chosen.given.cameras)
    return decode.two_pass.decode_with_depth(module, run.variables, latents, cams, None, source)


@pytest.mark.thorough
def test_two_passes_leave_pictures_depth_and_figures(decode, flags, tmp_path):
    chosen = decode.choose(model().config, "objects:3", 0, None)
    np.testing.assert_array_equal(chosen.views, [1, 3])
    source = decode.depth_source("truth", chosen, [])
    found = decoded(decode, chosen, source)
    measured = decode.measure(found, chosen, [])
    decode.write(tmp_path, found, chosen, measured, [])
    assert measured["depth_error"] == 0 and measured["last_psnr"] != measured["first_psnr"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == measured
    with Image.open(tmp_path / "images" / "003.png") as image:
        shown = np.asarray(image) / 255
    np.testing.assert_allclose(shown, found.images[0, 1], atol=3e-3)
    # What was written is what --depth=FILE reads.
    again = decode.depth_source(str(tmp_path / "depth.npz"), chosen, [])(None, None)
    np.testing.assert_array_equal(again.depth, np.asarray(found.depth))
    np.testing.assert_array_equal(again.mask, np.asarray(found.mask))


def test_latents_of_a_diffusion_model_lose_their_scale(decode, flags, tmp_path):
    chosen = decode.choose(model().config, "objects:3", 0, ["2"])
    module = task.make_module(model().config.model)
    file = tmp_path / "z.npy"
    np.save(file, np.full((1, 8, 8, 8), 0.18215, np.float32))
    flags(LATENTS=str(file))
    found = decode.find_latents(module, model().variables, chosen)
    np.testing.assert_allclose(found, np.ones((1, 1, 8, 8, 8)), rtol=1e-5)
    np.save(file, np.zeros((1, 8, 8, 3)))
    with pytest.raises(InputError, match=re.escape("latents of shape (1, 8, 8, 3)")):
        decode.find_latents(module, model().variables, chosen)


@pytest.mark.parametrize(
    ("scene", "front", "views", "message"),
    [
        ("objects:x", 0, None, "expected objects:SEED"),
        ("objects:3", 9, None, "the scene has the views 0 to 3"),
        ("objects:3", 0, ["7"], "--views=7"),
        ("objects:3", 0, ["a"], "expected numbers"),
        ("missing", 0, None, "no such file or folder"),
    ],
)
def test_wrong_choices_are_named(decode, scene, front, views, message):
    with pytest.raises(InputError, match=message):
        decode.choose(model().config, scene, front, views)


def test_files_without_depth_are_named(decode, flags, tmp_path):
    chosen = decode.choose(model().config, "objects:3", 0, None)
    np.savez(tmp_path / "d.npz", z=np.ones(3))
    with pytest.raises(InputError, match="expected an array `depth`"):
        decode.depth_source(str(tmp_path / "d.npz"), chosen, [])
    bare = dataclasses.make_dataclass("Bare", ["names"])(chosen.scene.names)
    with pytest.raises(InputError, match="has no depth"):
        decode.depth_source("truth", chosen._replace(scene=bare), [])


def cameras_of(scene):
    cams = scene.cameras
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), cams)


def test_the_sphere_of_a_fit_holds_the_object():
    scene = objects.Objects(2, 1, SIZE, SIZE, 4)[0]
    center, radius = sdf_fit.sphere(scene.cameras)
    np.testing.assert_allclose(center, 0, atol=1e-6)
    assert objects.RADIUS < radius < 1.1 * objects.RADIUS
    mask = sdf_fit.foreground(scene.images([0]))
    covered = scene.masks([0])
    assert mask[covered == 1].mean() > 0.95 and not mask[covered == 0].any()
    with pytest.raises(InputError, match="no surface to fit"):
        blank = np.ones((4, SIZE, SIZE, 3))
        sdf_fit.fit(blank, sdf_fit.foreground(blank), cameras_of(scene))


@pytest.mark.slow
def test_a_fit_finds_the_object():
    scene = objects.Objects(2, 1, 32, 32, 8)[0]
    cams, images = cameras_of(scene), scene.images(range(8))
    surface = sdf_fit.fit(images, sdf_fit.foreground(images), cams, sdf_fit.Recipe(300))
    maps, true = sdf_fit.depth(surface, cams), scene.depths(range(8))
    both = maps.mask & (true > 0)
    assert both.sum() > 0.85 * (maps.mask | (true > 0)).sum()
    assert np.median(np.abs(maps.depth - true)[both]) < 0.05
    assert surface.errors[-20:].mean() < 0.5 * surface.errors[:20].mean()


def test_published_weights_become_a_start_of_training(program, tmp_path):
    module = SVDVAE(channels=(32, 32), num_resnets=1, num_mid=1, latent_channels=8)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, 4, 4, 3)))
    variables = jax.tree.map(lambda x: np.full(x.shape, 0.25, x.dtype), shapes)
    np.savez(tmp_path / "svd.npz", **to_torch(variables))
    main = program("convert").main
    values = dict(model="depth_decoder", input=str(tmp_path / "svd.npz"))
    with flagsaver.flagsaver(output=str(tmp_path / "out"), **values):
        assert main([]) == 0
    file = tmp_path / "out" / "weights.npz"
    config = weights.read(file).config
    assert tuple(config.model.vae.channels) == (32, 32) and config.model.vae.num_mid == 1
    # The decoder has parts that the autoencoder lacks, and no other.
    made = trained.abstract_variables(model().task, 1, SIZE, SIZE)["params"]
    found = starting.initial_params(file, made, config.init_new)
    assert set(found) == {"vae"} and set(made) - set(found) == {"cross_0"}
    np.testing.assert_array_equal(found["vae"]["quant_conv"]["bias"], np.full(16, 0.25))
