"""Counts what a GPU or TPU would run of each GRU, on a machine that has neither.

    python -m experiments.benchmarks.compiled --devices h100 --check    # with JAX's CUDA plugin
    python -m experiments.benchmarks.compiled --devices v5e v6e         # with libtpu
    python -m experiments.benchmarks.compiled --contenders jaxgru --again

JAX compiles ahead of time for a device of which it has only a description. **Counts are not
times**, and XLA chooses some kernels by timing them on the device, which is not possible here.
`peers` measures times; the programs are those of its tasks "training" and "forward". Figures are of
the whole program, divided by T, but temporaries are in MB.

* GPU: launches (products, elementwise kernels, kernels that only add 1 to the counter of a loop,
  copies), and host launches: what the host starts, where a CUDA graph is one, whatever it contains.
* TPU: operations except those on scalars, libtpu's estimate of their cycles, and their VLIW
  bundles (instructions of the schedule; a loop inside of an operation counts once).

Each run adds to the results in `--out` and measures nothing twice without `--again`, for no
environment holds all compilers. `--check` exits 1 where a peer costs over 5 % less than jaxgru by
its defaults in some column and at most 5 % more in every other, and where anything is missing or
failed to compile. Less memory for more launches is a choice: the tables show it.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jaxgru
from experiments import hopper, runs
from experiments.benchmarks import compiled_text
from experiments.benchmarks.compiled_text import PLACES
from experiments.benchmarks.layers import build, plain_layer
from experiments.benchmarks.libraries import GATES, JAX_PEERS, OURS, TASKS, Library, ours
from experiments.benchmarks.problems import RESETS, Size, cast, draw_problem, training_step
from experiments.benchmarks.report import COLOURS
from experiments.data import DataError
from jaxgru import BPTT, Autodiff, Noise, Tangent

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "libtpu", "flax", "dm-haiku",
            "equinox", "keras")  # fmt: skip
NUM_STEPS, BATCH_SIZE, TINY = 512, 32, Size(48, 16, 24, 64)
DTYPES = ("float32", "bfloat16")
TITLE = f"T = {NUM_STEPS}, B = {BATCH_SIZE}, I = H; counts a step of compiled programs, not times"
GPU, TPU = ("launches", "host launches"), ("bundles", "cycles", "operations")
COLUMNS = {"h100": GPU, "v5e": TPU, "v6e": TPU}


def _unrolled(reset, size, dtype):
    """The hoisted plain scan with eight steps in an iteration of its loop."""
    layer = plain_layer(reset, hoist=True)

    def run(*arguments):
        with mock.patch.object(lax, "scan", functools.partial(lax.scan, unroll=8)):
            return layer.run(*arguments)

    return functools.partial(build, layer._replace(run=run))


PEERS = {**JAX_PEERS, "plain scan, hoisted, unroll 8": Library(_unrolled)}
CONTENDERS: dict[str, Library] = {
    OURS: ours(TASKS),
    "jaxgru states, one chunk": ours(TASKS, BPTT("states", chunk_size=NUM_STEPS)),
    GATES: ours(TASKS, BPTT("gates")),
    **PEERS,
}


def describe(device: str, dump: str) -> SingleDeviceSharding:
    """Where programs are placed; libtpu writes schedules into `dump`. ImportError without it."""
    os.environ["KERAS_BACKEND"] = "jax"
    if device == "h100":
        return SingleDeviceSharding(hopper.describe_device())
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("libtpu must be installed, got none; pip install 'jax[tpu]'.")
    jax.config.update("jax_platforms", "cpu")  # of the weights; a TPU would be looked for otherwise
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
    flags = {"to": dump, "llo_text": "true", "llo_pass_label_regex": ".*final_bundles.*"}
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(f"--xla_jf_dump_{k}={v}" for k, v in flags.items())
    host = topologies.get_topology_desc(platform="tpu", topology_name=f"{device}:2x2")
    return SingleDeviceSharding(host.devices[0])


def make_program(library: Library, cell: str) -> tuple[Callable[..., Any], tuple]:
    """(function, arguments) of a task, as in `peers`."""
    dtype, hidden, task, reset = cell.split()
    size = Size(NUM_STEPS, BATCH_SIZE, int(hidden), int(hidden))
    problem = cast(draw_problem(size, reset, 0), jnp.dtype(dtype))  # pyright: ignore
    layer = library.make(reset, size, jnp.dtype(dtype)).args[0]  # pyright: ignore  # of `build`
    weights, axes = layer.pack(problem.params), (1, 0, 2) if layer.batch_major else (0, 1, 2)
    arguments = (weights, problem.xs.transpose(axes), problem.h0)
    if task == "forward":
        return layer.run, arguments
    return training_step(layer.run), (*arguments, problem.dh_last, problem.dhs.transpose(axes))


def compile_for(place: SingleDeviceSharding, function, arguments, options: Any = None) -> Any:
    """Compiles for the device of `place`; of the arguments only shapes and dtypes matter."""
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=place)
    shapes = jax.tree.map(lambda v: shape(v.shape, v.dtype), arguments)
    lowered = jax.jit(function, out_shardings=place).lower(*shapes)
    return lowered.compile(compiler_options=options)


def measure(device: str, place: SingleDeviceSharding, dump: str, function, arguments) -> Any:
    """The costs of a program by column, and its counts by place and kind; all but MB a step."""
    folder = Path(dump)
    for path in folder.iterdir():
        path.unlink()
    if device == "h100":
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        compiled = compile_for(place, function, arguments, options)
        patterns = ("*.thunk_sequence*.txt", "*.thunk_metadata.txt")  # the last is after all passes
        texts = [max(folder.glob(pattern)).read_text() for pattern in patterns]
        total, by_host = compiled_text.count_launches(texts[0], texts[1], compiled.as_text())
        costs = {"launches": sum(total.values()), "host launches": by_host}
    else:
        compiled = compile_for(place, function, arguments)
        schedules = folder.glob(f"*{compiled_text.SCHEDULE}")
        bundles = compiled_text.read_bundles({path.name: path.read_text() for path in schedules})
        total = compiled_text.count_operations(compiled.as_text(), bundles)
        costs = {name: sum(n for (_, kind), n in total.items() if kind == name) for name in TPU}
    costs = {name: count / NUM_STEPS for name, count in costs.items()}
    costs["temporaries"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
    counts = {
        at: {kind: n / NUM_STEPS for (of, kind), n in total.items() if of == at} for at in PLACES
    }
    return {"costs": costs, "counts": counts}


def option_cases(dtype: Any, reset: Any) -> list[tuple[jaxgru.GRUParams, dict[str, Any]]]:
    """(parameters, keyword arguments of `gru`) with every option, and with many at once."""
    init = functools.partial(jaxgru.init_gru, jax.random.key(0), TINY[2], TINY[3],
                             spec=jaxgru.GRUSpec(reset=reset), dtype=dtype)  # fmt: skip
    steps = np.arange(TINY[0])[:, None] + np.arange(TINY[1])[None]
    noise = {"noise": Noise(recurrent_dropout=0.2, zoneout=0.1), "key": jax.random.key(1)}
    flags = {"mask": steps < TINY[0], "resets": steps % 9 == 0, "reverse": True, "first_step": 3}
    gradients = [*(BPTT(saved) for saved in ("gates", "states", "boundaries")), BPTT(chunk_size=7),
                 BPTT(unroll=4), BPTT(truncate=7), Tangent(), Tangent(unroll=2, truncate=7),
                 Autodiff(), Autodiff(unroll=2, truncate=7)]  # fmt: skip
    many = {**flags, **noise, "gradient": BPTT("boundaries", 10, unroll=2, truncate=7)}
    tap = jaxgru.init_taps(init(), TINY[:2])
    plain = [{}, {"axis": 1}, {"tap": tap}, noise, {**noise, "deterministic": True}]
    plain += [{name: value} for name, value in flags.items()]
    plain += [{"gradient": gradient} for gradient in gradients]
    changed = [(init(bias=False), {}), *((init(layer_norm=True), case) for case in ({}, many))]
    return [*((init(), options) for options in plain), *changed]


def compile_options(device: str, place: SingleDeviceSharding, args: Any) -> list[str]:
    """Compiles a training step with every option; returns a line for each failure."""
    from tqdm import tqdm

    failures = []
    for dtype, reset in itertools.product(args.dtypes, args.resets):
        cases = option_cases(jnp.dtype(dtype), reset)
        for params, options in tqdm(cases, f"{device} {dtype} {reset}", disable=None):
            lead = TINY[1::-1] if options.get("axis") == 1 else TINY[:2]
            arrays = jnp.zeros((*lead, TINY[2]), dtype), jnp.zeros(TINY[1::2], dtype)

            def loss(params, xs, h0, options=options):
                results = jaxgru.gru(params, xs, h0, **options)
                return sum(jnp.sin(v.astype(jnp.float32)).sum() for v in results)

            try:
                compile_for(place, jax.value_and_grad(loss, (0, 1, 2)), (params, *arrays))
            except Exception as error:  # whatever the compiler raises is the finding
                text = f"{type(error).__name__}: {error}".splitlines()[0]
                failures.append(f"{device} {dtype} {reset} {options}: {text:.200}")
    return failures


def measure_device(device: str, cells: list[str], dump: str, args: argparse.Namespace) -> None:
    """Measures what is chosen and, without --again, missing; writes after each contender."""
    from tqdm import tqdm

    about: dict[str, Any] = read(args.out).get(device, {})
    cases = [
        (cell, name)
        for cell, (name, library) in itertools.product(cells, CONTENDERS.items())
        if cell.split()[-1] in library.resets and name.startswith(tuple(args.contenders or [""]))
        if args.again or "costs" not in about.get("rows", {}).get(cell, {}).get(name, {})
    ]
    if not cases:
        return
    place = describe(device, dump)
    installed = {it.name: it.version for it in importlib.metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    if (found := about.get("versions", versions)) != versions:
        raise DataError(f"--out must have results of {versions}, got {found}; choose a new folder.")
    for cell, name in tqdm(cases, device, disable=None):
        try:
            row = measure(device, place, dump, *make_program(CONTENDERS[name], cell))
        except Exception as error:  # whatever the compiler raises belongs in the results
            row = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        results = read(args.out)  # another run may have added another device
        rows = results.get(device, {}).get("rows", {})
        rows.setdefault(cell, {})[name] = row
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
        results[device] = {"date": date, "versions": versions, "rows": rows}
        runs.write_json(args.out / "compiled.json", results)


def read(folder: Path) -> dict[str, Any]:
    """The results in a folder, by device; none if there are none."""
    file = folder / "compiled.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def judge(rows: dict[str, Any], cells: list[str]) -> list[str]:
    """A line for each peer that costs less by 5 %, and for what is missing or failed to compile."""
    lines = []
    for cell in cells:
        found = rows.get(cell, {})
        lines += [f"{cell}: {n}: {row['error']}" for n, row in found.items() if "error" in row]
        costs = {name: row["costs"] for name, row in found.items() if "costs" in row}
        peers = [name for name in costs if name in PEERS]
        if OURS not in costs or not peers:
            lines.append(f"{cell}: {OURS if peers else 'every peer'} is missing")
            continue
        for name in peers:
            pairs = [(column, cost, costs[name][column]) for column, cost in costs[OURS].items()]
            if all(b <= 1.05 * a for _, a, b in pairs) and any(b < 0.95 * a for _, a, b in pairs):
                figures = "; ".join(f"{column}: {a:.2f}, {b:.2f}" for column, a, b in pairs)
                lines.append(f"{cell}: {name} costs less than {OURS}: {figures}")
    return lines


def markdown(results: dict[str, Any]) -> str:
    """A table for each device."""
    lines = [f"{TITLE}. Temporaries are in MB."]
    for device, found in results.items():
        kinds = compiled_text.KINDS if COLUMNS[device] is GPU else TPU
        by_kind = [f"{place}: {' + '.join(kinds)}" for place in PLACES]
        heads = ["program", "contender", *by_kind, *COLUMNS[device], "temporaries"]
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        lines += ["", f"## {device}", "", f"{found['date']}; {versions}", ""]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for cell, contenders in sorted(found["rows"].items()):
            for name, row in contenders.items():
                counts = [row.get("counts", {}).get(place, {}) for place in PLACES]
                texts = [" + ".join(f"{v.get(kind, 0):.2f}" for kind in kinds) for v in counts]
                texts += [f"{cost:,.2f}" for cost in row.get("costs", {}).values()]
                lines.append(f"| {' | '.join([cell, name, *texts, row.get('error', '')])} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """A line of panels for each device: a cost of each task, and temporaries of a training step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(19, 1.5 + 4 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 3, squeeze=False).ravel()
    views = [("training", 0), ("forward", 0), ("training", -1)]
    for panel, (device, (task, place)) in zip(panels, itertools.product(results, views)):
        column = (*COLUMNS[device], "temporaries")[place]
        rows = {c: row for c, row in sorted(results[device]["rows"].items())
                if task in c and any("costs" in figures for figures in row.values())}  # fmt: skip
        for k, name in enumerate(CONTENDERS):
            costs = [r.get(name, {}).get("costs", {column: np.nan})[column] for r in rows.values()]
            colour = COLOURS.get(name, "0.6" if name in PEERS else "lightcoral")
            at = np.arange(len(rows)) + 0.06 * (k - 5)
            panel.plot(at, costs, "os^Dv<>P"[k % 8], color=colour, label=name)
        panel.set_xticks(range(len(rows)), [c.replace(f" {task} ", "\n") for c in rows], fontsize=7)
        panel.set(title=f"{device}, {task}: {column}", yscale="log" if rows else "linear")
        if rows:
            panel.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(axis="y", which="both", alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"{TITLE}; temporaries in MB")
    figure.savefig(path, dpi=100)


