"""Quantisers as modules: a learned codebook, finite scalar and lookup-free quantisation.

All are called as `quantizer(z, train=...)` on [..., d] and return `codes.Quantized`.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvs_common.errors import InputError
from nvs_common.types import Array
from vqnerf_jax import code_statistics, codes, lookup_free

CHOICES = {
    "beta_on": ("codebook", "commitment"),
    "update": ("gradient", "ema"),
    "distance": ("l2", "cosine"),
    "gradient": ("straight_through", "rotation"),
}


class Codebook(nn.Module):
    """Vector quantisation with k learned codes.

    With update="gradient" the codes are a parameter. With "ema" they are state in the collection
    "codes", which is new after each call with train=True (apply with mutable=["codes"]), and
    restarts and the k-means start draw from the random stream "codes", whose key must be the same
    on all devices.

    Attributes:
      num_codes: k.
      width: d.
      beta: weight of one of the two terms of the loss.
      beta_on: which one. "codebook" multiplies the codes' distance to the vectors, what taming and
        diffusers call legacy and train with; "commitment" the vectors' distance to the codes, as
        published (arXiv 1711.00937, Eq. 3). With "ema" there is no other than the commitment.
      update: how codes learn, by "gradient" or as running means ("ema").
      distance: "l2", or "cosine": vectors and codes are then brought to length one.
      gradient: what vectors get of the quantised values' gradient: all of it ("straight_through"),
        or turned as the vector is turned to the code ("rotation").
      decay: of the running means.
      epsilon: pseudo-count of a code in them.
      debias: running means start at zero and the bias is divided out; otherwise at the codes.
      keep_unused: see `code_statistics.update`.
      restart_below: average count under which a code restarts at a random vector; 0 for never.
      kmeans_steps: rounds of k-means on the first batch that start the codes; 0 for none.
      axis_name: see `codes`.
    """

    num_codes: int = 2048
    width: int = 16
    beta: float = 0.25
    beta_on: str = "codebook"
    update: str = "gradient"
    distance: str = "l2"
    gradient: str = "straight_through"
    decay: float = 0.99
    epsilon: float = 1e-5
    debias: bool = True
    keep_unused: bool = True
    restart_below: float = 0.0
    kmeans_steps: int = 0
    axis_name: str | None = None

    def setup(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(
                    f"codebook: {name}={getattr(self, name)!r}; choose from {choices}."
                )
        if self.update == "gradient":
            if self.restart_below or self.kmeans_steps:
                raise InputError(
                    "codebook: restarts and the k-means start need running means; set "
                    "update='ema', or restart_below=0 and kmeans_steps=0."
                )
            self.embedding = self.param("embedding", self._initial)
        else:
            self.state = self.variable("codes", "state", self._initial_state)

    def __call__(
        self, z: Array, *, train: bool = False, learn_if: Array | bool = True
    ) -> codes.Quantized:
        """Quantises z [..., d]; with train=True running means learn from it, where `learn_if`."""
        if z.shape[-1] != self.width:
            raise InputError(
                f"codebook of {self.num_codes} codes x {self.width}: vectors have {z.shape[-1]} "
                "numbers; they must be as wide as the codes."
            )
        learning = train and self.update == "ema" and not self.is_initializing()
        z = codes.unit(z) if self.distance == "cosine" else z
        flat = z.reshape(-1, self.width)
        if learning and self.kmeans_steps:
            self._start(flat, learn_if)
        table = self.table()
        indices = codes.nearest(jax.lax.stop_gradient(z), jax.lax.stop_gradient(table))
        chosen = table[indices]
        if learning:
            learnt = self._learn(flat, indices.reshape(-1))
            self.state.value = jax.tree.map(
                lambda new, old: jnp.where(learn_if, new, old), learnt, self.state.value
            )
        through = codes.rotate if self.gradient == "rotation" else codes.straight_through
        values = through(z, chosen.astype(z.dtype))
        counts = codes.counts(indices, self.num_codes, self.axis_name)
        return codes.Quantized(values, indices, self._loss(z, chosen), counts)

    def lookup(self, indices: Array) -> Array:
        """The codes [..., d] of indices [...]."""
        return self.table()[indices]

    def table(self) -> Array:
        """All codes [k, d], of length one for cosine distances."""
        table = self.state.value.codes if self.update == "ema" else self.embedding
        return codes.unit(table) if self.distance == "cosine" else table

    def _initial(self, key: Array) -> Array:
        if self.distance == "cosine":
            return codes.unit(jax.random.normal(key, (self.num_codes, self.width)))
        bound = 1 / self.num_codes
        return jax.random.uniform(key, (self.num_codes, self.width), minval=-bound, maxval=bound)

    def _initial_state(self) -> code_statistics.Statistics:
        return code_statistics.start(self._initial(self.make_rng("params")), debias=self.debias)

    def _start(self, flat: Array, learn_if: Array | bool) -> None:
        """Replaces the codes by those of k-means before the first update."""
        key, cosine = self.make_rng("codes"), self.distance == "cosine"
        state = self.state.value

        def first() -> code_statistics.Statistics:
            centres = code_statistics.kmeans(
                key,
                flat.astype(state.codes.dtype),
                self.num_codes,
                self.kmeans_steps,
                cosine=cosine,
                axis_name=self.axis_name,
            )
            return code_statistics.start(centres, debias=self.debias)

        self.state.value = jax.lax.cond(
            jnp.logical_and(state.steps == 0, learn_if), first, lambda: state
        )

    def _learn(self, flat: Array, indices: Array) -> code_statistics.Statistics:
        """The state after an update and, where they are wanted, restarts."""
        shared: dict[str, Any] = dict(
            decay=self.decay, debias=self.debias, axis_name=self.axis_name
        )
        state = code_statistics.update(
            self.state.value,
            flat,
            indices,
            epsilon=self.epsilon,
            keep_unused=self.keep_unused,
            cosine=self.distance == "cosine",
            **shared,
        )
        if self.restart_below > 0:
            key = self.make_rng("codes")
            state = code_statistics.restart(state, flat, key, below=self.restart_below, **shared)
        return state

    def _loss(self, z: Array, chosen: Array) -> Array:
        z = z.astype(jnp.promote_types(z.dtype, chosen.dtype))
        commitment = codes.commitment(z, chosen)
        if self.update == "ema":
            return self.beta * commitment
        # The same number with the other's gradient: of the codes instead of the vectors.
        codebook = codes.commitment(chosen, z)
        if self.beta_on == "codebook":
            return commitment + self.beta * codebook
        return self.beta * commitment + codebook


class FSQ(nn.Module):
    """Finite scalar quantisation (arXiv 2309.15505): every number is rounded to a few levels.

    Attributes:
      levels: how many, for each of the d numbers; the product is the number of codes.
      axis_name: see `codes`.
    """

    levels: tuple[int, ...] = (8, 8, 6, 5)
    axis_name: str | None = None

    def __call__(self, z: Array, *, train: bool = False) -> codes.Quantized:
        """Quantises z [..., d]; there is nothing to learn."""
        del train
        if z.shape[-1] != len(self.levels):
            raise InputError(
                f"FSQ with levels {self.levels}: vectors have {z.shape[-1]} numbers; give a level "
                "for each."
            )
        values = lookup_free.round_to_levels(z, self.levels)
        indices = lookup_free.level_indices(values, self.levels)
        counts = codes.counts(indices, math.prod(self.levels), self.axis_name)
        return codes.Quantized(values, indices, jnp.zeros((), jnp.float32), counts)

    def lookup(self, indices: Array) -> Array:
        """The codes [..., d] of indices [...]."""
        return lookup_free.from_level_indices(indices, self.levels)


class LFQ(nn.Module):
    """Lookup-free quantisation (arXiv 2310.05737): the signs of d numbers, 2^d codes.

    Attributes:
      width: d.
      spherical: vectors and codes on the unit sphere (arXiv 2406.07548); otherwise codes are +-1.
      entropy_weight: of the entropy of each vector's codes, less that of the batch.
      diversity: weight of the batch's entropy within that.
      commitment_weight: of the squared distance to the code.
      inverse_temperature: of the probabilities whose entropy is taken.
      axis_name: see `codes`.
    """

    width: int = 11
    spherical: bool = False
    entropy_weight: float = 0.1
    diversity: float = 1.0
    commitment_weight: float = 0.25
    inverse_temperature: float = 100.0
    axis_name: str | None = None

    def __call__(self, z: Array, *, train: bool = False) -> codes.Quantized:
        """Quantises z [..., d]; the loss is the same in training and after."""
        del train
        if z.shape[-1] != self.width:
            raise InputError(f"LFQ of {self.width} bits: vectors have {z.shape[-1]} numbers.")
        z = codes.unit(z) if self.spherical else z
        scale = self.width**-0.5 if self.spherical else 1.0
        chosen = jnp.where(z > 0, scale, -scale).astype(z.dtype)
        indices = lookup_free.sign_indices(z)
        counts = codes.counts(indices, 2**self.width, self.axis_name)
        return codes.Quantized(
            codes.straight_through(z, chosen), indices, self._loss(z, chosen, scale), counts
        )

    def lookup(self, indices: Array) -> Array:
        """The codes [..., d] of indices [...]."""
        signs = lookup_free.from_sign_indices(indices, self.width)
        return signs * self.width**-0.5 if self.spherical else signs

    def _loss(self, z: Array, chosen: Array, scale: float) -> Array:
        flat = z.reshape(-1, self.width).astype(jnp.promote_types(z.dtype, jnp.float32))
        table = scale * lookup_free.from_sign_indices(jnp.arange(2**self.width), self.width)
        entropies = lookup_free.entropies(
            flat, table.astype(flat.dtype), self.inverse_temperature, self.axis_name
        )
        entropy = entropies.of_each - self.diversity * entropies.of_all
        total = self.entropy_weight * entropy
        return total + self.commitment_weight * codes.commitment(z, chosen)
