"""LVSM (arXiv 2410.17242): posed images to views of new cameras by a transformer alone.

`LVSM` is the decoder-only model (Sec. 3.2), `LVSMEncoderDecoder` the one with a fixed number of
latent tokens (Sec. 3.3). A target sees the inputs, never another target. Options that change the
published models are off by default; `SVSM` (arXiv 2602.21341) has targets look at the encoded
inputs themselves, without latent tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvsm_jax import blocks, decoding, relative, tokens
from nvs_common import attention, cameras, layers
from nvs_common.errors import InputError
from nvs_common.types import Array, Cameras, Views


class Trunk(nn.Module):
    """What the models share: sizes, tokenisers and head.

    Attributes:
      width: d, of the tokens.
      head_size: f, of an attention head.
      patch: side of a token's patch of pixels.
      mlp_ratio: hidden width of the MLPs, as a multiple of d.
      depth_init: initial weights fall with the layer, see `blocks.init`.
      scale_residuals: divide what a block adds by the root of the stack's number of layers.
      target_chunk: how many targets of a scene are rendered at once, 0 is all: memory does not
        grow with their number. The same result.
      remat: what training stores of a block: all ("none"), products of matrices ("dots") or its
        input alone ("full"). The same result.
      unroll: layers that are written out in the body of the loop over them.
      attention: implementation, see `nvs_common.attention`; None is the best that works.
      dtype: compute type of the blocks; rays, tokenisers, norms and head are float32.
    """

    width: int = 768
    head_size: int = 64
    patch: int = 8
    mlp_ratio: float = 4.0
    depth_init: bool = True
    scale_residuals: bool = False
    target_chunk: int = 0
    remat: str = "none"
    unroll: int = 1
    attention: str | None = None
    dtype: Any = jnp.float32

    def _make_shared(self) -> None:
        """Checks the sizes and makes tokenisers and head."""
        if min(self.width, self.head_size) < 1 or self.width % self.head_size:
            raise InputError(
                f"width={self.width} is not a multiple of head_size={self.head_size}; heads share "
                "the width equally."
            )
        if self.remat not in blocks.REMAT_POLICIES:
            raise InputError(
                f"remat={self.remat!r} is unknown; choose from {list(blocks.REMAT_POLICIES)}."
            )
        for name, least in (("patch", 1), ("unroll", 1), ("target_chunk", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: expected {least} or more.")
        attention.check_name(self.attention)
        normal, area = nn.initializers.normal(blocks.INITIAL_DEVIATION), self.patch**2
        posed, rays = area * tokens.POSED_CHANNELS, area * tokens.RAY_CHANNELS
        self.image_tokenizer = _Kernel((posed, self.width), normal)
        self.target_tokenizer = _Kernel((rays, self.width), normal)
        self.input_norm = _Scale(self.width)
        self.head_norm = _Scale(self.width)
        self.head = _Kernel((self.width, area * 3), normal)

    def _stack(self, name: str, num_layers: int) -> blocks.Params:
        """The parameters of a stack of blocks, kernels in the compute type."""
        if num_layers < 1:
            raise InputError(f"{name} has {num_layers} layers: expected 1 or more.")
        hidden = round(self.width * self.mlp_ratio)
        sizes = (num_layers, self.width, self.head_size, hidden, self.depth_init)
        return blocks.cast(self.param(name, blocks.init, *sizes), self.dtype)

    def _setting(self, params: blocks.Params) -> blocks.Setting:
        """How a stack of blocks is computed."""
        scale = blocks.depth(params) ** -0.5 if self.scale_residuals else 1.0
        return blocks.Setting(self.dtype, self.attention, self.remat, self.unroll, scale)

    def context_tokens(self, context: Views) -> Array:
        """Tokens of all pixels of context [b, v], [b, m, d] float32.

        Raises:
          InputError: images and cameras that do not belong together, or of odd sizes.
        """
        cameras.check_context(context)
        patches = tokens.of_views(context, self.patch)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        return _product(patches, self.image_tokenizer())

    def target_tokens(self, targets: Cameras) -> Array:
        """Tokens of the rays of targets [b, t], [b, t, n, d] float32."""
        return _product(tokens.of_cameras(targets, self.patch), self.target_tokenizer())

    def _normalized(self, x: Array) -> Array:
        return layers.layer_norm(x, self.input_norm(), blocks.EPSILON)

    def images(self, own: Array, height: int, width: int) -> Array:
        """Images [b, t, h, w, 3] in [0, 1] of the targets' last tokens [b, t, n, d]."""
        y = layers.layer_norm(own, self.head_norm(), blocks.EPSILON)
        colors = jax.nn.sigmoid(_product(y, self.head()))
        return tokens.unpatchify(colors, self.patch, height, width)

    def _over_chunks(
        self, render: Callable[[Cameras], Array], targets: Cameras, num_scenes: int
    ) -> Array:
        """render(targets) of targets [b, t], at most `target_chunk` at a time."""
        cameras.check_targets(targets, num_scenes)
        count, chunk = targets.near.shape[1], self.target_chunk
        # Parameters cannot be made inside a loop; where they are, pictures are not kept.
        if not 0 < chunk < count or self.is_initializing():
            return render(targets)
        if self.remat != "none":
            # The backward pass, too, holds one chunk at a time.
            render = jax.checkpoint(render)
        whole = count - count % chunk
        split = lambda x: x[:, :whole].reshape(x.shape[0], -1, chunk, *x.shape[2:])  # noqa: E731
        chunks = jax.tree.map(lambda x: jnp.moveaxis(split(jnp.asarray(x)), 1, 0), targets)
        images = jnp.moveaxis(jax.lax.map(render, chunks), 0, 1)
        images = images.reshape(images.shape[0], whole, *images.shape[3:])
        if whole == count:
            return images
        return jnp.concatenate([images, render(targets[:, whole:])], axis=1)


