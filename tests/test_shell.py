"""The shell commands: any folder, spaces in paths, installing once, arguments passed on."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted((ROOT / "launch").rglob("*.sh")), ROOT / ".ci" / "run"]

# What the scripts read of their environment.
READ = ("BASE_PYTHON", "EXTRAS")

# Stands for .venv/bin/python: notes what it is asked for; installing and programs do nothing.
INTERPRETER = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"{log}"
case "$*" in
  *"pip install"*) exit "$(cat "{log}.status" 2>/dev/null || echo 0)" ;;
  -c* | -\\ * | "-m pip --version") exec "{python}" "$@" ;;
  launch/*)
    mkdir -p runs/quickstart/evaluation && touch runs/quickstart/evaluation/report.html
    exit "$(cat "{log}.program" 2>/dev/null || echo 0)" ;;
  *"pip show"*) exit 1 ;;
  "-m pytest"*) exit 5 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose path has spaces and whose interpreter only notes its arguments."""
    root = tmp_path / "my check out"
    (root / "launch").mkdir(parents=True)
    (root / ".venv" / "bin").mkdir(parents=True)
    for path in SCRIPTS:
        target = root / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    shutil.copy(ROOT / "setup.py", root)
    interpreter = root / ".venv" / "bin" / "python"
    interpreter.write_text(INTERPRETER.format(log=tmp_path / "log", python=sys.executable))
    interpreter.chmod(0o755)
    return root


def run(checkout, script, *arguments, **variables):
    """Runs a script from the root folder; returns its result and what the interpreter noted."""
    log = checkout.parent / "log"
    log.unlink(missing_ok=True)
    # What the scripts read of this run's own environment must not decide what they do here.
    inherited = {name: value for name, value in os.environ.items() if name not in READ}
    done = subprocess.run(
        ["bash", str(checkout / script), *arguments],
        cwd="/",
        env=inherited | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, log.read_text().splitlines() if log.exists() else []


def installs(notes):
    return [note for note in notes if "pip install" in note]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_the_first_error_and_parse(path):
    assert "\nset -euo pipefail\n" in path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)
    # A script without a first line for the kernel is for sourcing.
    assert os.access(path, os.X_OK) == path.read_text().startswith("#!")


def test_installs_once_for_each_change(checkout):
    _, notes = run(checkout, "launch/test.sh")
    (install,) = installs(notes)
    assert install.endswith(f"--editable {checkout}[test,dev]")
    _, notes = run(checkout, "launch/test.sh")
    assert not installs(notes)
    (checkout / "setup.py").write_text("# changed\n")
    _, notes = run(checkout, "launch/test.sh")
    assert len(installs(notes)) == 1
    _, notes = run(checkout, "launch/test.sh", EXTRAS="gpu")
    assert installs(notes)[0].endswith("[test,dev,gpu]")


def test_a_failed_installation_stops_and_is_done_again(checkout):
    status = checkout.parent / "log.status"
    status.write_text("1")
    done, notes = run(checkout, "launch/test.sh")
    assert done.returncode != 0 and not any("-m pytest" in note for note in notes)
    status.unlink()
    _, notes = run(checkout, "launch/test.sh")
    assert len(installs(notes)) == 1
    assert not list((checkout / ".venv").glob("installed.sha256.*"))


def test_test_passes_arguments_on_and_returns_the_exit_code(checkout):
    done, notes = run(checkout, "launch/test.sh", "-k", "a name", "tests/test_views.py")
    assert done.returncode == 5
    expected = (
        "-m pytest -q -m not thorough and not slow and not gpu and not tpu and not aot -n auto "
        "--maxprocesses=4 -k a name tests/test_views.py"
    )
    assert notes[-1] == expected
    assert "Tests took 0 min" in done.stdout


def test_quickstart_trains_evaluates_and_renders_in_one_folder(checkout):
    done, notes = run(checkout, "launch/quickstart.sh", "--config.num_steps=7")
    assert done.returncode == 0, done.stderr
    programs = [note for note in notes if note.startswith("launch/")]
    assert [program.split()[0] for program in programs] == [
        "launch/train.py",
        "launch/evaluate.py",
        "launch/render.py",
    ]
    assert all("--workdir=runs/quickstart" in program for program in programs)
    assert programs[0].endswith(" --config.num_steps=7")
    folder = checkout / "runs" / "quickstart"
    for told in (folder / "evaluation" / "report.html", folder / "video.mp4", "/path/to/photos"):
        assert str(told) in done.stdout


def test_quickstart_stops_with_the_exit_code_of_the_program_that_failed(checkout):
    (checkout.parent / "log.program").write_text("75")
    done, notes = run(checkout, "launch/quickstart.sh")
    assert done.returncode == 75
    assert len([note for note in notes if note.startswith("launch/")]) == 1


def test_no_python_is_one_clear_sentence(checkout):
    shutil.rmtree(checkout / ".venv")
    tools = checkout.parent / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "flock"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    done, _ = run(checkout, "launch/test.sh", PATH=str(tools), BASE_PYTHON="")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "No Python 3.11 or newer was found: install one, "
        "or name it with BASE_PYTHON=/path/to/python."
    )
