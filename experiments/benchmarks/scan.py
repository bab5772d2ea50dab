"""One training step of a GRU: jaxgru against the plain scan, on one device, in one process.

    python -m experiments.benchmarks.scan                        # five sizes, both equations
    python -m experiments.benchmarks.scan --sizes 64,32,64,64 --reset after --seconds 60
    python -m experiments.benchmarks.scan --chunks 8 16 32 64 whole     # to tune chunk_size
    python -m experiments.benchmarks.scan --smoke                # seconds, figures worthless

A training step is the value and all gradients (parameters, xs, h0) of a fixed random linear
functional of hs and h_last, in float32. The contenders:

* "plain scan": `lax.scan` over a textbook cell under `jax.grad`, written here without jaxgru. The
  input is projected inside the step, one product for all gates, as Equinox and Haiku have it.
* "plain scan, hoisted projection": the same with xs w_x before the loop.
* "jaxgru ...": `jaxgru.gru` with its defaults, each other `residuals` and `gradient`, and each
  chunk size that `--chunks` names.
* "matmul limit": no GRU, only the floating-point operations of one training step as three large
  products, measured in the same rounds.

Nothing is timed before every contender's value and gradients equal the first one's. Compilation is
timed apart. All contenders of a size run in turn, A B C A B C, for `--seconds` together.

Written to `--out` (runs/benchmark_scan): scan.json with a row for each equation, size and
contender, and scan.png. The last line printed says how often the defaults beat the better plain
scan.
"""

import argparse
import functools
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments.benchmarks.timing import describe_machine, interleave, summarize
from jaxgru import GRUParams, GRUSpec, gru, init_gru

Array = jax.Array
Reset = Literal["before", "after"]
# params, xs [T, B, D], h0 [B, H] -> h_last [B, H], hs [T, B, H]
Contender = Callable[[GRUParams, Array, Array], tuple[Array, Array]]

PLAIN = ("plain scan", "plain scan, hoisted projection")
DEFAULTS = "jaxgru defaults"
LIMIT = "matmul limit"

# Of the largest entry of each leaf. float32 rounds at 6e-8, but the contenders add up the T * B
# rows of a weight gradient in different orders, and every rounding of h_t is carried on by the
# recurrence: a CPU shows 2e-6 at T = 2048. More would be ordinary for longer T; a formula that is
# wrong in one step of 2048 would show 5e-4.
TOLERANCE = 1e-4
LOG_ABOVE = 4.0  # a ratio that would flatten the other bars of a linear plot


class Size(NamedTuple):
    """Steps T, batch B, input D, hidden H."""

    num_steps: int
    batch_size: int
    input_size: int
    hidden_size: int

    def __str__(self):
        """T=64 B=32 D=64 H=64, say."""
        return "T={} B={} D={} H={}".format(*self)


SIZES = (
    Size(64, 32, 64, 64),
    Size(128, 32, 128, 256),
    Size(96, 64, 512, 512),
    Size(2048, 8, 32, 64),
    Size(256, 1, 64, 128),
)
SMOKE_SIZES = (Size(12, 3, 4, 5), Size(7, 1, 2, 3))


class Program(NamedTuple):
    """A compiled training step and what it cost to get."""

    call: Callable[..., Any]
    compile_seconds: float
    temporaries_bytes: int


def plain_scan(params: GRUParams, xs: Array, h0: Array, *, reset: Reset, hoist: bool):
    """h_last, hs of the cell in every textbook, scanned; nothing of jaxgru but its layout."""
    assert params.b_x is not None and params.b_h is not None
    b_x, b_h = params.b_x[None], params.b_h[None]

    def body(h, x):
        a = x if hoist else x @ params.w_x + b_x
        h = _textbook_step(params.w_h, b_h, a, h, reset)
        return h, h

    return lax.scan(body, h0, xs @ params.w_x + b_x[None] if hoist else xs)


def _textbook_step(w_h, b_h, a, h, reset):
    """h' = z h + (1 - z) n from the projected input a [B, 3H], blocks r | z | n."""
    two = 2 * h.shape[-1]
    if reset == "after":
        u = h @ w_h + b_h
        r, z = jnp.split(jax.nn.sigmoid(a[:, :two] + u[:, :two]), 2, axis=-1)
        n = jnp.tanh(a[:, two:] + r * u[:, two:])
    else:
        u = h @ w_h[:, :two] + b_h[:, :two]
        r, z = jnp.split(jax.nn.sigmoid(a[:, :two] + u), 2, axis=-1)
        n = jnp.tanh(a[:, two:] + (r * h) @ w_h[:, two:] + b_h[:, two:])
    return z * h + (1 - z) * n


