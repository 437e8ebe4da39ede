"""VQ-NeRF: `tiny` (small, for a CPU), `object` (for a GPU), `dtu` (the paper's data), `womask`.

    python launch/train.py --config=configs/vqnerf.py:tiny --workdir=runs/tiny
    python launch/train.py --config=configs/vqnerf.py:object --workdir=runs/object \\
        --config.data.source=PATH --config.model.vqgan_weights=FILE --config.model.decoder=last \\
        --config.model.center=0,0,0 --config.model.radius=1.0

One run is one scene. What is of interest lies in the sphere of `model.center` and `model.radius`;
scenes of NeuS's layout come in the frame of their unit sphere. The paper publishes no weights of
losses, no schedule and no network sizes: these are NeuS's (arXiv 2106.10689), but for the losses of
`vqnerf_jax/supervision.py`. Variants follow after commas:

- `womask`: no masks; the cosine ratio is annealed, as NeuS does without masks;
- `pretrained`: with the file of an auto-encoder, latents first learn what its encoder gives;
- `neus`: the field alone, at full resolution, without latents and decoder;
- `noattn`: no attention in the decoder's middle;
- `volsdf`, `continuous`, `fsq`: another renderer, or other latents;
- `no_global`, `no_semantic`: without the full-resolution branch, or the loss on CLIP's embeddings.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config(arg: str = "object") -> Any:
    """Builds a configuration from a setting and, after commas, variants."""
    setting, *variants = arg.split(",")
    config = SETTINGS[setting]()
    for name in variants:
        VARIANTS[name](config)
    return config


def _base() -> Any:
    """Everything the settings share: NeuS's networks and schedule."""
    return ConfigDict(
        dict(
            system="vqnerf",
            seed=0,
            num_steps=300_000,
            init_from="",
            batch_size=1,
            accumulate=1,
            log_every=100,
            eval_every=10_000,
            checkpoint_every=10_000,
            keep_checkpoints=3,
            ema=0.0,
            max_skipped=50,
            stop_after_minutes=0.0,
            profile=(0, 0),
            optim=dict(
                learning_rate=5e-4,
                warmup_steps=5_000,
                schedule="cosine",
                schedule_over="steps",
                decay_steps=0,
                b1=0.9,
                b2=0.999,
                weight_decay=0.0,
                clip_norm=1.0,
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1, context=1),
            data=dict(
                source="",
                height=512,
                width=512,
                # The scene is in the parameters: inputs are not looked at.
                num_context=1,
                num_target=1,
                choice="random",
                nearest=16,
                hold_out_every=8,
                # A published split in place of every eighth view, such as dtu/scan24/32.
                split="",
                num_scenes=1,
                views_per_scene=64,
                baseline=(0.03, 0.12),
                rigs=("orbit",),
                keep_in_memory=True,
                workers=4,
                max_bad_scenes=0,
                # Which one of the source "procedural_object".
                object=0,
                with_mask=True,
            ),
            eval=dict(source="", num_scenes=1, views=8, photo_size=(512, 512)),
            model=dict(
                latent="vq",
                decoder="full",
                # A file of the auto-encoder, needed for every other `decoder`.
                vqgan_weights="",
                full_resolution=False,
                center=(0.0, 0.0, 0.0),
                radius=1.0,
                # Photographs with alpha are composited on white; black with files of masks.
                background=(1.0, 1.0, 1.0),
                chunk=512,
                field=dict(rgb_layers=2),
                vqgan=dict(num_codes=2048, code_width=16, beta_on="commitment"),
            ),
            # CLIP's weights are the user's own file; without them there is no semantic loss.
            loss=dict(
                decoded_weight=1.0,
                global_weight=1.0,
                eikonal_weight=0.1,
                mask_weight=0.1,
                quantizer_weight=1.0,
                regression_weight=0.0,
                regression_steps=50_000,
                clip_weight=0.1,
                clip_every=10,
                clip_weights="",
                # "pixels": the compressed branch does not move the surface (not in the paper).
                shape_from="both",
                latent_crop=64,
                global_rays=512,
                foreground=0.0,
                anneal_steps=0,
            ),
        )
    )


def _dtu() -> Any:
    """1200 x 1600 without masks, for 200,000 steps as CoCo-INR trains."""
    config = _base()
    config.num_steps = 200_000
    config.data.update(height=1200, width=1600)
    config.eval.photo_size = (1200, 1600)
    _womask(config)
    return config


def _tiny() -> Any:
    """Small networks for a CPU, on an object with masks over white."""
    config = _base()
    config.update(num_steps=2_000, log_every=100, eval_every=1_000, checkpoint_every=1_000)
    config.optim.update(learning_rate=2e-3, warmup_steps=100)
    config.optim.rates = (("field/grids", 5.0), ("vqgan", 0.5))
    config.data.update(height=96, width=96, views_per_scene=64, num_target=2, workers=0)
    config.data.source = "procedural_object"
    config.eval.update(views=2, photo_size=(96, 96))
    config.model.chunk = 4096
    config.model.field = ConfigDict(
        dict(
            layers=1,
            hidden=64,
            features=15,
            octaves=1,
            skips=(),
            grids=(16, 32, 64),
            grid_channels=4,
            color_layers=1,
            color_hidden=64,
            color_octaves=2,
            rgb_layers=2,
            samples=24,
            importance=16,
            rounds=2,
            precision="default",
        )
    )
    config.model.vqgan = ConfigDict(
        dict(
            # As configs/vqgan.py:tiny, whose weights fit.
            channels=(16, 32, 64),
            blocks=1,
            latent_channels=8,
            num_codes=256,
            code_width=8,
            groups=8,
            mid_attention=False,
            beta_on="commitment",
        )
    )
    config.loss.update(latent_crop=8, global_rays=128, foreground=0.6, shape_from="pixels")
    return config


def _womask(config: Any) -> None:
    config.data.with_mask = False
    config.model.background = (0.0, 0.0, 0.0)
    config.loss.update(mask_weight=0.0, foreground=0.0, anneal_steps=50_000)


def _pretrained(config: Any) -> None:
    """The encoder's latents of the true images are a dense signal while it lasts (ours)."""
    config.loss.update(regression_weight=1.0, regression_steps=config.num_steps // 2)


def _neus(config: Any) -> None:
    """The field alone, rendered at full resolution: what the decoder is measured against."""
    config.loss.update(decoded_weight=0.0, regression_weight=0.0, clip_weight=0.0)
    config.model.full_resolution = True


def _noattn(config: Any) -> None:
    """Attention among all latents grows with the square of their number."""
    config.model.vqgan.mid_attention = False


def _volsdf(config: Any) -> None:
    config.model.field.renderer = "volsdf"


def _continuous(config: Any) -> None:
    config.model.latent = "continuous"


def _fsq(config: Any) -> None:
    """8 x 8 x 6 x 5 = 1920 codes, about the 2048 of the codebook."""
    config.model.latent = "fsq"
    config.model.vqgan.update(quantizer="fsq", fsq_levels=(8, 8, 6, 5), code_width=4)


def _no_global(config: Any) -> None:
    config.loss.update(global_weight=0.0, global_rays=0, shape_from="both")


def _no_semantic(config: Any) -> None:
    config.loss.clip_weight = 0.0


SETTINGS = {"tiny": _tiny, "object": _base, "dtu": _dtu}
VARIANTS = {
    "womask": _womask,
    "pretrained": _pretrained,
    "neus": _neus,
    "noattn": _noattn,
    "volsdf": _volsdf,
    "continuous": _continuous,
    "fsq": _fsq,
    "no_global": _no_global,
    "no_semantic": _no_semantic,
}
