"""The optimiser of a config: schedule, gradient clipping, Adam with decoupled weight decay, EMA.

`config.optim` holds learning_rate, warmup_steps, schedule, decay_steps, b1, b2, weight_decay and
clip_norm (0 = no clipping). The top-level `num_steps` sets the end of the schedules.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from nvs_common import errors, runs
from nvs_common.types import Array

SCHEDULES = ("cosine", "constant", "warmup_hold_cosine")


def make(config: runs.Config) -> optax.GradientTransformation:
    """The chain: clip by global norm, Adam, weight decay (matrices only), learning rate.

    Raises:
      InputError: an unknown schedule, or lengths that do not fit into num_steps.
    """
    optim = config.optim
    adam = optax.adamw(
        schedule(config),
        b1=optim.b1,
        b2=optim.b2,
        weight_decay=optim.weight_decay,
        mask=decay_mask,
    )
    if optim.clip_norm <= 0:
        return adam
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), adam)


def schedule(config: runs.Config) -> optax.Schedule:
    """The learning rate as a function of the number of updates made.

    Every schedule rises linearly from 0 over `warmup_steps`. Then "constant" stays, "cosine"
    falls to 0 at num_steps, "warmup_hold_cosine" stays and falls to 0 over the last `decay_steps`.

    Raises:
      InputError: an unknown schedule, or lengths that do not fit into num_steps.
    """
    optim, steps = config.optim, config.num_steps
    peak, warmup, decay = optim.learning_rate, optim.warmup_steps, optim.decay_steps
    if optim.schedule not in SCHEDULES:
        raise errors.InputError(
            f"config.optim.schedule={optim.schedule!r} is unknown; choose one of {SCHEDULES}."
        )
    if optim.schedule == "cosine":
        decay = steps - warmup
    elif optim.schedule == "constant":
        decay = 0
    if warmup < 0 or decay < 0 or warmup + decay > steps:
        raise errors.InputError(
            f"config.optim: warmup_steps={warmup} and decay_steps={decay} do not fit into "
            f"num_steps={steps}; make them shorter."
        )
    parts = [optax.linear_schedule(0.0, peak, warmup)] if warmup else []
    parts.append(optax.constant_schedule(peak))
    boundaries = [warmup] if warmup else []
    if decay:
        parts.append(optax.cosine_decay_schedule(peak, decay))
        boundaries.append(steps - decay)
    return optax.join_schedules(parts, boundaries)


def decay_mask(params: Any) -> Any:
    """True for parameters that weight decay shrinks: not biases, scales or other vectors."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


def ema(average: Any, params: Any, decay: float, updates: Array) -> Any:
    """Moves the average of the parameters towards their new values.

    The decay is min(decay, (1 + n) / (10 + n)) after n updates, so that the average forgets the
    random initial values even in a short run.

    Args:
      average: tree of averages.
      params: tree of the new values.
      decay: share of the average that is kept, in [0, 1).
      updates: number of updates made before this one.
    """
    n = jnp.asarray(updates, jnp.float32)
    keep = jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n))
    return jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, average, params)