def make_contenders(reset: Reset, num_steps: int, chunks: list[int | None]) -> dict[str, Contender]:
    """name -> contender; a chunk of None is the whole sequence, one of T or more is left out."""
    run = functools.partial(gru, spec=GRUSpec(reset=reset))
    contenders: dict[str, Contender] = {
        PLAIN[0]: functools.partial(plain_scan, reset=reset, hoist=False),
        PLAIN[1]: functools.partial(plain_scan, reset=reset, hoist=True),
        DEFAULTS: run,
    }
    for residuals in ("states", "boundaries"):
        contenders[f"jaxgru residuals={residuals}"] = functools.partial(run, residuals=residuals)
    for gradient in ("tangent", "autodiff"):
        contenders[f"jaxgru gradient={gradient}"] = functools.partial(run, gradient=gradient)
    for chunk in chunks:
        if chunk is None:
            name = "jaxgru whole sequence"
            contenders[name] = functools.partial(run, chunk_size=num_steps)
        elif chunk < num_steps:
            contenders[f"jaxgru chunk_size={chunk}"] = functools.partial(run, chunk_size=chunk)
    return contenders


def training_step(contender: Contender):
    """(params, xs, h0, dh_last, dhs) -> <h_last, dh_last> + <hs, dhs> and all its gradients."""

    def value(params, xs, h0, dh_last, dhs):
        h_last, hs = contender(params, xs, h0)
        return jnp.sum(h_last * dh_last) + jnp.sum(hs * dhs)

    return jax.value_and_grad(value, argnums=(0, 1, 2))


def draw_arguments(size: Size, seed: int) -> tuple:
    """params (biases not zero), xs, h0, dh_last, dhs."""
    num_steps, batch_size, input_size, hidden_size = size
    keys = jax.random.split(jax.random.key(seed), 5)
    params = init_gru(keys[0], input_size, hidden_size, scheme="pytorch")
    xs = jax.random.normal(keys[1], (num_steps, batch_size, input_size))
    h0 = jax.random.uniform(keys[2], (batch_size, hidden_size), minval=-1.0, maxval=1.0)
    dh_last = jax.random.normal(keys[3], h0.shape)
    dhs = jax.random.normal(keys[4], (num_steps, *h0.shape))
    return params, xs, h0, dh_last, dhs


def draw_products(size: Size, seed: int) -> tuple:
    """Operands of the three products below, each contiguous as its product reads it."""
    rows, inner = size.num_steps * size.batch_size, size.input_size + size.hidden_size
    outer = 3 * size.hidden_size
    shapes = ((rows, inner), (inner, outer), (rows, outer), (outer, inner), (inner, rows))
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def three_products(inputs, weights, cotangents, weights_t, inputs_t):
    """The 18TBH(D + H) operations of a training step with no recurrence between them.

    A third each: [TB, D+H] [D+H, 3H] forward, its cotangent of the inputs and that of the weights.
    """
    return inputs @ weights, cotangents @ weights_t, inputs_t @ cotangents


