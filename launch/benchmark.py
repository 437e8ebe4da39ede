r"""Measures the library, side by side in one run: python launch/benchmark.py NAME

  quark            time of each stage of a forward pass, peak memory, training rate and data wait
  quark_ablation   trains each ablation of the paper's Tab. 4 for --steps, on --scenes held out
  quark_views      quality, time and memory of a trained model against the number of --views
  quark_temporal   flicker of trained models along a camera path of --frames
  lvsm             time beside plain PyTorch, on --threads, and of views from a cache of the inputs
  depth_decoder    time and memory of attention between views: along short rays, along whole ones,
                   to all pixels; grids of 32 to 256 squared or of --size, --views 6,16; and of the
                   decoder beside diffusers', where it is installed, on --threads
  vqnerf           time and memory of rendering every pixel against latents and their decoder, at
                   the published sizes or those of --config; images of three sizes or of --size
  vqnerf_ablation  trains VQ-NeRF without quantisation, without its full-resolution branch, with
                   other codebooks, for --steps each on the procedural object of --config
  nearest_code, one_to_many, compositing, epipolar
                   implementations of an operation, also planned with --compile_for; the middle
                   two at --size
  attention        implementations by --tokens and --dtypes: time, share of the machine's ceiling,
                   memory; with --compile_for=v5e what another chip's compiler plans (extra aot)

quark_views and quark_temporal take --workdir=RUN or --weights=FILE, and procedural held-out scenes
or --data=PATH:

    python launch/benchmark.py quark_views --workdir=runs/a --views=2,4,8,16,32,64
    python launch/benchmark.py quark_temporal --workdir=runs/a --other=runs/b --path=interpolate

With --model `quark` measures a forward pass at the published sizes instead, one table for each of
--views, --dtypes and --attention, and compares each stage with what the machine reaches in plain
products and convolutions:

    python launch/benchmark.py quark --model=quark --size=1080x1920 --views=4,8,16,32 \\
        --dtypes=float32,bfloat16 --attention=folded,unfolded --repeats=3

Prints a Markdown table; with --out it is also written to a file. Times are medians on the
devices JAX finds; memory is what XLA planned for the compiled program (arguments, results and
temporaries), which on a CPU or GPU is its peak.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

# launch/ and configs/ belong to the checkout and are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
from absl import flags

from launch import (
    ablation,
    absent_devices,
    allocation,
    attention_costs,
    cli,
    depth_costs,
    input_counts,
    kernel_costs,
    lvsm_speed,
    measuring,
    path_flicker,
    quark_costs,
    trained,
    vqnerf_costs,
    vqnerf_variants,
)
from nvs_common import errors, outputs
from nvs_common.data import sources
from quark_jax import task as quark_task
from vqnerf_jax import task as vqnerf_task

_CONFIG = cli.define_config(required=False)
_OUT = flags.DEFINE_string("out", None, "File for the table (Markdown).")
_VIEWS = flags.DEFINE_list("views", None, "Input views, one number or several; the config's.")
_MODEL = flags.DEFINE_enum("model", None, ["tiny", "quark", "quark_plus"], "Instead of --config.")
_DTYPES = flags.DEFINE_list("dtypes", None, "Compute types; the config's, attention: float32.")
_TOKENS = flags.DEFINE_list("tokens", ["1024", "4096", "16384"], "attention: lengths.")
_COMPILE_FOR = flags.DEFINE_enum(
    "compile_for", None, absent_devices.CHIPS, "Compile for this chip, run nothing."
)
_ATTENTION = flags.DEFINE_list("attention", ["folded"], "folded, unfolded or both, for --model.")
_STREAM = flags.DEFINE_bool("stream", None, "model.stream, for --model; the config's by default.")
_SIZE = flags.DEFINE_string("size", None, "Image size as HxW; the config's by default.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed repetitions; the median is shown.")
_STEPS = flags.DEFINE_integer(
    "steps",
    None,
    "quark: training steps to measure, 60 by default; 0 leaves training out. quark_ablation: "
    "steps of each variant, the config's num_steps by default.",
)
_SCENES = flags.DEFINE_integer(
    "scenes", None, "Held-out procedural scenes; config.eval.num_scenes by default."
)
_TARGETS = flags.DEFINE_integer(
    "targets", None, "quark_views: held-out views of a scene, evenly spread; all by default."
)
_VARIANTS = flags.DEFINE_list("variants", None, "quark_ablation: names of ablations; all of them.")
_SOURCE = trained.define_source()
_OTHER = flags.DEFINE_multi_string(
    "other", [], "quark_temporal: another run's folder or weights' file, once for each."
)
_DATA = flags.DEFINE_string("data", None, "A scene folder or a folder of scenes, not procedural.")
_FRAMES = flags.DEFINE_integer("frames", 60, "quark_temporal: frames of the path.", lower_bound=2)
_PATH = flags.DEFINE_enum("path", "spiral", list(path_flicker.PATHS), "quark_temporal: the path.")
_RAYS = flags.DEFINE_integer("rays", 2048, "vqnerf: rays that are rendered at most.")
_LATENTS = flags.DEFINE_integer("latents", 16384, "vqnerf: latents that are decoded at most.")
_THREADS = flags.DEFINE_integer(
    "threads", None, "lvsm, depth_decoder: of JAX and PyTorch; all by default."
)


def main(argv) -> None:
    """Runs the named benchmark and prints its table."""
    if len(argv) != 2 or argv[1] not in BENCHMARKS:
        raise errors.InputError(f"name one benchmark of {sorted(BENCHMARKS)}, found {argv[1:]}")
    if _OUT.value:
        outputs.check_file(_OUT.value)
    lines = []
    # Line by line: large sizes take many minutes, and a table that is there can be read.
    for line in itertools.chain([_machine(), ""], BENCHMARKS[argv[1]]()):
        print(line, flush=True)
        lines.append(line)
    if _OUT.value:
        outputs.write_text(_OUT.value, "\n".join(lines) + "\n")


def quark() -> Iterator[str]:
    """Stages of a forward pass of one scene and one target, and the training loop."""
    if _MODEL.value:
        yield from quark_sizes()
        return
    config: Any = _CONFIG.value or cli.load_config("configs/quark.py:tiny")
    for views in _view_counts(config):
        measured = quark_costs.forward(config, views, _size(config), _REPEATS.value)
        rows = [(stage.name, f"{1e3 * stage.seconds:.1f}") for stage in measured.stages]
        rows.append(("whole forward pass", f"{1e3 * measured.seconds:.1f}"))
        yield from [measured.title, "", *measuring.table(("stage", "ms"), rows), ""]
    if _STEPS.value != 0:
        yield from quark_costs.training(config, 60 if _STEPS.value is None else _STEPS.value)


def quark_ablation() -> list[str]:
    """Tab. 4 at the config's size."""
    config: Any = _CONFIG.value or cli.load_config("configs/quark.py:tiny")
    steps = config.num_steps if _STEPS.value is None else _STEPS.value
    if steps < 1:
        raise errors.InputError(f"--steps={steps}: expected 1 or more.")
    return ablation.study(
        _with_scenes(config), steps, variants=_VARIANTS.value or (), repeats=_REPEATS.value
    )


