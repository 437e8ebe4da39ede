"""LVSM's blocks where the kernel of attention normalises queries and keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lvsm_jax import blocks
from nvs_common import attention


def layer(width, head_size):
    """Parameters of one layer, whose norms are no ones."""
    params = blocks.only(blocks.init(jax.random.key(0), 1, width, head_size, 2 * width, True))
    scales = np.linspace(0.5, 1.5, head_size, dtype=np.float32)
    return {**params, "query_norm": {"scale": scales}, "key_norm": {"scale": scales[::-1].copy()}}


def loss(setting, keep, params, x):
    return jnp.sum(jnp.sin(10 * blocks.block(params, x, setting, keep=keep)))


@pytest.mark.thorough
def test_a_block_is_the_same_with_norms_in_the_kernel():
    params, x = layer(64, 32), jax.random.normal(jax.random.key(1), (1, 20, 64))
    assert attention.fuses_norm("pallas_tpu") and not attention.fuses_norm(None)

    def gradients(name):
        setting = blocks.Setting(attention=name)
        return jax.jit(jax.value_and_grad(functools.partial(loss, setting, slice(5, None)), (0, 1)))

    with pltpu.force_tpu_interpret_mode():
        got = gradients("pallas_tpu")(params, x)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        got,
        gradients("xla")(params, x),
    )
