"""LVSM: `tiny` (minutes on a CPU), `tiny_encoder_decoder`, and the published settings.

    python launch/train.py --config=configs/lvsm.py:tiny --workdir=runs/tiny
    python launch/train.py --config=configs/lvsm.py:scene_decoder_only_256 --workdir=runs/lvsm \\
        --config.data.source=PATH --config.loss.perceptual_weights=imagenet-vgg-verydeep-19.mat

Published are scene_{decoder_only,encoder_decoder}_{256,512} (two inputs of a video, RealEstate10K)
and object_{decoder_only,encoder_decoder}_{256,512} (four inputs around an object). The 512 stages
start from the 256 ones: --config.init_from=RUN. Variants follow after commas:

- `one_gpu` and `two_gpus`: the small recipes, 6 and 12 layers, batches of 64;
- of decoder-only settings, what came after LVSM: `prope` and `gta` (relative camera encoding),
  `prefix` (inputs do not see targets, and are kept as keys and values), `cross_attention` (SVSM);
- `mixed`: batches of different numbers of inputs (up to two more) and aspect ratios (1:1 to 7:3);
- `overfit` (of `tiny`): one scene until it is learnt by heart.

PSNR on RealEstate10K as published: 29.67 (decoder-only, 256), 28.58 (encoder-decoder, 256),
27.66 (6 layers, one GPU), 28.56 (12 layers, two GPUs).
"""

from typing import Any

from ml_collections import ConfigDict


def get_config(arg: str = "scene_decoder_only_256") -> Any:
    """Builds a configuration from a setting and, after commas, variants.

    Raises:
      ValueError: a variant that is not of this setting.
    """
    setting, *variants = arg.split(",")
    config = SETTINGS[setting]()
    for name in variants:
        VARIANTS[name](config)
    return config


def _base() -> Any:
    """Everything the settings share: the 256 stage of scenes, decoder-only."""
    return ConfigDict(
        dict(
            system="lvsm",
            seed=0,
            num_steps=100_000,
            init_from="",
            batch_size=512,
            accumulate=1,
            log_every=50,
            eval_every=5_000,
            checkpoint_every=2_000,
            keep_checkpoints=3,
            ema=0.0,
            max_skipped=50,
            stop_after_minutes=0.0,
            profile=(0, 0),
            optim=dict(
                learning_rate=4e-4,
                warmup_steps=3_000,
                schedule="cosine",
                schedule_over="steps",
                decay_steps=0,
                b1=0.9,
                b2=0.95,
                weight_decay=0.05,
                clip_norm=1.0,
                skip_norm=5.0,
                nonfinite="replace",
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1, context=1),
            data=dict(
                # A folder of clips; `tiny` needs none.
                source="",
                height=256,
                width=256,
                num_context=2,
                # Below num_context: each batch has a random number of inputs from it on; 0: off.
                min_context=0,
                num_target=6,
                # Image sizes of which each batch has one, cut out of height x width: for example
                # ((256, 256), (256, 448), (192, 448)) with a width of 448; (): off.
                crops=(),
                # Two ends of a stretch of video and frames between them; any of the eight views
                # may be a target.
                choice="window",
                nearest=16,
                min_distance=25,
                max_distance=192,
                targets_may_be_context=True,
                skip_short_scenes=True,
                # The training clips of a split are all for training.
                hold_out_every=0,
                num_scenes=100_000,
                views_per_scene=24,
                baseline=(0.03, 0.12),
                rigs=("grid", "arc", "orbit", "walk"),
                # Rendered scenes stay in memory: for a procedural world of few scenes.
                keep_in_memory=False,
                workers=8,
                max_bad_scenes=100,
            ),
            eval=dict(source="", num_scenes=16, views=1, photo_size=(256, 256)),
            poses=dict(normalize="all", scale=1.35),
            model=dict(
                architecture="decoder_only",
                width=768,
                head_size=64,
                patch=8,
                mlp_ratio=4.0,
                layers=24,
                depth_init=True,
                target_chunk=0,
                remat="full",
                unroll=1,
                dtype="bfloat16",
            ),
            # The weights of VGG-19 are the user's own file; without them the loss is l2 alone.
            loss=dict(l2_weight=1.0, perceptual_weight=0.5, perceptual_weights=""),
        )
    )


def _scene_decoder_only_512() -> Any:
    return _at_512(_base(), num_steps=20_000, learning_rate=1e-4)


def _scene_encoder_decoder_256() -> Any:
    config = _base()
    _encoder_decoder(config, 12, 12, 3_072)
    return config


def _scene_encoder_decoder_512() -> Any:
    return _at_512(_scene_encoder_decoder_256(), num_steps=20_000, learning_rate=1e-4)


def _object_decoder_only_256() -> Any:
    """Random views of renderings around a normalised object, whose poses are used as they are."""
    config = _base()
    config.num_steps = 80_000
    config.optim.warmup_steps = 2_500
    config.data.update(num_context=4, num_target=8, choice="random", views_per_scene=32)
    config.poses.normalize = "none"
    config.loss.perceptual_weight = 1.0
    return config


def _object_decoder_only_512() -> Any:
    return _at_512(_object_decoder_only_256(), num_steps=10_000, learning_rate=4e-5)


def _object_encoder_decoder_256() -> Any:
    config = _object_decoder_only_256()
    _encoder_decoder(config, 12, 12, 3_072)
    return config


def _object_encoder_decoder_512() -> Any:
    return _at_512(_object_encoder_decoder_256(), num_steps=10_000, learning_rate=4e-5)


