"""Structs that flow between data, models, training and evaluation.

Dimension key, used in docstrings, einsum, einops and variable suffixes:
b scenes, v context views, t targets, h w pixels, y x feature grid, c channels,
l depth layers, s samples on a ray, r rays, n m tokens, d model width,
a attention heads, f features per head, k codes.

Camera convention: OpenCV axes (x right, y down, z forward); pixel (0, 0) has its
centre at (0.5, 0.5), so an image spans [0, w] x [0, h].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax

Array = jax.Array
# Nested dicts of arrays: {"params": {...}, and any non-trained collections}.
Variables = Mapping[str, Any]
Names = Sequence[str | None]


@flax.struct.dataclass
class Cameras:
    """Pinhole cameras with any leading axes; arrays may be NumPy or JAX.

    Attributes:
      world_from_cam: [..., 4, 4] rigid transform, OpenCV axes.
      intrinsics: [..., 4] fx, fy, cx, cy in pixels of a `height` x `width` image.
      near: [...] nearest z-depth of interest, in world units.
      far: [...] farthest z-depth of interest, in world units.
      height: image rows (static).
      width: image columns (static).
    """

    world_from_cam: Any
    intrinsics: Any
    near: Any
    far: Any
    height: int = flax.struct.field(pytree_node=False)
    width: int = flax.struct.field(pytree_node=False)

    def __getitem__(self, index) -> Cameras:
        """Indexes the leading axes: `cameras[:, 0]`, `cameras[[3, 1]]`."""
        return Cameras(
            self.world_from_cam[index],
            self.intrinsics[index],
            self.near[index],
            self.far[index],
            self.height,
            self.width,
        )


@flax.struct.dataclass
class Views:
    """Posed images: images [..., h, w, 3] float32 in [0, 1] and their cameras [...]."""

    images: Any
    cameras: Cameras


@flax.struct.dataclass
class Batch:
    """One training batch: context views [b, v], target views [b, t] and what a system adds.

    `extras` holds arrays with leading [b] (for example `depth` [b, t, h, w]).
    """

    context: Views
    target: Views
    extras: dict[str, Any] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Render:
    """What a system renders: images [..., h, w, 3], depth [..., h, w] in z, alpha [..., h, w]."""

    images: Any
    depth: Any = None
    alpha: Any = None


@flax.struct.dataclass
class Aux:
    """What a loss returns beside its value.

    Attributes:
      metrics: name -> scalar.
      collections: new values of non-trained collections (EMA codes and the like); {} for none.
    """

    metrics: dict[str, Any]
    collections: dict[str, Any] = flax.struct.field(default_factory=dict)


class Task(NamedTuple):
    """The one contract between a system and the shared loop, evaluation and rendering.

    Attributes:
      init: (key, batch) -> variables.
      loss: (variables, batch, key) -> (scalar, Aux).
      render: (variables, context Views [b, v], target Cameras [b, t]) -> Render [b, t, ...].
      param_axes: regex on the parameter path -> logical axis names, one row a parameter.
      encode: (variables, context Views [b, v]) -> features, arrays with leading [b, v] of which
        each view's depend on that view alone; None where a system has no such part.
      render_encoded: (variables, context, features, targets) -> what `render` gives; beside
        `encode`, so that a viewer encodes each input once.
    """

    init: Callable[[Array, Batch], Variables]
    loss: Callable[[Variables, Batch, Array], tuple[Array, Aux]]
    render: Callable[[Variables, Views, Cameras], Render]
    param_axes: Mapping[str, Names]
    encode: Callable[[Variables, Views], Any] | None = None
    render_encoded: Callable[[Variables, Views, Any, Cameras], Render] | None = None
