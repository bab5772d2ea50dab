"""Compares the speed and memory of jaxgru with those of other GRU implementations.

    python -m experiments.benchmarks.peers                       # everything: 25 minutes
    python -m experiments.benchmarks.peers --tasks training --sizes 64,32,64,64 --reset after
    python -m experiments.benchmarks.peers --contenders jaxgru "plain scan" --chunks 8 16 32 whole
    python -m experiments.benchmarks.peers --smoke               # seconds; the times mean nothing

Tasks:

* training: the value and all gradients (weights, xs, h0) of <h_last, dh_last> + <hs, dhs>.
* padded, padded-short: training on sequences of 1 to T and 1 to T // 5 steps in a batch of T steps,
  by each library's own masks or lengths. "jaxgru, cut to the longest" gets the same batch without
  the steps that are padding in every sequence; it compiles again for each length.
* forward: h_last and hs.
* step: single steps at batch 1, called from Python; each gets the state of the step before. The
  time is that of one step.
* generation: greedy generation of 1000 characters at batch 1, by jaxgru.models.generate, by one
  jitted scan over the cell of a JAX library, and by the fastest of three loops in eager torch.

The contenders are jaxgru with its defaults and with each other choice of `residuals` and
`gradient`, two plain scans under jax.grad, Flax linen and nnx, Equinox, Haiku, Keras (on JAX) and
torch.nn.GRU. Each chunk size in `--chunks` adds another contender. All have the same weights. With
reset after, the candidate block of b_h is zero, as Flax nnx has no such bias. "matmul limit" is not
a GRU, but the same number of floating-point operations in large matrix products.

Nothing is timed until the results of all contenders equal jaxgru's, in float32 with full precision.
In bfloat16 or TF32 each library rounds in different places, so there the results need not be equal.
The table then gives the error of each contender relative to the float32 result beside its time.
Each contender uses its library's own functions, on arrays in its own layout. Contenders are timed
in turn; compilation is timed separately.

peers.json (every figure), peers.md and peers.png are written to `--out`, which must be new or
empty. At the end the script prints which targets are reached, missed or not measured.
"""

import argparse
import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import runs
from experiments.benchmarks import libraries, report, targets
from experiments.benchmarks.libraries import LIBRARIES, OURS, TORCH, Library, can_run
from experiments.benchmarks.problems import (
    DIVISORS,
    GENERATION_SIZE,
    PADDED_SIZE,
    RESETS,
    SIZES,
    SMOKE_SIZES,
    STEP_SIZE,
    TASKS,
    TOLERANCE,
    Problem,
    Program,
    Reset,
    Result,
    Size,
    Task,
    cast,
    differences,
    draw_model,
    draw_padded,
    draw_problem,
    limit_program,
    relative_error,
    value_scale,
)
from experiments.benchmarks.timing import describe_machine, interleave, summarize

PACKAGES = ("jax", "jaxlib", "numpy")
PRECISIONS = {"highest": "highest", "tf32": "tensorfloat32"}  # JAX's names
SMOKE: dict[str, Any] = {"min_rounds": 1, "burst_seconds": 0.001, "pause_seconds": 0.0}
SMOKE_CONTENDERS = [OURS, "plain scan", TORCH]
Rows = list[dict[str, Any]]
Group = tuple[Task, Reset, Size]


def measure(group: Group, chosen: dict[str, Library], args: argparse.Namespace, bar: Any) -> Rows:
    """Compares all contenders that support the task, then times them and the limit; a row each."""
    task, reset, size = group
    chosen = {name: lib for name, lib in chosen.items() if can_run(lib, task, reset)}
    programs, found, errors = compare(group, chosen, args, bar)
    with jax.default_matmul_precision(PRECISIONS[args.precision]):
        if task in ("training", "forward"):
            programs[targets.LIMIT] = limit_program(size, task, args.seed, jnp.dtype(args.dtype))
        bar.set_description(f"{where(group)}: measure")
        calls = {name: program.call for name, program in programs.items()}
        options = SMOKE if args.smoke else {}
        samples = interleave(calls, args.seconds, advance=bar.update, **options)
    rows = [
        make_row(group, name, program, samples[name], found.get(name), errors.get(name))
        for name, program in programs.items()
    ]
    return with_ratios(rows)


