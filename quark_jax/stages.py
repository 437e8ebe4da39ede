"""The schedule of Quark (arXiv 2411.16680, Tab. 8): stages, and the fusion block of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from nvs_common import layers
from nvs_common.errors import InputError
from nvs_common.types import Array
from quark_jax import fusion, one_to_many


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of Tab. 8: the initialisation or one update-and-fuse step.

    Attributes:
      level: pyramid level of the features; the volume's grid is 2^-level of the finest.
      blocks: repetitions of (attention, convolutions).
      heads: attention heads.
      convs: residual convolution blocks after each attention.
      collapse: halve the number of layers first.
    """

    level: int
    blocks: int
    heads: int
    convs: int
    collapse: bool = False


def check_stages(stages: Sequence[Stage], num_levels: int) -> None:
    """Whether stages can follow each other on a pyramid of `num_levels` levels.

    Raises:
      InputError: no stages, a level that the pyramid does not have, or layers that collapse
        before there are any.
    """
    if not stages:
        raise InputError("stages is empty; expected the initialisation and the steps after it.")
    for number, stage in enumerate(stages):
        if not 0 <= stage.level < num_levels:
            raise InputError(
                f"stage {number} is of level {stage.level}, and encoder_blocks makes {num_levels} "
                "levels; give every level its blocks, or choose a lower one."
            )
    if stages[0].collapse:
        raise InputError("stage 0 collapses layers, and before it there are none; unset it there.")


# Initialise, then U&F 0 to 4, as in Tab. 8.
PAPER_STAGES = (
    Stage(level=3, blocks=3, heads=4, convs=2),
    Stage(level=3, blocks=3, heads=4, convs=2),
    Stage(level=2, blocks=3, heads=4, convs=2),
    Stage(level=2, blocks=2, heads=4, convs=1),
    Stage(level=1, blocks=2, heads=2, convs=1, collapse=True),
    Stage(level=0, blocks=2, heads=1, convs=1, collapse=True),
)


class Fused(nn.Module):
    """Alternating attention and convolutions of one stage (Eq. 9 and 10)."""

    stage: Stage
    folded: bool
    uniform: bool
    residual_scale: float
    query_scale: float
    dtype: Any
    implementation: str | None = None

    @nn.compact
    def __call__(self, volume: Array, delta: Array | one_to_many.Unstored, valid: Array) -> Array:
        """volume [n, l, y, x, c], delta [v, n, l, y, x, c], valid [v, n, l, y, x]."""
        for block in range(self.stage.blocks):
            volume = fusion.OneToMany(
                self.stage.heads,
                self.folded,
                self.uniform,
                self.residual_scale,
                self.query_scale,
                self.dtype,
                self.implementation,
                name=f"attention{block}",
            )(volume, delta, valid)
            for conv in range(self.stage.convs):
                name = f"conv{block}_{conv}"
                volume = layers.ConvBlock(self.residual_scale, self.dtype, name=name)(volume)
        return volume
