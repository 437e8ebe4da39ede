"""LVSM in other people's code: what importing loads, NNX, Equinox, meshes of either kind."""

import os
import subprocess
import sys

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.nnx import bridge
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lvsm_jax import model
from nvs_common import sharding
from tests import conftest, small_lvsm


@pytest.fixture(scope="module")
def made():
    """A module, its variables, views and what it renders."""
    module = small_lvsm.decoder_only(layers=2)
    arguments = small_lvsm.views(), small_lvsm.cameras((2, 1))
    variables = small_lvsm.variables(module)
    return module, variables, arguments, jax.jit(module.apply)(variables, *arguments)


def test_importing_loads_no_training_library():
    code = "import sys, lvsm_jax; print(*{name.partition('.')[0] for name in sys.modules})"
    path = os.pathsep.join([str(conftest.ROOT), str(conftest.ROOT / "common")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    loaded = set(done.stdout.decode().split())
    assert {"lvsm_jax", "nvs_common", "jax", "flax", "einops", "chex"} <= loaded
    unwanted = {"orbax", "grain", "tensorflow", "optax", "clu", "safetensors", "PIL", "torch"}
    assert not loaded & unwanted


@pytest.mark.thorough
def test_nnx_bridges_to_it(made):
    module, variables, arguments, wanted = made
    bridged = bridge.ToNNX(module, rngs=flax.nnx.Rngs(0))
    bridge.lazy_init(bridged, *arguments)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    state = flax.nnx.to_pure_dict(flax.nnx.state(bridged, flax.nnx.Param))
    assert jax.tree.map(jnp.shape, {name: state[name] for name in shapes}) == shapes
    flax.nnx.update(bridged, flax.nnx.State(state | dict(variables["params"])))
    np.testing.assert_allclose(bridged(*arguments), wanted, rtol=0, atol=1e-6)


def test_equinox_holds_it_and_takes_its_gradient(made):
    equinox = pytest.importorskip("equinox", reason="equinox is not installed")
    module, variables, arguments, wanted = made

    class Scaled(equinox.Module):
        variables: dict
        gain: jax.Array

        def __call__(self, *arguments):
            return self.gain * module.apply(self.variables, *arguments)

    scaled = Scaled(jax.tree.map(jnp.asarray, variables), jnp.float32(2))
    np.testing.assert_allclose(equinox.filter_jit(scaled)(*arguments), 2 * wanted, atol=1e-6)
    gradient = equinox.filter_jit(equinox.filter_grad(lambda m: jnp.sum(m(*arguments))))(scaled)
    np.testing.assert_allclose(gradient.gain, jnp.sum(wanted), rtol=1e-5)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient.variables))


def test_an_explicit_mesh_takes_it_through_auto_axes(made):
    module, variables, arguments, wanted = made
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    rules = dict.fromkeys(sharding.RULES, None) | {"heads": "tensor", "mlp": "tensor"}
    specs = sharding.param_specs(variables["params"], model.PARAM_AXES, mesh, rules)
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
            variables["params"],
            specs,
        )
        split = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), arguments)
        apply = jax.sharding.auto_axes(module.apply, out_sharding=P("data"))
        got = jax.jit(apply)({"params": params}, *split)
        assert got.sharding.spec[0] == "data"
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)
