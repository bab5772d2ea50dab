"""The counts of compiled programs: what is read from the compilers' texts, the check, the table."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.benchmarks import compiled, compiled_text
from jaxgru import BPTT, Noise, gru

# Loops of 4 and, inside it, 3 trips. In its body: a graph of a product and the loop counter.
THUNKS = """000: kCommandBuffer [source | next=003 (1)]
    001: kCopy [source | sink] kCopy
    002: kCustomKernel [source | sink] loop_add grid: [2, 1, 1] threads: [128, 1, 1]  shared: 0
003: kWhile [prev=000 (1) | sink]
condition:
    004: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]  shared: 0
  body:
    005: kGemm [source | sink]
    006: kWhile [source | sink]
condition:
        007: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]  shared: 0
      body:
        000: kCommandBuffer [source | sink]
            008: kCustomKernel [source | sink] gemm_fusion_dot_1 grid: [9, 1, 1] threads: [64, 1, 1]
            009: kAsyncStart [source | sink] stream=1
                011: kDynamicSliceFusion [source | sink] params=1
                    010: kCopy [source | sink] kCopy
            012: kAsyncDone [source | sink] async_id=9
            013: kCustomKernel [source | sink] add grid: [1, 1, 1] threads: [1, 1, 1]  shared: 0
    014: kCustomKernel [source | sink] multiply grid: [8, 1, 1] threads: [128, 1, 1]  shared: 0
015: kCustomCall [source | sink] unknown
016: kAsyncStart [source | sink] stream=1
    017: kCopy [source | sink] kCopy
"""
METADATA = """thunk_metadata {
  thunk_info {
    profile_annotation: "command_buffer"
  }
}
thunk_metadata {
  thunk_info {
    profile_annotation: "while.7"
    thunk_id: 3
  }
}
thunk_metadata {
  thunk_info {
    profile_annotation: "while.2"
    thunk_id: 6
  }
}
"""
GPU_HLO = """HloModule jit_f, entry_computation_layout={(f32[2])->f32[2]}

%outer (arg: (s32[], f32[2])) -> (s32[], f32[2]) {
  %while.2 = (s32[], /*index=1*/f32[2]{0}) while(%tuple), condition=%c, body=%inner, \
metadata={op_name="jit(f)/transpose(jvp())/while"}, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %while.7 = (s32[], f32[2]{0}) while(%tuple.1), condition=%c, body=%outer, \
metadata={op_name="jit(f)/jvp()/while"}, backend_config={"known_trip_count":{"n":"4"}}
}
"""
TPU_HLO = """HloModule jit_f, is_scheduled=true

%compared (p: s32[]) -> pred[] {
  %constant.2 = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%p, %constant.2), direction=LT
}

%condition (arg: (s32[], f32[8])) -> pred[] {
  %limit = f32[]{:T(128)} constant(77)
  ROOT %fused = pred[]{:T(512)} fusion(%gte), kind=kLoop, calls=%compared
}

%body.sunk (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[]{:T(128)}, f32[8]{0:T(8,128)S(1)}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %add = s32[]{:T(128)} add(%gte, %one)
  %fusion.3 = (f32[8]{0:T(8,128)S(1)}, f32[8]{0}) fusion(%gte.1), kind=kOutput, calls=%f, \
backend_config={"window":{},"estimated_cycles":"280"}
  %copy-start.1 = f32[8]{0} copy-start(%fusion.3), backend_config={"estimated_cycles":"20"}
  %copy-done.1 = f32[8]{0} copy-done(%copy-start.1)
  ROOT %tuple.9 = (s32[]{:T(128)}, f32[8]{0}) tuple(%add, %copy-done.1)
}

