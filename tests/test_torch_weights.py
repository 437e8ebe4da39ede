"""Foreign files of weights: read without PyTorch, and without running anything that is in them."""

import collections
import io
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from nvs_common import errors, torch_weights
from tests import torch_files

RNG = np.random.default_rng(0)
STATE = {
    "a.weight": RNG.normal(size=(3, 4)).astype(np.float32),
    "b": RNG.normal(size=(2,)).astype(np.float64),
    "scalar": np.array(3, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


def equal(got, wanted):
    assert list(got) == list(wanted)
    for name, x in wanted.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape
        np.testing.assert_array_equal(got[name], x)


def test_a_checkpoint_of_pytorch_is_read_with_its_nesting_and_plain_values(tmp_path):
    content = {"model": STATE, "step": 7, "betas": (0.9, 0.95), "groups": [{"lr": 4e-4}, None]}
    got = torch_weights.read(torch_files.save(tmp_path / "a.pt", content))
    equal(got["model"], STATE)
    assert got["step"] == 7 and got["betas"] == (0.9, 0.95)
    assert got["groups"] == [{"lr": 4e-4}, None]


def test_every_type_is_read_exactly(tmp_path):
    values = RNG.integers(0, 2, size=(5, 2))
    state = {name: values.astype(name) for name in torch_files.STORAGES if name != "bfloat16"}
    state["bfloat16"] = RNG.normal(size=(4,)).astype(ml_dtypes.bfloat16)
    equal(torch_weights.read(torch_files.save(tmp_path / "a.ckpt", state)), state)


def test_transposed_views_and_parameters_are_read(tmp_path):
    matrix = np.asfortranarray(STATE["a.weight"])
    file = torch_files.save(tmp_path / "a.pth", {"p": torch_files.Parameter(matrix)})
    np.testing.assert_array_equal(torch_weights.read(file)["p"], STATE["a.weight"])


def test_arrays_and_tensors_become_floats_of_numpy():
    class Tensor:
        """As PyTorch's: no array while it is trained, and none of NumPy's types if bfloat16."""

        def __init__(self, values, dtype="torch.float32"):
            self.values, self.dtype, self.trained = values, dtype, True

        def detach(self):
            copy = type(self)(self.values, self.dtype)
            copy.trained = False
            return copy

        def cpu(self):
            return self

        def float(self):
            copy = self.detach()
            copy.dtype = "torch.float32"
            return copy

        def __array__(self, dtype=None, copy=None):
            if self.trained or self.dtype != "torch.float32":
                raise RuntimeError("no array")
            return np.asarray(self.values, np.float32)

    for dtype in ("torch.float32", "torch.bfloat16"):
        x = torch_weights.floats(Tensor([1.0, 2.0], dtype), "a")
        np.testing.assert_array_equal(x, np.float32([1, 2]))
    assert torch_weights.floats(np.ones(2), "a").dtype == np.float64
    assert torch_weights.floats(np.ones(2, np.float16), "a").dtype == np.float32
    with pytest.raises(errors.InputError, match="not finite"):
        torch_weights.floats(np.full(2, 1e300), "a", np.float32)
    for bad, words in ((np.arange(2), "a is int64"), (np.float32([np.inf]), "a holds values")):
        with pytest.raises(errors.InputError, match=words):
            torch_weights.floats(bad, "a")


def test_wrappers_of_names_are_left_out():
    assert torch_weights.unwrapped("module._orig_mod.module.a.module.b") == "a.module.b"


def test_tensors_may_share_a_storage(tmp_path):
    numbers = np.arange(6, dtype=np.float32)
    storages = {"0": numbers.tobytes()}
    whole = torch_files.tensor("0", "float32", 6, 0, (6,), (4,), storages)
    part = torch_files.tensor("0", "float32", 6, 2, (2, 2), (4, 8), storages)
    pickled = b"\x80\x02}(X\x01\x00\x00\x00a" + whole + b"X\x01\x00\x00\x00b" + part + b"u."
    got = torch_weights.read(torch_files.write(tmp_path / "a.pt", pickled, storages))
    equal(got, {"a": numbers, "b": np.float32([[2, 4], [3, 5]])})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_attributes_of_a_state_dict_are_left_out(tmp_path, protocol):
    state = collections.OrderedDict(step=2**40, names=["a", "a"], nothing=(None, True, 0.5))
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    file = torch_files.write(tmp_path / "a.pt", pickle.dumps(state, protocol), {})
    assert torch_weights.read(file) == dict(state)


def test_what_is_not_wanted_is_not_read(tmp_path):
    content = {"model": STATE, "optimizer": {"state": [STATE["b"], 3]}}
    file = torch_files.save(tmp_path / "a.pt", content)
    got = torch_weights.read(file, wanted=lambda name: name == "model/a.weight")
    assert got == {"model": {"a.weight": got["model"]["a.weight"]}, "optimizer": {"state": [3]}}


def test_safetensors_and_npz_give_the_same(tmp_path):
    safetensors.numpy.save_file(STATE, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **STATE)
    got = torch_weights.read(tmp_path / "a.safetensors")
    equal({name: got[name] for name in STATE}, STATE)
    equal(torch_weights.read(tmp_path / "a.npz"), STATE)
    only = torch_weights.read(tmp_path / "a.npz", wanted=lambda name: name == "b")
    assert list(only) == ["b"]


class Runs:
    """Unpickling this calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(flag):
    """Pickles that would make the file `flag` if they were unpickled."""
    import os
    import pathlib
    import runpy

    yield pickle.dumps({"a": Runs(os.system, f"touch {flag}")}, 2)
    yield pickle.dumps({"a": Runs(exec, f"open({str(flag)!r}, 'w')")}, 4)
    yield pickle.dumps({"a": Runs(eval, f"open({str(flag)!r}, 'w')")}, 0)
    yield pickle.dumps(Runs(pathlib.Path(flag).touch), 2)
    yield pickle.dumps([Runs(runpy.run_path, str(flag))], 5)
    yield b"\x80\x02cbuiltins\ngetattr\n(cos\nsystem\nX\x01\x00\x00\x00atR."
    yield b"(S'touch " + str(flag).encode() + b"'\nios\nsystem\n."
    yield b"(cos\nsystem\nS'touch " + str(flag).encode() + b"'\no."
    yield b"\x80\x02ctorch.storage\n_load_from_bytes\n(C\x01atR."
    yield b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R."
    yield b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01a\x85R."
    yield b"\x80\x02ccollections\nOrderedDict\n)\x81."  # NEWOBJ
    yield b"\x80\x02\x82\x01."  # EXT1
    yield b"\x80\x02X\x01\x00\x00\x00a)R."  # calls a text
    yield b"\x80\x02]}b."  # sets attributes of a list


@pytest.mark.parametrize("number", range(15))
def test_a_pickle_that_wants_code_to_run_is_refused_and_runs_nothing(tmp_path, number):
    flag = tmp_path / "flag"
    pickled = list(attacks(flag))[number]
    file = torch_files.write(tmp_path / "a.pt", pickled, {})
    with pytest.raises(errors.InputError, match="refused: its pickle uses"):
        torch_weights.read(file)
    assert not flag.exists()


def described(offset=0, shape=(2,), strides=(4,), size=4, key="0"):
    storages = {"0": bytes(16)}
    code = torch_files.tensor(key, "float32", size, offset, shape, strides, storages)
    return b"\x80\x02}X\x01\x00\x00\x00a" + code + b"s.", storages


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offset": 3}, r"a \(2,\) reaches beyond its 4 numbers"),
        ({"offset": -1}, "offset -1"),
        ({"strides": (-4,)}, r"strides \(-1,\)"),
        ({"shape": (-2,)}, r"shape \(-2,\)"),
        ({"shape": (2**30,), "strides": (0,)}, "reaches beyond"),
        ({"shape": (2, 2)}, r"shape \(2, 2\), strides \(1,\)"),
        ({"size": 5}, "has not the 20 bytes"),
        ({"key": "../0"}, r"archive/data/\.\./0 has not"),
        ({"shape": ("x",)}, "whole numbers"),
    ],
)
def test_a_tensor_that_reaches_beyond_its_bytes_is_an_error(tmp_path, changes, words):
    pickled, storages = described(**changes)
    file = torch_files.write(tmp_path / "a.pt", pickled, storages)
    with pytest.raises(errors.InputError, match=words):
        torch_weights.read(file)


BOMB = b"]q\x00" + b"".join(
    b"](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(40)
)


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b"\x80\x02}",
        b"\x80\x02}q\x00(X\x01\x00\x00\x00ah\x00u.",  # contains itself
        b"\x80\x02}X\x01\x00\x00\x00a" + BOMB + b"s.",
        b"\x80\x02}](]Nes.",  # a list as a key
        b"\x80\x02}h\x05.",
        b"\x80\x02}.N"[:3] + b"R.",
        b"\x80\x02}X\x01\x00\x00\x00actorch\nFloatStorage\ns.",
        b"\x80\x02}(X\x01\x00\x00\x00au.",
        b"\x80\x02" + b"(" * 5000 + b"t" * 5000 + b".",
    ],
)
def test_a_broken_or_endless_description_is_an_error(tmp_path, pickled):
    file = torch_files.write(tmp_path / "a.pt", pickled, {})
    with pytest.raises(errors.InputError, match=r"a\.pt"):
        torch_weights.read(file)


# Twice itself, forty times over: to print or to hash the last one would take years.
DEEP = b")q\x00" + b"".join(
    b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(40)
)
LAST = b"h\x28"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (LAST + b")R.", "a call of <class 'tuple'>"),
        (LAST + b"X\x01\x00\x00\x00a\x93.", "no text"),
        (STORAGE + LAST + b"NK\x04tQ.", "unknown type"),
        (b"}" + LAST + b"Ns.", "has a key that is neither"),
        (b"ccollections\nOrderedDict\n]" + LAST + b"N\x86a\x85R.", "has a key that is neither"),
        (b"}X\x00\x00\x10\x00" + b"k" * 2**20 + b"Ns.", "has a key of more than 1024"),
    ],
)
def test_a_value_too_deep_to_print_or_hash_is_refused_at_once(tmp_path, pickled, words):
    file = torch_files.write(tmp_path / "a.pt", b"\x80\x04" + DEEP + pickled, {})
    with pytest.raises(errors.InputError, match=words):
        torch_weights.read(file)


def test_tensors_that_repeat_a_storage_without_end_are_an_error(tmp_path):
    storages = {"0": bytes(2**16)}
    one = torch_files.tensor("0", "float32", 2**14, 0, (2**14,), (4,), storages)
    pickled = b"\x80\x02}X\x01\x00\x00\x00a](" + one + b"q\x01" + b"h\x01" * 99 + b"es."
    file = torch_files.write(tmp_path / "a.pt", pickled, storages)
    with pytest.raises(errors.InputError, match="repeat the same numbers"):
        torch_weights.read(file)


def test_encrypted_entries_and_unknown_types_of_numbers_are_errors(tmp_path):
    content = bytearray(torch_files.save(tmp_path / "a.pt", STATE).read_bytes())
    for signature, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        place = content.find(signature)
        while place >= 0:
            content[place + flags] |= 1
            place = content.find(signature, place + 4)
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(errors.InputError, match="is encrypted"):
        torch_weights.read(tmp_path / "a.pt")
    header = b'{"a":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[0,3]}}'
    size = len(header).to_bytes(8, "little")
    (tmp_path / "a.safetensors").write_bytes(size + header + bytes(3))
    with pytest.raises(errors.InputError, match="float8"):
        torch_weights.read(tmp_path / "a.safetensors")


def test_other_files_are_explained(tmp_path):
    for name, content, words in [
        ("old.pt", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
        ("empty.pt", b"", "cut short"),
        ("a.npz", b"PK", "not a whole .npz file"),
        ("a.safetensors", b"12345678901", "not a whole .safetensors file"),
        ("a.pkl", b"", "weights are read from .pt"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(errors.InputError, match=words):
            torch_weights.read(tmp_path / name)
    with pytest.raises(errors.InputError, match="no such file"):
        torch_weights.read(tmp_path / "none.pt")
    np.save(tmp_path / "b.npy", STATE["b"])
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    with pytest.raises(errors.InputError, match="not an archive"):
        torch_weights.read(tmp_path / "b.npz")
    objects = {"a": np.array([Runs(print)], dtype=object)}
    np.savez(tmp_path / "c.npz", **objects)
    with pytest.raises(errors.InputError, match="allow_pickle"):
        torch_weights.read(tmp_path / "c.npz")
    for name, value, words in [
        ("list.pt", [1], "holds no dictionary"),
        ("tensor.pt", STATE["b"], "holds no dictionary"),
    ]:
        with pytest.raises(errors.InputError, match=words):
            torch_weights.read(torch_files.save(tmp_path / name, value))
    for changes, words in [
        ({"compression": zipfile.ZIP_DEFLATED}, "compressed entries"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"root": "a/b"}, "no file of torch.save"),
    ]:
        with pytest.raises(errors.InputError, match=words):
            torch_weights.read(torch_files.save(tmp_path / "x.pt", STATE, **changes))


def test_a_file_cut_anywhere_or_with_a_flipped_bit_is_an_error(tmp_path):
    content = torch_files.save(tmp_path / "a.pt", {"model": STATE}).read_bytes()
    for size in range(0, len(content), 97):
        (tmp_path / "cut.pt").write_bytes(content[:size])
        with pytest.raises(errors.InputError, match="cut.pt"):
            torch_weights.read(tmp_path / "cut.pt")
    place = content.index(STATE["a.weight"].tobytes())
    flipped = io.BytesIO(content)
    flipped.seek(place + 5)
    flipped.write(bytes([content[place + 5] ^ 8]))
    (tmp_path / "flipped.pt").write_bytes(flipped.getvalue())
    with pytest.raises(errors.InputError, match="Bad CRC"):
        torch_weights.read(tmp_path / "flipped.pt")


def test_compressed_arrays_unpack_to_a_limit(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", **STATE)
    equal(torch_weights.read(tmp_path / "a.npz"), STATE)
    monkeypatch.setattr(torch_weights, "_SMALL", 2**16)
    np.savez_compressed(tmp_path / "b.npz", a=np.zeros(2**16, np.float32))
    with pytest.raises(errors.InputError, match="b.npz: its compressed arrays would unpack"):
        torch_weights.read(tmp_path / "b.npz")
