"""Attention as it is defined: the specification that every implementation is compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nvs_common.types import Array


def attention(
    q: Array, k: Array, v: Array, *, scale: float, need_log_sum: bool = True
) -> tuple[Array, Array]:
    """softmax(scale q k^T) v with the whole matrix of logits, in float32 or wider.

    Args:
      q: [b, n, a, f].
      k: [b, m, a, f].
      v: [b, m, a, f].
      scale: factor on the logits.
      need_log_sum: both results are always given.

    Returns:
      [b, n, a, f] of the type of q, and the logarithm of each softmax's denominator, [b, n, a].
    """
    del need_log_sum
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v_wide = (x.astype(wide) for x in (q, k, v))
    logits = scale * jnp.einsum("bnaf,bmaf->banm", q, k, precision="highest")
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - log_sum[..., None])
    out = jnp.einsum("banm,bmaf->bnaf", weights, v_wide, precision="highest")
    return out.astype(v.dtype), jnp.swapaxes(log_sum, 1, 2)
