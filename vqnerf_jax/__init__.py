"""VQ-NeRF (arXiv 2310.14487): SDF volume rendering through a vector-quantised decoder."""

from vqnerf_jax.codebook import FSQ, LFQ, Codebook
from vqnerf_jax.vqgan import VQGAN
from vqnerf_jax.vqgan_weights import load_vqgan, vqgan_to_torch

__all__ = ["FSQ", "LFQ", "VQGAN", "Codebook", "load_vqgan", "vqgan_to_torch"]
