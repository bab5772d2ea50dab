"""The benchmark of the fused kernels: what it counts, measures first, refuses, keeps and judges.

Nothing here depends on how long anything takes.
"""

import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import fused, fused_flags, fused_points, fused_report, layers, limits
from experiments.benchmarks.fused_points import FULL, FUSED, FUSED_GATES, SCAN, Point
from experiments.benchmarks.libraries import TORCH, Library
from experiments.benchmarks.problems import Size, draw_problem

SIZE = Size(3, 2, 4, 4)
POINT = Point("training", "after", "float32", SIZE)


# What is counted.


def test_operations_and_bytes_by_hand():
    """T=2, B=3, D=5, H=7: 294 weights and biases, 30 inputs, 42 states, 21 in one state."""
    size = Size(2, 3, 5, 7)
    assert limits.count_flops(size, "forward") == 6 * 2 * 3 * 7 * (5 + 7) == 3024
    assert limits.count_flops(size, "training") == 3 * 3024
    forward = 294 + 30 + 42 + 2 * 21
    training = forward + (42 + 21) + (294 + 30 + 21)
    assert limits.count_bytes(size, "forward", "float32") == 4 * forward
    assert limits.count_bytes(size, "forward", "bfloat16") == 2 * forward
    assert limits.count_bytes(size, "training", "float32") == 4 * training


@pytest.mark.slow
def test_bytes_are_those_of_the_arrays():
    size = Size(2, 3, 5, 7)
    problem = draw_problem(size, "before", 0)
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(problem[:3]))
    hs = problem.dhs.nbytes + problem.dh_last.nbytes
    assert limits.count_bytes(size, "forward", "float32") == read + hs
    assert limits.count_bytes(size, "training", "float32") == 2 * (read + hs)


def test_shares_are_parts_of_the_time():
    found = limits.shares(
        Size(1, 1, 1, 1),
        "forward",
        "float32",
        1e-3,  # ms: a microsecond, for 12 operations and 64 bytes
        {"bytes_per_second": 1e9, "flops_per_second": {"float32": 1e8, "bfloat16": 1.0}},
    )
    assert found == {"matmul_share": pytest.approx(0.12), "memory_share": pytest.approx(0.064)}


def test_measured_limits_count_bytes_read_and_written_and_two_operations_a_product(monkeypatch):
    monkeypatch.setattr(limits, "_seconds", lambda function, arguments, sizes: 0.5)
    found = limits.measure_limits(limits.SMOKE)
    assert found["bytes_per_second"] == 2 * 4 * limits.SMOKE.copied / 0.5
    rate = 2 * limits.SMOKE.side**3 / 0.5
    assert found["flops_per_second"] == {"bfloat16": rate, "float32": rate}


# What is measured, and in which order.


def test_most_telling_points_come_first():
    points = FULL.points()
    assert len(points) == len(set(points)) == 2 * 2 * 2 * 2 * 4 * 4
    first = points[:16]
    assert {point[:3] for point in first} == {("training", "after", "bfloat16")}
    assert len({point.size for point in first}) == 16
    assert {point.size.num_steps for point in points[:128]} == {512}
    assert {point.reset for point in points[:64]} == {"after"}
    assert all(point.size.input_size == point.size.hidden_size for point in points)
    assert FULL._replace(hidden=(64, 64)).points() == FULL._replace(hidden=(64,)).points()


def about(**changes):
    return dict.fromkeys(fused.SAME) | {"smoke": False} | changes


def row_of(point, contender=SCAN, median_ms=1.0, reason=None, **fields):
    compared = {"difference": 0.0, "note": "", "compile_seconds": None, "temporaries_bytes": None}
    spread = {"min_ms": median_ms, "quartiles_ms": None, "samples": 1}
    times = {"median_ms": median_ms, **spread}
    return {
        **point.fields(),
        "contender": contender,
        **times,
        **compared,
        "reason": reason,
        **fields,
    }


class Clock:
    """Minutes that only measuring moves."""

    def __init__(self, seconds):
        self.left, self.measured = seconds, []

    def measure(self, point):
        self.measured.append(point)
        self.left -= 10
        return [row_of(point)]


