"""The benchmarks: short runs from end to end, bad input, and their arithmetic.

No test depends on measured times.
"""

import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import (
    layers,
    libraries,
    peers,
    problems,
    scaling,
    targets,
    torch_library,
)
from experiments.benchmarks.problems import Size
from experiments.benchmarks.timing import interleave, summarize
from jaxgru import gru

OWN = ["jaxgru", "plain scan", "plain scan, hoisted"]


def run_peers(out, *arguments, contenders=OWN):
    command = ["--smoke", "--out", str(out), "--contenders", *contenders, *arguments]
    return peers.main(command)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("peers") / "run"
    contenders = [*OWN, libraries.CUT]
    assert run_peers(out, "--chunks", "whole", "--reset", "after", contenders=contenders) == 0
    return out


def read_rows(out):
    return json.loads((out / "peers.json").read_text())["rows"]


def test_saved_figures_are_drawn_again_without_a_measurement(run, tmp_path, monkeypatch):
    (tmp_path / "peers.json").write_text((run / "peers.json").read_text())
    monkeypatch.setattr(peers, "measure", lambda *args: pytest.fail("measured"))
    assert peers.main(["--draw", str(tmp_path / "peers.json")]) == 0
    assert (tmp_path / "peers.png").read_bytes() == (run / "peers.png").read_bytes()