def quark_views() -> list[str]:
    """Quality, time and memory against the number of inputs."""
    model = trained.load(_SOURCE)
    counts = input_counts.COUNTS if _VIEWS.value is None else _view_counts(model.config)
    scenes = _scenes(input_counts.with_views(_with_scenes(model.config), max(counts)))
    return input_counts.study(model, scenes, counts, targets=_TARGETS.value, repeats=_REPEATS.value)


def quark_temporal() -> list[str]:
    """Flicker of several models along a path."""
    models = [trained.load(_SOURCE)]
    models += [trained.load_path(path, _SOURCE.set.value) for path in _OTHER.value]
    config = _with_scenes(models[0].config)
    num_inputs = _view_counts(config)[0]
    return path_flicker.study(models, _scenes(config), _PATH.value, _FRAMES.value, num_inputs)


def lvsm() -> list[str]:
    """LVSM beside plain PyTorch, and rendering from a cache."""
    kept = allocation.keep_freed_memory()
    threads = lvsm_speed.use_threads(_THREADS.value)
    note = "freed memory stays with the process (launch/train.py leaves that to the system)"
    lines = [note, ""] if kept else []
    return lines + lvsm_speed.study(
        lvsm_speed.MODULES,
        lvsm_speed.CASES,
        lvsm_speed.VIEWS if _VIEWS.value is None else _view_counts(None),
        side=lvsm_speed.SIDE,
        repeats=_REPEATS.value,
        threads=threads,
    )


def depth_decoder() -> Iterator[str]:
    """Attention between views against the same along whole rays and to all pixels; decoders."""
    allocation.keep_freed_memory()
    threads = lvsm_speed.use_threads(_THREADS.value)
    counts = depth_costs.COUNTS if _VIEWS.value is None else _view_counts(None)
    grids = depth_costs.GRIDS if _SIZE.value is None else (_size(None),)
    yield f"{threads} threads"
    yield from depth_costs.decoders(depth_costs.DECODERS, repeats=_REPEATS.value)
    yield ""
    yield from depth_costs.study(counts, grids, repeats=_REPEATS.value)


def vqnerf() -> Iterator[str]:
    """Every pixel by the field against latents and their decoder."""
    config: Any = _CONFIG.value or cli.load_config("configs/vqnerf.py:object,noattn")
    ours, _ = vqnerf_task.make_model(config.model)
    sizes = vqnerf_costs.SIZES if _SIZE.value is None else (_size(None),)
    most = dict(rays=_RAYS.value, latents=_LATENTS.value)
    yield from vqnerf_costs.study(ours, sizes, repeats=_REPEATS.value, **most)


