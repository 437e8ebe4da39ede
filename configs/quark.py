"""Quark: `tiny` (minutes on a CPU), `small` (an hour), `quark` and `quark_plus` (the paper's).

    python launch/train.py --config=configs/quark.py:tiny --workdir=runs/tiny

Variants follow the size after commas: `tiny,photos` trains on photographs, where no true depth is
known; `tiny,no_ray_encoding` is an ablation of the paper's Tab. 4 (ABLATIONS lists them and
`no_sweep`, which removes an addition of our own).

The published training has two phases, 250,000 steps at half the resolution and 350,000 at full:

    python launch/train.py --config=configs/quark.py:quark,half --workdir=runs/half
    python launch/train.py --config=configs/quark.py:quark --workdir=runs/full \\
        --config.init_from=runs/half

So had the weights of the checkout, `small` and then `small,sharpen` from it.
"""

from typing import Any

from ml_collections import ConfigDict

# (level, blocks, heads, convs, collapse): the initialisation, then update and fuse 0 to 4.
PAPER_STAGES = (
    (3, 3, 4, 2, False),
    (3, 3, 4, 2, False),
    (2, 3, 4, 2, False),
    (2, 2, 4, 1, False),
    (1, 2, 2, 1, True),
    (0, 2, 1, 1, True),
)
# An image of 112 pixels has no use for a map of 7, and the sweep replaces the coarse search.
TINY_STAGES = (
    (1, 2, 2, 1, False),
    (1, 1, 2, 1, False),
    (0, 1, 1, 1, True),
)


def get_config(arg: str = "tiny") -> Any:
    """Builds a configuration from a size and, after commas, ablations."""
    size, *ablations = arg.split(",")
    config = {"tiny": _tiny, "small": _small, "quark": _quark, "quark_plus": _quark_plus}[size]()
    for name in ablations:
        {"photos": _photos, "half": _half, "sharpen": _sharpen, **ABLATIONS}[name](config)
    return config


def _base() -> Any:
    """Everything the sizes share. Optimiser, schedule, batch, crops and view choice are the
    paper's; its data sets are not."""
    return ConfigDict(
        dict(
            system="quark",
            seed=0,
            num_steps=350_000,
            init_from="",
            batch_size=16,
            accumulate=1,
            log_every=50,
            eval_every=5_000,
            checkpoint_every=5_000,
            keep_checkpoints=3,
            ema=0.999,
            max_skipped=20,
            stop_after_minutes=0.0,
            profile=(0, 0),
            optim=dict(
                learning_rate=1.5e-4,
                # Adam's moments start anew with the second phase.
                warmup_steps=1_000,
                schedule="warmup_hold_cosine",
                decay_steps=60_000,
                b1=0.9,
                b2=0.999,
                weight_decay=0.0,
                clip_norm=1.0,
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1, context=1),
            data=dict(
                source="procedural",
                height=1080,
                width=1920,
                num_context=8,
                num_target=1,
                choice="nearest_random",
                nearest=16,
                hold_out_every=8,
                num_scenes=100_000,
                views_per_scene=24,
                baseline=(0.03, 0.12),
                rigs=("grid", "arc", "orbit", "walk"),
                # Sensor noise and exposure differences of training images, see `procedural.World`.
                noise=0.0,
                exposure_jitter=0.0,
                workers=8,
                max_bad_scenes=0,
                with_depth=False,
            ),
            # Photographs are evaluated and rendered at `photo_size` unless --size says otherwise.
            # Cameras of procedural scenes that are evaluated and shown; (): those of training.
            eval=dict(
                source="", num_scenes=16, views=1, photo_size=(288, 512), baseline=(), rigs=()
            ),
            model=dict(
                grid_area=288 * 512,
                upsampling=0.0,
                layers=6,
                channels=32,
                stages=PAPER_STAGES,
                encoder_blocks=(2, 2, 2, 2),
                update_blocks=2,
                appearance_channels=16,
                octaves=8,
                density_bias=-2.0,
                folded_attention=True,
                ray_encoding=True,
                render_and_refine=True,
                cross_attention=True,
                output="blend",
                mask_invalid=True,
                normalize_splat=False,
                opaque_background=False,
                unseen="black",
                query_scale=0.1,
                sweep_planes=0,
                # A layer and view at a time; `tiny` has room for all at once, which is faster.
                stream=True,
                # Of attention and drawing where the model streams: "tpu" and "gpu" are kernels.
                implementation="xla",
                dtype="float32",
            ),
            # Perceptual weights are the user's own file; without them the loss is L1 alone.
            loss=dict(
                l1_weight=10.0,
                lpips_weight=1.0,
                lpips_weights="",
                # Structural similarity, 1 - SSIM: a perceptual term that needs no weights.
                ssim_weight=0.0,
                depth_weight=0.0,
                temporal_weight=0.0,
                # Side of the random window of the target that is drawn and compared; 0 is all.
                crop=512,
            ),
        )
    )