def read_results(folder):
    return json.loads((folder / "fused.json").read_text())


def test_no_point_is_begun_when_the_minutes_are_over_and_the_rest_is_named(tmp_path):
    points, clock = FULL.points()[:5], Clock(25)
    record = fused.Record(tmp_path, about(), points)
    fused.measure_points(record, clock.measure, lambda: clock.left)
    assert clock.measured == points[:3]  # at 25, 15 and 5 seconds
    found = read_results(tmp_path)
    assert found["not_reached"] == [str(point) for point in points[3:]]
    assert [fused.point_of(row) for row in found["rows"]] == points[:3]


def test_file_is_whole_after_every_point_and_says_what_was_underway(tmp_path):
    points, seen = FULL.points()[:2], []
    record = fused.Record(tmp_path, about(), points)

    def measure(point):
        seen.append(read_results(tmp_path))
        if point == points[1]:
            raise RuntimeError("the GPU is gone")
        return [row_of(point)]

    with pytest.raises(RuntimeError):
        fused.measure_points(record, measure, lambda: 1.0)
    assert [len(found["rows"]) for found in seen] == [0, 1]
    assert [len(found["not_reached"]) for found in seen] == [2, 1]
    found = read_results(tmp_path)
    assert [fused.point_of(entry) for entry in found["underway"]] == points[1:]
    assert len(found["rows"]) == 1 and not list(tmp_path.glob("*.tmp"))


def test_point_that_ended_a_process_is_tried_last(tmp_path):
    points, clock = FULL.points()[:3], Clock(100)
    record = fused.Record(tmp_path, about(), points)
    record.underway = [points[0]]
    fused.measure_points(record, clock.measure, lambda: clock.left)
    assert clock.measured == [points[1], points[2], points[0]]
    assert read_results(tmp_path)["underway"] == []


@pytest.fixture
def quick_measure(monkeypatch):
    """Points are measured without anything being run; those that were."""
    measured = []

    def measure(point, chosen, unusable, args, bar):
        measured.append(point)
        return [row_of(point, name) for name in chosen]

    monkeypatch.setattr(fused, "measure", measure)
    monkeypatch.setattr(fused_report, "plot", lambda rows, title, path: None)
    at_most = {"bytes_per_second": 1e12, "flops_per_second": dict.fromkeys(limits.DTYPES, 1e14)}
    monkeypatch.setattr(limits, "measure_limits", lambda sizes, seed: at_most)
    return measured


ONE = ["--smoke", "--no-flags", "--tasks", "forward", "--dtypes", "float32", "--resets", "after"]


def test_resumed_run_keeps_what_it_has_and_measures_the_rest(quick_measure, tmp_path, capsys):
    out = tmp_path / "run"
    assert fused.main([*ONE, "--hidden", "4", "--out", str(out)]) == 0
    assert [point.size.hidden_size for point in quick_measure] == [4]
    first = read_results(out)["rows"]
    assert fused.main([*ONE, "--hidden", "8", "4", "--resume", str(out)]) == 0
    assert [point.size.hidden_size for point in quick_measure] == [4, 8]
    found = read_results(out)
    assert found["rows"][: len(first)] == first and len(found["rows"]) == 2 * len(first)
    assert len(found["commands"]) == 2 and found["not_reached"] == []
    assert fused.main(["--report", str(out)]) == 0
    assert len(quick_measure) == 2 and "Verdicts:" in capsys.readouterr().out


def test_folder_is_not_overwritten(quick_measure, tmp_path, capsys):
    out = tmp_path / "run"
    assert fused.main([*ONE, "--out", str(out)]) == 0
    assert fused.main([*ONE, "--out", str(out)]) == 2
    assert "nothing was overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("field", fused.SAME)
def test_figures_of_another_device_or_version_are_not_mixed(quick_measure, tmp_path, capsys, field):
    out = tmp_path / "run"
    assert fused.main([*ONE, "--hidden", "4", "--out", str(out)]) == 0
    path = out / "fused.json"
    path.write_text(json.dumps({**read_results(out), field: "another"}))
    assert fused.main([*ONE, "--hidden", "4", "8", "--resume", str(out)]) == 2
    message = capsys.readouterr().err
    assert f"--resume must be of the same {field}, got 'another' in " in message
    assert "begin another with --out" in message and len(quick_measure) == 1


