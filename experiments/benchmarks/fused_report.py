"""Rows of the fused kernels' benchmark as text, tables for a README, pictures and verdicts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from experiments.benchmarks.fused_points import (
    FULL,
    FUSED,
    FUSED_GATES,
    SCAN,
    STATES,
    UNROLLED,
    Grid,
    Point,
    Rows,
    point_of,
    timed,
)
from experiments.benchmarks.libraries import TORCH
from experiments.benchmarks.limits import shares
from experiments.benchmarks.report import TITLES
from experiments.benchmarks.targets import Target

KERNELS = (FUSED, FUSED_GATES)
COLUMNS = (SCAN, UNROLLED, STATES, TORCH, *KERNELS)
COLOURS = {
    SCAN: "0.35",
    UNROLLED: "0.6",
    STATES: "0.8",
    TORCH: "tab:purple",
    FUSED: "tab:red",
    FUSED_GATES: "salmon",
}
Key = tuple[str, str, str, int]  # of a table: task, reset, dtype, T


def with_ratios(rows: Rows, limits: dict[str, Any] | None) -> Rows:
    """Every row with us a step, its speed over torch's and the scan's, and shares of the limits."""
    by_point = group(rows, point_of)
    return [_with_ratios(row, by_point[point_of(row)], limits) for row in rows]


def _with_ratios(row: dict[str, Any], others: Rows, limits: dict[str, Any] | None):
    """One of them; None where there is nothing to divide."""
    point, time = point_of(row), row["median_ms"]
    found = {}
    if limits is not None and time is not None:
        found = shares(point.size, point.task, point.dtype, time, limits)
    return {
        **row,
        "us_per_step": None if time is None else 1e3 * time / point.size.num_steps,
        "speedup_over_torch": speedup(others, (row["contender"],), TORCH),
        "speedup_over_scan": speedup(others, (row["contender"],), SCAN),
        "matmul_share": found.get("matmul_share"),
        "memory_share": found.get("memory_share"),
    }


def group(rows: Rows, key: Any) -> dict[Any, Rows]:
    """Rows by key, in the order of their coming."""
    groups: dict[Any, Rows] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def speedup(rows: Rows, names: Sequence[str], other: str) -> float | None:
    """The other's time over that of the quickest of these: above 1 they are quicker."""
    mine, theirs = timed(rows, names), timed(rows, (other,))
    return theirs["median_ms"] / mine["median_ms"] if mine and theirs else None


def key_of(row: dict[str, Any]) -> Key:
    """The table that a row belongs to."""
    return row["task"], row["reset"], row["dtype"], row["num_steps"]


def title_of(key: Key) -> str:
    """In words."""
    task, reset, dtype, num_steps = key
    return f"{TITLES[task]}, reset {reset}, {dtype}, T={num_steps}"


def lines_of(rows: Rows) -> list[tuple[Point, Rows]]:
    """The points of a table, H then B growing."""
    by_point = group(rows, point_of)
    return sorted(by_point.items(), key=lambda item: (item[0].size[3], item[0].size[1]))


def table(rows: Rows) -> str:
    """us a step of every contender at each H and B, ratios, and the shares of the better kernel."""
    names = [name for name in COLUMNS if any(row["contender"] == name for row in rows)]
    ends = ("scan/fused", "torch/fused", "matmul", "memory")
    lines = ["", title_of(key_of(rows[0])) + ": us a step"]
    head = "".join(f"{name:>15}" for name in names) + "".join(f"{name:>12}" for name in ends)
    lines.append(f"{'H':>5}{'B':>5}{head}")
    for point, found in lines_of(rows):
        by_name = {row["contender"]: row for row in found}
        cells = [f"{_cell(by_name.get(name)):>15}" for name in names]
        cells += [f"{cell:>12}" for cell in _ends(found)]
        lines.append(f"{point.size.hidden_size:5d}{point.size.batch_size:5d}{''.join(cells)}")
    return "\n".join(lines + reasons(rows, "contender"))


def point_line(rows: Rows) -> str:
    """A point in one line, as it is measured."""
    times = ", ".join(f"{row['contender']} {_cell(row)}" for row in rows)
    ratios = [f"{ratio} {name}" for name, ratio in zip(("scan", "torch"), _ends(rows))]
    return f"{point_of(rows[0])}: {times} us a step; speed over {', '.join(ratios)}"


def _cell(row: dict[str, Any] | None) -> str:
    """us a step, or the kind of what kept it from being timed."""
    if row is None:
        return "-"
    if row["us_per_step"] is None:
        return row["reason"].partition(":")[0]
    return f"{row['us_per_step']:.3g}"


def _ends(rows: Rows) -> list[str]:
    """The better kernel's speed over the scan and torch, and its shares of the limits."""
    best = timed(rows, KERNELS) or {}
    ratios = [speedup(rows, KERNELS, other) for other in (SCAN, TORCH)]
    parts = [best.get(field) for field in ("matmul_share", "memory_share")]
    return [
        *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        *("-" if part is None else f"{100 * part:.1f} %" for part in parts),
    ]


def reasons(rows: Rows, field: str) -> list[str]:
    """One line for each reason, with who had it and how often."""
    named = group([row for row in rows if row["reason"]], lambda row: (row[field], row["reason"]))
    return [f"  {name}, {len(found)} times: {reason}" for (name, reason), found in named.items()]


