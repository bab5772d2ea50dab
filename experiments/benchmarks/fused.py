"""The fused kernels beside the scan and torch.nn.GRU, which is cuDNN on a GPU: us a step.

    python -m experiments.benchmarks.fused --minutes 9 --out runs/fused     # most telling first
    python -m experiments.benchmarks.fused --minutes 9 --resume runs/fused  # what is missing
    python -m experiments.benchmarks.fused --flags-only --minutes 5 --out runs/flags
    python -m experiments.benchmarks.fused --report runs/fused   # of a run that was ended
    python -m experiments.benchmarks.fused --smoke               # two minutes, figures worthless

Measured, in this order: the device's limits (one large copy, large products); the scan under flags
of XLA, in child processes (`fused_flags`; a quarter of the minutes); then, point by point, forward
and training (value and all gradients: params, xs, h0) by

* scan: gru by its defaults; scan unrolled: unroll=8; scan states: residuals="states";
* torch.nn.GRU, eager, on the same device with the same weights; reset after alone;
* fused, fused gates: backend="fused" with residuals "states" and "gates".

The input size is H. params and data have the dtype that is named. float32 products have the
precision that JAX and torch give them unless told, which on a GPU is TF32 for the scan and for
cuDNN; the kernels make them of three products in bfloat16. Nothing is timed before its results are
within TOLERANCES (`fused_points`) of the scan's in float32 with full products; each row has its
difference. A contender that refuses a size, fails, is wrong or is not installed has a row that says
so in place of a time, and the others go on.

All of a point are timed in turn, in one process. A timed call is one call of the compiled function
that waits for the device, so the cost of dispatching it (some tens of us) is in every figure alike;
compilation is not. us a step are the median over T. matmul and memory are shares: the part of the
time for which the products alone would take at the measured rate, or the bytes of inputs and
outputs at that of the copy.

fused.json is written anew after every point, with what has not been reached. A point that takes
longer than `--patience` ends the process; when resumed, a point that ended one is tried last.
Options in the order of measuring: T outermost, then reset, task, dtype, B and H. Written
besides: fused.md and a picture for each reset and T. The verdicts are printed last.
"""

import argparse
import contextlib
import faulthandler
import functools
import hashlib
import importlib.resources
import importlib.util
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from experiments import runs
from experiments.benchmarks import fused_flags, fused_points, fused_report, limits
from experiments.benchmarks.fused_points import Grid, Point, Rows, attempt, contenders, point_of
from experiments.benchmarks.libraries import TORCH, Library, can_run
from experiments.benchmarks.peers import parse_count, positive_number
from experiments.benchmarks.problems import RESETS
from experiments.benchmarks.timing import describe_gpu, describe_machine, interleave, summarize
from experiments.data import DataError

SMOKE: dict[str, Any] = {"min_rounds": 1, "burst_seconds": 0.001, "pause_seconds": 0.0}
FLAGS_SHARE = 0.25  # of the minutes, unless they are for nothing else
RESULTS = "fused.json"
# What must be the same for figures to stand in one table.
SAME = ("device", "versions", "source", "precision", "xla_flags", "seed", "contenders", "smoke")


class Record:
    """Everything measured so far, and its file."""

    def __init__(self, folder: Path, about: dict[str, Any], points: Sequence[Point]):
        self.folder, self.about, self.points = folder, about, list(points)
        self.cases: list[fused_flags.Case] = []
        self.limits: dict[str, Any] | None = None
        self.rows: Rows = []
        self.flags: Rows = []
        self.underway: list[Point] = []  # points that a process has begun and not finished

    def take(self, found: dict[str, Any]) -> None:
        """The results of a file."""
        self.limits, self.rows, self.flags = found["limits"], found["rows"], found["flags"]
        self.underway = [point_of(entry) for entry in found["underway"]]

    def pending(self) -> list[Point]:
        """What is still to be measured, in order; what ended a process comes last."""
        known = {point_of(row) for row in self.rows}
        left = [point for point in self.points if point not in known]
        return sorted(left, key=lambda point: point in self.underway)

    def not_reached(self) -> list[str]:
        """Points and cases of flags, in words."""
        flags = fused_flags.missing(self.cases, self.flags)
        named = [f"flags {name}: {case.point}, {case[1:]}" for name, case in flags]
        return [*map(str, self.pending()), *named]

    def complete_rows(self) -> Rows:
        """With ratios and shares."""
        return fused_report.with_ratios(self.rows, self.limits)

    def targets(self) -> list[Any]:
        """Held against the rows; a smoke run measures nothing."""
        return fused_report.judge([] if self.about["smoke"] else self.rows)

    def save(self) -> None:
        """The file, whole or as it was before."""
        rows = self.complete_rows()
        found = {
            **self.about,
            "not_reached": self.not_reached(),
            "underway": [point.fields() for point in self.underway],
            "limits": self.limits,
            "targets": [target._asdict() for target in self.targets()],
            "flags": fused_flags.compare_flags(self.flags),
            "rows": rows,
        }
        runs.write_json(self.folder / RESULTS, found)
        runs.replace_text(self.folder / "fused.md", fused_report.markdown(rows))