@pytest.mark.parametrize("option", ["--resume", "--report"])
def test_folder_without_results_is_refused(quick_measure, tmp_path, capsys, option):
    (tmp_path / "fused.json").write_text('{"rows": []}')
    for folder in (tmp_path / "none", tmp_path):
        assert fused.main([*ONE, option, str(folder)]) == 2
        message = capsys.readouterr().err
        assert f"{option} must be a folder with the fused.json of this benchmark, got " in message
    assert not quick_measure


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be an integer of at least 1, got '0'"),
        (["--minutes", "-1"], "--minutes: must be above 0 and finite, got -1"),
        (["--dtypes", "float16"], "--dtypes: invalid choice: 'float16'"),
        (["--contenders", "numpy"], "--contenders: invalid choice: 'numpy'"),
        (["--out", "a", "--resume", "b"], "--resume: not allowed with argument --out"),
        (["--flags-only", "--no-flags"], "--no-flags: not allowed with argument --flags-only"),
    ],
)
def test_bad_option_is_one_clear_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        fused.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_gpu_memory_is_left_to_the_others(quick_measure, monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "before")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")  # and after the test
    assert fused.main([*ONE, "--hidden", "4", "--out", str(tmp_path / "run")]) == 0
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


@pytest.mark.slow
def test_import_looks_for_no_device():
    """It would read its settings before they are made. Unknown flags end it when it looks."""
    unknown = {**os.environ, "XLA_FLAGS": "--xla_no_such_flag=1"}
    command = [sys.executable, "-c", "import experiments.benchmarks.fused"]
    root = fused_flags.ROOT
    assert subprocess.run(command, env=unknown, cwd=root, check=False).returncode == 0


# What is refused, and what is wrong.


def measure(contenders, point=POINT, unusable=None):
    bar = types.SimpleNamespace(set_description=lambda text: None, update=lambda part=1: None)
    args = types.SimpleNamespace(seed=0, smoke=True, seconds=1e-3)
    return {r["contender"]: r for r in fused.measure(point, contenders, unusable or {}, args, bar)}


def library(make_layer):
    """A contender with a layer of its own."""

    def make(reset, size, dtype):
        return lambda task, problem, compiles: layers.build(make_layer(reset), task, problem)

    return Library(make)


def scaled(factor):
    """The scan with one of its gradients scaled."""

    def make(reset):
        layer = layers.our_layer(reset)

        def unpack(params):
            leaves = layer.unpack(params)
            return {**leaves, "w_h": leaves["w_h"] * factor}

        return layer._replace(unpack=unpack)

    return library(make)


def raising(error):
    def make(reset):
        raise error

    return library(make)


PLAIN = library(layers.our_layer)
TOO_LARGE = ValueError("gru: the hidden size must be at most 256 in float32, got 512; use ...")


@pytest.fixture
def timed_names(monkeypatch):
    """The contenders that were timed; each took a second."""
    names = []

    def interleave(calls, seconds, **options):
        assert calls
        names.extend(calls)
        return {name: [1.0] for name in calls}

    monkeypatch.setattr(fused, "interleave", interleave)
    return names


@pytest.mark.slow
def test_contender_that_refuses_a_size_is_a_row_with_its_reason(timed_names):
    found = measure({"scan": PLAIN, "fused": raising(TOO_LARGE)})
    assert timed_names == ["scan"]
    assert found["scan"]["median_ms"] == 1e3 and found["scan"]["reason"] is None
    assert found["fused"]["median_ms"] is None and found["fused"]["samples"] == 0
    assert found["fused"]["reason"] == f"refused: {TOO_LARGE}"
    assert not fused.is_fault(found["fused"])


