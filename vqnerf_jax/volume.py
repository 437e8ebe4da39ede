"""Volume rendering of signed distances along rays, as pure functions.

Rays are [r, 3] with directions of length one; s samples on each have distances t [r, s] from the
origin. A section is what lies between a sample and the next. Distances and weights are float32 or
wider. Sections are weighted after NeuS (arXiv 2106.10689) or VolSDF (arXiv 2106.12052).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nvs_common.types import Array

EPSILON = 1e-5
# Less than a part in 10^7 passes an opaque section: its gradient stays finite.
_LEAK = 1e-7
# VolSDF's densities are scaled by 1 / beta, which does not become smaller than this.
MIN_BETA = 1e-4


def points(origins: Array, directions: Array, t: Array) -> Array:
    """Points [r, s, 3] at distances t [r, s]."""
    return origins[:, None] + directions[:, None] * t[..., None]


def near_far(origins: Array, directions: Array) -> tuple[Array, Array]:
    """Distances [r] between which a ray may meet the unit sphere, one to either side of the point
    nearest to its centre."""
    middle = -jnp.sum(origins * directions, -1) / jnp.sum(jnp.square(directions), -1)
    return middle - 1, middle + 1


def stratify(near: Array, far: Array, count: int, jitter: Array | None) -> Array:
    """Equally spaced distances [r, s] from near to far [r].

    Jitter [r] in [0, 1) moves all samples of a ray together, by up to half a step to either side.
    """
    fraction = jnp.linspace(0, 1, count, dtype=near.dtype)[None]
    t = near[:, None] + (far - near)[:, None] * fraction
    return t if jitter is None else t + (jitter[:, None] - 0.5) * (2 / count)


def background_depths(far: Array, count: int, num_samples: int, jitter: Array | None) -> Array:
    """Distances [r, n] beyond far [r], equally spaced in inverse distance (NeRF++).

    Args:
      far: where the background starts.
      count: n.
      num_samples: between near and far, which says how far behind `far` the first one lies.
      jitter: [r, n] in [0, 1), moves each sample within its interval.
    """
    inverse = jnp.linspace(1e-3, 1 - 1 / (count + 1), count, dtype=far.dtype)[None]
    inverse = jnp.broadcast_to(inverse, (far.shape[0], count))
    if jitter is not None:
        middle = (inverse[:, 1:] + inverse[:, :-1]) / 2
        upper = jnp.concatenate([middle, inverse[:, -1:]], axis=-1)
        lower = jnp.concatenate([inverse[:, :1], middle], axis=-1)
        inverse = lower + (upper - lower) * jitter
    return far[:, None] / inverse[:, ::-1] + 1 / num_samples


def sections(t: Array, last: float) -> tuple[Array, Array]:
    """Lengths and middles [r, s] of the sections that start at t; `last` is the last length."""
    length = jnp.concatenate([t[:, 1:] - t[:, :-1], jnp.full_like(t[:, :1], last)], axis=-1)
    return length, t + length / 2


def seen(alphas: Array) -> Array:
    """Weights [r, s] of sections from their opacities, nearest first."""
    through = jnp.cumprod(1 - alphas + _LEAK, axis=-1)
    return alphas * jnp.concatenate([jnp.ones_like(alphas[:, :1]), through[:, :-1]], axis=-1)


def neus_alphas(
    sdf: Array, gradients: Array, directions: Array, length: Array, sharpness: Array, ratio: Array
) -> tuple[Array, Array]:
    """Opacities of sections from the distance and its gradient in their middle (NeuS, Eq. 13).

    Args:
      sdf: [r, s].
      gradients: [r, s, 3], not normalised.
      directions: [r, 3].
      length: [r, s] of the sections.
      sharpness: [] inverse deviation of the logistic density.
      ratio: [] from 0, where surfaces seen from behind count by half the angle, to 1, where they
        do not count; early in training 0 keeps gradients alive.

    Returns:
      Opacities [r, s] and the cumulative density where each section starts.
    """
    cosine = jnp.sum(directions[:, None] * gradients, axis=-1)
    softened = jax.nn.relu(0.5 - 0.5 * cosine) * (1 - ratio)
    slope = -(softened + jax.nn.relu(-cosine) * ratio)
    start = jax.nn.sigmoid((sdf - slope * length / 2) * sharpness)
    end = jax.nn.sigmoid((sdf + slope * length / 2) * sharpness)
    return jnp.clip((start - end + EPSILON) / (start + EPSILON), 0, 1), start


def volsdf_density(sdf: Array, beta: Array) -> Array:
    """Density of a signed distance: the Laplace distribution's over beta (VolSDF, Eq. 2 and 3)."""
    return (0.5 + 0.5 * jnp.sign(sdf) * jnp.expm1(-jnp.abs(sdf) / beta)) / beta


def volsdf_alphas(sdf: Array, length: Array, beta: Array) -> Array:
    """Opacities [r, s] of sections with a constant density."""
    return -jnp.expm1(-volsdf_density(sdf, beta) * length)


