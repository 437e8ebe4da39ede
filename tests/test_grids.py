"""Grids of features: values, gradients, and fields that have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvs_common import errors
from vqnerf_jax import SDFField, grids, neus_to_torch


def linear(size):
    """A grid that holds x + 2 y + 3 z and a constant."""
    axis = np.linspace(-1, 1, size)
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    return jnp.asarray(np.stack([x + 2 * y + 3 * z, np.full_like(x, 0.5)], -1), jnp.float32)


def test_linear_functions_are_read_exactly_with_their_gradients():
    made = {"level_0": linear(4), "level_1": linear(7)}
    points = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (5, 3, 3)), jnp.float32)
    # Parameters off a device are NumPy arrays.
    found = jax.jit(lambda p: grids.lookup(jax.tree.map(np.asarray, made), p))(points)
    wanted = points @ jnp.asarray([1.0, 2, 3])
    assert found.shape == (5, 3, 4)
    for channel, value in enumerate((wanted, 0.5, wanted, 0.5)):
        np.testing.assert_allclose(found[..., channel], jnp.broadcast_to(value, (5, 3)), atol=1e-5)
    slope = jax.grad(lambda p: grids.lookup(made, p)[..., 0].sum())(points)
    np.testing.assert_allclose(
        slope, jnp.broadcast_to(jnp.asarray([1.0, 2, 3]), (5, 3, 3)), rtol=1e-4
    )


def test_the_border_is_continued():
    made = {"level_0": linear(4)}
    ends = grids.lookup(
        made, jnp.asarray([[1.0, 1, 1], [3.0, 1, 1], [-1.0, -1, -1], [-9.0, -1, -1]])
    )
    np.testing.assert_allclose(ends[:, 0], [6, 6, -6, -6], atol=1e-5)


def test_gradients_of_the_grid_are_the_weights_of_its_corners():
    made = {"level_0": jnp.zeros((3, 3, 3, 1))}
    point = jnp.asarray([[-0.75, -1.0, 0.0]])
    got = jax.grad(lambda g: grids.lookup(g, point).sum())(made)["level_0"][..., 0]
    wanted = np.zeros((3, 3, 3))
    wanted[0, 0, 1], wanted[1, 0, 1] = 0.75, 0.25
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_fields_with_grids_start_as_a_sphere_and_learn_through_gradients():
    module = SDFField(layers=1, hidden=128, features=3, octaves=0, skips=(), grids=(4, 8))
    point = jnp.zeros((1, 3))
    # Without rendering, of which the distance needs nothing.
    variables = jax.jit(lambda: module.init(jax.random.key(0), point, method="sdf"))()
    points = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)) * 0.4, jnp.float32)
    found = jax.jit(lambda v: module.apply(v, points, method="sdf"))(variables)
    wanted = jnp.linalg.norm(points, axis=-1) - module.radius
    assert np.corrcoef(found, wanted)[0, 1] > 0.85

    def eikonal(params):
        slope = module.apply({"params": params}, points, method="gradients")
        return jnp.mean(jnp.square(jnp.linalg.norm(slope, axis=-1) - 1))

    params = variables["params"]
    # At first the network ignores the grids: it learns to read them before they learn.
    first = params["sdf"]["layer_0"]["kernel"].at[3:].set(0.1)
    layer = {**params["sdf"]["layer_0"], "kernel": first}
    params = {**params, "sdf": {**params["sdf"], "layer_0": layer}}
    slopes = jax.jit(jax.grad(eikonal))(params)
    for level in slopes["grids"].values():
        assert jnp.isfinite(level).all() and jnp.any(level != 0)
    with pytest.raises(errors.InputError, match=r"grids=\(4, 8\): NeuS has"):
        neus_to_torch(module, variables)
