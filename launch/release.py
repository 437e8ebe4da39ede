"""Writes the weights of a run to one file: python launch/release.py --workdir=runs/a --out=a.npz

The file holds the parameters that evaluation uses, the config, versions and digests; NumPy alone
reads it, and launch/render.py, evaluate.py and viewer.py take it as --weights=a.npz. A card,
a.md, lies beside it: what the weights are and what the run's evaluation reports have measured.
Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import pathlib
import re
import shlex
import sys
import time
from typing import Any

# launch/ and configs/ belong to the checkout and are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from absl import flags

from launch import cli, trained
from nvs_common import model_card, outputs, runs, weights
from nvs_common.errors import InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to release; the newest by default.")
_OUT = flags.DEFINE_string("out", None, "File of weights to write, .npz.", required=True)
_CARD = flags.DEFINE_string("card", "", "File of the card; beside the weights, .md, by default.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    list(weights.DTYPES),
    "Of the stored numbers: float16 halves the file and rounds; loading gives float32 in any case.",
)

# Of the record of a training session, what says how to repeat it.
RECORDED = ("started", "command", "devices", "device_kind", "processes", "versions", "git")


def main(_) -> int:
    """Writes weights and card; returns the exit code."""
    out = weights.check_path(_OUT.value)
    card = pathlib.Path(_CARD.value) if _CARD.value else out.with_suffix(".md")
    if card.is_dir() or not card.suffix or card == out:
        raise InputError(f"--card={card}: name a file such as {out.with_suffix('.md').name}.")
    outputs.check_file(card)
    found = trained.load_run(_WORKDIR.value, _STEP.value)
    measured = model_card.figures(
        pathlib.Path(_WORKDIR.value), found.step, runs.to_json(found.config)
    )
    measured = [row._replace(command=without_folders(row.command)) for row in measured]
    released = found._replace(
        config=_portable(found.config), training=_training(found.training), dtype=_DTYPE.value
    )
    weights.write(out, released)
    words = [f"launch/{pathlib.Path(__file__).name}", *sys.argv[1:]]
    command = shlex.join(["python", *(without_folders(word) for word in words)])
    date = time.strftime("%Y-%m-%d", time.gmtime())
    text = model_card.text(out, released, measured, date=date, command=command)
    outputs.write_text(card, text)
    print(f"{out}: step {found.step}, {out.stat().st_size:,} bytes, {_DTYPE.value}")
    print(f"{card}: figures of {len(measured)} evaluation report{'s'[: len(measured) != 1]}")
    return 0


def without_folders(text: str) -> str:
    """The text with absolute paths cut to their last name: "--data=/home/a/b" is "--data=b".

    Programs of the checkout keep their folder, launch/.
    """
    text = re.sub(r"(^|\s)/\S*/(?=launch/\w+\.py)", r"\1", text)
    return re.sub(r"(^|[\s=,:'\"])/(?:[^\s,:=/]+/+)*(?=[^\s,:=/])", r"\1", text)


def _portable(config: Any) -> Any:
    """The config without what only the training machine has: folders, and files of the loss."""
    plain = runs.to_json(config)
    if "lpips_weights" in plain.get("loss", {}):
        # Only training uses it, but making the task would look for the file.
        plain["loss"]["lpips_weights"] = ""
    return runs.from_json(_map_text(plain))


def _map_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _map_text(field) for name, field in value.items()}
    if isinstance(value, list):
        return [_map_text(field) for field in value]
    return without_folders(value) if isinstance(value, str) else value


def _training(session: Any) -> dict[str, Any]:
    return {name: _map_text(session[name]) for name in RECORDED if name in session}


if __name__ == "__main__":
    cli.run(main)
