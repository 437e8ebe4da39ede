"""Released weights: one .npz file that holds parameters, config and digests.

NumPy alone reads it: `about` is a JSON text as bytes, every other entry is an array under its
path, `params/encoder/stem/kernel`.

    file = numpy.load("quark_small.npz")
    about = json.loads(file["about"].tobytes())

What is loaded is always float32. The same parameters give the same bytes.
"""

from __future__ import annotations

import io
import json
import math
import os
import pathlib
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from nvs_common import digests, errors, outputs, runs
from nvs_common.types import Variables

FORMAT = "viewsynth-jax weights 1"
SUFFIX = ".npz"
DTYPES = ("float32", "float16")
_ABOUT = "about"
_FIELDS = ("system", "step", "dtype", "training", "config", "arrays")
# What the readers of zip files and of arrays raise for a file that is not whole.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    tokenize.TokenError,
    ValueError,
    OSError,
    EOFError,
    SyntaxError,
    LookupError,
    TypeError,
    OverflowError,
    RuntimeError,
    MemoryError,
)


class Weights(NamedTuple):
    """Released weights.

    Attributes:
      config: the config that makes the task.
      variables: {"params", collections}, nested dicts of arrays.
      step: the training step they are from.
      training: JSON mapping, what is known of the training: command, devices, versions.
      dtype: of the floating-point arrays in the file.
    """

    config: runs.Config
    variables: Variables
    step: int
    training: Mapping[str, Any]
    dtype: str = "float32"


def write(path: str | os.PathLike[str], released: Weights) -> None:
    """Writes weights, whole or not at all.

    Args:
      path: file to write, see `check_path`.
      released: what to write; floating-point arrays are stored as its `dtype`.

    Raises:
      InputError: the path or dtype is none of ours, an array cannot be stored, or the file cannot
        be written.
    """
    path = check_path(path)
    if released.dtype not in DTYPES:
        raise errors.InputError(f"dtype={released.dtype!r}: choose from {list(DTYPES)}.")
    flat = flax.traverse_util.flatten_dict(dict(released.variables), sep="/")
    arrays = {name: _stored(name, x, released.dtype) for name, x in sorted(flat.items())}
    config = runs.to_json(released.config)
    about = {
        "format": FORMAT,
        "system": config["system"],
        "step": released.step,
        "dtype": released.dtype,
        "versions": runs.versions(),
        "training": dict(released.training),
        "config": config,
        "arrays": digests.of_tree(arrays),
    }
    about["digest"] = digests.of_json(about)
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    outputs.write_arrays(path, {_ABOUT: text, **arrays})


def check_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path, if weights can be written there.

    Raises:
      InputError: it does not end in .npz, is a folder, or cannot be written.
    """
    return outputs.check_file(path, (SUFFIX,))


def read(path: str | os.PathLike[str]) -> Weights:
    """Reads what `write` wrote; floating-point arrays become float32.

    Raises:
      InputError: no such file, not such a file, or its content is damaged.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise errors.InputError(
            f"{path}: no such file; pass weights that launch/release.py has written."
        )
    about, arrays = _read_file(path)
    if about.get("format") != FORMAT:
        raise errors.InputError(
            f"{path}: its format is {str(about.get('format'))[:80]!r}, {FORMAT!r} is needed; pass "
            "weights that launch/release.py of this version has written."
        )
    if fault := _fault(about, arrays):
        raise errors.InputError(f"{path} is damaged: {fault}; get the file again.")
    arrays = {name: jnp.asarray(_float32(x)) for name, x in arrays.items()}
    return Weights(
        runs.from_json(about["config"]),
        flax.traverse_util.unflatten_dict(arrays, sep="/"),
        about["step"],
        about["training"],
        about["dtype"],
    )


def num_values(variables: Variables) -> int:
    """How many numbers the parameters have."""
    return sum(x.size for x in jax.tree.leaves(variables["params"]))


def _read_file(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The JSON mapping and the arrays of a file, compared with nothing yet."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [entry.filename for entry in archive.infolist()]
            if f"{_ABOUT}.npy" not in names:
                raise errors.InputError(
                    f"{path}: not weights of this library, it has no entry {_ABOUT!r}; pass a "
                    "file that launch/release.py has written."
                )
            # As written by us: so no entry can unpack to more than the file's size.
            if any(entry.file_size != entry.compress_size for entry in archive.infolist()):
                raise ValueError("it holds compressed entries")
            arrays = {n.removesuffix(".npy"): _array(archive.read(n)) for n in names}
        about = json.loads(arrays.pop(_ABOUT).tobytes())
        if not isinstance(about, dict):
            raise ValueError("its description is no JSON mapping")
    except errors.InputError:
        raise
    except _DAMAGE as e:
        reason = " ".join(str(e).split())[:120]
        raise errors.InputError(
            f"{path}: not a whole {SUFFIX} file ({reason}); get the file again."
        ) from e
    return about, arrays


def _array(content: bytes) -> np.ndarray:
    """One .npy entry; its header may not ask for more numbers than its bytes hold."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"an entry of .npy version {version}")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    size = math.prod(shape) * dtype.itemsize
    if dtype.kind not in "fiub" or size != len(content) - file.tell():
        raise ValueError(f"an entry of shape {shape} and dtype {dtype} in {len(content)} bytes")
    return np.load(io.BytesIO(content), allow_pickle=False)


def _fault(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str | None:
    """A phrase about the first thing that is not as it was written, or None."""
    described = {name: field for name, field in about.items() if name != "digest"}
    if about.get("digest") != digests.of_json(described):
        return "its description differs from its digest"
    if absent := [name for name in _FIELDS if name not in about]:
        return f"its description lacks {absent}"
    recorded = about["arrays"]
    for name in [*recorded, *arrays]:
        if name not in arrays or name not in recorded:
            return f"{name} is {'missing' if name in recorded else 'unknown'}"
        entry, x = recorded[name], arrays[name]
        if entry["shape"] != list(x.shape) or entry["dtype"] != str(x.dtype):
            return (
                f"{name} is {x.dtype} {list(x.shape)}, {entry['dtype']} {entry['shape']} was saved"
            )
    return digests.first_difference(recorded, digests.of_tree(dict(arrays)))


def _stored(name: str, x: Any, dtype: str) -> np.ndarray:
    """A leaf as it is stored; a number that the dtype cannot hold raises."""
    x = np.asarray(jax.device_get(x), order="C")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    with np.errstate(over="ignore"):
        stored = x.astype(dtype)
    if not np.isfinite(stored).all():
        finite = np.isfinite(x.astype(np.float32)).all()
        reason = f"exceeds what {dtype} can hold; use float32" if finite else "is not finite"
        raise errors.InputError(f"parameter {name} {reason}; nothing was written.")
    return stored


def _float32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) if np.issubdtype(x.dtype, np.floating) else x
