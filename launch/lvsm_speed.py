"""Times of LVSM on this machine: beside plain PyTorch, and of views rendered from a cache.

The comparison is of the same model with the same weights, cameras and pictures, float32, in turn
and with the same number of threads and the same allocator. PyTorch renders every target in a
sequence of its own.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from launch import measuring
from lvsm_jax import LVSM, LVSMEncoderDecoder
from lvsm_jax import weights as lvsm_weights
from nvs_common import losses
from nvs_common.errors import InputError
from nvs_common.types import Variables


class Case(NamedTuple):
    """How much is rendered at once."""

    scenes: int
    inputs: int
    targets: int


CASES = (Case(4, 2, 6), Case(1, 2, 1), Case(1, 8, 8))
VIEWS = (2, 8, 16)
# Pixels of a side: of 64 tokens.
SIDE = 64
# Written out, layers take their parameters and leave what the backward pass needs without a copy.
_SIZES: Any = dict(width=256, head_size=64, unroll=6)
MODULES = {
    "decoder-only": LVSM(layers=6, **_SIZES),
    "encoder-decoder": LVSMEncoderDecoder(
        encoder_layers=3, decoder_layers=3, latents=192, **_SIZES
    ),
}
WITHOUT_TORCH = "PyTorch is not installed; to compare with it: pip install -e '.[torch]'"
HEAD = (
    "model",
    "scenes",
    "inputs",
    "targets",
    "pass",
    "PyTorch, ms",
    "ours, ms",
    "ratio",
    "differ by",
)
CACHED_HEAD = ("inputs", "encode, ms", "view from the cache, ms", "recomputed, ms", "ratio")


def use_threads(count: int | None) -> int:
    """Limits the threads of JAX, which has not started yet.

    Args:
      count: how many; None is one for each CPU of this process.

    Returns:
      How many there are.

    Raises:
      InputError: there are not as many, or the system cannot.
    """
    if count is None:
        return (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else (os.cpu_count() or 1)
        )
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("--threads: only Linux can give a process fewer CPUs; leave it out.")
    cpus = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(cpus):
        raise InputError(f"--threads={count}: expected 1 to {len(cpus)}, the CPUs of this process.")
    os.sched_setaffinity(0, cpus[:count])
    jax.devices()
    # JAX has as many threads as there seemed to be CPUs; they may now run on any.
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cpus)
    return count


def study(
    modules: Mapping[str, Any],
    cases: Sequence[Case],
    views: Sequence[int],
    *,
    side: int,
    repeats: int,
    threads: int,
) -> list[str]:
    """Both tables, Markdown.

    Args:
      modules: name -> LVSM of either kind.
      cases: what the modules render beside PyTorch.
      views: numbers of inputs in the table of caches; its model is the first of `modules` without
        latents.
      side: of the pictures, in pixels.
      repeats: timed repetitions.
      threads: of PyTorch, and those of JAX.

    Rows go to stderr as they are measured.
    """
    try:
        torch: Any = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        lines = [WITHOUT_TORCH, ""]
    else:
        torch.set_num_threads(threads)
        rows = []
        for case in cases:
            for name, module in modules.items():
                rows += _shown(_beside_torch(name, module, case, side, repeats))
        lines = [f"PyTorch {torch.__version__}, threads of either: {threads}; {side}x{side}", ""]
        lines += [*measuring.table(HEAD, rows), ""]
    plain = next(module for module in modules.values() if isinstance(module, LVSM))
    cached = plain.clone(input_sees_target=False)
    rows = [_shown([_from_cache(cached, count, side, repeats)])[0] for count in views]
    title = f"decoder-only with input_sees_target=False, one target of one scene, {side}x{side}"
    return [*lines, title, "", *measuring.table(CACHED_HEAD, rows)]


def _beside_torch(name: str, module: Any, case: Case, side: int, repeats: int) -> list[Any]:
    """Two rows: forward, and forward with backward."""
    torch: Any = importlib.import_module("torch")
    torch_lvsm: Any = importlib.import_module("launch.torch_lvsm")
    batch = measuring.random_batch(*case, side, side)
    context, targets, truth = batch.context, batch.target.cameras, batch.target.images
    variables = _variables(module, batch)
    theirs = torch_lvsm.LVSMs(module, lvsm_weights.to_torch(module, variables))
    args, their_truth = torch_lvsm.arguments(context, targets), torch.tensor(np.asarray(truth))

    def loss(variables: Variables, context: Any, targets: Any, truth: Any):
        return losses.l2(module.apply(variables, context, targets), truth)

    render = jax.jit(module.apply).lower(variables, context, targets).compile()
    train = jax.jit(jax.value_and_grad(loss)).lower(variables, context, targets, truth).compile()
    picture = np.asarray(render(variables, context, targets))
    differ = np.abs(picture - torch_lvsm.render(theirs, args)).max()
    forward = measuring.alternating_medians(
        lambda: torch_lvsm.render(theirs, args),
        lambda: render(variables, context, targets),
        repeats=repeats,
    )
    both = measuring.alternating_medians(
        lambda: torch_lvsm.train(theirs, args, their_truth),
        lambda: train(variables, context, targets, truth),
        repeats=repeats,
    )
    ours = lvsm_weights.to_torch(module, train(variables, context, targets, truth)[1])
    apart = max(_apart(x.grad.numpy(), ours[key]) for key, x in theirs.named_parameters())
    first = (name, *map(str, case))
    return [
        (*first, "forward", *_times(forward), f"{differ:.0e}"),
        (*first, "and backward", *_times(both), f"{apart:.0e}"),
    ]


def _from_cache(module: LVSM, inputs: int, side: int, repeats: int) -> tuple[str, ...]:
    """A row: a scene's encoding, and a view from it against the view from the pictures."""
    batch = measuring.random_batch(1, inputs, 1, side, side)
    context, targets = batch.context, batch.target.cameras
    variables = _variables(module, batch)
    encode = jax.jit(lambda *args: module.apply(*args, method="encode"))
    decode = jax.jit(lambda *args: module.apply(*args, method="decode"))
    whole = jax.jit(module.apply)
    cache = encode(variables, context)
    seconds = measuring.alternating_medians(
        lambda: whole(variables, context, targets),
        lambda: decode(variables, cache, targets),
        lambda: encode(variables, context),
        repeats=repeats,
    )
    recomputed, cached, ratio = _times(seconds[:2])
    return str(inputs), f"{1e3 * seconds[2]:.1f}", cached, recomputed, ratio


def _shown(rows: list[Any]) -> list[Any]:
    """The same rows, which a long run shows as they are measured."""
    for row in rows:
        print(measuring.row(row), file=sys.stderr, flush=True)
    return rows


def _variables(module: Any, batch: Any) -> Variables:
    """Initial parameters, larger: pictures then show every layer."""
    variables = jax.jit(module.init)(jax.random.key(0), batch.context, batch.target.cameras)
    return jax.tree.map(lambda x: 3.0 * x, variables)


def _apart(x: np.ndarray, y: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(x - y).max() / np.abs(x).max())


def _times(seconds: Sequence[float]) -> tuple[str, str, str]:
    """Cells of a slow and a fast way, and how many times as fast it is."""
    slow, fast = seconds
    return f"{1e3 * slow:.1f}", f"{1e3 * fast:.1f}", f"{slow / fast:.2f}"
