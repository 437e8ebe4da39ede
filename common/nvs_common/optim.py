"""The optimiser of a config: schedule, gradient clipping, Adam with decoupled weight decay, EMA.

`config.optim` holds learning_rate, warmup_steps, schedule, decay_steps, b1, b2, weight_decay and
clip_norm (0 = no clipping). The top-level `num_steps` sets the end of the schedules. Optional are

- skip_norm: a step whose gradient has a larger global norm is skipped; 0, the default, never.
- nonfinite: "skip" (default) skips a step whose gradient has a value that is not finite;
  "replace" puts 0 for NaN and +-1e-6 for +-infinity, as LVSM does. A loss that is not finite
  skips the step in both.
- schedule_over: "updates" (default) holds the schedule still in a skipped step; with "steps" the
  learning rate is a function of the step alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nvs_common import errors, runs, sharding
from nvs_common.types import Array, Names

SCHEDULES = ("cosine", "constant", "warmup_hold_cosine")
CHOICES = {"nonfinite": ("skip", "replace"), "schedule_over": ("updates", "steps")}
# Flax's names of parameters that multiply or shift features.
_VECTORS = ("scale", "bias")
_INFINITE = 1e-6


def make(
    config: runs.Config, param_axes: Mapping[str, Names] | None = None
) -> optax.GradientTransformation:
    """The chain: clip by global norm, Adam, weight decay (matrices only), learning rate.

    Args:
      config: reads optim and num_steps.
      param_axes: of the task, for `decay_mask`.

    Raises:
      InputError: an unknown schedule or option, or lengths that do not fit into num_steps.
    """
    optim = config.optim
    for name in CHOICES:
        _choice(config, name)
    adam = optax.adamw(
        schedule(config),
        b1=optim.b1,
        b2=optim.b2,
        weight_decay=optim.weight_decay,
        mask=lambda params: decay_mask(params, param_axes),
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


def decay_mask(params: Any, param_axes: Mapping[str, Names] | None = None) -> Any:
    """True for parameters that weight decay shrinks: not biases, scales or other vectors.

    The scales of layers that a scan stacks are a matrix [l, d] and still vectors: the axis
    "layer" does not count.

    Args:
      params: tree of arrays.
      param_axes: regex on a parameter's path -> logical axis names. Without it parameters named
        "scale" or "bias" count as vectors whatever their rank.
    """

    def decays(path, leaf) -> bool:
        name = sharding.path_name(path)
        if param_axes is None:
            return jnp.ndim(leaf) > 1 and name.rpartition("/")[2] not in _VECTORS
        rows = [axes for pattern, axes in param_axes.items() if re.fullmatch(pattern, name)]
        stacked = sum(axis == "layer" for axis in rows[0]) if rows else 0
        return jnp.ndim(leaf) - stacked > 1

    return jax.tree_util.tree_map_with_path(decays, params)


def handle_nonfinite(grads: Any, config: runs.Config) -> Any:
    """The gradients that go on to the norm: with values replaced where the config asks for it.

    It is one sum over all devices by then, so that all of them do the same.
    """
    if _choice(config, "nonfinite") == "skip":
        return grads
    # After the mean over the batch: what one scene has spoilt is replaced everywhere alike.
    return jax.tree.map(
        lambda g: jnp.nan_to_num(g, nan=0.0, posinf=_INFINITE, neginf=-_INFINITE), grads
    )


def acceptable(norm: Array, config: runs.Config) -> Array:
    """Whether a gradient of this finite global norm may be used; a boolean scalar."""
    limit = config.optim.get("skip_norm", 0.0)
    return norm <= limit if limit > 0 else jnp.ones((), bool)


def without_update(opt_state: Any, config: runs.Config) -> Any:
    """The state of the optimiser after a skipped step: moments stay, the schedule may go on."""
    if _choice(config, "schedule_over") == "updates":
        return opt_state

    def advance(part: Any) -> Any:
        if isinstance(part, optax.ScaleByScheduleState):
            return part._replace(count=part.count + 1)
        return part

    return jax.tree.map(
        advance, opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState)
    )


def scheduled(step: Array, skipped: Array, config: runs.Config) -> Array:
    """The learning rate of a step, the `skipped` earlier ones of which were skipped."""
    count = step if _choice(config, "schedule_over") == "steps" else step - skipped
    return jnp.asarray(schedule(config)(count))


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


def _choice(config: runs.Config, name: str) -> str:
    """An optional field of config.optim; raises InputError on a value that is not known."""
    value = config.optim.get(name, CHOICES[name][0])
    if value not in CHOICES[name]:
        raise errors.InputError(
            f"config.optim.{name}={value!r} is unknown; choose one of {CHOICES[name]}."
        )
    return value
