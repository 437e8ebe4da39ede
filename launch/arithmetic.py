"""Counts the multiply-adds of a function: matrix products and convolutions, also in loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def multiply_adds(function: Callable, *args: Any) -> float:
    """Multiply-adds of products and convolutions that the function's result needs.

    Everything else, such as gathers, sums and activations, is not counted.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    needed = {id(v) for v in jaxpr.outvars}
    # From the results back: what no later line reads is never computed.
    for line in reversed(jaxpr.eqns):
        if not any(id(v) in needed for v in line.outvars):
            continue
        needed |= {id(v) for v in line.invars}
        times = line.params.get("length", 1) if line.primitive.name == "scan" else 1
        total += _own(line) + times * sum(_count(inner) for inner in _inner(line.params))
    return total


def _own(line: Any) -> float:
    """Multiply-adds of one line itself."""
    output = math.prod(line.outvars[0].aval.shape)
    if line.primitive.name == "dot_general":
        (contracted, _), _ = line.params["dimension_numbers"]
        return output * math.prod(line.invars[0].aval.shape[i] for i in contracted)
    if line.primitive.name == "conv_general_dilated":
        kernel = line.invars[1].aval.shape
        features = line.params["dimension_numbers"].rhs_spec[0]
        return output * math.prod(kernel) / kernel[features]
    return 0.0


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs in a line's parameters: bodies of loops, calls and checkpoints."""
    for name, value in params.items():
        # Derivative rules are functions of their own; only the value is computed.
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun"):
            continue
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one
