"""View choice: which cameras are drawn, that targets stay hidden, and that errors name counts."""

import numpy as np
import pytest

from nvs_common.data import views
from nvs_common.errors import InputError
from nvs_common.types import Cameras


def on_a_line(n):
    """n cameras at x = 0, 1, 2, ...: camera i's neighbours are i - 1 and i + 1."""
    poses = np.tile(np.eye(4), (n, 1, 1))
    poses[:, 0, 3] = np.arange(n)
    return Cameras(poses, np.ones((n, 4)), np.ones(n), np.full(n, 5.0), 6, 8)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_nearest_are_sorted_by_distance_and_ties_keep_their_order():
    cameras = on_a_line(9)
    assert views.nearest(cameras, np.array([4.2, 0, 0]), 4).tolist() == [4, 5, 3, 6]
    assert views.nearest(cameras, np.array([4.0, 0, 0]), 3).tolist() == [4, 3, 5]


def test_nearest_leaves_out_what_is_not_allowed():
    allowed = np.array([0, 1, 6, 7])
    found = views.nearest(on_a_line(9), np.array([5.0, 0, 0]), 3, allowed=allowed)
    assert found.tolist() == [6, 7, 1]


def test_nearest_random_draws_the_context_from_the_pool_around_the_target():
    cameras = on_a_line(40)
    seen = set()
    for seed in range(200):
        choice = views.nearest_random(cameras, rng(seed), num_context=3, num_target=1, pool=4)
        offsets = choice.context - choice.target[0]
        if 2 <= choice.target[0] < 38:
            assert set(offsets.tolist()) <= {-2, -1, 1, 2}
            seen.add(tuple(offsets.tolist()))
    # 4 * 3 * 2 ordered draws of three of the four; the order is random, not by distance.
    assert len(seen) == 24


def test_nearest_random_draws_every_view_as_a_target():
    cameras = on_a_line(12)
    draws = [views.nearest_random(cameras, rng(s), num_context=2, pool=4) for s in range(300)]
    assert {int(draw.target[0]) for draw in draws} == set(range(12))


@pytest.mark.parametrize("num_target", [1, 2, 4])
def test_context_and_targets_are_different_views(num_target):
    cameras = on_a_line(12)
    for seed in range(50):
        for choice in (
            views.nearest_random(cameras, rng(seed), num_context=4, num_target=num_target, pool=5),
            views.random(12, rng(seed), num_context=4, num_target=num_target),
            views.window(
                12,
                rng(seed),
                num_context=4,
                num_target=num_target,
                min_distance=3,
                max_distance=11,
            ),
        ):
            assert (len(choice.context), len(choice.target)) == (4, num_target)
            assert len({*choice.context.tolist(), *choice.target.tolist()}) == 4 + num_target


def test_several_targets_are_near_each_other():
    cameras = on_a_line(100)
    for seed in range(50):
        choice = views.nearest_random(cameras, rng(seed), num_context=4, num_target=3, pool=6)
        together = np.concatenate([choice.context, choice.target])
        # The target and its 6 + 2 nearest on a line span at most 9 frames, at an end too.
        assert np.ptp(together) <= 8


def test_a_small_scene_offers_all_it_has():
    choice = views.nearest_random(on_a_line(5), rng(), num_context=4, num_target=1, pool=16)
    assert sorted([*choice.context, *choice.target]) == [0, 1, 2, 3, 4]


def test_the_same_generator_gives_the_same_choice_and_another_a_different_one():
    cameras = on_a_line(50)
    first, again, other = (
        views.nearest_random(cameras, rng(seed), num_context=8, pool=16) for seed in (3, 3, 4)
    )
    assert np.array_equal(first.context, again.context)
    assert np.array_equal(first.target, again.target)
    assert not np.array_equal(first.context, other.context)


def test_window_ends_are_context_and_its_length_is_within_the_range():
    lengths = set()
    for seed in range(300):
        choice = views.window(
            60, rng(seed), num_context=3, num_target=2, min_distance=10, max_distance=14
        )
        start, end, between = choice.context
        lengths.add(int(end - start))
        assert start < choice.target.min() <= choice.target.max() < end
        assert 0 <= start < between < end < 60
    assert lengths == {10, 11, 12, 13, 14}


def test_window_is_cut_to_a_short_video():
    choice = views.window(12, rng(), num_context=2, num_target=1, min_distance=5, max_distance=192)
    assert choice.context[1] - choice.context[0] <= 11


def test_window_targets_may_repeat_context_only_when_asked():
    counts = dict(num_context=2, num_target=2, min_distance=4, max_distance=6)
    repeats = 0
    for seed in range(50):
        choice = views.window(20, rng(seed), targets_may_be_context=True, **counts)
        repeats += bool(set(choice.target.tolist()) & set(choice.context.tolist()))
        assert len(set(choice.target.tolist())) == 2
    assert repeats > 10


def test_window_draws_six_of_its_eight_views_as_published():
    counts = np.zeros(3)
    for seed in range(400):
        choice = views.window(
            200,
            rng(seed),
            num_context=2,
            num_target=6,
            min_distance=25,
            max_distance=192,
            targets_may_be_context=True,
        )
        start, end = choice.context
        assert 25 <= end - start <= 192 and len(set(choice.target.tolist())) == 6
        assert start <= choice.target.min() and choice.target.max() <= end
        counts[np.isin(choice.context, choice.target).sum()] += 1
    # Hypergeometric: 6 of 8 views without replacement hold 1.5 of the two ends on average.
    np.testing.assert_allclose(counts / 400, [1 / 28, 12 / 28, 15 / 28], atol=0.08)


def test_every_eighth_view_is_held_out():
    split = views.split_every(18, 8)
    assert split.target.tolist() == [0, 8, 16]
    assert sorted([*split.context, *split.target]) == list(range(18))
    assert len(views.split_every(18, 0).target) == 0


@pytest.mark.parametrize(
    "draw",
    [
        lambda: views.nearest_random(
            on_a_line(5), rng(), num_context=4, num_target=2, name="scene kitchen"
        ),
        lambda: views.random(5, rng(), num_context=4, num_target=2, name="scene kitchen"),
        lambda: views.window(
            5,
            rng(),
            num_context=4,
            num_target=2,
            min_distance=3,
            max_distance=9,
            name="scene kitchen",
        ),
        lambda: views.nearest(on_a_line(5), np.zeros(3), 6, name="scene kitchen"),
    ],
)
def test_too_few_views_name_the_scene_and_both_counts(draw):
    with pytest.raises(InputError, match=r"scene kitchen offers 5 views.* 6 are asked for"):
        draw()


def test_a_video_shorter_than_the_window_is_named():
    with pytest.raises(InputError, match="clip 7 has 20 views.*min_distance=25.*needs 26"):
        views.window(
            20,
            rng(),
            num_context=2,
            num_target=1,
            min_distance=25,
            max_distance=192,
            name="clip 7",
        )


def test_impossible_options_name_themselves():
    with pytest.raises(InputError, match="data.nearest=3.*data.num_context=4"):
        views.nearest_random(on_a_line(30), rng(), num_context=4, pool=3)
    with pytest.raises(InputError, match="data.max_distance=3 leave no stretch of 6"):
        views.window(30, rng(), num_context=4, num_target=2, min_distance=2, max_distance=3)
