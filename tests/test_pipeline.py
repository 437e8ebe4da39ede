"""The data pipeline: order a function of (seed, step), whatever the hosts, workers and restarts."""

import collections
import json
import multiprocessing
import os
import pathlib
import sys

import cloudpickle
import grain
import jax
import ml_collections
import numpy as np
import pytest

from nvs_common.data import pipeline, samples, sources
from nvs_common.errors import InputError
from nvs_common.types import Cameras

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Workers cannot import this file, so its classes travel to them whole.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

VIEWS, HEIGHT, WIDTH = 20, 6, 8


class Scene:
    """Camera i stands at (scene, i, 0) and its image is the constant scene + i / 100."""

    def __init__(self, index, reads=None, broken=False):
        poses = np.tile(np.eye(4), (VIEWS, 1, 1))
        poses[:, 0, 3] = index
        poses[:, 1, 3] = np.arange(VIEWS)
        ones = np.ones(VIEWS)
        self.cameras = Cameras(poses, np.ones((VIEWS, 4)), ones, 5 * ones, HEIGHT, WIDTH)
        self.names = tuple(f"{i:03}.png" for i in range(VIEWS))
        self.source = f"/data/scene_{index}"
        self.index, self.reads, self.broken = index, reads, broken

    def images(self, indices):
        if self.broken:
            raise InputError(f"{self.source}/{self.names[indices[0]]} is not an image.")
        if self.reads is not None:
            self.reads.append(np.array(indices))
        return self.constant(indices)[..., None].repeat(3, axis=-1)

    def depths(self, indices):
        return 10 + self.constant(indices)

    def constant(self, indices):
        value = (self.index + np.asarray(indices) / 100).astype(np.float32)
        return np.tile(value[:, None, None], (1, HEIGHT, WIDTH))


class Source:
    def __init__(self, num_scenes=10, broken=(), reads=None):
        self.num_scenes, self.broken, self.reads = num_scenes, broken, reads

    def __len__(self):
        return self.num_scenes

    def __getitem__(self, index):
        return Scene(index, self.reads, index in self.broken)


def config(**data):
    fields = dict(workers=0, num_context=3, num_target=2, nearest=6) | data
    return ml_collections.ConfigDict(
        dict(seed=fields.pop("seed", 1), batch_size=fields.pop("batch_size", 4), data=fields)
    )


def hosts(num_hosts, **kwargs):
    """One iterator a host."""
    return [
        pipeline.training_batches(
            config(**kwargs), source=Source(), shard=grain.sharding.ShardOptions(i, num_hosts)
        )
        for i in range(num_hosts)
    ]


def take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def values(batch):
    return np.concatenate([batch.context.images, batch.target.images], axis=1)[..., 0, 0, 0]


def assert_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def golden():
    """Twelve batches of one host without workers; what everything else has to equal."""
    return take(pipeline.training_batches(config(with_depth=True), source=Source()), 12)


