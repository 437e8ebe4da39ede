r"""Compares decoders on held-out orbits, with true, noisy and wrong depth.

    python launch/depth_quality.py --workdir=runs/guided --other=runs/plain --out=report

Latents are those of the frozen encoder for true views, with --latent_noise on each view alone, as a
diffusion model leaves it; all decoders get the same ones. Decoders trained with
loss.stage=plain_decoder ignore depth. Prints a Markdown table; OUT receives it as table.md, and
views.png: true views, each decoder's with true depth, and errors (bright is 0.25 or more).
Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

# launch/ and configs/ belong to the checkout and are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from depth_decoder_jax import depth_noise, task, two_pass, vae
from launch import cli, measuring, trained
from nvs_common import consistency, losses, metrics, outputs, panels, perceptual
from nvs_common.data import samples, sources
from nvs_common.errors import InputError
from nvs_common.types import Array, Batch

TRUE, NOISY, WRONG, NONE = "true", "noisy", "wrong", "none"
KINDS = (TRUE, NOISY, WRONG, NONE)
# Wrong depth is behind the surface by three times the interval that samples lie in.
WRONG_BY = 3.0
SCALE = 4  # of pictures

_SOURCE = trained.define_source()
_OTHER = flags.DEFINE_multi_string("other", [], "Another run to compare, once for each.")
_SCENES = flags.DEFINE_integer("scenes", None, "Held-out orbits; config.eval.num_scenes.")
_NOISE = flags.DEFINE_list(
    "latent_noise", ["0", "0.1"], "Deviations of noise on scaled latents, one table row for each."
)
_DEPTH_NOISE = flags.DEFINE_float(
    "depth_noise", 1.0, "Noisy depth has so many times the calibrated noise.", lower_bound=0.0
)
_LPIPS = flags.DEFINE_string("lpips_weights", None, "Weights of LPIPS; left out without them.")
_OUT = flags.DEFINE_string("out", None, "Folder for table.md and views.png.")
_SHOWN = flags.DEFINE_integer("shown", 0, "Orbit in views.png.", lower_bound=0)


class Orbit(NamedTuple):
    """Views of a held-out object: batch [1], foreground with depth [1, t, h, w]."""

    name: str
    batch: Batch
    mask: Array


class Case(NamedTuple):
    """A row: a decoder, a kind of depth, noise on latents; means over orbits; shown images."""

    model: str
    depth: str
    noise: float
    scores: dict[str, float]
    images: np.ndarray


def main(_) -> int:
    """Prints the table; returns the exit code."""
    if _OUT.value:
        outputs.check_folder(_OUT.value)
    models = [trained.load(_SOURCE)]
    models += [trained.load_path(path, _SOURCE.set.value) for path in _OTHER.value]
    noises = [_deviation(text) for text in _NOISE.value]
    lpips = perceptual.load(_LPIPS.value) if _LPIPS.value else None
    orbits = held_out(models[0].config, _SCENES.value)
    if _SHOWN.value >= len(orbits):
        raise InputError(f"--shown={_SHOWN.value}: there are orbits 0 to {len(orbits) - 1}.")
    cases = study(models, orbits, noises, lpips, _SHOWN.value, _DEPTH_NOISE.value)
    lines = table(models[0].config, orbits, cases)
    if _DEPTH_NOISE.value != 1:
        lines.append(f"\nNoisy depth has {_DEPTH_NOISE.value:g} times the calibrated noise.")
    print("\n".join(lines))
    if _OUT.value:
        out = pathlib.Path(_OUT.value)
        outputs.write_text(out / "table.md", "\n".join(lines) + "\n")
        shown = picture(orbits[_SHOWN.value], cases, max(noises))
        outputs.write_image(out / "views.png", shown)
    return 0


def held_out(config: Any, count: int | None = None) -> list[Orbit]:
    """The orbits that training never sees; front view and views of each always the same.

    Raises:
      InputError: the config's data has no depth.
    """
    if not config.data.with_depth:
        raise InputError("the run's config has data.with_depth=False; pass one of the decoder.")
    if count is not None:
        config.eval.num_scenes = count
    source, sampler = sources.held_out(config), samples.Sampler.from_config(config)
    found = []
    for number in range(len(source)):
        scene = source[number]
        rng = np.random.default_rng([sources.HELD_OUT_SEED, number])
        choice = sampler.choose(scene, sampler.allowed(scene, folder=False), rng)
        wanted = dict(with_depth=True, with_mask=sampler.with_mask)
        batch = samples.stack([samples.assemble(scene, choice, **wanted)])
        depth = batch.extras["depth"]
        mask = np.isfinite(depth) & (depth > 0)
        if "mask" in batch.extras:
            mask &= batch.extras["mask"] > 0.5
        found.append(Orbit(str(number), jax.tree.map(jnp.asarray, batch), jnp.asarray(mask)))
    return found


def study(
    models: Sequence[trained.Trained],
    orbits: Sequence[Orbit],
    noises: Sequence[float],
    lpips: Any = None,
    shown: int = 0,
    strength: float = 1.0,
) -> list[Case]:
    """All decoders on all orbits, with depth of all kinds; `strength` is of noisy depth.

    Raises:
      InputError: a run of another system, or of an autoencoder alone.
    """
    cases = []
    for model in models:
        config = model.config
        if config.system != "depth_decoder" or config.loss.stage == "autoencoder":
            raise InputError(f"{model.path}: expected a run of the depth decoder's second stage.")
        plain = config.loss.stage == "plain_decoder"
        for noise in noises:
            for kind in ("-",) if plain else KINDS:
                pairs = [decode(model, orbit, kind, noise, strength) for orbit in orbits]
                rows = [
                    scores(images, orbit, lpips)
                    for images, orbit in zip(pairs, orbits, strict=True)
                ]
                means = {name: _mean(name, [row[name] for row in rows]) for name in rows[0]}
                cases.append(Case(model.path.name, kind, noise, means, np.asarray(pairs[shown])))
                print(f"{model.path.name}, {kind}, {noise}: {means}", file=sys.stderr)
    return cases


def decode(
    model: trained.Trained, orbit: Orbit, kind: str, noise: float, strength: float = 1.0
) -> Array:
    """Images [1, t, h, w, 3] in [0, 1] of an orbit's noisy latents."""
    module = task.make_module(model.config.model)
    images = 2 * orbit.batch.target.images - 1
    key = jax.random.key(int(orbit.name))
    latents = _encode(module, model.variables, images)
    latents += noise / vae.SCALING_FACTOR * jax.random.normal(key, latents.shape)
    if kind == "-":
        return two_pass.decode_plain(module, model.variables, latents)
    cams = orbit.batch.target.cameras
    depth, mask = given(kind, orbit, model.config.model.delta, strength)
    front = jax.tree.map(lambda x: x[:, 0], orbit.batch.context)
    return two_pass.decode_guided(module, model.variables, latents, cams, depth, mask, front)


