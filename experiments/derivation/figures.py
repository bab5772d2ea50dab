"""Plots the graph of the sixteen steps, and the errors of all documents."""

import math
from typing import Any

import numpy as np

from experiments.derivation.sixteen_steps import TAPE
from experiments.derivation.verdicts import EXACT, WRONG

FLOOR, CEILING = 1e-17, 1e4  # where errors of 0 and errors that are not finite are drawn
PITCH, WIDTH, LINE = 2.2, 2.0, 0.27
PLACES = {
    "g1": (1.5, 6.3), "g2": (1.5, 4.1), "g3": (4, 5.2), "z": (5, 5.2), "g11": (7, 6.3),
    "g4": (0, 2.2), "g5": (0, -0.4), "g6": (1, 0.9), "r": (2, 0.9), "g7": (3, 0.9),
    "g8": (4, 1.5), "g9": (4, -0.6), "g10": (5, 0.5), "h~": (6, 0.5), "g12": (7.2, 1.6),
    "h_t": (8.3, 4),
}  # fmt: skip
BARS = {"h_tm1": (8.2, 7), "x": (-2.6, 4)}  # height, and the column where the bar ends
SHORT = {("x", "g2")}  # an arrow from the bar would cross that of g6 to r, and seem to end in r
COLORS = {"matvec": "tab:orange", "sigmoid": "tab:green", "f": "tab:green"}


