"""What all experiments share: the help of every option, and Ctrl-C."""

import argparse
import functools
import importlib
import re
import sys

import jax
import pytest

from experiments import char_lm, data, runs

SCRIPTS = (
    "agreement", "char_lm", "communication", "cross_check", "derivation.__main__",
    "gradient_flow.__main__", "hopper", "memory_tasks", "polyphonic_music", "recurrent_ppo",
    "regression", "sequential_digits", "benchmarks.compiled", "benchmarks.fused",
    "benchmarks.peers", "benchmarks.scaling", "benchmarks.torch_char_lm",
)  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_a_text_for_every_option_and_every_default(name, monkeypatch, capsys):
    if name == "benchmarks.torch_char_lm":
        pytest.importorskip("torch")
    parsers = []

    def print_help(parser, file=None):
        parsers.append(parser)
        print(parser.format_help())

    monkeypatch.setattr(argparse.ArgumentParser, "print_help", print_help)
    monkeypatch.setenv("COLUMNS", "200")
    script = importlib.import_module(f"experiments.{name}")
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m experiments.{name.removesuffix('.__main__')} [-h]")
    entries = re.split(r"^  (?=-)", shown, flags=re.M)[1:]
    for entry in entries:
        option = re.findall(r"--([a-z-]+)", entry)[0]
        text = " ".join(re.split(r" {2,}|\n", entry)[1:]).strip()
        assert re.match(r"[a-zA-Z0-9.]", text), f"--{option} has no text"
        default = parsers[0].get_default(option.replace("-", "_"))
        if default is None or default is False or default == [] or option == "help":
            continue
        words = default if isinstance(default, list | tuple) else [default]
        found = re.search(r"\(default: (.*?)\)$", text)
        assert found and found[1] == " ".join(map(str, words)), f"--{option}: {text}"


def test_help_shows_the_defaults_of_a_preset(capsys):
    with pytest.raises(SystemExit):
        char_lm.main(["--preset", "classic", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "units of the GRU (default: 64)" in shown and "(default: 5000)" in shown


@pytest.mark.parametrize("stage", ["data", "check"])
def test_ctrl_c_before_training_is_one_line_and_code_130(stage, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    if stage == "data":
        monkeypatch.setattr(data, "load_corpus", interrupt)
    monkeypatch.setattr(char_lm.report, "cross_check", interrupt)
    run = tmp_path / "run"
    assert char_lm.main(["--smoke", "--out", str(run)]) == 130
    made = "" if stage == "data" else f"; the run folder is {run}"
    assert run.exists() == (stage == "check")
    assert capsys.readouterr().err == f"char_lm: stopped by Ctrl-C{made}\n"


EXTRAS = (  # every module of an extra that a script imports
    "tqdm", "matplotlib", "matplotlib.figure", "matplotlib.ticker", "torch", "sklearn.datasets",
    "scipy.io", "statsmodels.datasets", "safetensors", "orbax", "jax_cuda13_plugin",
)  # fmt: skip
CURE = r"; install the extra: pip install -e '\.\[(experiments|peers)\]'$"


@pytest.fixture
def reimported():
    """A test imports the experiments anew; after it their modules are those of before."""

    def forget():
        names = [name for name in sys.modules if name.partition(".")[0] == "experiments"]
        return {name: sys.modules.pop(name) for name in names}

    before = forget()
    yield
    forget()
    sys.modules.update(before)


@pytest.mark.usefixtures("reimported")
@pytest.mark.parametrize("name", SCRIPTS)
def test_missing_extra_is_one_line_with_the_cure_and_code_2(name, tmp_path, monkeypatch, capsys):
    """--help needs no extra, but in the script that trains torch's layer."""
    for module in EXTRAS:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            code = importlib.import_module(f"experiments.{name}").main(list(arguments))
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    needs_torch = name == "benchmarks.torch_char_lm"
    code, shown, errors = run("--help")
    assert needs_torch or (code == 0 and shown.startswith("usage: ") and not errors)
    if name != "communication":  # it needs nothing
        if not needs_torch:
            code, _, errors = run(*["--smoke"] * (name == "benchmarks.fused"))  # else a GPU
        assert code == 2 and errors.count("\n") == 1
        assert re.search(CURE, errors.strip()), errors
        assert errors.startswith(f"{name.partition('.__')[0].removeprefix('benchmarks.')}: ")
    assert not list(tmp_path.iterdir())


def test_option_of_a_file_is_stored_as_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, option in (
        ("char_lm", "text"), ("regression", "csv"), ("polyphonic_music", "data"),
        ("gradient_flow.__main__", "text"), ("gradient_flow.__main__", "run"),
    ):  # fmt: skip
        script = importlib.import_module(f"experiments.{name}")
        args = script.parse_args([f"--{option}", "some/file"])
        assert getattr(args, option) == str(tmp_path / "some" / "file"), name


def read(seen, name):
    seen.append(jax.config.read(name))
    return 0


def test_smoke_run_compiles_fast_and_leaves_the_option_as_it_was():
    name, seen = "jax_disable_most_optimizations", []
    before = jax.config.read(name)
    for smoke in (False, True):
        assert runs.run_script("script", functools.partial(read, seen, name), smoke=smoke) == 0
    assert seen == [before, True]
    assert jax.config.read(name) is before


def test_no_program_is_used_that_was_compiled_with_the_other_option(optimized):
    double, seen = jax.jit(lambda x: 2 * x), []

    def run():
        seen.append(double._cache_size())
        double(1.0)
        seen.append(double._cache_size())
        return 0

    double(1.0)
    assert runs.run_script("script", run, smoke=True) == 0
    assert [*seen, double._cache_size()] == [0, 1, 0]
