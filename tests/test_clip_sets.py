"""RealEstate10K as it is distributed: pixelSplat's chunks, LVSM's folders, tens of thousands of
clips; in training and in evaluation."""

import itertools
import json
import pickle
from typing import Any

import ml_collections
import numpy as np
import pytest

from nvs_common import index_evaluation
from nvs_common.data import chunks, eval_index, images, pipeline, scene_files, scenes, sources
from nvs_common.errors import InputError
from tests import clip_writers
from tests import scene_writers as writers


@pytest.mark.parametrize("index", [True, False])
def test_clips_of_chunks_are_found_and_loaded(tmp_path, index):
    root = clip_writers.write_split(tmp_path / "test", index=index)
    places = ("000000.torch/0a1", "000000.torch/0b2", "000001.torch/0c3")
    expected = [root / place for place in places]
    assert scenes.find_scenes(root) == expected
    assert scenes.find_scenes(root / "000000.torch") == [expected[1], expected[0]]
    assert scenes.find_scenes(expected[1]) == [expected[1]]
    for seed, path in enumerate(expected):
        truth, scene = clip_writers.rig(seed), scenes.load_scene(path)
        # Rows are stored in float32.
        np.testing.assert_allclose(scene.cameras.world_from_cam, truth.poses, atol=1e-5)
        wanted = np.tile(truth.intrinsics, (clip_writers.COUNT, 1))
        np.testing.assert_allclose(scene.cameras.intrinsics, wanted, rtol=1e-6)
        assert scene.names == tuple(f"{i:05d}" for i in range(clip_writers.COUNT))
        decoded = pickle.loads(pickle.dumps(scene)).images([4, 2])
        assert np.abs(decoded - truth.images[[4, 2]] / 255).mean() < 0.01
        assert (scene.source, scene.cameras.near[0]) == ("RealEstate10K", 1)
    assert len(scenes.load_scene(root / "000001.torch")) == clip_writers.COUNT  # the only one
    with pytest.raises(InputError, match="holds splits .test.; name one"):
        scenes.find_scenes(tmp_path)


def test_only_what_is_asked_for_is_read_and_few_descriptions_are_kept(tmp_path, monkeypatch):
    sizes = []
    read = scene_files.read_packed
    monkeypatch.setattr(
        scene_files, "read_packed", lambda p, where: sizes.append(p.size) or read(p, where)
    )
    for number in range(9):
        clip_writers.save(tmp_path / f"{number}.torch", clip_writers.clips())
    for path in scenes.find_scenes(tmp_path / "0.torch"):
        scene = scenes.load_scene(path, check="first")
    lengths = [len(image) for image in clip_writers.clips()[2]["images"]]
    camera_bytes = clip_writers.COUNT * 18 * 4
    assert len(sizes) == 6 and sizes[-2:] == [camera_bytes, lengths[0]]
    sizes.clear()
    scene.images([3, 5])
    assert sizes == [lengths[3], lengths[5]]
    for number in range(9):
        chunks.keys(tmp_path / f"{number}.torch")
    assert chunks._described.cache_info().currsize == chunks._KEPT
    # Another file of the same name is read anew.
    clip_writers.save(tmp_path / "8.torch", clip_writers.clips()[:1])
    assert chunks.keys(tmp_path / "8.torch") == clip_writers.KEYS[:1]


def test_lvsm_folders_are_found_and_loaded(tmp_path):
    for seed, key in enumerate(clip_writers.KEYS):
        writers.write_lvsm(clip_writers.rig(seed), tmp_path, key)
    expected = [tmp_path / "metadata" / f"{key}.json" for key in clip_writers.KEYS]
    assert scenes.find_scenes(tmp_path) == expected
    assert scenes.find_scenes(tmp_path / "full_list.txt") == expected
    scene = scenes.load_scene(expected[1])
    np.testing.assert_allclose(scene.cameras.world_from_cam, clip_writers.rig(1).poses, atol=1e-9)
    (tmp_path / "full_list.txt").write_text("C:\\out\\metadata\\0b2.json\n\n")
    assert scenes.find_scenes(tmp_path) == expected[1:2]
    (tmp_path / "full_list.txt").unlink()
    assert scenes.find_scenes(tmp_path) == expected


def test_frames_of_lvsm_keep_the_order_of_the_file(tmp_path):
    path = writers.write_lvsm(clip_writers.rig(0), tmp_path)
    content = json.loads(path.read_text())
    content["frames"].reverse()
    path.write_text(json.dumps(content))
    assert scenes.load_scene(path).names == tuple(clip_writers.rig(0).names[::-1])


def test_an_index_gives_the_same_views_of_every_layout(tmp_path):
    clip_writers.write_all(tmp_path)
    entry = {"context": [5, 0], "target": [1, 5, 3]}
    (tmp_path / "i.json").write_text(json.dumps({"0b2": entry, "gone": entry, "none": None}))
    index = eval_index.read(tmp_path / "i.json")
    protocol = index_evaluation.Protocol(8, 4)
    batches = []
    for layout in ("text", "lvsm", "chunks"):
        found = eval_index.find(tmp_path / layout, index.choices)
        assert found.missing == ("gone",)
        path, choice = found.paths["0b2"], index.choices["0b2"]
        batch, (inputs, targets) = index_evaluation.load("0b2", path, choice, protocol)
        assert [int(n[-9:-4]) if "." in n else int(n) for n in (*inputs, *targets)] in (
            [105, 100, 101, 105, 103],
            [5, 0, 1, 5, 3],
        )
        batches.append(batch)
    for batch in batches[1:]:
        for part, same in ((batch.context, batches[0].context), (batch.target, batches[0].target)):
            assert part.images.shape[-3:] == (8, 8, 3)
            assert np.abs(part.images - same.images).mean() < 0.01
            for name in ("world_from_cam", "intrinsics", "near", "far"):
                values = (getattr(x.cameras, name) for x in (part, same))
                np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-5)


