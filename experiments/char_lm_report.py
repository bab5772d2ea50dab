"""What `experiments.char_lm` reports: its first and last lines, its check, and a plot."""

import shlex
import sys

import jax

from experiments import data, distributed, runs
from jaxgru import checks, models

VALIDATION = "validation_bits_per_character"


def print_begin(args, problem, params, run):
    """Says what is trained, on what, and where the results go."""
    held_out = "all for training" if problem.validation is None else "a tenth for validation"
    count, reset = sum(v.size for v in jax.tree.leaves(params)), params.layers[0].spec.reset
    inputs = f"embedding of {args.embedding_size}" if args.embedding_size else "one-hot inputs"
    num_updates = args.epochs * len(problem.inputs)
    device = f"{runs.describe_device()}{distributed.describe(problem.layout)}"
    print(
        f"text:     {args.text or data.CORPORA[args.corpus]}: {len(problem.text):,} characters, "
        f"{len(problem.vocabulary)} of them different; {held_out}\n"
        f"model:    {inputs}, GRU of {args.hidden_size} units, reset {reset} the product; "
        f"{count:,} parameters\n"
        f"training: {args.epochs} epochs, {num_updates:,} updates of {args.batch_size} sequences "
        f"of {args.num_steps} characters\n"
        f"device:   {device}\n"
        f"results:  {run}\n",
        flush=True,
    )


def cross_check(args, run, params, h0, tokens, targets):
    """Compares the handwritten gradient with jax.grad and finite differences; True if they agree.

    A table with every leaf is written to RUN/cross_check.txt.
    """

    def loss(gradient):
        def loss_fn(params, h0):
            return models.token_loss(
                params, tokens, targets, h0, reduction=args.reduction,
                gradient=gradient,
            )  # fmt: skip

        return loss_fn

    print("Cross-check of the handwritten gradient, on this model and its first batch:")
    report = checks.check_gradients(
        loss("bptt"), loss("autodiff"), params, h0,
        num_cotangents=1, num_coordinates=3, tolerances={"float64": 1e-12},
    )  # fmt: skip
    (run / "cross_check.txt").write_text(str(report) + "\n", encoding="utf-8")
    for dtype, reference, name, limit in (
        ("float32", "autodiff", "jax.grad", 2e-5),
        ("float64", "autodiff", "jax.grad", 1e-12),
        ("float64", "finite-difference", "finite differences", 1e-6),
    ):
        # Finite differences cannot resolve a gradient that has vanished. `check_gradients` gives
        # such rows a wider tolerance, and they are counted apart here.
        rows = [row for row in report.rows if (row.dtype, row.reference) == (dtype, reference)]
        resolved = [row.error for row in rows if row.tolerance < 2 * limit]
        line = (
            f"  {dtype} against {name:<18}  largest relative error {max(resolved, default=0.0):.1e}"
        )
        line += f"  (limit {limit}"
        vanished = len(rows) - len(resolved)
        print(line + (f"; {vanished} gradients too small to compare)" if vanished else ")"))
    verdict = str(report).partition("\n")[0]
    print(f"  {verdict}  Every leaf: {run / 'cross_check.txt'}\n", flush=True)
    if not report.passed:
        print(report, file=sys.stderr)
    return report.passed


def print_end(args, run, prompt):
    """Draws the loss; says how good the model is, where it is, and what can be done with it."""
    records, last = runs.read_records(run), runs.read_records(run)[-1]
    plot(run / "loss.png", records)
    validated = [record for record in records if VALIDATION in record]
    name, scored = (VALIDATION, validated) if validated else ("bits_per_character", records)
    best = min(scored, key=lambda record: record[name])
    folder, prompt = shlex.quote(str(run)), shlex.quote(prompt)
    print(
        f"\n{name.replace('_', ' ')}: {best[name]:.4f} at best (perplexity {2 ** best[name]:.3f}), "
        f"after update {best['update']:,}; {scored[-1][name]:.4f} at the end\n"
        f"training: {last['seconds']:.1f} s\n"
        f"results:  {run}: weights.safetensors (of the last update), loss.png, samples.txt\n"
        f"sample:   python -m experiments.char_lm --sample {folder} --prompt {prompt}\n"
        f"convert:  python -m jaxgru.interop jaxgru {folder} onnx model.onnx"
    )
    if args.spec == "pytorch":
        print(f"          python -m jaxgru.interop jaxgru {folder} torch gru.safetensors")
    else:
        print("          PyTorch, Flax and Equinox have no GRU of this equation; for them, train")
        print("          with --spec pytorch")


def plot(path, records):
    """Bits per character against updates, training and validation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, label, style in (
        ("bits_per_character", "training", "-"),
        ("validation_bits_per_character", "validation", "o-"),
    ):
        points = [(r["update"], r[name]) for r in records if name in r]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=4)
    axes.set(xlabel="update", ylabel="bits per character", title="Character language model")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
