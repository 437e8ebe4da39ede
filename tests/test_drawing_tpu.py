"""The kernel that draws a map on a TPU: pictures and gradients of the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvs_common.types import Views
from quark_jax import drawing, drawing_tpu, ldm
from tests import accelerators, kernel_races
from tests.test_quark_streaming import make_cameras

# Smaller than any picture below: several tiles, and windows that do not hold all that is sought.
SMALL = dict(TILE=(8, 128), WINDOW=(8, 128))


@pytest.fixture
def small_tiles(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(drawing_tpu, name, value)


def world(layers=2, views=2, grid=(5, 7), size=(11, 150), seed=0):
    """Logits, target and inputs, whose elements are scattered and partly unseen."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    logits = ldm.Logits(draw(layers, *grid), draw(layers, *grid), draw(views, layers, *grid))
    target = jax.tree.map(lambda x: x[0], make_cameras(1, rng, *size))
    cams = make_cameras(views, rng, size[0] + 8, size[1] + 9, spread=1.0)
    images = rng.uniform(size=(views, cams.height, cams.width, 3))
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), (logits, target, Views(images, cams))
    )


def same(got, wanted):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert one.shape == other.shape
        # Positions are rounded differently, and some pixels of noise differ by all there is.
        np.testing.assert_allclose(one, other, atol=2e-4)


@pytest.mark.parametrize(
    "options",
    [
        dict(unseen="edge", opaque_background=True),
        dict(mask_invalid=False, window=ldm.Window(2, 3, 9, 140)),
    ],
    ids=["edge", "window"],
)
def test_pictures_are_those_of_the_plain_form(options, small_tiles):
    logits, target, context = world()
    kernel = functools.partial(drawing_tpu.draw, interpret=True, **options)
    got = jax.jit(kernel)(logits, target, context)
    same(got, jax.jit(functools.partial(drawing.draw, **options))(logits, target, context))
    again = jax.jit(kernel)(logits, target, context)
    assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(again)))


def gradients(draw, logits, target, context, **options):
    """Of the map's logits, from colours, depths and alphas."""

    def loss(logits):
        rendered = draw(logits, target, context, **options)
        return sum(jnp.sum(jnp.sin(x)) for x in (rendered.images, rendered.depth, rendered.alpha))

    return jax.grad(loss)(logits)


def exact_gradients(*arrays, **options):
    """Those of the plain form in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
        return jax.jit(functools.partial(gradients, drawing.draw, **options))(*wide)


@pytest.mark.parametrize(
    "options",
    [
        dict(unseen="edge", opaque_background=True),
        dict(mask_invalid=False, window=ldm.Window(2, 3, 9, 140)),
    ],
    ids=["edge", "window"],
)
@pytest.mark.thorough
def test_gradients_of_the_map_are_those_of_the_plain_form(options, small_tiles):
    arrays = world()
    kernel = functools.partial(drawing_tpu.draw, interpret=True)
    run = jax.jit(functools.partial(gradients, kernel, **options))
    got, wanted = run(*arrays), exact_gradients(*arrays, **options)
    same(got, wanted)
    assert all(np.any(np.abs(x) > 1e-2) for x in jax.tree.leaves(wanted))
    assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(run(*arrays))))


@pytest.mark.thorough
def test_gradients_of_a_small_map_are_those_of_the_plain_form():
    arrays = world(layers=3, size=(6, 9), views=1)
    kernel = functools.partial(drawing_tpu.draw, interpret=True)
    same(jax.jit(functools.partial(gradients, kernel))(*arrays), exact_gradients(*arrays))


@pytest.mark.slow
def test_gradients_of_the_inputs_are_those_of_the_plain_form():
    logits, target, context = world(size=(6, 9), views=1)

    def loss(draw, context):
        return jnp.sum(jnp.sin(draw(logits, target, context).images))

    kernel = functools.partial(drawing_tpu.draw, interpret=True)
    got, wanted = (
        jax.jit(jax.grad(functools.partial(loss, draw)))(context) for draw in (kernel, drawing.draw)
    )
    same(got, wanted)


def test_targets_are_drawn_in_batches():
    worlds = [world(size=(6, 9), seed=seed, views=1) for seed in (0, 1)]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *worlds)
    kernel = functools.partial(drawing_tpu.draw, interpret=True)
    got = jax.jit(jax.vmap(kernel))(*batch)
    same(got, jax.jit(jax.vmap(drawing.draw))(*batch))


@pytest.mark.thorough
def test_copies_and_steps_do_not_race(small_tiles):
    logits, target, context = world(layers=1, size=(6, 9), views=1)
    kernel = functools.partial(drawing_tpu.draw, interpret=kernel_races.DETECT)
    got = kernel(logits, target, context)
    jax.block_until_ready(got)
    assert not kernel_races.found()
    same(got, drawing.draw(logits, target, context))

    moved = gradients(kernel, logits, target, context)
    jax.block_until_ready(moved)
    assert not kernel_races.found()
    same(moved, exact_gradients(logits, target, context))


def test_what_the_kernel_does_not_draw_is_an_error():
    logits, target, context = world()
    with pytest.raises(NotImplementedError, match="blend"):
        colors = jnp.zeros((*logits.depth.shape, 3))
        drawing_tpu.draw(logits._replace(color=colors, blend=None), target, context)
    with pytest.raises(NotImplementedError, match="float32"):
        wide = jax.tree.map(lambda x: x.astype(jnp.bfloat16), logits)
        drawing_tpu.draw(wide, target, context)


@pytest.mark.aot
@pytest.mark.parametrize("chip", accelerators.TPUS)
def test_the_kernels_compile_for(chip):
    arrays = world(layers=3, views=2, grid=(27, 48), size=(100, 600))
    plan = accelerators.compile_for(chip, drawing_tpu.draw, *arrays)
    assert "tpu_custom_call" in plan.as_text()
    picture = 100 * 600 * 4
    assert accelerators.temporaries(plan) < 40 * picture

    both = accelerators.compile_for(chip, functools.partial(gradients, drawing_tpu.draw), *arrays)
    text = both.as_text()
    # Of inputs and cameras nobody asks for gradients: the plain form's loops are not in it.
    assert "draw_backward" in text and "while(" not in text
    assert accelerators.temporaries(both) < 40 * picture