def test_a_batch_holds_float32_views_with_the_cameras_they_were_taken_with(golden):
    batch = golden[0]
    assert batch.context.images.shape == (4, 3, HEIGHT, WIDTH, 3)
    assert batch.target.images.shape == (4, 2, HEIGHT, WIDTH, 3)
    assert batch.target.cameras.world_from_cam.shape == (4, 2, 4, 4)
    assert (batch.context.cameras.height, batch.context.cameras.width) == (HEIGHT, WIDTH)
    assert {leaf.dtype for leaf in jax.tree.leaves(batch)} == {np.dtype(np.float32)}
    for part in (batch.context, batch.target):
        centers = part.cameras.world_from_cam[..., :3, 3]
        expected = centers[..., 0] + centers[..., 1] / 100
        np.testing.assert_allclose(part.images[..., 0, 0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(batch.extras["depth"], 10 + batch.target.images[..., 0], atol=1e-6)


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(golden):
    again = take(pipeline.training_batches(config(with_depth=True), source=Source()), 12)
    for first, second in zip(golden, again, strict=True):
        assert_equal(first, second)
    other = take(pipeline.training_batches(config(seed=2), source=Source()), 12)
    assert not np.array_equal(values(golden[0]), values(other[0]))


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_row_of_the_global_batch_is_local_row_times_hosts_plus_host(golden, num_hosts):
    shares = [take(iterator, 12) for iterator in hosts(num_hosts)]
    for step, whole in enumerate(golden):
        rows = np.stack([values(share[step]) for share in shares], axis=1)
        np.testing.assert_array_equal(rows.reshape(values(whole).shape), values(whole))


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_every_scene_comes_once_in_an_epoch(num_hosts):
    shares = [take(iterator, 5) for iterator in hosts(num_hosts)]
    rows = np.stack([[values(b)[:, 0] for b in share] for share in shares], axis=2)
    drawn = np.floor(rows.reshape(-1)).astype(int)
    assert len(drawn) == 20
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert list(drawn[:10]) != list(drawn[10:])


def test_the_order_of_a_seed_does_not_change_with_versions(golden):
    # A run that is resumed under another Grain or NumPy has to go on in the same order: the
    # scenes of the first epoch, and the views of the first sample, drawn with seed 1.
    drawn = np.concatenate([values(batch) for batch in golden])
    assert np.floor(drawn[:10, 0]).astype(int).tolist() == [0, 5, 7, 3, 2, 6, 1, 8, 4, 9]
    assert np.round(drawn[0] % 1 * 100).astype(int).tolist() == [3, 5, 7, 1, 4]


def test_views_differ_between_epochs_of_a_scene(golden):
    rows = np.concatenate([values(batch) for batch in golden])
    first = rows[np.floor(rows[:, 0]) == 3]
    assert len(first) >= 4
    assert len(np.unique(first, axis=0)) == len(first)


def test_the_state_is_the_step_and_resuming_equals_going_on(golden):
    iterator = pipeline.training_batches(config(with_depth=True), source=Source())
    assert iterator.get_state() == {"step": 0}
    for _ in range(5):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    assert state == {"step": 5}
    resumed = pipeline.training_batches(config(with_depth=True), source=Source())
    resumed.set_state(state)
    for expected in golden[5:]:
        assert_equal(next(resumed), expected)
    resumed.set_state({"step": 2})
    assert_equal(next(resumed), golden[2])
    assert resumed.get_state() == {"step": 3}
    resumed.close()


def test_resuming_far_into_training_reads_nothing_before_it():
    reads = []
    iterator = pipeline.training_batches(config(), source=Source(reads=reads))
    iterator.set_state({"step": 10**9})
    next(iterator)
    iterator.close()
    # The batch, those prefetched behind it, and those threads were at when it was closed.
    assert len(reads) <= 2 * 4 * 6


def test_a_foreign_state_is_refused():
    iterator = pipeline.training_batches(config(), source=Source())
    with pytest.raises(InputError, match=r"next_index.*'step': n"):
        iterator.set_state({"next_index": 3})


def test_only_the_sampled_views_are_read():
    reads = []
    source = Source(reads=reads)
    chain = pipeline.sample_sequence(source, samples.Sampler(3, 2, nearest=6), seed=1)
    assert reads == []
    sample = chain[0]
    assert [len(indices) for indices in reads] == [3, 2]
    drawn = [part.cameras.world_from_cam[:, 1, 3] for part in (sample.context, sample.target)]
    np.testing.assert_array_equal(np.concatenate(reads), np.concatenate(drawn))


class Probe(Scene):
    """Reports its process through its pixels."""

    def images(self, indices):
        import jax._src.xla_bridge

        reported = [
            len(jax._src.xla_bridge._backends),
            float(os.environ["JAX_PLATFORMS"] == "cpu"),
            float(os.environ["OMP_NUM_THREADS"]),
            float(os.getpid() % 2**16),
        ]
        images = super().images(indices)
        images[:, 0, :4, 0] = reported
        return images


class Probes(Source):
    def __getitem__(self, index):
        if index in self.broken:
            return Scene(index, broken=True)
        return Probe(index)


def test_workers_change_nothing_and_never_start_a_jax_backend(golden, monkeypatch):
    # What a GPU host sets, or leaves unset, must not reach the workers.
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    iterator = pipeline.training_batches(config(with_depth=True, workers=2), source=Probes())
    iterator.set_state({"step": 3})
    batches = [next(iterator) for _ in range(6)]
    assert iterator.get_state() == {"step": 9}
    iterator.close()
    assert os.environ["JAX_PLATFORMS"] == "cuda"
    processes = set()
    for batch, expected in zip(batches, golden[3:9], strict=True):
        assert type(batch.context.images) is np.ndarray
        reported = batch.context.images[..., 0, :4, 0].reshape(-1, 4)
        assert np.unique(reported[:, :3], axis=0).tolist() == [[0, 1, 1]]
        processes |= set(reported[:, 3].tolist())
        for part, same in ((batch.context, expected.context), (batch.target, expected.target)):
            part.images[..., 0, :, 0] = part.images[..., 1, :, 0]
            assert_equal(part, same)
        assert_equal(batch.extras, expected.extras)
    assert len(processes) == 2 and os.getpid() % 2**16 not in processes


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_names_the_scene(workers):
    iterator = pipeline.training_batches(
        config(workers=workers), source=Probes(num_scenes=3, broken={0, 1, 2})
    )
    with pytest.raises(InputError, match=r"/data/scene_\d/0\d\d.png is not an image"):
        next(iterator)
    iterator.close()


def test_unreadable_scenes_are_replaced_up_to_the_limit_and_change_no_other_row(golden):
    source = Source(broken={4, 5})
    batches = take(pipeline.training_batches(config(max_bad_scenes=2), source=source), 12)
    replaced = 0
    for batch, whole in zip(batches, golden, strict=True):
        for row, expected in zip(values(batch), values(whole), strict=True):
            if int(expected[0]) in (4, 5):
                assert int(row[0]) == 6
                replaced += 1
            else:
                np.testing.assert_array_equal(row, expected)
    assert replaced >= 8
    with pytest.raises(InputError, match=r"scene_[45]"):
        take(pipeline.training_batches(config(max_bad_scenes=1), source=source), 12)


def test_other_errors_carry_the_scene_in_a_note():
    class Failing(Scene):
        def images(self, indices):
            raise OSError("disk gone")

    class FailingSource(Source):
        def __getitem__(self, index):
            return Failing(index)

    with pytest.raises(OSError) as caught:
        take(pipeline.training_batches(config(), source=FailingSource()), 1)
    assert any("of scene /data/scene_" in note for note in caught.value.__notes__)


def test_a_folder_keeps_every_eighth_view_for_evaluation():
    folder = sources.FolderScenes(tuple(Scene(i) for i in range(10)), {})
    batches = take(pipeline.training_batches(config(hold_out_every=4), source=folder), 20)
    drawn = {int(round(v % 1 * 100)) for batch in batches for v in values(batch).reshape(-1)}
    assert drawn == {i for i in range(VIEWS) if i % 4}


def test_a_mixture_gives_each_source_its_share():
    class Shifted(Source):
        def __getitem__(self, index):
            return Scene(100 + index)

    mixture = sources.Mixture((Source(3), Shifted(7)), (0.75, 0.25))
    assert len(mixture) == 10 and mixture[3].index == 100
    batches = take(pipeline.training_batches(config(), source=mixture), 20)
    drawn = np.concatenate([values(batch)[:, 0] for batch in batches])
    assert np.sum(drawn >= 100) == 20
    assert len(np.unique(drawn[drawn >= 100] // 1)) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch_size=3), "batch_size=3 does not divide among 2 processes"),
        (dict(workers=-1), "data.workers=-1"),
        (dict(choice="closest"), "data.choice='closest'"),
        (dict(num_target=0), "data.num_target=0"),
        (dict(crops=(3, 3)), r"data.crops=.*expected pairs"),
        (dict(num_context=19), "scene /data/scene_0 offers 20 views.* 21 are asked for"),
    ],
)
def test_bad_options_are_named_before_training(changes, message):
    shard = grain.sharding.ShardOptions(0, 2)
    with pytest.raises(InputError, match=message):
        pipeline.training_batches(config(**changes), source=Source(), shard=shard)


def test_little_shared_memory_falls_back_to_threads_with_a_warning(golden, monkeypatch, caplog):
    free = collections.namedtuple("Usage", "free")(10_000)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(pipeline, "_SHARED_MEMORY", str(ROOT))
    iterator = pipeline.training_batches(config(with_depth=True, workers=2), source=Source())
    assert_equal(take(iterator, 1)[0], golden[0])
    assert not multiprocessing.active_children()
    assert "2 data workers need" in caplog.text and "--shm-size" in caplog.text