def run(args: argparse.Namespace, dump: str) -> int:
    """Measures and writes, or compiles options; prints what failed; returns the exit code."""
    grid = itertools.product(args.dtypes, args.hidden, args.tasks, args.resets)
    cells, lines = [" ".join(map(str, cell)) for cell in grid], []
    args.out.mkdir(parents=True, exist_ok=True)
    for device in args.devices:
        if args.options:
            lines += compile_options(device, describe(device, dump), args)
            continue
        measure_device(device, cells, dump, args)
        results = read(args.out)
        rows = results.get(device, {}).get("rows", {})
        lines += [f"{device} {line}" for line in judge(rows, cells) if args.check]
        runs.replace_text(args.out / "compiled.md", markdown(results))
        plot(results, args.out / "compiled.png")
    print("\n".join(lines or ["compiled: nothing failed"]))
    return 1 if lines else 0


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 if a check or an option failed, 2 if a compiler is missing."""
    parser = runs.make_parser("benchmarks.compiled", (__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--devices", nargs="+", choices=COLUMNS, default=list(COLUMNS), help="to compile for")
    add("--dtypes", nargs="+", choices=(*DTYPES, "float16"), default=DTYPES, help="of all arrays")
    add("--hidden", nargs="+", type=int, default=[128, 512], metavar="H", help="units of the GRU")
    tasks = ["training", "forward"]
    add("--tasks", nargs="+", choices=tasks, default=tasks, help="what to compile")
    add("--resets", nargs="+", choices=RESETS, default=RESETS, help="the equations, by reset gate")
    add("--contenders", nargs="+", metavar="NAME", help="how their names start (default: all)")
    add("--again", action="store_true", help="measure rows that are there, too")
    add("--check", action="store_true", help="exit 1 where a peer costs less and nowhere more")
    add("--options", action="store_true", help="compile every option of gru instead")
    add("--out", type=Path, metavar="FOLDER",
        help="of the results (default: results/compiled beside this script)")  # fmt: skip
    args = parser.parse_args(argv)
    args.out = args.out or Path(__file__).parent / "results" / "compiled"
    with tempfile.TemporaryDirectory() as dump:  # libtpu keeps the first folder that it is given
        return runs.run_script("compiled", lambda: run(args, dump))


if __name__ == "__main__":
    sys.exit(main())
