"""Digests of arrays that do not depend on their layout, to notice damaged checkpoints.

Neither Orbax nor safetensors notices a flipped bit in the payload. A digest here is two weighted
sums of an array's words modulo 2^32; all weights are odd, so that one flipped bit always changes
both sums, and they differ by position, so that moved elements change them too. Addition modulo
2^32 is exact and commutes: the digest is the same on every mesh.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from nvs_common import sharding
from nvs_common.types import Array

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
_MIXERS = (0x846CA68B, 0x9E3779B1)


def of_tree(tree: Any) -> dict[str, dict[str, Any]]:
    """Describes every leaf: path -> {"shape", "dtype", "digest"}, ready for JSON.

    Args:
      tree: arrays, on any mesh.
    """
    sums = jax.device_get(_sums(tree))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    pairs = jax.tree.leaves(sums)
    return {
        sharding.path_name(path): {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "digest": "".join(f"{int(word):08x}" for word in pair),
        }
        for (path, leaf), pair in zip(leaves, pairs, strict=True)
    }


def of_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def first_difference(recorded: dict[str, dict], found: dict[str, dict]) -> str | None:
    """A phrase about the first leaf whose digest is not the recorded one, or None."""
    for name, entry in recorded.items():
        if name not in found:
            return f"{name} is missing"
        if found[name]["digest"] != entry["digest"]:
            return f"{name} has digest {found[name]['digest']}, {entry['digest']} was saved"
    return None


@jax.jit
def _sums(tree: Any) -> Any:
    return jax.tree.map(digest, tree)


def digest(x: Array) -> Array:
    """The two sums [2] uint32 of an array of any shape and dtype."""
    words = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = jax.lax.bitcast_convert_type(words, _WORDS[words.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        position = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index = index + position * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    sums = [jnp.sum(words * _weights(index, mixer), dtype=jnp.uint32) for mixer in _MIXERS]
    return jnp.stack(sums)


def _weights(index: Array, mixer: int) -> Array:
    """An odd pseudo-random weight for each position (an integer hash of it)."""
    h = (index ^ (index >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(mixer)
    return (h ^ (h >> 16)) | jnp.uint32(1)
