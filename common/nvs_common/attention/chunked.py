"""Attention in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nvs_common.types import Array


def attention(
    q: Array, k: Array, v: Array, *, scale: float, need_log_sum: bool
) -> tuple[Array, Array]:
    """See `nvs_common.attention.attention`; supports everything."""
    del need_log_sum
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bnaf,bmaf->banm", q * scale, k, preferred_element_type=wide)
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    powers = jnp.exp(logits - highest)
    total = jnp.sum(powers, axis=-1)
    out = jnp.einsum("banm,bmaf->bnaf", powers.astype(v.dtype), v, preferred_element_type=wide)
    out = out / jnp.swapaxes(total, 1, 2)[..., None]
    log_sum = jnp.swapaxes(jnp.log(total) + highest[..., 0], 1, 2)
    return out.astype(v.dtype), log_sum
