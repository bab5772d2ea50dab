"""The package as its users meet it: names, docstrings, imports, and the README's own words."""

import ast
import importlib.metadata
import inspect
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
import pytest

import jaxgru

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxgru"
ROOMS = (jaxgru.models, jaxgru.losses, jaxgru.training, jaxgru.diagnostics, jaxgru.checks,
         jaxgru.interop)  # fmt: skip
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (jaxgru, *ROOMS)
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
}

# What each room may import of the package beside itself; nothing else, and never a peer.
IMPORTS = {
    "core": set(),
    "stacks": {"core", "initializers"},
    "losses": {"core"},
    "masks": {"core"},
    "initializers": {"core"},
    "models": {"core", "stacks", "losses", "initializers"},
    "diagnostics": {"core", "stacks"},
    "interop": {"core", "stacks", "models", "masks", "atomic_files", "extras"},
    "checks": {"core"},
    "training": {"core", "atomic_files", "extras"},
    "atomic_files": set(),
    "extras": set(),
    "experimental": {"core"},
    "__init__": {"core", "stacks", "masks", "initializers"},
}
DEPENDENCIES = {"jax", "jaxlib", "optax", "chex", "numpy"}
OPTIONAL = {("jaxgru/training/loop.py", "tqdm")}  # the progress bar, imported where asked for


def imported(path):
    """Every module named by an import statement, wherever it stands, but for type checkers."""
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if "if TYPE_CHECKING:" not in ast.unparse(n)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def test_imports_go_one_way_and_reach_only_dependencies():
    for path in PACKAGE.rglob("*.py"):
        room, place = path.relative_to(PACKAGE).with_suffix("").parts[0], path.relative_to(ROOT)
        for name in imported(path):
            top, *rest = name.split(".")
            if top == "jaxgru":
                assert rest[0] in IMPORTS[room] | {room}, f"{place} imports {name}"
            elif (place.as_posix(), top) not in OPTIONAL:
                assert top in DEPENDENCIES | sys.stdlib_module_names, f"{place} imports {name}"


def test_experiments_use_public_names_alone():
    rooms = {room.__name__: {*room.__all__} for room in (jaxgru, *ROOMS)}
    rooms["jaxgru"].add("__version__")
    rooms["jaxgru.experimental.fused"] = {"HopperKernel"}
    for path in (ROOT / "experiments").rglob("*.py"):
        nodes, names = [*ast.walk(ast.parse(path.read_text()))], {name: name for name in rooms}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxgru"):
                assert {alias.name for alias in node.names} <= rooms[node.module], path
                names |= {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.Attribute):
                owner = names.get(ast.unparse(node.value))
                assert node.attr in rooms.get(owner, {node.attr}), (path, node.attr)


def test_dir_shows_public_names_alone():
    assert sorted(dir(jaxgru)) == sorted([*jaxgru.__all__, "__version__"])
    assert jaxgru.__version__ == importlib.metadata.version("jaxgru")
    with pytest.raises(AttributeError, match="module 'jaxgru' has no attribute 'gur'"):
        _ = jaxgru.gur


def test_version_of_a_package_that_is_not_installed_is_an_attribute_error(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert not hasattr(jaxgru, "__version__")


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.__name__)
def test_all_of_a_room_lists_what_it_exports(room):
    tree = ast.parse(pathlib.Path(room.__file__).read_text())
    if room.__file__.endswith("__init__.py"):
        names = [a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names]
        assert sorted(names) == sorted(room.__all__)
    assert len(set(room.__all__)) == len(room.__all__)


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isfunction(PUBLIC[name])])
def test_public_function_documents_every_argument(name):
    doc = inspect.getdoc(PUBLIC[name]) or ""
    for parameter in inspect.signature(PUBLIC[name]).parameters.values():
        star = "*" * (parameter.kind in (2, 4)) + "*" * (parameter.kind == 4)
        listed = rf"^ +(\w+,\s+)*{re.escape(star)}{parameter.name}(,\s+\w+)*: "
        assert re.search(listed, doc, re.M), parameter.name
    name = name.rpartition(".")[2]
    if name not in ("save_weights", "write_atomically"):
        assert "Returns:" in doc
    assert "Raises:" in doc or name in ("init_train_state", "make_train_step")


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring_or_is_a_constant(name):
    assert isinstance(PUBLIC[name], jaxgru.GRUSpec) or inspect.getdoc(PUBLIC[name])


# The kernel of jaxgru/experimental/README.md needs a GPU: tests/experimental runs it elsewhere.
READMES = [ROOT / "README.md", *sorted((ROOT / "jaxgru").rglob("README.md"))]
READMES.remove(ROOT / "jaxgru" / "experimental" / "README.md")


def readme_blocks(language, path=ROOT / "README.md"):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.S)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{path.parent.relative_to(ROOT)}-{number}")
        for path in READMES
        for number, block in enumerate(readme_blocks("python", path))
    ],
)
def test_python_example_of_a_readme_runs_by_itself(block, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.slow
def test_readme_python_examples_run_as_a_script(tmp_path):
    """On one device and compiled as for users."""
    for_tests = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {name: value for name, value in os.environ.items() if name not in for_tests}
    environment["TMPDIR"] = str(tmp_path)
    command = [sys.executable, "-c", "\n".join(readme_blocks("python"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr


def test_ci_runs_the_test_command_of_the_readme():
    commands = [line for block in readme_blocks("bash") for line in block.splitlines()]
    tests = [line for line in commands if "pytest" in line and not line.startswith("#")]
    assert len(tests) == 1
    assert tests[0] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_readme_names_only_options_that_exist():
    """`name=` outside of code blocks is an argument of something public, or of PyTorch or JAX."""
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.S)
    named = set(re.findall(r"(?<![-\w.])([a-z]\w*)=", " ".join(re.findall(r"`[^`]*`", text))))
    options = {"batch_first", "jax_numpy_dtype_promotion"}
    for value in PUBLIC.values():
        if callable(value) and not (inspect.isclass(value) and issubclass(value, Exception)):
            options.update(inspect.signature(value).parameters)
    assert named
    assert named <= options, named - options


def test_top_level_holds_what_was_agreed():
    entries = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    allowed = {"pyproject.toml", "README.md", "jaxgru", "experiments", "tests"}
    generated = {"runs", "build", "jaxgru.egg-info", "__pycache__"}
    assert entries - generated == allowed


def test_import_loads_no_optional_dependency_and_leaves_the_settings_alone():
    code = (
        "import sys, jax; before = jax.config.values.copy(); import jaxgru;"
        "assert jax.config.values == before;"
        "bad = {'tqdm', 'matplotlib', 'torch', 'flax', 'haiku', 'equinox', 'keras', 'onnx',"
        "'safetensors', 'orbax', 'tensorboardX'};"
        "assert not bad & set(sys.modules), bad & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_constants_name_the_equations_of_their_papers():
    def choices(spec):
        return spec.reset, spec.update, spec.activation

    assert choices(jaxgru.CHO_2014) == ("before", "keep", "tanh")
    assert choices(jaxgru.CHUNG_2014) == ("before", "write", "tanh")
    assert choices(jaxgru.PYTORCH) == ("after", "keep", "tanh")
    assert jaxgru.GRUSpec() == jaxgru.CHO_2014