def plot_graph(path, operations, values, cotangents):
    """Plots the sixteen steps with the norms of their values and cotangents.

    Each step is a box with its equation. A weight is shown in the box of its product.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 10), layout="constrained")
    axes = figure.add_subplot()
    for name, (height, column) in BARS.items():
        text = f"{name}     |{name}| = {norm(values[name]):.3g}"
        axes.plot([-1, PITCH * column + 1], [height, height], color="0.3", linewidth=5)
        label = height + (0.3 if height > 0 else -0.3)
        axes.text(-1, label, text, fontweight="bold", fontsize=11, va="center")
        text = f"|d{name}| = {norm(cotangents[name]):.3g}"
        axes.text(2.2, label, text, color="tab:red", fontsize=11, va="center")
    for step in TAPE:
        draw_step(axes, step, operations[step.operation].text, values, cotangents)
    axes.set(xlim=(-1.2, PITCH * 8.3 + 1.2), ylim=(-3.2, 8.8))
    axes.set_axis_off()
    axes.set_title(
        "The sixteen steps: Euclidean norms of values (black) and of cotangents (red), which flow "
        "against the arrows.\nOrange: products with a weight, and the norm of its gradient; "
        "green: s and f; blue: sums and elementwise products.",
        fontsize=13,
    )
    figure.savefig(path, dpi=100)


def draw_step(axes, step, template, values, cotangents):
    """Draws a box with the equation and its norms, and an arrow from each input."""
    from matplotlib.patches import Rectangle

    name, column_row = step.output, PLACES[step.output]
    x, y = PITCH * column_row[0], column_row[1]
    lines = [(f"({step.equation}) {name} =", "black", "bold")]
    lines.append((template.format(*step.inputs), "black", "bold"))
    lines.append((f"|{name}| = {norm(values[name]):.3g}", "black", "normal"))
    for variable in (name, *(w for w in step.inputs if w.startswith("W"))):
        lines.append((f"|d{variable}| = {norm(cotangents[variable]):.3g}", "tab:red", "normal"))
    half = (LINE * len(lines) + 0.12) / 2
    color = COLORS.get(step.operation, "tab:blue")
    corner, size = (x - WIDTH / 2, y - half), (WIDTH, 2 * half)
    box = Rectangle(corner, *size, facecolor="white", edgecolor=color, linewidth=1.8, zorder=2)
    axes.add_patch(box)
    for index, (text, color, weight) in enumerate(lines):
        font = {"color": color, "fontweight": weight, "fontsize": 10.5}
        height = y + half - 0.06 - LINE * (index + 0.5)
        axes.text(x, height, text, ha="center", va="center", zorder=3, **font)
    for source in step.inputs:
        if (source, name) in SHORT:
            start = y - half - 0.5
            axes.text(x, start - 0.15, source, ha="center", va="center", fontweight="bold")
            draw_arrow(axes, (x, start), (x, y - half))
        elif source in BARS:
            height = BARS[source][0]
            draw_arrow(axes, (x, height), (x, y + half if height > y else y - half))
        elif source in PLACES:
            column, row = PLACES[source]
            side = 0.3 * np.sign(row - y)  # so that two arrows do not end at the same point
            draw_arrow(axes, (PITCH * column + WIDTH / 2, row), (x - WIDTH / 2, y + side))


def draw_arrow(axes, start, end):
    arrow = {"arrowstyle": "-|>", "color": "0.4", "shrinkA": 0, "shrinkB": 0, "linewidth": 1.2}
    axes.annotate("", xy=end, xytext=start, arrowprops=arrow, zorder=1)


def norm(value):
    return float(np.linalg.norm(np.asarray(value)))


def plot_errata(path, groups):
    """Plots the printed and the corrected error of every row, with a panel for each document."""
    from matplotlib.figure import Figure

    columns = in_columns(groups)
    height = max(map(count_rows, columns))
    figure = Figure(figsize=(16, 2 + 0.165 * height), layout="constrained")
    parts: Any = figure.subfigures(1, len(columns), squeeze=False)
    for part, documents in zip(parts[0], columns):
        ratios = [len(rows) for rows in documents.values()]
        ratios += [height - sum(ratios)] * (sum(ratios) < height)  # rows are equally high
        panels = part.subplots(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
        for axes in panels[len(documents) :]:
            axes.set_axis_off()
        for axes, (label, rows) in zip(panels, documents.items()):
            draw_document(axes, label, rows)
    axes = figure.axes[0]
    axes.plot([], [], "o", color="tab:red", label="as printed")
    axes.plot([], [], "o", color="tab:blue", label="corrected, or right as printed")
    axes.plot([], [], ":", color="tab:blue", label=f"exact: at most {EXACT:g}")
    axes.plot([], [], ":", color="tab:red", label=f"wrong: at least {WRONG:g}")
    lines = axes.get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=4, fontsize=12)
    figure.supxlabel(
        "largest relative error against autodiff, in float64 or as said\n"
        "left edge: 0; right edge: not a number, or not computable",
        fontsize=12,
    )
    figure.savefig(path, dpi=100)


def in_columns(groups):
    """The documents in two columns; each goes to the column that has fewer rows."""
    columns = [{}, {}]
    for label, rows in groups.items():
        min(columns, key=count_rows)[label] = rows
    return [column for column in columns if column]


def count_rows(documents):
    return sum(map(len, documents.values()))


def draw_document(axes, label, rows):
    """Draws the rows of one document."""
    for index, row in enumerate(rows):
        draw_errors(axes, index, row)
    axes.set_yticks(range(len(rows)), [row.place for row in rows], fontsize=10)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xscale="log", xlim=(3e-18, 5e4))
    axes.set_title(label, fontsize=13)
    axes.axvline(EXACT, color="tab:blue", linestyle=":", linewidth=1)
    axes.axvline(WRONG, color="tab:red", linestyle=":", linewidth=1)
    axes.grid(alpha=0.25)
    axes.tick_params(axis="x", labelsize=10)


def draw_errors(axes, index, row):
    """Draws the printed and the corrected error of a row, and a line between them."""
    printed, corrected = row.printed, row.corrected
    points = [clamp(error) for error in (printed, corrected) if error is not None]
    if len(points) == 2:
        axes.plot(points, [index, index], color="0.75", linewidth=0.8, zorder=1)
    if printed is not None:
        color = "tab:blue" if corrected is None else "tab:red"
        axes.plot(clamp(printed), index, "o", color=color, markersize=4, zorder=2)
    if corrected is not None:
        axes.plot(clamp(corrected), index, "o", color="tab:blue", markersize=4, zorder=2)


def clamp(error):
    return CEILING if not math.isfinite(error) else max(error, FLOOR)
