"""Compares the equations of five documents on the GRU, printed and corrected, with autodiff.

    python -m experiments.derivation                       # f = tanh in the sixteen steps
    python -m experiments.derivation --activation softplus

The table uses short names for the documents:

* sixteen steps: "Feedforward and Backward Propagation in Gated Recurrent Unit (GRU)"
* Tian 2016: Zhiliang Tian, "Recurrent Unit and Gated Recurrent Unit" (2016)
* many-to-many 9.5: "Back Propagation Through Time in Many-to-Many type", section 9.5
* GRU networks: "Gated Recurrent Unit Networks"
* NumPy article: "Gated Recurrent Unit (GRU)", with NumPy code

Errors are max|a - b| / max|b| in float64, where b is autodiff of that document's own forward
equations. An equation is exact if its error is at most 1e-12, and wrong if it is at least 1e-3. The
module `verdicts` defines the errors that each verdict requires. The exit code is 1 if a row does
not have the errors of its verdict. A run folder holds config.json, derivation.json (all rows),
derivation.txt (the printed tables), graph.png and errata.png.
"""

import collections
import math
import sys

import jax
import numpy as np

from experiments import runs
from experiments.derivation import (
    figures,
    gru_networks,
    many_to_many,
    numpy_article,
    sixteen_steps,
    tian,
)
from experiments.derivation.verdicts import EXACT, ILL_FORMED

DOCUMENTS = (sixteen_steps, tian, many_to_many, gru_networks, numpy_article)


def parse_args(argv):
    description = "Compares the equations of five documents on the GRU with autodiff."
    parser = runs.make_parser("derivation", description)
    add = parser.add_argument
    choices = tuple(sixteen_steps.ACTIVATIONS)
    add("--activation", choices=choices, default="tanh", help="f in the sixteen steps")
    add("--out", metavar="FOLDER", help="new or empty run folder (default: runs/derivation-DATE)")
    add("--seed", type=int, default=0, help="seed of the random weights and inputs")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be at least 0 and below 2**32, got {args.seed}")
    return args


def main(argv=None):
    args = parse_args(argv)
    return runs.run_script("derivation", lambda: check_all(args))


def check_all(args):
    run = runs.make_run_folder("derivation", args.out, vars(args))
    with jax.enable_x64(True):
        groups, sides = compute(args.seed, args.activation)
    lines = [*tape_table(args.activation, sides), *table(groups), *summary(groups)]
    print("\n".join(lines))
    (run / "derivation.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    runs.write_json(run / "derivation.json", records(groups))
    operations = sixteen_steps.operations_of(args.activation)
    figures.plot_graph(run / "graph.png", operations, *sides[0])
    figures.plot_errata(run / "errata.png", groups)
    print(f"run folder: {run}")
    broken = [
        f"{label} {row.place}" for label, rows in groups.items() for row in rows if not row.holds
    ]
    if broken:
        print(f"derivation: verdicts that do not hold: {'; '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


def compute(seed, activation):
    """({label of a document: rows}, the tape's and autodiff's values of the sixteen steps)."""
    groups, sides = {}, []
    for index, document in enumerate(DOCUMENTS):
        generator = np.random.default_rng([seed, index])
        if document is sixteen_steps:
            groups[document.LABEL], sides = document.rows(generator, activation)
        else:
            groups[document.LABEL] = document.rows(generator)
    return groups, sides


def tape_table(activation, sides):
    """A table of every value and cotangent of one step: the first entry, by tape and autodiff."""
    (values, cotangents), (true_values, true_cotangents) = sides
    lines = [f"One step with f = {activation}: the first entry of each array, by tape and autodiff"]
    lines.append(f"{'':8}{'value':>12}{'autodiff':>12}{'':4}{'cotangent':>12}{'autodiff':>12}")
    for name in (*sixteen_steps.VALUES, *sixteen_steps.WEIGHTS):
        numbers = [cotangents[name], true_cotangents[name]]
        if name in sixteen_steps.VALUES:
            numbers = [values[name], true_values[name], *numbers]
        cells = [f"{np.ravel(number)[0]:12.8f}" for number in numbers]
        lines.append(f"{name:8}" + "".join(cells[:-2]).rjust(24) + " " * 4 + "".join(cells[-2:]))
    return lines


def table(groups):
    """The lines of a table with the rows of every document under its title."""
    lines = []
    for document in DOCUMENTS:
        rows = groups[document.LABEL]
        lines += ["", f"{document.LABEL}: {document.TITLE}"]
        lines.append(
            f"{'place':<31}{'says':<48}{'verdict':<12}{'printed':>16}{'corrected':>11}  correction"
        )
        for row in rows:
            broken = "" if row.holds else "  <- DOES NOT HOLD"
            lines.append(
                f"{row.place:<31}{row.says:<48}{row.verdict:<12}{show(row.printed):>16}"
                f"{show(row.corrected):>11}  {row.cure}{broken}".rstrip()
            )
    return lines


def show(error):
    if error is None:
        return "-"
    return "does not conform" if error == ILL_FORMED else f"{error:.1e}"


def summary(groups):
    """For each document: the number of rows with each verdict, and the largest exact error."""
    lines = [""]
    for label, rows in groups.items():
        counts = collections.Counter(row.verdict for row in rows)
        double = [row for row in rows if row.limit == EXACT]
        exact = [row.printed if row.verdict == "OK" else row.corrected for row in double]
        num_holding = sum(row.holds for row in rows)
        count = ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))
        lines.append(
            f"{label}: {num_holding} of {len(rows)} hold, exact to {max(exact):.1e}; {count}"
        )
    return lines


def records(groups):
    """Every row as JSON; an error that is not finite becomes a string."""

    def number(error):
        if error is None or math.isfinite(error):
            return error
        return "nan" if math.isnan(error) else "does not conform"

    titles = {document.LABEL: document.TITLE for document in DOCUMENTS}
    return [
        {
            "document": label, "title": titles[label], **row._asdict(), "holds": row.holds,
            "printed": number(row.printed), "corrected": number(row.corrected),
        }
        for label, rows in groups.items() for row in rows
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
