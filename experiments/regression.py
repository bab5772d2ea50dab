"""Many-to-many regression: after each value of a series, the model predicts the next one.

    python -m experiments.regression                            # a noisy sine wave
    python -m experiments.regression --series sunspots          # yearly, 1700 to 2008
    python -m experiments.regression --csv FILE --column NAME   # your own file with a header line

The sine wave has the setting of "Back Propagation Through Time in Many-to-Many type" (section 9.5,
eqs. 9.17 to 9.20) and of its companion code (H. Suzuki 2024, github.com/s-hironobu/guide2dl). The
equation is CHUNG_2014, every window of 25 steps starts from a zero state, every step predicts the
next value, and the loss is half the squared errors summed over time. The companion code uses Adam
at 1e-4, which needs more updates. The sunspot numbers come with statsmodels (source: NOAA).

The series is split in time. Only the training part is used for scaling and training. The validation
part chooses the update whose weights are used. The test part is scored once, at the end, in two
ways. One step ahead, the model is compared with the last value and with a linear autoregression.
Free-running, the model reads all values before the test part, and then its own predictions. A run
folder holds config.json, metrics.jsonl, checkpoints, result.json (the test scores), loss.png,
forecast.png and weights.safetensors.
"""

import csv
import functools
import hashlib
import io
import itertools
import math
import sys
from typing import NamedTuple

import jax
import numpy as np
import optax

import jaxgru
from experiments import data, runs
from jaxgru import interop, losses, models

SPEC = jaxgru.CHUNG_2014  # z weighs the candidate; the reset gate comes before the product
AR_ORDER = 9  # order of the linear autoregression used for comparison
PRESETS = {
    "sine": {},
    "real": {
        "window": 60, "batch_size": 32, "num_updates": 1000, "learning_rate": 1e-3,
        "weight_decay": 1e-2, "recurrent_dropout": 0.4, "evaluate_every": 20,
    },
    "smoke": {
        "window": 20, "hidden_size": 12, "batch_size": 16, "num_updates": 300,
        "learning_rate": 2e-2, "evaluate_every": 20,
    },
}  # fmt: skip


class Series(NamedTuple):
    """A series in order of time.

    Index `validation` is where the training part ends, index `test` where the validation part ends.
    """

    title: str
    unit: str
    time: str  # what a time step is, for the axis of a plot
    times: np.ndarray  # [N]
    values: np.ndarray  # [N] float64
    validation: int
    test: int
    mean: float  # mean of the training part
    std: float  # standard deviation of the training part
    standard: np.ndarray  # [N] float32, (values - mean) / std


def parse_args(argv):
    parser = runs.make_parser("regression", "Trains a GRU to forecast a series.")
    add, group = parser.add_argument, parser.add_mutually_exclusive_group()
    group.add_argument("--series", choices=("sine", "sunspots"), default="sine",
        help="a noisy sine, or the yearly sunspots 1700 to 2008")  # fmt: skip
    group.add_argument("--csv", type=runs.absolute_path, metavar="FILE",
        help="a UTF-8 file with a header line")  # fmt: skip
    add("--column", metavar="NAME", help="column of the CSV file (default: its only numeric one)")
    add("--smoke", action="store_true", help="a tiny run of seconds that tests the script")
    add("--out", metavar="FOLDER", help="new or empty run folder (default: runs/regression-DATE)")
    add("--window", type=int, default=25, help="time steps of a training sequence")
    add("--hidden-size", type=int, default=32, help="units of the GRU")
    add("--batch-size", type=int, default=1, help="windows per update")
    add("--num-updates", type=int, default=12000, help="updates of training")
    add("--learning-rate", type=float, default=1e-3, help="learning rate of AdamW")
    add("--weight-decay", type=float, default=0.0, help="weight decay of AdamW")
    add("--recurrent-dropout", type=float, default=0.0, help="rate in [0, 1)")
    add("--evaluate-every", type=int, default=250, help="in updates")
    add("--seed", type=int, default=0, help="of the random numbers")
    runs.add_run_options(parser)
    known = runs.parse_first(parser, argv)
    parser.set_defaults(**PRESETS["real" if known.csv or known.series == "sunspots" else "sine"])
    parser.set_defaults(**(PRESETS["smoke"] if known.smoke else {}))
    args = runs.parse_options(parser, argv)
    counts = ("window", "hidden_size", "batch_size", "num_updates", "evaluate_every")
    for name in (*counts, "learning_rate", "weight_decay", "recurrent_dropout", "seed"):
        value, least = getattr(args, name), 1 if name in counts else 0
        limit = {"recurrent_dropout": 1, "seed": 2**32}.get(name, math.inf)
        if not least <= value < limit:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} must be at least {least} and below {limit}, got {value}")
    if args.column is not None and args.csv is None:
        parser.error("--column needs --csv")
    return args


