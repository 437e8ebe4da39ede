"""LVSM's optimiser: AdamW without decay of vectors, cosine over steps, clipping and skipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvs_common import errors, optim, training_step
from nvs_common.types import Aux, Batch, Task
from tests import toy

AXES = {
    "blocks/norm/scale": ("layer", None),
    "blocks/dense/kernel": ("layer", "embed", "mlp"),
    "latents": (None, "embed"),
    "norm/scale": (None,),
}
SHAPES = {
    "blocks/norm/scale": (2, 3),
    "blocks/dense/kernel": (2, 3, 4),
    "latents": (5, 3),
    "norm/scale": (3,),
}
DECAYED = ("blocks/dense/kernel", "latents")
PEAK, WARMUP, STEPS, B1, B2, EPS, DECAY, CLIP, SKIP = 0.1, 3, 12, 0.9, 0.95, 1e-8, 0.05, 1.0, 5.0


def nested(flat):
    tree = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return tree


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def config(**changes):
    fields = dict(learning_rate=PEAK, warmup_steps=WARMUP, schedule="cosine", b1=B1, b2=B2)
    fields |= dict(weight_decay=DECAY, clip_norm=CLIP, skip_norm=SKIP)
    fields |= dict(nonfinite="replace", schedule_over="steps", **changes)
    c = toy.config(num_steps=STEPS)
    c.optim.update(fields)
    return c


def gradients():
    """Gradients of every step: small, clipped, skipped, with single values that are not finite."""
    rng, steps = np.random.default_rng(0), []
    for norm in (0.5, 2.0, 0.3, 7.0, 0.8, 4.9, 5.1, 0.2, 1.5, 0.6):
        drawn = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
        size = np.sqrt(sum(np.sum(g**2) for g in drawn.values()))
        steps.append({name: (g * norm / size).astype(np.float32) for name, g in drawn.items()})
    steps[2]["latents"][1, 2] = np.nan
    steps[4]["blocks/dense/kernel"][0, 0, 0] = np.inf
    steps[7]["blocks/norm/scale"][1, 1] = -np.inf
    return steps


def reference(params, steps):
    """The published rule in float64, one parameter after the other; yields after every step."""
    params = {name: p.astype(np.float64) for name, p in params.items()}
    first = {name: np.zeros(p.shape) for name, p in params.items()}
    second = {name: np.zeros(p.shape) for name, p in params.items()}
    updates = 0
    for step, grads in enumerate(steps):
        rate = PEAK * step / WARMUP
        if step >= WARMUP:
            rate = PEAK * 0.5 * (1 + np.cos(np.pi * (step - WARMUP) / (STEPS - WARMUP)))
        grads = {n: g.astype(np.float64) for n, g in grads.items()}
        grads = {n: np.nan_to_num(g, nan=0, posinf=1e-6, neginf=-1e-6) for n, g in grads.items()}
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        if norm <= SKIP:
            updates += 1
            for name, g in grads.items():
                g = g * min(1, CLIP / norm)
                first[name] = B1 * first[name] + (1 - B1) * g
                second[name] = B2 * second[name] + (1 - B2) * g**2
                mean = first[name] / (1 - B1**updates)
                deviation = np.sqrt(second[name] / (1 - B2**updates))
                decay = DECAY if name in DECAYED else 0.0
                params[name] = params[name] * (1 - rate * decay)
                params[name] = params[name] - rate * mean / (deviation + EPS)
        yield dict(params), rate, norm > SKIP


def task(start):
    """Parameters whose gradient is what the batch holds."""

    def loss(variables, batch, key):
        del key
        params = variables["params"]
        given = jax.lax.stop_gradient(nested(batch.extras))
        parts = jax.tree.map(lambda p, g: _slope(p, g), params, given)
        return sum(jax.tree.leaves(parts)), Aux(metrics={})

    return Task(lambda key, batch: {"params": nested(start)}, loss, lambda *_: None, AXES)  # pyright: ignore


@jax.custom_vjp
def _slope(p, g):
    """A finite number whose gradient with respect to p is g, finite or not."""
    return jnp.zeros(())


_slope.defvjp(lambda p, g: (jnp.zeros(()), g), lambda g, c: (g * c, jnp.zeros_like(g)))


def run(c, steps):
    rng = np.random.default_rng(1)
    start = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    views = toy.views(np.zeros((1, 1, 4, 4, 3), np.float32))
    batches = [Batch(views, views, dict(grads)) for grads in steps]
    made = task({n: jnp.asarray(p) for n, p in start.items()})
    tx = optim.make(c, AXES)
    step = jax.jit(training_step.make_step(made, tx, c))
    state = training_step.init_state(made, tx, c, batches[0])
    for batch in batches:
        state, metrics = step(state, batch)
        yield start, state, metrics


def test_steps_follow_the_published_rule_where_some_are_skipped():
    steps = gradients()
    made = list(run(config(), steps))
    for (_, state, metrics), (params, rate, skipped) in zip(
        made, reference(made[0][0], steps), strict=True
    ):
        assert float(metrics["learning_rate"]) == pytest.approx(rate, abs=1e-7)
        assert int(metrics["skipped"]) == int(metrics["large_gradient"]) == int(skipped)
        for name, found in flat(state.params).items():
            np.testing.assert_allclose(found, params[name], rtol=1e-5, atol=2e-6, err_msg=name)
    assert int(made[-1][1].skipped) == 2


def test_the_first_step_has_rate_zero():
    start, state, metrics = next(run(config(), gradients()))
    assert float(metrics["learning_rate"]) == 0
    for name, found in flat(state.params).items():
        np.testing.assert_array_equal(found, start[name])


def test_a_loss_that_is_not_finite_skips_the_step_and_the_schedule_goes_on():
    c = config()
    base = task({n: jnp.ones(s) for n, s in SHAPES.items()})

    def loss(variables, batch, key):
        value, aux = base.loss(variables, batch, key)
        return value + jnp.nan, aux

    views = toy.views(np.zeros((1, 1, 4, 4, 3), np.float32))
    batch = Batch(views, views, gradients()[0])
    tx = optim.make(c, AXES)
    step = jax.jit(training_step.make_step(base._replace(loss=loss), tx, c))
    state = training_step.init_state(base, tx, c, batch)
    for expected in (0, PEAK / WARMUP, 2 * PEAK / WARMUP):
        state, metrics = step(state, batch)
        assert float(metrics["learning_rate"]) == pytest.approx(expected)
        assert int(metrics["skipped"]) == 1 and int(metrics["large_gradient"]) == 0
    assert all((found == 1).all() for found in flat(state.params).values())


def test_the_schedule_holds_still_where_it_counts_updates():
    c = config()
    c.optim.schedule_over = "updates"
    rates = [float(metrics["learning_rate"]) for _, _, metrics in run(c, gradients()[2:6])]
    # The second of these gradients is too large.
    np.testing.assert_allclose(rates, [0, PEAK / 3, PEAK / 3, 2 * PEAK / 3], rtol=1e-6)


def test_stacked_scales_are_not_decayed_with_or_without_the_table():
    params = nested({n: jnp.ones(s) for n, s in SHAPES.items()})
    for axes in (AXES, None):
        mask = flat(optim.decay_mask(params, axes))
        assert {name for name, decayed in mask.items() if decayed} == set(DECAYED)


def test_unknown_options_are_named():
    for name in ("nonfinite", "schedule_over"):
        c = config()
        c.optim[name] = "sometimes"
        with pytest.raises(errors.InputError, match=f"config.optim.{name}='sometimes'"):
            optim.make(c)
