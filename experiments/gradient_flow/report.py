"""The figure and the table of the observations."""

import numpy as np

FLOOR = 1e-12  # the lower end of logarithmic axes; smaller values are not drawn
COLORS = {"GRU": "tab:blue", "tanh RNN": "tab:red"}
PATH_LABELS = {
    "kept": "kept state", "update": "update gate", "reset": "reset gate",
    "candidate": "candidate",
}  # fmt: skip


def print_table(tasks):
    """Prints a line for each model before and after training."""
    print(
        f"\n{'task':<10}{'model':<10}{'':<8}{'test loss':>10}{'10% reach':>11}{'1% reach':>10}"
        f"{'largest s.v.':>14}{'top Lyapunov':>14}{'memory':>9}"
    )
    for name, task in tasks.items():
        for model, record in task["models"].items():
            for when in ("before", "after"):
                seen = record[when]
                loss = f"{record['test_loss']:.4g}" if when == "after" else "-"
                memory = f"{np.median(seen['memory']):.1f}" if "memory" in seen else "-"
                largest = np.mean(seen["singular_values"]["largest"]["0.5"])
                print(
                    f"{name:<10}{model:<10}{when:<8}{loss:>10}{seen['reach']['0.1']:>11.0f}"
                    f"{seen['reach']['0.01']:>10.0f}{largest:>14.3f}{seen['lyapunov'][0]:>14.4f}"
                    f"{memory:>9}"
                )
    print(
        "reach: the largest T - t at which |dL/dh_t| is above that fraction of |dL/dh_T|; memory: "
        "the\nmedian over units of the steps in which the part of the state that is kept falls to "
        "1/e"
    )


def plot(path, found):
    """Plots four panels for each task, and four for the three cases."""
    from matplotlib.figure import Figure

    tasks = found["tasks"]
    figure = Figure(figsize=(13, 7.4 * (len(tasks) + 1)), layout="constrained")
    rows = figure.subplots(2 * (len(tasks) + 1), 2).reshape(-1, 4)
    for panels, task in zip(rows, tasks.values()):
        _plot_task(panels, task)
    _plot_cases(rows[-1], found["cases"], tasks)
    figure.suptitle(
        "Gradient flow before training (dashed) and after it (solid); bands: 80 % of the sequences",
        fontsize=13,
    )
    figure.savefig(path, dpi=100)


def _plot_task(panels, task):
    credit, paths, spectrum, gates = panels
    title = task["title"]
    for model, record in task["models"].items():
        for when, style in (("before", "--"), ("after", "-")):
            _plot_credit(credit, record[when], style, COLORS[model], f"{model}, {when}")
            _plot_spectrum(spectrum, record[when], style, COLORS[model], f"{model}, {when}")
    credit.set(
        yscale="log", xlabel="distance from the loss, steps", ylim=(FLOOR / 2, None),
        ylabel="|dL/dh_t| / |dL/dh_T|", title=f"{title}: credit over distance",
    )  # fmt: skip
    spectrum.set(
        xlabel="time, steps", ylabel="largest and median (thin) singular value",
        title=f"{title}: dh_t / dh_(t-1)",
    )  # fmt: skip
    if spectrum.get_ylim()[1] > 10:
        spectrum.set_yscale("log")
    else:
        spectrum.set_ylim(bottom=0)
    spectrum.axhline(1.0, color="black", linewidth=0.8)
    after = task["models"]["GRU"]["after"]
    shares = after["paths"]
    paths.stackplot(
        after["distance"], *(shares[name] for name in PATH_LABELS),
        labels=list(PATH_LABELS.values()), alpha=0.8,
    )  # fmt: skip
    paths.set(
        xlabel="distance from the loss, steps", ylabel="fraction of the four norms", ylim=(0, 1),
        title=f"{title}: paths of the trained GRU's credit",
    )  # fmt: skip
    _plot_gates(gates, task["models"]["GRU"], title)
    spectrum.set_ylim(top=1.3 * spectrum.get_ylim()[1])  # room for the legend
    spectrum.legend(fontsize=9, loc="upper right", ncols=2)
    for panel in (credit, paths):
        panel.legend(fontsize=9, loc="lower left")
    for panel in (credit, spectrum, paths):
        panel.grid(alpha=0.3)


