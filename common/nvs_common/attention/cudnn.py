"""NVIDIA's fused attention through `jax.nn.dot_product_attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nvs_common.types import Array

_DTYPES = (jnp.bfloat16, jnp.float16)


def supports(dtype: jax.typing.DTypeLike) -> bool:
    """Whether the default device is an NVIDIA GPU and the kernel exists for the type."""
    return jnp.dtype(dtype) in map(jnp.dtype, _DTYPES) and jax.default_backend() == "gpu"


def attention(
    q: Array, k: Array, v: Array, *, scale: float, need_log_sum: bool
) -> tuple[Array, None]:
    """See `nvs_common.attention.attention`.

    Raises:
      NotImplementedError: another device, type or size than the kernel's, or the denominator is
        needed: the kernel has no gradient for it.
    """
    if jax.default_backend() != "gpu":
        raise NotImplementedError(
            f"attention implementation 'cudnn' needs an NVIDIA GPU, the default device is "
            f"{jax.default_backend()!r}; use 'xla' or None."
        )
    if q.dtype not in map(jnp.dtype, _DTYPES):
        raise NotImplementedError(
            f"attention implementation 'cudnn' needs bfloat16 or float16, not {q.dtype}; use "
            "'xla' or None."
        )
    if need_log_sum:
        raise NotImplementedError(
            "attention implementation 'cudnn' has no gradient of the softmax's denominator, which "
            "attention in parts needs; use 'xla' or None."
        )
    try:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn"), None
    except jax.errors.JaxRuntimeError:
        raise  # the device's own, such as too little memory: another implementation is no answer
    except RuntimeError as e:  # NotImplementedError, for sizes, is one
        raise NotImplementedError(f"attention implementation 'cudnn': {e}") from e
