"""What keeps the code base readable and safe, checked on its syntax trees: import directions,
sizes, banned calls, names, docstrings and options that nothing reads."""

import ast
import graphlib
import pathlib
import re
import sys

import pytest

from launch import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
SYSTEMS = ("quark_jax", "lvsm_jax", "vqnerf_jax", "depth_decoder_jax")
LIBRARIES = ("nvs_common", *SYSTEMS)

# Imports run downhill: a module of a floor imports only from lower floors. Modules that are not
# listed stand above all of these.
FLOORS = {
    "nvs_common.errors": 0,
    "nvs_common.types": 0,
    "nvs_common.cameras": 1,
    "nvs_common.sampling": 2,
    "nvs_common.compositing": 2,
    "nvs_common.sharding": 2,
    "nvs_common.normalization": 2,
    "nvs_common.attention": 3,
    "nvs_common.layers": 4,
}
NOT_FOR_SYSTEMS = (
    "nvs_common.data",
    "nvs_common.train",
    "nvs_common.checkpoint",
    "nvs_common.starting",
    "launch",
    "configs",
)
# What a worker process may load; none of these starts a JAX backend by being used.
DATA_MAY_IMPORT = {"numpy", "grain", "PIL", "absl"}
DATA_READS_WITH = ("nvs_common.torch_archive", "nvs_common.array_pickles")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LOOPS = {"nvs_common.train.fit": 150}


def python_files(*folders):
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    )


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "common" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for path in python_files("common/nvs_common", *SYSTEMS, "launch", "configs")
}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}
OUR_MODULES = set(SOURCES)


def imports(name):
    """Names of the modules that a module imports; relative imports stay relative."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in OUR_MODULES else base)
    return found


def within(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def floor(name):
    """The floor of a module or of the package it is in; None above all floors."""
    for listed, number in FLOORS.items():
        if within(name, [listed]):
            return number
    return None


@pytest.mark.parametrize("name", sorted(n for n in OUR_MODULES if within(n, LIBRARIES)))
def test_imports_run_downhill(name):
    mine = floor(name)
    own_package = [listed for listed in FLOORS if within(name, [listed])]
    for other in imports(name):
        assert not other.startswith("."), f"{name} imports {other}: write absolute imports."
        assert not within(other, ("launch", "configs", "tests", "common")), f"{name} -> {other}"
        if within(name, ["nvs_common"]):
            assert not within(other, SYSTEMS), f"nvs_common knows no system: {name} -> {other}"
        else:
            system = name.partition(".")[0]
            foreign = [s for s in SYSTEMS if s != system]
            assert not within(other, (*foreign, *NOT_FOR_SYSTEMS)), f"{name} -> {other}"
        if mine is not None and within(other, ["nvs_common"]) and not within(other, own_package):
            assert other != "nvs_common", f"{name} imports nvs_common itself"
            above = floor(other)
            assert above is not None and above < mine, f"uphill: {name} -> {other}"


def test_no_module_imports_itself_around_a_corner():
    graph = {name: imports(name) & OUR_MODULES - {name} for name in OUR_MODULES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_data_imports_nothing_that_may_start_jax():
    for name in OUR_MODULES:
        if not within(name, ["nvs_common.data"]):
            continue
        for other in imports(name):
            ours = ("nvs_common.data", "nvs_common.types", "nvs_common.errors", *DATA_READS_WITH)
            top = other.partition(".")[0]
            allowed = within(other, ours) or top in DATA_MAY_IMPORT | sys.stdlib_module_names
            assert allowed, f"{name} imports {other}; data may import {sorted(DATA_MAY_IMPORT)}"


def test_configs_import_only_ml_collections():
    for name in OUR_MODULES:
        if within(name, ["configs"]):
            allowed = {"ml_collections", "typing", "collections.abc", "__future__"}
            assert imports(name) <= allowed | {"nvs_common.errors"}, name


def test_functions_of_our_own_are_called_through_their_module():
    # `cameras.rays(...)` says where rays come from; classes and constants speak for themselves.
    allowed = {("nvs_common.attention", "attention")}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not within(node.module or "", LIBRARIES):
                continue
            if SOURCES[name].name == "__init__.py":
                continue
            for alias in node.names:
                is_function = alias.name.lower() == alias.name
                if is_function and f"{node.module}.{alias.name}" not in OUR_MODULES:
                    assert (node.module, alias.name) in allowed, (
                        f"{SOURCES[name]}:{node.lineno}: import the module of {alias.name}"
                    )


@pytest.mark.parametrize(
    "path",
    python_files("common", *SYSTEMS, "launch", "configs", "tests"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    lines = len(text.splitlines())
    assert lines <= MAX_FILE_LINES, f"{path} has {lines} lines: give a theme its own file"
    for node in ast.walk(ast.parse(text)):
        # A config is one flat function.
        flat = path.parent.name == "configs"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not flat:
            most = LOOPS.get(f"{module_name(path)}.{node.name}", MAX_FUNCTION_LINES)
            lines = node.end_lineno - node.lineno + 1
            assert lines <= most, f"{path}:{node.lineno}: {node.name} has {lines} lines"


def banned(tree):
    """Line and reason of everything that runs code from data or writes where an archive says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            for name in names:
                if name.partition(".")[0] in ("pickle", "cPickle", "dill", "shelve", "marshal"):
                    yield node.lineno, f"imports {name}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            last = called.rpartition(".")[2]
            if called in ("eval", "exec", "yaml.load", "torch.load", "os.system"):
                yield node.lineno, f"calls {called}"
            if last in ("extractall", "unsafe_load"):
                yield node.lineno, f"calls {called}"
            for keyword in node.keywords:
                literal_false = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in ("allow_pickle", "shell") and not literal_false:
                    yield node.lineno, f"passes {keyword.arg} to {called}"


