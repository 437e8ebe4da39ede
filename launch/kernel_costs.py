"""What each implementation of an operation costs: time here, memory here and planned for TPUs.

Time is the processor time of this process, which other work on the machine changes little; give
the process one core, or it is the sum over cores. For a chip that is not here its own compiler
(`absent_devices`) plans temporaries and estimates cycles: of loops, gathers and the inside of
kernels it has no estimate, and "+" stands for a kernel's own.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depth_decoder_jax import aggregation, epipolar
from launch import absent_devices, depth_costs, measuring
from nvs_common.types import Cameras, Views
from quark_jax import drawing, drawing_tpu, ldm, one_to_many, one_to_many_gpu, one_to_many_tpu
from vqnerf_jax import nearest, nearest_tpu


class Case(NamedTuple):
    """An operation at one size.

    Attributes:
      title: what and how large.
      shapes: trees of ShapeDtypeStructs.
      make: from shapes to arrays with the geometry of a real call.
      forms: implementations by name; the first is what the others are compared with.
      backward: whether the gradient is measured too.
    """

    title: str
    shapes: tuple[Any, ...]
    make: Callable[[], tuple[Any, ...]]
    forms: dict[str, Callable]
    backward: bool = True


def study(case: Case, chip: str | None, *, repeats: int) -> Iterator[str]:
    """A table of the implementations of an operation: measured here, or planned for a chip."""
    what = ("CPU ms", "temporaries, MiB") if chip is None else ("temporaries, MiB", "Mcycles")
    title = case.title if chip is None else f"{case.title}, planned for {chip}"
    yield from [title, "", *measuring.table(("implementation", "pass", *what), [])]
    arrays = case.make() if chip is None else ()
    here = jax.default_backend() if chip is None else "gpu" if chip == "h100" else "tpu"
    for name, form in case.forms.items():
        if name in ("tpu", "gpu") and name != here:
            continue
        passes = {"forward": form}
        if case.backward:
            passes["forward and backward"] = gradient(form)
        for which, function in passes.items():
            if chip is None:
                cells = _here(function, arrays, repeats)
            else:
                cells = _planned(chip, function, case.shapes)
            yield measuring.row((name, which, *cells))
    yield ""


def gradient(form: Callable) -> Callable:
    """The gradient of a form's results with respect to its arguments that are numbers."""

    def run(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        moves = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

        def loss(floats: list[Any]) -> Any:
            given = iter(floats)
            every = [next(given) if m else x for m, x in zip(moves, leaves, strict=True)]
            results = jax.tree.leaves(form(*jax.tree.unflatten(tree, every)))
            return sum(jnp.sum(jnp.square(x)) for x in results)

        return jax.grad(loss)([x for m, x in zip(moves, leaves, strict=True) if m])

    return run


def _here(function: Callable, arrays: Any, repeats: int) -> tuple[str, str]:
    compiled = jax.jit(function).lower(*arrays).compile()
    jax.block_until_ready(compiled(*arrays))
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        jax.block_until_ready(compiled(*arrays))
        times.append(time.process_time() - begin)
    seconds = float(np.median(times))
    plan: Any = compiled.memory_analysis()
    return f"{1e3 * seconds:.0f}", f"{plan.temp_size_in_bytes / 2**20:.1f}"


def _planned(chip: str, function: Callable, shapes: Any) -> tuple[str, str]:
    try:
        compiled = absent_devices.compile_for(chip, function, *shapes)
    except (ValueError, jax.errors.JaxRuntimeError) as e:
        if "memory" in str(e).lower() or "RESOURCE_EXHAUSTED" in str(e):
            return "does not fit", "-"
        raise
    temporaries = f"{compiled.memory_analysis().temp_size_in_bytes / 2**20:.0f}"
    text = compiled.as_text()
    if re.search(r"body=|gather", text):
        return temporaries, "-"
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))) / 1e6
    return temporaries, f"{cycles:.2f}{'+' if 'tpu_custom_call' in text else ''}"


def nearest_code(vectors: int = 120_000, codes: int = 2048, width: int = 16) -> Case:
    """Vectors of an image's latents against a codebook."""
    shapes = (_shape(vectors, width), _shape(codes, width))
    forms = {
        "reference": nearest.reference,
        "xla": nearest.in_tiles,
        "tpu": lambda z, table: nearest.Nearest(*nearest_tpu.search(z, table)),
    }
    title = f"Nearest of {codes:,} codes for {vectors:,} vectors of {width} numbers, float32"
    return Case(title, shapes, lambda: _random(shapes), forms, backward=False)


