"""What a run writes about itself: `config.json` (resolved) and `run.json` (software, machine).

A workdir belongs to one config. Fields that only say how long, how often or on which machine
(OPERATIONAL) may change between sessions of a run.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from nvs_common import errors, outputs

# An ml_collections.ConfigDict; its fields have no static types.
Config: TypeAlias = Any

_log = logging.getLogger(__name__)

OPERATIONAL = (
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_skipped",
    "stop_after_minutes",
    "profile",
    "mesh.",
    "eval.",
    "data.workers",
)
_MAX_CONFIG_BYTES = 2**16
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "viewsynth-jax",
)


def to_json(config: Config) -> dict[str, Any]:
    """The resolved config as JSON values (tuples become lists).

    Raises:
      InputError: a field holds something that JSON cannot hold.
    """
    plain = config.copy_and_resolve_references().to_dict()
    try:
        return json.loads(json.dumps(plain))
    except TypeError as e:
        raise errors.InputError(f"the config holds a value that is not plain data: {e}.") from e


def from_json(value: Mapping[str, Any]) -> Config:
    """The config again; lists become tuples."""
    return ml_collections.ConfigDict(_tuples(value))


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> {"optim.b1": 0.9, ...}."""
    flat = {}
    for name, field in value.items():
        if isinstance(field, Mapping):
            flat |= flatten(field, f"{prefix}{name}.")
        else:
            flat[prefix + name] = field
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Phrases "field: old -> new" for fields that change what is trained."""
    a, b = flatten(old), flatten(new)
    return [
        f"{name}: {a.get(name, 'absent')} -> {b.get(name, 'absent')}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and not name.startswith(OPERATIONAL)
    ]


def check_workdir(workdir: str | pathlib.Path, config: Config) -> None:
    """Refuses a workdir that holds a run of another config.

    Raises:
      InputError: names the fields that differ, or a config.json that cannot be read.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        if any(p.name.isdecimal() for p in path.parent.glob("checkpoints/*")):
            raise errors.InputError(
                f"{path} is missing beside checkpoints, so that nothing says what config they are "
                "of; put it back, use another --workdir, or --accept_changes if this is theirs."
            )
        return
    try:
        old = json.loads(path.read_text())
    except ValueError as e:
        raise errors.InputError(f"{path}: not JSON ({e}); use another --workdir.") from e
    if not isinstance(old, Mapping):
        raise errors.InputError(f"{path}: not a config; put it back, or use another --workdir.")
    changed = differences(old, to_json(config))
    if changed:
        raise errors.InputError(
            f"{workdir} holds a run of another config ({'; '.join(changed)}); use another "
            "--workdir, or --accept_changes to go on from its checkpoint with the new config."
        )


def check_fields(config: Config) -> None:
    """Whether the fields that the training loop reads can be meant.

    Raises:
      InputError: names the first that cannot.
    """
    least = {"num_steps": 0, "batch_size": 1, "accumulate": 1, "log_every": 1}
    least |= {"keep_checkpoints": 1, "checkpoint_every": 0, "eval_every": 0, "max_skipped": 0}
    least |= {"stop_after_minutes": 0, "ema": 0}
    for name, low in least.items():
        # `not ... >=` also refuses NaN.
        if not config[name] >= low:
            raise errors.InputError(f"{name}={config[name]}: expected {low} or more.")
    if config.ema >= 1:
        raise errors.InputError(f"ema={config.ema}: expected a decay below 1; 0 keeps no average.")
    profile = tuple(config.profile)
    if len(profile) != 2 or not 0 <= profile[0] <= profile[1]:
        raise errors.InputError(f"profile={profile}: expected (first step, step after the last).")
    rate = config.optim.learning_rate
    if not 0 <= rate < float("inf"):
        raise errors.InputError(f"optim.learning_rate={rate}: expected a finite number, 0 or more.")


