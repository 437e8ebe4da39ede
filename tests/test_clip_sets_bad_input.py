"""Every bad chunk, index and folder of clips ends in one line that names file, clip and frame."""

import json

import numpy as np
import pytest

from nvs_common.data import eval_index, scenes
from nvs_common.errors import InputError
from tests import clip_writers, torch_files
from tests import scene_writers as writers
from tests.clip_writers import COUNT, HEIGHT, WIDTH


def change(name, value):
    def apply(clip):
        clip[name] = value

    return apply


def without(name):
    return lambda clip: clip.pop(name)


def broken(frame, content):
    def apply(clip):
        clip["images"][frame] = np.frombuffer(content, np.uint8)

    return apply


def cut(clip):
    clip["images"][3] = clip["images"][3][:-40]


def turned(clip):
    clip["cameras"] = clip["cameras"].copy()
    clip["cameras"][4, 6:9] = 0


BAD = {
    "no key": (without("key"), "x.torch: scene number 1 has the key None"),
    "key": (change("key", "../a"), "x.torch: scene number 1 has the key '../a'"),
    "same key": (change("key", "0a1"), "x.torch: scene number 1: the key '0a1' appears twice"),
    "no cameras": (without("cameras"), "x.torch/0b2: cameras: absent; expected a tensor"),
    "width": (
        change("cameras", np.zeros((COUNT, 16), np.float32)),
        f"x.torch/0b2: cameras: ({COUNT}, 16); expected a tensor [frames, 18]",
    ),
    "integers": (
        change("cameras", np.zeros((COUNT, 18), np.int64)),
        "x.torch/0b2: cameras: int64 numbers",
    ),
    "count": (
        change("cameras", np.zeros((COUNT - 1, 18), np.float32)),
        f"x.torch/0b2: {COUNT - 1} cameras but {COUNT} images",
    ),
    "pose": (turned, "x.torch/0b2: frame '00004': the pose's rotation is not orthonormal"),
    "no images": (without("images"), "x.torch/0b2: images: absent; expected a list"),
    "array": (
        change("images", [np.zeros((2, 2), np.uint8)] * COUNT),
        "x.torch/0b2: frame '00000': its image is no tensor [bytes]",
    ),
    "cut": (cut, "x.torch/0b2/00003: cannot be decoded"),
    "no JPEG": (broken(2, b"GIF89a"), "x.torch/0b2/00002: not an image of a known format"),
    "empty": (broken(6, b""), "x.torch/0b2/00006: the image file is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_clip_is_named_with_its_chunk_and_frame(tmp_path, name):
    apply, says = BAD[name]
    content = clip_writers.clips()
    apply(content[1])
    writers.refused(clip_writers.save(tmp_path / "x.torch", content) / "0b2", says)
    if "number 1" not in says:
        assert len(scenes.load_scene(tmp_path / "x.torch" / "0a1")) == COUNT  # unharmed


def test_bad_chunks_are_named(tmp_path):
    path = clip_writers.save(tmp_path / "x.torch", clip_writers.clips())
    whole = path.read_bytes()
    writers.refused(path / "zzz", "x.torch: holds no scene 'zzz' among its 3 (0a1,", "index.json")
    writers.refused(path, "x.torch: holds 3 scenes; name one by its key")
    writers.refused(path / "0a1", "the option rig has no meaning", rig=1)
    for size in range(0, len(whole), len(whole) // 25):
        path.write_bytes(whole[:size])
        writers.refused(path / "0a1", "x.torch: not a", "get the file again")
    damaged = bytearray(whole)
    damaged[whole.index(clip_writers.clips()[0]["images"][3].tobytes()) + 300] ^= 4
    path.write_bytes(damaged)
    writers.refused(path / "0a1", "x.torch/0a1/00003: damaged or cut short (bad CRC)")
    for content, says in (
        (clip_writers.clips()[0], "no list of scenes"),
        ([], "no list"),
        ([1], "is int"),
    ):
        writers.refused(clip_writers.save(path, content) / "0a1", "x.torch: ", says)
    torch_files.write(path, b"\x80\x02cos\nsystem\n(X\x01\x00\x00\x00atR.", {})
    writers.refused(path / "0a1", "x.torch: refused: its pickle uses the name 'os.system'")
    scene = scenes.load_scene(clip_writers.save(path, clip_writers.clips()) / "0a1")
    clip_writers.save(path, clip_writers.clips()[:1])
    with pytest.raises(InputError, match="x.torch/0a1/00001: damaged"):
        scene.images([1])
    path.unlink()
    with pytest.raises(InputError, match="x.torch/0a1/00001: cannot be read"):
        scene.images([1])


@pytest.mark.parametrize(
    "content, says",
    [
        ("[]", "index.json: expected an object"),
        ('{"0a1": 3}', "index.json: scene '0a1' is in 3"),
        ('{"0a1": "../000000.torch"}', "expected a file name"),
        ('{"a/b": "000000.torch"}', "has the key 'a/b'"),
        ('{"0a1": "000009.torch"}', "none of its chunks is in"),
    ],
)
def test_a_bad_index_of_chunks_is_named(tmp_path, content, says):
    root = clip_writers.write_split(tmp_path / "test")
    (root / "index.json").write_text(content)
    for find in (scenes.find_scenes, lambda folder: eval_index.find(folder, ["0a1"])):
        with pytest.raises(InputError) as caught:
            find(root)
        assert says in str(caught.value)


def test_chunks_that_are_not_there_are_counted(tmp_path, caplog):
    root = clip_writers.write_split(tmp_path / "test")
    (root / "000001.torch").unlink()
    assert [path.name for path in scenes.find_scenes(root)] == ["0a1", "0b2"]
    assert "1 of 3 clips are in chunks that are not there (first: 000001.torch)" in caplog.text
    assert eval_index.find(root, clip_writers.KEYS).missing == ("0c3",)
    (root / "index.json").unlink()
    clip_writers.save(root / "000002.torch", clip_writers.clips()[:1])
    with pytest.raises(InputError, match="000002.torch: scene '0a1' is in 000000.torch as well"):
        scenes.find_scenes(root)


def rewritten(path, **changes):
    """Changes fields of frame 2 of an LVSM file; None removes a field."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        content["frames"][2][name] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(image_path="../../../x"), "leaves the scene's folder"),
        (dict(image_path=3), "a frame has image_path 3"),
        (dict(image_path="a/b/none.png"), "images/b/none.png"),
        (dict(fxfycxcy=[1, 2, 3]), "images/clip/102.png': fxfycxcy"),
        (dict(fxfycxcy=[0.3, 0.3, 0.5, 0.5]), "images/clip/102.png': focal length"),
        (dict(w2c=[[1, 0, 0, 0]]), "images/clip/102.png': w2c"),
    ],
)
def test_a_bad_frame_of_lvsm_is_named(tmp_path, changes, says):
    path = writers.write_lvsm(clip_writers.rig(0), tmp_path)
    rewritten(path, **changes)
    writers.refused(path, "clip.json: ", says)


def test_bad_lists_of_lvsm_are_named(tmp_path):
    path = writers.write_lvsm(clip_writers.rig(0), tmp_path)
    for text, says in (("\n", "lists no scene"), ("/a/b.txt\n", "lists 'b.txt'")):
        (tmp_path / "full_list.txt").write_text(text)
        with pytest.raises(InputError, match=f"full_list.txt: {says}"):
            scenes.find_scenes(tmp_path)
    path.write_text('{"frames": 3}')
    writers.refused(path, "clip.json: not a camera file")


def test_frames_of_another_size_than_the_first_are_found_when_they_are_decoded(tmp_path):
    clip = writers.packed_clip(clip_writers.rig(0), "0a1")
    larger = writers.make_rig(0, count=COUNT, height=2 * HEIGHT, width=2 * WIDTH)
    clip["images"][3] = writers.packed_clip(larger, "0a1")["images"][3]
    path = clip_writers.save(tmp_path / "x.torch", [clip])
    writers.refused(path, "frame '00003' is 40 x 24 but '00000' is 20 x 12")
    scene = scenes.load_scene(path, size=(8, 8), check="first")
    assert scene.images([2]).shape == (1, 8, 8, 3)
    with pytest.raises(InputError, match="0a1/00003: the image is 40 x 24 but was 20 x 12"):
        scene.images([3])
    with pytest.raises(InputError, match="check='some'"):
        scenes.load_scene(path, check="some")
