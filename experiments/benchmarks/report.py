"""Formats rows of measurements as text, as a Markdown table, and as a plot."""

from pathlib import Path
from typing import Any

from experiments.benchmarks.libraries import CUT, JAX_PEERS, OURS, STATES, TORCH
from experiments.benchmarks.problems import Size
from experiments.benchmarks.targets import LIMIT, Rows, size_of

TITLES = {
    "training": "training step: value and all gradients",
    "padded": "training step, sequences of 1 to T steps",
    "padded-short": "training step, sequences of 1 to T/5 steps",
    "forward": "forward pass",
    "step": "one step from Python, batch 1",
    "generation": "greedy character generation, batch 1",
}
COLOURS = {
    OURS: "tab:red",
    STATES: "salmon",
    "jaxgru boundaries": "lightsalmon",
    "jaxgru tangent": "rosybrown",
    "jaxgru autodiff": "mistyrose",
    CUT: "peachpuff",
    "plain scan": "0.35",
    "plain scan, hoisted": "0.6",
    "Flax linen": "tab:blue",
    "Flax nnx": "tab:cyan",
    "Equinox": "tab:green",
    "Haiku": "tab:olive",
    "Keras": "tab:orange",
    TORCH: "tab:purple",
    LIMIT: "0.87",
}


def group_table(rows: Rows) -> str:
    """A table of one task, equation and size; a contender with a ratio above 1 is slower."""
    first = rows[0]
    lines = [
        "",
        f"{TITLES[first['task']]}, reset {first['reset']}, {size_of(first)}",
        f"{'':26}{'median':>12}{'quartiles':>20}{'calls':>7}{'/ jaxgru':>9}{'temps':>10}"
        f"{'compile':>9}",
    ]
    for row in rows:
        low, high = (_time(v) for v in row["quartiles_ms"])
        note = f"  {row['note']}" if row["note"] else ""
        error = "" if row["error"] is None else f"  error {row['error']:.1e}"
        lines.append(
            f"{row['contender']:26}{_time(row['median_ms']):>12}{f'{low} .. {high}':>20}"
            f"{row['samples']:7d}{row['ratio']:9.2f}{_megabytes(row['temporaries_bytes']):>10}"
            f"{_seconds(row['compile_seconds']):>9}{error}{note}"
        )
    return "\n".join(lines)


def _time(milliseconds: float) -> str:
    """A time with three digits, in us or ms."""
    if milliseconds < 0.1:
        return f"{1e3 * milliseconds:.3g} us"
    return f"{milliseconds:.1f} ms" if milliseconds >= 10 else f"{milliseconds:.2f} ms"


def _megabytes(count: int | None) -> str:
    """A number of MB, or a dash if it is not known."""
    return "-" if count is None else f"{count / 1e6:.1f} MB"


def _seconds(seconds: float | None) -> str:
    """A number of seconds, or a dash if there is no separate compilation."""
    return "-" if seconds is None else f"{seconds:.2f} s"


