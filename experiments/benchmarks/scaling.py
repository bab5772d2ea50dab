"""Measures how time and memory of a training step grow with T, B and H, for T up to a million.

    python -m experiments.benchmarks.scaling                 # ten minutes on two cores
    python -m experiments.benchmarks.scaling --reset before
    python -m experiments.benchmarks.scaling --smoke         # seconds; the times mean nothing

The training step is that of `peers` (the value and all gradients). From T=128, B=32, D=64, H=128,
either T, B or H is varied by doubling. The contenders are jaxgru with its defaults and with the
residuals "states" and "boundaries", and a plain scan under jax.grad. At each size their results are
compared before they are timed in turn. An exponent is the slope of log time against log size over
the last three points; 1 means linear.

The memory curve is for many-to-one training: the gradients of <h_last, dh_last> with respect to
params, xs and h0, at B=4, D=1, H=64. It is XLA's memory analysis of the compiled programs, which
are not run. Only at the last T, the program with "boundaries" is run once.

scaling.json and scaling.png are written to `--out`, which must be new or empty.
"""

import argparse
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import runs
from experiments.benchmarks.layers import Layer, build, our_layer, plain_layer
from experiments.benchmarks.peers import check_equal, positive_number
from experiments.benchmarks.problems import RESETS, Reset, Size, draw_problem, value_scale
from experiments.benchmarks.timing import describe_machine, interleave, summarize
from jaxgru import BPTT

AXES = {"T": "num_steps", "B": "batch_size", "H": "hidden_size"}
NAMES = {"T": "steps T", "B": "batch B", "H": "hidden size H"}
COLOURS = {
    "jaxgru": "tab:red",
    "jaxgru states": "tab:orange",
    "jaxgru boundaries": "tab:blue",
    "plain scan": "0.35",
}
LINEAR = 1.1  # the largest exponent that counts as linear
LONG_BYTES = 100e6  # the bound for temporaries at a million steps
Rows = list[dict[str, Any]]


class Plan(NamedTuple):
    """What is measured, and for how long."""

    base: Size
    doublings: dict[str, tuple[int, ...]]
    curve: tuple[int, ...]  # T of the memory curve
    long: Size  # size of the long run; the memory curve varies its T
    options: dict[str, Any]  # for interleave


