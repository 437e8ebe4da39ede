"""The depth-guided decoder: `tiny` and `tiny_autoencoder` (on a CPU), and `svd`.

    python launch/train.py --config=configs/depth_decoder.py:tiny_autoencoder --workdir=runs/vae
    python launch/train.py --config=configs/depth_decoder.py:tiny --workdir=runs/decoder \\
        --config.init_from=runs/vae

With --config.loss.stage=plain_decoder the second command trains the decoder on the same noisy
latents without attention between views, to compare with (launch/depth_quality.py does).

`svd` has the sizes of the released autoencoder and what is published of its training: 3,000 steps
of batches of 8 objects. Learning rates, losses, numbers of views and resolution are not published.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config(arg: str = "svd") -> Any:
    """Builds a configuration by its name."""
    return SETTINGS[arg]()


def _svd() -> Any:
    return ConfigDict(
        dict(
            system="depth_decoder",
            seed=0,
            num_steps=3_000,
            init_from="",
            # Parts that the run or file of init_from, such as an autoencoder's, need not have.
            init_new=("cross_", "pyramid", "broadcast_"),
            batch_size=8,
            accumulate=1,
            log_every=50,
            # Held-out views are decoded, not rendered: there is nothing for a plan of targets.
            eval_every=0,
            checkpoint_every=500,
            keep_checkpoints=3,
            ema=0.0,
            max_skipped=20,
            stop_after_minutes=0.0,
            profile=(0, 0),
            optim=dict(
                learning_rate=1e-4,
                warmup_steps=100,
                schedule="cosine",
                decay_steps=0,
                b1=0.9,
                b2=0.999,
                weight_decay=0.01,
                clip_norm=1.0,
                # The encoder is frozen, the decoder it was trained with moves slowly.
                rates=(("vae/encoder", 0.0), ("vae/quant_conv", 0.0), ("vae/decoder", 0.1)),
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1, context=1),
            data=dict(
                # Or a folder of renders with depth, in the layouts of nvs_common/data/layouts.py.
                source="objects",
                height=256,
                width=256,
                # The front view, and the views to decode.
                num_context=1,
                num_target=6,
                choice="random",
                # Of the choice "nearest_random".
                nearest=16,
                hold_out_every=0,
                num_scenes=23_000,
                views_per_scene=16,
                keep_in_memory=False,
                workers=8,
                max_bad_scenes=0,
                with_depth=True,
                with_mask=True,
            ),
            eval=dict(source="", num_scenes=16, views=1, photo_size=(256, 256)),
            model=dict(
                vae=dict(
                    channels=(128, 256, 512, 512),
                    num_resnets=2,
                    num_mid=2,
                    latent_channels=4,
                    # Of the norms; a group that is one channel loses an image's mean colour.
                    groups=32,
                    dtype="bfloat16",
                ),
                levels=3,
                samples=(8, 8, 16),
                # World units; objects have a radius of about 0.5.
                delta=0.1,
                aggregate="per_view",
                head_size=64,
                octaves=4,
                visibility=0.0,
                mode="depth_truncated",
                front="view",
            ),
            loss=dict(
                stage="decoder",
                # Beside L1, which learns colours late: where brightness is still wrong, the errors
                # of all channels have one sign.
                mse_weight=0.0,
                # Of the divergence of latents from normal ones, in the stage "autoencoder".
                kl_weight=1e-6,
                # Perceptual weights are the user's own file; without them it is left out.
                lpips_weight=1.0,
                lpips_weights="",
                # Of scaled latents, for every second scene.
                latent_noise=0.1,
                # Side of a grid, largest error on it in world units.
                depth_noise=((3, 0.05), (64, 0.02), (128, 0.02)),
            ),
        )
    )


def _tiny() -> Any:
    """Small networks for minutes on a CPU."""
    config = _svd()
    config.update(num_steps=2_000, batch_size=1, log_every=50, checkpoint_every=1_000)
    config.optim.update(learning_rate=2e-3, warmup_steps=50)
    config.optim.rates = (("vae/encoder", 0.0), ("vae/quant_conv", 0.0), ("vae/decoder", 0.25))
    config.data.update(height=32, width=32, num_target=5, num_scenes=192)
    # Six neighbours on an orbit of twelve, the front among them: views that see the same surface.
    config.data.update(choice="nearest_random", nearest=1)
    config.data.update(views_per_scene=12, keep_in_memory=True, workers=1)
    # Four numbers for 2 x 2 pixels would hold their brightness and one of two colours.
    config.model.vae.update(channels=(32, 32), num_resnets=1, latent_channels=8, groups=8)
    config.model.vae.dtype = "float32"
    config.model.update(levels=1, samples=(6,), head_size=32)
    # Up to twice the deviation of the small autoencoder's own latents: other views are worth
    # looking at where one's own latents are bad.
    config.loss.update(latent_noise=0.4, mse_weight=20.0)
    return config


def _tiny_autoencoder() -> Any:
    """The autoencoder that `tiny` starts from."""
    config = _tiny()
    config.update(batch_size=2, num_steps=2_000, checkpoint_every=500)
    config.data.update(choice="random", num_target=4)
    config.optim.rates = ()
    # Strong enough that latents have a deviation of about one, as noise on them assumes.
    config.loss.update(stage="autoencoder", kl_weight=1e-3)
    return config


SETTINGS = {"svd": _svd, "tiny": _tiny, "tiny_autoencoder": _tiny_autoencoder}
