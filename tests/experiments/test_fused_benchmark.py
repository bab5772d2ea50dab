"""The benchmark of the fused kernel: it checks results before timing, and refuses bad input."""

import json
import types

import jax
import numpy as np
import pytest

from experiments.benchmarks import fused, layers
from experiments.benchmarks.fused import FUSED, SCAN, UNTIMED, Point
from experiments.benchmarks.libraries import TORCH, Library
from experiments.benchmarks.problems import Size

POINT = Point("after", "training", "float32", Size(3, 2, 4, 4))
ONE = ["--smoke", "--tasks", "training", "--dtypes", "float32", "--resets", "after"]


def library(change):
    """The scan with a changed gradient of w_h."""

    def make(reset, size, dtype):
        layer = layers.our_layer(reset)

        def unpack(params):
            leaves = layer.unpack(params)
            return {**leaves, "w_h": change(leaves["w_h"])}

        changed = layer._replace(unpack=unpack)
        return lambda task, problem, compiles: layers.build(changed, task, problem)

    return Library(make)


def fail_with(error):
    """A contender that raises an error."""

    def make(reset, size, dtype):
        raise error

    return Library(make)


EQUAL = library(lambda w_h: w_h)


@pytest.fixture
def timed(monkeypatch):
    """Names of timed contenders; the scan takes 4 and 8 ms, the others a quarter of that."""
    names = []

    def interleave(calls, seconds, **options):
        names.extend(calls)
        scale = {name: 1.0 if name == SCAN else 0.25 for name in calls}
        return {name: [0.004 * scale[name], 0.008 * scale[name]] for name in calls}

    monkeypatch.setattr(fused, "interleave", interleave)
    return names


def run(monkeypatch, folder, kernel, *options):
    """The exit code and fused.json of a run in which a contender replaces the kernel."""
    monkeypatch.setattr(fused, "contenders", lambda interpreted: {SCAN: EQUAL, FUSED: kernel})
    code = fused.main([*ONE, *options, "--out", str(folder)])
    return code, json.loads((folder / "fused.json").read_text())


def test_figures_are_those_of_the_times(timed, monkeypatch, tmp_path):
    code, found = run(monkeypatch, tmp_path / "run", EQUAL)
    scan, kernel = found["rows"]
    assert code == 0 and timed == [SCAN, FUSED] and found["not_measured"] == []
    assert (scan["median_ms"], scan["us_per_step"]) == pytest.approx((6.0, 2000.0))
    assert (kernel["median_ms"], kernel["us_per_step"]) == pytest.approx((1.5, 500.0))
    assert (scan["speedup_over_scan"], kernel["speedup_over_scan"]) == pytest.approx((1.0, 4.0))
    assert kernel["compile_seconds"] > 0 and kernel["difference"] < 1e-5
    line = "| training | after | float32 | 3 | 2 | 4 | 2e+03 | 500 | 4 | - |"
    assert line in (tmp_path / "run" / "fused.md").read_text()


def test_wrong_gradient_ends_the_run_before_anything_is_timed(timed, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"nothing is timed at .*: w_h of 'fused' differs"):
        run(monkeypatch, tmp_path / "run", library(lambda w_h: 1.01 * w_h))
    assert timed == []


def test_only_rounding_is_accepted_and_more_of_it_from_torch():
    assert fused.require_equal(POINT, FUSED, {"w_x": 1e-6, "w_h": 2e-3}) == 2e-3
    assert fused.require_equal(POINT, TORCH, {"w_h": 2e-2}) == 2e-2
    for name, difference in [(FUSED, 4e-3), (TORCH, 4e-2), (FUSED, np.nan)]:
        with pytest.raises(SystemExit, match=f"w_h of '{name}' differs"):
            fused.require_equal(POINT, name, {"w_x": 0.0, "w_h": difference})


