"""Where scenes come from: the text that names sources, held-out scenes, bad scenes."""

import json
import pathlib

import ml_collections
import numpy as np
import pytest
from PIL import Image

from nvs_common.data import procedural, sources
from nvs_common.errors import InputError


def world_config(**data):
    data = dict(height=8, width=12, num_scenes=4, views_per_scene=6) | data
    return ml_collections.ConfigDict(dict(seed=5, data=data, eval=dict(num_scenes=3)))


def test_the_procedural_world_is_evaluated_on_scenes_no_run_trains_on():
    training = sources.make_source(world_config(source="procedural"))
    held_out = sources.held_out(world_config(source="procedural"))
    assert (len(training), len(held_out)) == (4, 3)
    assert training[0].cameras.height == 8 and len(training[0].names) == 6
    seen = [training[i].images([0])[0] for i in range(4)]
    for index in range(3):
        image = held_out[index].images([0])[0]
        assert not any(np.array_equal(image, other) for other in seen)
    with pytest.raises(InputError, match=f"seed={sources.HELD_OUT_SEED}"):
        config = world_config(source="procedural")
        config.seed = sources.HELD_OUT_SEED
        sources.make_source(config)


def test_evaluation_may_have_cameras_of_its_own():
    config = world_config(source="procedural", baseline=(0.3, 0.4), rigs=("walk",))
    same = sources.held_out(config)
    assert (same.baseline, same.rigs) == ((0.3, 0.4), ("walk",))
    config.eval.update(baseline=(0.01, 0.02), rigs=("arc",))
    training, own = sources.make_source(config), sources.held_out(config)
    assert (training.baseline, training.rigs) == ((0.3, 0.4), ("walk",))
    assert (own.baseline, own.rigs) == ((0.01, 0.02), ("arc",))


def test_source_text_is_one_name_or_weighted_names(tmp_path):
    assert sources.parse("procedural") == [("procedural", 1.0)]
    assert sources.parse("procedural:0.5, /a:1.5") == [("procedural", 0.5), ("/a", 1.5)]
    odd = tmp_path / "a,b:2"
    odd.mkdir()
    assert sources.parse(str(odd)) == [(str(odd), 1.0)]
    for bad in ("procedural,/a", "procedural:0.5,/a:-1", "procedural:0.5,", "/a:x,/b:1"):
        with pytest.raises(InputError, match="NAME:WEIGHT"):
            sources.parse(bad)


def test_a_mixture_is_made_from_its_text(tmp_path):
    write_scene(tmp_path / "room")
    source = sources.make_source(world_config(source=f"procedural:0.5,{tmp_path}:0.5"))
    assert source.weights == (0.5, 0.5) and len(source) == 5
    assert isinstance(source.parts[0], procedural.World)
    assert source[4].images([1]).shape == (1, 8, 12, 3)


def write_scene(folder, *, frames=9, broken=False):
    """A nerfstudio scene of plain images."""
    folder.mkdir(parents=True)
    listed = []
    for i in range(frames):
        Image.new("RGB", (24, 16), (10 * i, 0, 0)).save(folder / f"{i}.png")
        pose = np.eye(4)
        pose[0, 3] = i
        listed.append({"file_path": f"{i}.png", "transform_matrix": pose.tolist()})
    fields = dict(fl_x=20.0, fl_y=20.0, cx=12.0, cy=8.0, w=24, h=16, frames=listed)
    (folder / "transforms.json").write_text("{" if broken else json.dumps(fields))


def test_bad_scenes_are_skipped_and_named_up_to_the_limit(tmp_path):
    for name in ("a", "b", "c"):
        write_scene(tmp_path / name, broken=name == "b")
    options = world_config(source=str(tmp_path), max_bad_scenes=1)
    source = sources.make_source(options)
    assert len(source) == 2
    assert [pathlib.Path(path).name for path in source.skipped] == ["b"]
    options.data.max_bad_scenes = 0
    with pytest.raises(InputError, match="/b"):
        sources.make_source(options)


def test_an_evaluation_skips_no_scene(tmp_path):
    write_scene(tmp_path / "a")
    write_scene(tmp_path / "b", broken=True)
    with pytest.raises(InputError, match="/b"):
        sources.held_out(world_config(source=str(tmp_path), max_bad_scenes=9))
