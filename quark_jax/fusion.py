"""Blocks of the update-and-fuse steps (Quark, Sec. 3.2.2, 3.3 and App. A)."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from nvs_common import layers, photoconsistency
from nvs_common.types import Array
from quark_jax import kernels, ldm, one_to_many, prior


def fold(query: Array, key: Array, value: Array, output: Array) -> tuple[Array, Array]:
    """Folds the projections of standard attention into two matrices a head (Eq. 8).

    Args:
      query, key, value: [c, a, f] projections of standard multi-head attention.
      output: [a, f, c].

    Returns:
      Query [c, a, c] and output [a, c, c] matrices: with them, keys and values are the raw
      features. Standard logits are scaled by 1 / sqrt(f) and folded ones by 1 / sqrt(c); the
      query matrix carries the difference.
    """
    channels, _, per_head = query.shape
    folded_query = jnp.einsum("iaf,jaf->iaj", query, key) * (channels / per_head) ** 0.5
    return folded_query, jnp.einsum("jaf,afc->ajc", value, output)


class OneToMany(nn.Module):
    """One-to-many attention from an element of the volume to the views' features (Eq. 5-9).

    Attributes:
      heads: attention heads.
      folded: keys and values are the raw features (Eq. 8); otherwise the standard form.
      uniform: ablation without cross-attention: every valid view has the same weight.
      residual_scale: factor on the output's initial weights.
      query_scale: factor on the queries' initial weights; small ones start as a mean.
      dtype: compute type.
      implementation: see `kernels`.
    """

    heads: int
    folded: bool = True
    uniform: bool = False
    residual_scale: float = 1.0
    query_scale: float = 0.1
    dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, volume: Array, delta: Array | one_to_many.Unstored, valid: Array) -> Array:
        """Adds what the views tell: volume [n, ..., c], delta [v, n, ..., c], valid [v, n, ...]."""
        channels = volume.shape[-1]
        per_head = channels if self.folded else channels // self.heads
        if not self.folded and channels % self.heads:
            raise ValueError(f"{channels} channels do not divide into {self.heads} heads")

        def matrix(name: str, ins: tuple[int, ...], outs: tuple[int, ...], scale=1.0) -> Array:
            return Matrix(ins, outs, scale, name=name)().astype(self.dtype)

        # Plain arrays: a layer of the network cannot be called inside of the loop over layers.
        one, many = (channels,), (self.heads, per_head)
        to_query = matrix("query", one, many, self.query_scale)
        raw = self.folded
        to_key, to_value = (None if raw else matrix(n, one, many) for n in ("key", "value"))
        to_output = matrix("output", many, one, self.residual_scale)

        def change(volume: Array, delta: Array, valid: Array) -> Array:
            query = jnp.einsum("...c,caf->...af", volume, to_query)
            if self.uniform:
                query = jnp.zeros_like(query)
            keys = delta if raw else jnp.einsum("...c,caf->...af", delta, to_key)
            values = delta if raw else jnp.einsum("...c,caf->...af", delta, to_value)
            mixed = one_to_many.attend(query, keys, values, valid, per_head**-0.5)
            return jnp.einsum("...af,afc->...c", mixed.astype(self.dtype), to_output)

        normed = layers.RMSNorm(dtype=self.dtype, name="norm")(volume)
        if self.implementation in (None, "xla"):
            return volume + one_to_many.over_delta(change, normed, delta, valid)
        if not isinstance(delta, one_to_many.Unstored) or not raw or self.uniform:
            raise NotImplementedError(
                f"one-to-many attention {self.implementation!r}: for streaming, folded attention"
            )
        query = jnp.einsum("...c,caf->...af", normed, to_query)
        scale, named = per_head**-0.5, self.implementation
        mixed = kernels.attend(query, delta, valid, scale, implementation=named)
        return volume + jnp.einsum("...af,afc->...c", mixed.astype(self.dtype), to_output)


class Matrix(nn.Module):
    """Weights of a linear map without bias, [*ins, *outs] float32, as a dense layer names them."""

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    scale: float = 1.0

    @nn.compact
    def __call__(self) -> Array:
        def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            flat = (math.prod(self.ins), math.prod(self.outs))
            return layers.scaled_init(self.scale)(key, flat, dtype).reshape(shape)

        return self.param("kernel", init, (*self.ins, *self.outs), jnp.float32)


class LayerCollapse(nn.Module):
    """Halves the layers: V'_j = mean(V_2j-1, V_2j) + MLP([V_2j-1; V_2j]) (Sec. 3.2.2).

    The band of a new layer is the union of the two old ones.
    """

    residual_scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, volume: Array) -> Array:
        """Maps [n, 2 l, y, x, c] to [n, l, y, x, c]."""
        n, layers_in, *rest, channels = volume.shape
        pairs = volume.reshape(n, layers_in // 2, 2, *rest, channels)
        both = jnp.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=-1)
        hidden = layers.RMSNorm(dtype=self.dtype, name="norm")(both)
        hidden = nn.gelu(nn.Dense(2 * channels, dtype=self.dtype, name="dense_in")(hidden))
        init = layers.scaled_init(self.residual_scale)
        change = nn.Dense(channels, dtype=self.dtype, kernel_init=init, name="dense_out")(hidden)
        return pairs.mean(axis=2) + change


class UpdateNetwork(nn.Module):
    """Small CNN in image space from what a view shows and what the volume shows of it.

    Its depth is not published: a 3x3 convolution and `blocks` residual blocks.
    """

    channels: int
    blocks: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Maps [..., y, x, k] to update features [..., y, x, c]."""
        x = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="stem")(inputs)
        for block in range(self.blocks):
            scale = (2 * self.blocks) ** -0.5
            x = layers.ConvBlock(scale, self.dtype, name=f"block{block}")(x)
        return x


