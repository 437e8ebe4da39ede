"""Checks of a trained field before it is used: what a picture or mesh would not tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from nvs_common.errors import InputError
from nvs_common.types import Cameras
from vqnerf_jax import model


def distances(ours: model.Model, params: Mapping[str, Any]) -> Callable[[Any], Any]:
    """The field's signed distance as a function of points [n, 3] in the unit sphere's frame."""
    variables = {"params": params["field"]}
    return lambda points: cast(Any, ours.field.apply(variables, points, method="sdf"))


def check_cameras(
    ours: model.Model, params: Mapping[str, Any], cams: Cameras, names: Sequence[str]
) -> None:
    """Checks that the distance is finite and that no camera is inside the object.

    Args:
      ours: the model.
      params: its parameters.
      cams: [n] in the world.
      names: of the n images.

    Raises:
      InputError: names the first camera with a distance that is not finite, or within a surface,
        from which nothing but its inside would be seen.
    """
    centers = np.asarray(cams.world_from_cam, np.float64)[..., :3, 3]
    points = (centers - np.asarray(ours.center)) / ours.radius
    sdf = np.asarray(distances(ours, params)(jnp.asarray(points, jnp.float32)))
    lengths = np.linalg.norm(points, axis=-1)
    for name, distance, length in zip(names, sdf, lengths, strict=True):
        if not np.isfinite(distance):
            raise InputError(
                f"{name}: the field's distance at the camera is {distance}; training has diverged, "
                "take an earlier checkpoint (--step) or a lower learning rate."
            )
        # The distance is only learnt within the sphere.
        if distance < 0 and length < 1:
            raise InputError(
                f"{name}: its camera is inside the object (distance {distance:.3g}); check the "
                f"poses and model.center={tuple(ours.center)}, model.radius={ours.radius}."
            )