def markdown(rows: Rows) -> str:
    """A Markdown table for each task: jaxgru, the best JAX peer, torch and the limit."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        lines = [
            f"**{TITLES[task][0].upper()}{TITLES[task][1:]}**",
            "",
            "| reset | size | jaxgru | best JAX peer | its time / jaxgru's | torch / jaxgru "
            "| share of the matmul limit | temporaries: jaxgru / states / least JAX peer |",
            "|---|---|---|---|---|---|---|---|",
        ]
        groups = dict.fromkeys((r["reset"], size_of(r)) for r in rows if r["task"] == task)
        for reset, size in groups:
            group = [r for r in rows if (r["task"], r["reset"], size_of(r)) == (task, reset, size)]
            lines.append(_markdown_line(group))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _markdown_line(group: Rows) -> str:
    """The line of one size; a dash stands for what was not measured."""
    by_name = {row["contender"]: row for row in group}
    ours, peers = by_name[OURS], [row for row in group if row["contender"] in JAX_PEERS]
    best = min(peers, key=lambda row: row["median_ms"], default=None)
    least = min((r["temporaries_bytes"] for r in peers if r["temporaries_bytes"]), default=None)
    torch, limit = by_name.get(TORCH), by_name.get(LIMIT)
    time = _time(ours["median_ms"])
    if ours["characters_per_second"] is not None:
        time += f", {ours['characters_per_second']:,.0f} characters/s"
    states = by_name.get(STATES, {}).get("temporaries_bytes")
    temporaries = [_megabytes(v) for v in (ours["temporaries_bytes"], states, least)]
    cells = [
        ours["reset"],
        str(size_of(ours)),
        time,
        "-" if best is None else best["contender"],
        "-" if best is None else f"{best['ratio']:.2f}",
        "-" if torch is None else f"{torch['ratio']:.2f}",
        "-" if limit is None else f"{100 * limit['ratio']:.0f} %",
        " / ".join(temporaries),
    ]
    return f"| {' | '.join(cells)} |"


def plot(rows: Rows, title: str, path: Path) -> None:
    """Plots rows of panels for the tasks and the temporaries, with a column per equation."""
    from matplotlib.figure import Figure

    resets = list(dict.fromkeys(row["reset"] for row in rows))
    panels = [(task, "ratio") for task in dict.fromkeys(row["task"] for row in rows)]
    if ("training", "ratio") in panels:
        panels.insert(1, ("training", "temporaries_ratio"))
    figure = Figure(figsize=(8 * len(resets), 1.6 + 2.9 * len(panels)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(panels), len(resets), squeeze=False)
    handles: dict[str, Any] = {}
    for line, (task, field) in zip(axes, panels):
        for panel, reset in zip(line, resets):
            found = [row for row in rows if (row["task"], row["reset"]) == (task, reset)]
            handles |= _panel(panel, found, field)
            what = TITLES[task] if field == "ratio" else "temporaries of a training step"
            panel.set_title(f"{what}, reset {reset}", fontsize=12)
    figure.suptitle(f"Above 1, jaxgru is better. {title}", fontsize=12)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=7, fontsize=11
    )
    figure.savefig(path, dpi=100)


def _panel(panel: Any, rows: Rows, field: str) -> dict[str, Any]:
    """Draws time or temporaries relative to jaxgru's, grouped by size; returns {name: bars}."""
    from matplotlib.ticker import LogLocator, NullFormatter

    sizes = list(dict.fromkeys(size_of(row) for row in rows))
    rows = [row for row in rows if row[field] is not None and row["contender"] != OURS]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    width, handles = 0.9 / max(len(names), 1), {}
    for k, name in enumerate(names):
        mine = [row for row in rows if row["contender"] == name]
        places = [sizes.index(size_of(r)) + (k - (len(names) - 1) / 2) * width for r in mine]
        heights = [row[field] for row in mine]
        colour = COLOURS.get(name, ("tab:brown", "tab:pink", "gold", "plum")[k % 4])
        bars = panel.bar(places, [h - 1 for h in heights], width, bottom=1, color=colour)
        if len(sizes) == 1:
            panel.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=11, padding=2)
        handles[name] = bars
    panel.axhline(1, color=COLOURS[OURS], linewidth=1, zorder=3)
    panel.set_xticks(range(len(sizes)), [_label(size) for size in sizes], fontsize=10)
    what = "time" if field == "ratio" else "temporaries"
    panel.set_xlabel("T, B, D, H", fontsize=10)
    panel.set_ylabel(f"{what} / jaxgru's", fontsize=11)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.margins(y=0.18)
    panel.spines[["top", "right"]].set_visible(False)
    return handles


def _label(size: Size) -> str:
    """T, B, D and H, in two lines."""
    return f"{size.num_steps}, {size.batch_size},\n{size.input_size}, {size.hidden_size}"
