"""The choice between plain JAX and kernels for what a streaming Quark spends its time on.

    kernels.attend(query, delta, valid, scale)                        # the default of the device
    kernels.attend(query, delta, valid, scale, implementation="tpu")  # this one, or an error

"xla" is plain JAX, `one_to_many` and `drawing`; "tpu" are Pallas kernels that gather for
themselves, `one_to_many_tpu` and `drawing_tpu`, and scatter in their backward passes; "gpu" is
`one_to_many_gpu`, whose backward pass is that of "xla", as is all of its drawing.
The default is "xla" on every device: there are plans of the devices' compilers for the kernels
(`python launch/benchmark.py one_to_many` and `compositing`), but no time measured on a chip yet,
and a kernel becomes a default by its time.
"""

from __future__ import annotations

from typing import Any

import jax

from nvs_common.errors import InputError
from nvs_common.types import Array, Cameras, Render, Views
from quark_jax import drawing, drawing_tpu, ldm, one_to_many, one_to_many_gpu, one_to_many_tpu

IMPLEMENTATIONS = ("xla", "tpu", "gpu")


def attend(
    query: Array,
    delta: one_to_many.Unstored,
    valid: Array,
    scale: float,
    *,
    implementation: str | None = None,
) -> Array:
    """`one_to_many.attend_unstored` by the named implementation.

    Raises:
      InputError: an unknown implementation.
      NotImplementedError: the named one does not support these arrays.
    """
    if _is_plain(implementation):
        return one_to_many.attend_unstored(query, delta, valid, scale)
    fused = one_to_many_gpu.attend if implementation == "gpu" else one_to_many_tpu.attend
    return fused(query, delta, valid, scale)


def draw(
    logits: ldm.Logits,
    target: Cameras,
    context: Views,
    *,
    implementation: str | None = None,
    **options: Any,
) -> Render:
    """`drawing.draw` by the named implementation, with the same options.

    Raises:
      InputError: an unknown implementation.
      NotImplementedError: the named one does not support this map.
    """
    if _is_plain(implementation) or implementation == "gpu":
        return drawing.draw(logits, target, context, **options)
    return drawing_tpu.draw(logits, target, context, **options)


def _is_plain(implementation: str | None) -> bool:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise InputError(
            f"Quark: implementation {implementation!r} is unknown; choose one of "
            f"{list(IMPLEMENTATIONS)}, or None."
        )
    plain = implementation in (None, "xla")
    if not plain and _divided():
        raise NotImplementedError(
            "Quark: kernels are not divided over a mesh; call the model inside of "
            "jax.shard_map, or with implementation 'xla'."
        )
    return plain


def _divided() -> bool:
    """Whether arrays may be divided over the devices of a mesh without being told so here."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind != jax.sharding.AxisType.Manual for size, kind in sizes)
