"""The training loop of every system: sharded, resumable to the bit, honest about its speed.

    state = fit(task, batches, config, workdir, evaluate=evaluate)

A workdir holds config.json, run.json, metrics.jsonl, TensorBoard events and checkpoints/. Running
`fit` again on it goes on where the newest whole checkpoint ends, with the same next batches.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview

from nvs_common import (
    checkpoint,
    errors,
    feed,
    optim,
    report,
    runs,
    sharding,
    starting,
    stopping,
    training_step,
)
from nvs_common.types import Task, Variables

State = training_step.State
make_step = training_step.make_step
_log = logging.getLogger(__name__)

# Steps that may be under way on the device before the host waits for the oldest.
IN_FLIGHT = 2


class Evaluation(Protocol):
    """What an evaluation gives: values, and uint8 images [h, w, 3], by name."""

    @property
    def metrics(self) -> Mapping[str, float]: ...

    @property
    def images(self) -> Mapping[str, np.ndarray]: ...


Evaluate = Callable[[Variables, int], Evaluation]


class Preempted(Exception):
    """SIGTERM arrived: a checkpoint was saved; the program should exit with 75 and be restarted."""


def fit(
    task: Task,
    batches: feed.BatchIterator,
    config: runs.Config,
    workdir: str | pathlib.Path,
    *,
    evaluate: Evaluate | None = None,
    devices: Sequence[Any] | None = None,
) -> State:
    """Trains to config.num_steps, or to the time limit, from scratch or from the checkpoint.

    Args:
      task: the system.
      batches: this process's part of each batch (NumPy), with a position to save.
      config: see configs/quark.py for the fields.
      workdir: folder of the run, made if need be.
      evaluate: (variables, step) -> Evaluation, called every eval_every steps and at the end.
      devices: the devices to use, all by default.

    Returns:
      The state after the last step made.

    Raises:
      InputError: the config does not fit the devices, the data or the checkpoint in workdir,
        which cannot be written to or in which another process trains; or more than max_skipped
        steps in a row were skipped.
      Preempted: SIGTERM arrived; a checkpoint was saved.
    """
    workdir = pathlib.Path(workdir).absolute()
    runs.check_fields(config)
    runs.check_agreement(config)
    mesh = sharding.make_mesh(config.mesh, devices)
    training_step.check_batch(config, mesh)
    tx = optim.make(config, task.param_axes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(runs.locked(workdir))
        stop = stack.enter_context(stopping.Stop(config.stop_after_minutes))
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(sharding.axis_rules())
        store = checkpoint.Store(workdir, keep=config.keep_checkpoints)
        stack.callback(store.close)
        start = _start(task, tx, batches, config, mesh, store)
        stack.callback(start.feed.close)
        first = int(start.state.step)
        if jax.process_index() == 0:
            runs.write_session(workdir, config, mesh, first)
        writer = report.Writer(workdir, first)
        stack.callback(writer.close)
        progress = report.Progress(first, config.num_steps)
        stack.callback(progress.close)
        said = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
        _log.info("mesh %s of %s; compiling the step", said, mesh.devices.flat[0].device_kind)
        loop = _Loop(config, workdir, mesh, store, start.feed, writer, progress, stop, evaluate)
        train_step = training_step.compile_step(task, tx, config, start.abstract, mesh)
        return loop.run(start.state, train_step)


class _Start(NamedTuple):
    """Where a session begins."""

    state: State
    abstract: State
    feed: feed.Feed


def _start(task, tx, batches, config, mesh, store: checkpoint.Store) -> _Start:
    """Restores the newest whole checkpoint, or makes a new state; starts the feed there."""
    guess = store.position()
    if guess is not None:
        batches.set_state(guess)
    before = feed.position(batches)
    first = feed.Taken(next(batches), before)
    _check_example(first.batch, config)
    batch = feed.abstract(first.batch, mesh)
    abstract = training_step.abstract_state(task, tx, config, batch, mesh)
    restored = store.restore(to_trees(abstract))
    if restored is None:
        _log.info(
            "%s", parameter_overview.get_parameter_overview(abstract.params, include_stats=False)
        )
        init = jax.jit(
            lambda b: training_step.init_state(task, tx, config, b),
            out_shardings=training_step.layout(abstract),
        )
        state = init(feed.to_global(first.batch, mesh))
        if run := config.get("init_from", ""):
            state = _started_from(run, state, abstract, tuple(config.get("init_new", ())))
    else:
        _log.info("restored step %d from %s", restored.step, store.folder)
        state = from_trees(abstract, restored.trees)
    if restored is not None and restored.position != before:
        # The newest step was damaged: the batch in hand is not the one that comes next.
        batches.set_state(restored.position)
        return _Start(state, abstract, feed.Feed(batches))
    return _Start(state, abstract, feed.Feed(batches, first))


def _started_from(run: str, state: State, abstract: State, new: tuple[str, ...]) -> State:
    """A new state with parameters and collections of another run; its average starts there too.

    Parts whose names start with one of `new` keep their initial values where the run lacks them.
    """
    like = {"params": abstract.params, **abstract.collections}
    found = starting.initial_variables(run, like, new)
    params = {name: found["params"].get(name, part) for name, part in state.params.items()}
    kept = {name: found.get(name, part) for name, part in state.collections.items()}
    said = [name for name in kept if name in found]
    _log.info("%s are those of the run in %s", ", ".join(["parameters", *said]), run)
    place = training_step.layout(abstract.params)
    average = None if state.ema_params is None else jax.device_put(params, place)
    return dataclasses.replace(
        state,
        params=jax.device_put(jax.tree.map(jnp.copy, params), place),
        ema_params=average,
        collections=jax.device_put(kept, training_step.layout(abstract.collections)),
    )


def to_trees(state: State) -> dict[str, Any]:
    """The named trees of a checkpoint; empty ones are left out."""
    progress = {
        "step": state.step,
        "opt_state": state.opt_state,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
    }
    trees = {
        "params": state.params,
        "ema_params": state.ema_params,
        "collections": state.collections,
        "progress": progress,
    }
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def from_trees(like: State, trees: dict[str, Any]) -> State:
    """The state again, from the trees of a checkpoint."""
    return dataclasses.replace(
        like,
        params=trees["params"],
        ema_params=trees.get("ema_params"),
        collections=trees.get("collections", {}),
        **trees["progress"],
    )


def _check_example(batch, config) -> None:
    expected = config.batch_size // jax.process_count()
    found = {np.shape(x)[0] if np.ndim(x) else 0 for x in jax.tree.leaves(batch)}
    if found != {expected}:
        raise errors.InputError(
            f"the data gives batches of {sorted(found)} scenes, but batch_size="
            f"{config.batch_size} on {jax.process_count()} processes needs {expected}."
        )


class _Loop:
    """The loop over steps and what happens between them."""

    def __init__(self, config, workdir, mesh, store, feed_, writer, progress, stop, evaluate):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.store, self.feed, self.writer, self.progress = store, feed_, writer, progress
        self.stop, self.evaluate = stop, evaluate
        self.clock = report.Clock(config.batch_size)
        self.window: list[training_step.Metrics] = []
        self.tracing = False

    def run(self, state: State, train_step: Callable) -> State:
        """Runs the steps; returns the last state."""
        step = first = int(state.step)
        under_way: collections.deque[training_step.Metrics] = collections.deque()
        ended = None
        while step < self.config.num_steps and not ended:
            batch = self._next_batch(under_way)
            self._trace(step, state)
            state, metrics = train_step(state, batch)
            step += 1
            self.window.append(metrics)
            under_way.append(metrics)
            if len(under_way) > IN_FLIGHT or step == first + 1:
                jax.block_until_ready(under_way.popleft())
            # The first step compiles; rates begin after it.
            self.clock.restart() if step == first + 1 else self.clock.step()
            self.progress.step()
            ended = self.stop.reason(step)
            self._between(state, step, ended)
        self._trace(None, state)
        self.store.wait()
        # A session that was stopped in its last step, or in that evaluation, left it out.
        if step == self.config.num_steps and not ended and not self.writer.has("eval", step):
            self._evaluate(state, step)
        if ended:
            self._say_why(step, ended)
        return state

    def _between(self, state: State, step: int, ended: str | None) -> None:
        """Reports, saves and evaluates after a step, where it is time to."""
        config = self.config
        last = step == config.num_steps or ended is not None
        if last or step % config.log_every == 0:
            self._report(step)
        if last or _due(step, config.checkpoint_every):
            position = self.feed.position
            self.store.save(step, to_trees(state), position, runs.to_json(config))
        if ended != "preempted" and (last or _due(step, config.eval_every)):
            self._evaluate(state, step)

    def _evaluate(self, state: State, step: int) -> None:
        """Evaluates, where the run does."""
        if self.evaluate is None or not self.config.eval_every:
            return
        began = time.perf_counter()
        result = self.evaluate(training_step.variables(state), step)
        self.writer.scalars(step, "eval", result.metrics)
        self.writer.images(step, "eval", result.images)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in result.metrics.items())
        _log.info("evaluation at step %d: %s", step, shown)
        self.clock.leave_out(time.perf_counter() - began)

    def _next_batch(self, under_way: Sequence[training_step.Metrics]) -> Any:
        """The next batch on the mesh; time in which the device idles for it is counted."""
        if self.feed.ready():
            return feed.to_global(self.feed.take(), self.mesh)
        if under_way:
            jax.block_until_ready(under_way[-1])
        # From here on the device has nothing to do until the batch is there.
        began = time.perf_counter()
        batch = self.feed.take()
        self.clock.waited(time.perf_counter() - began)
        return feed.to_global(batch, self.mesh)

    def _report(self, step: int) -> None:
        """Fetches the metrics since the last report and shows them; stops a diverged run."""
        values = report.average(self.window)
        self.window = []
        values |= self.clock.rates()
        self.writer.scalars(step, "train", values)
        self.progress.report(step, values)
        if values["skipped"]:
            _log.warning(
                "up to step %d: %d steps skipped because loss or gradient was not finite (%d of "
                "them with such values in the data) or the gradient above optim.skip_norm (%d)",
                step,
                values["skipped"],
                values["bad_data"],
                values["large_gradient"],
            )
        in_row = int(values["skipped_in_row"])
        if in_row > self.config.max_skipped:
            raise errors.InputError(
                f"the last {in_row} steps up to {step} had a loss or gradient that is not finite "
                f"or above optim.skip_norm (max_skipped={self.config.max_skipped}); lower "
                "config.optim.learning_rate or look at the data; the checkpoints are untouched."
            )

    def _trace(self, step: int | None, state: State) -> None:
        """Starts and ends the profiler trace of steps config.profile = (start, stop)."""
        begin, end = self.config.profile
        inside = step is not None and begin <= step < end
        if inside == self.tracing:
            return
        jax.block_until_ready(state)
        if inside:
            jax.profiler.start_trace(str(self.workdir / "profile"))
        else:
            jax.profiler.stop_trace()
        self.tracing = inside

    def _say_why(self, step: int, ended: str) -> None:
        if ended == "preempted":
            raise Preempted(f"SIGTERM: saved step {step} in {self.workdir}; run again to go on.")
        _log.warning(
            "stopped at step %d of %d: stop_after_minutes=%g is over; saved, run again to go on.",
            step,
            self.config.num_steps,
            self.config.stop_after_minutes,
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
