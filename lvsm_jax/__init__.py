"""LVSM (arXiv 2410.17242): a transformer for view synthesis with minimal 3D bias."""

from lvsm_jax.model import LVSM, SVSM, LVSMEncoderDecoder
from lvsm_jax.weights import load_torch, to_torch

__all__ = ["LVSM", "LVSMEncoderDecoder", "SVSM", "load_torch", "to_torch"]