def _powers(first: int, last: int) -> tuple[int, ...]:
    """(first, 2 * first, ..., last)."""
    return tuple(first << k for k in range((last // first).bit_length()))


FULL = Plan(
    Size(128, 32, 64, 128),
    {"T": _powers(32, 4096), "B": _powers(1, 512), "H": _powers(16, 1024)},
    (10**3, 10**4, 10**5, 10**6),
    Size(10**6, 4, 1, 64),
    {"min_rounds": 3},
)
SMOKE = Plan(
    Size(6, 2, 3, 4),
    {"T": (6, 12), "B": (2, 4), "H": (4, 8)},
    (20,),
    Size(20, 2, 1, 4),
    {"min_rounds": 1, "burst_seconds": 0.001, "pause_seconds": 0.0},
)


def make_layers(reset: Reset) -> dict[str, Layer]:
    """{name: contender}."""
    return {
        "jaxgru": our_layer(reset),
        "jaxgru states": our_layer(reset, BPTT("states")),
        "jaxgru boundaries": our_layer(reset, BPTT("boundaries")),
        "plain scan": plain_layer(reset, hoist=False),
    }


def points_of(plan: Plan) -> dict[tuple[str, int], Size]:
    """{(axis, count): the base size with that count on that axis}."""
    return {
        (axis, count): plan.base._replace(**{AXES[axis]: count})
        for axis, counts in plan.doublings.items()
        for count in counts
    }


def measure(size: Size, args: argparse.Namespace, plan: Plan, bar: Any) -> Rows:
    """Compares the contenders at one size, then times them; a row for each."""
    problem = draw_problem(size, args.reset, args.seed)
    bar.set_description(f"{size}: compile")
    programs = {
        name: build(layer, "training", problem) for name, layer in make_layers(args.reset).items()
    }
    results = {name: program.read(program.call()) for name, program in programs.items()}
    check_equal(results, {"value": value_scale(problem)}, str(size), "scaling")
    bar.set_description(f"{size}: measure")
    calls = {name: program.call for name, program in programs.items()}
    samples = interleave(calls, args.seconds, advance=bar.update, **plan.options)
    return [
        {
            **size._asdict(),
            "contender": name,
            **summarize(samples[name]),
            "temporaries_bytes": program.temporaries_bytes,
            "compile_seconds": program.compile_seconds,
        }
        for name, program in programs.items()
    ]


def last_state_gradients(layer: Layer):
    """A function of (params, xs, h0, dh_last) that returns the gradients of <h_last, dh_last>."""

    def value(params, xs, h0, dh_last):
        return jnp.sum(layer.run(params, xs, h0)[0] * dh_last)

    return jax.grad(value, argnums=(0, 1, 2))


def memory_curve(args: argparse.Namespace, plan: Plan, bar: Any) -> Rows:
    """The temporaries of many-to-one training for every T; no arrays are allocated."""
    rows = []
    for num_steps in plan.curve:
        size = plan.long._replace(num_steps=num_steps)
        problem = jax.eval_shape(functools.partial(draw_problem, size, args.reset, args.seed))
        arguments = (problem.params, problem.xs, problem.h0, problem.dh_last)
        for name, layer in make_layers(args.reset).items():
            bar.set_description(f"memory at T={num_steps}: compile {name}")
            compiled = jax.jit(last_state_gradients(layer)).lower(*arguments).compile()
            analysis = compiled.memory_analysis()
            count = None if analysis is None else int(analysis.temp_size_in_bytes)
            rows.append({**size._asdict(), "contender": name, "temporaries_bytes": count})
        bar.update()
    return rows


def long_run(args: argparse.Namespace, plan: Plan, bar: Any) -> dict[str, Any]:
    """Runs one compiled training step with "boundaries" at the largest T."""
    problem = draw_problem(plan.long, args.reset, args.seed)
    arguments = (problem.params, problem.xs, problem.h0, problem.dh_last)
    layer = make_layers(args.reset)["jaxgru boundaries"]
    compiled = jax.jit(last_state_gradients(layer)).lower(*arguments).compile()
    bar.set_description(f"run at T={plan.long.num_steps}")
    start = time.perf_counter()
    gradients = jax.block_until_ready(compiled(*arguments))
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    bar.update()
    return {
        **plan.long._asdict(),
        "contender": "jaxgru boundaries",
        "seconds": seconds,
        "temporaries_bytes": None if analysis is None else int(analysis.temp_size_in_bytes),
        "input_bytes": problem.xs.nbytes,
        "finite": all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradients)),
    }


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log values against log sizes over the last three points."""
    return float(np.polyfit(np.log(sizes[-3:]), np.log(values[-3:]), 1)[0])


def fit(rows: Rows) -> Rows:
    """The exponents of time and temporaries for each axis and contender."""
    found = []
    for axis, name in dict.fromkeys((row["axis"], row["contender"]) for row in rows):
        mine = [row for row in rows if (row["axis"], row["contender"]) == (axis, name)]
        sizes = [row[AXES[axis]] for row in mine]
        entry = {"axis": axis, "contender": name, "sizes": [sizes[0], sizes[-1]]}
        for field in ("median_ms", "temporaries_bytes"):
            values = [row[field] for row in mine]
            entry[f"{field}_exponent"] = exponent(sizes, values) if all(values) else None
        found.append(entry)
    return found


def judge(fits: Rows, run: dict[str, Any], plan: Plan) -> Rows:
    """The targets; `reached` is None unless the plan is the full one."""
    exponents = {(f["axis"], f["contender"]): f["median_ms_exponent"] for f in fits}
    targets = [
        {
            "claim": f"time of jaxgru at most linear in {axis}: exponent",
            "figure": exponents[axis, "jaxgru"],
            "wanted": f"at most {LINEAR}",
            "reached": exponents[axis, "jaxgru"] <= LINEAR,
        }
        for axis in ("T", "B")
    ]
    count = run["temporaries_bytes"]
    targets.append(
        {
            "claim": f"temporaries at T={run['num_steps']} beside input and its gradient, MB",
            "figure": None if count is None else count / 1e6,
            "wanted": f"below {LONG_BYTES / 1e6:g}",
            "reached": None if count is None else bool(count < LONG_BYTES and run["finite"]),
        }
    )
    return targets if plan is FULL else [{**target, "reached": None} for target in targets]


def format_target(target: dict[str, Any]) -> str:
    """A target in one line."""
    state = {True: "reached", False: "MISSED", None: "not measured"}[target["reached"]]
    figure = "" if target["figure"] is None else f" {target['figure']:.2f}"
    return f"{state:13}{target['claim']}{figure} (wanted {target['wanted']})"


def table(rows: Rows, fits: Rows, curve: Rows) -> str:
    """A table of medians and temporaries, the exponents, and the memory curve."""
    names = list(COLOURS)
    lines = ["", f"{'':14}" + "".join(f"{name:>26}" for name in names)]

    def line(label, found, show):
        cells = {row["contender"]: show(row) for row in found}
        lines.append(f"{label:14}" + "".join(f"{cells[name]:>26}" for name in names))

    for axis in AXES:
        mine = [row for row in rows if row["axis"] == axis]
        for count in dict.fromkeys(row[AXES[axis]] for row in mine):
            found = [row for row in mine if row[AXES[axis]] == count]
            line(f"{axis}={count}", found, _time_and_memory)
        found = [entry for entry in fits if entry["axis"] == axis]
        line("  exponents", found, lambda f: f"{_exponents(f)}")
    for count in dict.fromkeys(row["num_steps"] for row in curve):
        found = [row for row in curve if row["num_steps"] == count]
        line(f"T={count}", found, lambda row: f"{_megabytes(row):.2f} MB")
    return "\n".join(lines)


def _time_and_memory(row: dict[str, Any]) -> str:
    """The median time in ms and the temporaries in MB."""
    return f"{row['median_ms']:.2f} ms {_megabytes(row):7.1f} MB"


def _exponents(entry: dict[str, Any]) -> str:
    """The exponents of time and of temporaries."""
    values = (entry["median_ms_exponent"], entry["temporaries_bytes_exponent"])
    return " ".join("       -" if v is None else f"{v:8.2f}" for v in values)


def _megabytes(row: dict[str, Any]) -> float:
    """The temporaries in MB; NaN if they are not known."""
    count = row["temporaries_bytes"]
    return float("nan") if count is None else count / 1e6


def plot(rows: Rows, curve: Rows, title: str, path: Path) -> None:
    """Plots time and temporaries against T, B and H, and the memory curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(2, 2).ravel()
    for panel, axis in zip(panels, AXES):
        mine = [row for row in rows if row["axis"] == axis]
        _lines(panel, mine, AXES[axis], lambda row: row["median_ms"], "o-", "time")
        right = panel.twinx()
        _lines(right, mine, AXES[axis], _megabytes, "x:", "temporaries")
        panel.set(xlabel=NAMES[axis], ylabel="training step, ms (solid)")
        right.set(ylabel="temporaries, MB (dotted)")
    _lines(panels[3], curve, "num_steps", _megabytes, "x:", "temporaries")
    panels[3].set(xlabel="steps T", ylabel="temporaries, MB")
    panels[3].set_title("many-to-one training: gradients of h_last", fontsize=10)
    panels[3].legend(fontsize=8)
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def _lines(panel: Any, rows: Rows, field: str, value: Any, style: str, what: str) -> None:
    """Draws a line for each contender on logarithmic axes."""
    for name, colour in COLOURS.items():
        mine = [row for row in rows if row["contender"] == name]
        x, y = [row[field] for row in mine], [value(row) for row in mine]
        panel.plot(x, y, style, color=colour, label=f"{name}, {what}", markersize=4)
    panel.set_xscale("log")
    panel.set_yscale("log")
    counts = sorted({row[field] for row in rows})
    panel.set_xticks(counts, [str(count) for count in counts], fontsize=8)
    panel.set_xticks([], minor=True)
    panel.grid(alpha=0.2)


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Measures, prints and writes."""
    from tqdm import tqdm

    plan, device = SMOKE if args.smoke else FULL, jax.devices()[0]
    about = {
        "command": shlex.join(["python", "-m", "experiments.benchmarks.scaling", *argv]),
        "device": device.device_kind,
        "platform": device.platform,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **describe_machine(("jax", "jaxlib", "numpy")),
        "reset": args.reset,
        "seed": args.seed,
    }
    out = runs.make_run_folder("benchmark_scaling", str(args.out), about)
    title = f"GRU, reset {args.reset}, float32; {device.device_kind} device; {about['cpu']}, "
    title += f"{about['cores']} cores; jax {about['versions']['jax']}; {about['date']}"
    print(title)
    points = points_of(plan)
    sizes = dict.fromkeys(points.values())  # the base is a point of every axis, measured once
    total, layout = len(sizes) + len(plan.curve) + 1, "{desc} {percentage:3.0f}%|{bar}| {elapsed}"
    with (
        jax.default_matmul_precision("highest"),
        tqdm(total=total, bar_format=layout, disable=None) as bar,
    ):
        found = {size: measure(size, args, plan, bar) for size in sizes}
        curve, longest = memory_curve(args, plan, bar), long_run(args, plan, bar)
    rows = [{"axis": axis, **row} for (axis, _), size in points.items() for row in found[size]]
    fits = fit(rows)
    judged = judge(fits, longest, plan)
    results = {"targets": judged, "fits": fits, "long_run": longest, "memory": curve, "rows": rows}
    text = json.dumps({**about, **results}, indent=1)
    (out / "scaling.json").write_text(text + "\n", encoding="utf-8")
    plot(rows, curve, title, out / "scaling.png")
    print(table(rows, fits, curve))
    print(f"One run at T={longest['num_steps']}, boundaries: {longest['seconds']:.1f} s.")
    print(*map(format_target, judged), f"Wrote {out}.", sep="\n", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 if the folder cannot be used; raises SystemExit if contenders disagree."""
    argv = sys.argv[1:] if argv is None else argv
    parser = runs.make_parser("benchmarks.scaling", (__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/benchmark_scaling"), metavar="FOLDER",
        help="new or empty folder (default: runs/benchmark_scaling)")  # fmt: skip
    add("--reset", choices=RESETS, default="after",
        help="equation: the reset gate before or after the product")  # fmt: skip
    add("--seconds", type=positive_number, metavar="N", help="of timing per size (default: 5)")
    add("--seed", type=int, default=0, help="of the random numbers")
    add("--smoke", action="store_true", help="a tiny run of seconds that tests the script")
    args = parser.parse_args(argv)
    args.seconds = args.seconds or (0.01 if args.smoke else 5.0)
    return runs.run_script("scaling", lambda: run(args, argv), smoke=args.smoke)


if __name__ == "__main__":
    sys.exit(main())
