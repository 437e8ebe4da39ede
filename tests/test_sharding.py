"""Mesh, rules and layouts of parameters and activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from nvs_common import errors, sharding


def shapes(**kinds):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in kinds.items()}


def test_minus_one_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh({"data": -1, "tensor": 2})
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2, "context": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"data": 3}, "needs 3 devices, but 8 are here"),
        ({"data": -1, "tensor": 3}, "a multiple of 3 devices"),
        ({"data": -1, "fsdp": -1}, "only one may be -1"),
        ({"data": 0}, "at least 1"),
        ({"model": 8}, r"unknown axes \['model'\]"),
    ],
)
def test_a_mesh_that_does_not_fit_is_explained(axes, words):
    with pytest.raises(errors.InputError, match=words):
        sharding.make_mesh(axes)


def test_every_parameter_takes_the_layout_of_its_row():
    params = {"a": shapes(kernel=(32, 64), bias=(64,)), "b": shapes(kernel=(64, 32))}
    axes = {"a/kernel": ("embed", "mlp"), "a/bias": ("mlp",), "b/.*": ("mlp", None)}
    specs = sharding.param_specs(params, axes, sharding.make_mesh({"fsdp": 4, "tensor": 2}))
    assert specs == {
        "a": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")},
        "b": {"kernel": P("tensor", None)},
    }


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"kernel": ("embed", None)}, r"bias \(4,\) matches no row"),
        ({".*": (None,), "bias": (None,), "k.*": (None, None)}, r"bias .* matches \['\.\*', 'b"),
        ({"kernel": (None, None), "bias": (None,), "scale": ()}, r"match nothing: \['scale'\]"),
        ({"kernel": (None,), "bias": (None,)}, r"kernel \(8, 4\) has another rank"),
        ({"kernel": ("embde", None), "bias": (None,)}, "no rule for the logical axis 'embde'"),
        ({"kernel": ("mlp", "heads"), "bias": (None,)}, r"two dimensions go to axis 'tensor'"),
    ],
)
def test_a_table_that_does_not_match_names_the_parameter(axes, words):
    with pytest.raises(ValueError, match=words):
        sharding.param_specs(shapes(kernel=(8, 4), bias=(4,)), axes)


def test_a_small_parameter_that_does_not_divide_is_replicated_in_that_dimension():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    specs = sharding.param_specs(shapes(rgb=(64, 3)), {"rgb": ("embed", "mlp")}, mesh)
    assert specs == {"rgb": P("fsdp", None)}


def test_a_large_parameter_that_does_not_divide_is_an_error():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    with pytest.raises(errors.InputError, match=r"big \(1024, 65\): dimension 1 .*'tensor'"):
        sharding.param_specs(shapes(big=(1024, 65)), {"big": ("embed", "mlp")}, mesh)


def test_constrain_lays_out_an_activation_and_keeps_its_values():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    x = jnp.arange(32.0).reshape(8, 4)
    with jax.set_mesh(mesh), sharding.axis_rules():
        y = jax.jit(lambda x: sharding.constrain(x * 2, ("act_batch", "act_mlp")))(x)
    assert y.sharding.spec == P(("data", "fsdp"), "tensor")
    np.testing.assert_array_equal(y, x * 2)


def test_constrain_replicates_a_dimension_that_does_not_divide():
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    with jax.set_mesh(mesh), sharding.axis_rules():
        y = jax.jit(lambda x: sharding.constrain(x * 2, ("act_batch", "act_mlp")))(jnp.ones((1, 4)))
    assert y.sharding.shard_shape(y.shape) == (1, 2)


def test_constrain_without_rules_or_mesh_returns_its_argument():
    x = jnp.ones((8, 4))
    assert sharding.constrain(x, ("act_batch", None)) is x
    with sharding.axis_rules():
        assert sharding.constrain(x, ("act_batch", None)) is x
    with jax.set_mesh(sharding.make_mesh({"data": 8})):
        assert sharding.constrain(x, ("act_batch", None)) is x


def test_constrain_needs_a_name_for_each_dimension():
    with jax.set_mesh(sharding.make_mesh({"data": 8})), sharding.axis_rules():
        with pytest.raises(ValueError, match="1 names"):
            sharding.constrain(jnp.ones((8, 4)), ("act_batch",))