@pytest.mark.slow
def test_peers_measures_every_task_and_leaves_all_its_files(run):
    names = {path.name for path in run.iterdir()}
    assert names == {"config.json", "peers.json", "peers.md", "peers.png"}
    assert (run / "peers.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((run / "peers.json").read_text())
    assert {"device", "xla_flags", "versions", "command", "cpu", "cores"} <= set(found)
    assert len(found["targets"]) == len(targets.GOALS)
    by_task = {}
    for row in found["rows"]:
        by_task.setdefault(row["task"], []).append(row["contender"])
    chunks = ["jaxgru whole sequence"]
    assert by_task == {
        "training": [*OWN, *chunks, targets.LIMIT],
        "padded": [*OWN, libraries.CUT],
        "padded-short": [*OWN, libraries.CUT],
        "forward": [*OWN, *chunks, targets.LIMIT],
        "step": ["jaxgru", "plain scan"],
        "generation": ["jaxgru", "plain scan"],
    }


@pytest.mark.slow
def test_peers_writes_ratios_to_jaxgru_and_what_its_programs_cost(run):
    rows = read_rows(run)
    for row in rows:
        ours = next(r for r in rows if r["contender"] == "jaxgru" and r["task"] == row["task"])
        assert row["ratio"] == pytest.approx(row["median_ms"] / ours["median_ms"])
        assert row["samples"] >= 1 and row["min_ms"] <= row["median_ms"]
        if row["task"] not in ("step", "generation"):
            assert row["temporaries_bytes"] >= 0 and row["compile_seconds"] > 0
        if row["contender"] != targets.LIMIT:
            assert row["difference"] <= problems.TOLERANCE
            assert row["error"] is None
    speeds = [r for r in rows if r["task"] == "generation"]
    for row in speeds:  # nine characters in a smoke run
        assert row["characters_per_second"] == pytest.approx(9e3 / row["median_ms"])


@pytest.mark.slow
def test_peers_table_has_a_line_for_each_size(run):
    lines = (run / "peers.md").read_text().splitlines()
    assert sum(line.startswith("| after | T=") for line in lines) == 6
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_results_are_never_overwritten(tmp_path, capsys):
    (tmp_path / "peers.json").write_text("mine")
    assert run_peers(tmp_path) == 2
    assert scaling.main(["--smoke", "--out", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["peers", "scaling"]
    assert all("nothing was overwritten" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["peers.json"]
    assert (tmp_path / "peers.json").read_text() == "mine"


@pytest.mark.slow
def test_bfloat16_is_checked_in_float32_and_its_error_is_written(tmp_path):
    arguments = ("--dtype", "bfloat16", "--tasks", "training", "--reset", "before")
    assert run_peers(tmp_path / "run", *arguments, contenders=["plain scan"]) == 0
    rows = [row for row in read_rows(tmp_path / "run") if row["contender"] != targets.LIMIT]
    assert [row["contender"] for row in rows] == ["jaxgru", "plain scan"]
    for row in rows:
        assert row["difference"] <= problems.TOLERANCE
        assert 1e-4 < row["error"] < 0.2


@pytest.mark.slow
def test_float32_reference_of_bfloat16_is_on_the_same_rounded_arrays():
    for task, group in (("forward", Size(2, 1, 3, 4)), ("generation", Size(2, 1, 3, 4))):
        args = types.SimpleNamespace(dtype="bfloat16", seed=0)
        problem = peers.make_problem((task, "after", group), args)
        floats = [v for v in jax.tree.leaves(problem) if isinstance(v, jax.Array)]
        assert len(floats) >= 7
        for leaf in floats:
            assert leaf.dtype == jnp.float32
            np.testing.assert_array_equal(leaf.astype(jnp.bfloat16).astype(jnp.float32), leaf)


@pytest.mark.slow
def test_scaling_measures_every_axis_and_leaves_all_its_files(tmp_path, capsys):
    out = tmp_path / "run"
    assert scaling.main(["--smoke", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"config.json", "scaling.json", "scaling.png"}
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "scaling.json").read_text())
    plan, names = scaling.SMOKE, list(scaling.COLOURS)
    expected = [(a, n, name) for a, ns in plan.doublings.items() for n in ns for name in names]
    rows = found["rows"]
    assert [(r["axis"], r[scaling.AXES[r["axis"]]], r["contender"]) for r in rows] == expected
    assert [(r["num_steps"], r["contender"]) for r in found["memory"]] == [
        (n, name) for n in plan.curve for name in names
    ]
    assert all(row["temporaries_bytes"] > 0 for row in found["memory"])
    assert found["long_run"]["finite"] and found["long_run"]["temporaries_bytes"] > 0
    assert [target["reached"] for target in found["targets"]] == [None] * 3
    assert "not measured" in capsys.readouterr().out


# What is refused.


def wrong_by(factor):
    """The plain scan with one of its gradients scaled."""

    def make(reset, size, dtype):
        layer = layers.plain_layer(reset, hoist=False)

        def unpack(params):
            leaves = layer.unpack(params)
            return {**leaves, "w_h": leaves["w_h"] * factor}

        def build(task, problem, compiles):
            return layers.build(layer._replace(unpack=unpack), task, problem, compiles)

        return build

    return libraries.PLAIN["plain scan"]._replace(make=make)


def test_contender_with_a_wrong_gradient_is_refused_before_anything_is_timed(monkeypatch, tmp_path):
    def never(*args, **kwargs):
        raise AssertionError("something was timed")

    monkeypatch.setitem(libraries.LIBRARIES, "plain scan", wrong_by(1.001))
    monkeypatch.setattr(peers, "interleave", never)
    with pytest.raises(SystemExit) as stopped:
        run_peers(tmp_path / "run", "--tasks", "training", contenders=["plain scan"])
    message = str(stopped.value.code)
    assert message.startswith(
        "peers: nothing is timed at training, reset after, T=12 B=3 D=4 H=5: "
    )
    assert "w_h of 'plain scan' differs from that of 'jaxgru' by 1.0e-03" in message


def test_contender_that_writes_another_character_is_refused():
    tokens = np.arange(9)
    results = {"jaxgru": {"tokens": tokens}, "other": {"tokens": np.where(tokens == 8, 0, tokens)}}
    with pytest.raises(SystemExit, match="tokens of 'other' differs"):
        peers.check_equal(results, {}, "here")


@pytest.mark.parametrize(
    "broken",
    [
        {"hs": np.array([np.nan, 1.0]), "b_hn": np.ones(2)},
        {"hs": np.ones(3), "b_hn": np.ones(2)},
        {"b_hn": np.ones(2)},
        {"hs": np.ones(2), "b_hn": np.zeros(2)},
    ],
    ids=["nan", "shape", "missing", "wrong"],
)
def test_comparison_refuses_what_is_not_the_same(broken):
    ours = {"hs": np.ones(2), "b_hn": np.ones(2)}
    with pytest.raises(SystemExit):
        peers.check_equal({"jaxgru": ours, "other": broken}, {}, "here")


def test_comparison_accepts_that_a_library_lacks_a_bias():
    ours = {"hs": np.ones(2), "b_hn": np.ones(2)}
    worst = peers.check_equal({"jaxgru": ours, "other": {"hs": np.ones(2) + 1e-5}}, {}, "here")
    assert worst["other"] == pytest.approx(1e-5, rel=1e-3)


def test_error_is_relative_in_norm_and_leaves_the_cancelling_value_out():
    ours = {"value": np.array(0.0), "a": np.array([3.0, 4.0]), "b": np.array([1.0])}
    other = {"value": np.array(9.0), "a": np.array([3.0, 4.5]), "b": np.array([1.01])}
    assert problems.relative_error(ours, other) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "1,2,3"], "--sizes: must be four positive integers T,B,D,H, got '1,2,3'"),
        (["--sizes", "1,2,3,0"], "--sizes: must be four positive integers T,B,D,H"),
        (["--contenders", "numpy"], "--contenders: must be one of 'jaxgru', 'jaxgru gates', "),
        (["--chunks", "0"], "--chunks: must be an integer of at least 1, got '0'"),
        (["--chunks", "all"], "--chunks: must be an integer of at least 1, got 'all'"),
        (["--compiles", "0"], "--compiles: must be an integer of at least 1, got '0'"),
        (["--seconds", "0"], "--seconds: must be above 0 and finite, got 0"),
        (["--seconds", "nan"], "--seconds: must be above 0 and finite, got nan"),
        (["--tasks", "sleep"], "--tasks: invalid choice: 'sleep'"),
        (["--reset", "never"], "--reset: invalid choice: 'never'"),
        (["--dtype", "float16"], "--dtype: invalid choice: 'float16'"),
        (["--precision", "low"], "--precision: invalid choice: 'low'"),
    ],
)
def test_bad_option_is_one_clear_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        peers.main(arguments)
    assert stopped.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and message in errors[0]


