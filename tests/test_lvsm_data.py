"""What LVSM asks of the training pipeline: numbers of inputs by step, short clips, kept scenes."""

import itertools

import numpy as np
import pytest
from ml_collections import ConfigDict

from nvs_common import cameras
from nvs_common.data import pipeline, procedural, samples, sources, views
from nvs_common.errors import InputError
from nvs_common.types import Cameras


def config(**data):
    fields = dict(
        hold_out_every=8, source="procedural", height=16, width=16, num_context=4, num_target=2
    )
    fields |= dict(choice="random", num_scenes=6, views_per_scene=8, workers=0)
    return ConfigDict(dict(seed=3, batch_size=2, data={**fields, **data}))


class Clip:
    """A clip of n frames, each of which shows its number."""

    source, bounds = "clip", ""

    def __init__(self, n):
        pose = np.tile(np.eye(4), (n, 1, 1))
        pose[:, 0, 3] = np.arange(n)
        self.cameras = Cameras(pose, np.ones((n, 4)), np.ones(n), np.full(n, 5.0), 4, 4)
        self.names = tuple(map(str, range(n)))

    def images(self, indices):
        return np.ones((len(indices), 4, 4, 3), np.float32) * np.reshape(indices, (-1, 1, 1, 1))


def sizes(c, count, start=0):
    batches = pipeline.training_batches(c)
    batches.set_state({"step": start})
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


@pytest.mark.thorough
def test_the_number_of_inputs_is_a_function_of_the_step():
    c = config(min_context=2)
    whole = sizes(c, 12)
    counts = [batch.context.images.shape[1] for batch in whole]
    assert set(counts) == {2, 3, 4}
    for batch, count in zip(whole, counts, strict=True):
        assert batch.context.cameras.near.shape == (2, count)
        assert batch.target.images.shape[1] == 2
    resumed = sizes(c, 4, start=8)
    for a, b in zip(whole[8:], resumed, strict=True):
        np.testing.assert_array_equal(a.context.images, b.context.images)


def test_fewer_inputs_are_the_first_of_all():
    for few, all_of_them in zip(sizes(config(min_context=2), 5), sizes(config(), 5), strict=True):
        count = few.context.images.shape[1]
        np.testing.assert_array_equal(few.context.images, all_of_them.context.images[:, :count])
        np.testing.assert_array_equal(few.target.images, all_of_them.target.images)


CROPS = ((16, 16), (8, 16), (16, 12))


@pytest.mark.thorough
def test_the_size_of_images_is_a_function_of_the_step_and_rays_stay():
    c = config(crops=CROPS, min_context=2)
    whole, plain = sizes(c, 12), sizes(config(), 12)
    found = {(batch.target.cameras.height, batch.target.cameras.width) for batch in whole}
    assert found == set(CROPS)
    for cut, full in zip(whole, plain, strict=True):
        height, width = cut.target.cameras.height, cut.target.cameras.width
        assert cut.context.images.shape[2:] == cut.target.images.shape[2:] == (height, width, 3)
        top, left = (16 - height) // 2, (16 - width) // 2
        inner = full.target.images[..., top : top + height, left : left + width, :]
        np.testing.assert_array_equal(cut.target.images, inner)
        of_cut, of_full = (cameras.rays(part.target.cameras)[1] for part in (cut, full))
        inner = of_full[..., top : top + height, left : left + width, :]
        np.testing.assert_allclose(of_cut, inner, atol=1e-6)
    resumed = sizes(c, 4, start=8)
    for a, b in zip(whole[8:], resumed, strict=True):
        np.testing.assert_array_equal(a.context.images, b.context.images)


def test_depth_is_cropped_with_its_images():
    (batch,) = sizes(config(crops=((8, 12),), with_depth=True), 1)
    (full,) = sizes(config(with_depth=True), 1)
    np.testing.assert_array_equal(batch.extras["depth"], full.extras["depth"][..., 4:12, 2:14])


@pytest.mark.parametrize("crops, says", [(((8, 32),), "8 x 32.*16 x 16"), (((8,),), "pairs")])
def test_an_impossible_crop_is_explained(crops, says):
    with pytest.raises(InputError, match=says):
        pipeline.training_batches(config(crops=crops))


@pytest.mark.parametrize("choice", ["nearest_random", "window"])
def test_all_drawn_views_define_the_frame(choice):
    c = config(choice=choice, nearest=5, min_distance=5, targets_may_be_context=True)
    (batch,) = sizes(c, 1)
    drawn = batch.extras["drawn_poses"]
    assert drawn.shape == (2, 6, 4, 4)
    for scene in range(2):
        rows = {row.tobytes() for row in drawn[scene]}
        assert len(rows) == 6
        for part in (batch.context, batch.target):
            assert {row.tobytes() for row in part.cameras.world_from_cam[scene]} <= rows
    (apart,) = sizes(config(choice=choice, nearest=5, min_distance=5), 1)
    assert "drawn_poses" not in apart.extras


@pytest.mark.parametrize("choice, least", [("random", 5), ("window", 1)])
def test_an_impossible_number_of_inputs_is_explained(choice, least):
    with pytest.raises(InputError, match=f"data.min_context={least}.*data.num_context=4"):
        samples.Sampler(num_context=4, num_target=2, choice=choice, min_context=least)


def test_clips_that_are_too_short_are_left_out_where_asked():
    folder = sources.FolderScenes(tuple(map(Clip, (30, 20, 27))), {})
    c = config(choice="window", num_context=2, min_distance=25, max_distance=192)
    c.data.hold_out_every = 0
    with pytest.raises(InputError, match="20 views.*data.min_distance=25"):
        pipeline.training_batches(c, source=folder)
    c.data.skip_short_scenes = True
    batches = pipeline.training_batches(c, source=folder)
    for batch in itertools.islice(batches, 8):
        first, last = batch.context.images[:, :, 0, 0, 0].T
        assert (last - first >= 25).all()
        targets = batch.target.images[..., 0, 0, 0]
        assert (targets > first[:, None]).all() and (targets < last[:, None]).all()
    batches.close()
    with pytest.raises(InputError, match="20 views"):
        pipeline.training_batches(c, source=sources.FolderScenes((Clip(20),), {}))


def test_window_views_are_a_function_of_the_generator():
    a, b = (
        views.window(
            90,
            np.random.default_rng(5),
            num_context=3,
            num_target=4,
            min_distance=9,
            max_distance=50,
        )
        for _ in range(2)
    )
    assert a.context.tolist() == b.context.tolist() and a.target.tolist() == b.target.tolist()


def test_kept_scenes_render_once(monkeypatch):
    rendered = []
    render = procedural.ProceduralScene.images

    def counted(self, indices):
        rendered.extend(indices)
        return render(self, indices)

    monkeypatch.setattr(procedural.ProceduralScene, "images", counted)
    plain, kept = sizes(config(), 9), sizes(config(keep_in_memory=True), 9)
    for a, b in zip(plain, kept, strict=True):
        np.testing.assert_array_equal(a.target.images, b.target.images)
        np.testing.assert_array_equal(a.context.images, b.context.images)
    source = sources.make_source(config(keep_in_memory=True))
    del rendered[:]
    scene = source[1]
    first = scene.images([3, 0])
    np.testing.assert_array_equal(source[1].images([0, 2, 3])[[2, 0]], first)
    assert sorted(rendered) == [0, 2, 3]
