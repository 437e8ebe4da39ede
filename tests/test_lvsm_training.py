"""LVSM as a task: poses, loss, configs, and that it learns."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lvsm as lvsm_config
from launch import cli, trained
from lvsm_jax import task
from nvs_common import evaluate, optim, sharding, train, training_step, vgg19
from nvs_common.data import pipeline, sources
from nvs_common.errors import InputError
from nvs_common.types import Batch, Cameras, Views
from tests import conftest, random_vgg

KINDS = ("tiny", "tiny_encoder_decoder")


def small_config(setting="tiny", **changes):
    """Small enough for a test: 16 x 16 pixels, two layers, eight scenes."""
    config = lvsm_config.get_config(setting)
    config.update(batch_size=4, log_every=10, eval_every=0, ema=0.0, checkpoint_every=1000)
    config.data.update(height=16, width=16, num_context=2, num_target=2, nearest=3)
    config.data.update(num_scenes=8, views_per_scene=5, workers=0, keep_in_memory=True)
    config.model.update(width=32, head_size=16, patch=4)
    if setting == "tiny":
        config.model.layers = 2
    else:
        config.model.update(encoder_layers=1, decoder_layers=1, latents=8)
    config.optim.update(learning_rate=3e-3, warmup_steps=5)
    config.update(**changes)
    return config


def views(rng, count, size=16):
    """Views [1, count] of noise, whose cameras look about."""
    poses = np.tile(np.eye(4, dtype=np.float32), (1, count, 1, 1))
    for pose in poses[0]:
        q, _ = np.linalg.qr(np.eye(3) + 0.2 * rng.normal(size=(3, 3)))
        pose[:3, :3] = q * np.sign(np.linalg.det(q))
        pose[:3, 3] = rng.normal(size=3)
    k = np.tile(np.float32([size, size, size / 2, size / 2]), (1, count, 1))
    ones = np.ones((1, count), np.float32)
    images = rng.uniform(size=(1, count, size, size, 3)).astype(np.float32)
    return Views(images, Cameras(poses, k, ones, 9 * ones, size, size))


def batch(seed=0, context=2, targets=3):
    rng = np.random.default_rng(seed)
    return Batch(views(rng, context), views(rng, targets))


def make(normalize, setting="tiny"):
    config = small_config(setting)
    config.poses.normalize = normalize
    made = task.make(config)
    variables = jax.jit(made.init)(jax.random.key(0), batch())
    # Initial weights are so small that pictures hardly depend on anything.
    variables = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, variables)
    return made._replace(render=jax.jit(made.render)), variables


def moved(part, similarity):
    """Views in a world that was turned and moved by a rigid [4, 4], then scaled."""
    rigid, scale = similarity
    poses = rigid @ part.cameras.world_from_cam
    poses[..., :3, 3] *= scale
    cameras = dataclasses.replace(part.cameras, world_from_cam=poses.astype(np.float32))
    return dataclasses.replace(part, cameras=cameras)


@pytest.mark.parametrize("normalize", ["all", "inputs", "none"])
def test_normalised_poses_make_the_world_irrelevant(normalize):
    made, variables = make(normalize)
    plain = batch()
    rigid = np.eye(4)
    rigid[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    rigid[:3, 3] = [1, -2, 0.5]
    a, b = (
        made.render(variables, both.context, both.target.cameras).images
        for both in (
            plain,
            Batch(moved(plain.context, (rigid, 3.0)), moved(plain.target, (rigid, 3.0))),
        )
    )
    same = np.allclose(a, b, atol=1e-4)
    assert same == (normalize != "none")


@pytest.mark.parametrize("normalize", ["all", "inputs", "none"])
def test_a_picture_depends_on_the_other_targets_only_where_all_are_normalised(normalize):
    made, variables = make(normalize)
    plain = batch()
    together = made.render(variables, plain.context, plain.target.cameras).images[:, :1]
    alone = made.render(variables, plain.context, plain.target.cameras[:, :1]).images
    assert np.allclose(together, alone, atol=1e-5) == (normalize != "all")


@pytest.mark.parametrize("normalize", ["all", "inputs"])
@pytest.mark.thorough
def test_training_normalises_over_all_drawn_views(normalize):
    made, variables = make(normalize)
    whole = batch()
    poses = [part.cameras.world_from_cam for part in (whole.context, whole.target)]
    drawn = np.concatenate(poses, axis=1)
    loss = jax.jit(made.loss)
    expected = loss(variables, whole, jax.random.key(1))[0]
    # The same targets out of order and one of them alone: the frame is that of all drawn views.
    same = loss(variables, dataclasses.replace(whole, extras={"drawn_poses": drawn[:, ::-1]}), None)
    np.testing.assert_allclose(same[0], expected, rtol=1e-5)
    first = Views(whole.target.images[:, :1], whole.target.cameras[:, :1])
    part = Batch(whole.context, first)
    known = dataclasses.replace(part, extras={"drawn_poses": drawn})
    images = made.render(variables, whole.context, whole.target.cameras).images[:, :1]
    l2 = np.mean((np.asarray(images) - whole.target.images[:, :1]) ** 2)
    np.testing.assert_allclose(loss(variables, known, None)[1].metrics["l2"], l2, rtol=1e-5)
    differs = not np.allclose(loss(variables, part, None)[1].metrics["l2"], l2, rtol=1e-5)
    assert differs == (normalize == "all")


def test_training_at_one_place_has_a_finite_loss_and_gradient():
    config = small_config()
    config.poses.normalize = "all"
    made, plain = task.make(config), batch()
    for part in (plain.context, plain.target):
        part.cameras.world_from_cam[..., :3, 3] = [5.0, 1.0, -2.0]
    variables = jax.jit(made.init)(jax.random.key(0), plain)
    loss = lambda v: made.loss(v, plain, jax.random.key(1))[0]  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(variables)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_a_perceptual_weight_without_weights_is_said_aloud(caplog):
    config = small_config()
    config.loss.update(perceptual_weight=0.5, perceptual_weights="")
    made, views = task.make(config), batch(targets=1)
    variables = jax.eval_shape(made.init, jax.random.key(0), views)
    jax.eval_shape(made.loss, variables, views, jax.random.key(1))
    assert "perceptual_weight=0.5 is without effect" in caplog.text


@pytest.mark.thorough
def test_the_loss_is_the_weighted_sum_of_its_terms(tmp_path):
    path = tmp_path / "vgg.npz"
    np.savez(path, **random_vgg.arrays())
    config, plain = small_config(), batch(targets=1)
    without = task.make(config)
    config.loss.update(l2_weight=2.0, perceptual_weight=0.5, perceptual_weights=str(path))
    made = task.make(config)
    variables = jax.jit(made.init)(jax.random.key(0), plain)
    key = jax.random.key(1)
    total, aux = jax.jit(made.loss)(variables, plain, key)
    rendered = jax.jit(made.render)(variables, plain.context, plain.target.cameras).images
    expected = vgg19.loss(vgg19.load(path), rendered, plain.target.images)
    np.testing.assert_allclose(aux.metrics["perceptual"], expected, rtol=1e-4)
    l2 = np.mean((rendered - plain.target.images) ** 2)
    np.testing.assert_allclose(total, 2 * l2 + 0.5 * expected, rtol=1e-4)
    alone, aux = jax.jit(without.loss)(variables, plain, key)
    np.testing.assert_allclose(alone, l2, rtol=1e-4)
    assert "perceptual" not in aux.metrics
    config.loss.perceptual_weights = str(tmp_path / "absent.npz")
    gone = task.make(config)  # renders without the file
    with pytest.raises(InputError, match="absent.npz"):
        jax.eval_shape(gone.loss, variables, plain, key)


@pytest.mark.parametrize("setting", KINDS)
def test_norms_are_not_decayed_and_latents_are(setting):
    made = task.make(small_config(setting))
    params = jax.eval_shape(made.init, jax.random.key(0), batch())["params"]
    mask = optim.decay_mask(params, made.param_axes)
    for path, decayed in jax.tree_util.tree_leaves_with_path(mask):
        name = sharding.path_name(path)
        assert decayed == (not name.endswith("/scale")), name
    assert mask == optim.decay_mask(params)
    assert setting == "tiny" or mask["latents"]


@pytest.mark.parametrize("setting", lvsm_config.SETTINGS)
def test_every_setting_makes_its_model(setting):
    config = lvsm_config.get_config(setting)
    data = config.data
    made = task.make(config)
    shapes = trained.abstract_variables(made, data.num_context, data.height, data.width)
    count = sum(x.size for x in jax.tree.leaves(shapes))
    if setting.startswith("tiny"):
        assert count < 3e6
    else:
        assert count == (173_154_816 if "encoder" in setting else 170_795_520)
    optim.make(config, made.param_axes)
    specs = sharding.param_specs(shapes["params"], made.param_axes)
    assert jax.tree.structure(specs) == jax.tree.structure(shapes["params"])


@pytest.mark.parametrize("variant", ["prope", "gta", "prefix", "cross_attention"])
def test_later_variants_make_a_model(variant):
    config = lvsm_config.get_config(f"tiny,{variant}")
    made = task.make(config)
    shapes = trained.abstract_variables(made, 2, 32, 32)
    sharding.param_specs(shapes["params"], made.param_axes)
    module, plain = (task.make_module(c.model) for c in (config, lvsm_config.get_config("tiny")))
    assert module != plain


@pytest.mark.parametrize(
    "arg",
    [
        *(f"tiny_encoder_decoder,{name}" for name in ("one_gpu", "two_gpus", "prope", "prefix")),
        "object_encoder_decoder_256,cross_attention",
        "tiny,cross_attention,one_gpu",
        "scene_decoder_only_256,overfit",
    ],
)
def test_variants_name_the_settings_they_are_of(arg):
    path = conftest.ROOT / "configs" / "lvsm.py"
    with pytest.raises(InputError, match=f"--config=.*{arg}: variant '{arg.rpartition(',')[2]}'"):
        cli.load_config(f"{path}:{arg}")


def test_small_recipes_have_their_layers():
    sizes = {}
    for name in ("one_gpu", "two_gpus"):
        config = lvsm_config.get_config(f"scene_decoder_only_256,{name}")
        assert config.batch_size == 64
        sizes[name] = config.model.layers
    assert sizes == {"one_gpu": 6, "two_gpus": 12}


@pytest.mark.parametrize(
    "section, field, value, says",
    [
        ("model", "architecture", "both", "architecture='both'.*decoder_only"),
        ("model", "dtype", "float16", "dtype='float16'.*bfloat16"),
        ("model", "depth", 3, "fields \\['depth'\\]"),
        ("poses", "normalize", "some", "normalize='some'"),
        ("poses", "scale", 0.0, "scale=0.0"),
    ],
)
def test_bad_fields_are_named(section, field, value, says):
    config = small_config()
    with config.unlocked():
        config[section][field] = value
    with pytest.raises(InputError, match=says):
        task.make(config)


def run(config, workdir):
    batches = pipeline.training_batches(config)
    return train.fit(task.make(config), batches, config, workdir, devices=jax.devices()[:1])


def logged(workdir: pathlib.Path, name: str) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("setting", KINDS)
@pytest.mark.thorough
def test_a_few_steps_learn(setting, tmp_path):
    state = run(small_config(setting, num_steps=60), tmp_path)
    psnr = logged(tmp_path, "psnr")
    assert int(state.step) == 60 and int(state.skipped) == 0
    assert psnr[-1] > psnr[0] + 1


@pytest.mark.parametrize("setting", [name for name in lvsm_config.SETTINGS if "512" not in name])
def test_mixed_batches_are_cut_into_patches(setting):
    config = lvsm_config.get_config(f"{setting},mixed")
    data, patch = config.data, config.model.patch
    assert data.min_context < data.num_context <= data.nearest
    ratios = {width / height for height, width in data.crops}
    assert len(ratios) == len(data.crops) and max(ratios) > 2
    for height, width in data.crops:
        assert height <= data.height and width <= data.width
        assert height % patch == width % patch == 0


@pytest.mark.thorough
def test_resumed_run_with_changing_inputs_and_sizes_is_bit_equal(tmp_path):
    def config(num_steps):
        config = small_config(num_steps=num_steps, batch_size=2, checkpoint_every=3)
        config.data.update(num_context=3, min_context=2, num_target=1)
        config.data.crops = ((16, 16), (8, 16))
        # The rate does not depend on where the run was meant to end.
        config.optim.update(schedule="constant", warmup_steps=0)
        return config

    whole = run(config(6), tmp_path / "whole")
    run(config(3), tmp_path / "halves")
    resumed = run(config(6), tmp_path / "halves")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("setting", KINDS)
def test_one_scene_is_learnt_by_heart(setting, tmp_path):
    """What the variant `overfit` shows; about five minutes on two cores."""
    config = lvsm_config.get_config(f"{setting},overfit")
    made = task.make(config)
    state = run(config, tmp_path)
    scene = sources.make_source(config)[0]
    psnr = seen_views(made, training_step.variables(state), scene)
    assert np.mean(psnr) > 30


def seen_views(made, variables, scene):
    """PSNR of every view of a scene, each rendered from the two views nearest to it."""
    count = len(scene.names)
    protocol = evaluate.Protocol(num_inputs=2, hold_out_every=count)
    scores, render = [], jax.jit(made.render)
    for view in range(count):
        others = np.delete(np.arange(count), view)
        centres = scene.cameras.world_from_cam[:, :3, 3]
        order = np.argsort(np.linalg.norm(centres[others] - centres[view], axis=-1))
        inputs, target = scene.cameras[others[order[:2]]], scene.cameras[[view]]
        context = Views(scene.images(others[order[:2]]), inputs)
        context, cameras = jax.tree.map(lambda x: jnp.asarray(x)[None], (context, target))
        image = np.asarray(render(variables, context, cameras).images[0, 0])
        scores.append(evaluate.scores(image, scene.images([view])[0], protocol)["psnr"])
    return scores


@pytest.mark.slow
def test_tiny_beats_the_nearest_view(tmp_path):
    """What `configs/lvsm.py:tiny` shows on held-out scenes; about ten minutes on two cores."""
    config = lvsm_config.get_config("tiny")
    made = task.make(config)
    state = run(config, tmp_path)
    held_out = sources.held_out(config)
    scenes = [(str(i), held_out[i]) for i in range(len(held_out))]
    protocol = evaluate.Protocol(num_inputs=config.data.num_context)
    result = evaluate.evaluate(made, training_step.variables(state), scenes, protocol)
    assert result.mean(evaluate.MODEL, "psnr") > result.mean("nearest_view", "psnr")
