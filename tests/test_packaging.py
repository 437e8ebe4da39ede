"""The wheel: what it ships, and that it works where a user has folders of the same names."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARIES = {"nvs_common", "quark_jax", "lvsm_jax", "vqnerf_jax", "depth_decoder_jax"}
SYSTEMS = sorted(name for name in LIBRARIES if (ROOT / name / "__init__.py").exists())
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def run(command, **kwargs):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves its own folders beside setup.py."""
    copy = tmp_path_factory.mktemp("a checkout")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("common", "configs", "launch", "tests", *SYSTEMS):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    built = tmp_path_factory.mktemp("wheel")
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(built)]
    run([*PIP, "wheel", *flags, str(copy)])
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    run([*PIP, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)])
    return target


@pytest.fixture
def foreign(tmp_path):
    """A user's project with packages that are called as folders of this repository."""
    for name in ("common", "configs", "launch", "tests", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"OWNER = {name!r} + ' of the user'\n")
    return tmp_path


def python(code, *, path, cwd):
    environment = os.environ | {"PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"}
    return run([sys.executable, "-c", code], cwd=cwd, env=environment)


def test_the_wheel_ships_the_libraries_and_nothing_else(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nvs_common", *SYSTEMS}
    for library, folder in [("nvs_common", ROOT / "common"), *((s, ROOT) for s in SYSTEMS)]:
        sources = {str(path.relative_to(folder)) for path in (folder / library).rglob("*.py")}
        assert sources == {name for name in files if name.startswith(f"{library}/")}
    assert any(name.endswith("licenses/LICENSE") for name in files)


def test_every_module_imports_beside_folders_of_the_same_names(installed, foreign):
    modules = sorted(
        ".".join(path.relative_to(installed).with_suffix("").parts).removesuffix(".__init__")
        for library in ("nvs_common", *SYSTEMS)
        for path in (installed / library).rglob("*.py")
    )
    assert len(modules) > 20
    code = f"""
import importlib, pathlib, sys
for name in {modules!r}:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to({str(installed)!r}), module.__file__
import jax
from jax._src import xla_bridge
assert not xla_bridge._backends, "importing a library started a JAX backend"
import common, configs, launch
for module in (common, configs, launch):
    assert module.OWNER.endswith("of the user"), module
"""
    python(code, path=installed, cwd=foreign)


@pytest.mark.parametrize("system", [name for name in SYSTEMS if name != "nvs_common"])
def test_importing_a_system_loads_no_training_library(system, installed, foreign):
    code = f"""
import sys, {system}
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""
    loaded = set(python(code, path=installed, cwd=foreign).split())
    assert {system, "jax", "flax"} <= loaded
    unwanted = {"grain", "orbax", "tensorflow", "clu", "optax", "tensorflow_datasets", "PIL"}
    unwanted |= {"torch", "ml_collections", "tensorboardX", "imageio", "matplotlib"}
    assert not loaded & unwanted


def test_the_checkout_itself_never_provides_a_package_called_common(foreign):
    code = "import common; print(common.OWNER)"
    assert python(code, path=ROOT / "common", cwd=foreign).strip() == "common of the user"
