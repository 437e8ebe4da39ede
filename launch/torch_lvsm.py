"""LVSM in plain PyTorch, what launch/benchmark.py compares with: one sequence for each target.

Eager, with `scaled_dot_product_attention`; nothing is computed again for the backward pass. Its
parameters have the names of the published code, so that `lvsm_jax.weights.to_torch` fills them.
It needs PyTorch: pip install -e '.[torch]'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from lvsm_jax import LVSM, LVSMEncoderDecoder, blocks, tokens
from nvs_common.types import Cameras, Views


class LVSMs(nn.Module):
    """Both LVSMs, of the sizes of one of this library's.

    Args:
      like: the module of this library.
      state: its state_dict, name -> array.
    """

    def __init__(self, like: LVSM | LVSMEncoderDecoder, state: Mapping[str, np.ndarray]):
        super().__init__()
        width, area, self.patch = like.width, like.patch**2, like.patch
        self.image_tokenizer = nn.Sequential(
            _Patches(self.patch), _linear(area * tokens.POSED_CHANNELS, width)
        )
        self.target_pose_tokenizer = nn.Sequential(
            _Patches(self.patch), _linear(area * tokens.RAY_CHANNELS, width)
        )
        self.image_token_decoder = nn.Sequential(
            _layer_norm(width), _linear(width, area * 3), nn.Sigmoid()
        )
        hidden = round(like.mlp_ratio * width)
        stack = lambda count: nn.Sequential(  # noqa: E731
            *(_Block(width, like.head_size, hidden) for _ in range(count))
        )
        self.has_latents = isinstance(like, LVSMEncoderDecoder)
        if isinstance(like, LVSMEncoderDecoder):
            self.n_light_field_latent = nn.Parameter(torch.empty(like.latents, width))
            self.transformer_input_layernorm_decoder = _layer_norm(width)
            self.transformer_encoder = stack(like.encoder_layers)
            self.transformer_decoder = stack(like.decoder_layers)
        else:
            self.transformer_input_layernorm = _layer_norm(width)
            self.transformer_blocks = stack(like.layers)
        self.load_state_dict({name: torch.tensor(x) for name, x in state.items()})

    def forward(self, images: Any, context: Any, targets: Any, height: int, width: int) -> Any:
        """Renders targets [b, t] of height x width pixels.

        Args:
          images: of the inputs, [b, v, h, w, 3].
          context: (world_from_cam [b, v, 4, 4], intrinsics [b, v, 4]).
          targets: (world_from_cam [b, t, 4, 4], intrinsics [b, t, 4]).
          height: of a target, in pixels.
          width: of a target, in pixels.

        Returns:
          [b, t, height, width, 3].
        """
        num_scenes, num_targets = targets[0].shape[:2]
        rays = _plucker(context, *images.shape[2:4])
        inputs = self.image_tokenizer(torch.cat([2 * images - 1, rays], dim=-1)).flatten(1, 2)
        own = self.target_pose_tokenizer(_plucker(targets, height, width)).flatten(0, 1)
        each = lambda x: x.repeat_interleave(num_targets, dim=0)  # noqa: E731
        if self.has_latents:
            latents = self.n_light_field_latent.expand(num_scenes, -1, -1)
            encoded = self.transformer_encoder(torch.cat([latents, inputs], dim=1))
            x = torch.cat([own, each(encoded[:, : latents.shape[1]])], dim=1)
            x = self.transformer_decoder(self.transformer_input_layernorm_decoder(x))
            last = x[:, : own.shape[1]]
        else:
            x = torch.cat([each(inputs), own], dim=1)
            x = self.transformer_blocks(self.transformer_input_layernorm(x))
            last = x[:, -own.shape[1] :]
        colors = self.image_token_decoder(last)
        y, x = height // self.patch, width // self.patch
        colors = colors.view(num_scenes, num_targets, y, x, self.patch, self.patch, 3)
        return colors.transpose(3, 4).reshape(num_scenes, num_targets, height, width, 3)


def arguments(context: Views, targets: Cameras) -> tuple[Any, ...]:
    """What `LVSMs.forward` takes, from this library's arrays."""
    tensor = lambda x: torch.from_numpy(np.array(x, np.float32))  # noqa: E731
    posed = lambda cams: (tensor(cams.world_from_cam), tensor(cams.intrinsics))  # noqa: E731
    size = (targets.height, targets.width)
    return (tensor(context.images), posed(context.cameras), posed(targets), *size)


def render(model: LVSMs, args: tuple[Any, ...]) -> np.ndarray:
    """Pictures [b, t, h, w, 3]."""
    with torch.no_grad():
        return model(*args).numpy()


def train(model: LVSMs, args: tuple[Any, ...], truth: Any) -> float:
    """Squared error; its gradients are left in the parameters."""
    model.zero_grad(set_to_none=True)
    loss = functional.mse_loss(model(*args), truth)
    loss.backward()
    return loss.item()


class _Patches(nn.Module):
    """Cuts [b, v, h, w, c] into [b, v, n, p * p * c]."""

    def __init__(self, patch: int):
        super().__init__()
        self.patch = patch

    def forward(self, x: Any) -> Any:
        p, (b, v, h, w, c) = self.patch, x.shape
        x = x.view(b, v, h // p, p, w // p, p, c).transpose(3, 4)
        return x.reshape(b, v, (h // p) * (w // p), p * p * c)


class _Attention(nn.Module):
    """Self-attention with normalised queries and keys."""

    def __init__(self, width: int, head_size: int):
        super().__init__()
        self.head_size = head_size
        self.to_qkv = _linear(width, 3 * width)
        self.fc = _linear(width, width)
        self.q_norm = nn.RMSNorm(head_size, eps=blocks.EPSILON)
        self.k_norm = nn.RMSNorm(head_size, eps=blocks.EPSILON)

    def forward(self, x: Any) -> Any:
        heads = (*x.shape[:2], -1, self.head_size)
        q, k, v = (y.view(heads).transpose(1, 2) for y in self.to_qkv(x).chunk(3, dim=-1))
        out = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.fc(out.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    """Two matrices and the exact GELU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.mlp = nn.Sequential(_linear(width, hidden), nn.GELU(), _linear(hidden, width))

    def forward(self, x: Any) -> Any:
        return self.mlp(x)


class _Block(nn.Module):
    """Attention, then an MLP, both of a norm and added."""

    def __init__(self, width: int, head_size: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = _layer_norm(width), _layer_norm(width)
        self.attn = _Attention(width, head_size)
        self.mlp = _MLP(width, hidden)

    def forward(self, x: Any) -> Any:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _plucker(posed: tuple[Any, Any], height: int, width: int) -> Any:
    """o x d and d of each pixel, [b, v, h, w, 6], of (world_from_cam, intrinsics)."""
    world_from_cam, intrinsics = posed
    fx, fy, cx, cy = (x[..., None, None] for x in intrinsics.unbind(-1))
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    x, y = (u - cx) / fx, (v - cy) / fy
    rotation = world_from_cam[..., None, None, :3, :3]
    d = (rotation @ torch.stack([x, y, torch.ones_like(x)], dim=-1)[..., None]).squeeze(-1)
    d = functional.normalize(d, dim=-1)
    origin = world_from_cam[..., None, None, :3, 3].expand_as(d)
    return torch.cat([torch.linalg.cross(origin, d), d], dim=-1)


def _linear(inputs: int, outputs: int) -> Any:
    return nn.Linear(inputs, outputs, bias=False)


def _layer_norm(width: int) -> Any:
    return nn.LayerNorm(width, eps=blocks.EPSILON, bias=False)