def main(argv=None):
    args = parse_args(argv)
    extras = () if args.csv or args.series == "sine" else ("statsmodels.datasets",)
    return runs.run_script(
        "regression", lambda: train(args), ("safetensors", *extras), smoke=args.smoke
    )


def train(args):
    series = load_series(args)
    run = runs.open_run("regression", args)
    print(f"{series.title}, {len(series.values)} values; {runs.describe_device()}")
    key_params, key_state = jax.random.split(jax.random.key(args.seed))
    params = models.init_sequence_model(key_params, 1, args.hidden_size, 1, spec=SPEC)
    optimizer = optax.adamw(args.learning_rate, weight_decay=args.weight_decay)
    training = series.standard[: series.validation]
    digest = hashlib.sha256(series.values.data).hexdigest()
    best = jaxgru.training.fit(
        jaxgru.training.make_train_step(make_loss(args), optimizer),
        jaxgru.training.init_train_state(params, optimizer, key=key_state),
        lambda start: itertools.islice(draw_batches(args, training), start, None),
        num_updates=args.num_updates,
        evaluate=functools.partial(evaluate_validation, series),
        evaluate_every=args.evaluate_every,
        monitor=jaxgru.training.Monitor("validation_rmse"),
        checkpoints=runs.checkpoints_of(run, args, args.evaluate_every, data_sha256=digest),
        callbacks=runs.loggers(run, args),
        log_every=args.evaluate_every,
    ).best
    assert best is not None  # `fit` evaluates at least once
    update = int(best.step)
    metadata = {"config": runs.config_of(args)}
    interop.save_weights(run / "weights.safetensors", best.params, metadata=metadata)
    scores, curves = score_test(series, best.params)
    runs.write_json(run / "result.json", {"update": update, **scores})
    plot_loss(run / "loss.png", series, runs.read_records(run), update)
    plot_forecast(run / "forecast.png", series, *curves, scores["free_running_rmse"])
    print(f"\nRoot mean square errors on the test part, with the weights of update {update}:")
    for name, score in scores.items():
        print(f"  {name.replace('_', ' '):36} {score:.4g}")
    print(f"run folder: {run}")
    return 0


def load_series(args):
    if args.csv:
        name, values = read_column(args.csv, args.column)
        name = name.replace("$", r"\$")  # matplotlib reads text between two $ as mathematics
        labels, times = (name, name, "row"), np.arange(1, len(values) + 1)
        validation, test = int(0.7 * len(values)), int(0.8 * len(values))
    elif args.series == "sunspots":
        from statsmodels.datasets import sunspots

        years, values = np.asarray(sunspots.load_pandas().data, np.float64).T
        labels, times = ("Sunspots", "sunspot number", "year"), years.astype(int)
        validation, test = map(int, np.searchsorted(times, [1921, 1956]))
    else:
        labels, times = ("Noisy sine wave", "amplitude", "step"), np.arange(500)
        noise = 0.05 * np.random.default_rng(args.seed).standard_normal(len(times))
        values, validation, test = np.sin(2 * np.pi * times / 50) + noise, 300, 400
    source, least = args.csv or args.series, max(args.window + 1, 2 * AR_ORDER + 2)
    if validation < least:
        raise data.DataError(
            f"{source} has {len(values)} values; its training part, the first {validation}, must "
            f"have at least {least} for --window {args.window}"
        )
    training = values[:validation]
    with np.errstate(all="ignore"):
        mean, std, spread = training.mean(), training.std(), np.ptp(training)
        standard = (values - mean) / std
    if spread == 0 or not np.abs(standard).max() < 1e6:
        raise data.DataError(
            f"{source} cannot be scaled: its training part, the first {validation} values, is "
            "constant, or another value is a million standard deviations away from its mean"
        )
    standard = standard.astype(np.float32)
    return Series(*labels, times, values, validation, test, mean, std, standard)


