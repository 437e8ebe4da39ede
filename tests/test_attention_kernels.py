"""Kernels of attention: the definition's values and gradients, no races, and chips they fit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from nvs_common import attention, errors
from nvs_common.attention import packed as packing
from nvs_common.attention import pallas_gpu, pallas_tpu
from tests import accelerators

SCALE, EPSILON = 0.3, 1e-5
KERNELS = {"pallas_tpu": pallas_tpu.attention, "pallas_gpu": pallas_gpu.attention}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes b, n, m, a, f and what is asked for."""

    sizes: tuple[int, int, int, int, int]
    normed: bool = True
    packed: packing.Packed | None = None
    dtype: type = jnp.float32
    kernel: str = "pallas_tpu"


RAGGED = Case((1, 130, 200, 2, 32))
PACKED = Case((1, 300, 300, 1, 32), packed=packing.Packed(100, 100))
CACHED = Case((2, 140, 240, 1, 48), packed=packing.Packed(100, 70), dtype=jnp.bfloat16)
ON_GPU = Case((1, 70, 130, 2, 32), kernel="pallas_gpu")
SWEEP = [
    Case((1, 1, 1, 1, 32)),
    Case((2, 5, 300, 3, 64), normed=False),
    Case((1, 257, 128, 1, 128), dtype=jnp.bfloat16),
    Case((1, 384, 384, 1, 96), normed=False, packed=packing.Packed(0, 64)),
    Case((1, 515, 515, 1, 64), packed=packing.Packed(3, 256)),
    Case((1, 1, 64, 1, 128), kernel="pallas_gpu", normed=False),
    Case((2, 200, 64, 1, 64), kernel="pallas_gpu", dtype=jnp.bfloat16),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of few tokens, and queries in parts; compiled kernels have the real ones."""
    monkeypatch.setattr(pallas_tpu, "FORWARD_BLOCKS", (128, 128))
    monkeypatch.setattr(pallas_tpu, "BACKWARD_BLOCKS", (128, 128))


def arrays(case):
    """q, k, v, the scales of both norms, and cotangents of both results."""
    b, n, m, a, f = case.sizes
    rng = np.random.default_rng(n * 100 + m)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    inputs = [x.astype(case.dtype) for x in (draw(b, n, a, f), draw(b, m, a, f), draw(b, m, a, f))]
    scales = [1 + 0.1 * draw(f), 1 + 0.1 * draw(f)]
    return (*inputs, *scales), (draw(b, n, a, f).astype(case.dtype), draw(b, n, a))


def by_kernel(case, interpret, q, k, v, q_scale, k_scale):
    norm = attention.QKNorm(q_scale, k_scale, EPSILON) if case.normed else None
    more = {} if case.packed is None else {"packed": case.packed}
    kernel = KERNELS[case.kernel]
    return kernel(q, k, v, scale=SCALE, norm=norm, interpret=interpret, **more)


def by_definition(case, q, k, v, q_scale, k_scale):
    """softmax(scale q k^T) v of normalised q and k, in their precision, with the whole matrix."""
    if case.normed:
        q, k = (
            x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON) * s.reshape(1, 1, 1, -1)
            for x, s in ((q, q_scale), (k, k_scale))
        )
    logits = SCALE * jnp.einsum("bnaf,bmaf->bnam", q, k)
    if case.packed is not None:
        seen = packing.matrix(case.packed, q.shape[1], k.shape[1])[None, :, None]
        logits = jnp.where(seen, logits, -jnp.inf)
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    return jnp.einsum("bnam,bmaf->bnaf", jnp.exp(logits - log_sum[..., None]), v), log_sum


def values_and_gradients(function):
    """Both results and the gradients of all inputs, of inputs and cotangents."""

    def run(inputs, cotangents):
        results, pull = jax.vjp(function, *inputs)
        return *results, *pull(jax.tree.map(lambda x, y: x.astype(y.dtype), cotangents, results))

    return jax.jit(run)


def check(case, interpret=True):
    """Compares with the definition in float64, and with the same once more."""
    inputs, cotangents = arrays(case)
    run = values_and_gradients(functools.partial(by_kernel, case, interpret))
    got = run(inputs, cotangents)
    jax.tree.map(np.testing.assert_array_equal, got, run(inputs, cotangents))
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (inputs, cotangents))
        wanted = values_and_gradients(functools.partial(by_definition, case))(*exact)
    tolerance = 5e-6 if case.dtype == jnp.float32 else 3e-2
    names = ("out", "log_sum", "d_q", "d_k", "d_v", "d_q_scale", "d_k_scale")
    for name, x, y in zip(names, got, wanted, strict=True):
        size = max(1.0, np.abs(y).max())
        np.testing.assert_allclose(
            np.asarray(x, np.float64), y, rtol=0, atol=tolerance * size, err_msg=f"{name} of {case}"
        )
    assert got[0].dtype == case.dtype and got[1].dtype == jnp.float32


@pytest.mark.parametrize("case", [RAGGED, PACKED, CACHED, ON_GPU], ids=str)
@pytest.mark.thorough
def test_kernels_are_the_definition_with_all_gradients_twice_bit_equal(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_kernels_are_the_definition_for_odd_sizes(case):
    check(case)


@pytest.mark.slow
def test_queries_in_parts_give_the_same_gradients(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "MAX_QUERY_BYTES", 128 * 4 * 32)  # 128 of 300 at once
    check(PACKED)


def test_no_tile_is_read_while_it_is_written(capsys):
    check(Case((1, 130, 140, 1, 32)), pltpu.InterpretParams(detect_races=True))
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("packed", "targets", "all_queries", "blocks", "start"),
    [
        (packing.Packed(300, 100), 4, True, (128, 128), 0),
        (packing.Packed(300, 100), 4, False, (128, 256), 0),
        (packing.Packed(0, 130), 10, True, (128, 128), 0),
        (packing.Packed(1000, 64), 40, True, (256, 512), 1024),
        (packing.Packed(100, 700), 3, True, (128, 128), 512),
        (packing.Packed(5, 3), 7, False, (128, 128), 0),
    ],
)
def test_tiles_that_hold_something_seen_are_met_once_and_no_others(
    packed, targets, all_queries, blocks, start
):
    m = packed.shared + packed.own * targets
    n = m if all_queries else m - packed.shared
    seen = packing.matrix(packed, n, m)[start:]
    tiles = packing.Tiles(n - start, m, *blocks, packed, m - n + start)
    wanted = np.zeros((tiles.rows, tiles.columns), int)
    for i, j in np.ndindex(*wanted.shape):
        tile = seen[i * blocks[0] : (i + 1) * blocks[0], j * blocks[1] : (j + 1) * blocks[1]]
        wanted[i, j] = tile.any()
        assert not tiles.whole(j) or tile.all()
    rows, columns = (np.arange(x, dtype=np.int32) for x in (tiles.rows, tiles.columns))
    by_row, by_column = np.zeros_like(wanted), np.zeros_like(wanted)
    for step in range(tiles.key_steps):
        j, needed = tiles.key_tile(rows, step)
        np.add.at(by_row, (rows, j), needed)
    for step in range(tiles.rows):
        i, needed = tiles.query_tile(columns, step)
        np.add.at(by_column, (i, columns), needed)
    np.testing.assert_array_equal(by_row, wanted)
    np.testing.assert_array_equal(by_column, wanted)
    assert tiles.needed == wanted.sum()


@pytest.mark.parametrize(
    ("name", "case"), [("xla", PACKED), ("xla", CACHED), ("reference", CACHED)], ids=str
)
def test_packed_targets_without_a_kernel_are_the_definition(name, case, x64):
    inputs, cotangents = arrays(dataclasses.replace(case, dtype=jnp.float64))

    def attend(q, k, v, q_scale, k_scale):
        norm = attention.QKNorm(q_scale, k_scale, EPSILON)
        part = attention.with_log_sum(
            q, k, v, scale=SCALE, norm=norm, packed=case.packed, implementation=name
        )
        return part.out, part.log_sum

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12),
        values_and_gradients(attend)(inputs, cotangents),
        values_and_gradients(functools.partial(by_definition, case))(inputs, cotangents),
    )


def test_what_kernels_do_not_have_is_refused():
    q = jnp.ones((1, 8, 1, 24))
    for name in KERNELS:
        with pytest.raises(NotImplementedError, match=f"'{name}' has head sizes .* not 24"):
            attention.attention(q, q, q, implementation=name)
        mixed = (q, q, q.astype(jnp.bfloat16))
        with pytest.raises(NotImplementedError, match="the same"):
            attention.attention(*mixed, implementation=name)
        wide = jnp.ones((1, 8, 1, 32))
        with pytest.raises(ValueError, match="interpret mode is supported on CPU"):
            attention.attention(wide, wide, wide, implementation=name)
    with pytest.raises(errors.InputError, match="8 keys are not 3 shared ones and targets of 4"):
        attention.attention(q, q, q, packed=attention.Packed(3, 4))
    with pytest.raises(errors.InputError, match="whole targets of 2 tokens after the 4 shared"):
        attention.attention(q[:, :3], q, q, packed=attention.Packed(4, 2))


def loss(case, *inputs):
    return jnp.sum(by_kernel(case, False, *inputs)[0].astype(jnp.float32))


def shapes(case):
    b, n, m, a, f = case.sizes
    tokens = [accelerators.shape(b, size, a, f, dtype=case.dtype) for size in (n, m, m)]
    return *tokens, accelerators.shape(f), accelerators.shape(f)


def test_kernels_are_lowered_for_a_tpu():
    text = accelerators.lower_for_tpu(
        jax.grad(functools.partial(loss, CACHED), (0, 1, 2, 3, 4)), *shapes(CACHED)
    )
    assert text.count("tpu_custom_call") == 2


LONG = {
    "self": Case((1, 4096, 4096, 2, 64), dtype=jnp.bfloat16),
    "packed": Case((1, 5120, 5120, 2, 64), packed=packing.Packed(1024, 1024), dtype=jnp.bfloat16),
    "cached": Case((1, 200, 5000, 2, 128), dtype=jnp.bfloat16),
}


@pytest.mark.aot
@pytest.mark.parametrize("case", LONG.values(), ids=LONG)
@pytest.mark.parametrize("chip", accelerators.TPUS)
def test_kernels_fit_the_chips(chip, case, monkeypatch):
    monkeypatch.undo()  # tiles of the real size
    gradient = jax.grad(functools.partial(loss, case), (0, 1, 2, 3, 4))
    compiled = accelerators.compile_for(chip, gradient, *shapes(case))
    assert compiled.as_text().count("tpu_custom_call") >= 2
    b, n, m, a, f = case.sizes
    # A quarter of one head's logits, or, of few queries, copies in the kernel's layout of keys and
    # values and of their gradients (v5p makes them; v5e and v6e do without).
    copies = 3 * 2 * b * m * a * f * jnp.dtype(case.dtype).itemsize
    assert accelerators.temporaries(compiled) < max(n * m, copies)
    # The compiler's estimate of a whole step counts the kernels.
    seen = n * m if case.packed is None else 1024 * (5120 + 4096)
    assert compiled.cost_analysis()["flops"] >= 14 * b * a * f * seen


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 48, 96, 128])
@pytest.mark.parametrize("chip", accelerators.TPUS)
def test_kernels_of_every_head_size_fit_in_float32(chip, size, monkeypatch):
    monkeypatch.undo()
    case = Case((1, 2048, 1100, 1, size))
    gradient = jax.grad(functools.partial(loss, case), (0, 1, 2, 3, 4))
    accelerators.compile_for(chip, gradient, *shapes(case))


@pytest.mark.aot
@pytest.mark.parametrize("size", [64, 128])
def test_the_gpu_kernels_are_compiled_for_an_h100(size):
    case = Case((1, 1000, 1500, 2, size), dtype=jnp.bfloat16, kernel="pallas_gpu")
    gradient = jax.grad(functools.partial(loss, case), (0, 1, 2, 3, 4))
    compiled = accelerators.compile_for("h100", gradient, *shapes(case))
    assert accelerators.temporaries(compiled) < 4 * 1000 * 1500 * 2
