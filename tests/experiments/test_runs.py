"""What all experiments share: the help of every option, and Ctrl-C."""

import argparse
import functools
import importlib
import re

import jax
import pytest

from experiments import char_lm, data, runs

SCRIPTS = (
    "agreement", "char_lm", "communication", "derivation.__main__", "gradient_flow.__main__",
    "memory_tasks", "polyphonic_music", "regression", "sequential_digits", "benchmarks.fused",
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
    assert char_lm.main(["--smoke", "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "char_lm: stopped by Ctrl-C\n"


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
