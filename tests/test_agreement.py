"""Every observer beside autodiff of a loop written out; and the command that prints this."""

import json

import jax
import jax.numpy as jnp
import pytest

import jaxgru
from experiments import agreement

# The command runs all of them; these have every choice of reset, update and gains.
EQUATIONS = [
    ("before", "write", "softplus", False),
    ("after", "keep", "tanh", False),
    ("before", "keep", "tanh", True),
    ("after", "write", "relu", True),
]


# What gains change the equation of; sums of these are seen with gains in tests/test_diagnostics.py.
WITH_GAINS = ("four paths of a step", "step Jacobian", "its diagonal", "stack of two: Jacobian")


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("reset", "update", "activation", "gains"), EQUATIONS)
def test_every_object_is_autodiffs(reset, update, activation, gains):
    """Masks, resets, a row without a real step; eager, as compilation is most of the cost."""
    with jax.enable_x64(True), jax.disable_jit():
        case = agreement.make_case(1, jaxgru.GRUSpec(reset, update, activation), gains)
        assert not case.mask[:, 0].any() and 0 < case.mask[:, 1:].mean() < 1
        assert (case.resets & case.mask).any() and (case.resets & ~case.mask).any()
        for name, compare in agreement.OBJECTS.items():
            if gains and name not in WITH_GAINS:
                continue
            got, wanted = compare(case)
            assert agreement.relative_error(got, wanted) <= agreement.LIMIT, name
            assert any(v.any() for v in jax.tree.leaves(wanted)), name


@pytest.fixture
def few_objects(monkeypatch):
    names = ("step Jacobian", "its diagonal")
    chosen = {name: agreement.OBJECTS[name] for name in names}
    monkeypatch.setattr(agreement, "OBJECTS", chosen)


def test_command_writes_its_table_and_flat_memory(few_objects, tmp_path, capsys):
    assert agreement.main(["--smoke", "--out", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "agreement.json").read_text())
    assert [row["object"] for row in record["errors"]] == ["step Jacobian", "its diagonal"]
    assert all(0 < row["error"] < 1e-14 for row in record["errors"])
    memory = record["memory"]
    assert memory["RTRL"][0] == memory["RTRL"][1] > memory["SnAp-1"][1] == memory["SnAp-1"][0]
    assert memory['BPTT, residuals="gates"'][1] > 2 * memory['BPTT, residuals="gates"'][0]
    assert "2 comparisons" in (tmp_path / "run" / "agreement.txt").read_text()
    assert (tmp_path / "run" / "agreement.png").stat().st_size > 10_000


def test_command_fails_where_one_entry_is_wrong(few_objects, tmp_path, monkeypatch, capsys):
    right = jaxgru.step_jacobian_diagonal

    def wrong(*args, **options):
        return right(*args, **options).at[1, 1, 0].multiply(1 + 1e-9)

    monkeypatch.setattr(jaxgru, "step_jacobian_diagonal", wrong)
    monkeypatch.setattr(agreement, "measure_memory", lambda steps: {"RTRL": [1], "SnAp-1": [1]})
    monkeypatch.setattr(agreement, "format_memory", lambda memory: "")
    monkeypatch.setattr(agreement, "plot", lambda *args: None)
    assert agreement.main(["--smoke", "--out", str(tmp_path / "run")]) == 1
    assert "its diagonal is off by" in capsys.readouterr().err


def test_error_that_is_no_number_is_infinite():
    assert agreement.relative_error(jnp.array([jnp.nan]), jnp.ones(1)) == float("inf")


def test_bad_seed_is_refused(capsys):
    with pytest.raises(SystemExit):
        agreement.main(["--seed", "-1"])
    assert "--seed must be from 0" in capsys.readouterr().err
