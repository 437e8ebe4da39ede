"""What implementations of attention cost: on this machine, or as a compiler plans for another.

Self-attention of one scene with norms of queries and keys, forward and with its backward pass.
Where a kernel has no norms inside they are computed before it, and their time and memory count.
Products are counted as 4 n m a f forward and 14 n m a f with the backward pass, whatever is done
again.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from launch import absent_devices, measuring
from nvs_common import attention
from nvs_common.attention import chunked, norm
from nvs_common.types import Array

HEAD_SIZE = 64
HEADS = {"cpu": 2}  # elsewhere 12, those of LVSM
EPSILON = 1e-5
# Programs that plan for more are not run.
MAX_MIB = {"cpu": 6_000.0}
# Side of the matrices whose product is the ceiling.
_SIDE = {"cpu": 2048}

HEAD = ("tokens", "implementation", "pass", "ms", "TFLOP/s", "of the ceiling", "planned MiB")
PLANNED_HEAD = ("tokens", "implementation", "pass", "planned MiB", "estimate, ms")


class Attend(NamedTuple):
    """Attention (q, k, v, norms) -> out of one implementation."""

    name: str
    call: Callable[[Array, Array, Array, attention.QKNorm], Array]


def study(tokens: list[int], dtype: Any, *, repeats: int) -> Iterator[str]:
    """A table of this machine, a row after the other is measured."""
    platform = jax.default_backend()
    ceiling = _ceiling(dtype, platform, repeats)
    heads = HEADS.get(platform, 12)
    yield f"{_title(heads, dtype)}; a large matrix product: {1e-12 * ceiling:.3f} TFLOP/s"
    yield from ("", *measuring.table(HEAD, []))
    for count in tokens:
        for attend in implementations(platform):
            for name, function, products in _passes(attend):
                flop = products * count**2 * heads * HEAD_SIZE
                cells = _measured(function, _shapes(count, heads, dtype), flop, ceiling, repeats)
                yield measuring.row((str(count), attend.name, name, *cells))


def planned(tokens: list[int], dtype: Any, chip: str) -> Iterator[str]:
    """A table of what a chip's compiler plans; see `absent_devices` for what its estimates are."""
    platform = "gpu" if chip == "h100" else "tpu"
    heads = HEADS.get(platform, 12)
    yield f"{_title(heads, dtype)}; compiled for {chip}, not run"
    yield "(what a Pallas kernel adds to the estimate is what its cost_estimate says)"
    yield from ("", *measuring.table(PLANNED_HEAD, []))
    for count in tokens:
        for attend in implementations(platform):
            for name, function, _ in _passes(attend):
                cells = _planned(function, _shapes(count, heads, dtype), chip)
                yield measuring.row((str(count), attend.name, name, *cells))


def implementations(platform: str) -> list[Attend]:
    """What there is for a platform, libraries' kernels included."""
    tiled = lambda q, k, v: chunked.tiled(  # noqa: E731
        q, k, v, HEAD_SIZE**-0.5, chunked.side(q.shape[1], k.shape[1], platform)
    )[0]
    found = [_ours("reference"), Attend("xla", _norms_before(tiled))]
    if platform == "gpu":
        found += [_ours("cudnn")] if jax.default_backend() == "gpu" else []
        found += [_ours("pallas_gpu")]
    if platform == "tpu":
        found += [
            _ours("pallas_tpu"),
            Attend("flash (jax)", _norms_before(_flash)),
            Attend("splash (jax)", _norms_before(_splash)),
        ]
    if platform != "cpu" and importlib.util.find_spec("tokamax"):
        found.append(Attend("tokamax", _norms_before(_tokamax)))
    return found


def _title(heads: int, dtype: Any) -> str:
    size = f"{heads} heads of {HEAD_SIZE}, {jnp.dtype(dtype).name}"
    return f"One scene, {size}, norms of queries and keys included"


def _ours(name: str) -> Attend:
    call = functools.partial(attention.attention, implementation=name)
    return Attend(name, lambda q, k, v, norms: call(q, k, v, norm=norms))