def compile_program(function, arguments: tuple) -> Program:
    """The function compiled for these arguments; calling it waits for the result."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()

    def call():
        return jax.block_until_ready(compiled(*arguments))

    return Program(call, seconds, -1 if analysis is None else analysis.temp_size_in_bytes)


def check_equal(programs: dict[str, Program], where: str) -> dict[str, float]:
    """name -> largest difference from the first program, relative to the leaf's largest entry.

    Raises:
      SystemExit: one is beyond TOLERANCE (or NaN), so that nothing is timed.
    """
    first, *_ = programs
    expected = jax.tree.map(np.asarray, programs[first].call())
    worst = {}
    for name, program in programs.items():
        errors = jax.tree.map(_relative_difference, expected, program.call())
        for path, error in jax.tree_util.tree_leaves_with_path(errors):
            if not error <= TOLERANCE:
                leaf = ("the value", "the gradient")[path[0].idx]
                leaf += jax.tree_util.keystr(path[1:])
                sys.exit(
                    f"scan: nothing timed at {where}: {leaf} of {name!r} differs from that of "
                    f"{first!r} by {error:.1e} of its largest entry; at most {TOLERANCE:.0e} is "
                    f"rounding."
                )
        worst[name] = max(jax.tree.leaves(errors))
    return worst


def _relative_difference(expected, actual) -> float:
    """max |actual - expected| / max |expected|."""
    scale = max(float(np.max(np.abs(expected))), float(np.finfo(np.float32).tiny))
    return float(np.max(np.abs(np.asarray(actual) - expected))) / scale


def measure(reset: Reset, size: Size, args: argparse.Namespace, bar: tqdm) -> list[dict[str, Any]]:
    """One row for each contender and the limit: compiled, checked, then timed in turn."""
    contenders = make_contenders(reset, size.num_steps, args.chunks)
    arguments = draw_arguments(size, args.seed)
    programs = {}
    for name, contender in contenders.items():
        bar.set_description(f"reset {reset}, {size}: compile {name}")
        programs[name] = compile_program(training_step(contender), arguments)
    bar.set_description(f"reset {reset}, {size}: compare")
    differences = check_equal(programs, f"reset={reset}, {size}")
    programs[LIMIT] = compile_program(three_products, draw_products(size, args.seed))
    bar.set_description(f"reset {reset}, {size}: measure")
    calls = {name: program.call for name, program in programs.items()}
    samples = interleave(calls, args.seconds, advance=bar.update)
    times = {name: summarize(each) for name, each in samples.items()}
    plain = min(times[name]["median_ms"] for name in PLAIN)
    limit = times[LIMIT]["median_ms"]
    return [
        {
            "reset": reset,
            **size._asdict(),
            "contender": name,
            **times[name],
            "ratio_to_plain": times[name]["median_ms"] / plain,
            "ratio_to_limit": times[name]["median_ms"] / limit,
            "temporaries_bytes": program.temporaries_bytes,
            "compile_seconds": program.compile_seconds,
            "difference": differences.get(name),
        }
        for name, program in programs.items()
    ]


def format_table(reset: Reset, size: Size, rows: list[dict[str, Any]]) -> str:
    """The rows of one size as text; a ratio below 1 is faster."""
    lines = [
        "",
        f"reset {reset}, {size}: training step, {rows[0]['samples']} rounds",
        f"{'':32}{'median':>10}{'min':>10}{'x plain':>9}{'x limit':>9}{'temps':>10}{'compile':>9}",
    ]
    for row in rows:
        lines.append(
            f"{row['contender']:32}{row['median_ms']:7.2f} ms{row['min_ms']:7.2f} ms"
            f"{row['ratio_to_plain']:9.2f}{row['ratio_to_limit']:9.2f}"
            f"{row['temporaries_bytes'] / 1e6:7.1f} MB{row['compile_seconds']:7.1f} s"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Grouped bars of the ratio to the better plain scan, a panel for each equation."""
    resets = list(dict.fromkeys(row["reset"] for row in rows))
    names = [name for name in dict.fromkeys(row["contender"] for row in rows) if name != LIMIT]
    names.append(LIMIT)
    groups = list(dict.fromkeys(_size_of(row) for row in rows))
    ratio = {(r["reset"], _size_of(r), r["contender"]): r["ratio_to_plain"] for r in rows}
    figure = Figure(
        figsize=(max(9, 0.22 * len(groups) * (len(names) + 2)), 1.6 + 3.4 * len(resets))
    )
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(resets), 1, squeeze=False)[:, 0]
    width = 0.86 / len(names)
    for panel, reset in zip(panels, resets, strict=True):
        for k, name in enumerate(names):
            found = [(g, ratio.get((reset, size, name))) for g, size in enumerate(groups)]
            found = [(g + (k - (len(names) - 1) / 2) * width, v) for g, v in found if v]
            bars = panel.bar(*zip(*found, strict=True), width, color=_colour(name, k), label=name)
            panel.bar_label(bars, fmt="%.2f", fontsize=6, rotation=90, padding=2)
        panel.axhline(1, color="black", linewidth=0.8, zorder=0)
        panel.set_xticks(range(len(groups)), [str(size) for size in groups])
        panel.set_ylabel("time / better plain scan")
        panel.set_title(f"reset {reset}: below 1 is faster", fontsize=10)
        panel.margins(y=0.15)
        if max(v for key, v in ratio.items() if key[0] == reset) > LOG_ABOVE:
            panel.set_yscale("log")
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=150)


