"""The scan under flags of XLA: what a GPU gives without a kernel of one's own.

XLA reads its flags once a process, so each set of them has a child process. A child gets its cases
as JSON on its standard input and answers with a line of JSON for each, as soon as it has it:

    echo '{"cases": [...], ...}' | python -m experiments.benchmarks.fused_flags

A flag that this XLA does not know ends the child; what it had not measured then has the reason in
place of a time. Flags must not change values: the norms of a case's results are held against those
it has without flags.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.fused_points import (
    TOLERANCES,
    Point,
    Rows,
    check,
    point_of,
    reason_of,
)
from experiments.benchmarks.layers import build, our_layer
from experiments.benchmarks.problems import Size, cast, draw_problem
from experiments.benchmarks.timing import interleave, summarize

NONE = "none"
_WHILE = "--xla_gpu_enable_command_buffer=+WHILE"
FLAGS = {
    NONE: "",
    "command buffer": _WHILE,
    "command buffer, unrolled": f"{_WHILE} --xla_gpu_command_buffer_unroll_loops=true",
}
SIZES = (Size(512, 64, 256, 256), Size(512, 1, 128, 128))
SMOKE_SIZES = (Size(3, 2, 4, 4),)
ROOT = Path(__file__).resolve().parents[2]


class Case(NamedTuple):
    """A training step by the scan with these options."""

    point: Point
    unroll: int
    residuals: str

    def fields(self) -> dict[str, Any]:
        """As part of a row."""
        return {**self.point.fields(), "unroll": self.unroll, "residuals": self.residuals}


def case_of(row: dict[str, Any]) -> Case:
    """The case that a row is of."""
    return Case(point_of(row), row["unroll"], row["residuals"])


def cases_of(sizes: Sequence[Size]) -> list[Case]:
    """Every choice at every size, reset after in bfloat16 first."""
    return [
        Case(Point("training", reset, dtype, size), unroll, residuals)
        for size in sizes
        for reset in ("after", "before")
        for dtype in ("bfloat16", "float32")
        for unroll in (1, 8)
        for residuals in ("gates", "states")
    ]


class Settings(NamedTuple):
    """How a child measures."""

    seed: int
    seconds: float  # for each case
    options: dict[str, Any]  # of interleave


class Answer(NamedTuple):
    """The rows of a child, and in words how it ended where that was not well."""

    rows: Rows
    death: str | None


def missing(cases: Sequence[Case], rows: Rows) -> list[tuple[str, Case]]:
    """The pairs of flags and case that have no row."""
    known = {(row["flags"], case_of(row)) for row in rows}
    return [(name, case) for name in FLAGS for case in cases if (name, case) not in known]


def measure_flags(
    cases: Sequence[Case],
    rows: Rows,
    ask: Callable[[str, Sequence[Case], float], Answer],
    left: Callable[[], float],
) -> Rows:
    """Rows of what is missing, as far as the seconds that are left go; each set gets its share.

    A child that dies loses the case it was at, and the rest where it had measured none.
    """
    found: Rows = []
    for k, (name, flags) in enumerate(FLAGS.items()):
        pending = [case for other, case in missing(cases, rows) if other == name]
        end = left() * (1 - 1 / (len(FLAGS) - k))  # what is left then is for the other sets
        while pending and left() > end:
            answer = ask(flags, pending, left() - end)
            pending = pending[len(answer.rows) :]
            found += [{"flags": name, "xla_flags": flags, **row} for row in answer.rows]
            if answer.death is None:
                break
            lost, pending = (pending[:1], pending[1:]) if answer.rows else (pending, [])
            empty = {"median_ms": None, "norms": None, "reason": answer.death}
            found += [
                {"flags": name, "xla_flags": flags, **case.fields(), **empty} for case in lost
            ]
    return found


def ask_child(
    flags: str, cases: Sequence[Case], budget: float, settings: Settings, patience: float
) -> Answer:
    """Measures the cases in a process with these flags, for about that many seconds."""
    given = os.environ.get("XLA_FLAGS", "")
    task = {
        "cases": [case.fields() for case in cases],
        "budget": budget,
        **settings._asdict(),
    }
    try:
        child = subprocess.run(
            [sys.executable, "-m", "experiments.benchmarks.fused_flags"],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": f"{given} {flags}".strip()},
            timeout=budget + patience,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = output if isinstance(output, str) else output.decode()
        return Answer(_rows_in(text), f"failed: no answer for {patience:g} seconds")
    return Answer(_rows_in(child.stdout), _death(child.returncode, child.stderr))


def _rows_in(text: str) -> Rows:
    """Of each whole line."""
    lines = text.splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]


def _death(code: int, errors: str) -> str | None:
    """The line that tells why: that about an unknown flag, or the last."""
    if code == 0:
        return None
    lines = [line.strip() for line in errors.splitlines() if line.strip()] or ["nothing was said"]
    (line, *_) = [line for line in lines if "Unknown flag" in line] or lines[-1:]
    return f"failed: the process ended with code {code}: {line[:400]}"


def compare_flags(rows: Rows) -> Rows:
    """The rows with their speed over that without flags; a time of other values does not count."""
    plain = {case_of(row): row for row in rows if row["flags"] == NONE}
    return [_compare(row, plain.get(case_of(row))) for row in rows]


def _compare(row: dict[str, Any], plain: dict[str, Any] | None) -> dict[str, Any]:
    """One of them."""
    times = row["median_ms"], plain and plain["median_ms"]
    row = {
        **row,
        "us_per_step": times[0] and 1e3 * times[0] / row["num_steps"],
        "speedup_over_none": times[1] / times[0] if all(times) else None,
    }
    if not all(times) or plain is None:
        return row
    far = {
        leaf: abs(norm - row["norms"][leaf]) / max(norm, 1e-30)
        for leaf, norm in plain["norms"].items()
        if leaf != "value"  # which may cancel
    }
    _, reason = check(far, TOLERANCES[row["dtype"]], "its norm without flags")
    if reason is None:
        return row
    none = dict.fromkeys(("median_ms", "us_per_step", "speedup_over_none"))
    return {**row, **none, "reason": reason}


def measure_case(case: Case, settings: Settings) -> dict[str, Any]:
    """The time and the norms of one case; whatever goes wrong is a reason."""
    point = case.point
    row = {**case.fields(), "median_ms": None, "norms": None, "reason": None}
    try:
        draw = jax.jit(draw_problem, static_argnums=(0, 1))
        problem = cast(draw(point.size, point.reset, settings.seed), jnp.dtype(point.dtype))
        layer = our_layer(point.reset, unroll=case.unroll, residuals=case.residuals)
        program = build(layer, "training", problem)
        norms = {k: float(np.linalg.norm(v)) for k, v in program.read(program.call()).items()}
        samples = interleave({"scan": program.call}, settings.seconds, **settings.options)
    except Exception as error:
        return {**row, "reason": reason_of(error)}
    compiled = {"norms": norms, "compile_seconds": program.compile_seconds}
    return {**row, **summarize(samples["scan"]), **compiled}


def main() -> int:
    """Answers the question on the standard input."""
    begin, task = time.monotonic(), json.load(sys.stdin)
    settings = Settings(*(task[field] for field in Settings._fields))
    for entry in task["cases"]:
        if time.monotonic() - begin > task["budget"]:
            break
        print(json.dumps(measure_case(case_of(entry), settings)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
