"""Bad command lines end in one line that helps and exit code 2."""

import subprocess
import sys

import pytest

from launch import cli
from nvs_common import errors
from tests import conftest

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg="small"):
    size = {"small": 1, "large": 2}[arg]
    return ConfigDict(dict(seed=0, optim=dict(learning_rate=0.1 * size, b1=0.9)))
"""

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from launch import cli
from nvs_common import errors
flag = cli.define_config()

def main(_):
    if flag.value.seed == 9:
        raise errors.InputError("seed 9 is\\nunlucky")
    print(flag.value.optim.learning_rate)
    return 75

cli.run(main)
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


def call(tmp_path, *arguments):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(conftest.ROOT)))
    command = [sys.executable, str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_overrides_reach_the_program_and_its_exit_code_is_kept(tmp_path, config_file):
    done = call(tmp_path, f"--config={config_file}:large", "--config.optim.learning_rate=0.5")
    assert (done.stdout, done.returncode) == ("0.5\n", 75)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.optim.lerning_rate=1"], "did you mean 'optim.learning_rate'?"),
        (["--config.seed=abc"], "--config.seed=abc"),
        (["--config.seed=9"], "seed 9 is unlucky"),
    ],
)
def test_a_bad_command_line_is_one_line_and_code_two(tmp_path, config_file, arguments, words):
    done = call(tmp_path, f"--config={config_file}", *arguments)
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_config_files_and_variants_that_are_not_there_are_named(config_file):
    with pytest.raises(errors.InputError, match="no file 'nowhere.py'"):
        cli.load_config("nowhere.py:tiny")
    with pytest.raises(errors.InputError, match="no variant 'huge'"):
        cli.load_config(f"{config_file}:huge")
    assert cli.load_config(f"{config_file}:large").optim.learning_rate == 0.2


def test_field_names_are_dotted(config_file):
    names = cli.field_names(cli.load_config(str(config_file)))
    assert sorted(names) == ["optim.b1", "optim.learning_rate", "seed"]