def _size_of(row: dict[str, Any]) -> Size:
    """The size that a row is of."""
    return Size(*(row[field] for field in Size._fields))


def _colour(name: str, k: int) -> str:
    """Grey for the plain scans, red for the defaults, light for the limit, a cycle for the rest."""
    fixed = {PLAIN[0]: "0.35", PLAIN[1]: "0.6", DEFAULTS: "tab:red", LIMIT: "0.87"}
    cycle = ("tab:blue", "tab:cyan", "tab:green", "tab:olive", "tab:orange", "tab:purple")
    return fixed.get(name, (*cycle, "tab:brown", "tab:pink")[(k - len(fixed) + 1) % 8])


def verdict(rows: list[dict[str, Any]]) -> str:
    """On how many sizes the defaults beat the better plain scan, and by how much."""
    rows = [row for row in rows if row["contender"] == DEFAULTS]
    parts = []
    for reset in dict.fromkeys(row["reset"] for row in rows):
        ratios = [row["ratio_to_plain"] for row in rows if row["reset"] == reset]
        faster = sum(ratio < 1 for ratio in ratios)
        parts.append(f"{faster} of {len(ratios)} sizes with reset {reset}")
    ratios = [row["ratio_to_plain"] for row in rows]
    mean = float(np.exp(np.mean(np.log(ratios))))
    return (
        f"Verdict: {DEFAULTS} beat the better plain scan on {' and '.join(parts)}; time ratio "
        f"{mean:.2f} in geometric mean, {max(ratios):.2f} at worst."
    )


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, writes; 0, or a SystemExit where contenders disagree."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    about = {
        "command": shlex.join(["python", "-m", "experiments.benchmarks.scan", *argv]),
        "device": device.device_kind,
        "platform": device.platform,
        **describe_machine(("jax", "jaxlib", "numpy")),
        "seconds_per_size": args.seconds,
        "tolerance": TOLERANCE,
    }
    title = f"{about['device']} device; {about['cpu']}, {about['cores']} cores; jax "
    title += f"{about['versions']['jax']}; {about['date']}"
    print(title)
    cells = [(reset, size) for reset in args.reset for size in args.sizes]
    rows: list[dict[str, Any]] = []
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    # Products in full float32: an accelerator's shortened ones would drown the comparison.
    with (
        jax.default_matmul_precision("highest"),
        tqdm(total=len(cells), bar_format=layout, disable=None) as bar,
    ):
        for reset, size in cells:
            found = measure(reset, size, args, bar)
            rows += found
            tqdm.write(format_table(reset, size, found))
            text = json.dumps({**about, "rows": rows}, indent=1)
            (args.out / "scan.json").write_text(text + "\n", encoding="utf-8")
    plot(rows, f"GRU training step, float32. {title}", args.out / "scan.png")
    print(f"\nWrote {args.out / 'scan.json'} and {args.out / 'scan.png'}.")
    print(verdict(rows), flush=True)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    """The options; --smoke shrinks what is not given."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.scan", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_scan"), metavar="FOLDER")
    parser.add_argument(
        "--seconds",
        type=positive_number,
        metavar="N",
        help="for all contenders of a size (default 30)",
    )
    parser.add_argument("--sizes", type=_size, nargs="+", metavar="T,B,D,H")
    parser.add_argument(
        "--reset", nargs="+", choices=("before", "after"), default=["before", "after"]
    )
    parser.add_argument(
        "--chunks", type=_chunk, nargs="+", default=[], metavar="N", help="chunk sizes, or 'whole'"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny and quick: does it run?")
    args = parser.parse_args(argv)
    args.sizes = args.sizes or (SMOKE_SIZES if args.smoke else SIZES)
    args.seconds = args.seconds or (0.05 if args.smoke else 30.0)
    if args.smoke and not args.chunks:
        args.chunks = [4, None]
    return args


def positive_number(text: str) -> float:
    """A number of seconds."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _size(text: str) -> Size:
    """T,B,D,H."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must be four positive integers T,B,D,H, got {text!r}")
    return Size(*map(int, parts))


def _chunk(text: str) -> int | None:
    """A chunk size; None for the whole sequence."""
    if text == "whole":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer or 'whole', got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
