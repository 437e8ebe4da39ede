"""Files are written whole or not at all, and places that cannot be written to are named first."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from nvs_common import outputs
from nvs_common.errors import InputError


def test_asking_leaves_nothing_and_writing_makes_folders(tmp_path):
    file = outputs.check_file(tmp_path / "a" / "b.PNG", (".png",))
    folder = outputs.check_folder(tmp_path / "c" / "d")
    assert not list(tmp_path.iterdir())
    outputs.write_text(folder / "e" / "f.txt", "x")
    outputs.write_image(file, np.zeros((1, 1, 3), np.uint8))
    assert [p.name for p in (folder / "e").iterdir()] == ["f.txt"] and file.is_file()


def test_places_that_cannot_be_written_to_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for check, path, words in (
        (outputs.check_file, tmp_path / "file" / "a.png", "cannot be written"),
        (outputs.check_file, tmp_path, "is a folder; name a file"),
        (outputs.check_folder, tmp_path / "file", "cannot be written"),
        (lambda p: outputs.check_file(p, (".mp4", ".gif")), tmp_path / "a.avi", ".mp4 or .gif"),
        (lambda p: outputs.write_text(p, "a"), tmp_path / "file" / "a", "cannot be written"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            check(path)
        # A folder that is none is named itself, not the file that was to lie in it.
        assert any(str(caught.value).startswith(f"{p}: ") for p in (path, path.parent))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    (tmp_path / "a").mkdir(mode=0o500)
    with pytest.raises(InputError, match="Permission denied"):
        outputs.check_folder(tmp_path / "a")


def test_what_fails_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "a.txt"
    outputs.write_text(path, "before")
    with pytest.raises(ZeroDivisionError), outputs.whole(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_contents(tmp_path):
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    outputs.write_image(tmp_path / "a.png", image)
    outputs.write_image(tmp_path / "b.png", Image.fromarray(image))
    outputs.write_arrays(tmp_path / "c.NPZ", {"x/y": image})
    outputs.write_json(tmp_path / "d.json", {"a": [1.5, float("nan")], "b": {"c": -np.inf}})
    for name in ("a.png", "b.png"):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name)), image)
    np.testing.assert_array_equal(np.load(tmp_path / "c.NPZ")["x/y"], image)
    assert json.loads((tmp_path / "d.json").read_text()) == {"a": [1.5, None], "b": {"c": None}}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "c.NPZ", "d.json"]
