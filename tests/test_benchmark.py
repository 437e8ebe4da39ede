"""The studies of launch/benchmark.py: rows survive a crash, views are enough, floors are floors."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from configs import quark as quark_config
from launch import ablation, input_counts, measuring, path_flicker, trained
from nvs_common.data import sources
from nvs_common.errors import InputError
from nvs_common.types import Aux, Render, Task
from tests import small_quark


def _render(variables, context, targets):
    """The mean of the inputs; its depth is the far plane."""
    mean = jnp.mean(context.images, axis=1, keepdims=True) + variables["bias"]
    images = jnp.broadcast_to(mean, (*targets.far.shape, *mean.shape[2:]))
    return Render(images, jnp.broadcast_to(targets.far[..., None, None], images.shape[:-1]))


def model(config, render=_render) -> trained.Trained:
    task = Task(lambda key, batch: {}, lambda v, b, k: (jnp.zeros(()), Aux({})), render, {})
    variables = {"bias": np.zeros((), np.float32)}
    return trained.Trained(config, task, variables, 7, pathlib.Path("toy"), {})


def held_out(config):
    source = sources.held_out(config)
    return [(f"procedural {i}", source[i]) for i in range(len(source))]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_variant_that_crashes_loses_no_other_row(monkeypatch, capsys):
    def measure(config, scenes, repeats, devices):
        assert config.num_steps == 6 and config.optim.warmup_steps == 3
        if not config.model.ray_encoding:
            raise MemoryError("too | large")
        sweep = config.model.sweep_planes > 0
        return ablation.Measured(20.0 + sweep, 0.5, 0.1, 0.2 if sweep else 0.1)

    monkeypatch.setattr(ablation, "measure", measure)
    # Other tests' programs are of use to them.
    monkeypatch.setattr(ablation.jax, "clear_caches", lambda: None)
    config = small_quark.config()
    before = config.to_json()
    names = ["no_ray_encoding", "no_sweep", "rgb"]
    lines = ablation.study(config, 6, variants=names)
    rows = {row[0]: row for row in map(cells, lines[4:8])}
    assert list(rows) == ["full", "no_ray_encoding", "no_sweep (ours)", "rgb"]
    assert rows["no_ray_encoding"][1] == "failed: MemoryError: too / large"
    assert rows["no_sweep (ours)"][3:7] == ["-1.00", "0.100", "100.0", "-50.0 %"]
    assert rows["rgb"][7:] == ["-1.23", "-4.56 %"]
    assert all(len(row) == len(ablation.HEAD) for row in rows.values())
    # What was measured is on stderr before the end, and the config is as it was.
    assert "| no_sweep (ours) | 20.00 |" in capsys.readouterr().err
    assert config.to_json() == before


def test_what_the_full_model_refuses_is_an_error_and_not_a_row(monkeypatch):
    def measure(*_):
        raise InputError("batch_size")

    monkeypatch.setattr(ablation, "measure", measure)
    with pytest.raises(InputError, match="batch_size"):
        ablation.study(small_quark.config(), 1)
    with pytest.raises(InputError, match="no_such"):
        ablation.study(small_quark.config(), 1, variants=["no_such"])


def test_the_published_table_is_of_variants_there_are():
    assert {*ablation.PUBLISHED, *ablation.OURS, "unfolded"} == set(quark_config.ABLATIONS)


@pytest.mark.parametrize("count", [1, 4, 7, 8, 64])
def test_scenes_have_enough_views_for_the_largest_count(count):
    config = input_counts.with_views(small_quark.config(), count)
    num_views = config.data.views_per_scene
    assert num_views - len(range(0, num_views, 8)) >= count


def test_counts_that_a_scene_does_not_have_are_remarked():
    config = small_quark.config()
    lines = input_counts.study(model(config), held_out(config), [2, 4, 32], repeats=1)
    assert "trained with 3 inputs" in lines[0]
    rows = [cells(line) for line in lines[4:6]]
    assert [row[:2] for row in rows] == [["2", "1"], ["4", "1"]]
    assert all(float(row[2]) > 5 for row in rows)
    assert lines[-1].startswith("32 inputs: left out are procedural 0 (5)")
    with pytest.raises(InputError, match="no scene has views"):
        input_counts.study(model(config), held_out(config), [64])


def test_the_truth_flickers_less_than_a_mean_of_switching_inputs():
    config = small_quark.config()
    config.data.update(height=32, width=56)
    lines = path_flicker.study([model(config)] * 2, held_out(config), "interpolate", 12, 2)
    first, first_true, second, _, floor = (cells(line) for line in lines[4:9])
    assert first == second and first[1] == "its own" and first_true[1] == "true"
    assert first_true[4] == floor[4]  # the same pixels
    assert 0 < float(floor[2]) < float(first_true[2])
    assert int(floor[5].split()[0]) > 0 and floor[5].endswith("of 11")
    # Elsewhere the mean of the same inputs is the same picture, seen from elsewhere.
    assert float(first_true[6]) > float(first_true[7])


def test_a_model_without_depth_is_refused():
    config = small_quark.config()
    flat = model(config, lambda v, c, t: Render(_render(v, c, t).images))
    with pytest.raises(InputError, match="no depth"):
        path_flicker.study([flat], held_out(config), "spiral", 3, 2)


def test_a_kept_scene_makes_each_image_once():
    scene = held_out(small_quark.config())[0][1]
    calls = []

    class Counting:
        cameras, names, source = scene.cameras, scene.names, "here"

        def images(self, indices):
            calls.append(list(indices))
            return scene.images(indices)

    kept = measuring.Kept(Counting())
    found = kept.images(np.array([2, 0, 2]))
    np.testing.assert_array_equal(found, scene.images([2, 0, 2]))
    kept.images([0, 1])
    assert calls == [[0, 2], [1]]


@pytest.mark.thorough
def test_other_models_are_loaded_from_folders(tmp_path):
    config = small_quark.config()
    small_quark.save_run(tmp_path / "run", config)
    found = trained.load_path(str(tmp_path / "run"), ["data.num_context=2"])
    assert found.step == 5 and found.config.data.num_context == 2
    with pytest.raises(InputError):
        trained.load_path(str(tmp_path / "nothing.npz"))


def test_the_program_names_its_benchmarks_and_refuses_bad_flags(program):
    benchmark = program("benchmark")
    operations = {"nearest_code", "one_to_many", "compositing", "epipolar", "attention"}
    quark = {"quark", "quark_ablation", "quark_views", "quark_temporal"}
    others = {"depth_decoder", "lvsm", "vqnerf", "vqnerf_ablation"}
    assert set(benchmark.BENCHMARKS) == operations | quark | others
    with pytest.raises(InputError, match="name one benchmark"):
        benchmark.main(["benchmark.py", "nothing"])
    with pytest.raises(InputError, match="exactly one"):
        benchmark.main(["benchmark.py", "quark_views"])
