"""The choice of implementations where Quark streams: equal results, and loud refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from nvs_common import errors
from quark_jax import fusion, kernels, one_to_many, one_to_many_tpu
from tests import test_drawing_tpu, test_one_to_many_kernels


def module(**options):
    return fusion.OneToMany(heads=2, query_scale=2.0, **options)


@pytest.fixture(scope="module")
def inputs():
    """A volume [n, l, y, x, c], what it attends to, and who sees what."""
    _, features, uv, valid = test_one_to_many_kernels.case(
        maps=1, grid=(1, 2, 3), image=(4, 5), channels=4
    )
    volume = jax.random.normal(jax.random.key(0), (*valid.shape[1:], 4))
    return volume, one_to_many.Unstored(features, uv), valid


def test_the_module_is_the_same_with_the_kernel(inputs, monkeypatch):
    variables = module().init(jax.random.key(1), *inputs)
    interpreted = functools.partial(one_to_many_tpu.attend, interpret=True)
    monkeypatch.setattr(one_to_many_tpu, "attend", interpreted)
    plain, fused = (
        jax.jit(module(implementation=name).apply)(variables, *inputs) for name in ("xla", "tpu")
    )
    assert not np.allclose(plain, inputs[0], atol=1e-3)
    np.testing.assert_allclose(plain, fused, atol=1e-5)


def test_what_an_implementation_does_not_support_is_an_error(inputs):
    volume, delta, valid = inputs
    variables = module().init(jax.random.key(1), *inputs)
    stored = jnp.zeros((*valid.shape, 4))
    with pytest.raises(NotImplementedError, match="streaming"):
        module(implementation="tpu").apply(variables, volume, stored, valid)
    with pytest.raises(NotImplementedError, match="folded"):
        module(implementation="tpu", folded=False).init(jax.random.key(1), *inputs)
    with pytest.raises(errors.InputError, match="cuda"):
        module(implementation="cuda").apply(variables, *inputs)
    with pytest.raises(errors.InputError, match="cuda"):
        kernels.draw(*test_drawing_tpu.world(), implementation="cuda")
    # A kernel for TPUs is no program for this machine.
    with pytest.raises(ValueError, match="interpret"):
        module(implementation="tpu").apply(variables, *inputs)


def test_a_kernel_is_not_divided_over_a_mesh_behind_its_back():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    world = test_drawing_tpu.world()
    with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match="shard_map"):
        kernels.draw(*world, implementation="tpu")
    assert jax.eval_shape(kernels.draw, *world).images.shape == (11, 150, 3)
