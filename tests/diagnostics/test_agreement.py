"""Every diagnostic against autodiff of a loop, and the command that prints this."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgru
from experiments import agreement

# The command runs all of them; these and those of the first test have every choice of reset,
# update and gains.
EQUATIONS = [
    ("before", "keep", "sigmoid", False),
    ("after", "write", "softplus", False),
    ("before", "keep", "tanh", True),
    ("after", "write", "relu", True),
]


# What layer normalization changes the equation of; test_diagnostics.py sees sums of these.
WITH_GAINS = ("four paths of a step", "step Jacobian", "its diagonal", "stack of two: Jacobian")

# Each reads the equation by itself; test_diagnostics.py and test_gradients.py compare
# the others with autodiff, too.
JACOBIANS = ("step Jacobian", "its diagonal")
SELECTED = (
    "gradient flow", "RTRL gradient", "SnAp-1", "dL/dh_t, dL/dx_t (tap)", "four paths of a step",
    "dh_T/dh_t, all t", "stack of two: Jacobian", *JACOBIANS,
)  # fmt: skip


def draw_case(spec, gains):
    """Two steps of five sequences, drawn by NumPy.

    The first is masked throughout, two have one masked step, and resets fall on valid and on
    masked steps.
    """
    draw = np.random.default_rng(1)

    def draw_params(inputs):
        shapes = ((inputs, 9), (3, 9), (9,), (9,))
        params = jaxgru.GRUParams(*(draw.uniform(-0.6, 0.6, shape) for shape in shapes), spec=spec)
        if not gains:
            return params
        return dataclasses.replace(
            params, g_x=draw.uniform(0.7, 1.3, 9), g_h=draw.uniform(0.7, 1.3, 9)
        )

    params, layers = draw_params(2), (draw_params(2), draw_params(3))
    xs, h0, targets = (draw.normal(size=shape) for shape in ((2, 5, 2), (5, 3), (2, 5, 3)))
    mask = np.array([[0, 1, 0, 1, 1], [0, 1, 1, 0, 1]], bool)
    resets = np.array([[0, 0, 1, 0, 0], [1, 1, 0, 1, 0]], bool)
    return agreement.Case(params, layers, xs, h0, mask, resets, targets)


@pytest.mark.parametrize(
    ("spec", "gains", "names"),
    [
        (jaxgru.GRUSpec("before", "write", "softplus"), False, SELECTED),
        (jaxgru.GRUSpec("after", "keep", "tanh"), False, SELECTED[1:]),
        (jaxgru.GRUSpec("before", "keep", "tanh"), True, JACOBIANS),
        (jaxgru.GRUSpec("after", "write", "relu"), True, JACOBIANS),
    ],
    ids=["before", "after", "before-gains", "after-gains"],
)
def test_diagnostics_agree_with_autodiff(spec, gains, names, x64):
    """One compilation for all objects of an equation."""

    @jax.jit
    def compare_all(case):
        return {name: agreement.OBJECTS[name](case) for name in names}

    for name, (got, wanted) in compare_all(draw_case(spec, gains)).items():
        assert agreement.relative_error(got, wanted) <= agreement.LIMIT, name
        assert any(v.any() for v in jax.tree.leaves(wanted)), name


@pytest.mark.slow
@pytest.mark.parametrize(("reset", "update", "activation", "gains"), EQUATIONS)
def test_every_object_is_autodiffs(reset, update, activation, gains):
    """Masks, resets, a row without a valid step; eager, as compilation is most of the cost."""
    with jax.enable_x64(True), jax.disable_jit():
        spec = jaxgru.GRUSpec(reset, update, activation)
        case = agreement.make_case(1, spec, gains, steps=4)
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


@pytest.mark.slow
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


def test_command_fails_where_one_entry_is_wrong(tmp_path, monkeypatch, capsys):
    right = np.ones((2, 3))
    wrong = np.array([[1, 1, 1], [1, 1 + 1e-9, 1]])
    objects = {"right": lambda case: (right, right), "wrong": lambda case: (wrong, right)}
    monkeypatch.setattr(agreement, "OBJECTS", objects)
    monkeypatch.setattr(agreement, "make_case", lambda seed, spec, gains, **sizes: None)
    monkeypatch.setattr(agreement, "measure_memory", lambda steps: {"RTRL": [1], "SnAp-1": [1]})
    monkeypatch.setattr(agreement, "format_memory", lambda memory: "")
    monkeypatch.setattr(agreement, "plot", lambda *args: None)
    assert agreement.main(["--smoke", "--out", str(tmp_path / "run")]) == 1
    shown = capsys.readouterr().err
    assert shown.count("agreement: ") == 1 and "agreement: wrong is off by 1.0e-09" in shown


def test_error_that_is_no_number_is_infinite():
    assert agreement.relative_error(jnp.array([jnp.nan]), jnp.ones(1)) == float("inf")


def test_bad_seed_is_refused(capsys):
    with pytest.raises(SystemExit):
        agreement.main(["--seed", "-1"])
    assert "--seed must be from 0" in capsys.readouterr().err
