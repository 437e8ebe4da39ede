"""One-to-many attention in kernels that gather: values and gradients of the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quark_jax import one_to_many, one_to_many_gpu, one_to_many_tpu
from tests import accelerators, kernel_races

SCALE = 0.7


def case(maps=2, views=2, grid=(2, 5, 7), image=(9, 140), heads=2, channels=3, seed=0):
    """Queries, features, scattered positions (some outside) and who sees what (some nobody)."""
    rng = np.random.default_rng(seed)
    elements = (maps, *grid)
    query = rng.normal(size=(*elements, heads, channels))
    features = rng.normal(size=(views, maps, *image, channels))
    uv = rng.uniform(-0.2, 1.2, size=(views, *elements, 2))
    valid = rng.uniform(size=(views, *elements)) > 0.4
    valid[:, :, 0, 0] = False
    query, features, uv = (jnp.asarray(x, jnp.float32) for x in (query, features, uv))
    return query, features, uv, jnp.asarray(valid)


def plain(query, features, uv, valid):
    return one_to_many.attend_unstored(query, one_to_many.Unstored(features, uv), valid, SCALE)


def fused(query, features, uv, valid, interpret=True):
    delta = one_to_many.Unstored(features, uv)
    return one_to_many_tpu.attend(query, delta, valid, SCALE, interpret=interpret)


def on_gpu(query, features, uv, valid, interpret=True):
    delta = one_to_many.Unstored(features, uv)
    return one_to_many_gpu.attend(query, delta, valid, SCALE, interpret=interpret)


def exact(query, features, uv, valid):
    """The definition in float64."""
    with jax.enable_x64(True):
        args = [np.asarray(x, np.float64) for x in (query, features, uv)]
        return np.asarray(jax.jit(plain)(*args, np.asarray(valid)))


@pytest.mark.parametrize(
    "shape",
    [
        dict(maps=2, grid=(1, 5, 7)),
        dict(maps=1, views=3, grid=(1, 9, 130), image=(6, 5), heads=1, channels=4),
    ],
    ids=["small windows", "several tiles"],
)
def test_values_are_those_of_the_plain_form(shape, monkeypatch):
    monkeypatch.setattr(one_to_many_tpu, "TILE", (8, 128))
    monkeypatch.setattr(one_to_many_tpu, "WINDOW", (8, 128))
    args = case(**shape)
    got = jax.jit(fused)(*args)
    # Positions in pixels are rounded to float32, and the features are noise.
    np.testing.assert_allclose(got, exact(*args), atol=2e-4)
    np.testing.assert_array_equal(got, jax.jit(fused)(*args))


@pytest.mark.parametrize("heads", [1, 3])
def test_values_on_a_gpu_are_those_of_the_plain_form(heads):
    args = case(maps=2, views=3, grid=(2, 5, 7), image=(6, 5), heads=heads, channels=4)
    got = jax.jit(on_gpu)(*args)
    np.testing.assert_allclose(got, exact(*args), atol=2e-5)
    np.testing.assert_array_equal(got, jax.jit(on_gpu)(*args))


def gradients(function, args):
    """Of queries, features and positions."""

    def loss(*floats):
        return jnp.sum(jnp.sin(function(*floats, args[3])))

    return jax.grad(loss, argnums=(0, 1, 2))(*args[:3])


def exact_gradients(args):
    """Those of the definition in float64."""
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in args[:3]]
        run = jax.jit(lambda *floats: gradients(plain, (*floats, np.asarray(args[3]))))
        return [np.asarray(x) for x in run(*wide)]


def same_gradients(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        # Positions in pixels are rounded to float32, and the features are noise.
        np.testing.assert_allclose(one, other, atol=2e-5 * max(np.abs(other).max(), 1))


def at_edges(args):
    """Positions on pixel centres and where samples begin, and a view that sees nothing."""
    query, features, uv, valid = args
    height, width = features.shape[2:4]
    uv = uv.at[0, :, 0, 0].set(jnp.array([-0.5 / width, 0.5]))
    uv = uv.at[0, :, 0, 1].set(jnp.array([1 - 0.5 / width, 0.5 / height]))
    return query, features, uv.at[1].add(3.0), valid.at[1].set(False)


@pytest.mark.parametrize(
    "shape",
    [
        dict(maps=2, views=1, grid=(2, 3, 5), image=(9, 140)),
        dict(maps=1, views=3, grid=(1, 9, 130), image=(9, 5), heads=1),
    ],
    ids=["small windows, one view", "ragged tiles, three views"],
)
def test_gradients_are_those_of_the_plain_form(shape, monkeypatch):
    monkeypatch.setattr(one_to_many_tpu, "TILE", (8, 128))
    monkeypatch.setattr(one_to_many_tpu, "WINDOW", (8, 128))
    args = case(**shape)
    run = jax.jit(lambda *floats: gradients(fused, (*floats, args[3])))
    got = run(*args[:3])
    same_gradients(got, exact_gradients(args))
    assert np.any(got[1]) and np.any(got[2])
    assert all(map(np.array_equal, got, run(*args[:3])))


def test_gradients_at_edges_are_those_of_the_plain_form():
    # Sizes that are powers of two: positions are exact.
    args = at_edges(case(maps=1, grid=(1, 2, 3), image=(8, 4)))
    got = jax.jit(lambda *floats: gradients(fused, (*floats, args[3])))(*args[:3])
    same_gradients(got, exact_gradients(args))
    assert not np.any(got[1][1]) and not np.any(got[2][1])


def test_copies_and_steps_do_not_race():
    query, features, uv, valid = case(maps=1, views=2, grid=(1, 2, 3), image=(4, 5), heads=1)

    def forward(*floats):
        return fused(*floats, valid, interpret=kernel_races.DETECT)

    got, backward = jax.vjp(forward, query, features, uv)
    jax.block_until_ready(got)
    assert not kernel_races.found()
    np.testing.assert_allclose(got, exact(query, features, uv, valid), atol=2e-5)

    moved = backward(jnp.cos(got))
    jax.block_until_ready(moved)
    assert not kernel_races.found()
    same_gradients(moved, exact_gradients((query, features, uv, valid)))


def test_other_types_are_an_error():
    query, features, uv, valid = case()
    with pytest.raises(NotImplementedError, match="float32"):
        fused(query.astype(jnp.bfloat16), features, uv, valid)
    with pytest.raises(NotImplementedError, match="float32"):
        on_gpu(query, features.astype(jnp.bfloat16), uv, valid)
    with pytest.raises(NotImplementedError, match="power of two"):
        on_gpu(query, features, uv, valid)


@pytest.mark.aot
@pytest.mark.parametrize("chip", accelerators.TPUS)
def test_the_kernels_compile_for(chip):
    shapes = jax.eval_shape(
        lambda: case(maps=1, views=8, grid=(3, 24, 256), image=(20, 125), heads=1, channels=32)
    )
    kernel = functools.partial(fused, interpret=False)
    delta = 8 * 3 * 24 * 256 * 32 * 4
    forward = accelerators.compile_for(chip, kernel, *shapes)
    assert "tpu_custom_call" in forward.as_text()
    assert accelerators.temporaries(forward) < delta / 2

    both = accelerators.compile_for(chip, lambda *args: gradients(kernel, args), *shapes)
    assert "one_to_many_backward" in both.as_text()
    assert accelerators.temporaries(both) < delta


@pytest.mark.aot
@pytest.mark.parametrize("chip", accelerators.TPUS)
def test_kernels_for_odd_channels_and_heads_compile_for(chip):
    shapes = jax.eval_shape(lambda: case(maps=1, grid=(1, 9, 130), heads=2, channels=3))
    kernel = functools.partial(fused, interpret=False)
    both = accelerators.compile_for(chip, lambda *args: gradients(kernel, args), *shapes)
    assert "one_to_many_backward" in both.as_text()


@pytest.mark.aot
@pytest.mark.parametrize("chip", accelerators.GPUS)
def test_the_kernel_for_gpus_compiles_for(chip):
    shapes = jax.eval_shape(
        lambda: case(maps=1, views=4, grid=(3, 24, 300), image=(40, 250), heads=1, channels=32)
    )
    compiled = accelerators.compile_for(chip, functools.partial(on_gpu, interpret=False), *shapes)
    delta = 4 * 3 * 24 * 300 * 32 * 4
    assert accelerators.temporaries(compiled) < delta