@pytest.mark.parametrize("error", [RuntimeError("out of memory\nat ..."), ValueError("no tiles")])
@pytest.mark.slow
def test_contender_that_fails_is_a_row_and_a_fault(timed_names, error):
    found = measure({"scan": PLAIN, "fused": raising(error)})
    assert timed_names == ["scan"]
    start = str(error).partition("\n")[0]
    assert found["fused"]["reason"] == f"failed: {type(error).__name__}: {start}"
    assert fused.is_fault(found["fused"])


@pytest.mark.slow
def test_wrong_values_are_refused_before_anything_is_timed(timed_names):
    found = measure({"scan": scaled(1.0), "fused": scaled(1.01)})
    assert timed_names == ["scan"]
    reason = found["fused"]["reason"]
    assert reason.startswith("wrong: w_h differs from the scan's in float32 with full products by")
    assert "1.0e-02 of its size; at most 3e-03 is rounding" in reason
    assert found["fused"]["difference"] == pytest.approx(0.01, rel=1e-3)
    assert fused.is_fault(found["fused"]) and found["fused"]["median_ms"] is None
    assert found["scan"]["difference"] < 1e-6


@pytest.mark.slow
def test_another_library_may_round_in_more_places(timed_names):
    wrong = measure({"scan": PLAIN, TORCH: scaled(1.01)})
    assert timed_names == ["scan", TORCH] and wrong[TORCH]["reason"] is None
    measure({TORCH: scaled(1.04)})
    assert timed_names == ["scan", TORCH]


def test_nothing_is_timed_where_nothing_is_right(timed_names):
    found = measure({"fused": raising(TOO_LARGE)})
    assert timed_names == [] and len(found) == 1


def test_not_a_number_is_wrong_whatever_else_is_right():
    difference, reason = fused_points.check({"a": float("nan"), "b": 1e-9}, 1e-3, "that")
    assert difference == float("inf") and reason is not None and "wrong: a differs" in reason
    assert fused_points.check({"a": 1e-3}, 1e-3, "that") == (1e-3, None)


@pytest.mark.slow
def test_bfloat16_is_held_against_float32_on_the_same_rounded_arrays(timed_names):
    """Forward, and with a tolerance that float32 does not have."""
    point = Point("forward", "before", "bfloat16", SIZE)
    found = measure({"scan": PLAIN}, point)["scan"]
    assert found["reason"] is None and 1e-4 < found["difference"] < 1e-2
    exact = fused_points.exact_results("before", "bfloat16", SIZE, 0)
    assert exact.problem.xs.dtype == jnp.bfloat16
    assert set(exact.expected("forward")) == {"h_last", "hs"}
    assert set(exact.expected("training")) == {"value", "w_x", "w_h", "b_x", "b_hn", "xs", "h0"}


def test_contender_takes_part_where_it_has_task_and_equation():
    for reset, task, names in [
        ("after", "training", list(fused_report.COLUMNS)),
        ("before", "training", [n for n in fused_report.COLUMNS if n != TORCH]),
        ("before", "forward", ["scan", "scan unrolled", "fused"]),
    ]:
        found = fused_points.contenders("fused")
        assert [n for n in found if fused.can_run(found[n], task, reset)] == names


@pytest.mark.slow
def test_torch_that_is_not_here_is_a_row(timed_names, monkeypatch):
    monkeypatch.setattr(fused_points.importlib.util, "find_spec", lambda name: None)
    reason = fused_points.why_no_torch()
    assert reason is not None and "pip install" in reason
    found = measure({"scan": PLAIN, TORCH: PLAIN}, unusable={TORCH: reason})
    assert timed_names == ["scan"] and found[TORCH]["reason"] == reason
    assert not fused.is_fault(found[TORCH])


def test_torch_without_the_gpu_that_jax_has_does_not_take_part(monkeypatch):
    torch = types.SimpleNamespace(
        __version__="2", cuda=types.SimpleNamespace(is_available=lambda: False)
    )
    monkeypatch.setattr(fused_points.importlib.util, "find_spec", lambda name: torch)
    monkeypatch.setattr(fused_points.importlib, "import_module", lambda name: torch)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert fused_points.why_no_torch() == "not here: torch 2 sees no GPU while JAX runs on one"
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert fused_points.why_no_torch() is None