def compare(
    group: Group, chosen: dict[str, Library], args: argparse.Namespace, bar: Any
) -> tuple[dict[str, Program], dict[str, float], dict[str, float]]:
    """(programs to time, their differences in float32, the errors of the programs to time)."""
    plain = (args.dtype, args.precision) == ("float32", "highest")
    exact = make_problem(group, args)
    with jax.default_matmul_precision("highest"):
        libraries.set_tf32(chosen, False)
        compiles = args.compiles if plain else 1
        programs = make_programs(group, chosen, exact, jnp.float32, compiles, bar)
        results = {name: program.read(program.call()) for name, program in programs.items()}
    scales = {"value": value_scale(exact)} if isinstance(exact, Problem) else {}
    found = check_equal(results, scales, where(group))
    if plain:
        return programs, found, {}
    del programs
    with jax.default_matmul_precision(PRECISIONS[args.precision]):
        dtype = jnp.dtype(args.dtype)
        libraries.set_tf32(chosen, args.precision == "tf32")
        programs = make_programs(group, chosen, cast(exact, dtype), dtype, args.compiles, bar)
        errors = {
            name: relative_error(results[OURS], program.read(program.call()))
            for name, program in programs.items()
        }
    return programs, found, errors


def where(group: Group) -> str:
    """The group as text."""
    task, reset, size = group
    return f"{task}, reset {reset}, {size}"


def make_problem(group: Group, args: argparse.Namespace) -> Any:
    """The arrays of a task in float32, rounded to the dtype in which it is timed."""
    task, reset, size = group
    draws = {"generation": draw_model, **{of: partial(draw_padded, of) for of in DIVISORS}}
    problem = draws.get(task, draw_problem)(size, reset, args.seed)
    return cast(cast(problem, jnp.dtype(args.dtype)), jnp.float32)


def make_programs(
    group: Group, chosen: dict[str, Library], problem: Any, dtype: Any, compiles: int, bar: Any
) -> dict[str, Program]:
    """{name: program}; only the compilation of training steps is repeated."""
    task, reset, size = group
    compiles = compiles if task == "training" else 1
    programs = {}
    for name, library in chosen.items():
        bar.set_description(f"{where(group)}: compile {name}")
        programs[name] = library.make(reset, size, dtype)(task, problem, compiles)
    return programs


def check_equal(
    results: dict[str, Result], scales: dict[str, float], place: str, command: str = "peers"
) -> dict[str, float]:
    """{name: largest relative difference from jaxgru's result}.

    Raises:
      SystemExit: a difference is above TOLERANCE, or NaN.
    """
    worst = {}
    for name, result in results.items():
        found = differences(results[OURS], result, scales)
        for leaf, difference in found.items():
            if not difference <= TOLERANCE:
                sys.exit(
                    f"{command}: nothing is timed at {place}: {leaf} of {name!r} differs from that "
                    f"of {OURS!r} by {difference:.1e} of its largest entry; rounding gives at most "
                    f"{TOLERANCE:.0e}."
                )
        worst[name] = max(found.values())
    return worst


def make_row(
    group: Group,
    name: str,
    program: Program,
    samples: list[float],
    difference: float | None,
    error: float | None,
) -> dict[str, Any]:
    """The row of one contender."""
    task, reset, size = group
    times = summarize([seconds / program.repeats for seconds in samples])
    per_second = 1e3 * size.num_steps / times["median_ms"]
    return {
        "task": task,
        "reset": reset,
        **size._asdict(),
        "contender": name,
        **times,
        "characters_per_second": per_second if task == "generation" else None,
        "temporaries_bytes": program.temporaries_bytes,
        "compile_seconds": program.compile_seconds,
        "difference": difference,
        "error": error,
        "note": program.note,
    }


def with_ratios(rows: Rows) -> Rows:
    """Adds to every row its time and its temporaries relative to jaxgru's."""
    ours = next(row for row in rows if row["contender"] == OURS)

    def ratio(row, field):
        return row[field] / ours[field] if row[field] and ours[field] else None

    return [
        {
            **row,
            "ratio": ratio(row, "median_ms"),
            "temporaries_ratio": None
            if row["contender"] == targets.LIMIT
            else ratio(row, "temporaries_bytes"),
        }
        for row in rows
    ]


def describe(args: argparse.Namespace, argv: list[str], chosen: dict[str, Library]):
    """The machine, the libraries and the options."""
    device = jax.devices()[0]
    return {
        "command": shlex.join(["python", "-m", "experiments.benchmarks.peers", *argv]),
        "device": device.device_kind,
        "platform": device.platform,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **describe_machine((*PACKAGES, *libraries.versions_of(chosen))),
        "contenders": list(chosen),
        "dtype": args.dtype,
        "precision": args.precision,
        "seed": args.seed,
        "seconds_per_group": args.seconds,
        "tolerance": TOLERANCE,
    }


