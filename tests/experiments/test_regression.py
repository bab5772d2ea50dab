"""Regression of a series: runs of seconds from end to end, and its messages for bad input."""

import json
import pathlib

import jax
import numpy as np
import pytest
from conftest import stop_and_resume

import jaxgru
from experiments import data, regression
from jaxgru import interop, models

pytestmark = pytest.mark.usefixtures("saved_programs")

SCORES = ("one_step_rmse", "free_running_rmse")


def write_csv(path, values):
    rows = [f"day {i},{value:.6f}" for i, value in enumerate(values)]
    path.write_text("\n".join(["day,level", *rows]) + "\n", encoding="utf-8")
    return ["--csv", str(path)]


def run_smoke(out, *arguments):
    assert regression.main(["--smoke", "--out", str(out), *arguments]) == 0
    return out


def read_metrics(run):
    """(the records of training without their times, the scores of the test part)."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return records, json.loads((run / "result.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_smoke(tmp_path_factory.mktemp("sine") / "run")


@pytest.fixture(scope="module")
def csv_runs(tmp_path_factory):
    """Runs on two CSV files that hold an exact sine wave.

    The second with another test part, and stopped and resumed.
    """
    folder = tmp_path_factory.mktemp("csv")
    values = 10 + 3 * np.sin(2 * np.pi * np.arange(200) / 12)
    changed = np.where(np.arange(200) < 160, values, 2 * values)
    whole = write_csv(folder / "whole.csv", values)
    other = write_csv(folder / "other.csv", changed)
    return [
        run_smoke(folder / "first", *whole),
        stop_and_resume(regression.main, ["--smoke", *other], folder / "other", 77),
    ]


def test_run_beats_the_last_value_and_leaves_all_its_files(run):
    names = {path.name for path in run.iterdir()}
    assert names == {
        "checkpoints", "config.json", "forecast.png", "loss.png", "metrics.jsonl", "result.json",
        "weights.safetensors",
    }  # fmt: skip
    for name in ("forecast.png", "loss.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    records, scores = read_metrics(run)
    assert scores["one_step_rmse"] < 0.75 * scores["one_step_rmse_of_last_value"]
    assert records[-1]["training_mse"] < 0.2 * records[0]["training_mse"]
    assert json.loads((run / "config.json").read_text())["seed"] == 0


@pytest.mark.slow
def test_exact_wave_is_forecast_far_better_than_by_the_trivial_guesses(csv_runs):
    scores = read_metrics(csv_runs[0])[1]
    assert scores["one_step_rmse"] < 0.15 * scores["one_step_rmse_of_last_value"]
    assert scores["free_running_rmse"] < 0.3 * scores["free_running_rmse_of_training_mean"]


@pytest.mark.slow
def test_autoregression_continues_an_exact_wave_exactly(csv_runs):
    scores = read_metrics(csv_runs[0])[1]
    assert scores["one_step_rmse_of_autoregression"] < 1e-4
    assert scores["free_running_rmse_of_autoregression"] < 1e-3


@pytest.mark.slow
def test_trivial_guesses_have_their_known_errors_on_an_exact_wave(csv_runs):
    scores = read_metrics(csv_runs[0])[1]
    values = 10 + 3 * np.sin(2 * np.pi * np.arange(200) / 12)
    step = np.sqrt(np.mean(np.diff(values[159:]) ** 2))
    spread = np.sqrt(np.mean((values[160:] - values[:140].mean()) ** 2))
    np.testing.assert_allclose(scores["one_step_rmse_of_last_value"], step, rtol=1e-5)
    np.testing.assert_allclose(scores["free_running_rmse_of_training_mean"], spread, rtol=1e-5)


@pytest.mark.slow
def test_same_seed_repeats_training_and_choice_whatever_the_test_part_holds(csv_runs):
    (records, scores), (records_other, scores_other) = map(read_metrics, csv_runs)
    assert records == records_other  # to the last digit
    assert scores["update"] == scores_other["update"]
    for name in SCORES:
        assert scores_other[name] > 2 * scores[name]


@pytest.mark.slow
def test_model_is_the_one_with_the_least_validation_error(csv_runs):
    records, scores = read_metrics(csv_runs[0])
    best = min(records, key=lambda record: record["validation_rmse"])
    assert scores["update"] == best["update"]
    assert best["update"] != records[-1]["update"]  # the best update is not the last
    like = models.init_sequence_model(jax.random.key(0), 1, 12, 1, spec=jaxgru.CHUNG_2014)
    params = interop.load_weights(csv_runs[0] / "weights.safetensors").params
    assert jax.tree.structure(params) == jax.tree.structure(like)
    series = load_series("--csv", str(csv_runs[0].parent / "whole.csv"), "--smoke")
    errors = regression.predict_series(series, params) - series.values[1:]
    rmse = float(np.sqrt(np.mean(errors[139:159] ** 2)))
    np.testing.assert_allclose(rmse, best["validation_rmse"], rtol=1e-4)


def load_series(*arguments):
    return regression.load_series(regression.parse_args(list(arguments)))


@pytest.mark.slow
def test_free_running_forecast_reads_its_own_predictions():
    params = models.init_sequence_model(jax.random.key(0), 1, 5, 1)
    params = params._replace(w=3 * params.w)
    history = np.sin(np.arange(20, dtype=np.float32))
    extended = list(history)
    for _ in range(3):
        padded = np.array(extended + [0.0] * (23 - len(extended)), np.float32)
        extended.append(float(regression.predict(params, padded)[len(extended) - 1]))
    free = regression.run_freely(params, history, 3)
    np.testing.assert_allclose(free, extended[20:], rtol=1e-4)


@pytest.mark.slow
def test_loss_is_half_the_squared_errors_summed_over_time_of_windows_from_a_zero_state():
    args = regression.parse_args([])
    params = models.init_sequence_model(jax.random.key(0), 1, 5, 1, spec=jaxgru.CHUNG_2014)
    values = np.sin(np.arange(27, dtype=np.float32))
    inputs, targets = next(regression.draw_batches(args, values))
    assert inputs.shape == targets.shape == (25, 1, 1)
    np.testing.assert_array_equal(inputs[1:], targets[:-1])
    outputs = models.sequence_outputs(params, inputs)[1]
    loss, _ = regression.make_loss(args)(params, None, (inputs, targets), jax.random.key(0))
    errors = np.asarray(outputs, np.float64) - targets
    np.testing.assert_allclose(loss, 0.5 * np.sum(errors**2), rtol=1e-5)


@pytest.mark.slow
def test_loss_of_a_batch_is_the_mean_of_its_windows():
    args = regression.parse_args(["--batch-size", "3"])
    params = models.init_sequence_model(jax.random.key(0), 1, 5, 1)
    batch = next(regression.draw_batches(args, np.sin(np.arange(60, dtype=np.float32))))
    windows = [tuple(part[:, i : i + 1] for part in batch) for i in range(3)]
    loss_fn, key = regression.make_loss(args), jax.random.key(0)
    losses = [float(loss_fn(params, None, window, key)[0]) for window in windows]
    np.testing.assert_allclose(loss_fn(params, None, batch, key)[0], np.mean(losses), rtol=1e-5)


def test_windows_cover_the_training_part_and_nothing_else():
    args = regression.parse_args(["--window", "4", "--batch-size", "200"])
    inputs, targets = next(regression.draw_batches(args, np.arange(10, dtype=np.float32)))
    assert set(inputs[0].ravel()) == set(range(6))
    assert set(targets[-1].ravel()) == {4, 5, 6, 7, 8, 9}


def test_sunspots_are_split_by_year_and_scaled_by_the_training_part():
    series = load_series("--series", "sunspots")
    assert (series.times[0], series.times[-1], len(series.values)) == (1700, 2008, 309)
    assert series.times[series.validation] == 1921
    assert series.times[series.test] == 1956
    training = series.standard[: series.validation]
    np.testing.assert_allclose([training.mean(), training.std()], [0, 1], atol=1e-5)


def bad_inputs(tmp_path):
    """{name: (arguments, part of the one-line message)}."""
    tmp_path, good = pathlib.Path(tmp_path), [f"{i},{i % 7}" for i in range(200)]

    def table(name, header, rows):
        (tmp_path / name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return ["--csv", str(tmp_path / name)]

    fine = table("fine", "row,level", good)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "latin").write_bytes(b"caf\xe9,b\n1,2\n")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "keep").write_text("mine")
    level = ["--column", "level"]
    word = [*good[:4], "4,high", *good[5:]]
    hole = [*good[:4], "4,", *good[5:]]
    wide = [*good[:4], "4,1,234", *good[5:]]
    nan, infinite = [*good[:9], "9,NaN", *good[10:]], [*good[:9], "9,inf", *good[10:]]
    far = [*good[:-1], "199,1e30"]
    return {
        "missing file": (["--csv", str(tmp_path / "none")], "cannot be read: No such file"),
        "folder as file": (["--csv", str(tmp_path)], "cannot be read: Is a directory"),
        "empty file": (["--csv", str(tmp_path / "empty")], "is empty"),
        "undecodable": (["--csv", str(tmp_path / "latin")], "not UTF-8 text: byte 3"),
        "endless cell": (
            table("cell", "level", ["1", "2" * 200_000]),
            "after line 2: field larger",
        ),
        "header alone": (table("header", "row,level", []), "has no rows below a header line"),
        "no such column": ([*fine, "--column", "height"], "no column 'height'; it has 'row', 'le"),
        "column twice": (
            [*table("twice", "level,level", good), *level],
            "more than one column 'level'",
        ),
        "several columns": (fine, "several columns of numbers; choose with --column from 'row', "),
        "no numbers": (table("words", "a,b", ["x,y"] * 50), "no column of numbers; choose with"),
        "word": ([*table("word", "row,level", word), *level], "row 5 below the header: 'level'"),
        "word in the only column": (
            table("only", "level", [*"1234567890" * 4, "high", *"123456789" * 4]),
            "row 41 below the header: 'level' must be a finite number, got 'high'",
        ),
        "hole": ([*table("hole", "row,level", hole), *level], "must be a finite number, got ''"),
        "wide": ([*table("wide", "row,level", wide), *level], "row 5 has more cells than the head"),
        "NaN": ([*table("nan", "row,level", nan), *level], "row 10 below the header: 'level' must"),
        "inf": ([*table("inf", "row,level", infinite), *level], "finite number, got 'inf'"),
        "underscore": (table("under", "level", ["1", "2", "1_000"] * 20), "got '1_000'"),
        "short": (
            [*table("short", "row,level", good[:40]), *level, "--window", "30"],
            "has 40 values; its training part, the first 28, must have at least 31 for --window 30",
        ),
        "one row": ([*table("one", "row,level", good[:1]), *level], "has 1 values"),
        "constant": (table("flat", "level", ["0.1"] * 100), "cannot be scaled"),
        "far": ([*table("far", "row,level", far), *level], "cannot be scaled"),
        "huge": (table("huge", "level", ["1e308", "-1e308"] * 50), "cannot be scaled"),
        "unwritable": (["--out", str(tmp_path / "fine" / "run")], "Not a directory"),
        "used folder": (["--out", str(tmp_path / "used")], "nothing was overwritten"),
    }


def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path, capsys):
    for name, (arguments, message) in bad_inputs(tmp_path).items():
        assert regression.main(["--smoke", *arguments]) == 2, name
        captured = capsys.readouterr().err
        assert captured.startswith("regression: "), name
        assert captured.count("\n") == 1, name
        assert message in captured, (name, captured)
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["keep"]
    assert (tmp_path / "used" / "keep").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "0"], "--window must be at least 1 and below inf, got 0"),
        (["--hidden-size", "-1"], "--hidden-size must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--num-updates", "0"], "--num-updates must be at least 1"),
        (["--evaluate-every", "0"], "--evaluate-every must be at least 1"),
        (["--learning-rate", "nan"], "--learning-rate must be at least 0 and below inf, got nan"),
        (["--weight-decay", "-1"], "--weight-decay must be at least 0"),
        (["--recurrent-dropout", "1"], "--recurrent-dropout must be at least 0 and below 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--column", "level"], "--column needs --csv"),
        (["--series", "cosine"], "invalid choice"),
        (["--series", "sunspots", "--csv", "file"], "not allowed with argument"),
    ],
)
def test_bad_option_exits_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        regression.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_column_may_be_named_or_be_the_only_one_of_numbers(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("\ufefflevel, height,day\n1,4,Monday\n2,5,Tuesday\n\n3,6e0,Friday\n", "utf-8")
    for name, expected in (("level", [1.0, 2.0, 3.0]), ("height", [4.0, 5.0, 6.0])):
        assert regression.read_column(path, name)[1].tolist() == expected
    with pytest.raises(data.DataError, match="several columns of numbers"):
        regression.read_column(path, None)
    for newline in ("\r\n", "\r"):
        path.write_text(newline.join(["day,level", "Monday,1", "Tuesday,2", ""]), newline="")
        assert regression.read_column(path, None)[1].tolist() == [1.0, 2.0]
