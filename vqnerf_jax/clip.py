"""CLIP's vision transformer (arXiv 2103.00020) and the semantic loss that compares its embeddings.

Weights are the user's file. Images are [b, h, w, 3] in [0, 1]; pixels are images of the network's
size, normalised, [b, s, s, 3].
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import chex
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from nvs_common.attention import attention
from nvs_common.errors import InputError
from nvs_common.types import Array, Variables
from vqnerf_jax import codes, resizing, state_dicts

KIND = "CLIP's vision transformer"
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
EPSILON = 1e-5
ACTIVATIONS = ("quick_gelu", "gelu")


class VisionTransformer(nn.Module):
    """CLIP's image encoder.

    Attributes:
      size: side of the pixels.
      patch: side of a token's patch.
      width: d.
      layers: l.
      heads: a, of attention.
      hidden: width of the MLPs.
      embedding: width of the embedding.
      activation: "quick_gelu" as OpenAI trained, or "gelu".
      dtype: compute type; None is that of pixels and parameters.
    """

    size: int = 224
    patch: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    embedding: int = 512
    activation: str = "quick_gelu"
    dtype: Any = None

    def setup(self):
        if self.width % self.heads or self.activation not in ACTIVATIONS:
            raise InputError(
                f"CLIP: heads={self.heads} must divide width={self.width}, and activation "
                f"{self.activation!r} be one of {ACTIVATIONS}."
            )
        normal, patches = nn.initializers.normal(0.02), (self.size // self.patch) ** 2
        kernel, step = (self.patch, self.patch), (self.patch, self.patch)
        self.patches = nn.Conv(self.width, kernel, step, "VALID", use_bias=False, dtype=self.dtype)
        self.class_token = self.param("class_token", normal, (self.width,))
        self.positions = self.param("positions", normal, (patches + 1, self.width))
        self.norm_in, self.norm_out = (_norm(self.dtype) for _ in range(2))
        self.blocks = [
            Block(self.heads, self.hidden, self.activation, self.dtype) for _ in range(self.layers)
        ]
        self.projection = nn.Dense(self.embedding, use_bias=False, dtype=self.dtype)

    def __call__(self, pixels: Array) -> Array:
        """Embeddings [b, e] of pixels, not normalised."""
        return self.projection(self.norm_out(self.hidden_states(pixels)[-1][:, 0]))

    def hidden_states(self, pixels: Array) -> list[Array]:
        """Tokens [b, 1 + n, d] before the first block and after each; the first is the class's.

        Raises:
          InputError: pixels of another size.
        """
        if pixels.shape[1:] != (self.size, self.size, 3):
            raise InputError(
                f"CLIP: pixels are {pixels.shape[1:]}, expected {(self.size, self.size, 3)}; use "
                "clip.embed for images of any size."
            )
        x = self.patches(pixels)
        x = x.reshape(x.shape[0], -1, self.width)
        first = jnp.broadcast_to(self.class_token.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([first, x], axis=1) + self.positions[None].astype(x.dtype)
        states = [self.norm_in(x)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    heads: int
    hidden: int
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]

        def dense(size: int, name: str) -> nn.Dense:
            return nn.Dense(size, dtype=self.dtype, name=name)

        y = _norm(self.dtype, "norm1")(x)
        q, k, v = (
            dense(width, name)(y).reshape(*x.shape[:2], self.heads, -1)
            for name in ("query", "key", "value")
        )
        x = x + dense(width, "output")(attention(q, k, v).reshape(x.shape))
        y = dense(self.hidden, "mlp_in")(_norm(self.dtype, "norm2")(x))
        y = y * nn.sigmoid(1.702 * y) if self.activation == "quick_gelu" else nn.gelu(y, False)
        return x + dense(width, "mlp_out")(y)


def embed(
    module: VisionTransformer,
    variables: Variables,
    images: Array,
    method: str = "bicubic_antialias",
) -> Array:
    """Embeddings [b, e] of length one of images [b, h, w, 3] of any size, in [0, 1]."""
    # Cubic kernels overshoot at edges, which stored images cannot.
    resized = jnp.clip(resizing.resize(images, module.size, module.size, method), 0, 1)
    pixels = normalize(resized)
    return codes.unit(jnp.asarray(module.apply(variables, pixels)))


def normalize(images: Array) -> Array:
    """Images [b, s, s, 3] in [0, 1] as the network sees them."""
    mean, deviation = (jnp.asarray(x, images.dtype).reshape(1, 1, 1, 3) for x in (MEAN, DEVIATION))
    return (images - mean) / deviation


def cosine_distance(a: Array, b: Array) -> Array:
    """1 - cosine of the angle between embeddings [b, e], their mean; the semantic loss."""
    chex.assert_equal_shape([a, b])
    return 1 - jnp.mean(jnp.sum(codes.unit(a) * codes.unit(b), axis=-1))


def _norm(dtype: Any, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False, dtype=dtype, name=name)


PARAM_AXES = {
    r"class_token|.*/(bias|scale)": (None,),
    r"positions": (None, None),
    r"patches/kernel": (None, None, None, "embed"),
    r"blocks_\d+/(query|key|value)/kernel": ("embed", "heads"),
    r"blocks_\d+/output/kernel": ("heads", "embed"),
    r"blocks_\d+/mlp_in/kernel": ("embed", "mlp"),
    r"blocks_\d+/mlp_out/kernel": ("mlp", "embed"),
    r"projection/kernel": ("embed", None),
}

# Published names -> ours. The text's half and what can be computed are left out.
_IGNORED = re.compile(
    r"text_model\..*|text_projection.*|logit_scale|logit_bias|.*position_ids|"
    r"transformer\..*|token_embedding\..*|positional_embedding|ln_final\..*|"
    r"input_resolution|context_length|vocab_size"
)
_LAYER = r"^vision_model\.encoder\.layers\.(\d+)\."
_RULES = (
    (r"^vision_model\.embeddings\.class_embedding$", "class_token"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "positions"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "patches/"),
    (r"^vision_model\.pre_layrnorm\.", "norm_in/"),
    (r"^vision_model\.post_layernorm\.", "norm_out/"),
    (r"^visual_projection\.", "projection/"),
    (_LAYER + r"layer_norm([12])\.", r"blocks_\1/norm\2/"),
    (_LAYER + r"mlp\.fc1\.", r"blocks_\1/mlp_in/"),
    (_LAYER + r"mlp\.fc2\.", r"blocks_\1/mlp_out/"),
    (_LAYER + r"self_attn\.q_proj\.", r"blocks_\1/query/"),
    (_LAYER + r"self_attn\.k_proj\.", r"blocks_\1/key/"),
    (_LAYER + r"self_attn\.v_proj\.", r"blocks_\1/value/"),
    (_LAYER + r"self_attn\.out_proj\.", r"blocks_\1/output/"),
)
# OpenAI's and open_clip's -> those of transformers.
_OPENAI = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)


# Fields of transformers' configurations that change nothing here.
_SILENT = (
    *("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "dropout"),
    *("attention_dropout", "initializer_factor", "initializer_range", "text_config"),
    *("text_config_dict", "vision_config_dict", "logit_scale_init_value"),
)


def load_clip(
    source: str | os.PathLike[str] | Mapping[str, Any], **config: Any
) -> tuple[VisionTransformer, Variables]:
    """Makes the vision transformer and its variables from published weights of CLIP.

    Args:
      source: a file that `nvs_common.torch_weights` reads, or name -> array, with names of
        transformers' CLIPModel, or of OpenAI's and open_clip's; arrays of the text's half are
        left out.
      **config: `heads`, which arrays do not tell (width / 64 by default), `activation`, `dtype`,
        or fields of transformers' vision configuration, alone or as `vision_config`, which are
        compared with the arrays. With `model_type`, `dtype` is transformers' and not looked at.

    Returns:
      The module and {"params": ...} in float32; float64 where the arrays and JAX are.

    Raises:
      InputError: a file that cannot be read, arrays that are missing, unknown or misshapen, or
        options that are unknown or contradict the arrays.
    """
    name, found = state_dicts.arrays(source, wanted=lambda key: not _IGNORED.fullmatch(key))
    found = _from_openai(found)
    module = _module(found, name, config)
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((1, module.size, module.size, 3))
    )
    flat: Any = flax.traverse_util.flatten_dict(shapes["params"], sep="/")
    named = {_ours(key): key for key in found}
    arrays = {path: _from_torch(found[key], path) for path, key in named.items()}
    state_dicts.check(arrays, {path: x.shape for path, x in flat.items()}, name, KIND)
    params = {path: jnp.asarray(x) for path, x in arrays.items()}
    return module, {"params": flax.traverse_util.unflatten_dict(params, sep="/")}


def _module(
    found: Mapping[str, np.ndarray], name: str, config: Mapping[str, Any]
) -> VisionTransformer:
    def shape(key: str, rank: int) -> tuple[int, ...]:
        return state_dicts.get(found, key, rank, name, KIND).shape

    width, _, patch, _ = shape("vision_model.embeddings.patch_embedding.weight", 4)
    tokens = shape("vision_model.embeddings.position_embedding.weight", 2)[0]
    layers = max((int(m[1]) + 1 for m in (re.match(_LAYER, k) for k in found) if m), default=1)
    given: dict[str, Any] = dict(config)
    given |= given.pop("vision_config", None) or {}
    dtype = None if "model_type" in given else given.pop("dtype", None)
    heads = given.pop("heads", given.get("num_attention_heads", width // 64))
    activation = given.pop("activation", given.get("hidden_act", "quick_gelu"))
    side, size = round((tokens - 1) ** 0.5), given.get("image_size")
    # Patches may leave a border.
    size = size if isinstance(size, int) and size // patch == side else patch * side
    module = VisionTransformer(
        size=size,
        patch=patch,
        width=width,
        layers=layers,
        heads=heads,
        hidden=shape("vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        embedding=shape("visual_projection.weight", 2)[0],
        activation=activation,
        dtype=dtype,
    )
    if not heads or width % heads:
        raise InputError(
            f"{name}: {heads} heads do not divide width {width}, and arrays do not tell their "
            "number; pass heads=..., the num_attention_heads of the published configuration."
        )
    published = dict(
        hidden_size=width,
        intermediate_size=module.hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=module.size,
        patch_size=patch,
        hidden_act=activation,
        layer_norm_eps=EPSILON,
        num_channels=3,
        projection_dim=module.embedding,
    )
    state_dicts.compare_config(given, published, name, _SILENT)
    return module


def _ours(key: str) -> str:
    for pattern, new in _RULES:
        key = re.sub(pattern, new, key)
    path, _, leaf = key.rpartition("/")
    if path and leaf == "weight":
        leaf = "scale" if "norm" in path else "kernel"
    return f"{path}/{leaf}" if path else leaf


def _from_torch(x: np.ndarray, path: str) -> np.ndarray:
    if not path.endswith("kernel"):
        return x
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def _from_openai(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays with names of transformers; query, key and value apart."""
    renamed = {}
    for key, x in found.items():
        for pattern, new in _OPENAI:
            key = re.sub(pattern, new, key)
        fused = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", key)
        if key == "visual.proj":
            renamed["visual_projection.weight"] = x.T
        elif fused:
            for part, rows in zip("qkv", np.split(x, 3), strict=True):
                renamed[f"{fused[1]}.self_attn.{part}_proj.{fused[2]}"] = rows
        else:
            renamed[key] = x
    return renamed
