"""Every equation of the five documents has the errors of its verdict; a broken rule has not."""

import json
import math

import jax
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from experiments.derivation import __main__ as derivation
from experiments.derivation import figures, sixteen_steps, verdicts
from experiments.derivation.sixteen_steps import TAPE
from experiments.derivation.verdicts import Row

LABELS = ("sixteen steps", "Tian 2016", "many-to-many 9.5", "GRU networks", "NumPy article")


@pytest.fixture(scope="module")
def groups():
    """The rows of every document, computed once."""
    strict = jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")
    with jax.enable_x64(True), strict[0], strict[1]:
        return derivation.compute(0, "tanh")[0]


@pytest.mark.parametrize("label", LABELS)
def test_every_row_has_the_errors_of_its_verdict(groups, label):
    for row in groups[label]:
        assert row.holds, row
        if row.corrected is not None:
            assert row.corrected <= (1e-6 if "float32" in row.place else 1e-12), row
        if row.verdict == "OK":
            assert row.printed <= 1e-12, row
        elif row.verdict != "LIMIT" and row.printed is not None:
            assert math.isnan(row.printed) or row.printed >= 1e-3, row


def places(groups, label):
    return [row.place for row in groups[label]]


def test_no_document_loses_a_row(groups):
    assert tuple(groups) == LABELS
    assert [len(rows) for rows in groups.values()] == [60, 83, 44, 26, 22]


def test_all_sixteen_steps_are_there_forward_and_backward(groups):
    found = places(groups, "sixteen steps")
    assert found[:16] == [f"({number})" for number in range(5, 21)]
    assert {p.split(" gives ")[0] for p in found if " gives " in p} == set(found[:16])
    steps = {p.split(" gives d")[1] for p in found if " gives " in p}
    assert steps == {name for step in sixteen_steps.TAPE for name in step.inputs}


def test_numbered_equations_of_each_document_are_there(groups):
    text = " ".join(places(groups, "Tian 2016"))
    numbers = [n for n in range(1, 51) if n not in (12, 13, 24, 29, 33, 43, 44)]
    assert [n for n in numbers if f"({n})" not in text] == []
    text = " ".join(places(groups, "many-to-many 9.5"))
    wanted = ["(9.7)", "(9.8)-(9.16)", "(9.17)", "(9.18)-(9.20)", "(9.21)", "dh^(-1)"]
    wanted += [f"(9.22) term {number}" for number in (1, 2, 3, 4)]
    assert [place for place in wanted if place not in text] == []
    text = " ".join(places(groups, "GRU networks"))
    wanted = ["dE_t/dW", "dh_t/dh", "dh~/dh", "product", "case 1", "case 2A", "case 2B"]
    wanted += [f"s = {shift}" for shift in (0, 2, 4, 8, 16, 32)]
    assert [place for place in wanted if place not in text] == []
    text = " ".join(places(groups, "NumPy article"))
    wanted = [f"cell_backward d{name}" for name in ("Wu", "bu", "Wr", "br", "Wc", "bc", "Wy", "by")]
    wanted += ["dxt", "last dat_prev", "clip", "cross-entropy", "backward, start"]
    assert [place for place in wanted if place not in text] == []


def test_formula_that_cannot_be_evaluated_has_an_infinite_error():
    ones = np.ones((2, 1))
    assert verdicts.attempt("v @ C", ones, v=ones, C=np.ones((2, 2))) == math.inf
    assert verdicts.attempt("v) * 2", ones, v=ones) == math.inf
    assert verdicts.attempt("v * 2", ones, v=ones) == 1.0


@pytest.mark.parametrize("activation", sixteen_steps.ACTIVATIONS)
def test_tape_is_autodiff_for_any_activation(activation, x64):
    problem = sixteen_steps.draw_problem(np.random.default_rng(1), 6)
    got = sixteen_steps.run_tape(sixteen_steps.operations_of(activation), problem)
    want = sixteen_steps.run_autodiff(problem, activation)
    assert max(sixteen_steps.errors_of(got, want)) <= 1e-12


@pytest.mark.parametrize(
    ("verdict", "printed", "corrected", "holds"),
    [
        ("OK", 1e-13, None, True),
        ("OK", 1e-9, None, False),
        ("OK", math.nan, None, False),
        ("WRONG", 0.1, 1e-13, True),
        ("WRONG", math.nan, 1e-13, True),
        ("WRONG", 1e-9, 1e-13, False),
        ("WRONG", 0.1, 1e-9, False),
        ("WRONG", 0.1, math.nan, False),
        ("WRONG", math.inf, 0.0, False),
        ("ILL-FORMED", math.inf, 0.0, True),
        ("ILL-FORMED", 0.1, 0.0, False),
        ("MISSING", None, 0.0, True),
        ("MISSING", None, 1e-9, False),
        ("LIMIT", 1e-6, 0.0, True),
        ("LIMIT", 1e-13, 0.0, False),
    ],
)
def test_verdict_requires_its_errors(verdict, printed, corrected, holds):
    assert Row("(1)", "", verdict, printed, "", corrected).holds is holds


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, in a list; nothing is written."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    return figures