# The scan under flags.

CASES = fused_flags.cases_of([SIZE])
SETTINGS = fused_flags.Settings(0, 1e-3, fused.SMOKE)


def test_every_choice_is_a_case_and_survives_json():
    assert len(CASES) == len(set(CASES)) == 16
    fields = json.loads(json.dumps([case.fields() for case in CASES]))
    assert [fused_flags.case_of(entry) for entry in fields] == CASES


@pytest.mark.slow
def test_flag_that_xla_does_not_know_is_rows_with_the_reason(monkeypatch):
    monkeypatch.setattr(fused_flags, "FLAGS", {"unknown": "--xla_no_such_flag=1"})
    asked = []

    def ask(flags, cases, budget):
        asked.append(flags)
        return fused_flags.ask_child(flags, cases, 60.0, SETTINGS, 60.0)

    rows = fused_flags.measure_flags(CASES[:2], [], ask, lambda: 100.0)
    assert asked == ["--xla_no_such_flag=1"]  # and not again for the other case
    assert [fused_flags.case_of(row) for row in rows] == CASES[:2]
    for row in rows:
        assert row["median_ms"] is None and row["flags"] == "unknown"
        assert "Unknown flag in XLA_FLAGS: --xla_no_such_flag=1" in row["reason"]
    assert fused_flags.missing(CASES[:2], rows) == []
    assert "Unknown flag" in fused_report.flags_table(fused_flags.compare_flags(rows))


def test_death_is_told_by_the_line_that_explains_it():
    flag = "F1 parse_flags_from_env.cc:234] Unknown flag in XLA_FLAGS: --a"
    told = fused_flags._death(-6, f"warning\n{flag}\n*** Check failure stack trace: ***\n")
    assert told == f"failed: the process ended with code -6: {flag}"
    assert fused_flags._death(1, "Traceback\nlast\n\n") == (
        "failed: the process ended with code 1: last"
    )
    assert fused_flags._death(-9, "") == "failed: the process ended with code -9: nothing was said"
    assert fused_flags._death(0, "warning") is None


def answer(case, norm=1.0, median_ms=1.0):
    return {**case.fields(), "median_ms": median_ms, "norms": {"w_h": norm}, "reason": None}


def test_child_that_dies_loses_the_case_it_was_at_and_no_other():
    def ask(flags, cases, budget):
        bad = CASES[2]
        before = cases[: cases.index(bad)] if bad in cases else cases
        return fused_flags.Answer([answer(c) for c in before], "died" if bad in cases else None)

    rows = fused_flags.measure_flags(CASES[:5], [], ask, lambda: 100.0)
    assert fused_flags.missing(CASES[:5], rows) == []
    reasons = {(row["flags"], fused_flags.case_of(row)): row["reason"] for row in rows}
    assert {case for (_, case), reason in reasons.items() if reason} == {CASES[2]}
    assert len(rows) == 5 * len(fused_flags.FLAGS)


def test_flags_share_what_time_is_left_and_keep_what_they_have():
    left, budgets = [90.0], {}

    def ask(flags, cases, budget):
        budgets[flags] = budget
        left[0] -= budget
        return fused_flags.Answer([answer(case) for case in cases[:1]], None)

    rows = fused_flags.measure_flags(CASES[:2], [], ask, lambda: left[0])
    assert list(budgets.values()) == pytest.approx([30.0, 30.0, 30.0])
    assert [case for _, case in fused_flags.missing(CASES[:2], rows)] == 3 * [CASES[1]]
    left[0] = 90.0
    again = fused_flags.measure_flags(CASES[:2], rows, ask, lambda: left[0])
    assert {fused_flags.case_of(row) for row in again} == {CASES[1]}
    left[0] = 0.0
    assert fused_flags.measure_flags(CASES, rows, ask, lambda: left[0]) == []


def test_child_that_does_not_answer_is_ended(monkeypatch):
    def never(command, timeout, **options):
        line = json.dumps(answer(CASES[0])) + "\n"
        raise subprocess.TimeoutExpired(command, timeout, output=line.encode() + b'{"half')

    monkeypatch.setattr(fused_flags.subprocess, "run", never)
    found = fused_flags.ask_child("", CASES, 1.0, SETTINGS, 2.0)
    assert found == fused_flags.Answer([answer(CASES[0])], "failed: no answer for 2 seconds")


