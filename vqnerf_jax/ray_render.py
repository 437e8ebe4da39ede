"""What rendering rays gives."""

from __future__ import annotations

import flax.struct

from nvs_common.types import Array


@flax.struct.dataclass
class Samples:
    """Sections of rays, and the field in their middles.

    Attributes:
      starts, middles, lengths: [r, s] distances from the origin, and of each section.
      sdf: [r, s].
      gradients: [r, s, 3] of the distance, not normalised.
      cumulative: [r, s] NeuS's density up to the section's start; zero with VolSDF.
      inside: [r, s] 1 within the unit sphere, else 0.
      weights: [r, s + outside] how much is seen of each section and each of the background's.
    """

    starts: Array
    middles: Array
    lengths: Array
    sdf: Array
    gradients: Array
    cumulative: Array
    inside: Array
    weights: Array


@flax.struct.dataclass
class RayRender:
    """What rays see.

    Attributes:
      colors: [r, 3] over black, or over the given background.
      latents: [r, d] features for the decoder; None where the field has none.
      opacity: [r] sum of the weights.
      depth: [r] expected distance along the ray, with the far end for what passes.
      normals: [r, 3] expected gradient inside the sphere.
      eikonal: [] sum of (|gradient| - 1)^2 over samples within `field.EIKONAL_RADIUS`.
      eikonal_count: [] how many samples that are, so that losses of parts of an image add up.
      samples: the sections.
    """

    colors: Array
    latents: Array | None
    opacity: Array
    depth: Array
    normals: Array
    eikonal: Array
    eikonal_count: Array
    samples: Samples