def test_peer_that_is_not_installed_is_one_line_with_the_cure(monkeypatch, tmp_path):
    missing = libraries.LIBRARIES["Haiku"]._replace(module="no_such_package")
    monkeypatch.setitem(libraries.LIBRARIES, "Haiku", missing)
    with pytest.raises(SystemExit) as stopped:
        run_peers(tmp_path / "run", contenders=["Haiku"])
    message = str(stopped.value.code)
    assert "\n" not in message and "'Haiku'" in message and 'pip install -e ".[peers]"' in message
    assert not (tmp_path / "run").exists()


# Timing.


class FakeMachine:
    """A clock that only calls and pauses advance, and a log of them."""

    def __init__(self, **costs):
        self.now, self.log, self.costs = 0.0, [], costs

    def contenders(self):
        def call(name):
            self.log.append(name)
            self.now += self.costs[name]

        return {name: (lambda name=name: call(name)) for name in self.costs}

    def sleep(self, seconds):
        self.log.append("pause")
        self.now += seconds

    def interleave(self, seconds, **options):
        clock = {"clock": lambda: self.now, "sleep": self.sleep}
        return interleave(self.contenders(), seconds, **clock, **options)


def test_interleave_runs_bursts_in_turns_each_after_a_pause_and_an_untimed_call():
    """Each round begins with another contender. All seconds are exact binary fractions."""
    machine = FakeMachine(quick=1 / 64, slow=0.5)
    options = {"warm_up": 1, "min_rounds": 2, "burst_seconds": 3 / 64, "pause_seconds": 0.125}
    samples = machine.interleave(1e-9, **options)
    quick, slow = ["pause", *["quick"] * 4], ["pause", *["slow"] * 2]
    assert machine.log == ["quick", "slow", *quick, *slow, *slow, *quick]
    assert {name: len(each) for name, each in samples.items()} == {"quick": 6, "slow": 2}
    np.testing.assert_allclose(samples["quick"], 1 / 64)
    np.testing.assert_allclose(samples["slow"], 0.5)


def test_interleave_continues_until_its_seconds_are_over_and_reports_its_progress():
    machine, fractions = FakeMachine(a=1.0), []
    options = {"warm_up": 0, "min_rounds": 1, "burst_seconds": 0.5, "pause_seconds": 0.0}
    samples = machine.interleave(7.0, advance=fractions.append, **options)
    assert len(samples["a"]) == 4  # rounds of two seconds: 2, 4, 6, 8
    assert fractions == pytest.approx([2 / 7, 2 / 7, 2 / 7, 1 / 7])