def training_config(source, **data) -> Any:
    views = dict(choice="window", num_context=2, num_target=2, min_distance=3, max_distance=5)
    views |= dict(targets_may_be_context=False, skip_short_scenes=True, hold_out_every=0)
    data = dict(source=str(source), height=8, width=8, num_scenes=1, workers=0) | views | data
    return ml_collections.ConfigDict(dict(seed=3, batch_size=2, data=data))


@pytest.fixture(params=["eager", "lazy"])
def loading(request, monkeypatch):
    if request.param == "lazy":
        monkeypatch.setattr(sources, "LOADED_AT_START", 1)
    return request.param


@pytest.mark.parametrize("layout", ["text", "lvsm", "chunks"])
def test_training_draws_stretches_of_every_layout(tmp_path, layout, loading):
    clip_writers.write_all(tmp_path)
    config = training_config(tmp_path / layout)
    source = sources.make_source(config)
    assert isinstance(source, sources.LazyScenes) == (loading == "lazy") and len(source) == 3
    batches = pipeline.training_batches(config, source=source)
    known = np.stack([clip_writers.rig(seed).poses for seed in range(3)])
    seen = set()
    for batch in itertools.islice(batches, 6):
        assert batch.context.images.shape == (2, 2, 8, 8, 3)
        poses = np.concatenate(
            [part.cameras.world_from_cam for part in (batch.context, batch.target)], axis=1
        )
        for row in poses:
            match = np.abs(known[None] - row[:, None, None]).max(axis=(-1, -2)) < 1e-4
            scene, frames = np.nonzero(match)[1:]
            first, last, *between = frames
            assert len(set(scene)) == 1 and 3 <= last - first <= 5
            assert all(first < frame < last for frame in between)
            seen.add(int(scene[0]))
    batches.close()
    assert seen == {0, 1, 2}


def test_a_large_folder_opens_one_image_at_the_start_and_the_drawn_ones_later(
    tmp_path, monkeypatch
):
    clip_writers.write_all(tmp_path)
    monkeypatch.setattr(sources, "LOADED_AT_START", 2)
    monkeypatch.setattr(sources, "KEPT_VIEWS", 2 * clip_writers.COUNT)
    opened = []
    open_image = images._open
    monkeypatch.setattr(
        images, "_open", lambda p, packed: opened.append(p) or open_image(p, packed)
    )
    source = sources.load_folder(str(tmp_path / "text"), size=(8, 8))
    assert len(opened) == 1
    source = pickle.loads(pickle.dumps(source))
    assert source[2] is source[2] and len(opened) == 2
    source[2].images([4])
    assert len(opened) == 3
    first = source[0]
    source[1]
    assert source[1] is source[1] and source[0] is first  # two scenes fit
    before = len(opened)
    source[2]
    assert len(opened) == before + 1  # the oldest was let go


def test_bad_clips_of_a_large_folder_are_counted_when_they_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LOADED_AT_START", 1)
    for seed, key in enumerate("abcdef"):
        writers.write_lvsm(
            clip_writers.rig(seed, count=3 if key == "b" else clip_writers.COUNT), tmp_path, key
        )
    (tmp_path / "metadata" / "a.json").write_text("{")
    (tmp_path / "metadata" / "d.json").write_text("{")
    for image in (tmp_path / "images" / "e").iterdir():
        image.write_bytes(image.read_bytes()[:60])
    config = training_config(tmp_path, max_bad_scenes=2)
    source = sources.make_source(config)
    assert [path[-6:] for path in source.skipped] == ["a.json"] and len(source) == 5
    batches = pipeline.training_batches(config, source=source)
    known = {seed: clip_writers.rig(seed).poses[:, :3, 3] for seed in (2, 5)}
    for batch in itertools.islice(batches, 8):
        for centre in batch.context.cameras.world_from_cam[:, 0, :3, 3]:
            assert min(np.abs(poses - centre).max(-1).min() for poses in known.values()) < 1e-4
    batches.close()
    config.data.max_bad_scenes = 1
    with pytest.raises(
        InputError, match=r"metadata/d.json: bad JSON|images/e/10\d.png: .*cut short"
    ):
        list(itertools.islice(pipeline.training_batches(config, source=source), 12))
    config.data.max_bad_scenes = 0
    with pytest.raises(InputError, match="metadata/a.json: bad JSON"):
        sources.make_source(config)


def test_a_large_folder_of_short_clips_is_explained_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LOADED_AT_START", 1)
    for key in "ab":
        writers.write_lvsm(clip_writers.rig(0, count=4), tmp_path, key)
    config = training_config(tmp_path, min_distance=5)
    with pytest.raises(InputError, match=r"metadata/a.json has 4 views.*data.min_distance=5"):
        pipeline.training_batches(config)