def measure_points(
    record: Record, measure: Callable[[Point], Rows], left: Callable[[], float]
) -> None:
    """Point by point, each written when it is measured, as long as time is left."""
    for point in record.pending():
        if left() <= 0:
            break
        if point not in record.underway:
            record.underway.append(point)
        record.save()
        record.rows += measure(point)
        record.underway.remove(point)
        record.save()


def measure(
    point: Point,
    chosen: dict[str, Library],
    unusable: dict[str, str],
    args: argparse.Namespace,
    bar: tqdm,
) -> Rows:
    """A row for each contender that has the task and the equation: compared, timed in turn."""
    bar.set_description(f"{point}: exact results")
    exact = fused_points.exact_results(point.reset, point.dtype, point.size, args.seed)
    problem = jax.tree.map(jnp.asarray, exact.problem)
    trials = {}
    for name, library in chosen.items():
        if not can_run(library, point.task, point.reset):
            continue
        bar.set_description(f"{point}: {name}")
        if name in unusable:
            trials[name] = fused_points.Trial(None, None, unusable[name])
        else:
            trials[name] = attempt(name, library, point, problem, exact)
    bar.set_description(f"{point}: measure")
    calls = {name: trial.program.call for name, trial in trials.items() if trial.program}
    samples: dict[str, list[float]] = {}
    if calls:
        options = SMOKE if args.smoke else {}
        samples = interleave(calls, args.seconds, advance=bar.update, **options)
    else:
        bar.update()
    times = {name: summarize(found) for name, found in samples.items()}
    return fused_points.make_rows(point, trials, times)


@contextlib.contextmanager
def watched(seconds: float) -> Iterator[None]:
    """Ends the process, saying where it is, if what is inside takes longer: a kernel may hang."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # standard error
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def describe(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """The machine, the GPU, the versions, and what was asked for."""
    device = jax.devices()[0]
    torch = importlib.util.find_spec("torch") is not None
    machine = describe_machine(("jax", "jaxlib", "numpy", *(["torch"] if torch else [])))
    command = shlex.join(["python", "-m", "experiments.benchmarks.fused", *argv])
    return {
        "commands": [{"command": command, "date": machine.pop("date")}],
        "device": device.device_kind,
        "platform": device.platform,
        "platform_version": getattr(device.client, "platform_version", None),
        **machine,
        **describe_gpu(),
        "source": source_digest(),
        "precision": {
            "jax_default_matmul_precision": jax.config.values["jax_default_matmul_precision"],
            **(describe_torch() if torch else {}),
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "preallocate": os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE"),
        "contenders": args.contenders,
        "seed": args.seed,
        "seconds": args.seconds,
        "smoke": args.smoke,
        "tolerances": fused_points.TOLERANCES,
        "tolerance_of_torch": f"{fused_points.OTHERS} times that",
    }


def describe_torch() -> dict[str, Any]:
    """What torch's products are rounded to, and its CUDA and cuDNN."""
    torch = importlib.import_module("torch")
    return {
        "torch_cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "torch_matmul_allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "torch_cuda": torch.version.cuda,
        "torch_cudnn": torch.backends.cudnn.version(),
        "torch_sees_gpu": torch.cuda.is_available(),
    }


