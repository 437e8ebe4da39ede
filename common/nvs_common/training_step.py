"""The state of training and one step of it, as pure functions to be compiled over a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nvs_common import errors, optim, runs, sharding
from nvs_common.types import Array, Aux, Batch, Task, Variables

Metrics = dict[str, Array]
StepFn = Callable[["State", Batch], tuple["State", Metrics]]


@flax.struct.dataclass
class State:
    """All that a step changes.

    Attributes:
      step: number of steps made, skipped ones included.
      params: trained parameters.
      opt_state: state of the optimiser, laid out as the parameters.
      ema_params: moving average of the parameters, or None.
      collections: non-trained collections of the model; {} for none.
      skipped: number of steps skipped: loss or gradient not finite, or the gradient too large.
      skipped_in_row: how many of them were the latest ones.
    """

    step: Array
    params: Any
    opt_state: Any
    ema_params: Any
    collections: dict[str, Any]
    skipped: Array
    skipped_in_row: Array


def variables(state: State) -> Variables:
    """What evaluation uses: EMA parameters where there are any, and the collections."""
    params = state.params if state.ema_params is None else state.ema_params
    return {"params": params, **state.collections}


def init_state(
    task: Task,
    tx: optax.GradientTransformation,
    config: runs.Config,
    batch: Batch,
) -> State:
    """A new state; parameters depend on config.seed alone, not on the mesh.

    Args:
      task: the system.
      tx: the optimiser.
      config: reads seed and ema.
      batch: of the right shapes, arrays [b, ...].
    """
    made = dict(task.init(_keys(config)[0], batch))
    params = made.pop("params")
    zero = jnp.zeros((), jnp.int32)
    return State(
        step=zero,
        params=params,
        opt_state=tx.init(params),
        # A copy: the state is donated, and two leaves must not share a buffer.
        ema_params=jax.tree.map(jnp.copy, params) if config.ema else None,
        collections=made,
        skipped=zero,
        skipped_in_row=zero,
    )


def abstract_state(
    task: Task,
    tx: optax.GradientTransformation,
    config: runs.Config,
    batch: Batch,
    mesh: Mesh,
) -> State:
    """Shapes, dtypes and layout of the state; nothing is computed.

    Parameters go where `task.param_axes` says, their averages and moments with them; everything
    else is replicated.

    Args:
      task: the system.
      tx: the optimiser.
      config: reads seed and ema.
      batch: ShapeDtypeStructs of the global batch.
      mesh: the mesh to train on.

    Raises:
      ValueError: a parameter matches no row of param_axes or several, or a row matches nothing.
      InputError: a large parameter does not divide over the mesh.
    """
    shapes = jax.eval_shape(lambda b: init_state(task, tx, config, b), batch)
    specs = sharding.param_specs(shapes.params, task.param_axes, mesh)
    params = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    whole: Any = sharding.replicated(mesh)
    layout = State(
        step=whole,
        params=params,
        opt_state=optax.tree.map_params(
            tx, lambda _, s: s, shapes.opt_state, params, transform_non_params=lambda _: whole
        ),
        ema_params=None if shapes.ema_params is None else params,
        collections=jax.tree.map(lambda _: whole, shapes.collections),
        skipped=whole,
        skipped_in_row=whole,
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout
    )


def layout(abstract: Any) -> Any:
    """The shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda x: x.sharding, abstract)


def make_step(task: Task, tx: optax.GradientTransformation, config: runs.Config) -> StepFn:
    """The function (state, batch) -> (state, metrics) of one step, to be jitted.

    The gradient is the mean over `config.accumulate` microbatches. A step whose loss or gradient
    is not finite, or whose gradient is larger than `config.optim.skip_norm`, changes nothing but
    the counters, and the schedule where it counts steps. Randomness depends on (seed, step) alone.

    Args:
      task: the system.
      tx: the optimiser.
      config: reads seed, accumulate, ema and optim.
    """

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(_keys(config)[1], state.step)
        (loss, aux), grads = _gradient(task, state, batch, key, config.accumulate)
        grads = optim.handle_nonfinite(grads, config)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        fine = finite & optim.acceptable(norm, config)
        moved = _update(state, tx, grads, aux.collections, config.ema)
        still = dataclasses.replace(state, opt_state=optim.without_update(state.opt_state, config))
        # Selected leaf by leaf: what a bad gradient made of the new values is never looked at.
        kept = jax.tree.map(lambda new, old: jnp.where(fine, new, old), moved, still)
        bad = 1 - fine.astype(jnp.int32)
        new = dataclasses.replace(
            kept,
            step=state.step + 1,
            skipped=state.skipped + bad,
            skipped_in_row=jnp.where(fine, 0, state.skipped_in_row + 1),
        )
        metrics = aux.metrics | {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": optim.scheduled(state.step, state.skipped, config),
            "skipped": bad,
            "skipped_total": new.skipped,
            "skipped_in_row": new.skipped_in_row,
            # Tells bad data from a diverged model.
            "bad_data": bad * (1 - _finite(batch)),
            "large_gradient": bad * finite.astype(jnp.int32),
        }
        return new, metrics

    return step


