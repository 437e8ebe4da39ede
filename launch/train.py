"""Trains a system: python launch/train.py --config=configs/quark.py:tiny --workdir=runs/a

Goes on from the checkpoint if the workdir holds one. The workdir receives config.json, run.json,
metrics.jsonl, TensorBoard events and checkpoints/. Exit codes: 0 done (or the time limit of
config.stop_after_minutes reached, with a checkpoint), 2 bad input, 75 preempted with a checkpoint.
"""

from __future__ import annotations

import pathlib
import sys

# launch/ and configs/ belong to the checkout and are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from absl import flags

from launch import cli, processes, tasks
from nvs_common import errors, evaluate, runs, train
from nvs_common.data import pipeline, sources

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_ACCEPT_CHANGES = flags.DEFINE_bool(
    "accept_changes", False, "Go on with the run in --workdir although its config differs."
)


def main(_) -> int:
    """Trains; returns the exit code."""
    config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value)
    if config.system not in tasks.TASKS:
        raise errors.InputError(
            f"config.system={config.system!r} is unknown; choose one of {sorted(tasks.TASKS)}."
        )
    if workdir.exists() and not workdir.is_dir():
        raise errors.InputError(f"--workdir={workdir} is a file; name a folder.")
    if not _ACCEPT_CHANGES.value:
        runs.check_workdir(workdir, config)
    runs.check_sizes(config)
    processes.join()
    task = tasks.TASKS[config.system](config)
    batches = pipeline.training_batches(config)
    try:
        state = train.fit(task, batches, config, workdir, evaluate=_evaluation(task, config))
    except train.Preempted as e:
        print(e, file=sys.stderr)
        return cli.TRY_AGAIN
    print(f"trained to step {int(state.step)}; the run is in {workdir}", file=sys.stderr)
    return 0


def _evaluation(task, config) -> train.Evaluate | None:
    """The periodic evaluation on held-out scenes; None where config.eval_every is 0."""
    if not config.eval_every:
        return None
    source = sources.held_out(config)
    return lambda variables, step: evaluate.quick(task, variables, source, config)


if __name__ == "__main__":
    cli.run(main)