@pytest.mark.parametrize("name", sorted(OUR_MODULES))
def test_no_code_is_run_from_data(name):
    assert not list(banned(TREES[name])), SOURCES[name]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "eval(x)",
        "exec(x)",
        "yaml.load(f)",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "tarfile.open(f).extractall(d)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
    ],
)
def test_the_check_for_banned_calls_finds(code):
    assert list(banned(ast.parse(code)))


def test_file_names_say_what_is_inside():
    for path in python_files("common", *SYSTEMS, "launch", "configs", "tests"):
        words = set(re.split(r"_|\W", path.stem))
        assert not words & {"util", "utils", "misc", "helper", "helpers", "stuff"}, path
    assert not (ROOT / "common" / "__init__.py").exists(), "common/ is a source root"


@pytest.mark.parametrize("name", sorted(n for n in OUR_MODULES if within(n, LIBRARIES)))
def test_public_things_have_a_docstring_that_starts_with_a_sentence(name):
    tree = TREES[name]
    documented = [tree] + [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    for node in documented:
        text = ast.get_docstring(node) or ""
        where = f"{SOURCES[name]}:{getattr(node, 'lineno', 1)}"
        assert text, f"{where} has no docstring"
        first = re.split(r"\n\s*\n", text)[0]
        assert re.search(r"[.:!?]$", first.strip()), f"{where}: {first!r} is no sentence"


def variants():
    """Every config file with its default and its tiny variant."""
    paths = [path for path in python_files("configs") if path.name != "__init__.py"]
    return [f"{path}{variant}" for path in paths for variant in ("", ":tiny")]


@pytest.mark.parametrize("value", variants(), ids=lambda v: pathlib.Path(v).name)
def test_every_option_is_read_somewhere(value):
    code = "\n".join(
        SOURCES[name].read_text() for name in OUR_MODULES if not within(name, ["configs"])
    )
    unread = []
    for name in cli.field_names(cli.load_config(value)):
        leaf = re.escape(name.rpartition(".")[2])
        if not re.search(rf"\.{leaf}\b|[\"']{leaf}[\"']", code):
            unread.append(name)
    assert not unread, f"options of {value} that nothing reads: {unread}"


def test_the_repository_speaks_of_nothing_outside_of_it():
    # The folder of real photographs is reached through one fixture.
    for path in python_files("common", *SYSTEMS, "launch", "configs", "tests"):
        text = path.read_text()
        if path.name != pathlib.Path(__file__).name:
            assert "/work/" not in text, path
        if path.name not in ("conftest.py", pathlib.Path(__file__).name):
            assert '"shared"' not in text, f"{path}: use the shared_data fixture"


def test_the_licence_is_the_one_that_is_declared():
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:400]
    assert 'license="Apache-2.0"' in (ROOT / "setup.py").read_text()
