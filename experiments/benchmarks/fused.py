"""Compares the speed of the fused kernel with that of the scan and of torch, on one GPU.

    python -m experiments.benchmarks.fused --minutes 8 --out runs/fused
    python -m experiments.benchmarks.fused --sizes 512,16,256,256 --dtypes bfloat16
    python -m experiments.benchmarks.fused --smoke    # seconds, on a CPU; the times mean nothing

A training step is the value and all gradients (params, xs, h0) of <h_last, dh_last> + <hs, dhs>; a
forward pass gives h_last and hs. The contenders hold the same weights in the same dtype:

* scan: `gru` with its defaults;
* torch.nn.GRU if torch is installed, which runs cuDNN on a GPU; only with reset "after";
* fused: `gru` with the fused kernel.

Before anything is timed at a point, the results of each contender are compared with those of the
scan in float32 with full precision. A wrong result ends the run with code 1. If a contender refuses
a size or fails, its row gives the reason, and the run continues.

The contenders are timed in turn, in one process. A timed call waits for the device, so it includes
the cost of the dispatch; compilation is timed separately. By default the scan and torch multiply
float32 numbers in TF32 on a GPU; the kernel sums three bfloat16 products.

fused.json and fused.md are written to --out after each point. The most informative points come
first, as --minutes may end the run early. The options then select the remaining points, for another
--out.
"""

import argparse
import importlib.util
import itertools
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import runs
from experiments.benchmarks import problems
from experiments.benchmarks.layers import build, our_layer
from experiments.benchmarks.libraries import PEERS, SEQUENCES, TORCH, Library, can_run, ours
from experiments.benchmarks.peers import SMOKE, parse_size, positive_number
from experiments.benchmarks.problems import RESETS, Problem, Reset, Result, Size, Task
from experiments.benchmarks.timing import describe_gpu, describe_machine, interleave, summarize
from jaxgru import BPTT
from jaxgru.experimental.fused import HopperKernel

Rows = list[dict[str, Any]]
SCAN, FUSED = "scan", "fused"
DTYPES = ("bfloat16", "float32")
SIZES = [Size(512, b, h, h) for b, h in itertools.product((16, 128, 1), (256, 64, 512, 128))]
EMPTY = ("difference", "reason", "median_ms", "us_per_step", "compile_seconds", "temporaries_bytes")
UNTIMED = dict.fromkeys(EMPTY)

# Relative to the largest entry of each leaf. At T=512, products in TF32, emulated on a CPU, gave
# differences of 6e-4, and products in bfloat16 gave 4e-3. torch also rounds its states and its sums
# of weight gradients to bfloat16, which gave 7e-2 on a CPU.
TOLERANCES = {"float32": 3e-3, "bfloat16": 3e-2}
TORCH_FACTOR = 10

# (contender, largest H, how many times as fast as the contender the kernel should be)
GOALS = ((SCAN, 512, 10.0), (TORCH, 512, 1.0), (TORCH, 256, 1.5))


class Point(NamedTuple):
    """A choice of equation, task, dtype and size at which all contenders are timed."""

    reset: Reset
    task: Task
    dtype: str
    size: Size

    def __str__(self):
        """For example: training, reset after, bfloat16, T=512 B=16 D=256 H=256."""
        return f"{self.task}, reset {self.reset}, {self.dtype}, {self.size}"


def contenders(interpreted: bool) -> dict[str, Library]:
    """{name: contender}; on a CPU the kernel runs in JAX's interpreter."""
    found = {SCAN: ours(SEQUENCES)}
    if importlib.util.find_spec("torch") is not None:
        found[TORCH] = PEERS[TORCH]
    return {**found, FUSED: ours(SEQUENCES, BPTT(kernel=HopperKernel(interpreted)))}


def reference(point: Point) -> tuple[Problem, Result, float]:
    """(arrays in the point's dtype, results of the scan in float32, magnitude of the value)."""
    drawn = problems.draw_problem(point.size, point.reset, 0)
    problem = problems.cast(drawn, jnp.dtype(point.dtype))
    exact = problems.cast(problem, jnp.float32)
    with jax.default_matmul_precision("highest"):
        program = build(our_layer(point.reset), point.task, exact)
        return problem, program.read(program.call()), problems.value_scale(exact)