def compile_step(
    task: Task,
    tx: optax.GradientTransformation,
    config: runs.Config,
    abstract: State,
    mesh: Mesh,
) -> Any:
    """The jitted step: state donated, laid out as `abstract`, metrics replicated.

    Call (or lower) it inside `jax.set_mesh(mesh)` and `sharding.axis_rules()`.
    """
    out = (layout(abstract), sharding.replicated(mesh))
    return jax.jit(make_step(task, tx, config), donate_argnums=0, out_shardings=out)


def check_batch(config: runs.Config, mesh: Mesh) -> None:
    """Checks that scenes divide over the mesh, the processes and the microbatches.

    Raises:
      InputError: they do not.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.accumulate < 1 or config.batch_size % (parts * config.accumulate):
        raise errors.InputError(
            f"batch_size={config.batch_size} scenes do not divide over mesh data x fsdp = {parts} "
            f"times accumulate={config.accumulate}; change one of them."
        )
    if config.batch_size % jax.process_count():
        raise errors.InputError(
            f"batch_size={config.batch_size} does not divide over {jax.process_count()} processes."
        )


def _finite(tree: Any) -> Array:
    """1 if every floating value of the tree is finite, else 0."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    fine = [jnp.all(jnp.isfinite(x)) for x in floats]
    return jnp.all(jnp.stack(fine)).astype(jnp.int32)


def _keys(config: runs.Config) -> Array:
    """Two keys: for the initial parameters and for the steps."""
    return jax.random.split(jax.random.key(config.seed))


def _gradient(
    task: Task, state: State, batch: Batch, key: Array, accumulate: int
) -> tuple[tuple[Array, Aux], Any]:
    """((loss, aux), gradient), each the mean over microbatches; collections are the last ones.

    All microbatches are of one step: what a task counts in the collection "schedule" under "step"
    stays as it was until the last of them.
    """

    def one(collections, part, key):
        def loss(params):
            return task.loss({"params": params, **collections}, part, key)

        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        # A loss that leaves the collections alone returns none of them.
        return value, Aux(aux.metrics, {**collections, **aux.collections}), grads

    if accumulate == 1:
        value, aux, grads = one(state.collections, batch, key)
        return (value, aux), grads

    def body(carry, xs):
        collections, sums = carry
        part, index = xs
        part = jax.tree.map(lambda x: _pin(x), part)
        value, aux, grads = one(collections, part, jax.random.fold_in(key, index))
        sums = jax.tree.map(jnp.add, sums, (value, aux.metrics, grads))
        counted = _step(aux.collections)
        return (_at_step(aux.collections, _step(state.collections)), sums), counted

    parts = jax.tree.map(lambda x: _split(x, accumulate), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(one, state.collections, first, key)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[1].metrics, shapes[2])
    )
    (collections, sums), counted = jax.lax.scan(
        body, (state.collections, zeros), (parts, jnp.arange(accumulate))
    )
    collections = _at_step(collections, None if counted is None else counted[-1])
    value, metrics, grads = jax.tree.map(lambda x: x / accumulate, sums)
    return (value, Aux(metrics, collections)), grads


def _step(collections: Mapping[str, Any]) -> Array | None:
    """The step that a task counts by itself, if it does."""
    return collections.get("schedule", {}).get("step")


def _at_step(collections: Mapping[str, Any], step: Array | None) -> dict[str, Any]:
    """The collections at that step; as they are where a task counts none."""
    if step is None:
        return dict(collections)
    return {**collections, "schedule": {**collections["schedule"], "step": step}}


def _split(x: Array, accumulate: int) -> Array:
    """[b, ...] -> [accumulate, b / accumulate, ...], every microbatch over all devices.

    Scenes are dealt out in turn: those of one device stay there.
    """
    dealt = x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:])
    return jnp.swapaxes(dealt, 0, 1)


def _pin(x: Array) -> Array:
    return sharding.constrain(x, ("act_batch", *(None,) * (x.ndim - 1)))


def _update(
    state: State, tx: optax.GradientTransformation, grads: Any, collections: Any, decay: float
) -> State:
    """The state after an update with these gradients; counters as they were."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.ema_params
    if average is not None:
        average = optim.ema(average, params, decay, state.step - state.skipped)
    return dataclasses.replace(
        state, params=params, opt_state=opt_state, ema_params=average, collections=collections
    )
