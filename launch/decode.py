r"""Decodes views twice: plainly, and again guided by depth.

    python launch/decode.py --workdir=runs/guided --scene=objects:7 --depth=sdf --out=decoded

--scene is a folder of posed views (COLMAP, transforms.json, SyncDreamer, ...) or objects:SEED, a
procedural object. --front and --views choose, by number, the picture of the front and the views to
decode. Latents are those of the encoder, with --latent_noise; or --latents=FILE.npy [v, y, x, c],
of a diffusion model, whose scale of 0.18215 is taken off.

--depth=sdf fits a surface to the first pictures, --depth=truth takes the scene's own depth,
--depth=FILE an .npz with `depth` [v, h, w] (z, world units) and perhaps `mask`. With --rounds=2 the
surface is fitted again to the second pictures. OUT receives first/ and images/ (PNG), depth.npz,
views.png (true, first and last pictures, depth), with --depth=sdf mesh.ply, and metrics.json:
pictures against the true ones, agreement of views and, of an object, distance and volume of the
surface. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

# launch/ and configs/ belong to the checkout and are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from depth_decoder_jax import model, task, two_pass, vae
from launch import cli, sdf_fit, trained
from nvs_common import consistency, metrics, outputs, panels, reconstruction, rendering
from nvs_common.data import objects, scene_files, scenes
from nvs_common.errors import InputError
from nvs_common.types import Array, Cameras, Views
from vqnerf_jax import mesh

OBJECTS = "objects:"
SDF, TRUTH = "sdf", "truth"
# Cells of the mesh along each axis, and points of a true surface.
_CELLS, _POINTS = 64, 10_000

_SOURCE = trained.define_source()
_SCENE = flags.DEFINE_string("scene", None, "Folder of views, or objects:SEED.", required=True)
_FRONT = flags.DEFINE_integer("front", 0, "Number of the front view.", lower_bound=0)
_VIEWS = flags.DEFINE_list(
    "views", None, "Numbers of the views to decode; as many as in training, evenly spread."
)
_DEPTH = flags.DEFINE_string("depth", SDF, "sdf, truth, or an .npz file.")
_LATENTS = flags.DEFINE_string("latents", None, "Latents of a diffusion model, .npy [v, y, x, c].")
_NOISE = flags.DEFINE_float("latent_noise", 0.0, "Deviation of noise on scaled latents.", 0.0)
_ROUNDS = flags.DEFINE_integer("rounds", 1, "How often depth is estimated.", lower_bound=1)
_STEPS = flags.DEFINE_integer(
    "steps", sdf_fit.RECIPE.steps, "Steps of each fit of a surface.", lower_bound=1
)
_OUT = flags.DEFINE_string("out", None, "Folder to write into.", required=True)


class Chosen(NamedTuple):
    """A scene and what is taken from it: views [v], front and views as images and cameras."""

    scene: Any
    views: np.ndarray
    front: Views
    given: Views


def main(_) -> int:
    """Decodes; returns the exit code."""
    out = outputs.check_folder(_OUT.value)
    run = trained.load(_SOURCE)
    if run.config.system != "depth_decoder":
        raise InputError(f"{run.path}: {run.config.system} decodes no views; pass a depth decoder.")
    module = task.make_module(run.config.model)
    chosen = choose(run.config, _SCENE.value, _FRONT.value, _VIEWS.value)
    surfaces: list[sdf_fit.Surface] = []
    source = depth_source(_DEPTH.value, chosen, surfaces)
    latents = find_latents(module, run.variables, chosen)
    found = two_pass.decode_with_depth(
        module,
        run.variables,
        latents,
        _batched(chosen.given.cameras),
        _batched(chosen.front) if module.front != "none" else None,
        source,
        rounds=_ROUNDS.value if _DEPTH.value == SDF else 1,
    )
    measured = measure(found, chosen, surfaces)
    write(out, found, chosen, measured, surfaces)
    print(", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
    return 0


def choose(config: Any, text: str, front: int, numbers: list[str] | None) -> Chosen:
    """The scene of `--scene` and its chosen views, at the size of training.

    Raises:
      InputError: no such scene or view.
    """
    size = (config.data.height, config.data.width)
    if text.startswith(OBJECTS):
        seed = text.removeprefix(OBJECTS)
        if not seed.isdecimal():
            raise InputError(f"--scene={text!r}: expected objects:SEED with a whole number.")
        scene = objects.Objects(int(seed), 1, *size, config.data.views_per_scene)[0]
    else:
        scene = scenes.load_measured(text, size=size)
    count, wanted = len(scene.names), config.data.num_target
    if numbers is None:
        others = np.delete(np.arange(count), front) if front < count else np.arange(count)
        places = (np.arange(wanted) + 0.5) * len(others) / wanted
        chosen = others[np.unique(places.astype(int))] if len(others) else others
    else:
        if not all(number.isdecimal() for number in numbers):
            raise InputError(f"--views={','.join(numbers)}: expected numbers such as 1,4,7.")
        chosen = np.array([int(number) for number in numbers])
    if not len(chosen) or max(front, *chosen) >= count:
        raise InputError(
            f"--front={front} and --views={','.join(map(str, chosen))}: the scene has the views 0 "
            f"to {count - 1}, of which at least two are needed."
        )
    return Chosen(scene, chosen, _taken(scene, np.array([front])), _taken(scene, chosen))


def _taken(scene: Any, views: np.ndarray) -> Views:
    cams = rendering.take(scene.cameras, views)
    return Views(np.asarray(scene.images(views), np.float32), cams)


def _batched(tree: Any) -> Any:
    """One scene: cameras [v] as [1, v]; of the front view [1] its only view is the batch."""
    if isinstance(tree, Views):
        return jax.tree.map(jnp.asarray, tree)
    return jax.tree.map(lambda x: jnp.asarray(x)[None], tree)


def find_latents(module: model.DepthGuidedDecoder, variables: Any, chosen: Chosen) -> Array:
    """Latents [1, v, y, x, c], unscaled.

    Raises:
      InputError: a file of latents of another shape.
    """
    cams = chosen.given.cameras
    factor = 2 ** (len(module.vae.channels) - 1)
    shape = (len(chosen.views), cams.height // factor, cams.width // factor)
    shape += (module.vae.latent_channels,)
    if _LATENTS.value:
        latents = scene_files.read_npy(pathlib.Path(_LATENTS.value)).astype(np.float32)
        if latents.shape != shape or not np.isfinite(latents).all():
            raise InputError(
                f"{_LATENTS.value}: latents of shape {latents.shape}; expected finite ones "
                f"[v, y, x, c] = {shape}."
            )
        latents = jnp.asarray(latents)[None] / vae.SCALING_FACTOR
    else:
        encode = jax.jit(lambda x: module.apply(variables, x, method="encode"))
        images = 2 * jnp.asarray(chosen.given.images)[None] - 1
        latents = cast(tuple[Array, Array], encode(images))[0]
    noise = jax.random.normal(jax.random.key(0), latents.shape)
    return latents + _NOISE.value / vae.SCALING_FACTOR * noise


def depth_source(
    text: str, chosen: Chosen, surfaces: list[sdf_fit.Surface]
) -> Callable[[Array, Cameras], two_pass.DepthMaps]:
    """The `depth_fn` of `--depth`; fitted surfaces are added to the list.

    Raises:
      InputError: a scene without depth, a file that is none of depth.
    """
    if text == SDF:
        recipe = sdf_fit.RECIPE._replace(steps=_STEPS.value)

        def fitted(images: Array, cams: Cameras) -> two_pass.DepthMaps:
            surfaces.append(sdf_fit.fit(images[0], sdf_fit.foreground(images[0]), cams[0], recipe))
            maps = sdf_fit.depth(surfaces[-1], cams[0])
            return two_pass.DepthMaps(maps.depth[None], maps.mask[None])

        return fitted
    if text == TRUTH:
        if not getattr(chosen.scene, "has_depths", hasattr(chosen.scene, "depths")):
            raise InputError(f"--depth=truth: {_SCENE.value} has no depth; pass a file or sdf.")
        depth = np.asarray(chosen.scene.depths(chosen.views))
        arrays = {"depth": depth}
    else:
        arrays = scene_files.read_npz(pathlib.Path(text))
        if "depth" not in arrays:
            raise InputError(
                f"{text}: holds {sorted(arrays)}; expected an array `depth` [v, h, w]."
            )
        depth = arrays["depth"].astype(np.float32)
    mask = arrays["mask"] if "mask" in arrays else np.isfinite(depth) & (depth > 0)
    return lambda images, cams: two_pass.DepthMaps(depth[None], mask[None])


def measure(
    found: two_pass.Decoded, chosen: Chosen, surfaces: list[sdf_fit.Surface]
) -> dict[str, float]:
    """What can be said of the pictures and surfaces, by name."""
    measured: dict[str, float] = {}
    truth = jnp.asarray(chosen.given.images)
    has_depth = getattr(chosen.scene, "has_depths", hasattr(chosen.scene, "depths"))
    depth = chosen.scene.depths(chosen.views) if has_depth else None
    for name, images in (("first", found.first[0]), ("last", found.images[0])):
        measured[f"{name}_psnr"] = float(jnp.mean(metrics.psnr(images, truth)))
        measured[f"{name}_ssim"] = float(jnp.mean(metrics.ssim(images, truth)))
        if depth is not None:
            agreement = consistency.cross_view(images, depth, chosen.given.cameras)
            # Views from opposite sides have nothing in common.
            if agreement.share > 0:
                measured[f"{name}_agreement"] = float(agreement.decibels)
    if depth is not None:
        known = np.asarray(found.mask[0]) & (depth > 0)
        error = np.abs(np.asarray(found.depth[0]) - depth)[known]
        if known.any():
            measured["depth_error"] = float(np.mean(error))
    if surfaces and isinstance(chosen.scene, objects.ObjectScene):
        truth_points = chosen.scene.surface(_POINTS, np.random.default_rng(0))
        for name, surface in (("surface", surfaces[-1]),):
            points = reconstruction.thinned(sdf_fit.points(surface, chosen.given.cameras), 0.01)
            measured[f"{name}_chamfer"] = reconstruction.chamfer(points, truth_points).mean
            solid = sdf_fit.inside(surface)
            measured[f"{name}_iou"] = reconstruction.volume_iou(
                solid, chosen.scene.inside, half=objects.RADIUS
            )
    return measured


def write(
    out: pathlib.Path,
    found: two_pass.Decoded,
    chosen: Chosen,
    measured: dict[str, float],
    surfaces: list[sdf_fit.Surface],
) -> None:
    """Everything that the program leaves; nothing where the surface cannot be made."""
    surface = _mesh(surfaces[-1]) if surfaces else None
    for folder, images in (("first", found.first[0]), ("images", found.images[0])):
        for index, image in zip(chosen.views, images, strict=True):
            name = pathlib.PurePath(chosen.scene.names[index]).stem
            outputs.write_image(out / folder / f"{name}.png", panels.to_uint8(image))
    depth, mask = np.asarray(found.depth[0]), np.asarray(found.mask[0])
    outputs.write_arrays(out / "depth.npz", dict(depth=depth, mask=mask))
    pictures = (chosen.given.images, found.first[0], found.images[0])
    rows = [[panels.to_uint8(image) for image in images] for images in pictures]
    limits = panels.disparity_range(depth[mask])
    rows.append(
        [panels.depth_image(np.where(m, d, 0), limits) for d, m in zip(depth, mask, strict=True)]
    )
    whole = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    outputs.write_image(out / "views.png", whole)
    outputs.write_json(out / "metrics.json", measured)
    if surface is not None:
        mesh.write(out / "mesh.ply", surface)


def _mesh(found: sdf_fit.Surface) -> mesh.Mesh:
    """The surface as a mesh in the world."""
    sdf = jax.jit(lambda x: found.module.apply({"params": found.params}, x, method="sdf"))
    surface = mesh.extract(lambda x: np.asarray(sdf(x)), _CELLS)
    return mesh.in_world(surface, tuple(found.center), found.radius)


if __name__ == "__main__":
    cli.run(main)