%called (x: f32[8]) -> f32[8] {
  ROOT %while.1 = (s32[], f32[8]{0:T(8,128)}) while(%t), condition=%condition, body=%body.sunk, \
metadata={op_name="jit(f)/transpose(jvp())/while" stack_frame_id=4}
}

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %fusion.8 = f32[8]{0} fusion(%x), kind=kLoop, calls=%g, backend_config={"estimated_cycles":"7"}
  ROOT %call.1 = f32[8]{0} call(%fusion.8), to_apply=%called
}
"""


def test_launches_are_counted_with_trips_and_a_graph_is_one_issue():
    total, by_host = compiled_text.count_launches(THUNKS, METADATA, GPU_HLO)
    assert total == {
        ("outside", "copy"): 2,
        ("outside", "elementwise"): 1,
        ("outside", "other"): 1,
        ("forward", "product"): 4,
        ("forward", "elementwise"): 4,
        ("backward", "product"): 12,
        ("backward", "copy"): 12,
        ("backward", "loop counter"): 12,
    }
    assert by_host == 1 + 4 * (1 + 3 + 1) + 2


def test_operations_cycles_and_bundles_are_counted_with_trips():
    schedules = {
        "179-fusion.3-70-schedule-analysis_final_bundles.txt": "total scheduled bundles:    56\n",
        "180-copy-start.1-9-schedule-analysis_final_bundles.txt": "total scheduled bundles: 4\n",
        "181-custom-call.7-66-schedule-analysis_final_bundles.txt": "",
    }
    bundles = compiled_text.read_bundles(schedules)
    assert bundles == {"fusion.3": 56, "copy-start.1": 4, "custom-call.7": 0}
    assert compiled_text.count_operations(TPU_HLO, bundles) == {
        ("outside", "operations"): 1,
        ("outside", "cycles"): 7,
        ("outside", "bundles"): 0,
        ("backward", "operations"): 10,
        ("backward", "cycles"): 1500,
        ("backward", "bundles"): 300,
    }


def test_a_loop_without_a_known_number_of_trips_is_refused():
    unknown = TPU_HLO.replace("constant(5)", "parameter(0)")
    with pytest.raises(ValueError, match=r"while\.1 must have one bound, got \[\]"):
        compiled_text.count_operations(unknown, {})


CELL = "float32 128 training after"


def results_of(**costs: tuple[float, float] | str) -> dict:
    """Results of an H100: launches and temporaries by contender; a text is an error."""
    rows = {
        name.replace("_", " "): {"error": value}
        if isinstance(value, str)
        else {
            "costs": {"launches": value[0], "host launches": 2.0, "temporaries": value[1]},
            "counts": {"forward": {"product": 1.0, "copy": 0.25}, "backward": {"product": 2.0}},
        }
        for name, value in costs.items()
    }
    return {"h100": {"date": "2026-01-01", "versions": {"jax": "1.2"}, "rows": {CELL: rows}}}


@pytest.mark.parametrize(
    ("results", "line"),
    [
        (results_of(jaxgru=(9, 8), plain_scan=(9.5, 8), Keras=(9, 8)), None),
        (results_of(jaxgru=(9, 8), plain_scan=(9.5, 2)), None),  # less memory for more launches
        (
            results_of(jaxgru=(9, 8), plain_scan=(9.5, 2), Keras=(9, 7)),
            "Keras costs less than jaxgru: launches: 9.00, 9.00; host launches: 2.00, 2.00; "
            "temporaries: 8.00, 7.00",
        ),
        (results_of(jaxgru=(30, 8), Keras=(9, 8.3)), "Keras costs less than jaxgru: launches: 30"),
        (results_of(jaxgru=(9, 8), Keras=(8.9, 7.9)), None),  # less by rounding of the counts
        (results_of(jaxgru=(9, 8), jaxgru_gates=(1, 1)), "every peer is missing"),
        (results_of(plain_scan=(9, 8)), "jaxgru is missing"),
        (results_of(jaxgru=(9, 8), plain_scan=(9.5, 8), Keras="refused"), "Keras: refused"),
        (results_of(jaxgru="refused", plain_scan=(9.5, 8)), "jaxgru: refused"),
        ({}, "every peer is missing"),
    ],
)
def test_check_fails_where_a_peer_costs_less_or_something_is_missing(
    results, line, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compiled, "measure_device", lambda *args: None)
    monkeypatch.setattr(compiled, "plot", lambda results, path: None)
    (tmp_path / "compiled.json").write_text(json.dumps(results or results_of()))
    grid = ["--devices", "h100", "--dtypes", "float32", "--hidden", "128", "--tasks", "training"]
    code = compiled.main([*grid, "--resets", "after", "--out", str(tmp_path), "--check"])
    printed = capsys.readouterr().out
    assert code == (0 if line is None else 1)
    assert printed.startswith(f"h100 {CELL}: {line}" if line else "compiled: nothing failed")


def test_table_has_a_line_for_each_contender():
    table = compiled.markdown(results_of(jaxgru=(1234.5, 8), Keras="refused")).splitlines()
    assert "2026-01-01; jax 1.2" in table
    assert (
        f"| {CELL} | jaxgru | 1.00 + 0.00 + 0.00 + 0.25 + 0.00 | 2.00 + 0.00 + 0.00 + 0.00 + 0.00 "
        "| 1,234.50 | 2.00 | 8.00 |  |" in table
    )
    assert sum("refused" in line for line in table) == 1


def test_plot_shows_contenders_with_results_and_survives_none(tmp_path, monkeypatch):
    shown = {}

    def savefig(figure, path, **options):
        for panel in figure.axes:
            lines = {line.get_label(): line.get_ydata() for line in panel.get_lines()}
            shown[panel.get_title()] = {name: list(y) for name, y in lines.items() if len(y)}

    monkeypatch.setattr(Figure, "savefig", savefig)
    compiled.plot(
        {**results_of(jaxgru=(3, 8), plain_scan=(9, 8)), "v5e": {"rows": {CELL: {}}}}, tmp_path
    )
    for column, values in (("launches", [3.0, 9.0]), ("temporaries", [8.0, 8.0])):
        lines = shown.pop(f"h100, training: {column}")
        found = {name: y[0] for name, y in lines.items() if not np.isnan(y[0])}
        assert found == dict(zip(("jaxgru", "plain scan"), values))
    assert not any(shown.values())
    monkeypatch.undo()
    compiled.plot({"h100": {"rows": {CELL: {}}}}, tmp_path / "compiled.png")
    assert (tmp_path / "compiled.png").stat().st_size > 1000


def test_programs_of_contenders_are_of_the_same_problem(monkeypatch):
    monkeypatch.setattr(compiled, "NUM_STEPS", 16)
    monkeypatch.setattr(compiled, "BATCH_SIZE", 2)
    found = {}
    unrolled = "plain scan, hoisted, unroll 8"
    ours = compiled.ours(compiled.TASKS, BPTT(unroll=1))  # by default GPUs run a loop of their own
    for name, library in {"jaxgru": ours, unrolled: compiled.CONTENDERS[unrolled]}.items():
        function, arguments = compiled.make_program(library, "float32 4 training before")
        found[name] = jax.tree.leaves(jax.jit(function)(*arguments))
        assert ("unroll=8" in str(jax.make_jaxpr(function)(*arguments))) == (name == unrolled)
    for ours, theirs in zip(*found.values(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    scanned = jax.make_jaxpr(lambda xs: jax.lax.scan(lambda c, x: (c, x), 0.0, xs))(jnp.ones(9))
    assert "unroll=8" not in str(scanned)  # lax.scan itself is as before


def test_rows_that_are_there_are_measured_again_only_on_request(tmp_path, monkeypatch):
    measured = []

    def measure(device, place, dump, name):
        measured.append(name)
        return {"costs": {"launches": 7.0, "host launches": 1.0, "temporaries": 1.0}}

    results = results_of(jaxgru=(9, 8), plain_scan="refused")
    monkeypatch.setattr(compiled, "describe", lambda device, dump: None)
    monkeypatch.setattr(compiled, "measure", measure)
    monkeypatch.setattr(compiled, "make_program", lambda library, cell: (cell.split()[1],))
    monkeypatch.setattr(compiled, "PACKAGES", ())
    results["h100"]["versions"] = {}
    file = tmp_path / "compiled.json"
    file.write_text(json.dumps({**results, "v5e": "kept"}))
    rows = results["h100"]["rows"][CELL]
    argv = ["--devices", "h100", "--dtypes", "float32", "--hidden", "128", "--tasks", "training",
            "--resets", "after", "--out", str(tmp_path), "--contenders"]  # fmt: skip

    def names(*more):
        measured.clear()
        monkeypatch.setattr(compiled, "markdown", lambda results: "")
        monkeypatch.setattr(compiled, "plot", lambda results, path: None)
        assert compiled.main([*argv, *more]) == 0
        return len(measured)

    ours = sum(name.startswith("jaxgru") for name in compiled.CONTENDERS)
    assert names("jaxgru", "plain scan") == ours - 1 + 3
    found = json.loads(file.read_text())
    assert found["v5e"] == "kept"
    assert found["h100"]["rows"][CELL]["jaxgru"] == rows["jaxgru"]
    assert found["h100"]["rows"][CELL]["plain scan"]["costs"]["launches"] == 7.0
    assert names("jaxgru", "plain scan") == 0
    assert names("jaxgru", "--again") == ours
    monkeypatch.setattr(compiled, "PACKAGES", ("jax",))
    assert compiled.main([*argv, "jaxgru", "--again"]) == 2


def test_every_option_of_gru_is_compiled():
    cases = compiled.option_cases(jnp.dtype("float32"), "after")
    options = {name for _, case in cases for name in case}
    assert options == set(inspect.signature(gru).parameters) - {"params", "xs", "h0"}
    rules = [case["gradient"] for _, case in cases if "gradient" in case]
    fields = {field.name for field in dataclasses.fields(BPTT)} - {"kernel"}  # `hopper` compiles it
    changed = {f for f in fields for rule in rules if getattr(rule, f, None) not in (None, 1)}
    assert changed == fields
    residuals = {rule.residuals for rule in rules if isinstance(rule, BPTT)}
    assert residuals >= {"gates", "states", "boundaries"}
    noises = [case["noise"] for _, case in cases if "noise" in case]
    assert all(all(dataclasses.astuple(noise)) for noise in noises) and Noise() not in noises
    assert {params.g_h is None for params, _ in cases} == {True, False}
    assert {params.b_h is None for params, _ in cases} == {True, False}


def test_an_option_that_does_not_compile_fails_the_command(tmp_path, monkeypatch, capsys):
    def compile_for(place, function, arguments):
        if arguments[1].shape[0] == compiled.TINY.batch_size:  # axis=1
            raise RuntimeError("refused\nand more")

    monkeypatch.setattr(compiled, "describe", lambda device, dump: None)
    monkeypatch.setattr(compiled, "compile_for", compile_for)
    argv = ["--options", "--devices", "v5e", "--out", str(tmp_path)]
    assert compiled.main(argv) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0] == "v5e float32 before {'axis': 1}: RuntimeError: refused"
    monkeypatch.setattr(compiled, "compile_for", lambda place, function, arguments: None)
    assert compiled.main(argv) == 0
