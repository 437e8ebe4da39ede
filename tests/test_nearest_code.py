"""Nearest codes: every implementation against the definition and float64, and ties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from nvs_common import errors
from tests import accelerators, kernel_races
from vqnerf_jax import nearest, nearest_tpu


def tpu(z, codes):
    return nearest.Nearest(*nearest_tpu.search(z, codes, interpret=True))


IMPLEMENTATIONS = {
    "tpu": jax.jit(tpu),
    "xla": jax.jit(nearest.in_tiles),
    "small tiles": jax.jit(functools.partial(nearest.in_tiles, tile=(5, 4))),
    "reference": jax.jit(nearest.reference),
}
# (n, k, d): one of each, odd ones, several blocks of the kernel's grid.
SHAPES = [(1, 1, 1), (37, 11, 3), (1100, 2100, 5)]
every = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_no_code_is_nearer_than_the_one_found(name, shape):
    n, k, d = shape
    z, codes = normal((n, d)), normal((k, d), 1)
    found = jax.tree.map(np.asarray, IMPLEMENTATIONS[name](z, codes))
    wide, table = z.astype(np.float64), codes.astype(np.float64)
    distances = np.square(table).sum(-1) - 2 * wide @ table.T
    least = distances.min(-1)
    np.testing.assert_allclose(found.distances, least, atol=2e-5)
    chosen = np.take_along_axis(distances, found.indices[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(chosen, least, atol=2e-5)
    assert np.mean(found.indices == distances.argmin(-1)) > 0.999
    again = IMPLEMENTATIONS[name](z, codes)
    np.testing.assert_array_equal(found.indices, again.indices)
    np.testing.assert_array_equal(found.distances, again.distances)


@every
def test_the_lowest_index_wins_every_tie(name):
    # Whole numbers: distances are exact, and many of them are equal.
    rng = np.random.default_rng(0)
    z = rng.integers(-2, 3, size=(300, 3)).astype(np.float32)
    codes = rng.integers(-2, 3, size=(400, 3)).astype(np.float32)
    distances = np.square(codes).sum(-1) - 2 * z @ codes.T
    assert np.mean((distances == distances.min(-1, keepdims=True)).sum(-1) > 1) > 0.8
    found = IMPLEMENTATIONS[name](z, codes)
    np.testing.assert_array_equal(found.indices, distances.argmin(-1))


@every
def test_what_no_code_is_near_to_has_an_index_of_the_table(name):
    z = np.full((3, 4), np.nan, np.float32)
    found = IMPLEMENTATIONS[name](z, normal((5, 4)))
    assert np.all((found.indices >= 0) & (found.indices < 5))


def test_the_kernel_reads_nothing_that_another_step_writes():
    z, codes = normal((300, 5)), normal((300, 5), 1)
    index, _ = nearest_tpu.search(z, codes, interpret=kernel_races.DETECT)
    jax.block_until_ready(index)
    assert not kernel_races.found()
    np.testing.assert_array_equal(index, nearest.reference(z, codes).indices)


def test_no_implementation_holds_all_distances_but_the_definition():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5000, 16), (1024, 16))]
    whole, tiles = (
        jax.jit(f).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
        for f in (nearest.reference, nearest.in_tiles)
    )
    assert tiles < whole / 10, (tiles, whole)


def test_vectors_divided_over_devices_have_the_same_codes():
    z, codes = normal((64, 5)), normal((300, 5), 1)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        divided = jax.device_put(z, jax.NamedSharding(mesh, P("data")))
        compiled = jax.jit(nearest.search).lower(divided, codes).compile()
        np.testing.assert_array_equal(
            compiled(divided, codes).indices, nearest.reference(z, codes).indices
        )
        with pytest.raises(NotImplementedError, match="shard_map"):
            nearest.search(divided, codes, implementation="tpu")
    assert "all-gather" not in compiled.as_text()


def test_gradients_pass_by():
    def loss(z):
        found = nearest.search(z, normal((300, 5), 1))
        return jnp.sum(found.distances)

    assert not np.any(jax.grad(loss)(jnp.ones((7, 5))))


def test_what_is_not_supported_is_an_error():
    z = normal((4, 2))
    with pytest.raises(errors.InputError, match="cuda"):
        nearest.search(z, z, implementation="cuda")
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float32"):
        nearest.search(z.astype(np.float64), z, implementation="tpu")


def test_float64_stays_float64(x64):
    z, codes = normal((9, 2)).astype(np.float64), normal((7, 2), 1)
    found = nearest.search(z, codes)
    assert found.distances.dtype == np.float64
    np.testing.assert_array_equal(found.indices, nearest.reference(z, codes).indices)


@pytest.mark.aot
@pytest.mark.parametrize("chip", accelerators.TPUS)
def test_the_kernel_compiles_for(chip):
    shapes = accelerators.shape(1500, 16), accelerators.shape(2048, 16)
    compiled = accelerators.compile_for(chip, nearest_tpu.search, *shapes)
    assert "tpu_custom_call" in compiled.as_text()
    # 12 MiB of distances are not there.
    assert accelerators.temporaries(compiled) < 3 * 2**20


def test_the_kernel_is_lowered_without_a_compiler():
    shapes = accelerators.shape(300, 3), accelerators.shape(70, 3)
    assert "tpu_custom_call" in accelerators.lower_for_tpu(nearest_tpu.search, *shapes)