def test_summary_of_samples_is_in_milliseconds():
    summary = summarize([0.004, 0.001, 0.002, 0.003, 0.010])
    assert summary == {
        "median_ms": pytest.approx(3.0),
        "min_ms": pytest.approx(1.0),
        "quartiles_ms": pytest.approx([2.0, 4.0]),
        "samples": 5,
    }


def test_time_of_a_step_is_a_share_of_the_burst_of_steps():
    program = problems.Program(lambda: None, lambda result: {}, repeats=300)
    group = ("step", "after", problems.STEP_SIZE)
    row = peers.make_row(group, "jaxgru", program, [0.3, 0.6, 0.9], None, None)
    assert row["median_ms"] == pytest.approx(2.0)


@pytest.mark.slow
def test_limit_counts_the_operations_of_the_task():
    """The shapes of its products give 18TBH(D + H) and 6TBH(D + H) operations."""
    size, count = Size(8, 4, 16, 32), {}
    flops = 6 * 8 * 4 * 32 * (16 + 32)
    for task in ("training", "forward"):
        program = problems.limit_program(size, task, 0, jnp.float32)
        shapes = [v.shape for v in jax.tree.leaves(program.call())]
        inner = {(32, 96): 48, (32, 48): 96, (48, 96): 32}  # of the product with that shape
        count[task] = sum(2 * math.prod(shape) * inner[shape] for shape in shapes)
    assert count == {"training": 3 * flops, "forward": flops}


# Targets.


def made_rows(**changes):
    """Rows of a run in which peers take twice jaxgru's time; `changes` are fields by contender."""
    rows = []
    for task, reset, size in [
        *((task, r, s) for task in ("training", "forward") for r in problems.RESETS
          for s in problems.SIZES),
        *((task, r, problems.PADDED_SIZE) for task in problems.DIVISORS for r in problems.RESETS),
        *(("step", r, problems.STEP_SIZE) for r in problems.RESETS),
        *(("generation", r, problems.GENERATION_SIZE) for r in problems.RESETS),
    ]:  # fmt: skip
        for name, library in {**libraries.LIBRARIES, targets.LIMIT: None}.items():
            if library is not None and not libraries.can_run(library, task, reset):
                continue
            ours = name.startswith("jaxgru")
            row = {
                "task": task,
                "reset": reset,
                **size._asdict(),
                "contender": name,
                "median_ms": {"jaxgru": 1.0, targets.LIMIT: 0.9}.get(name, 2.0),
                "temporaries_bytes": 10 if ours else 40,
                "compile_seconds": 1.0,
            }
            if name == "torch.nn.GRU":
                row["temporaries_bytes"] = None
            rows.append({**row, **changes.get(name.replace(" ", "_"), {})})
    return rows


def state_of(rows):
    """{claim: reached}."""
    return {target.claim: target.reached for target in targets.judge(rows)}


def figure_of(rows, start):
    (target,) = [t for t in targets.judge(rows) if t.claim.startswith(start)]
    return target.figure


def test_targets_of_a_complete_run_are_all_reached_with_their_figures():
    rows = made_rows()
    assert set(state_of(rows).values()) == {True}
    assert figure_of(rows, "training: best JAX peer / jaxgru, geom") == pytest.approx(2.0)
    assert figure_of(rows, "training: share of the matmul limit, H=512, reset a") == 0.9
    temporaries = "training: temporaries of jaxgru states / least of a JAX peer, T=2048, reset a"
    assert figure_of(rows, temporaries) == pytest.approx(0.25)


def test_target_of_torch_looks_at_torch_alone():
    rows = made_rows(**{"torch.nn.GRU": {"median_ms": 3.0}})
    assert figure_of(rows, "training: torch / jaxgru") == pytest.approx(3.0)
    assert figure_of(rows, "training: best JAX peer / jaxgru") == pytest.approx(2.0)


def missed(rows):
    return {claim for claim, reached in state_of(rows).items() if reached is False}