def given(kind: str, orbit: Orbit, delta: float, strength: float = 1.0) -> tuple[Array, Array]:
    """Depth of a kind, and its foreground; noise is `strength` times the calibrated one."""
    depth, mask = orbit.batch.extras["depth"], orbit.mask
    if kind == NOISY:
        key = jax.random.fold_in(jax.random.key(int(orbit.name)), 1)
        cams = orbit.batch.target.cameras
        ends = dict(near=cams.near, far=cams.far)
        scales = {side: strength * x for side, x in depth_noise.SCALES.items()}
        depth = depth_noise.structured_depth_noise(key, depth, mask, scales, **ends)
    elif kind == WRONG:
        depth = jnp.where(mask, depth + WRONG_BY * delta, depth)
    elif kind == NONE:
        mask = jnp.zeros_like(mask)
    return depth, mask


@functools.partial(jax.jit, static_argnums=0)
def _encode(module: Any, variables: Any, images: Array) -> Array:
    return cast(tuple[Array, Array], module.apply(variables, images, method="encode"))[0]


def scores(images: Array, orbit: Orbit, lpips: Any) -> dict[str, float]:
    """Means over the views of one orbit; `agreement` compares the views with each other."""
    values = _scores(images[0], orbit.batch, orbit.mask)
    if lpips is not None:
        truth = orbit.batch.target.images[0]
        values["lpips"] = jnp.mean(metrics.lpips(images[0], truth, lpips))
    return {name: float(value) for name, value in values.items()}


@jax.jit
def _scores(images: Array, batch: Batch, mask: Array) -> dict[str, Array]:
    truth, cams = batch.target.images[0], batch.target.cameras[0]
    found = consistency.cross_view(images, batch.extras["depth"][0], cams, mask[0])
    return {
        "l1": losses.l1(2 * images, 2 * truth),
        "psnr": jnp.mean(metrics.psnr(images, truth)),
        "object_psnr": jnp.mean(metrics.masked_psnr(images, truth, mask[0])),
        "ssim": jnp.mean(metrics.ssim(images, truth)),
        "agreement": found.decibels,
    }


def table(config: Any, orbits: Sequence[Orbit], cases: Sequence[Case]) -> list[str]:
    """The table's lines, the agreement of true views in the first row."""
    shape = orbits[0].batch.target.images.shape
    rows = [_scores(o.batch.target.images[0], o.batch, o.mask)["agreement"] for o in orbits]
    names = list(cases[0].scores)
    floor = f"{_mean('agreement', rows):.2f}"
    lines = [("true views", "", "", *(floor if n == "agreement" else "" for n in names))]
    for case in cases:
        values = (
            f"{value:.{4 if name in ('l1', 'ssim', 'lpips') else 2}f}"
            for name, value in case.scores.items()
        )
        lines.append((case.model, case.depth, f"{case.noise:g}", *values))
    title = (
        f"{len(orbits)} held-out orbits, {shape[1]} views of {shape[2]} x {shape[3]} and a front "
    )
    title += f"view, {config.data.source}"
    return [title, "", *measuring.table(("decoder", "depth", "noise", *names), lines)]


def picture(orbit: Orbit, cases: Sequence[Case], noise: float) -> Image.Image:
    """Rows of views: the truth, then each decoder with true depth and its errors."""
    truth = np.asarray(orbit.batch.target.images[0])
    rows = [[panels.to_uint8(view) for view in truth]]
    for case in cases:
        if case.noise == noise and case.depth in ("-", TRUE):
            rows.append([panels.to_uint8(view) for view in case.images[0]])
            errors = zip(case.images[0], truth, strict=True)
            rows.append([panels.error_image(*pair) for pair in errors])
    whole = np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0)
    size = (whole.shape[1] * SCALE, whole.shape[0] * SCALE)
    return Image.fromarray(whole).resize(size, Image.Resampling.NEAREST)


def _mean(name: str, values: Sequence[Any]) -> float:
    """Over orbits; views of some of them may have nothing in common that could agree."""
    numbers = np.asarray(values, np.float64)
    if name == "agreement":
        numbers = numbers[np.isfinite(numbers)]
    return float(np.mean(numbers)) if len(numbers) else float("nan")


def _deviation(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < np.inf:
        raise InputError(f"--latent_noise={text}: expected numbers of at least 0 such as 0,0.1.")
    return value


if __name__ == "__main__":
    cli.run(main)