def read_column(path, column):
    """(name, float64 values) of one column of a CSV file with a header line."""
    text = data.read_text(path).removeprefix("\ufeff")
    lines = io.StringIO(text, newline=None)
    reader = csv.DictReader(lines, restval="", skipinitialspace=True)
    try:
        rows, names = list(reader), list(reader.fieldnames or [])
    except csv.Error as error:
        raise data.DataError(f"{path}: after line {reader.line_num}: {error}") from None
    if not rows:
        raise data.DataError(f"{path} has no rows below a header line")
    numbers = {name: np.array([parse_number(row[name]) for row in rows]) for name in names}
    # A column is numeric if half of its cells are: then the error below names a bad cell.
    numeric = [name for name in names if np.isfinite(numbers[name]).mean() >= 0.5]
    if column is None and len(numeric) != 1:
        found = "several columns" if numeric else "no column"
        shown = ", ".join(map(repr, numeric or names))
        raise data.DataError(f"{path} has {found} of numbers; choose with --column from {shown}")
    column = numeric[0] if column is None else column
    if names.count(column) != 1:
        found = "more than one column" if column in names else "no column"
        raise data.DataError(f"{path} has {found} {column!r}; it has {', '.join(map(repr, names))}")
    for number, row in enumerate(rows, 1):
        if None in row:
            raise data.DataError(f"{path}: row {number} has more cells than the header line")
        if not math.isfinite(numbers[column][number - 1]):
            cell = f"{column!r} must be a finite number, got {row[column]!r}"
            raise data.DataError(f"{path}: row {number} below the header: {cell}")
    return column, numbers[column]


def parse_number(cell):
    """The number in a cell; NaN if the cell holds no number."""
    try:
        return math.nan if "_" in cell else float(cell)  # float() accepts 1_000
    except ValueError:
        return math.nan


def draw_batches(args, training):
    """Yields batches (inputs, targets) [T, B, 1] of random windows without end."""
    windows = np.lib.stride_tricks.sliding_window_view(training, args.window + 1)
    generator = np.random.default_rng([args.seed, 1])
    while True:
        chosen = generator.integers(len(windows), size=args.batch_size)
        steps = windows[chosen].T[..., None]
        yield steps[:-1], steps[1:]


def make_loss(args):
    """loss_fn for `make_train_step`: eq. 9.18 for each window from a zero state, then the mean."""

    def loss_fn(params, carry, batch, key):
        inputs, targets = batch
        _, outputs = models.sequence_outputs(
            params, inputs, noise=jaxgru.Noise(args.recurrent_dropout), key=key
        )
        loss = losses.squared_loss(outputs, targets, form="half_sum", reduction="batch_mean")
        return loss, (carry, {"training_mse": 2 * loss / len(inputs)})

    return loss_fn


@jax.jit
def predict(params, xs):
    """[T]: the prediction after each value of the sequence xs [T]."""
    return models.sequence_outputs(params, xs[:, None])[1][:, 0]


@functools.partial(jax.jit, static_argnames="num_steps")
def run_freely(params, xs, num_steps):
    """`num_steps` predictions after xs [T]; each prediction is the input of the next step."""
    h, outputs = models.sequence_outputs(params, xs[:, None])

    def body(carry, _):
        h, x = carry
        h, outputs = models.sequence_outputs(params, x[None], h)
        return (h, outputs[0]), x[0]

    return jax.lax.scan(body, (h, outputs[-1]), length=num_steps)[1]


