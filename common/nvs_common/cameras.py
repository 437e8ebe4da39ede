"""Pinhole geometry: rays, projection, Plücker coordinates, pose normalisation. Always float32.

At the end are the checks of what models are asked: views and cameras that fit together.

Frames: `world_from_cam` maps OpenCV camera axes (x right, y down, z forward) to the world.
Depth is z-depth (distance along the optical axis), not distance along the ray.
Functions take cameras with any leading axes [...] and points with [..., *, 3], where *
stands for any extra axes.
"""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp

from nvs_common.errors import InputError
from nvs_common.types import Array, Cameras, Views

# Smallest z-depth that is divided by: points at or behind the camera plane project to a
# far-away but finite pixel, so that gradients stay finite (they are masked by `valid`).
MIN_DEPTH = 1e-4
# Camera centres that differ by less than this part of their coordinates are at one place.
SAME_PLACE = 1e-5


def invert(rigid: Array) -> Array:
    """Inverts rigid transforms [..., 4, 4] by transposing the rotation."""
    chex.assert_shape(rigid, (..., 4, 4))
    rotation = jnp.swapaxes(rigid[..., :3, :3], -1, -2)
    centre = rigid[..., :3, 3]
    translation = -jnp.einsum("...ij,...j->...i", rotation, centre, precision="highest")
    top = jnp.concatenate([rotation, translation[..., None]], axis=-1)
    return jnp.concatenate([top, rigid[..., 3:, :]], axis=-2)


def compose(a: Array, b: Array) -> Array:
    """Multiplies transforms [..., 4, 4] at full float32 precision on every backend."""
    return jnp.einsum("...ij,...jk->...ik", a, b, precision="highest")


def centers(cameras: Cameras) -> Array:
    """Camera centres in the world [..., 3]."""
    return jnp.asarray(cameras.world_from_cam)[..., :3, 3]


def pixel_grid(height: int, width: int) -> Array:
    """Pixel centres of an image, [h, w, 2] as (u, v); the first is (0.5, 0.5)."""
    u = jnp.arange(width, dtype=jnp.float32) + 0.5
    v = jnp.arange(height, dtype=jnp.float32) + 0.5
    return jnp.stack(jnp.meshgrid(u, v), axis=-1)


def camera_rays(intrinsics: Array, uv: Array) -> Array:
    """Directions in camera axes with z = 1.

    Args:
      intrinsics: [..., 4] fx, fy, cx, cy in pixels.
      uv: [..., *, 2] pixels; leading axes as the intrinsics'.

    Returns:
      [..., *, 3].
    """
    extra = uv.ndim - intrinsics.ndim
    k = intrinsics.reshape(intrinsics.shape[:-1] + (1,) * extra + (4,))
    xy = (uv - k[..., 2:]) / k[..., :2]
    return jnp.concatenate([xy, jnp.ones_like(xy[..., :1])], axis=-1)


def transform(rigid: Array, points: Array) -> Array:
    """Applies rigid transforms [..., 4, 4] to points [..., *, 3]."""
    extra = points.ndim - (rigid.ndim - 1)
    rigid = rigid.reshape(rigid.shape[:-2] + (1,) * extra + (4, 4))
    moved = jnp.einsum("...ij,...j->...i", rigid[..., :3, :3], points, precision="highest")
    return moved + rigid[..., :3, 3]


def project_camera(intrinsics: Array, points: Array) -> tuple[Array, Array]:
    """Projects points in camera axes [..., *, 3] to pixels [..., *, 2] and z-depth [..., *]."""
    extra = points.ndim - intrinsics.ndim
    k = intrinsics.reshape(intrinsics.shape[:-1] + (1,) * extra + (4,))
    z = points[..., 2]
    # Clamped so that a point behind the camera gives a finite pixel and gradient.
    xy = points[..., :2] / jnp.maximum(z, MIN_DEPTH)[..., None]
    return xy * k[..., :2] + k[..., 2:], z


def project(cameras: Cameras, points: Array) -> tuple[Array, Array]:
    """Projects world points into cameras.

    Args:
      cameras: [...].
      points: [..., *, 3] in the world.

    Returns:
      uv [..., *, 2] in pixels and z-depth [..., *]; where z <= 0 the pixel is meaningless but
      finite.
    """
    world_from_cam = jnp.asarray(cameras.world_from_cam, jnp.float32)
    points = transform(invert(world_from_cam), jnp.asarray(points, jnp.float32))
    return project_camera(jnp.asarray(cameras.intrinsics, jnp.float32), points)


def unproject(cameras: Cameras, uv: Array, depth: Array) -> Array:
    """World points [..., *, 3] seen at pixels uv [..., *, 2] at z-depth [..., *]."""
    chex.assert_equal_shape([uv[..., 0], depth])
    uv = jnp.asarray(uv, jnp.float32)
    rays_cam = camera_rays(jnp.asarray(cameras.intrinsics, jnp.float32), uv)
    points = rays_cam * jnp.asarray(depth, jnp.float32)[..., None]
    return transform(jnp.asarray(cameras.world_from_cam, jnp.float32), points)