def source_digest() -> str:
    """Of the package's files: kernels that have changed are another contender."""
    digest = hashlib.sha256()
    package = importlib.resources.files("jaxgru")
    for path in sorted(package.iterdir(), key=lambda path: path.name):
        if not path.name.endswith(".py"):
            continue
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def say(text: str) -> None:
    """Prints beside the progress bar, at once: the process may be ended."""
    tqdm.write(text)
    sys.stdout.flush()


def read_results(option: str, folder: Path) -> dict[str, Any]:
    """What is in a folder's file.

    Raises:
      DataError: there is none, or it is another's.
    """
    try:
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        missing = {*SAME, "commands", "limits", "rows", "flags", "underway"} - set(found)
        if missing:
            raise ValueError(f"it has no {sorted(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{option} must be a folder with the {RESULTS} of this benchmark, got {folder}: "
            f"{error}; make one with --out"
        ) from error
    return found


def open_record(args: argparse.Namespace, argv: Sequence[str]) -> Record:
    """A new folder, or with --resume one that has results of the same device and versions."""
    about = describe(args, argv)
    grid = Grid(args.steps, args.resets, args.tasks, args.dtypes, args.batch, args.hidden)
    points = [] if args.flags_only else grid.points()
    if args.resume is None:
        folder = runs.make_run_folder("benchmark_fused", str(args.out), about)
        record = Record(folder, about, points)
    else:
        found = read_results("--resume", args.resume)
        for name in SAME:
            if found[name] != about[name]:
                raise DataError(
                    f"--resume must be of the same {name}, got {found[name]!r} in {args.resume} "
                    f"and {about[name]!r} here; begin another with --out"
                )
        about["commands"] = [*found["commands"], *about["commands"]]
        record = Record(args.resume, about, points)
        record.take(found)
    if not args.no_flags:
        sizes = fused_flags.SMOKE_SIZES if args.smoke else fused_flags.SIZES
        record.cases = fused_flags.cases_of(sizes)[: 1 if args.smoke else None]
    record.save()
    return record


def measure_limits(record: Record, args: argparse.Namespace, bar: tqdm) -> None:
    """Once a record: the machine is the same when it is resumed."""
    bar.set_description("limits")
    if record.limits is None:
        sizes = limits.SMOKE if args.smoke else limits.FULL
        record.limits = limits.measure_limits(sizes, args.seed)
        record.save()
    bar.update()
    say(fused_report.limits_line(record.limits))


def measure_flags(
    record: Record, args: argparse.Namespace, bar: tqdm, left: Callable[[], float]
) -> None:
    """The scan in child processes, for its share of the time."""
    end = 0.0 if args.flags_only else left() * (1 - FLAGS_SHARE)
    options = SMOKE if args.smoke else {}
    settings = fused_flags.Settings(args.seed, min(args.seconds, 0.5), options)

    def ask(flags, cases, budget):
        bar.set_description(f"scan, XLA_FLAGS={flags or '(none)'}")
        return fused_flags.ask_child(flags, cases, budget, settings, args.patience)

    record.flags += fused_flags.measure_flags(record.cases, record.flags, ask, lambda: left() - end)
    record.save()
    bar.update()
    say(fused_report.flags_table(fused_flags.compare_flags(record.flags)))


def report(folder: Path) -> int:
    """Prints and draws what a folder has, measuring nothing: after a run that was ended."""
    found = read_results("--report", folder)
    record = Record(folder, found, [])
    record.take(found)
    return finish(record, found["not_reached"])


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures, prints, writes; 1 where a contender failed or was wrong."""
    if args.report is not None:
        return report(args.report)
    begin = time.monotonic()
    record = open_record(args, argv)
    print(headline(record.about))

    def left() -> float:
        return 60 * args.minutes - (time.monotonic() - begin)

    chosen = contenders("interpreted" if args.smoke else "fused")
    chosen = {name: chosen[name] for name in args.contenders}
    reason = fused_points.why_no_torch()
    unusable = {} if reason is None else {TORCH: reason}
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    total = len(record.pending()) + 1 + (not args.no_flags)
    with tqdm(total=total, bar_format=layout, disable=None) as bar:
        with watched(args.patience):
            measure_limits(record, args, bar)
        if not args.no_flags:
            measure_flags(record, args, bar, left)

        def measure_one(point: Point) -> Rows:
            with watched(args.patience):
                rows = measure(point, chosen, unusable, args, bar)
            say(fused_report.point_line(fused_report.with_ratios(rows, record.limits)))
            return rows

        measure_points(record, measure_one, left)
    return finish(record, record.not_reached())


def headline(about: dict[str, Any]) -> str:
    """The device and versions in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['device']} ({about['platform']}); {about['cpu']}; {versions}"