def one_to_many_attention(
    size: tuple[int, int] = (288, 512), views: int = 8, layers: int = 6, heads: int = 1
) -> Case:
    """Quark's last step by default."""
    channels, (y, x) = 32, size
    image = (y, x * 15 // 16)
    shapes = (
        _shape(1, layers, y, x, heads, channels),
        _shape(views, 1, *image, channels),
        _shape(views, 1, layers, y, x, 2),
        jax.ShapeDtypeStruct((views, 1, layers, y, x), jnp.bool_),
    )
    scale = channels**-0.5

    def stored(query, features, uv, valid):
        delta = jax.vmap(jax.vmap(ldm.back_project))(features, uv)
        return one_to_many.attend(query, delta, delta, valid, scale)

    def by(attend: Callable) -> Callable:
        return lambda query, features, uv, valid: attend(
            query, one_to_many.Unstored(features, uv), valid, scale
        )

    def make() -> tuple[Any, ...]:
        query, features, *_ = _random(shapes[:2])
        target, context = _rig(views, y, x)
        depth = ldm.depths(jnp.zeros((layers, y, x)), target.near, target.far)
        seen = jax.vmap(ldm.project, in_axes=(None, None, 0))(depth, target, context)
        return query, features, seen.uv[:, None], seen.valid[:, None]

    forms = {
        "stored": stored,
        "xla": by(one_to_many.attend_unstored),
        "tpu": by(one_to_many_tpu.attend),
        "gpu": by(one_to_many_gpu.attend),
    }
    title = f"One-to-many attention, {views} views, {layers} x {y} x {x} elements, {channels} "
    return Case(f"{title}channels, {heads} heads, float32", shapes, make, forms)


def compositing(size: tuple[int, int] = (540, 960), views: int = 8, layers: int = 6) -> Case:
    """Quark's last step: upsampling, activation, blending and compositing."""
    height, width = size
    y, x = ldm.grid_size(height, width, 288 * 512 * height * width / (1080 * 1920), 8)
    shapes = jax.eval_shape(lambda: _drawing(views, layers, (y, x), size))

    def by(draw: Callable) -> Callable:
        # The inputs' pixels and cameras are given: training has no gradient for them.
        return lambda logits, target, context: draw(
            logits, *jax.lax.stop_gradient((target, context))
        )

    forms = {
        "stored": by(ldm.upsample_activate),
        "xla": by(drawing.draw),
        "tpu": by(drawing_tpu.draw),
    }
    title = (
        f"Drawing {layers} layers of {y} x {x} from {views} views at {height} x {width}, float32"
    )
    return Case(title, shapes, lambda: _drawing(views, layers, (y, x), size), forms)


def epipolar_attention(views: int = 6, side: int = 64, channels: int = 256) -> Case:
    """Depth-truncated attention to 8 samples in each other view."""
    known = depth_costs.orbit(views, side, side)
    shape = _shape(1, views, side, side, channels // 64, 64)
    offsets = epipolar.strata(depth_costs.SAMPLES)

    def running(q, k, v):
        samples = epipolar.around_depth(known, 0.1, offsets)
        return aggregation.per_view(q, k, v, known, samples, describe=lambda *_: None)

    def stored(q, k, v):
        """All samples of all views at once."""
        samples = epipolar.around_depth(known, 0.1, offsets)
        keys, values, masks = [], [], []
        for shift in range(1, views):
            k_there, v_there, there = epipolar.turn((k, v, known), jnp.int32(shift))
            seen = epipolar.see(there.cameras, samples)
            for found, maps in ((keys, k_there), (values, v_there)):
                flat = maps.reshape(*maps.shape[:4], -1)
                gathered = epipolar.gather(flat, seen.uv)
                found.append(gathered.reshape(*gathered.shape[:-1], *q.shape[-2:]))
            masks.append(seen.mask)
        every = [jnp.concatenate(parts, axis=4) for parts in (keys, values, masks)]
        return aggregation.over_samples(q, *every)

    title = f"Attention to 8 samples in each of {views - 1} views of {side} x {side} x {channels}"
    forms = {"stored": stored, "xla": running}
    return Case(f"{title}, float32", (shape,) * 3, lambda: _random((shape,) * 3), forms)


CASES: dict[str, Callable[..., Case]] = {
    "nearest_code": nearest_code,
    "one_to_many": one_to_many_attention,
    "compositing": compositing,
    "epipolar": epipolar_attention,
}
# Those that take a size.
SIZED = ("one_to_many", "compositing")


def _shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def _random(shapes: Sequence[jax.ShapeDtypeStruct]) -> tuple[jax.Array, ...]:
    return tuple(jax.random.normal(jax.random.key(i), s.shape) for i, s in enumerate(shapes))


def _rig(views: int, height: int, width: int) -> tuple[Cameras, Cameras]:
    """A target, and inputs around it, about as far apart as the fingers of a hand at arm's length
    from what is nearest."""
    angles = np.linspace(0, 2 * np.pi, views, endpoint=False)
    pose = np.tile(np.eye(4, dtype=np.float32), (views + 1, 1, 1))
    pose[1:, 0, 3], pose[1:, 1, 3] = 0.1 * np.cos(angles), 0.06 * np.sin(angles)
    intrinsics = np.array([0.8 * width, 0.8 * width, width / 2, height / 2], np.float32)
    near = np.ones(views + 1, np.float32)
    every: Any = Cameras(pose, np.tile(intrinsics, (views + 1, 1)), near, 50 * near, height, width)
    every = jax.tree.map(jnp.asarray, every)
    return jax.tree.map(lambda x: x[0], every), jax.tree.map(lambda x: x[1:], every)


def _drawing(
    views: int, layers: int, grid: tuple[int, int], size: tuple[int, int]
) -> tuple[ldm.Logits, Cameras, Views]:
    target, cameras = _rig(views, *size)
    shapes = (_shape(layers, *grid), _shape(layers, *grid), _shape(views, layers, *grid))
    depth, density, blend = _random(shapes)
    images = jax.random.uniform(jax.random.key(3), (views, *size, 3))
    # Depth is smooth but for a few steps, as in a scene.
    smooth = functools.partial(jax.image.resize, shape=depth.shape, method="linear")
    return ldm.Logits(smooth(depth[:, ::16, ::16]), density, blend), target, Views(images, cameras)