def predict_series(series, params):
    """[N - 1]: predictions of values[1:], in the unit of the series."""
    return series.mean + series.std * np.asarray(predict(params, series.standard[:-1]), np.float64)


def evaluate_validation(series, state):
    validation, test = series.validation, series.test
    errors = predict_series(series, state.params) - series.values[1:]
    return {"validation_rmse": root_mean_square(errors[validation - 1 : test - 1])}


def root_mean_square(errors):
    return float(np.sqrt(np.mean(np.square(errors))))


def lag_rows(values):
    """[N - 8, 10]: the rows [1, y_{t-1}, ..., y_{t-9}], the last of which predicts y_N."""
    lags = np.lib.stride_tricks.sliding_window_view(values, AR_ORDER)[:, ::-1]
    return np.column_stack([np.ones(len(lags)), lags])


@np.errstate(all="ignore")  # a free-running autoregression may diverge
def score_test(series, params):
    """(scores, curves): root mean square errors on the test part, and the GRU's two forecasts."""
    values, test, count = series.values, series.test, len(series.values) - series.test
    training = values[: series.validation]
    coefficients = np.linalg.lstsq(lag_rows(training[:-1]), training[AR_ORDER:], rcond=None)[0]
    linear_free = list(values[test - AR_ORDER : test])
    for _ in range(count):
        linear_free.append(lag_rows(np.array(linear_free[-AR_ORDER:]))[0] @ coefficients)
    free = np.asarray(run_freely(params, series.standard[:test], count), np.float64)
    predictions, free = predict_series(series, params), series.mean + series.std * free
    forecasts = {
        "one_step_rmse": predictions[test - 1 :],
        "one_step_rmse_of_autoregression": lag_rows(values[test - AR_ORDER : -1]) @ coefficients,
        "one_step_rmse_of_last_value": values[test - 1 : -1],
        "free_running_rmse": free,
        "free_running_rmse_of_autoregression": np.array(linear_free[AR_ORDER:]),
        "free_running_rmse_of_training_mean": training.mean(),
    }
    scores = {name: root_mean_square(y - values[test:]) for name, y in forecasts.items()}
    return scores, (predictions, free)


def plot_loss(path, series, records, chosen):
    """Plots the root mean square error one step ahead against updates."""
    from matplotlib.figure import Figure

    updates = [record["update"] for record in records]
    training = [series.std * math.sqrt(record["training_mse"]) for record in records]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(updates, training, label="training, each window from a zero state")
    axes.plot(updates, [r["validation_rmse"] for r in records], label="validation, state carried")
    axes.axvline(chosen, color="gray", linestyle=":", label=f"model chosen, update {chosen}")
    axes.set(xlabel="update", ylabel=f"root mean square error ({series.unit})")
    axes.set(ylim=(0, None), title=f"{series.title}: error one step ahead")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_forecast(path, series, predictions, free, error):
    """Plots the free-running forecast, and the one-step forecasts before it."""
    from matplotlib.figure import Figure

    test, times = series.test, series.times
    first = max(1, 2 * test - len(times))  # as many steps before the forecast as in it
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(times[first], times[test - 1], color="tab:blue", alpha=0.08, linewidth=0)
    axes.plot(times[first:], series.values[first:], color="black", linewidth=1, label="truth")
    warm_up = predictions[first - 1 : test - 1]
    label = "one step ahead: reads the true values"
    axes.plot(times[first:test], warm_up, ".-", color="tab:blue", linewidth=1, label=label)
    name, count = series.time, len(times) - test
    label = f"free-running for {count} {name}s, root mean square error {error:.3g}"
    axes.plot(times[test:], free, ".-", color="tab:red", label=label)
    axes.set(xlabel=name, ylabel=series.unit, title=f"{series.title}: free-running forecast")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
