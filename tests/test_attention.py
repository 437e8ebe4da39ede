"""Attention: every implementation against the definition in float64, whole and in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvs_common import attention, errors
from nvs_common.attention import chunked, reference

# b, n, m, a, f: one token, no multiples of anything, more keys than queries and the reverse.
SHAPES = [(1, 1, 1, 1, 4), (2, 7, 13, 3, 8), (1, 33, 5, 2, 16), (2, 24, 24, 1, 8)]


def arrays(b, n, m, a, f, dtype=jnp.float64):
    rng = np.random.default_rng(n * 100 + m)
    shapes = [(b, n, a, f), (b, m, a, f), (b, m, a, f)]
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return 3 * q, k, v


def plain(q, k, v, scale):
    """The definition in NumPy's float64: out and the logarithm of the denominators."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = scale * np.einsum("bnaf,bmaf->bnam", q, k)
    powers = np.exp(logits)
    total = powers.sum(-1)
    return np.einsum("bnam,bmaf->bnaf", powers / total[..., None], v), np.log(total)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_definition(x64, shape):
    q, k, v = arrays(*shape)
    got = reference.attention(q, k, v, scale=0.7)
    for x, wanted in zip(got, plain(q, k, v, 0.7), strict=True):
        np.testing.assert_allclose(x, wanted, rtol=1e-12, atol=1e-12)


def sum_of(function, q, k, v):
    """A number that depends on every result, denominators too."""
    out, log_sum = function(q, k, v)
    weights = [jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in (out, log_sum)]
    return jnp.sum(out * weights[0]) + jnp.sum(jnp.square(log_sum) * weights[1])


@pytest.mark.parametrize(
    ("shape", "side"), [*((shape, 4) for shape in SHAPES), (SHAPES[1], 1), (SHAPES[2], 64)]
)
def test_tiles_of_any_size_give_the_same_values_and_gradients(x64, shape, side):
    inputs = arrays(*shape)
    tiled = functools.partial(chunked.tiled, scale=0.7, side=side)
    wanted = functools.partial(reference.attention, scale=0.7)

    @functools.partial(jax.jit, static_argnums=0)
    def both(function, *inputs):
        return function(*inputs), jax.grad(functools.partial(sum_of, function), (0, 1, 2))(*inputs)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12),
        both(tiled, *inputs),
        both(wanted, *inputs),
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["xla", "reference", None])
def test_values_and_gradients_are_near_those_of_float64(name, dtype):
    inputs = arrays(2, 24, 40, 3, 8, jnp.float32)
    low = tuple(x.astype(dtype) for x in inputs)

    def loss(q, k, v, name):
        out = attention.attention(q, k, v, implementation=name)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    got = attention.attention(*low, implementation=name)
    assert got.dtype == dtype
    grads = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)(*low, name)
    with jax.enable_x64(True):
        exact = tuple(jnp.asarray(np.asarray(x, np.float64)) for x in low)
        wanted = plain(*exact, 8**-0.5)[0]
        wanted_grads = jax.grad(
            lambda *x: jnp.sum(jnp.sin(reference.attention(*x, scale=8**-0.5)[0])), (0, 1, 2)
        )(*exact)
    tolerance = 2e-6 if dtype == jnp.float32 else 3e-2
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=0, atol=tolerance)
    for x, y in zip(grads, wanted_grads, strict=True):
        assert x.dtype == dtype
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=4 * tolerance)


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_parts_merge_to_the_whole_with_their_gradients(x64, name):
    q, k, v = arrays(2, 7, 13, 3, 8)

    def in_parts(q, k, v):
        cuts = [slice(0, 4), slice(4, 5), slice(5, 13)]
        parts = [
            attention.with_log_sum(q, k[:, cut], v[:, cut], implementation=name) for cut in cuts
        ]
        return attention.merge(parts)

    whole = functools.partial(attention.attention, implementation="reference")
    np.testing.assert_allclose(in_parts(q, k, v), whole(q, k, v), rtol=1e-12)

    def grads(function):
        loss = lambda *x: jnp.sum(jnp.sin(function(*x)))  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for x, wanted in zip(grads(in_parts), grads(whole), strict=True):
        np.testing.assert_allclose(x, wanted, rtol=1e-10, atol=1e-13)


def test_large_logits_and_many_tiles_stay_finite():
    q, k, v = arrays(1, 16, 16, 1, 8, jnp.float32)
    grads = jax.grad(lambda *x: jnp.sum(chunked.tiled(*x, 200.0, 4)[0]), (0, 1, 2))(q, k, v)
    assert all(np.isfinite(x).all() for x in grads)
    low = attention.attention(q, k, v, scale=200.0)
    # The definition overflows: its greatest logit alone is left.
    assert np.isfinite(low).all() and np.abs(low).max() <= np.abs(v).max()


def test_a_long_sequence_is_never_held_as_one_matrix():
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(attention.attention(q, k, v, implementation="xla"))

    for function in (loss, jax.grad(loss, (0, 1, 2))):
        planned = jax.jit(function).lower(shape, shape, shape).compile().memory_analysis()
        assert planned.temp_size_in_bytes < 4096 * 4096  # a quarter of one matrix of float32


def test_twice_the_same_is_bit_equal():
    inputs = arrays(2, 24, 40, 3, 8, jnp.float32)
    loss = jax.jit(jax.grad(lambda *x: jnp.sum(chunked.tiled(*x, 0.3, 8)[0] ** 2), (0, 1, 2)))
    jax.tree.map(np.testing.assert_array_equal, loss(*inputs), loss(*inputs))


def test_a_named_implementation_fails_loudly():
    q, k, v = arrays(1, 4, 4, 1, 8, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="'cudnn' needs an NVIDIA GPU.*'cpu'"):
        attention.attention(q, k, v, implementation="cudnn")
    with pytest.raises(errors.InputError, match="'flash' is unknown; choose one of"):
        attention.attention(q, k, v, implementation="flash")
    assert attention.merges(None, jnp.bfloat16) and not attention.merges("cudnn", jnp.bfloat16)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = arrays(1, 4, 4, 2, 8, jnp.float32)
    for bad in [(q[:, :, :1], k, v), (q, k[:, :3], v), (q[0], k[0], v[0]), (q, k[..., :4], v)]:
        with pytest.raises(AssertionError):
            attention.attention(*bad)
