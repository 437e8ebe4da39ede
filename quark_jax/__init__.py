"""Quark (arXiv 2411.16680): real-time view synthesis with layered depth maps."""

from quark_jax import ldm
from quark_jax.model import PAPER_STAGES, Quark, Stage

__all__ = ["PAPER_STAGES", "Quark", "Stage", "ldm"]