class WithFrames(Trunk):
    """A model whose tokens all belong to cameras, so that attention may compare these.

    Attributes:
      relative: "prope" or "gta", relative encodings of cameras in attention; see `relative`.
    """

    relative: str = "none"

    def _frames(self, cams: Cameras) -> relative.Frames | None:
        """Frames of the tokens of cameras [b, v], [b, v, n, ...]."""
        if self.relative not in relative.KINDS:
            raise InputError(
                f"relative={self.relative!r} is unknown; choose from {list(relative.KINDS)}."
            )
        if self.relative != "none" and self.head_size % 8:
            raise InputError(f"relative={self.relative!r} needs a head_size divisible by 8.")
        return relative.frames(cams, self.patch, self.head_size, self.relative)

    def _context_frames(self, cams: Cameras) -> relative.Frames | None:
        """Frames of the tokens of cameras [b, v], [b, m, ...]."""
        flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])  # noqa: E731
        return jax.tree.map(flat, self._frames(cams))


class LVSM(WithFrames):
    """The decoder-only LVSM: tokens of the inputs and of a target in one sequence.

    Attributes:
      layers: number of blocks.
      input_sees_target: as published. False: inputs attend to inputs alone, so that they are
        computed once for all targets, in training too; `encode` keeps their keys and values and
        `decode` renders from these. The same parameters, but the weights have to be trained so.
    """

    layers: int = 24
    input_sees_target: bool = True

    def setup(self):
        self._make_shared()
        self.blocks = self._stack("blocks", self.layers)

    def __call__(self, context: Views, targets: Cameras) -> Array:
        """Renders targets [b, t] from context [b, v]; images are [b, t, h, w, 3] in [0, 1]."""
        if not self.input_sees_target:
            return self.decode(self.encode(context), targets)
        inputs, at = self._inputs(context)
        setting = self._setting(self.blocks)
        shared = decoding.share(self.blocks, inputs, setting, at)

        def render(targets: Cameras) -> Array:
            own = self._normalized(self.target_tokens(targets))
            own = decoding.run(self.blocks, shared, own, setting, self._frames(targets))
            return self.images(own, targets.height, targets.width)

        return self._over_chunks(render, targets, inputs.shape[0])

    def encode(self, context: Views) -> decoding.Cache:
        """Keys and values of context [b, v] for `decode`, once for all targets.

        Raises:
          InputError: the inputs see the targets, so that nothing of them can be kept.
        """
        if self.input_sees_target:
            raise InputError(
                "the inputs of this LVSM attend to each target and cannot be encoded before it; "
                "train with input_sees_target=False for that, or use LVSMEncoderDecoder."
            )
        inputs, at = self._inputs(context)
        return decoding.cache_inputs(self.blocks, inputs, self._setting(self.blocks), at)

    def decode(self, cache: decoding.Cache, targets: Cameras) -> Array:
        """Renders targets [b, t] from what `encode` gave; images are [b, t, h, w, 3]."""
        setting = self._setting(self.blocks)

        def render(targets: Cameras) -> Array:
            own, at = self._normalized(self.target_tokens(targets)), self._frames(targets)
            own = decoding.run_cached(self.blocks, cache, own, setting, at, sees_own=True)
            return self.images(own, targets.height, targets.width)

        return self._over_chunks(render, targets, cache.key.shape[1])

    def _inputs(self, context: Views) -> tuple[Array, relative.Frames | None]:
        """Normalised tokens of context [b, v], [b, m, d], and their frames."""
        return self._normalized(self.context_tokens(context)), self._context_frames(context.cameras)


