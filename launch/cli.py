"""What every command shares: the config flag, one-line errors and exit codes.

A program ends with

    if __name__ == "__main__":
        cli.run(main)

Exit codes: 0 done, 2 bad input (one line on stderr says what, where and what to do),
75 preempted: a checkpoint was saved, run the same command again.
Anything else is a defect and shows its traceback.
"""

from __future__ import annotations

import difflib
import logging
import pathlib
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from nvs_common import errors

# Flags defined through this module belong to the program that asks for them, so that
# `--help` of that program lists them.
flags.disclaim_key_flags()

BAD_INPUT = 2
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h; launchers restart on it


def define_config(*, required: bool = True) -> flags.FlagHolder:
    """Defines `--config=FILE[:variant]` and its overrides `--config.field=value`.

    Args:
      required: whether the program refuses to start without it.

    Returns:
      The flag; its `.value` is a locked ConfigDict, or None where it was not given.
    """
    holder = config_flags.DEFINE_config_file(
        "config",
        help_string="Config file and variant, e.g. configs/quark.py:tiny; override a field "
        "with --config.FIELD=VALUE.",
        lock_config=True,
    )
    if required:
        flags.register_validator(
            "config",
            lambda value: value is not None,
            "pass --config=FILE, e.g. configs/quark.py:tiny",
        )
    return holder


def run(main: Callable[[Sequence[str]], int | None], *, arguments: int = 0) -> None:
    """Parses the flags, runs `main(argv)` and ends the process with its exit code.

    Args:
      main: the program; returns an exit code (None is 0) and may raise InputError.
      arguments: how many arguments that are not flags the program takes.
    """

    def program(argv):
        _quiet_logs()
        return main(argv)

    app.run(
        lambda argv: _one_line_errors(lambda: program(argv)),
        flags_parser=lambda argv: _one_line_errors(lambda: _parse(argv, arguments)),
    )


def _quiet_logs() -> None:
    """Shows our own messages, and of the libraries' only warnings (--verbosity=0 for all)."""
    if not flags.FLAGS["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("nvs_common").setLevel(logging.INFO)
    form = logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S")
    absl_logging.get_absl_handler().setFormatter(form)


def _one_line_errors(action: Callable[[], Any]) -> Any:
    """Runs an action; an InputError becomes one line on stderr and exit code 2."""
    try:
        return action()
    except errors.InputError as e:
        program = pathlib.Path(sys.argv[0]).name
        print(f"{program}: error: {' '.join(str(e).split())}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None


def _parse(argv: Sequence[str], arguments: int) -> list[str]:
    """Parses flags; returns the program and at most `arguments` arguments that are not flags."""
    _check_config(argv)
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:
        # absl ends with 1 after printing the help text, although nothing went wrong.
        raise SystemExit(0) from None
    except flags.Error as e:
        raise errors.InputError(f"{str(e).rstrip('.')}; see --help.") from e
    if len(rest) > 1 + arguments:
        extra = rest[1 + arguments]
        raise errors.InputError(f"unexpected argument {extra!r}: options start with --.")
    return rest


def _check_config(argv: Sequence[str]) -> None:
    """Loads the config file once before ml_collections does, for errors that help.

    Raises:
      InputError: no such file, a variant the file refuses, or an override of a field that the
        config does not have.
    """
    if "config" not in flags.FLAGS:
        return
    value = None
    for position, argument in enumerate(argv):
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument):
            value = match[1] if match[1] is not None else "".join(argv[position + 1 :][:1])
    if value is None:
        return
    config = load_config(value)
    known = field_names(config)
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if match and match[1] not in known:
            near = difflib.get_close_matches(match[1], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}."
            raise errors.InputError(f"--config.{match[1]}: {value} has no such field; {hint}")


def load_config(value: str) -> ml_collections.ConfigDict:
    """Runs `get_config` of "FILE[:variant]"; config files are trusted Python.

    Raises:
      InputError: no such file, or a variant that the file refuses.
    """
    path, _, variant = value.partition(":")
    if not pathlib.Path(path).is_file():
        raise errors.InputError(
            f"--config={value}: no file {path!r}; pass e.g. configs/quark.py:tiny."
        )
    module = runpy.run_path(path)
    if "get_config" not in module:
        raise errors.InputError(f"--config={value}: {path} defines no get_config(arg).")
    try:
        return module["get_config"](*([variant] if variant else []))
    except KeyError as e:
        # The tables of variants in a config file are dictionaries.
        if e.args and e.args[0] in variant.split(","):
            raise errors.InputError(
                f"--config={value}: {path} has no variant {e.args[0]!r}; its docstring lists them."
            ) from e
        raise
    except ValueError as e:  # variants that do not go together
        raise errors.InputError(f"--config={value}: {e}") from e


def field_names(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of every field, sections first written out: `optim.b1`."""
    names = []
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            names += field_names(value, f"{prefix}{name}.")
        else:
            names.append(f"{prefix}{name}")
    return names