def sample_inverse(t: Array, weights: Array, count: int) -> Array:
    """Distances [r, n] at equal steps of the cumulative weights of sections.

    Args:
      t: [r, s] borders of the sections.
      weights: [r, s - 1].
      count: n.
    """
    weights = weights + EPSILON
    share = weights / jnp.sum(weights, axis=-1, keepdims=True)
    zero = jnp.zeros_like(share[:, :1])
    cumulative = jnp.concatenate([zero, jnp.cumsum(share, axis=-1)], axis=-1)
    u = jnp.linspace(0.5 / count, 1 - 0.5 / count, count, dtype=t.dtype)
    search = jax.vmap(lambda row: jnp.searchsorted(row, u, side="right"))
    above = search(cumulative)
    below = jnp.maximum(above - 1, 0)
    above = jnp.minimum(above, cumulative.shape[-1] - 1)
    low, high = (jnp.take_along_axis(cumulative, i, axis=-1) for i in (below, above))
    start, end = (jnp.take_along_axis(t, i, axis=-1) for i in (below, above))
    height = jnp.where(high - low < EPSILON, 1.0, high - low)
    return start + (u[None] - low) / height * (end - start)


def neus_new_depths(
    origins: Array, directions: Array, t: Array, sdf: Array, count: int, sharpness: float
) -> Array:
    """Where to look next: new distances [r, n] near the surface (NeuS, Sec. 3.3).

    Args:
      origins: [r, 3].
      directions: [r, 3].
      t: [r, s] sorted distances.
      sdf: [r, s] the field there.
      count: n.
      sharpness: inverse deviation of the density that is sampled.
    """
    inside = jnp.linalg.norm(points(origins, directions, t), axis=-1) < 1
    inside = inside[:, 1:] | inside[:, :-1]
    length, middle = t[:, 1:] - t[:, :-1], (sdf[:, 1:] + sdf[:, :-1]) / 2
    slope = (sdf[:, 1:] - sdf[:, :-1]) / (length + EPSILON)
    # The steeper of a section and the one before it, which is robust at grazing rays.
    before = jnp.concatenate([jnp.zeros_like(slope[:, :1]), slope[:, :-1]], axis=-1)
    slope = jnp.clip(jnp.minimum(before, slope), -1e3, 0) * inside
    start = jax.nn.sigmoid((middle - slope * length / 2) * sharpness)
    end = jax.nn.sigmoid((middle + slope * length / 2) * sharpness)
    alphas = (start - end + EPSILON) / (start + EPSILON)
    return sample_inverse(t, seen(alphas), count)


def volsdf_error(t: Array, sdf: Array, beta: Array) -> Array:
    """Bounds [r, s - 1] of the opacity's error up to each section's end (VolSDF, Eq. 12 to 14).

    Args:
      t: [r, s] sorted distances.
      sdf: [r, s].
      beta: [r].
    """
    beta = beta[:, None]
    length, near, far = t[:, 1:] - t[:, :-1], jnp.abs(sdf[:, :-1]), jnp.abs(sdf[:, 1:])
    squares = [jnp.square(x) for x in (length, near, far)]
    half = (length + near + far) / 2
    area = half * (half - length) * (half - near) * (half - far)
    height = 2 * jnp.sqrt(jnp.maximum(area, 0)) / jnp.maximum(length, 1e-12)
    # The distance from a section to the surface: of an end, or the height of the triangle that
    # the section forms with the distances at its ends; none if the surface may cross it.
    least = jnp.where(near + far > length, height, 0)
    least = jnp.where(squares[0] + squares[1] <= squares[2], near, least)
    least = jnp.where(squares[0] + squares[2] <= squares[1], far, least)
    least = jnp.where(jnp.sign(sdf[:, :-1]) == jnp.sign(sdf[:, 1:]), least, 0)
    density = volsdf_density(sdf[:, :-1], beta)
    passed = jnp.cumsum(length * density, axis=-1) - length * density
    error = jnp.cumsum(jnp.exp(-least / beta) * jnp.square(length) / (4 * jnp.square(beta)), -1)
    return (jnp.minimum(jnp.exp(jnp.minimum(error, 14.0)), 1e6) - 1) * jnp.exp(-passed)


def volsdf_beta(t: Array, sdf: Array, beta: Array, widest: Array, tolerance: float) -> Array:
    """The smallest beta [r] of at least `beta` [] whose error is within the tolerance (Alg. 1).

    Args:
      t: [r, s].
      sdf: [r, s].
      beta: [] of the field.
      widest: [r] a beta that is within it.
      tolerance: of opacity.
    """
    low, high = jnp.broadcast_to(beta, widest.shape), widest

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        good = jnp.max(volsdf_error(t, sdf, middle), axis=-1) <= tolerance
        return jnp.where(good, low, middle), jnp.where(good, middle, high)

    good = jnp.max(volsdf_error(t, sdf, low), axis=-1) <= tolerance
    return jnp.where(good, low, jax.lax.fori_loop(0, 10, halve, (low, high))[1])


def eikonal(gradients: Array, near_object: Array) -> tuple[Array, Array]:
    """Sum of (|gradient| - 1)^2 over points near the object, and how many points these are.

    Args:
      gradients: [..., 3].
      near_object: [...] bool.
    """
    squared = jnp.sum(jnp.square(gradients), axis=-1)
    # The root has no derivative at zero.
    length = jnp.sqrt(jnp.where(squared > 0, squared, 1)) * (squared > 0)
    count = jnp.sum(near_object.astype(length.dtype))
    return jnp.sum(jnp.square(length - 1) * near_object), count
