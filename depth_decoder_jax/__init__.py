"""Depth-guided decoding (arXiv 2408.14016): views that agree, by attention along short rays."""

from depth_decoder_jax.cross_view import DepthTruncatedAttention
from depth_decoder_jax.depth_noise import structured_depth_noise
from depth_decoder_jax.model import DepthGuidedDecoder
from depth_decoder_jax.two_pass import decode_with_depth
from depth_decoder_jax.vae import SVDVAE
from depth_decoder_jax.weights import load_svd, to_torch

__all__ = [
    "SVDVAE",
    "DepthGuidedDecoder",
    "DepthTruncatedAttention",
    "decode_with_depth",
    "load_svd",
    "structured_depth_noise",
    "to_torch",
]