def finish(record: Record, left: Sequence[str]) -> int:
    """Tables, pictures, what was not reached, and the verdicts."""
    rows, title = record.complete_rows(), headline(record.about)
    for found in fused_report.group(rows, fused_report.key_of).values():
        print(fused_report.table(found))
    for (reset, num_steps), found in fused_report.group(
        rows, lambda row: (row["reset"], row["num_steps"])
    ).items():
        path = record.folder / f"fused_{reset}_T{num_steps}.png"
        fused_report.plot(found, f"reset {reset}, T={num_steps}\n{title}", path)
    print(
        "", f"Not reached: {len(left) or 'nothing, all that was asked for is measured'}", sep="\n"
    )
    for name in left:
        print(f"  {name}")
    print(
        f"In {record.folder}: {RESULTS}, fused.md and pictures. Verdicts:",
        *record.targets(),
        sep="\n",
    )
    bad = [r for r in (*rows, *fused_flags.compare_flags(record.flags)) if is_fault(r)]
    if bad:
        print(f"{len(bad)} rows failed or were wrong; their reasons stand below the tables.")
    sys.stdout.flush()
    return 1 if bad else 0


def is_fault(row: dict[str, Any]) -> bool:
    """Whether it should have been timed: a refusal and a library that is not here are no faults."""
    return bool(row["reason"]) and row["reason"].startswith(("failed", "wrong"))


def main(argv: list[str] | None = None) -> int:
    """0; 1 where a contender failed or was wrong; 2 where the folder cannot be used."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    # JAX reads it when it first looks for devices, which is below. It would else take most of the
    # GPU's memory at once, and leave too little for torch and for the child processes.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if not (args.smoke or args.report) and jax.default_backend() != "gpu":
        print(
            f"fused: JAX's first device must be a GPU, got {jax.devices()[0].device_kind}; "
            "pip install 'jax[cuda13]' where there is one, --smoke runs anywhere.",
            file=sys.stderr,
        )
        return 2
    return runs.run_script("fused", functools.partial(run, args, argv))


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The options; --smoke shrinks what is not given."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.fused",
        description=(__doc__ or "").partition("\n")[0],
    )
    add, known, full = parser.add_argument, list(contenders("fused")), fused_points.FULL
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--out", type=Path, default=Path("runs/benchmark_fused"), metavar="FOLDER")
    folder.add_argument("--resume", type=Path, metavar="FOLDER", help="measure what is missing")
    folder.add_argument("--report", type=Path, metavar="FOLDER", help="print and draw it again")
    flags = parser.add_mutually_exclusive_group()
    flags.add_argument("--flags-only", action="store_true", help="no points: the scan alone")
    flags.add_argument("--no-flags", action="store_true", help="points alone")
    add("--steps", type=parse_count, nargs="+", metavar="T", help="(default 512 1024)")
    add("--resets", nargs="+", choices=RESETS, default=full.resets)
    add("--tasks", nargs="+", choices=full.tasks, default=full.tasks)
    add("--dtypes", nargs="+", choices=full.dtypes, default=full.dtypes)
    add("--batch", type=parse_count, nargs="+", metavar="B", help="(default 64 1 128 16)")
    add("--hidden", type=parse_count, nargs="+", metavar="H", help="(default 256 64 512 128)")
    add("--contenders", nargs="+", choices=known, default=known)
    add("--minutes", type=positive_number, default=1440.0, metavar="M", help="then no more points")
    add("--seconds", type=positive_number, metavar="N", help="for all of a point (default 2)")
    add("--patience", type=positive_number, default=180.0, metavar="N", help="seconds for a point")
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="tiny, interpreted: does it run?")
    args = parser.parse_args(argv)
    small = fused_points.SMOKE if args.smoke else full
    for name in ("steps", "batch", "hidden"):
        setattr(args, name, getattr(args, name) or list(getattr(small, name)))
    args.seconds = args.seconds or (0.01 if args.smoke else 2.0)
    return args


if __name__ == "__main__":
    sys.exit(main())