def require_equal(point: Point, name: str, found: dict[str, float]) -> float:
    """The largest relative difference of any leaf.

    Raises:
      SystemExit: it is above the tolerance, or NaN.
    """
    tolerance = TOLERANCES[point.dtype] * (TORCH_FACTOR if name == TORCH else 1)
    for leaf, difference in found.items():
        if not difference <= tolerance:
            sys.exit(
                f"fused: nothing is timed at {point}: {leaf} of {name!r} differs from that of the "
                f"scan in float32 by {difference:.1e} of its largest entry; rounding gives at most "
                f"{tolerance:.0e}."
            )
    return max(found.values())


def measure(point: Point, chosen: dict[str, Library], seconds: float, smoke: bool) -> Rows:
    """Compares all contenders that have this equation, then times them; a row for each."""
    problem, expected, scale = reference(point)
    fields = {**point._asdict(), **point.size._asdict()}
    del fields["size"]
    rows: dict[str, dict[str, Any]] = {}
    calls = {}
    for name, library in chosen.items():
        if not can_run(library, point.task, point.reset):
            continue
        row = rows[name] = {**fields, "contender": name, **UNTIMED}
        try:
            make = library.make(point.reset, point.size, jnp.dtype(point.dtype))
            program = make(point.task, problem, 1)
            result = program.read(program.call())
        except Exception as error:  # a compiler or a GPU may raise anything
            row["reason"] = reason_of(error)
            continue
        found = problems.differences(expected, result, {"value": scale})
        row["difference"] = require_equal(point, name, found)
        row["compile_seconds"] = program.compile_seconds
        row["temporaries_bytes"] = program.temporaries_bytes
        calls[name] = program.call
    samples = interleave(calls, seconds, **(SMOKE if smoke else {})) if calls else {}
    for name, found in samples.items():
        rows[name] |= summarize(found)
        rows[name]["us_per_step"] = 1e3 * rows[name]["median_ms"] / point.size.num_steps
    for row in rows.values():
        row["speedup_over_scan"] = ratio(rows[SCAN]["median_ms"], row["median_ms"])
    return list(rows.values())


def ratio(time: float | None, other: float | None) -> float | None:
    """time / other; None if one of them is missing."""
    return time / other if time and other else None


def reason_of(error: Exception) -> str:
    """The first line of an error, after "refused" if `gru` or its kernel raised it."""
    text = str(error).strip().partition("\n")[0][:400]
    ours = text.startswith(("gru: ", "HopperKernel: "))
    refused = ours and isinstance(error, ValueError | NotImplementedError)
    return f"refused: {text}" if refused else f"failed: {type(error).__name__}: {text}"


def by_point(rows: Rows) -> dict[Point, dict[str, dict[str, Any]]]:
    """{point: {contender: row}}, in the order of measuring."""
    points: dict[Point, dict[str, dict[str, Any]]] = {}
    for row in rows:
        size = Size(*(row[field] for field in Size._fields))
        point = Point(row["reset"], row["task"], row["dtype"], size)
        points.setdefault(point, {})[row["contender"]] = row
    return points


def speedup(found: dict[str, dict[str, Any]], other: str) -> float | None:
    """The time of another contender over the kernel's; the kernel is faster above 1."""
    return ratio(*(found.get(name, UNTIMED)["median_ms"] for name in (other, FUSED)))