def _plot_credit(axes, seen, style, color, label):
    """Quantiles over the sequences, relative to the median of the last step."""
    last = seen["credit"]["0.5"][-1] or 1.0
    low, middle, high = (np.array(v) / last for v in seen["credit"].values())
    drawn = np.where(middle >= FLOOR, middle, np.nan)
    axes.plot(seen["distance"], drawn, style, color=color, label=label)
    if style == "-":
        band = np.maximum([low, high], FLOOR)
        axes.fill_between(seen["distance"], *band, color=color, alpha=0.15, linewidth=0)


def _plot_spectrum(axes, seen, style, color, label):
    time = np.arange(len(seen["distance"]))
    axes.plot(time, seen["singular_values"]["largest"]["0.5"], style, color=color, label=label)
    median = np.maximum(seen["median_singular_value"], FLOOR)
    axes.plot(time, median, style, color=color, linewidth=0.8, alpha=0.7)


def _plot_gates(axes, record, title):
    """Histograms of the reset gate and of the kept fraction; the memory of the units is inset."""
    from matplotlib.ticker import LogLocator

    bins = len(record["after"]["gates"]["reset"])
    edges = np.linspace(0, 1, bins + 1)
    for gate, label, color in (
        ("reset", "reset gate r", "tab:green"),
        ("kept", "kept fraction k", "tab:blue"),
    ):
        axes.stairs(record["after"]["gates"][gate], edges, color=color, fill=True, alpha=0.35)
        axes.stairs(record["after"]["gates"][gate], edges, color=color, label=f"{label}, after")
        before = record["before"]["gates"][gate]
        axes.stairs(before, edges, color=color, linestyle="--", label=f"{label}, before")
    axes.set(
        xlabel="value of the gate", ylabel="fraction of all units and steps",
        title=f"{title}: gates of the GRU",
    )  # fmt: skip
    axes.set_ylim(0, 1.9 * axes.get_ylim()[1])  # room for the legend and the inset
    inset = axes.inset_axes((0.55, 0.58, 0.42, 0.3))
    axes.legend(fontsize=9, loc="upper left")
    for when, style in (("before", "--"), ("after", "-")):
        memory = record[when]["memory"]
        inset.plot(np.linspace(0, 100, len(memory)), memory, style, color="tab:purple")
    inset.set(yscale="log", xlabel="units, %")
    inset.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    inset.yaxis.set_major_formatter("{x:g}")
    inset.yaxis.set_minor_formatter("")
    inset.tick_params(labelsize=9)
    inset.set_title("memory in steps (units sorted)", fontsize=9)
    inset.grid(alpha=0.3)


def _plot_cases(panels, cases, tasks):
    """Errors against the shift that saturates the gates, and errors in the trained networks."""
    errors, limits, largest, networks = panels
    shift = cases["shift"]
    for (name, case), marker in zip(((k, v) for k, v in cases.items() if k != "shift"), "os^"):
        for axes, key in (
            (errors, "printed_error"), (limits, "distance_to_limit"),
            (largest, "largest_singular_value"),
        ):  # fmt: skip
            axes.plot(shift, np.maximum(case[key], FLOOR), marker + "-", label=f"case {name}")
    label = "shift s of the gates' pre-activations"
    errors.set(
        yscale="log", xlabel=label, ylabel="max |printed - full|",
        title='Jacobian as "Gated Recurrent Unit Networks" prints it,\n'
        "without gate paths: right for saturated gates",
    )  # fmt: skip
    limits.set(
        yscale="log", xlabel=label, ylabel="max |full - limit|",
        title="three cases: limits are I, 0 and diag(1 - n²) w_hnᵀ",
    )  # fmt: skip
    largest.set(
        yscale="log", xlabel=label, ylabel="largest singular value",
        title="three cases: largest singular value of the full Jacobian",
    )  # fmt: skip
    for color, task in zip(("tab:blue", "tab:orange"), tasks.values()):
        for when, style in (("before", "--"), ("after", "-")):
            error = task["models"]["GRU"][when]["printed_error"]
            if error is not None:
                low, middle, high = (np.array(v) for v in error.values())
                time = np.arange(len(middle))
                networks.plot(time, middle, style, color=color, label=f"{task['title']}, {when}")
                if when == "after":
                    networks.fill_between(time, low, high, color=color, alpha=0.15, linewidth=0)
    networks.set(
        xlabel="time, steps", ylabel="|printed - full| / |full|, Frobenius",
        title="the Jacobian of that article in the trained GRUs",
    )  # fmt: skip
    networks.set_ylim(bottom=0)
    for axes in panels:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9)