def groups_of(args: argparse.Namespace) -> list[Group]:
    """Every task with every equation and size."""
    single = {"step": STEP_SIZE, "generation": GENERATION_SIZE}
    if args.smoke:
        single = {"step": Size(1, 1, 3, 4), "generation": Size(9, 1, 3, 4)}
    single |= dict.fromkeys(DIVISORS, SMOKE_SIZES[0] if args.smoke else PADDED_SIZE)
    return [
        (task, reset, size)
        for task in args.tasks
        for reset in args.reset
        for size in ((single[task],) if task in single else args.sizes)
    ]


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Measures, prints and writes; with --draw it only draws."""
    from tqdm import tqdm

    if args.draw is not None:
        found = json.loads(args.draw.read_text("utf-8"))
        report.plot(found["rows"], title_of(found), args.draw.with_suffix(".png"))
        return 0
    chosen = libraries.choose(args.contenders, args.chunks)
    about = describe(args, argv, chosen)
    out = runs.make_run_folder("benchmark_peers", str(args.out), about)
    print(title_of(about))
    groups, rows = groups_of(args), []
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=len(groups), bar_format=layout, disable=None) as bar:
        for group in groups:
            found = measure(group, chosen, args, bar)
            rows += found
            tqdm.write(report.group_table(found))
            sys.stdout.flush()
            write(out, about, rows)
    report.plot(rows, title_of(about), out / "peers.png")
    print(f"\nWrote {out / 'peers.json'}, peers.md and peers.png. Targets:")
    for target in targets.judge(rows):
        print(target)
    sys.stdout.flush()
    return 0


def title_of(about: dict[str, Any]) -> str:
    """The machine, version, dtype and date."""
    machine = f"{about['device']} device; {about['cpu']}, {about['cores']} cores"
    return f"{machine}; jax {about['versions']['jax']}; {about['dtype']}; {about['date'][:10]}"


def write(out: Path, about: dict[str, Any], rows: Rows) -> None:
    """Writes the rows measured so far."""
    judged = [target._asdict() for target in targets.judge(rows)]
    text = json.dumps({**about, "targets": judged, "rows": rows}, indent=1)
    (out / "peers.json").write_text(text + "\n", encoding="utf-8")
    (out / "peers.md").write_text(report.markdown(rows), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 if the folder cannot be used; raises SystemExit if contenders disagree."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    return runs.run_script("peers", lambda: run(args, argv), smoke=args.smoke)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parses the options; with --smoke the defaults are smaller."""
    parser = runs.make_parser("benchmarks.peers", (__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/benchmark_peers"), metavar="FOLDER",
        help="new or empty folder (default: runs/benchmark_peers)")  # fmt: skip
    add("--draw", type=Path, metavar="FILE",
        help="draw the figures of this peers.json beside it, and measure nothing")  # fmt: skip
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to measure")
    add("--reset", nargs="+", choices=RESETS,
        help="equations: the reset gate before or after the product (default: both)")  # fmt: skip
    add("--sizes", type=parse_size, nargs="+", metavar="T,B,D,H",
        help="for training and forward (default: seven sizes)")  # fmt: skip
    add("--contenders", type=parse_contender, nargs="+", metavar="NAME",
        help="libraries and variants to measure (default: all)")  # fmt: skip
    add("--chunks", type=parse_chunk, nargs="+", default=[], metavar="N",
        help="chunk sizes of jaxgru, or 'whole' for the whole sequence")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of parameters and inputs")  # fmt: skip
    add("--precision", choices=("highest", "tf32"), default="highest", help="of float32 products")
    add("--seconds", type=positive_number, metavar="N", help="of timing per size (default: 20)")
    add("--compiles", type=parse_count, metavar="N",
        help="compilations of each training step (default: 3)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the random numbers")
    add("--smoke", action="store_true", help="a tiny run of seconds that tests the script")
    args = parser.parse_args(argv)
    args.sizes = args.sizes or (SMOKE_SIZES if args.smoke else SIZES)
    args.reset = args.reset or (["after"] if args.smoke else list(RESETS))
    args.contenders = args.contenders or (SMOKE_CONTENDERS if args.smoke else list(LIBRARIES))
    args.seconds = args.seconds or (0.05 if args.smoke else 20.0)
    args.compiles = args.compiles or (1 if args.smoke else 3)
    return args


def positive_number(text: str) -> float:
    """A finite number above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return float(text)


def parse_count(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def parse_size(text: str) -> Size:
    """A size T,B,D,H."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must be four positive integers T,B,D,H, got {text!r}")
    return Size(*map(int, parts))


def parse_chunk(text: str) -> int | None:
    """A chunk size; None for the whole sequence."""
    return None if text == "whole" else parse_count(text)


def parse_contender(text: str) -> str:
    """A key of LIBRARIES."""
    if text not in LIBRARIES:
        known = ", ".join(map(repr, LIBRARIES))
        raise argparse.ArgumentTypeError(f"must be one of {known}; got {text!r}")
    return text


if __name__ == "__main__":
    sys.exit(main())