def table(rows: Rows) -> str:
    """A Markdown table of microseconds per step, and the reasons of rows without a time."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    head = ["task", "reset", "dtype", "T", "B", "H", *names, "scan / fused", "torch / fused"]
    lines = [head, ["---"] * len(head)]
    for point, found in by_point(rows).items():
        steps, batch, _, hidden = map(str, point.size)
        times = [found.get(name, UNTIMED)["us_per_step"] for name in names]
        cells = [*times, *(speedup(found, other) for other in (SCAN, TORCH))]
        texts = ["-" if cell is None else f"{cell:.3g}" for cell in cells]
        lines.append([point.task, point.reset, point.dtype, steps, batch, hidden, *texts])
    title = "Microseconds per step, and the time of the scan and of torch over that of the kernel:"
    untimed = [
        f"* {point}: {row['contender']} {row['reason']}"
        for point, found in by_point(rows).items()
        for row in found.values()
        if row["reason"]
    ]
    return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in lines), "", *untimed])


def verdicts(rows: Rows) -> list[str]:
    """The range of speedups for each task, dtype and goal, and the points that miss the goal.

    A point at which the kernel refused or failed counts as missed.
    """
    lines, points = [], by_point(rows)
    groups = dict.fromkeys((point.task, point.dtype) for point in points)
    for (task, dtype), (other, largest, bound) in itertools.product(groups, GOALS):
        ratios = [
            (speedup(found, other) or 0.0, str(point))
            for point, found in points.items()
            if (point.task, point.dtype) == (task, dtype)
            and point.size.hidden_size <= largest
            and other in found
        ]
        if not ratios:
            continue
        (least, place), (most, _) = min(ratios), max(ratios)
        missed = sum(found < bound for found, _ in ratios)
        state = f"MISSED at {missed} of {len(ratios)} points" if missed else "reached"
        lines.append(
            f"{task}, {dtype}: {other} / fused is {least:.2f} ({place}) to {most:.2f}; "
            f"wanted at least {bound:g} up to H={largest}: {state}"
        )
    return lines


def describe(args: argparse.Namespace, argv: Sequence[str], chosen: dict[str, Library]):
    """The machine, the GPU, the versions, and the command."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "numpy", *(["torch"] if TORCH in chosen else []))
    return {
        "command": shlex.join(["python", "-m", "experiments.benchmarks.fused", *argv]),
        "device": device.device_kind,
        "platform": device.platform,
        **describe_machine(packages),
        **describe_gpu(),
        "jax_default_matmul_precision": jax.config.values["jax_default_matmul_precision"],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "contenders": list(chosen),
        "seconds_per_point": args.seconds,
        "smoke": args.smoke,
        "tolerances": TOLERANCES,
    }


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures, prints and writes; returns 1 if a contender failed."""
    from tqdm import tqdm

    begin, rows, chosen = time.monotonic(), [], contenders(args.smoke)
    choices = itertools.product(args.resets, args.tasks, args.dtypes, args.sizes)
    points = [Point(*choice) for choice in choices]
    about = describe(args, argv, chosen)
    out = runs.make_run_folder("benchmark_fused", str(args.out), about)
    print(f"{about['device']} ({about['platform']}); {about['cpu']}; {about['versions']}")
    for k, point in enumerate(tqdm(points, disable=None)):
        if time.monotonic() - begin > 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over; {len(points) - k} points are not measured.")
            break
        rows += measure(point, chosen, args.seconds, args.smoke)
        remaining = [str(later) for later in points[k + 1 :]]
        runs.write_json(out / "fused.json", {**about, "not_measured": remaining, "rows": rows})
        (out / "fused.md").write_text(table(rows), encoding="utf-8")
    print(table(rows), *([] if args.smoke else verdicts(rows)), f"Written to {out}.", sep="\n")
    return int(any((row["reason"] or "").startswith("failed") for row in rows))


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 if a contender failed or was wrong; 2 without a GPU or a new folder."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    # JAX must not reserve most of the GPU's memory, which torch needs too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if not args.smoke and jax.default_backend() != "gpu":
        kind = jax.devices()[0].device_kind
        return runs.fail("fused", f"JAX's first device must be a GPU, got {kind}; use --smoke.")
    return runs.run_script("fused", lambda: run(args, argv), smoke=args.smoke)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = runs.make_parser("benchmarks.fused", (__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/benchmark_fused"), metavar="FOLDER",
        help="new or empty folder (default: runs/benchmark_fused)")  # fmt: skip
    add("--sizes", type=parse_size, nargs="+", metavar="T,B,D,H",
        help="sizes to measure (default: 12 with T=512)")  # fmt: skip
    add("--resets", nargs="+", choices=RESETS, default=("after", "before"),
        help="equations: the reset gate after or before the product")  # fmt: skip
    add("--tasks", nargs="+", choices=SEQUENCES, default=SEQUENCES, help="what to measure")
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of parameters and inputs")
    add("--seconds", type=positive_number, metavar="N", help="of timing per point (default: 2)")
    add("--minutes", type=positive_number, default=1440.0, metavar="M",
        help="do not begin a point after M minutes")  # fmt: skip
    add("--smoke", action="store_true", help="one tiny size in JAX's interpreter, as a test")
    args = parser.parse_args(argv)
    args.sizes = args.sizes or ([Size(3, 2, 4, 4)] if args.smoke else SIZES)
    args.seconds = args.seconds or (0.01 if args.smoke else 2.0)
    return args


if __name__ == "__main__":
    sys.exit(main())
