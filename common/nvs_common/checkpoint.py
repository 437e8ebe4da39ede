"""Checkpoints: atomic and asynchronous (Orbax), verified on restore, for any mesh.

A step holds named trees (params, ema_params, collections, progress), the position of the data
iterator, the config and a digest of every leaf. A step is there once its commit file is written;
one that does not restore to its digests is set aside as `N.bad` and the one before it is used.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import options as ocp_options

from nvs_common import digests, errors, runs, sharding
from nvs_common.types import Variables

FOLDER = "checkpoints"
_log = logging.getLogger(__name__)

# Not signs of a damaged file: the machine is short of something, and the step must stay.
_NOT_DAMAGE = (errors.InputError, MemoryError, PermissionError, jax.errors.JaxRuntimeError)


class Restored(NamedTuple):
    """A restored step: its number, its trees on the mesh and the position of the data."""

    step: int
    trees: dict[str, Any]
    position: Any


class _Damaged(Exception):
    """A step whose content is not what was saved."""


class Store:
    """The checkpoints of one run, in `workdir/checkpoints`.

    Attributes:
      folder: where the steps are.
    """

    def __init__(self, workdir: str | pathlib.Path, *, keep: int | None, read_only: bool = False):
        """Opens the checkpoints of a run.

        Args:
          workdir: folder of the run.
          keep: how many steps to keep, all if None.
          read_only: neither create the folder nor tidy up after a killed save.

        Raises:
          InputError: a path under which checkpoints could be saved and not read again.
        """
        self.folder = pathlib.Path(workdir).resolve() / FOLDER
        if not read_only and (bad := sorted(set("[\\") & set(str(self.folder)))):
            raise errors.InputError(
                f"{self.folder}: checkpoints under a path with {' or '.join(bad)} cannot be read "
                "again (TensorStore takes it for something else); choose another --workdir."
            )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=not read_only,
            read_only=read_only,
            # A killed save leaves its folder behind; the next start removes it.
            cleanup_tmp_directories=not read_only,
            atomicity_options=ocp_options.AtomicityOptions(
                mode=ocp_options.AtomicityMode.COMMIT_FILE
            ),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, trees: Mapping[str, Any], position: Any, config: Mapping) -> None:
        """Starts to save a step; returns once the arrays may be overwritten.

        Args:
          step: number of the step.
          trees: name -> tree of arrays.
          position: JSON value, where the data iterator is; the same on every process.
          config: JSON mapping, the resolved config.
        """
        if jax.process_count() > 1:
            mark = np.frombuffer(bytes.fromhex(digests.of_json(position)), np.uint8)
            multihost_utils.assert_equal(mark, "the data position differs between processes")
        # The digests are taken before the arrays leave the device.
        recorded = {name: digests.of_tree(tree) for name, tree in trees.items()}
        sums = {
            "trees": recorded,
            "position": digests.of_json(position),
            "config": digests.of_json(config),
        }
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        for name, value in {"position": position, "config": config, "digests": sums}.items():
            # A JSON item is a mapping at the top.
            items[name] = ocp.args.JsonSave({"value": value})
        with self._named_failure():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, abstract: Mapping[str, Any]) -> Restored | None:
        """Restores the newest step that is whole, onto the shardings of `abstract`.

        Args:
          abstract: name -> tree of ShapeDtypeStructs with shardings.

        Returns:
          The step, or None where no step was ever committed.

        Raises:
          InputError: the checkpoint belongs to another config, or no step is whole, now or
            earlier.
        """
        steps = self.steps()[::-1]
        for step in steps:
            try:
                restored, fault = self._read(step, abstract), None
            except _NOT_DAMAGE:
                raise
            except Exception as e:  # Orbax raises bare exceptions for damaged files.
                restored, fault = None, f"{type(e).__name__}: {str(e).strip()[:200]}"
            if _agreed(fault is None) and restored is not None:
                return restored
            self._set_aside(step, fault or "damaged on another process")
        if bad := sorted(path.name for path in self.folder.glob("*.bad*")):
            raise errors.InputError(
                f"{self.folder}: every checkpoint is damaged and was renamed ({', '.join(bad)}); "
                "use another --workdir to start again, or remove these folders."
            )
        return None

    def position(self) -> Any:
        """The data position of the newest step, unverified; None where there is none to read.

        It lets a resumed run start its data workers at the right place before the parameters
        are there; `restore` has the last word.
        """
        steps = self.steps()
        if not steps:
            return None
        try:
            return self._json(steps[-1], "position")
        except Exception as e:
            _log.warning("checkpoint %d: no data position yet (%s)", steps[-1], type(e).__name__)
            return None

    def variables(self, step: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config and {"params", collections} of a step, EMA parameters where there are any.

        Raises:
          InputError: there is no such step, or it is damaged.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "no checkpoint" if step is None else f"no checkpoint {step}"
            raise errors.InputError(
                f"{self.folder}: {wanted} here (steps: {steps or 'none'}); train first, or name "
                "another workdir or step."
            )
        step = steps[-1] if step is None else step
        try:
            return self._read_variables(step)
        except _NOT_DAMAGE:
            raise
        except Exception as e:
            reason = str(e).strip()[:200]
            raise errors.InputError(
                f"{self.folder}/{step} is damaged ({reason}); name another step of {steps}."
            ) from e

    def wait(self) -> None:
        """Waits until the save under way is committed.

        Raises:
          InputError: it could not be written.
        """
        with self._named_failure():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _named_failure(self) -> Iterator[None]:
        """What a full disk or a missing right raises, as one line."""
        try:
            yield
        except OSError as e:
            reason = e.strerror or str(e)
        except ValueError as e:  # TensorStore's, with the name of the status in front
            if not str(e).startswith(("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")):
                raise
            reason = str(e).splitlines()[0][:200]
        else:
            return
        raise errors.InputError(
            f"{self.folder}: the checkpoint could not be saved ({reason}); the steps before it "
            "are whole: mend that and run again to go on."
        )

    def close(self) -> None:
        """Waits for the save under way and ends the background threads."""
        self._manager.close()

    def _read(self, step: int, abstract: Mapping[str, Any]) -> Restored:
        recorded = self._json(step, "digests")
        _check_same_model(recorded["trees"], abstract, self.folder / str(step))
        trees = self._trees(step, abstract, recorded["trees"])
        saved = trees.get("progress", {}).get("step", step)
        if int(saved) != step:
            raise _Damaged(f"it holds step {int(saved)}: the folder was renamed")
        position = self._json(step, "position")
        if digests.of_json(position) != recorded["position"]:
            raise _Damaged("the data position differs from its digest")
        return Restored(step, trees, position)

    def _read_variables(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        recorded = self._json(step, "digests")
        config = self._json(step, "config")
        if digests.of_json(config) != recorded["config"]:
            raise _Damaged("the config differs from its digest")
        params = "ema_params" if "ema_params" in recorded["trees"] else "params"
        names = [params] + [n for n in ("collections",) if n in recorded["trees"]]
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = {name: _abstract(recorded["trees"][name], here) for name in names}
        trees = self._trees(step, abstract, recorded["trees"])
        # Uncommitted arrays, so that they follow the caller's mesh.
        trees = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), trees)
        return config, {"params": trees[params], **trees.get("collections", {})}

    def _trees(self, step: int, abstract: Mapping[str, Any], recorded: Mapping) -> dict[str, Any]:
        """Restores trees and compares them with the digests that were saved."""
        args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        out = self._manager.restore(step, args=ocp.args.Composite(**args))
        trees = {name: out[name] for name in abstract}
        for name, tree in trees.items():
            if fault := digests.first_difference(recorded[name], digests.of_tree(tree)):
                raise _Damaged(f"{name}/{fault}")
        return trees

    def _json(self, step: int, item: str) -> Any:
        args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
        return self._manager.restore(step, args=args)[item]["value"]

    def _set_aside(self, step: int, fault: str) -> None:
        """Renames a damaged step to `N.bad`."""
        target = self.folder / f"{step}.bad"
        count = 1
        while target.exists():
            count += 1
            target = self.folder / f"{step}.bad{count}"
        _log.warning("checkpoint %d is damaged (%s): renamed to %s", step, fault, target.name)
        if jax.process_index() == 0:
            (self.folder / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()


def load_variables(
    workdir: str | pathlib.Path, step: int | None = None
) -> tuple[runs.Config, Variables]:
    """Loads what evaluation and rendering need; neither optimiser nor mesh is required.

    Args:
      workdir: folder of a training run.
      step: the step to load, by default the newest whose save is complete.

    Returns:
      The config of the run and its variables (EMA parameters where there are any).

    Raises:
      InputError: no checkpoint there, no such step, or it is damaged.
    """
    with _reading(workdir) as store:
        config, variables = store.variables(step)
    return runs.from_json(config), variables


def newest_step(workdir: str | pathlib.Path) -> int | None:
    """The newest step of a run whose save is complete; None where there is none.

    Raises:
      InputError: no run there.
    """
    with _reading(workdir) as store:
        return max(store.steps(), default=None)


@contextlib.contextmanager
def _reading(workdir: str | pathlib.Path) -> Iterator[Store]:
    folder = pathlib.Path(workdir) / FOLDER
    if not folder.is_dir():
        raise errors.InputError(
            f"{folder}: no such folder; {workdir} holds no training run, pass the --workdir of one."
        )
    store = Store(workdir, keep=None, read_only=True)
    try:
        yield store
    finally:
        store.close()


def array_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of each array of a tree of arrays, or of their shapes, by `sharding.path_name`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): tuple(np.shape(x)) for path, x in leaves}


def shape_differences(there: Mapping[str, tuple], here: Mapping[str, tuple]) -> str:
    """Which arrays differ in shape, the first three in words; empty where none does.

    Args:
      there: shapes of a checkpoint or file by name, `sharding.path_name`.
      here: shapes that the config makes.
    """
    wrong = [
        f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
        for name in [*here, *(n for n in there if n not in here)]
        if there.get(name) != here.get(name)
    ]
    more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
    return "; ".join(wrong[:3]) + more


def _agreed(ok: bool) -> bool:
    """True if it is true on every process."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def _abstract(entries: Mapping[str, Mapping], where: jax.sharding.Sharding) -> Any:
    """Nested dicts of ShapeDtypeStructs from recorded paths, shapes and dtypes."""
    flat = {
        name: jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"], sharding=where)
        for name, entry in entries.items()
    }
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _check_same_model(recorded: Mapping, abstract: Mapping[str, Any], where: pathlib.Path) -> None:
    """Raises InputError naming the first parameters whose shapes differ."""
    there = {f"{t}/{n}": tuple(e["shape"]) for t, tree in recorded.items() for n, e in tree.items()}
    here = array_shapes(abstract)
    if wrong := shape_differences(there, here):
        raise errors.InputError(
            f"{where} is a checkpoint of another config: {wrong}; use another --workdir, or the "
            "config that is saved in this one."
        )
