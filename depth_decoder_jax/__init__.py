"""Depth-guided decoding (arXiv 2408.14016): views that agree, by attention along short rays."""

from depth_decoder_jax.cross_view import DepthTruncatedAttention
from depth_decoder_jax.vae import SVDVAE
from depth_decoder_jax.weights import load_svd, to_torch

__all__ = ["DepthTruncatedAttention", "SVDVAE", "load_svd", "to_torch"]
