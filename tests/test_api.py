"""The package as its users meet it: names, docstrings, imports, and the README's own words."""

import ast
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
MODULES = sorted(path.stem for path in (ROOT / "jaxgru").glob("[!_]*.py"))

# What each module may import of the package; nothing else, and never a peer.
IMPORTS = {
    "arguments": set(),
    "products": set(),
    "masks": {"arguments"},
    "parameters": {"arguments", "products"},
    "cell": {"arguments", "parameters", "products"},
    "sweeps": {"products"},
    "tiles": set(),
    "chip": {"products", "tiles"},
    "boards": {"chip", "tiles"},
    "kernels": {"boards", "cell", "chip", "parameters", "products", "tiles"},
    "recurrence": {
        *("arguments", "cell", "kernels", "masks", "parameters", "products", "sweeps"),
        "tiles",
    },
    "layers": {"arguments", "masks", "parameters", "recurrence"},
    "losses": {"arguments", "masks", "products"},
    "models": {"arguments", "cell", "layers", "losses", "masks", "parameters", "products"},
    "traces": {
        "arguments",
        "cell",
        "comparison",
        "layers",
        "masks",
        "parameters",
        "products",
        "recurrence",
    },
    "jacobians": {"arguments", "cell", "layers", "masks", "parameters", "products", "traces"},
    "diagnostics": {
        *("arguments", "cell", "layers", "masks", "parameters", "products", "recurrence"),
        "traces",
    },
    "influence": {"arguments", "cell", "jacobians", "layers", "parameters", "products", "traces"},
    "comparison": set(),
    "check": {"comparison", "parameters", "recurrence"},
    "layout": {"arguments"},
    "training": {"arguments", "layout", "products"},
    "whole_files": set(),
    "array_files": {"whole_files"},
    "processes": set(),
    "sharded_files": {"arguments", "array_files", "processes", "whole_files"},
    "checkpoints": {"arguments", "array_files", "processes", "sharded_files", "whole_files"},
    "logs": {"arguments", "whole_files"},
    "loop_state": {"processes"},
    "stop_signals": set(),
    "fitting": {
        *("arguments", "checkpoints", "logs", "loop_state", "processes", "stop_signals"),
        "training",
    },
    "conversion": {"layers", "parameters"},
    "interop": {"conversion", "layers", "parameters"},
    "interop_jax": {"conversion", "parameters"},
    "onnx_weights": {"conversion", "layers", "parameters"},
    "onnx_files": {
        *("arguments", "layers", "masks", "onnx_weights", "parameters", "recurrence"),
    },
    "onnx_models": {
        *("arguments", "conversion", "layers", "models", "onnx_weights", "parameters"),
        "whole_files",
    },
    "weight_files": {"arguments", "conversion", "layers", "models", "parameters", "whole_files"},
}
CORE = {"jax", "jaxlib", "optax", "chex", "numpy"}
OPTIONAL = {("fitting", "tqdm")}  # the progress bar, imported where it is asked for


def imported(path):
    """Every module named by an import statement, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def test_every_module_has_its_place_in_the_import_graph():
    assert set(MODULES) == set(IMPORTS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way_and_reach_only_core_dependencies(module):
    for name in imported(ROOT / "jaxgru" / f"{module}.py"):
        top, _, rest = name.partition(".")
        if top == "jaxgru":
            assert rest in IMPORTS[module], f"{module} imports {name}"
        elif (module, top) not in OPTIONAL:
            assert top in CORE | sys.stdlib_module_names, f"{module} imports {name}"


def test_experiments_use_public_names_alone():
    for path in (ROOT / "experiments").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxgru"):
                assert node.module == "jaxgru", path
                assert {alias.name for alias in node.names} <= set(jaxgru.__all__), path
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "jaxgru"
            ):
                assert node.attr in {*jaxgru.__all__, "__version__"}, (path, node.attr)


def test_all_lists_what_the_package_exports():
    tree = ast.parse((ROOT / "jaxgru" / "__init__.py").read_text())
    names = [a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names]
    assert sorted(names) == sorted(jaxgru.__all__)


@pytest.mark.parametrize("name", [n for n in jaxgru.__all__ if inspect.isfunction(vars(jaxgru)[n])])
def test_public_function_documents_every_argument(name):
    function = getattr(jaxgru, name)
    doc = inspect.getdoc(function) or ""
    for parameter in inspect.signature(function).parameters.values():
        star = "*" * (parameter.kind in (2, 4)) + "*" * (parameter.kind == 4)
        assert re.search(rf"^ +{re.escape(star)}{parameter.name}: ", doc, re.M), parameter.name
    if name not in ("save_arrays", "save_weights"):
        assert "Returns:" in doc
    assert "Raises:" in doc or name in ("init_train_state", "make_train_step")


@pytest.mark.parametrize("name", jaxgru.__all__)
def test_public_name_has_a_docstring_or_is_a_constant(name):
    value = getattr(jaxgru, name)
    assert isinstance(value, jaxgru.GRUSpec) or inspect.getdoc(value)


def test_no_module_shares_its_name_with_a_public_function():
    assert not set(MODULES) & set(jaxgru.__all__)


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_readme_python_examples_run(tmp_path, monkeypatch):
    """One after the other, as in one script; in their order they build on each other."""
    blocks = readme_blocks("python")
    assert len(blocks) >= 3
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = {"__name__": "readme"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)


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
    tests = [line for line in commands if "pytest" in line]
    assert len(tests) == 1
    assert tests[0] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_readme_names_only_options_that_exist():
    readme = (ROOT / "README.md").read_text()
    options = set(inspect.signature(jaxgru.gru).parameters)
    table = readme.split("| option |")[1].split("\n\n")[0]
    named = set(re.findall(r"^\| `(\w+)`", table, re.M))
    assert named == options - {"params", "xs"}


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