class BlendPrior(nn.Module):
    """Blend logits from `prior.BlendCues`; how much each cue counts is learned."""

    @nn.compact
    def __call__(self, cues: prior.BlendCues) -> Array:
        """Maps cues with leading [n] to [n, v, l, y, x]."""

        start = nn.initializers.constant(jnp.array([1.0, 1.0, 0.3]))
        remote, hidden, differs = self.param("scale", start, (3,), jnp.float32)
        against = remote / photoconsistency.FALLOFF * cues.remote[..., None, None, None]
        # Scaled so that a step of the optimiser changes it about as much as the others.
        return -(against + 10 * hidden * cues.hidden + differs * cues.differs)


def update_features(
    network: UpdateNetwork, inputs: tuple[Array | None, Array, Array | None]
) -> Array:
    """Update features [..., y, x, c] from the rendered map, image features and ray encoding."""
    seen, level, ray = inputs
    parts = [level]
    height, width = level.shape[-3:-1]
    if seen is not None:
        parts.append(ldm.resize(seen, height, width))
    if ray is not None:
        parts.append(ldm.resize(ray, height, width))
    return network(jnp.concatenate([part.astype(network.dtype) for part in parts], axis=-1))


class Decode(nn.Module):
    """Reads depth and density logits, and appearance, off the volume.

    Depth starts at the layers' anchors (zero weights) and density at sigmoid(bias), or, where
    there is a prior, at the prior's.
    """

    appearance_channels: int = 0
    density_bias: float = -2.0

    @nn.compact
    def __call__(self, volume: Array, features: Array | None = None) -> dict[str, Array]:
        """Maps [n, l, y, x, c] to float32 {"depth", "density" [n, l, y, x], "appearance"}.

        `features` [n, l, y, x, f] are `prior.layer_features`.
        """
        volume = volume.astype(jnp.promote_types(volume.dtype, jnp.float32))
        zeros = nn.initializers.zeros_init()
        bias = nn.initializers.constant(self.density_bias)
        out = {
            "depth": nn.Dense(1, kernel_init=zeros, name="depth")(volume)[..., 0],
            "density": nn.Dense(1, bias_init=bias, name="density")(volume)[..., 0],
        }
        if features is not None:
            for name, index in (("depth", prior.DEPTH), ("density", prior.DENSITY)):
                start = nn.Dense(1, False, kernel_init=_pick(index), name=f"prior_{name}")
                out[name] += start(features)[..., 0]
        if self.appearance_channels:
            appearance = nn.Dense(self.appearance_channels, name="appearance")(volume)
            out["appearance"] = nn.sigmoid(appearance)
        return out


def _pick(index: int) -> nn.initializers.Initializer:
    """Initial kernel that takes one of the features as it is."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        del key
        return jnp.zeros(shape, dtype).at[index].set(1)

    return init