def _encoder_decoder(config: Any, encoder_layers: int, decoder_layers: int, latents: int) -> None:
    del config.model.layers
    config.model.update(architecture="encoder_decoder", latents=latents)
    config.model.update(encoder_layers=encoder_layers, decoder_layers=decoder_layers)


def _at_512(config: Any, num_steps: int, learning_rate: float) -> Any:
    """The second stage, which starts from the first; its warm-up is not published."""
    config.update(num_steps=num_steps, batch_size=128)
    config.optim.update(learning_rate=learning_rate, warmup_steps=500)
    config.data.update(height=512, width=512)
    config.eval.photo_size = (512, 512)
    config.model.target_chunk = 2
    return config


def _decoder_only(config: Any, variant: str) -> None:
    """Raises ValueError where a variant does not fit the architecture of the setting."""
    if config.model.architecture != "decoder_only":
        raise ValueError(
            f"variant {variant!r} changes decoder-only settings, and this one's architecture is "
            f"{config.model.architecture!r}; choose tiny or a setting named decoder_only."
        )


def _one_gpu(config: Any) -> None:
    _decoder_only(config, "one_gpu")
    config.model.layers = 6
    config.update(batch_size=64, accumulate=8)


def _two_gpus(config: Any) -> None:
    _decoder_only(config, "two_gpus")
    config.model.layers = 12
    config.update(batch_size=64, accumulate=4)


def _relative(config: Any, kind: str) -> None:
    # SVSM's tokens, too, all belong to cameras.
    if config.model.architecture != "cross_attention":
        _decoder_only(config, kind)
    config.model.relative = kind


def _prefix(config: Any) -> None:
    _decoder_only(config, "prefix")
    config.model.input_sees_target = False


def _cross_attention(config: Any) -> None:
    _decoder_only(config, "cross_attention")
    half = config.model.layers // 2
    del config.model.layers
    config.model.update(architecture="cross_attention", encoder_layers=half, decoder_layers=half)


def _mixed(config: Any) -> None:
    data, height = config.data, config.data.height
    wide = height * 7 // 4
    data.update(min_context=data.num_context, num_context=data.num_context + 2, width=wide)
    data.crops = ((height, height), (height, wide), (height * 3 // 4, wide))
    data.nearest = max(data.nearest, data.num_context)


def _tiny() -> Any:
    """Learns in minutes on two CPU cores: 32 x 32 pixels, 471,232 parameters."""
    config = _base()
    config.update(num_steps=2_000, batch_size=8, log_every=100, eval_every=500)
    config.update(checkpoint_every=500, ema=0.99)
    config.optim.update(learning_rate=2e-3, warmup_steps=100)
    config.data.update(source="procedural", height=32, width=32, num_target=2, workers=1)
    # Inputs beside the target, which the evaluation asks for; between and beyond them alike.
    config.data.update(choice="nearest_random", nearest=3, targets_may_be_context=False)
    config.data.update(views_per_scene=10, baseline=(0.06, 0.2), rigs=("grid", "arc"))
    # To render as many scenes as there are steps would take longer than the training.
    config.data.update(num_scenes=512, keep_in_memory=True, hold_out_every=8, max_bad_scenes=0)
    config.eval.update(views=2, photo_size=(32, 32))
    # What is rendered does not depend on how many targets are asked for at once.
    config.poses.normalize = "inputs"
    config.model.update(width=96, head_size=32, patch=4, layers=4, remat="none", dtype="float32")
    config.loss.perceptual_weight = 0.0
    return config


def _tiny_encoder_decoder() -> Any:
    """Fewer, larger tokens than `tiny`, and more steps: the latents have to be learnt first.

    At its end it is above the nearest view in PSNR, not in SSIM: pictures are patches of colour.
    """
    config = _tiny()
    config.update(num_steps=5_000, ema=0.995)
    config.optim.update(learning_rate=1e-3, warmup_steps=200)
    # Cameras further apart, and inputs among the targets: to give back what it was shown is what
    # the latents learn first.
    config.data.update(baseline=(0.2, 0.4), rigs=("arc", "orbit"), num_scenes=1_024)
    config.data.update(num_target=4, targets_may_be_context=True)
    config.model.update(width=192, patch=8)
    _encoder_decoder(config, 2, 3, 48)
    return config


def _overfit(config: Any) -> None:
    """Four views of one scene: what the network can hold, shown on what it was trained with."""
    if config.data.source != "procedural":
        raise ValueError("variant 'overfit' is of the tiny settings: it makes its own scene.")
    config.update(num_steps=1_500, batch_size=4, eval_every=0)
    config.optim.weight_decay = 0.0
    config.data.update(num_scenes=1, views_per_scene=4, num_target=2, workers=0)


SETTINGS = {
    "tiny": _tiny,
    "tiny_encoder_decoder": _tiny_encoder_decoder,
    "scene_decoder_only_256": _base,
    "scene_decoder_only_512": _scene_decoder_only_512,
    "scene_encoder_decoder_256": _scene_encoder_decoder_256,
    "scene_encoder_decoder_512": _scene_encoder_decoder_512,
    "object_decoder_only_256": _object_decoder_only_256,
    "object_decoder_only_512": _object_decoder_only_512,
    "object_encoder_decoder_256": _object_encoder_decoder_256,
    "object_encoder_decoder_512": _object_encoder_decoder_512,
}
VARIANTS = {
    "one_gpu": _one_gpu,
    "two_gpus": _two_gpus,
    "prope": lambda config: _relative(config, "prope"),
    "gta": lambda config: _relative(config, "gta"),
    "prefix": _prefix,
    "cross_attention": _cross_attention,
    "mixed": _mixed,
    "overfit": _overfit,
}
