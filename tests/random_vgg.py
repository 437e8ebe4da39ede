"""Random weights of VGG-19 under torchvision's names, as the reference numbers were made with."""

from __future__ import annotations

import numpy as np

# Index, input and output channels of every convolution.
CONVOLUTIONS = ((0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256))
CONVOLUTIONS += tuple((n, 256, 256) for n in (12, 14, 16)) + ((19, 256, 512),)
CONVOLUTIONS += tuple((n, 512, 512) for n in (21, 23, 25, 28, 30, 32, 34))


def arrays() -> dict[str, np.ndarray]:
    """features.N.weight [out, in, 3, 3] and features.N.bias [out], float32."""
    draw, made = np.random.RandomState(1234), {}
    for number, channels, width in CONVOLUTIONS:
        scale = np.sqrt(2 / (9 * channels))
        made[f"features.{number}.weight"] = draw.randn(width, channels, 3, 3) * scale
        made[f"features.{number}.bias"] = draw.randn(width) * 0.05
    return {name: array.astype(np.float32) for name, array in made.items()}