def vqnerf_ablation() -> list[str]:
    """VQ-NeRF's parts, each left out."""
    config: Any = _CONFIG.value or cli.load_config("configs/vqnerf.py:tiny")
    steps = config.num_steps if _STEPS.value is None else _STEPS.value
    return vqnerf_variants.study(config, steps, _VARIANTS.value or ())


def operation(name: str) -> Iterator[str]:
    """The implementations of an operation of kernel_costs."""
    size = {} if _SIZE.value is None else {"size": _size(None)}
    if size and name not in kernel_costs.SIZED:
        raise errors.InputError(f"--size={_SIZE.value}: {name} has one size.")
    case = kernel_costs.CASES[name](**size)
    return kernel_costs.study(case, _COMPILE_FOR.value, repeats=_REPEATS.value)


def attention() -> Iterator[str]:
    """Implementations of attention, measured here or planned for another chip."""
    tokens = _numbers("tokens", _TOKENS.value)
    for name in _DTYPES.value or ["float32"]:
        if _COMPILE_FOR.value:
            yield from attention_costs.planned(tokens, jnp.dtype(name), _COMPILE_FOR.value)
        else:
            yield from attention_costs.study(tokens, jnp.dtype(name), repeats=_REPEATS.value)
        yield ""


def quark_sizes() -> Iterator[str]:
    """Forward passes of one size for several numbers of views, types and forms of attention."""
    config: Any = cli.load_config(f"configs/quark.py:{_MODEL.value}")
    repeats = _REPEATS.value
    if _STREAM.value is not None:
        config.model.stream = _STREAM.value
    for dtype in _DTYPES.value or [config.model.dtype]:
        product, convolution = (
            1e-9 * rate for rate in quark_costs.ceilings(quark_task.DTYPES[dtype], repeats)
        )
        line = f"{dtype}: matrix product {product:.1f} GMAC/s, 3x3 convolution of 32 channels"
        yield f"{line} {convolution:.1f} GMAC/s"
        for form, views in itertools.product(_ATTENTION.value, _view_counts(config)):
            if form not in ("folded", "unfolded"):
                raise errors.InputError(f"--attention={form}: expected folded or unfolded")
            config.model.update(dtype=dtype, folded_attention=form == "folded")
            measured = quark_costs.forward(
                config, views, _size(config), repeats, _MODEL.value or ""
            )
            whole = sum(stage.products for stage in measured.stages)
            stages = [
                *measured.stages,
                quark_costs.Stage("whole forward pass", measured.seconds, whole),
            ]
            rows = [stage.row(convolution) for stage in stages]
            head = ("stage", "ms", "GMAC", "GMAC/s", "of the convolution's")
            yield from ["", f"{measured.title}, {form}", "", *measuring.table(head, rows), ""]


BENCHMARKS = {
    "attention": attention,
    "depth_decoder": depth_decoder,
    "quark": quark,
    "quark_ablation": quark_ablation,
    "quark_views": quark_views,
    "quark_temporal": quark_temporal,
    "lvsm": lvsm,
    "vqnerf": vqnerf,
    "vqnerf_ablation": vqnerf_ablation,
    **{name: functools.partial(operation, name) for name in kernel_costs.CASES},
}


def _with_scenes(config: Any) -> Any:
    """The config, with as many held-out scenes as are asked for."""
    if _SCENES.value is not None:
        if _SCENES.value < 1 or _DATA.value:
            raise errors.InputError(
                f"--scenes={_SCENES.value}: expected 1 or more, and no --data, which gives all."
            )
        config.eval.num_scenes = _SCENES.value
    return config


def _scenes(config: Any) -> list[tuple[str, Any]]:
    """(name, scene) of the folder, or of the procedural scenes that training never sees."""
    size = trained.size(_SIZE.value or "auto", config, photographs=bool(_DATA.value))
    if _DATA.value:
        return trained.scenes_at(_DATA.value, size)
    world = sources.world(config, sources.HELD_OUT_SEED, config.eval.num_scenes, size)
    return [(f"procedural {number}", world[number]) for number in range(len(world))]


def _view_counts(config) -> list[int]:
    if _VIEWS.value is None:
        return [config.data.num_context]
    return _numbers("views", _VIEWS.value)


def _numbers(flag: str, texts: list[str]) -> list[int]:
    if not all(text.isdecimal() and int(text) for text in texts):
        raise errors.InputError(f"--{flag}={','.join(texts)}: expected whole numbers such as 4,8")
    return [int(text) for text in texts]


def _size(config) -> tuple[int, int]:
    if _SIZE.value is None:
        return config.data.height, config.data.width
    try:
        height, width = (int(side) for side in _SIZE.value.split("x"))
    except ValueError:
        raise errors.InputError(f"--size={_SIZE.value}: expected HxW, e.g. 1080x1920") from None
    return height, width


def _machine() -> str:
    device = jax.devices()[0]
    when = time.strftime("%Y-%m-%d")
    return f"JAX {jax.__version__}, {len(jax.devices())} x {device.device_kind}, {when}"


if __name__ == "__main__":
    cli.run(main, arguments=1)