def require_inside(figure):
    """Nothing is cut off at the edges."""
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= 0 and box.x1 <= width and box.y1 <= height, box


def test_errata_fit_the_page_and_show_every_row(drawn):
    sizes = {"a": 60, "b": 83, "c": 44, "d": 26, "e": 22}
    row = Row("(9.8)-(9.16) dWz, g = identity", "", "WRONG", 0.5, "", 1e-16)
    figures.plot_errata("errata.png", {name: [row] * size for name, size in sizes.items()})
    (figure,) = drawn
    require_inside(figure)
    width, height = 100 * figure.get_size_inches()
    assert width <= 1600 and height < 1.5 * width
    axes = [part for part in figure.findobj(Axes) if part.get_title()]
    assert {part.get_title(): len(part.get_yticks()) for part in axes} == sizes


def test_no_arrow_of_the_graph_crosses_that_from_g6_to_r(drawn):
    norms = dict.fromkeys((*sixteen_steps.VALUES, *sixteen_steps.WEIGHTS), 0.00483)
    figures.plot_graph("graph.png", sixteen_steps.operations_of("tanh"), norms, norms)
    (figure,) = drawn
    require_inside(figure)
    (axes,) = figure.axes
    arrows = [(np.array(a.xyann), np.array(a.xy)) for a in axes.findobj(Annotation)]
    assert len(arrows) == sum(not name.startswith("W") for s in TAPE for name in s.inputs)
    (row,) = {figures.PLACES[name][1] for name in ("g6", "r")}
    left, right = figures.PITCH + figures.WIDTH / 2, 2 * figures.PITCH - figures.WIDTH / 2
    for start, end in arrows:
        if (start[1] - row) * (end[1] - row) < 0:
            x = start[0] + (row - start[1]) / (end[1] - start[1]) * (end[0] - start[0])
            assert not left <= x <= right


def test_broken_backward_rule_is_noticed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(derivation.figures, "plot_graph", lambda *args: None)
    monkeypatch.setattr(derivation.figures, "plot_errata", lambda *args: None)
    hadamard = sixteen_steps.OPERATIONS["hadamard"]
    broken = hadamard._replace(backward=lambda du, a, b: (du * a, du * b))
    monkeypatch.setitem(sixteen_steps.OPERATIONS, "hadamard", broken)
    monkeypatch.setattr(derivation, "DOCUMENTS", (sixteen_steps,))
    assert derivation.main(["--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("derivation: verdicts that do not hold: ") and error.count("\n") == 1
    assert "sixteen steps (18) gives dz" in error


@pytest.mark.slow
def test_run_leaves_its_files_and_the_whole_table(groups, monkeypatch, tmp_path, capsys):
    problem = sixteen_steps.draw_problem(np.random.default_rng(0), 1)
    got = sixteen_steps.run_tape(sixteen_steps.operations_of("tanh"), problem)
    sides = [(got[0][0], got[1][0])] * 2
    monkeypatch.setattr(derivation, "compute", lambda seed, activation: (groups, sides))
    run = tmp_path / "run"
    assert derivation.main(["--out", str(run)]) == 0
    names = {"config.json", "derivation.json", "derivation.txt", "errata.png", "graph.png"}
    assert {path.name for path in run.iterdir()} == names
    rows = json.loads((run / "derivation.json").read_text())
    assert len(rows) == sum(map(len, groups.values())) and all(row["holds"] for row in rows)
    assert {row["printed"] for row in rows} >= {"nan", "does not conform", None}
    text = (run / "derivation.txt").read_text()
    assert text in capsys.readouterr().out
    assert "Zhiliang Tian" in text and "DOES NOT HOLD" not in text


@pytest.mark.parametrize("options", [["--seed", "-1"], ["--activation", "cube"], ["--seed", "x"]])
def test_bad_option_is_refused(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        derivation.main(options)
    assert options[0] in capsys.readouterr().err


def test_folder_that_holds_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "kept").write_text("")
    assert derivation.main(["--out", str(tmp_path)]) == 2
    assert "nothing was overwritten" in capsys.readouterr().err