def check_sizes(config: Config) -> None:
    """Whether there are images of the config's size, and views.

    Raises:
      InputError: names the first field that is below 1.
    """
    for name in ("height", "width", "num_context", "num_target"):
        if config.data[name] < 1:
            raise errors.InputError(f"data.{name}={config.data[name]}: expected 1 or more.")


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the folder of a run and holds it against other processes on this machine.

    Two sessions would tidy away each other's unfinished checkpoints.

    Raises:
      InputError: the folder cannot be made, or another process trains in it.
    """
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                file = stack.enter_context((workdir / "lock").open("w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise errors.InputError(
                f"{workdir}: another process trains in it; wait for its end, or use another "
                "--workdir."
            ) from None
        except OSError as e:
            raise errors.InputError(f"{workdir}: cannot be written to ({e.strerror}).") from e
        yield


def check_agreement(config: Config) -> None:
    """Stops all processes of a job if one was started with another config than process 0.

    They would hang or train something wrong without a word. Only here may machines not differ
    even in OPERATIONAL fields: they decide when all processes meet.

    Raises:
      InputError: on every process; where this one differs it names the fields.
    """
    if jax.process_count() == 1:
        return
    mine = to_json(config)
    text = json.dumps(mine).encode()
    # Padded to a fixed length: a collective needs the same shape everywhere.
    padded = np.zeros(_MAX_CONFIG_BYTES, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    first = bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
    theirs = json.loads(first.rstrip(b"\0"))
    equal = multihost_utils.process_allgather(np.asarray(mine == theirs))
    if np.all(equal):
        return
    a, b = flatten(theirs), flatten(mine)
    changed = [f"{k}: {a.get(k)} there, {b.get(k)} here" for k in a | b if a.get(k) != b.get(k)]
    others = [int(i) for i in np.flatnonzero(~np.asarray(equal).reshape(-1))]
    raise errors.InputError(
        f"processes {others} were started with another config than process 0"
        f"{' (' + '; '.join(changed) + ')' if changed else ''}; start all with the same command."
    )


def write_session(
    workdir: pathlib.Path, config: Config, mesh: jax.sharding.Mesh, step: int
) -> None:
    """Writes config.json and adds this session to run.json.

    Args:
      workdir: folder of the run.
      config: the config of this session.
      mesh: the mesh it trains on.
      step: the step it starts from.
    """
    path = workdir / "run.json"
    sessions = _sessions(path)
    device = mesh.devices.flat[0]
    session = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "start_step": step,
        "seed": config.seed,
        "command": sys.argv,
        "mesh": dict(mesh.shape),
        "devices": mesh.size,
        "device_kind": device.device_kind,
        "platform": device.platform,
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "versions": versions(),
        "git": _git(),
        "environment": {
            k: v for k, v in os.environ.items() if k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
        },
    }
    # Not by write_json: an infinite field would come back as none, and as another config.
    outputs.write_text(workdir / "config.json", json.dumps(to_json(config), indent=2) + "\n")
    outputs.write_json(path, {"sessions": [*sessions, session]})


def _sessions(path: pathlib.Path) -> list[Any]:
    """Sessions so far; what cannot be read is set aside as run.json.bad."""
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text())["sessions"])
    except (ValueError, LookupError, TypeError) as e:
        aside = path.with_name(path.name + ".bad")
        _log.warning("%s is damaged (%s): renamed to %s", path, e, aside.name)
        path.replace(aside)
        return []


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _tuples(field) for name, field in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(field) for field in value)
    return value


def versions() -> dict[str, str]:
    """Installed versions of the libraries that a result depends on."""
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in _PACKAGES if name in installed}


def _git() -> dict[str, Any] | None:
    """Commit of the checkout this file lies in, and whether it was changed; None elsewhere."""
    here = pathlib.Path(__file__).resolve().parent

    def ask(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)

    try:
        commit = ask("rev-parse", "HEAD")
    except FileNotFoundError:  # no git on this machine
        return None
    if commit.returncode:
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(ask("status", "--porcelain").stdout)}