def rays(cameras: Cameras) -> tuple[Array, Array]:
    """World-space rays through every pixel centre.

    Args:
      cameras: [...].

    Returns:
      origins and unit directions, both [..., h, w, 3].
    """
    world_from_cam = jnp.asarray(cameras.world_from_cam, jnp.float32)
    intrinsics = jnp.asarray(cameras.intrinsics, jnp.float32)
    lead = intrinsics.shape[:-1]
    uv = pixel_grid(cameras.height, cameras.width)
    uv = jnp.broadcast_to(uv.reshape((1,) * len(lead) + uv.shape), lead + uv.shape)
    directions = jnp.einsum(
        "...ij,...hwj->...hwi",
        world_from_cam[..., :3, :3],
        camera_rays(intrinsics, uv),
        precision="highest",
    )
    directions = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
    origins = jnp.broadcast_to(world_from_cam[..., None, None, :3, 3], directions.shape)
    return origins, directions


def plucker(cameras: Cameras) -> Array:
    """Plücker coordinates (o x d, d) of every pixel's ray, [..., h, w, 6]."""
    origins, directions = rays(cameras)
    return jnp.concatenate([jnp.cross(origins, directions), directions], axis=-1)


def normalize_poses(
    world_from_cam: Array, scale: float = 1.35, *, reference: Array | None = None
) -> Array:
    """Moves the average camera to the origin and bounds the translations.

    The average camera has the mean centre and the mean forward and down axes; translations
    are divided by scale times the largest absolute coordinate (LVSM's data preparation).
    Cameras that all stand in one place have no extent: they come to the origin, and the scale
    of the world stays. Where the mean axes vanish, those of the first camera take their place.

    Args:
      world_from_cam: [..., n, 4, 4].
      scale: factor on the largest absolute coordinate.
      reference: [..., m, 4, 4] cameras that define the new frame and its scale; all n if None.

    Returns:
      [..., n, 4, 4] in the new world frame; the scale of depth changes with it.
    """
    chex.assert_shape(world_from_cam, (..., 4, 4))
    reference = world_from_cam if reference is None else reference
    from_world = invert(_average_pose(reference))[..., None, :, :]
    extent = jnp.abs(compose(from_world, reference)[..., :3, 3])
    extent = jnp.max(extent, axis=(-1, -2), keepdims=True)
    # Below this the difference of equal float32 coordinates is rounding, not a baseline.
    rounding = SAME_PLACE * jnp.max(jnp.abs(reference[..., :3, 3]), axis=(-1, -2), keepdims=True)
    divisor = jnp.where(extent > rounding, extent * scale, 1.0)
    moved = compose(from_world, world_from_cam)
    return moved.at[..., :3, 3].set(moved[..., :3, 3] / divisor)


def _average_pose(world_from_cam: Array) -> Array:
    """The average [..., 4, 4] of poses [..., n, 4, 4]: mean centre, mean forward and down."""
    mean, first = jnp.mean(world_from_cam, axis=-3), world_from_cam[..., 0, :, :]
    forward = _unit(mean[..., :3, 2], first[..., :3, 2])
    # Where the mean of the down axes is nothing, or lies along forward, another one serves.
    fallback = _unit(jnp.cross(first[..., :3, 1], forward), first[..., :3, 0])
    right = _unit(jnp.cross(mean[..., :3, 1], forward), fallback)
    down = jnp.cross(forward, right)
    down = down / jnp.linalg.norm(down, axis=-1, keepdims=True)
    top = jnp.stack([right, down, forward, mean[..., :3, 3]], axis=-1)
    bottom = jnp.broadcast_to(jnp.array([0.0, 0.0, 0.0, 1.0], top.dtype), top.shape[:-2] + (1, 4))
    return jnp.concatenate([top, bottom], axis=-2)


def resize(cameras: Cameras, height: int, width: int) -> Cameras:
    """The same cameras with images stretched to height x width."""
    factor = [width / cameras.width, height / cameras.height]
    scale = jnp.array(factor * 2, jnp.float32)
    intrinsics = jnp.asarray(cameras.intrinsics, jnp.float32)
    scale = scale.reshape((1,) * (intrinsics.ndim - 1) + (4,))
    return dataclasses.replace(cameras, intrinsics=intrinsics * scale, height=height, width=width)


def crop(cameras: Cameras, top: Array | int, left: Array | int, height: int, width: int) -> Cameras:
    """The same cameras with images cropped to a window; top and left may be traced."""
    zero = jnp.zeros((), jnp.float32)
    shift = jnp.stack([zero, zero, jnp.asarray(left, jnp.float32), jnp.asarray(top, jnp.float32)])
    intrinsics = jnp.asarray(cameras.intrinsics, jnp.float32)
    shift = shift.reshape((1,) * (intrinsics.ndim - 1) + (4,))
    return dataclasses.replace(cameras, intrinsics=intrinsics - shift, height=height, width=width)