def _quark() -> Any:
    return _base()


def _quark_plus() -> Any:
    config = _base()
    config.model.update(grid_area=432 * 768, layers=8)
    return config


def _tiny() -> Any:
    """Learns in minutes on two CPU cores."""
    config = _base()
    config.update(num_steps=1_050, batch_size=1, log_every=50, eval_every=525)
    config.update(checkpoint_every=525, ema=0.995)
    config.optim.update(learning_rate=1.5e-3, warmup_steps=50, schedule="cosine", b2=0.99)
    config.data.update(height=64, width=112, num_context=4, num_target=2, nearest=6)
    # Inputs far apart: with close ones, at this size, resampling limits every method alike and
    # there is little to learn.
    config.data.update(views_per_scene=12, baseline=(0.06, 0.2), workers=1)
    # The paper trains hundreds of times longer on pictures alone; true depth speeds this up.
    config.data.with_depth = True
    config.loss.depth_weight = 0.1
    # The map follows the output's size: what was learnt about pixels holds for larger pictures.
    config.model.update(upsampling=2.0, layers=4, stages=TINY_STAGES)
    config.model.update(encoder_blocks=(1, 1), update_blocks=1, appearance_channels=8)
    # Queries that differ from the start tell how far the views agree, which a mean cannot.
    config.model.update(unseen="edge", query_scale=3.0, stream=False)
    # Eight minutes are too few to discover what agreement is; see `quark_jax/prior.py`.
    config.model.update(sweep_planes=64, density_bias=0.0)
    config.loss.crop = 0
    return config


def _small() -> Any:
    """The network of `tiny`, trained for an hour on two CPU cores to carry over to photographs:
    from neighbouring frames of a video to steps of several metres, with noise and exposure."""
    config = _tiny()
    config.update(num_steps=6_000, eval_every=1_000, checkpoint_every=1_000, ema=0.999)
    config.optim.update(warmup_steps=200, b2=0.999)
    config.data.update(num_context=6, nearest=10, views_per_scene=18, baseline=(0.008, 0.3))
    config.data.update(noise=0.01, exposure_jitter=0.03)
    return config


def _photos(config: Any) -> None:
    """For scenes without true depth: name them with --config.data.source=PATH."""
    config.data.with_depth = False
    config.loss.depth_weight = 0.0


def _half(config: Any) -> None:
    """The first phase: images and map at half the resolution, smaller crops, no decay yet."""
    config.data.update(height=config.data.height // 2, width=config.data.width // 2)
    config.model.grid_area //= 4
    config.loss.crop //= 2
    config.num_steps = 250_000
    config.optim.update(warmup_steps=20_000, decay_steps=0)


def _sharpen(config: Any) -> None:
    """The second phase of `small`: structural similarity in the loss, and longer strides."""
    config.update(num_steps=1_300, eval_every=650, checkpoint_every=650, ema=0.99)
    config.optim.update(learning_rate=5e-4, warmup_steps=50)
    # Seen through the cameras of the first phase, so that figures and videos compare.
    config.eval.update(baseline=config.data.baseline, rigs=config.data.rigs)
    config.data.update(baseline=(0.02, 0.45), rigs=("walk", "walk", "grid", "arc", "orbit"))
    config.loss.ssim_weight = 3.0


def _fewer_iterations(config: Any) -> None:
    """Drops the updates up to the first rise in resolution and starts there (Tab. 4)."""
    first, *rest = config.model.stages
    while rest[0][0] == first[0]:
        rest.pop(0)
    config.model.stages = ((rest[0][0], *first[1:]), *rest[1:])


def _no_collapse(config: Any) -> None:
    stages = config.model.stages
    config.model.layers *= 2 ** sum(stage[4] for stage in stages)
    config.model.stages = tuple((*stage[:4], False) for stage in stages)


def _no_sweep(config: Any) -> None:
    """Not in Tab. 4: removes what this library adds, and leaves the paper's blank start."""
    config.model.update(sweep_planes=0, density_bias=-2.0)


ABLATIONS = {
    "no_collapse": _no_collapse,
    "fewer_iterations": _fewer_iterations,
    "no_ray_encoding": lambda config: config.model.update(ray_encoding=False),
    "no_render_and_refine": lambda config: config.model.update(render_and_refine=False),
    "no_cross_attention": lambda config: config.model.update(cross_attention=False),
    "unfolded": lambda config: config.model.update(folded_attention=False),
    "rgb": lambda config: config.model.update(output="rgb"),
    "no_sweep": _no_sweep,
}
