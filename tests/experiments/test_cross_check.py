"""The cross-check of the package's own rules: its points, and its files."""

import json

import jax
import pytest

from experiments import cross_check


def test_grid_in_short_agrees(tmp_path, capsys):
    assert cross_check.main(["--smoke", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "cross_check.json", "cross_check.txt"
    }  # fmt: skip
    found = json.loads((tmp_path / "cross_check.json").read_text())
    assert {row["case"] for row in found["rows"]} == {
        "before keep tanh forward residuals=gates mask resets",
        "after keep tanh reverse gradient=tangent mask resets",
    }
    assert found["passed"] and all(row["error"] < 1e-10 for row in found["rows"])
    printed = capsys.readouterr().out
    assert printed.startswith("check_gradients: passed") and "2 points" in printed
    assert (tmp_path / "cross_check.txt").read_text().strip() in printed


def test_grid_holds_every_choice():
    short, full = (
        [*cross_check.grid_points(cross_check.parse_args(options))] for options in ([], ["--full"])
    )
    names = {name for name, _ in full}
    assert len(names) == len(full) == 2 * 2 * 5 * 2 * 7 * 2 + 6
    assert {name for name, _ in short} < names and len(short) == 102


@pytest.mark.slow
def test_faults_in_a_rule_of_the_package_are_caught(tmp_path):
    with jax.disable_jit():
        assert cross_check.main(["--smoke", "--mutate", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "cross_check.json").read_text())
    assert {row["verdict"] for row in found["mutants"]} == {"caught"}


def test_full_is_for_the_whole_grid(capsys):
    with pytest.raises(SystemExit):
        cross_check.main(["--full", "--smoke"])
    assert "without --smoke and --mutate" in capsys.readouterr().err