def test_one_slow_size_misses_the_worst_case_and_not_the_mean():
    rows = made_rows()
    for row in rows:
        if (
            row["contender"] == "Equinox"
            and row["task"] == "training"
            and row["hidden_size"] == 512
        ):
            row["median_ms"] = 0.99
    assert missed(rows) == {"training: best peer / jaxgru, on the worst size"}
    assert figure_of(rows, "training: best peer") == pytest.approx(0.99)
    mean = (0.99 * 2**13) ** (1 / 14)
    assert figure_of(rows, "training: best JAX peer / jaxgru, geom") == pytest.approx(mean)


def test_equal_time_is_not_faster_but_not_slower_either():
    rows = made_rows(Equinox={"median_ms": 1.0})
    worst = {claim for claim in missed(rows) if "worst size" in claim or "worse equation" in claim}
    assert worst == {
        "training: best peer / jaxgru, on the worst size",
        "generation: best loop of any peer / jaxgru, worse equation",
        "one step: best peer / jaxgru, worse equation",
    }  # Equinox has no masks


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"torch.nn.GRU": {"median_ms": 1.9}}, "training: torch / jaxgru, geometric mean"),
        ({"matmul_limit": {"median_ms": 0.7}}, "training: share of the matmul limit, H=512, reset"),
        ({"jaxgru_states": {"temporaries_bytes": 11}}, "training: temporaries of jaxgru states /"),
        ({"jaxgru_gates": {"temporaries_bytes": 21}}, "training: temporaries of jaxgru gates"),
        ({"Flax_linen": {"compile_seconds": 0.9}}, "compilation of a training step: Flax linen"),
        ({"jaxgru,_cut_to_the_longest": {"median_ms": 0.8}}, "padded-short: jaxgru / jaxgru on"),
    ],
    ids=["torch", "limit", "states", "gates", "compilation", "padding"],
)
def test_target_just_beyond_its_bound_is_missed(changes, claim):
    found = missed(made_rows(**changes))
    assert found and all(entry.startswith(claim) for entry in found)


def test_temporaries_are_compared_with_the_peer_that_has_the_least():
    rows = made_rows(Keras={"temporaries_bytes": 16})
    assert {claim.partition(" / ")[0] for claim in missed(rows)} == {
        "training: temporaries of jaxgru gates",
        "training: temporaries of jaxgru states",
    }


def test_target_is_not_measured_where_a_size_or_a_contender_is_left_out():
    rows = made_rows()
    short = [row for row in rows if row["num_steps"] != 25]
    state = state_of(short)
    for claim in (
        "training: best peer / jaxgru, on the worst size",
        "forward: best peer / jaxgru,",
    ):
        assert {v for name, v in state.items() if name.startswith(claim)} == {None}
    assert state["one step: best peer / jaxgru, worse equation"] is True
    without = [row for row in rows if row["contender"] != "torch.nn.GRU"]
    state = state_of(without)
    assert state["training: torch / jaxgru, geometric mean"] is None
    assert state["training: best JAX peer / jaxgru, geometric mean"] is True
    assert set(state_of([]).values()) == {None}


def test_targets_print_their_state():
    lines = [str(target) for target in targets.judge(made_rows(Keras={"median_ms": 0.5}))]
    assert any(line.startswith("MISSED       training: best peer / jaxgru") for line in lines)
    assert any(line.startswith("reached      compilation") for line in lines)
    assert all(str(target).startswith("not measured ") for target in targets.judge([]))


def test_exponent_is_the_slope_at_the_large_end():
    sizes = [1, 2, 4, 8, 16]
    assert scaling.exponent(sizes, [9.0, 9.0, 16.0, 64.0, 256.0]) == pytest.approx(2.0)
    assert scaling.exponent([2, 4], [3.0, 6.0]) == pytest.approx(1.0)


@pytest.mark.parametrize(("slope", "count", "reached"), [(1.05, 99e6, True), (1.2, 101e6, False)])
def test_scaling_targets_hold_the_exponents_and_the_long_run_to_their_bounds(slope, count, reached):
    fits = [
        {"axis": axis, "contender": "jaxgru", "median_ms_exponent": slope} for axis in ("T", "B")
    ]
    long_run = {"num_steps": 10**6, "temporaries_bytes": count, "finite": True}
    judged = scaling.judge(fits, long_run, scaling.FULL)
    assert [target["reached"] for target in judged] == [reached] * 3
    not_finite = scaling.judge(fits, {**long_run, "finite": False}, scaling.FULL)
    assert not_finite[-1]["reached"] is False