def _norms_before(call: Callable) -> Callable:
    return lambda q, k, v, norms: call(*norm.apply(norms, q, k), v)


def _heads_first(*arrays: Array) -> list[Array]:
    return [jnp.swapaxes(x, 1, 2) for x in arrays]


def _flash(q: Array, k: Array, v: Array) -> Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    side = min(512, q.shape[1])
    names = ("block_q", "block_k_major", "block_k", "block_q_major_dkv", "block_k_major_dkv")
    names += ("block_k_dkv", "block_q_dkv", "block_k_major_dq", "block_k_dq", "block_q_dq")
    sizes = flash.BlockSizes(block_b=1, **dict.fromkeys(names, side))
    out = flash.flash_attention(*_heads_first(q, k, v), sm_scale=HEAD_SIZE**-0.5, block_sizes=sizes)
    return jnp.swapaxes(out, 1, 2)


def _splash(q: Array, k: Array, v: Array) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    n, heads = q.shape[1], q.shape[2]
    mask = splash.MultiHeadMask([splash.FullMask((n, k.shape[1]))] * heads)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
    names += ("block_kv_dkv_compute",)
    sizes = splash.BlockSizes(**dict.fromkeys(names, min(512, n)), use_fused_bwd_kernel=True)
    kernel: Any = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    q, k, v = _heads_first(q * HEAD_SIZE**-0.5, k, v)
    out: Any = jax.vmap(kernel)(q, k, v)
    return jnp.swapaxes(out, 1, 2)


def _tokamax(q: Array, k: Array, v: Array) -> Array:
    tokamax: Any = importlib.import_module("tokamax")
    return tokamax.dot_product_attention(q, k, v, scale=HEAD_SIZE**-0.5)


def _passes(attend: Attend) -> list[tuple[str, Callable, float]]:
    """Name, function of arrays, and products for each pair of a query's and a key's feature."""

    def forward(q: Array, k: Array, v: Array, q_scale: Array, k_scale: Array) -> Array:
        return attend.call(q, k, v, attention.QKNorm(q_scale, k_scale, EPSILON))

    def loss(*inputs: Array) -> Array:
        return jnp.sum(forward(*inputs).astype(jnp.float32))

    return [
        ("forward", forward, 4.0),
        ("and backward", jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)), 14.0),
    ]


def _shapes(count: int, heads: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    tokens = jax.ShapeDtypeStruct((1, count, heads, HEAD_SIZE), dtype)
    scale = jax.ShapeDtypeStruct((HEAD_SIZE,), jnp.float32)
    return (tokens, tokens, tokens, scale, scale)


def _measured(
    function: Callable, shapes: Any, flop: float, ceiling: float, repeats: int
) -> tuple[str, ...]:
    """Cells of a row."""
    try:
        compiled = jax.jit(function).lower(*shapes).compile()
    except NotImplementedError as error:
        return (f"none: {str(error)[:80]}", "-", "-", "-")
    peak = measuring.peak(compiled)
    if peak > MAX_MIB.get(jax.default_backend(), float("inf")):
        return ("not run", "-", "-", f"{peak:.0f}")
    inputs = [jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(shapes)]
    seconds = measuring.median_seconds(compiled, *inputs, repeats=repeats)
    rate = flop / seconds
    share = f"{100 * rate / ceiling:.0f} %"
    return (f"{1e3 * seconds:.2f}", f"{1e-12 * rate:.3f}", share, f"{peak:.1f}")


def _planned(function: Callable, shapes: Any, chip: str) -> tuple[str, str]:
    try:
        compiled = absent_devices.compile_for(chip, function, *shapes)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return "does not fit", "-"
    estimate = (compiled.cost_analysis() or {}).get("optimal_seconds")
    return f"{measuring.peak(compiled):.1f}", "-" if estimate is None else f"{1e3 * estimate:.3f}"


def _ceiling(dtype: Any, platform: str, repeats: int) -> float:
    """FLOP/s of a product of large matrices."""
    side = _SIDE.get(platform, 8192)
    square = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul).lower(square, square).compile()
    return 2 * side**3 / measuring.median_seconds(product, square, square, repeats=repeats)