def flags_table(rows: Rows) -> str:
    """us a step of each case under every set of flags."""
    if not rows:
        return ""
    names = list(dict.fromkeys(row["flags"] for row in rows))
    lines = ["", "The scan under flags of XLA, training: us a step", f"{'':66}"]
    lines[-1] += "".join(f"{name:>26}" for name in names)
    cases = group(rows, lambda row: (point_of(row), row["unroll"], row["residuals"]))
    for (point, unroll, residuals), found in cases.items():
        label = f"{str(point).partition(', ')[2]}, unroll {unroll}, {residuals}"
        by_name = {row["flags"]: row for row in found}
        lines.append(f"{label:66}" + "".join(f"{_cell(by_name.get(name)):>26}" for name in names))
    return "\n".join(lines + reasons(rows, "flags"))


def limits_line(limits: dict[str, Any]) -> str:
    """Both limits in words."""
    rates = ", ".join(
        f"products {rate / 1e12:.3g} TFLOP/s in {dtype}"
        for dtype, rate in limits["flops_per_second"].items()
    )
    return f"Limits measured: copy {limits['bytes_per_second'] / 1e9:.4g} GB/s, {rates}"


def markdown(rows: Rows) -> str:
    """A table for each task, equation, dtype and T: the scan, torch, the better kernel."""
    parts = []
    for key, found in group(rows, key_of).items():
        lines = [
            f"**{title_of(key)}**, us a step",
            "",
            "| H | B | scan | torch | fused | scan / fused | torch / fused "
            "| of the matmul limit | of the memory limit |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for point, of_point in lines_of(found):
            by_name = {row["contender"]: row for row in of_point}
            fused = timed(of_point, KERNELS) or by_name.get(FUSED)
            size = (str(point.size.hidden_size), str(point.size.batch_size))
            times = [_cell(row) for row in (by_name.get(SCAN), by_name.get(TORCH), fused)]
            lines.append(f"| {' | '.join((*size, *times, *_ends(of_point)))} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def plot(rows: Rows, title: str, path: Path) -> None:
    """us a step against H: a line of panels for each task and dtype, a column for each B."""
    kinds = list(dict.fromkeys((row["task"], row["dtype"]) for row in rows))
    batches = sorted({row["batch_size"] for row in rows})
    width = max(1.2 + 3.1 * len(batches), 8)
    figure = Figure(figsize=(width, 1.4 + 2.6 * len(kinds)))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(kinds), len(batches), squeeze=False, sharex=True, sharey="row")
    handles: dict[str, Any] = {}
    for line, kind in zip(grid, kinds):
        for panel, batch_size in zip(line, batches):
            found = [
                row
                for row in rows
                if (row["task"], row["dtype"], row["batch_size"]) == (*kind, batch_size)
            ]
            handles |= _panel(panel, found)
            panel.set_title(f"{kind[0]}, {kind[1]}, B={batch_size}", fontsize=9)
        line[0].set_ylabel("us a step")
    for panel in grid[-1]:
        panel.set_xlabel("hidden size H")
    figure.suptitle(title, fontsize=9, wrap=True)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=120)


def _panel(panel: Any, rows: Rows) -> dict[str, Any]:
    """A line for each contender, both axes logarithmic; name -> the line."""
    handles, counts = {}, sorted({row["hidden_size"] for row in rows})
    for name, colour in COLOURS.items():
        mine = [row for row in rows if row["contender"] == name and row["us_per_step"] is not None]
        mine.sort(key=lambda row: row["hidden_size"])
        if not mine:
            continue
        x, y = [row["hidden_size"] for row in mine], [row["us_per_step"] for row in mine]
        width = 2 if name in KERNELS else 1.2
        (handles[name],) = panel.plot(
            x, y, "o-", color=colour, label=name, markersize=4, linewidth=width
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(counts, [str(count) for count in counts], fontsize=8)
    panel.set_xticks([], minor=True)
    panel.grid(alpha=0.2, which="both")
    panel.spines[["top", "right"]].set_visible(False)
    return handles


class Goal(NamedTuple):
    """How many times as fast as another the better kernel must be, at every point up to an H."""

    claim: str
    other: str
    largest: int
    bound: float


GOALS = (
    Goal("scan / fused, at least ten times as fast", SCAN, 512, 10.0),
    Goal("torch / fused, not slower than cuDNN", TORCH, 512, 1.0),
    Goal("torch / fused, half as fast again as cuDNN up to H=256", TORCH, 256, 1.5),
)


def judge(rows: Rows, grid: Grid = FULL) -> list[Target]:
    """Every goal for each dtype, held against all points of the grid."""
    return [_judge(goal, dtype, rows, grid) for goal in GOALS for dtype in sorted(grid.dtypes)]


def _judge(goal: Goal, dtype: str, rows: Rows, grid: Grid) -> Target:
    """Missed where one point misses it; reached where none does and none was left out.

    A point at which no kernel gave a time misses it: it was refused, or it failed or was wrong.
    """
    resets = ("after",) if goal.other == TORCH else grid.resets
    hidden = [size for size in grid.hidden if size <= goal.largest]
    points = grid._replace(resets=resets, hidden=hidden, dtypes=(dtype,)).points()
    by_point = group(rows, point_of)
    ratios, without = {}, []
    for point in points:
        found = by_point.get(point, [])
        ratio = speedup(found, KERNELS, goal.other)
        if ratio is not None:
            ratios[point] = ratio
        elif timed(found, KERNELS) is None and any(r["contender"] == FUSED for r in found):
            without.append(point)
    worst = min(ratios, key=lambda point: ratios[point], default=None)
    figure = None if worst is None else ratios[worst]
    missed = without or (figure is not None and figure < goal.bound)
    reached = False if missed else (True if len(ratios) == len(points) else None)
    place = f"worst of {len(ratios)} of {len(points)} points: {worst}" if worst else ""
    if without:
        place += f"{place and '; '}no time at {len(without)} points: {without[0]}"
    return Target(f"{dtype}: {goal.claim}", figure, f"at least {goal.bound:g}", reached, place)
