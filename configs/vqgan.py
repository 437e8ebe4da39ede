"""VQGAN, whose codes and decoder VQ-NeRF takes: `tiny` (a CPU), `f4_2048x16`, `x8`, `x32`, `f4`.

    python launch/train.py --config=configs/vqgan.py:tiny --workdir=runs/codes
    python launch/train.py --config=configs/vqgan.py:f4_2048x16 --workdir=runs/codes \\
        --config.data.source=images:FOLDER --config.loss.lpips_weights=FILE
    python launch/reconstruct.py --workdir=runs/codes --out=report --export=codes.npz

Trains on any images: `images:FOLDER`, scenes in any layout, the procedural ones. VQ-NeRF's paper
(arXiv 2310.14487) has 2048 codes of 16 numbers, and compares 8 and 32, for every fourth pixel; how
they were trained it does not say: schedule and losses are latent diffusion's (arXiv 2112.10752),
`f4` is its vq-f4 with 8192 codes of 3 numbers. Variants follow after commas:

- `no_gan`, `no_perceptual`: without these losses;
- `noattn`: no attention in the middle;
- `gradient`: codes learn by gradient, as published, and not as running means with restarts.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config(arg: str = "f4_2048x16") -> Any:
    """Builds a configuration from a setting and, after commas, variants."""
    setting, *variants = arg.split(",")
    config = SETTINGS[setting]()
    for name in variants:
        VARIANTS[name](config)
    return config


def _base(num_codes: int = 2048, code_width: int = 16) -> Any:
    """What the settings share."""
    return ConfigDict(
        dict(
            system="vqgan",
            seed=0,
            num_steps=500_000,
            init_from="",
            batch_size=8,
            accumulate=1,
            log_every=100,
            # The decoder of given images: launch/reconstruct.py evaluates it.
            eval_every=0,
            checkpoint_every=10_000,
            keep_checkpoints=3,
            ema=0.0,
            max_skipped=50,
            stop_after_minutes=0.0,
            profile=(0, 0),
            optim=dict(
                # 4.5e-6 for each image of a batch.
                learning_rate=3.6e-5,
                warmup_steps=0,
                schedule="constant",
                decay_steps=0,
                b1=0.5,
                b2=0.9,
                weight_decay=0.0,
                clip_norm=0.0,
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1, context=1),
            data=dict(
                source="",
                height=256,
                width=256,
                # A sample is one image; its context, another one, is not looked at.
                num_context=1,
                num_target=1,
                choice="random",
                nearest=16,
                hold_out_every=16,
                num_scenes=10_000,
                views_per_scene=4,
                baseline=(0.1, 0.3),
                rigs=("orbit", "arc", "grid"),
                keep_in_memory=False,
                workers=4,
                max_bad_scenes=0,
            ),
            eval=dict(source="", num_scenes=4, views=2, photo_size=(256, 256)),
            model=dict(
                channels=(128, 256, 512),
                blocks=2,
                latent_channels=code_width,
                num_codes=num_codes,
                code_width=code_width,
                groups=32,
                mid_attention=True,
                quantizer="vq",
                beta=0.25,
                beta_on="codebook",
                update="ema",
                restart_below=0.05,
                kmeans_steps=10,
            ),
            discriminator=dict(channels=64, layers=3, groups=32),
            loss=dict(
                l1_weight=1.0,
                perceptual_weight=1.0,
                lpips_weights="",
                quantizer_weight=1.0,
                quantizer_start=0,
                gan_weight=0.8,
                gan_start=50_000,
            ),
        )
    )


def _tiny() -> Any:
    """Twenty minutes on a CPU, on procedural objects that are not those of VQ-NeRF's configs."""
    config = _base(256, 8)
    config.update(num_steps=3_000, batch_size=2, checkpoint_every=1_500)
    config.optim.update(
        learning_rate=2e-3, warmup_steps=50, schedule="cosine", b1=0.9, b2=0.99, clip_norm=1.0
    )
    config.data.update(source="procedural_objects", height=64, width=64, num_target=2)
    config.data.update(num_scenes=48, views_per_scene=8, hold_out_every=8)
    config.data.update(keep_in_memory=True, workers=0)
    config.eval.update(photo_size=(64, 64))
    config.model.update(channels=(16, 32, 64), blocks=1, groups=8, mid_attention=False)
    config.discriminator.update(channels=16, layers=2, groups=8)
    # Colours come after light and dark: codes that start before them never tell them apart.
    config.loss.update(perceptual_weight=0.0, gan_weight=0.0, quantizer_start=1_500)
    return config


def _no_gan(config: Any) -> None:
    config.loss.gan_weight = 0.0


def _no_perceptual(config: Any) -> None:
    config.loss.perceptual_weight = 0.0


def _noattn(config: Any) -> None:
    config.model.mid_attention = False


def _gradient(config: Any) -> None:
    config.model.update(update="gradient", restart_below=0.0, kmeans_steps=0)
    # Nothing starts such codes among latents that were learnt without them.
    config.loss.quantizer_start = 0


SETTINGS = {
    "tiny": _tiny,
    "f4_2048x16": _base,
    "f4_2048x8": lambda: _base(2048, 8),
    "f4_2048x32": lambda: _base(2048, 32),
    "f4": lambda: _base(8192, 3),
}
VARIANTS = {
    "no_gan": _no_gan,
    "no_perceptual": _no_perceptual,
    "noattn": _noattn,
    "gradient": _gradient,
}