class LVSMEncoderDecoder(Trunk):
    """The encoder-decoder LVSM: inputs to latent tokens, and these to any number of targets.

    Attributes:
      encoder_layers, decoder_layers: number of blocks.
      latents: number of latent tokens.
    """

    encoder_layers: int = 12
    decoder_layers: int = 12
    latents: int = 3072

    def setup(self):
        self._make_shared()
        normal = nn.initializers.normal(blocks.INITIAL_DEVIATION)
        self.start = self.param("latents", normal, (self.latents, self.width), jnp.float32)
        self.encoder = self._stack("encoder", self.encoder_layers)
        self.decoder = self._stack("decoder", self.decoder_layers)

    def __call__(self, context: Views, targets: Cameras) -> Array:
        """Renders targets [b, t] from context [b, v]; images are [b, t, h, w, 3] in [0, 1]."""
        return self.decode(self.encode(context), targets)

    def encode(self, context: Views) -> Array:
        """The latent tokens [b, n, d] of context [b, v], float32; once for all targets."""
        inputs = self.context_tokens(context)
        start = jnp.broadcast_to(self.start[None], (inputs.shape[0], *self.start.shape))
        x = jnp.concatenate([start.astype(inputs.dtype), inputs], axis=1)
        keep = slice(self.latents)
        return blocks.run(self.encoder, x, self._setting(self.encoder), keep=keep)

    def decode(self, latents: Array, targets: Cameras) -> Array:
        """Renders targets [b, t] from latent tokens [b, n, d]; images are [b, t, h, w, 3]."""
        setting = self._setting(self.decoder)
        shared = decoding.share(self.decoder, self._normalized(latents), setting)

        def render(targets: Cameras) -> Array:
            own = self._normalized(self.target_tokens(targets))
            own = decoding.run(self.decoder, shared, own, setting)
            return self.images(own, targets.height, targets.width)

        return self._over_chunks(render, targets, latents.shape[0])


class SVSM(WithFrames):
    """An encoder of the inputs' tokens, and a decoder that attends to all of these.

    The published scheme of arXiv 2602.21341; its details (a block of the decoder is attention to
    the encoded inputs, then an MLP) are our reading. Its residuals are those of `scale_residuals`.

    Attributes:
      encoder_layers, decoder_layers: number of blocks.
    """

    encoder_layers: int = 12
    decoder_layers: int = 12

    def setup(self):
        self._make_shared()
        self.encoder = self._stack("encoder", self.encoder_layers)
        self.decoder = self._stack("decoder", self.decoder_layers)

    def __call__(self, context: Views, targets: Cameras) -> Array:
        """Renders targets [b, t] from context [b, v]; images are [b, t, h, w, 3] in [0, 1]."""
        return self.decode(self.encode(context), targets)

    def encode(self, context: Views) -> decoding.Cache:
        """Keys and values of context [b, v] for `decode`, once for all targets."""
        at, setting = self._context_frames(context.cameras), self._setting(self.encoder)
        features = blocks.run(self.encoder, self.context_tokens(context), setting, at)
        setting = self._setting(self.decoder)
        return decoding.cache_features(self.decoder, self._normalized(features), setting, at)

    def decode(self, cache: decoding.Cache, targets: Cameras) -> Array:
        """Renders targets [b, t] from what `encode` gave; images are [b, t, h, w, 3]."""
        setting = self._setting(self.decoder)

        def render(targets: Cameras) -> Array:
            own, at = self.target_tokens(targets), self._frames(targets)
            own = decoding.run_cached(self.decoder, cache, own, setting, at, sees_own=False)
            return self.images(own, targets.height, targets.width)

        return self._over_chunks(render, targets, cache.key.shape[1])


class _Kernel(nn.Module):
    """A matrix."""

    shape: tuple[int, int]
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", self.init, self.shape, jnp.float32)


class _Scale(nn.Module):
    """The factors of a norm."""

    size: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("scale", nn.initializers.ones_init(), (self.size,), jnp.float32)


def _product(x: Array, kernel: Array) -> Array:
    """x [..., c] times a kernel [c, d], at full float32 precision on every backend."""
    return jnp.einsum("...c,cd->...d", x, kernel, precision="highest")


_STACK = r"(blocks|encoder|decoder)"
PARAM_AXES = {
    # Latent tokens are the encoder-decoder's alone.
    r"latents|(image|target)_tokenizer/kernel": (None, "embed"),
    r"(input|head)_norm/scale": (None,),
    r"head/kernel": ("embed", None),
    rf"{_STACK}/(attention|query|key|mlp)_norm/scale": ("layer", None),
    rf"{_STACK}/query/kernel": ("layer", "embed", "heads", None),
    rf"{_STACK}/key_value/kernel": ("layer", "embed", None, "heads", None),
    rf"{_STACK}/output/kernel": ("layer", "heads", None, "embed"),
    rf"{_STACK}/mlp_in/kernel": ("layer", "embed", "mlp"),
    rf"{_STACK}/mlp_out/kernel": ("layer", "mlp", "embed"),
}