def test_flags_that_change_values_have_no_time():
    rows = [
        {"flags": fused_flags.NONE, **answer(CASES[0], 1.0, 4.0)},
        {"flags": "quick", **answer(CASES[0], 1.01, 1.0)},
        {"flags": "broken", **answer(CASES[0], 1.2, 1.0)},
    ]
    plain, quick, broken = fused_flags.compare_flags(rows)
    assert plain["speedup_over_none"] == 1.0 and quick["speedup_over_none"] == 4.0
    assert quick["us_per_step"] == pytest.approx(1e3 / SIZE.num_steps)
    assert broken["median_ms"] is None and broken["us_per_step"] is None
    assert "w_h differs from its norm without flags by 2.0e-01" in broken["reason"]
    assert fused_flags.compare_flags([plain, quick, broken])[2]["reason"] == broken["reason"]


@pytest.mark.slow
def test_case_that_fails_in_a_child_is_a_row():
    case = CASES[0]._replace(residuals="nothing")
    row = fused_flags.measure_case(case, SETTINGS)
    assert row["median_ms"] is None and row["reason"].startswith("refused: gru: residuals must")


# The verdicts.

GRID = fused_points.Grid(
    (512,), ("after", "before"), ("training",), ("bfloat16",), (1,), (256, 512)
)


def made_rows(**milliseconds):
    """Rows at every point of GRID; times by contender, a function of H where it is one."""
    times = {"scan": 12.0, TORCH: 2.0, "fused": 1.0, "fused gates": 3.0, **milliseconds}
    rows = []
    for point in GRID.points():
        for name, time in times.items():
            time = time(point) if callable(time) else time
            if name != TORCH or point.reset == "after":
                reason = None if time is not None else "refused: gru: too large"
                rows.append(row_of(point, name, time, reason))
    return rows


def judged(rows, grid=GRID):
    return [(t.reached, t.figure) for t in fused_report.judge(rows, grid)]


def test_targets_are_met_where_every_point_meets_them():
    assert judged(made_rows()) == [(True, 12.0), (True, 2.0), (True, 2.0)]
    lines = [str(target) for target in fused_report.judge(made_rows(), GRID)]
    assert lines[0].startswith("reached      bfloat16: scan / fused, at least ten times as fast")
    assert "12.00 (wanted at least 10); worst of 4 of 4 points: training, reset after" in lines[0]
    assert "worst of 2 of 2 points" in lines[1] and "worst of 1 of 1 points" in lines[2]


def test_better_of_the_two_kernels_counts():
    assert judged(made_rows(fused=4.0, **{"fused gates": 1.0}))[1] == (True, 2.0)


def test_one_slow_point_misses_and_is_named():
    rows = made_rows(fused=lambda point: 2.5 if point.size.hidden_size == 512 else 1.0)
    assert judged(rows) == [(False, 4.8), (False, 0.8), (True, 2.0)]
    assert "H=512" in fused_report.judge(rows, GRID)[1].place


def test_equal_time_is_not_slower_but_not_half_as_fast_again():
    assert judged(made_rows(**{TORCH: 1.0})) == [(True, 12.0), (True, 1.0), (False, 1.0)]


def test_point_without_a_time_of_the_kernels_misses_and_says_so():
    def too_large(point):
        return None if point.size.hidden_size == 512 else 1.0

    rows = made_rows(fused=too_large, **{"fused gates": too_large})
    assert judged(rows) == [(False, 12.0), (False, 2.0), (True, 2.0)]
    place = fused_report.judge(rows, GRID)[0].place
    assert "no time at 2 points: training, reset after, bfloat16, T=512 B=1 D=512 H=512" in place


