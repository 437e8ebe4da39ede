"""What a VQGAN is trained against: a discriminator of patches, and the losses of the two.

As in VQGAN (arXiv 2310.14487 takes one that was pre-trained; arXiv 2012.09841, Sec. 3.1): a
convolutional discriminator (arXiv 1611.07004), hinge losses, and a weight of the adversarial loss
that follows the sizes of the two gradients at the decoder's last layer.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvs_common.types import Array, Names

SLOPE = 0.2
# Bounds of the adaptive weight.
EPSILON, LARGEST = 1e-4, 1e4


class Discriminator(nn.Module):
    """Logits [b, y, x, 1] of overlapping patches of images [b, h, w, 3]; high for real ones.

    Normalises by groups where the published one does by the batch: there is no running state, and
    the result for an image does not depend on the others.

    Attributes:
      channels: of the first layer; each further one has twice as many, up to eight times.
      layers: that halve the resolution.
      groups: of the norms.
    """

    channels: int = 64
    layers: int = 3
    groups: int = 32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        def convolve(x: Array, width: int, stride: int, name: str) -> Array:
            initial = nn.initializers.normal(0.02)
            options: Any = dict(strides=(stride, stride), padding=1, kernel_init=initial)
            return nn.Conv(width, (4, 4), name=name, **options)(x)

        x = nn.leaky_relu(convolve(images, self.channels, 2, "conv_0"), SLOPE)
        for i in range(1, self.layers + 1):
            width = self.channels * min(2**i, 8)
            x = convolve(x, width, 2 if i < self.layers else 1, f"conv_{i}")
            x = nn.GroupNorm(num_groups=self.groups, name=f"norm_{i}")(x)
            x = nn.leaky_relu(x, SLOPE)
        return convolve(x, 1, 1, "logits")


def hinge(real: Array, fake: Array) -> Array:
    """The discriminator's loss [] of logits of real and of decoded images."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def deceive(fake: Array) -> Array:
    """The decoder's loss [] of the logits of what it decoded."""
    return -jnp.mean(fake)


def adaptive_weight(reconstruction: Array, adversarial: Array) -> Array:
    """The weight [] of the adversarial loss: the ratio of gradients of the last layer.

    Args:
      reconstruction: gradient of the reconstruction's losses there.
      adversarial: gradient of `deceive` there.
    """
    ratio = jnp.linalg.norm(reconstruction) / (jnp.linalg.norm(adversarial) + EPSILON)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0, LARGEST))


PARAM_AXES: dict[str, Names] = {
    r".*/(bias|scale)": (None,),
    r".*/kernel": (None, None, "in", "out"),
}
