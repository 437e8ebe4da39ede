"""Eight virtual CPU devices, strict ranks and a persistent compilation cache for every test."""

import importlib.util
import os
import pathlib
import sys

# Before the first import of JAX anywhere: worker processes inherit these.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Shapes are tiny, so LLVM's costly passes take longer than what they save: a third of a first run.
# The slow tests train for minutes, which takes several times as long without these passes.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "0" if "slow" in sys.argv else "1")

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

# Recorded numbers of the published code, where they lie beside the checkout.
GOLDENS = ROOT.parent / "shared" / "goldens"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Real posed photographs beside the checkout; the test is skipped where they are absent."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no real photographs beside this checkout (../shared/data)")
    return path


@pytest.fixture
def x64():
    """Float64 inside one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def program():
    """Loads a program of launch/; its flags are gone with the next one, for they share names."""
    before = set(flags.FLAGS)

    def forget():
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)

    def load(name):
        forget()
        spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        return module

    yield load
    forget()