def test_target_is_not_measurable_without_its_rival_or_with_points_left_out():
    without = [row for row in made_rows() if row["contender"] != TORCH]
    assert judged(without) == [(True, 12.0), (None, None), (None, None)]
    part = [row for row in made_rows() if row["hidden_size"] == 256]
    assert judged(part) == [(None, 12.0), (None, 2.0), (True, 2.0)]
    assert judged([]) == 3 * [(None, None)]
    slow = [row for row in made_rows(**{TORCH: 0.5}) if row["hidden_size"] == 256]
    assert judged(slow)[1] == (False, 0.5)  # a miss stays one, whatever the others are


def test_smoke_run_says_nothing_about_targets(tmp_path):
    record = fused.Record(tmp_path, about(), [])
    for point in FULL.points():
        record.rows += [row_of(point, SCAN, 1.0), row_of(point, FUSED, 1.0)]
    assert [target.reached for target in record.targets()][:2] == [False, False]
    record.about["smoke"] = True
    assert {target.reached for target in record.targets()} == {None}


def test_table_and_markdown_show_ratios_shares_and_reasons(tmp_path):
    def too_large(point):
        return None if point.size.hidden_size == 512 else 0.512

    at_most = {"bytes_per_second": 1e12, "flops_per_second": {"bfloat16": 1e13}}
    rows = made_rows(fused=too_large, **{"fused gates": too_large})
    rows = fused_report.with_ratios([r for r in rows if r["reset"] == "after"], at_most)
    by_name = {r["contender"]: r for r in rows if r["hidden_size"] == 256}
    assert by_name[FUSED]["us_per_step"] == pytest.approx(1.0)
    assert by_name[FUSED]["speedup_over_scan"] == pytest.approx(12 / 0.512)
    assert by_name[FUSED]["speedup_over_torch"] == pytest.approx(2 / 0.512)
    assert by_name[SCAN]["speedup_over_torch"] == pytest.approx(2 / 12)
    share = 18 * 256 * 512 / 1e13 / 1e-6
    assert by_name[FUSED_GATES]["matmul_share"] == pytest.approx(share)
    lines = fused_report.table(rows).splitlines()
    assert lines[3].split()[:2] == ["256", "1"] and "23.44" in lines[3] and "3.91" in lines[3]
    assert f"{100 * share:.1f} %" in lines[3]
    assert lines[4].count("refused") == 2 and "fused, 1 times: refused: gru: too large" in lines[5]
    assert "| 512 | 1 | 23.4 | 3.91 | refused | - | - | - | - |" in fused_report.markdown(rows)
    fused_report.plot(rows, "made up", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# All of it.


@pytest.mark.filterwarnings("ignore")  # of torch
@pytest.mark.slow
def test_smoke_run_measures_everything_and_leaves_all_its_files(tmp_path, capsys, monkeypatch):
    out, names = tmp_path / "run", [SCAN, TORCH, FUSED]
    monkeypatch.setattr(fused_flags, "FLAGS", {"buffer": fused_flags.FLAGS["command buffer"]})
    small = ["--hidden", "4", "--tasks", "training", "--dtypes", "bfloat16", "--resets", "after"]
    assert fused.main(["--smoke", *small, "--contenders", *names, "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "fused.json",
        "fused.md",
        "fused_after_T3.png",
    }
    found = read_results(out)
    assert set(fused.SAME) <= set(found) and found["not_reached"] == []
    assert [row["contender"] for row in found["rows"]] == names
    for row in found["rows"]:
        if row["reason"] is None:
            assert row["samples"] >= 1 and row["speedup_over_scan"] > 0
            assert row["matmul_share"] > 0 and row["memory_share"] > 0
        else:
            assert row["contender"] == TORCH and row["reason"].startswith("not here: torch is not")
    assert [row["flags"] for row in found["flags"]] == ["buffer"]
    assert all(row["us_per_step"] > 0 for row in found["flags"])
    assert [target["reached"] for target in found["targets"]] == [None] * 6
    printed = capsys.readouterr().out
    assert "Not reached: nothing" in printed and "not measured bfloat16: scan / fused" in printed


def test_machine_without_a_gpu_is_named_with_the_cure(capsys, tmp_path):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    assert fused.main(["--out", str(tmp_path / "new")]) == 2
    assert "first device must be a GPU" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
