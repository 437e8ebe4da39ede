"""Schedules, weight decay, clipping and the moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nvs_common import errors, optim
from tests import toy


def rates(*steps, **changes):
    fields = {f"optim.{k}" if k != "num_steps" else k: v for k, v in changes.items()}
    rate = optim.schedule(toy.config(**{"optim.learning_rate": 1.0, **fields}))
    return [float(rate(s)) for s in steps]


def test_cosine_rises_then_falls_to_zero_at_the_end():
    found = rates(0, 5, 10, 60, 110, schedule="cosine", warmup_steps=10, num_steps=110)
    np.testing.assert_allclose(found, [0, 0.5, 1, 0.5, 0], atol=1e-6)


def test_constant_stays_after_its_rise():
    found = rates(0, 2, 4, 99, schedule="constant", warmup_steps=4, num_steps=100)
    np.testing.assert_allclose(found, [0, 0.5, 1, 1], atol=1e-6)


def test_warmup_hold_cosine_holds_until_the_last_decay_steps():
    found = rates(
        *(10, 20, 539, 540, 570, 600),
        schedule="warmup_hold_cosine",
        warmup_steps=20,
        decay_steps=60,
        num_steps=600,
    )
    np.testing.assert_allclose(found, [0.5, 1, 1, 1, 0.5, 0], atol=1e-6)


def test_without_warmup_the_first_rate_is_the_peak():
    assert rates(0, schedule="cosine", num_steps=10) == [1.0]


def test_an_unknown_schedule_names_the_known_ones():
    with pytest.raises(errors.InputError, match="'linear' is unknown.*warmup_hold_cosine"):
        optim.schedule(toy.config(**{"optim.schedule": "linear"}))


def test_lengths_that_do_not_fit_are_an_error():
    with pytest.raises(errors.InputError, match="warmup_steps=9 .* num_steps=6"):
        optim.schedule(toy.config(**{"optim.schedule": "cosine", "optim.warmup_steps": 9}))


def test_weight_decay_shrinks_matrices_and_leaves_vectors():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    config = toy.config(**{"optim.learning_rate": 0.1, "optim.weight_decay": 0.5})
    tx = optim.make(config)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(moved["kernel"], 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(moved["bias"], params["bias"])


def test_clipping_bounds_the_global_norm_of_gradients():
    # Adam's first moment after one step is (1 - b1) times the clipped gradient.
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    grads = {"a": jnp.full(3, 10.0), "b": jnp.full(4, -20.0)}
    tx = optim.make(toy.config(**{"optim.clip_norm": 0.5, "optim.b1": 0.0}))
    _, state = tx.update(grads, tx.init(params), params)
    moments = optax.tree.get(state, "mu")
    np.testing.assert_allclose(optax.tree.norm(moments), 0.5, rtol=1e-5)


def test_ema_follows_its_formula_with_a_short_memory_at_first():
    average, params = {"w": jnp.float32(1.0)}, {"w": jnp.float32(3.0)}
    first = optim.ema(average, params, 0.9, jnp.int32(0))["w"]
    np.testing.assert_allclose(first, 0.1 * 1 + 0.9 * 3, rtol=1e-6)
    late = optim.ema(average, params, 0.9, jnp.int32(10_000))["w"]
    np.testing.assert_allclose(late, 0.9 * 1 + 0.1 * 3, rtol=1e-6)
