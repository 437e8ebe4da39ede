"""CoCo-INR's splits: what is trained on and held out, and lists that are wrong as published."""

import numpy as np
import pytest

from nvs_common.data import samples, splits
from nvs_common.errors import InputError

FILE = """
[scenes]
    [scenes.scan3]
    views = 6
        [scenes.scan3.default_views_configs]
        2 = [4, 1]
        3 = [0, 2, 6]
        4 = [0, 2, 2, 3]
"""


@pytest.mark.parametrize(
    "name, views, count, first",
    [
        ("dtu/scan24/32", 49, 25, [0, 2, 4]),
        ("dtu/scan122/32", 64, 32, [0, 2, 4]),
        ("dtu/scan24/8", 49, 7, [0, 8, 16]),
        ("dtu/scan83/8", 64, 8, [0, 8, 16]),
        ("dtu/scan122/3", 64, 3, [5, 55, 59]),
    ],
)
def test_dtu(name, views, count, first):
    split = splits.choose(name, views)
    assert len(split.context) == count and list(split.context[:3]) == first
    both = np.concatenate([split.context, split.target])
    np.testing.assert_array_equal(np.sort(both), np.arange(views))


def test_files_in_their_form(tmp_path):
    path = tmp_path / "train_val_split.toml"
    path.write_text(FILE)
    split = splits.choose(f"{path}/scan3/2", 6)
    assert list(split.context) == [1, 4] and list(split.target) == [0, 2, 3, 5]
    for count, words in [
        (3, r"\[6\] are not among the 6"),
        (4, "some are named twice"),
        (9, "has no list of 9"),
    ]:
        with pytest.raises(InputError, match=words):
            splits.choose(f"{path}/scan3/{count}", 6)
    with pytest.raises(InputError, match="no scene 'scan4'"):
        splits.choose(f"{path}/scan4/2", 6)


@pytest.mark.parametrize(
    "name, views, words",
    [
        ("dtu/scan24/16", 49, "the published lists of 4 and 16 are those of another"),
        ("dtu/scan25/32", 49, "built in are dtu/scanN/3, 8 and 32"),
        ("dtu/scan24/32", 48, "a scene with 49 views, but 48 were loaded"),
        ("dtu", 49, "expected DATASET/SCENE/COUNT"),
        ("absent.toml/scan3/2", 6, "absent.toml"),
    ],
)
def test_bad_names_are_explained(name, views, words):
    with pytest.raises(InputError, match=words):
        splits.choose(name, views)


def test_training_takes_the_split_of_a_folder():
    class Scan:
        names = tuple(map(str, range(49)))

    sampler = samples.Sampler(1, 1, split="dtu/scan24/8")
    assert list(sampler.allowed(Scan(), folder=True)) == list(range(0, 49, 8))
    assert len(sampler.allowed(Scan(), folder=False)) == 49