@pytest.mark.parametrize(
    "kernel, hidden_size, code, reason",
    [
        (fused.contenders(True)[FUSED], 512, 0, "refused: HopperKernel: params.w_h must have at"),
        (fail_with(RuntimeError("out of memory\n")), 4, 1, "failed: RuntimeError: out of memory"),
    ],
    ids=["refused", "failed"],
)
def test_contender_without_a_result_is_a_row_with_its_reason(
    timed, monkeypatch, tmp_path, kernel, hidden_size, code, reason, capsys
):
    size = f"3,2,4,{hidden_size}"
    got, found = run(monkeypatch, tmp_path / "run", kernel, "--sizes", size)
    assert got == code and timed == [SCAN]
    assert found["rows"][1]["reason"].startswith(reason) and found["rows"][1]["median_ms"] is None
    point = POINT._replace(size=Size(3, 2, 4, hidden_size))
    assert f"* {point}: fused {reason}" in capsys.readouterr().out


def test_run_ends_when_its_minutes_are_over_and_names_the_rest(timed, monkeypatch, tmp_path):
    now = iter([0.0, 0.0, 61.0])
    monkeypatch.setattr(fused, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    sizes = ["--sizes", "3,2,4,4", "3,2,4,8", "--minutes", "1"]
    _, found = run(monkeypatch, tmp_path / "run", EQUAL, *sizes)
    assert [row["hidden_size"] for row in found["rows"]] == [4, 4]
    assert found["not_measured"] == ["training, reset after, float32, T=3 B=2 D=4 H=8"]


def made_row(hidden_size, contender, median_ms):
    place = {"task": "training", "reset": "after", "dtype": "bfloat16"}
    size = Size(512, 1, hidden_size, hidden_size)._asdict()
    return {**UNTIMED, **place, **size, "contender": contender, "median_ms": median_ms}


def test_verdicts_name_the_worst_point_and_count_missing_times_as_missed():
    times = {256: {SCAN: 12.0, TORCH: 1.5, FUSED: 1.0}, 512: {SCAN: 8.0, TORCH: 1.0, FUSED: 1.0}}
    rows = [made_row(h, name, time) for h in times for name, time in times[h].items()]
    scan, torch, half_as_fast_again = fused.verdicts(rows)
    place = "training, reset after, bfloat16, T=512 B=1 D=512 H=512"
    assert f"scan / fused is 8.00 ({place}) to 12.00" in scan and "MISSED at 1 of 2" in scan
    assert torch.endswith("wanted at least 1 up to H=512: reached")
    assert half_as_fast_again.endswith("wanted at least 1.5 up to H=256: reached")
    rows[-1] = made_row(512, FUSED, None)
    assert "torch.nn.GRU / fused is 0.00" in fused.verdicts(rows)[1]
    assert len(fused.verdicts([row for row in rows if row["contender"] != TORCH])) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sizes", "0,1,1,1"], "--sizes: must be four positive integers T,B,D,H, got '0,1,1,1'"),
        (["--minutes", "-1"], "--minutes: must be above 0 and finite, got -1"),
        (["--dtypes", "float16"], "--dtypes: invalid choice: 'float16'"),
    ],
)
def test_bad_option_is_one_clear_line(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        fused.main(options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_machine_without_a_gpu_and_a_used_folder_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert fused.main(["--out", str(tmp_path / "new")]) == 2
    assert "first device must be a GPU" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "fused.json").write_text("{}")
    assert fused.main([*ONE, "--out", str(tmp_path)]) == 2
    assert "nothing was overwritten" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # of torch
@pytest.mark.slow
def test_smoke_run_measures_the_kernel_in_the_interpreter(tmp_path):
    assert fused.main([*ONE, "--resets", "after", "before", "--out", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "fused.json").read_text())
    kernels = [row for row in found["rows"] if row["contender"] == FUSED]
    assert [row["reset"] for row in kernels] == ["after", "before"]
    assert all(row["median_ms"] > 0 and row["difference"] < 1e-4 for row in kernels)
