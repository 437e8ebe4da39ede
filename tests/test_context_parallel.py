"""Attention over tokens split over a mesh axis equals that of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvs_common import attention, errors, sharding
from nvs_common.attention import context_parallel


def arrays(b=2, n=24, m=40, a=2, f=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(b, n, a, f), (b, m, a, f), (b, m, a, f)]
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def values_and_gradients(function, inputs):
    loss = lambda *x: jnp.sum(jnp.sin(3 * function(*x)))  # noqa: E731
    return jax.jit(lambda *x: (function(*x), jax.grad(loss, (0, 1, 2))(*x)))(*inputs)


@pytest.mark.parametrize("exchange", ["ring", "gather"])
@pytest.mark.parametrize("axes", [{"context": 8}, {"context": 2, "data": 2, "tensor": 2}], ids=str)
def test_split_tokens_give_the_values_and_gradients_of_one_device(x64, exchange, axes):
    inputs = arrays(dtype=jnp.float64)
    mesh = sharding.make_mesh(axes)
    split = functools.partial(context_parallel.context_parallel, mesh=mesh, exchange=exchange)
    whole = functools.partial(attention.attention, implementation="reference")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12),
        values_and_gradients(split, inputs),
        values_and_gradients(whole, inputs),
    )


def test_a_ring_of_one_device_needs_no_neighbour():
    inputs = arrays()
    mesh = sharding.make_mesh({"context": 1}, jax.devices()[:1])
    ring = functools.partial(context_parallel.context_parallel, mesh=mesh, exchange="ring")
    wanted = jax.jit(attention.attention)(*inputs)
    np.testing.assert_allclose(jax.jit(ring)(*inputs), wanted, rtol=1e-5, atol=1e-6)


def test_the_ring_sends_neighbours_what_the_gather_collects():
    mesh = sharding.make_mesh({"context": 8})
    text = {}
    for exchange in ("ring", "gather"):
        split = functools.partial(context_parallel.context_parallel, mesh=mesh, exchange=exchange)
        text[exchange] = jax.jit(split).lower(*arrays()).compile().as_text()
    assert "collective-permute" in text["ring"] and "all-gather" not in text["ring"]
    assert "all-gather" in text["gather"] and "collective-permute" not in text["gather"]


@pytest.mark.parametrize(
    ("tokens", "kind", "wanted"),
    [
        (2048, "TPU v5 lite", "gather"),
        (4096, "TPU v5 lite", "ring"),
        (4096, "TPU v6 lite", "gather"),
        (8192, "TPU v6 lite", "ring"),
        (1024, "NVIDIA H100 80GB HBM3", "gather"),
    ],
)
def test_the_exchange_follows_from_sizes_and_rates(tokens, kind, wanted):
    part = jax.ShapeDtypeStruct((1, tokens, 12, 64), jnp.bfloat16)
    assert context_parallel.choose(part, part, 8, kind) == wanted
    assert context_parallel.choose(part, part, 1, kind) == "gather"
    many = jax.ShapeDtypeStruct((64, tokens, 12, 64), jnp.bfloat16)
    assert context_parallel.choose(many, many, 8, kind) == "ring"  # too much to hold


def test_what_cannot_be_split_is_said():
    mesh = sharding.make_mesh({"context": 8})
    q, k, v = arrays()
    with pytest.raises(errors.InputError, match="23 queries and 40 keys must be multiples of 8"):
        context_parallel.context_parallel(q[:, 1:], k, v, mesh)
    with pytest.raises(errors.InputError, match="exchange 'star' is unknown"):
        context_parallel.context_parallel(q, k, v, mesh, exchange="star")
    with pytest.raises(NotImplementedError, match="'cudnn' is not one of those the ring has"):
        context_parallel.context_parallel(q, k, v, mesh, exchange="ring", implementation="cudnn")