def interpolate(world_from_cam: Array, fraction: Array) -> Array:
    """Poses along a straight line between two: slerp of rotation, lerp of centre.

    Args:
      world_from_cam: [2, 4, 4] the two ends.
      fraction: [n] position between them, 0 at the first.

    Returns:
      [n, 4, 4].
    """
    chex.assert_shape(world_from_cam, (2, 4, 4))
    rotation = world_from_cam[:, :3, :3]
    relative = jnp.matmul(rotation[0].T, rotation[1], precision="highest")
    axis_angle = _rotation_log(relative)
    turned = jnp.matmul(
        rotation[:1], _rotation_exp(fraction[:, None] * axis_angle[None]), precision="highest"
    )
    ends = world_from_cam[:, :3, 3]
    centre = ends[:1] + fraction[:, None] * (ends[1:] - ends[:1])
    top = jnp.concatenate([turned, centre[..., None]], axis=-1)
    bottom = jnp.broadcast_to(jnp.array([0.0, 0.0, 0.0, 1.0], top.dtype), (len(fraction), 1, 4))
    return jnp.concatenate([top, bottom], axis=-2)


def _unit(x: Array, fallback: Array) -> Array:
    """Unit vectors [..., 3] along x, or along the fallback where x has no direction."""
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    x = jnp.where(length > 1e-6, x, fallback)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _rotation_log(rotation: Array) -> Array:
    """Axis times angle [3] of a rotation [3, 3], through the quaternion: safe near 0 and pi."""
    # Squared quaternion components up to a factor of 4; the largest one is safe to divide by.
    xx, yy, zz = rotation[0, 0], rotation[1, 1], rotation[2, 2]
    (_, xy, xz), (yx, _, yz), (zx, zy, _) = rotation
    candidates = jnp.array(
        [
            [1 + xx + yy + zz, zy - yz, xz - zx, yx - xy],
            [zy - yz, 1 + xx - yy - zz, xy + yx, xz + zx],
            [xz - zx, xy + yx, 1 - xx + yy - zz, yz + zy],
            [yx - xy, xz + zx, yz + zy, 1 - xx - yy + zz],
        ]
    )
    best = candidates[jnp.argmax(jnp.diagonal(candidates))]
    quaternion = best / jnp.linalg.norm(best)
    quaternion = quaternion * jnp.where(quaternion[0] < 0, -1.0, 1.0)
    sine = jnp.linalg.norm(quaternion[1:])
    angle = 2 * jnp.arctan2(sine, quaternion[0])
    # angle / sine tends to 2 for small rotations.
    return quaternion[1:] * jnp.where(sine > 1e-8, angle / jnp.maximum(sine, 1e-8), 2.0)


def _rotation_exp(axis_angle: Array) -> Array:
    """Rotations [n, 3, 3] from axis times angle [n, 3] (Rodrigues)."""
    angle = jnp.linalg.norm(axis_angle, axis=-1)[:, None, None]
    x, y, z = jnp.moveaxis(axis_angle, -1, 0)
    zero = jnp.zeros_like(x)
    cross = jnp.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(-1, 3, 3)
    small = angle < 1e-6
    safe = jnp.where(small, 1.0, angle)
    a = jnp.where(small, 1.0, jnp.sin(safe) / safe)
    b = jnp.where(small, 0.5, (1 - jnp.cos(safe)) / safe**2)
    squared = jnp.matmul(cross, cross, precision="highest")
    return jnp.eye(3, dtype=axis_angle.dtype)[None] + a * cross + b * squared


def as_float32(cams: Cameras) -> Cameras:
    """The same cameras in float32, the type that geometry in models works in."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), cams)


def check_context(context: Views) -> int:
    """Whether context [b, v] is whole, by its shapes alone; returns b.

    Raises:
      InputError: no views, no RGB images, or images and cameras that do not belong together.
    """
    images, cams = jnp.shape(context.images), context.cameras
    if len(images) != 5 or images[-1] != 3 or 0 in images:
        raise InputError(
            f"context images have shape {images}; expected [b, v, h, w, 3] with a view or more."
        )
    _check_lead("context", cams, images[:2])
    if (cams.height, cams.width) != images[2:4]:
        raise InputError(
            f"context images have {images[2]} x {images[3]} pixels and their cameras are for "
            f"{cams.height} x {cams.width}; resize the cameras with the images (cameras.resize)."
        )
    return images[0]


def check_targets(targets: Cameras, num_scenes: int) -> None:
    """Whether targets [b, t] are whole and of as many scenes as the context, by shapes alone.

    Raises:
      InputError: they are not.
    """
    shape = jnp.shape(targets.near)
    if len(shape) != 2 or shape[0] != num_scenes or 0 in shape:
        raise InputError(
            f"target cameras have leading axes {shape}; expected [b, t] with b={num_scenes}, as "
            "the context has, and a target or more."
        )
    _check_lead("target", targets, shape)


def _check_lead(name: str, cams: Cameras, lead: tuple[int, ...]) -> None:
    ends = {"world_from_cam": (4, 4), "intrinsics": (4,), "near": (), "far": ()}
    for field, end in ends.items():
        if (found := jnp.shape(getattr(cams, field))) != (*lead, *end):
            raise InputError(
                f"{name} cameras: {field} has shape {found}; expected {(*lead, *end)}, one camera "
                "for each view."
            )