# The adapters of the libraries.

MODULES = {name: library.module for name, library in libraries.LIBRARIES.items() if library.module}


def results_of(name, task, reset):
    """The results of an adapter's program for a small problem."""
    size = Size(9, 1, 3, 4) if task in ("step", "generation") else Size(5, 2, 3, 4)
    draws = {"generation": problems.draw_model}
    draws |= {of: functools.partial(problems.draw_padded, of) for of in problems.DIVISORS}
    problem = draws.get(task, problems.draw_problem)(size, reset, 1)
    library = libraries.choose([name])[name]
    program = library.make(reset, size, jnp.float32)(task, problem, 1)
    return program.read(program.call())


our_results = functools.cache(functools.partial(results_of, "jaxgru"))  # for every other library


@pytest.mark.filterwarnings("ignore")  # of the libraries themselves
@pytest.mark.parametrize(
    ("name", "task"), [(name, task) for name in MODULES for task in libraries.LIBRARIES[name].tasks]
)
def test_library_has_our_values_and_gradients(name, task, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # its default backend may not be installed
    pytest.importorskip(MODULES[name].partition(".")[0], reason=f"{name} is in the extra `peers`")
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for reset in libraries.choose([name])[name].resets:
            expected, actual = our_results(task, reset), results_of(name, task, reset)
            found = problems.differences(expected, actual, {})
            assert max(found.values()) < 1e-5, (reset, found)
            missing = set(expected) - set(found)
            assert missing <= {"b_hn"} and (not missing or name in ("Flax nnx", "Haiku", "Keras"))


@pytest.mark.filterwarnings("ignore")  # of torch
def test_every_way_of_torch_to_train_gives_the_same():
    """The fastest of them is timed, so all must be right."""
    torch = pytest.importorskip("torch", reason="torch is in the extra `peers`")
    problem = problems.draw_problem(Size(5, 2, 3, 4), "after", 1)
    calls, read = torch_library._training(torch, lambda v: torch.tensor(np.array(v)), problem)
    assert list(calls) == ["nn.GRU", "nn.GRU, cotangents given"]
    expected = our_results("training", "after")
    for call in calls.values():
        assert max(problems.differences(expected, read(call()), {}).values()) < 1e-5


@pytest.mark.slow
def test_reference_is_jaxgru_itself():
    """The results with which all others are compared are gru's values and autodiff's gradients."""
    size = Size(5, 2, 3, 4)
    for reset in problems.RESETS:
        problem = problems.draw_problem(size, reset, 1)
        build = libraries.LIBRARIES["jaxgru"].make(reset, size, jnp.float32)
        result = build("training", problem, 1)

        def value(params, xs, h0, reset=reset, problem=problem):
            h_last, hs = gru(params, xs, h0, gradient="autodiff")
            return jnp.vdot(h_last, problem.dh_last) + jnp.vdot(hs, problem.dhs)

        expected, (params, xs, h0) = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))(
            *problem[:3]
        )
        wanted = {"value": expected, "w_x": params.w_x, "w_h": params.w_h, "b_x": params.b_x}
        wanted = {**wanted, "b_hn": params.b_h[8:], "xs": xs, "h0": h0}
        read = result.read(result.call())
        assert set(read) == set(wanted)
        for name, leaf in wanted.items():
            np.testing.assert_allclose(read[name], leaf, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_bias_that_one_library_lacks_is_zero_where_reset_is_after():
    for reset, zero in (("after", True), ("before", False)):
        b_h = problems.draw_problem(Size(2, 1, 3, 4), reset, 0).params.b_h
        assert bool(jnp.all(b_h[8:] == 0)) is zero and bool(jnp.all(b_h[:8] != 0))
        (layer,) = problems.draw_model(Size(2, 1, 3, 4), reset, 0).params.layers
        assert bool(jnp.all(layer.b_h[8:] == 0)) is zero


def test_keras_must_run_on_jax(monkeypatch):
    keras = types.SimpleNamespace(backend=types.SimpleNamespace(backend=lambda: "torch"))
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setattr(libraries.importlib, "import_module", lambda name: keras)
    with pytest.raises(SystemExit, match="must run on the JAX backend, got 'torch'"):
        libraries.choose(["Keras"])
