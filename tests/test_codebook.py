"""Quantisers against recorded numbers, and what holds for any codebook."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nvs_common import errors, sharding
from tests import conftest
from vqnerf_jax import FSQ, LFQ, Codebook, code_statistics, codes, lookup_free

FOLDER = conftest.GOLDENS / "vq"
recorded = pytest.mark.skipif(not FOLDER.is_dir(), reason="no recorded numbers beside this")


@functools.cache
def golden(name):
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def close(got, wanted, tolerance=1e-6):
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


@recorded
@pytest.mark.parametrize(("name", "beta_on"), [("legacy", "codebook"), ("fixed", "commitment")])
def test_values_losses_and_gradients_of_both_conventions_are_the_recorded_ones(name, beta_on):
    recorded = golden("vq_op")
    z, weight = (np.moveaxis(recorded[key], 1, -1) for key in ("z", "upstream_weight"))
    module = Codebook(*recorded["codebook"].shape, beta_on=beta_on)

    def loss(embedding, z):
        out = module.apply({"params": {"embedding": embedding}}, z)
        return jnp.sum(out.values * weight) + recorded["loss_scale"] * out.loss, out

    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, out), (of_codes, of_z) = both(recorded["codebook"], z)
    np.testing.assert_array_equal(out.indices, recorded[f"{name}/indices"])
    close(np.moveaxis(out.values, -1, 1), recorded[f"{name}/quantized"])
    close(out.loss, recorded[f"{name}/loss"])
    close(np.moveaxis(of_z, -1, 1), recorded[f"{name}/grad_z"])
    close(of_codes, recorded[f"{name}/grad_codebook"])


def learn(module, state, batches, **apply):
    """Outputs and states of training calls on batches."""

    @jax.jit
    def step(state, z):
        variables = {"codes": {"state": state}}
        out, new = module.apply(variables, z, train=True, mutable=["codes"], **apply)
        return out, new["codes"]["state"]

    for z in batches:
        out, state = step(state, z)
        yield out, state


@recorded
def test_running_means_from_zero_are_the_recorded_ones():
    recorded = golden("vq_variants")
    table = jnp.asarray(recorded["codebook0_dk"].T)
    module = Codebook(*table.shape, update="ema", decay=0.9, keep_unused=False)
    start = code_statistics.start(table, debias=True)
    for i, (out, state) in enumerate(learn(module, start, recorded["x_steps"])):
        prefix = f"haiku/step{i}"
        np.testing.assert_array_equal(out.indices, recorded[f"{prefix}/encoding_indices"])
        close(out.values, recorded[f"{prefix}/quantize"])
        close(out.loss, recorded[f"{prefix}/loss"])
        close(codes.perplexity(out.counts), recorded[f"{prefix}/perplexity"], 3e-6)
        close(state.codes.T, recorded[f"{prefix}/state/embeddings"], 2e-6)
        close(state.counts, recorded[f"{prefix}/state/ema_cluster_size/hidden"])
        close(state.sums.T, recorded[f"{prefix}/state/ema_dw/hidden"])
        assert state.steps == recorded[f"{prefix}/state/ema_dw/counter"]


@recorded
@pytest.mark.parametrize(("name", "distance"), [("vqp_l2", "l2"), ("vqp_cos", "cosine")])
def test_running_means_from_the_codes_are_the_recorded_ones(name, distance):
    recorded = golden("vq_variants")
    table = jnp.asarray(recorded[f"{name}/embed0"])
    module = Codebook(*table.shape, update="ema", decay=0.9, debias=False, distance=distance)
    start = code_statistics.start(table, debias=False)
    for i, (out, state) in enumerate(learn(module, start, recorded["x_steps"][:2])):
        prefix = f"{name}/step{i}"
        np.testing.assert_array_equal(out.indices, recorded[f"{prefix}/indices"])
        close(out.values, recorded[f"{prefix}/quantized"])
        close(out.loss, recorded[f"{prefix}/commit_loss"])
        close(state.codes, recorded[f"{prefix}/embed"], 2e-6)
        close(state.sums, recorded[f"{prefix}/embed_avg"])
        close(state.counts, recorded[f"{prefix}/cluster_size"])


@recorded
def test_the_rotation_and_its_gradient_are_the_recorded_ones():
    recorded = golden("vq_variants")
    source, target, upstream = (recorded[f"rotation/{k}"] for k in ("src", "tgt", "upstream"))
    close(codes.rotate(source, target), recorded["rotation/out"])
    got = jax.grad(lambda z: jnp.sum(codes.rotate(z, target) * upstream))(source)
    close(got, recorded["rotation/grad_src"])


@recorded
@pytest.mark.parametrize("name", ["fsq_8555", "fsq_88655"])
def test_levels_are_the_recorded_ones(name):
    recorded = golden("vq_variants")
    levels = tuple(int(level) for level in recorded[f"{name}/levels"])
    out = FSQ(levels).apply({}, recorded[f"{name}/z"])
    close(out.values, recorded[f"{name}/quantized"])
    np.testing.assert_array_equal(out.indices, recorded[f"{name}/indices"])
    close(FSQ(levels).apply({}, out.indices, method="lookup"), out.values)


@recorded
@pytest.mark.parametrize(("name", "spherical"), [("lfq", False), ("bsq", True)])
def test_signs_entropies_and_gradients_are_the_recorded_ones(name, spherical):
    recorded = {k.partition("/")[2]: x for k, x in golden("vq_variants").items() if name in k}
    module = LFQ(8, spherical, inverse_temperature=float(recorded["inv_temperature"]))

    def loss(z):
        out = module.apply({}, z)
        return out.loss, out

    (value, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(recorded["z"])
    np.testing.assert_array_equal(out.indices, recorded["indices"])
    close(out.values, recorded["quantized"])
    close(module.apply({}, out.indices, method="lookup"), out.values)
    close(value, recorded["aux_loss"], 2e-6)
    close(gradient, recorded["grad_z_of_aux"], 2e-6)
    z = codes.unit(recorded["z"]) if spherical else recorded["z"]
    table = lookup_free.from_sign_indices(jnp.arange(256), 8) * (8**-0.5 if spherical else 1)
    got = lookup_free.entropies(z, table, 10.0)
    close(got.of_each, recorded["per_sample_entropy"], 3e-6)
    close(got.of_all, recorded["batch_entropy"], 3e-6)


def batch(seed=0, n=64, d=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)), jnp.float32)


def test_ties_go_to_the_lowest_index_and_low_precision_flips_no_code():
    table = jnp.asarray([[1.0, 0], [0, 1], [1, 0]])
    assert codes.nearest(jnp.asarray([[2.0, 0]]), table)[0] == 0
    # One part in 10^5 apart: equal in bfloat16.
    table = jnp.asarray([[1.0, 0], [1.00001, 0]])
    assert codes.nearest(jnp.asarray([[2.0, 0]], jnp.bfloat16), table)[0] == 1


def test_a_code_that_was_never_used_stays_where_it_is():
    table = jnp.concatenate([batch(1, n=4), jnp.full((1, 3), 1e3)])
    (_, kept), *_ = learn(
        Codebook(5, 3, update="ema"), code_statistics.start(table, debias=True), [batch()]
    )
    np.testing.assert_array_equal(kept.codes[4], table[4])
    assert jnp.all(jnp.any(kept.codes[:4] != table[:4], axis=1))


@pytest.mark.parametrize("debias", [True, False])
def test_dead_codes_restart_at_vectors_of_the_batch(debias):
    table = jnp.concatenate([batch(1, n=4), jnp.full((3, 3), 1e3)])
    module = Codebook(7, 3, update="ema", restart_below=1.5, debias=debias, decay=0.5)
    state, z = code_statistics.start(table, debias=debias), batch()
    (_, state), *_ = learn(module, state, [z], rngs={"codes": jax.random.key(0)})
    distance = jnp.abs(z[:, None] - state.codes[None]).sum(-1).min(axis=0)
    np.testing.assert_array_equal(distance[4:], 0)
    correction = 0.5 if debias else 1.0
    close(state.counts[4:] / correction, [1.5] * 3)
    close(state.sums[4:], state.codes[4:] * 1.5 * correction)


def test_kmeans_finds_clusters_and_starts_the_codes():
    centres = jnp.asarray([[5.0, 0, 0], [0, 5, 0], [0, 0, 5], [-5, 0, 0]])
    z = jnp.tile(centres, (32, 1)) + 0.01 * batch(n=128)
    found = jax.jit(code_statistics.kmeans, static_argnums=(2, 3))(jax.random.key(3), z, 16, 5)
    assert jnp.abs(centres[:, None] - found[None]).sum(-1).min(axis=1).max() < 0.1
    module = Codebook(16, 3, update="ema", kmeans_steps=5)
    state = code_statistics.start(jnp.zeros((16, 3)), debias=True)
    (out, first), (_, second) = learn(module, state, [z, z], rngs={"codes": jax.random.key(3)})
    assert out.loss < 1e-3 and codes.perplexity(out.counts) > 4
    assert second.steps == 2
    assert jnp.abs(second.codes - first.codes).max() < 0.1


def test_cosine_codes_take_no_notice_of_length():
    module = Codebook(8, 3, distance="cosine")
    variables = module.init(jax.random.key(0), batch())
    short, long = (module.apply(variables, scale * batch()) for scale in (0.1, 30.0))
    np.testing.assert_array_equal(short.indices, long.indices)
    close(jnp.linalg.norm(short.values, axis=-1), np.ones(64))


def test_perplexity_and_usage_count_codes():
    close(codes.perplexity(jnp.asarray([3.0, 3, 3, 0])), 3.0, 1e-5)
    close(codes.usage(jnp.asarray([3.0, 3, 3, 0])), 0.75)


# Eight devices.

TABLE = batch(1, n=24)


def module_for(axis_name):
    return Codebook(
        24, 3, update="ema", restart_below=0.8, kmeans_steps=2, decay=0.7, axis_name=axis_name
    )


def train_three(axis_name, z_steps):
    """State, perplexities and gradients with respect to z [3, n, d] of three training steps."""
    module = module_for(axis_name)

    def step(state, inputs):
        z, key = inputs

        def loss(z):
            (out, state_), *_ = learn(module, state, [z], rngs={"codes": key})
            # A loss that is a mean over the global batch.
            total = out.loss if axis_name is None else jax.lax.pmean(out.loss, axis_name)
            return total, (state_, codes.perplexity(out.counts))

        gradient, (state, perplexity) = jax.grad(loss, has_aux=True)(z)
        return state, (perplexity, gradient)

    state = code_statistics.start(TABLE, debias=True)
    keys = jax.random.split(jax.random.key(0), 3)
    return jax.lax.scan(step, state, (z_steps, keys))


def assert_same_training(got, wanted):
    jax.tree.map(functools.partial(close, tolerance=2e-6), got, wanted)


def steps():
    return jnp.stack([batch(seed, n=64) for seed in range(3)])


def test_eight_devices_under_jit_learn_what_one_learns():
    wanted = jax.jit(functools.partial(train_three, None))(steps())
    mesh = sharding.make_mesh({"data": 8})
    z = jax.device_put(steps(), jax.NamedSharding(mesh, P(None, "data")))
    assert len(z.sharding.device_set) == 8
    assert_same_training(jax.jit(functools.partial(train_three, None))(z), wanted)


def test_eight_devices_under_shard_map_learn_what_one_learns():
    wanted = jax.jit(functools.partial(train_three, None))(steps())
    mesh = sharding.make_mesh({"data": 8})
    mapped = jax.shard_map(
        functools.partial(train_three, "data"),
        mesh=mesh,
        in_specs=P(None, "data"),
        out_specs=(P(), (P(), P(None, "data"))),
    )
    assert_same_training(jax.jit(mapped)(steps()), wanted)


def test_codes_in_shards_give_what_the_whole_table_gives():
    z = batch(n=40)
    table = jnp.concatenate([TABLE, TABLE[:8]])  # ties across devices
    mesh = sharding.make_mesh({"tensor": 8})

    def search(z, shard):
        index = codes.nearest_in_shards(z, shard, "tensor")
        return index, codes.lookup_in_shards(index, shard, "tensor")

    mapped = jax.shard_map(
        search, mesh=mesh, in_specs=(P(), P("tensor")), out_specs=P(), check_vma=False
    )
    index, values = jax.jit(mapped)(z, table)
    np.testing.assert_array_equal(index, codes.nearest(z, table))
    np.testing.assert_array_equal(values, table[index])


def test_the_entropy_of_lookup_free_codes_is_that_of_the_global_batch():
    z = batch(n=64, d=5)
    wanted = jax.jit(lambda z: LFQ(5, inverse_temperature=3.0).apply({}, z))(z)
    module = LFQ(5, inverse_temperature=3.0, axis_name="i")
    mapped = jax.vmap(lambda z: module.apply({}, z), axis_name="i")
    out = jax.jit(mapped)(z.reshape(8, 8, 5))
    close(jnp.mean(out.loss), wanted.loss, 2e-6)
    close(out.counts[0], wanted.counts)


def test_bad_choices_and_widths_are_explained():
    for module, words in [
        (Codebook(8, 3, beta_on="both"), "beta_on='both'"),
        (Codebook(8, 4), "codebook of 8 codes x 4: vectors have 3 numbers"),
        (Codebook(8, 3, restart_below=1.0), "set update='ema'"),
        (FSQ((3, 3)), "give a level for each"),
        (LFQ(8), "LFQ of 8 bits"),
    ]:
        with pytest.raises(errors.InputError, match=words):
            module.init(jax.random.key(0), batch())
