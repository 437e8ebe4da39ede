"""VQ-NeRF (arXiv 2310.14487): SDF volume rendering through a vector-quantised decoder."""

from vqnerf_jax.clip import load_clip
from vqnerf_jax.codebook import FSQ, LFQ, Codebook
from vqnerf_jax.field import SDFField
from vqnerf_jax.field_weights import load_neus, neus_to_torch
from vqnerf_jax.vqgan import VQGAN
from vqnerf_jax.vqgan_weights import load_vqgan, vqgan_to_torch

__all__ = ["FSQ", "LFQ", "VQGAN", "Codebook", "SDFField"]
__all__ += ["load_clip", "load_neus", "load_vqgan", "neus_to_torch", "vqgan_to_torch"]
