"""Polyphonic music: a run of seconds from end to end, the meaning of its score, and bad input."""

import hashlib
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io
from conftest import stop_and_resume
from saved_bits import saved_bits

from experiments import data, polyphonic_music
from jaxgru import interop, training

WEIGHTS = "weights.safetensors"

pytestmark = pytest.mark.usefixtures("saved_programs")


def write_rolls(path, splits, **changed):
    """Writes a .mat file with a cell array of rolls for each split; `changed` replaces arrays."""
    arrays = {}
    for name, rolls in zip(data.ROLL_SPLITS, splits):
        arrays[name] = np.empty((1, len(rolls)), object)
        for number, roll in enumerate(rolls):
            arrays[name][0, number] = roll
    arrays = {k: v for k, v in {**arrays, **changed}.items() if v is not None}
    scipy.io.savemat(path, arrays, do_compression=True)
    return path


def made_up_splits():
    """The synthetic rolls of --smoke."""
    return [data.draw_chords(count, seed) for seed, count in enumerate((24, 8, 8))]


def read_records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def arrays_of(run):
    """The bytes of every array in the weights and in the checkpoints of a run."""
    arrays = interop.read_safetensors(run / WEIGHTS)
    found = {name: array.tobytes() for name, array in arrays.items()}
    for path in (run / "checkpoints").glob("step-*"):
        found[path.name] = saved_bits(path)[1]
    return found


def read_scores(run):
    return json.loads((run / "result.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    path = write_rolls(folder / "music.mat", made_up_splits())
    arguments = ["--smoke", "--data", str(path), "--out", str(folder / "run")]
    assert polyphonic_music.main(arguments) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def second_run(tmp_path_factory):
    """The same run with the chords drawn again, stopped in the middle of an epoch and resumed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return stop_and_resume(polyphonic_music.main, ["--smoke"], folder, 38, signal.SIGINT)


def load_params(run):
    args = polyphonic_music.parse_args(["--smoke"])
    like = jax.eval_shape(
        lambda: polyphonic_music.init_params(args, jax.random.key(0), made_up_splits()[0])
    )
    params = interop.load_weights(run / WEIGHTS).params
    assert jax.tree.structure(params) == jax.tree.structure(like)
    return jax.tree.map(jnp.asarray, params)


@pytest.mark.slow
def test_run_leaves_all_its_files(run):
    assert {path.name for path in run.iterdir()} == {
        "checkpoints", "config.json", "metrics.jsonl", WEIGHTS, "loss.png", "pianoroll.png",
        "result.json",
    }  # fmt: skip
    for name in ("loss.png", "pianoroll.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    config = json.loads((run / "config.json").read_text())
    digest = hashlib.sha256((run.parent / "music.mat").read_bytes()).hexdigest()
    assert config["data_sha256"] == digest


@pytest.mark.slow
def test_run_learns_chords_that_key_frequencies_do_not_predict(run):
    records, scores = read_records(run), read_scores(run)
    assert [record["epoch"] for record in records] == list(range(26))
    assert scores["test_nll"] < 0.2 * scores["shares_test_nll"]
    assert records[-1]["loss"] < 0.3 * records[1]["loss"]


@pytest.mark.slow
def test_saved_weights_are_those_of_the_epoch_with_the_best_validation_score(run):
    records, scores = read_records(run), read_scores(run)
    best = min(records, key=lambda record: record["validation_nll"])
    assert scores["best_epoch"] == best["epoch"] > 0
    _, valid_rolls, test_rolls = made_up_splits()
    params = load_params(run)
    for rolls, nll in ((valid_rolls, best["validation_nll"]), (test_rolls, scores["test_nll"])):
        found = polyphonic_music.mean_nll(params, polyphonic_music.cut_batches(rolls))
        assert found == pytest.approx(nll, rel=1e-5)


@pytest.mark.slow
def test_first_prediction_is_nearly_the_share_of_each_key():
    args = polyphonic_music.parse_args(["--smoke"])
    rolls = made_up_splits()[0]
    params = polyphonic_music.init_params(args, jax.random.key(0), rolls)
    p = np.clip(np.concatenate(rolls).mean(axis=0), 1e-3, 1 - 1e-3)
    targets = np.concatenate([roll[1:] for roll in rolls])
    wanted = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum() / len(targets)
    found = polyphonic_music.mean_nll(params, polyphonic_music.cut_batches(rolls))
    assert found == pytest.approx(wanted, rel=0.1)


@pytest.mark.slow
def test_same_seed_and_chords_give_the_same_in_a_run_that_was_stopped(run, second_run):
    def numbers(run):
        records = [{k: v for k, v in r.items() if k != "seconds"} for r in read_records(run)]
        return records, read_scores(run)

    assert numbers(run) == numbers(second_run)
    assert arrays_of(run) == arrays_of(second_run)
    assert json.loads((second_run / "config.json").read_text())["data_sha256"] is None


@pytest.mark.slow
def test_score_is_nats_summed_over_keys_and_averaged_over_all_predicted_steps():
    generator = np.random.default_rng(0)
    rolls = [generator.integers(0, 2, (n, 88)).astype(np.float32) for n in (2, 30, 7, 18)]
    args = polyphonic_music.parse_args(["--hidden-size", "4"])
    params = polyphonic_music.init_params(args, jax.random.key(0), rolls)
    b = generator.normal(size=88).astype(np.float32)
    params = params._replace(w=jnp.zeros_like(params.w), b=jnp.asarray(b))
    found = polyphonic_music.mean_nll(params, polyphonic_music.cut_batches(rolls, 3))
    targets, p = np.concatenate([roll[1:] for roll in rolls]), 1 / (1 + np.exp(-b))
    wanted = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum() / len(targets)
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_prediction_of_a_step_sees_the_steps_before_it_alone(run):
    params, key, roll = load_params(run), jax.random.key(0), made_up_splits()[2][0]
    changed = roll.copy()
    changed[6] = 1 - changed[6]
    results = [
        np.asarray(polyphonic_music.predict_and_sample(params, key, jnp.asarray(steps), 6)[0])
        for steps in (roll, changed)
    ]
    assert results[0].shape == (len(roll) - 1, 88)  # row t is of step t + 1
    np.testing.assert_array_equal(results[0][:6], results[1][:6])
    assert np.abs(results[0][6:] - results[1][6:]).max() > 0.1
    assert np.abs(results[0][5:] - roll[6:]).mean() < 0.02


@pytest.mark.slow
def test_sample_begins_with_the_piece_and_goes_on_with_its_chords(run):
    params, roll = load_params(run), made_up_splits()[2][0]
    samples = [
        np.asarray(
            polyphonic_music.predict_and_sample(params, jax.random.key(k), jnp.asarray(roll), 6)[1]
        )
        for k in (0, 0, 1, 2, 3)
    ]
    np.testing.assert_array_equal(samples[0], samples[1])
    agreeing = []
    for sample in samples:
        assert set(np.unique(sample)) == {0, 1}
        np.testing.assert_array_equal(sample[:6], roll[:6])
        agreeing.append((sample[6:] == roll[6:]).all(axis=1).mean())
    assert np.mean(agreeing) > 0.6


def test_every_epoch_draws_each_piece_once_beside_pieces_of_like_length():
    generator = np.random.default_rng(0)
    rolls = [np.full((n, 88), number) for number, n in enumerate(generator.integers(24, 130, 37))]
    args = polyphonic_music.parse_args(["--batch-size", "8", "--epochs", "3"])
    batches = list(polyphonic_music.draw_batches(args, rolls))
    assert len(batches) == 3 * 5
    assert len({xs.shape for xs, _ in batches}) <= 6
    orders, neighbours = [], []
    for epoch in range(3):
        drawn, together = [], set()
        for xs, lengths in batches[5 * epoch : 5 * epoch + 5]:
            assert xs.shape[1:] == (8, 88)
            assert lengths.max() < xs.shape[0] < 2 * lengths.max()
            used = np.flatnonzero(lengths)
            drawn += [(int(xs[0, row, 0]), int(lengths[row])) for row in used]
            together.add(frozenset(xs[0, used, 0].tolist()))
            assert lengths[used].max() < 2 * lengths[used].min()
        assert sorted(drawn) == [(number, len(roll) - 1) for number, roll in enumerate(rolls)]
        orders.append(drawn)
        neighbours.append(together)
    assert orders[0] != orders[1]
    assert neighbours[0] != neighbours[1]


def test_cell_arrays_of_any_orientation_and_number_type_load(tmp_path):
    splits = made_up_splits()
    column = np.empty((2, 1), object)
    column[:, 0] = [splits[1][0].astype(np.uint8), splits[1][1].astype(bool)]
    path = write_rolls(tmp_path / "music.mat", splits, validdata=column)
    rolls = data.read_piano_rolls(path)
    assert [len(rolls[name]) for name in data.ROLL_SPLITS] == [24, 2, 8]
    for found, wanted in zip(rolls["validdata"], splits[1]):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted)


def bad_inputs(tmp_path):
    splits = made_up_splits()

    def changed(name, roll):
        return str(write_rolls(tmp_path / name, [[roll], *splits[1:]]))

    fine = write_rolls(tmp_path / "fine.mat", splits)
    (tmp_path / "cut.mat").write_bytes(fine.read_bytes()[:700])
    (tmp_path / "text.mat").write_text("no music here, " * 50)
    (tmp_path / "empty.mat").write_bytes(b"")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "keep").write_text("mine")
    lacking = write_rolls(tmp_path / "lacking.mat", splits, testdata=None)
    numbers = write_rolls(tmp_path / "numbers.mat", splits, validdata=np.ones((4, 88)))
    none = write_rolls(tmp_path / "none.mat", splits, validdata=np.empty((1, 0), object))
    shape = "piece 0 must be numbers [T, 88], got"
    return {
        "missing file": (["--data", str(tmp_path / "none")], "cannot be read: No such file"),
        "folder as file": (["--data", str(tmp_path)], "cannot be read: Is a directory"),
        "truncated": (["--data", str(tmp_path / "cut.mat")], "is not an intact .mat file: "),
        "text": (["--data", str(tmp_path / "text.mat")], "is not an intact .mat file: "),
        "empty": (["--data", str(tmp_path / "empty.mat")], "is not an intact .mat file: "),
        "wrong keys": (
            ["--data", str(lacking)],
            "must hold traindata, validdata, testdata, got missing keys: testdata",
        ),
        "no cell array": (["--data", str(numbers)], "validdata of"),
        "no pieces": (["--data", str(none)], "must be a cell array with a piano roll for each"),
        "keys": (["--data", changed("87", np.ones((4, 87)))], f"{shape} ndarray [4, 87]"),
        "axes": (["--data", changed("3d", np.ones((4, 88, 2)))], f"{shape} ndarray [4, 88, 2]"),
        "letters": (["--data", changed("abc", np.full((4, 88), "a"))], shape),
        "counts": (["--data", changed("2", np.full((4, 88), 2))], "must hold only 0 and 1"),
        "not a number": (
            ["--data", changed("nan", np.full((4, 88), np.nan))],
            "must hold only 0 and 1",
        ),
        "one step": (
            ["--data", changed("1", np.ones((1, 88)))],
            "must have at least 2 steps, got 1",
        ),
        "no such piece": (["--data", str(fine), "--piece", "8"], "--piece must be below 8"),
        "unwritable": (["--smoke", "--out", str(fine / "run")], "Not a directory"),
        "used": (["--smoke", "--out", str(tmp_path / "used")], "nothing was overwritten"),
    }


def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, (arguments, message) in bad_inputs(tmp_path).items():
        assert polyphonic_music.main(arguments) == 2, name
        captured = capsys.readouterr().err
        assert captured.startswith("polyphonic_music: "), name
        assert captured.count("\n") == 1, name
        assert message in captured, (name, captured)
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["keep"]
    assert not (tmp_path / "runs").exists()


def test_download_offline_or_with_a_wrong_checksum_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "JSB_CHORALES_URL", (tmp_path / "nothing-here").as_uri())
    assert polyphonic_music.main([]) == 2
    assert "when offline, pass a file with --data\n" in capsys.readouterr().err
    (tmp_path / "jaxgru").mkdir()
    (tmp_path / "jaxgru" / "JSB_Chorales.mat").write_text("tampered")
    assert polyphonic_music.main([]) == 2
    assert "wrong checksum; remove it to download it again\n" in capsys.readouterr().err


def test_verified_download_is_read_from_the_cache(tmp_path, monkeypatch):
    path = write_rolls(tmp_path / "music.mat", made_up_splits())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "JSB_CHORALES_URL", path.as_uri())
    monkeypatch.setattr(data, "JSB_CHORALES_SHA256", digest)
    for _ in range(2):
        splits, found = polyphonic_music.load_splits(polyphonic_music.parse_args([]))
        assert found == digest
        assert [len(rolls) for rolls in splits] == [24, 8, 8]
        path.unlink(missing_ok=True)  # the second time the cache is all there is


@pytest.mark.slow
def test_run_that_diverges_keeps_its_last_good_and_its_best_state(tmp_path, monkeypatch, capsys):
    make_train_step = training.make_train_step

    def poisoned(loss_fn, optimizer):
        train_step = make_train_step(loss_fn, optimizer)

        def step(state, batch):
            xs, lengths = batch
            return train_step(state, (xs * np.float32(np.nan if state.step >= 3 else 1), lengths))

        return step

    monkeypatch.setattr(training, "make_train_step", poisoned)
    with jax.numpy_dtype_promotion("standard"):  # for optax.adam
        assert polyphonic_music.main(["--smoke", "--out", str(tmp_path / "run")]) == 1
    folder = tmp_path / "run" / "checkpoints"
    shown = capsys.readouterr().err
    assert "polyphonic_music: fit: loss, gradient or parameters were not finite in the" in shown
    assert f"the parameters are as before them, and are in {folder}" in shown
    best, latest = (training.find_checkpoint(folder, which) for which in ("best", "latest"))
    assert best is not None and latest is not None
    assert best.step == 3 and latest.step >= 13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--hidden-size", "0"], "--hidden-size must be at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size must be at least 1, got -1"),
        (["--learning-rate", "nan"], "--learning-rate must be finite and above 0, got nan"),
        (["--clip-norm", "0"], "--clip-norm must be finite and above 0, got 0.0"),
        (["--recurrent-dropout", "1"], "--recurrent-dropout must be at least 0 and below 1"),
        (["--output-dropout", "-0.1"], "--output-dropout must be at least 0 and below 1"),
        (["--piece", "-1"], "--piece must be at least 0, got -1"),
        (["--prompt-steps", "0"], "--prompt-steps must be at least 1, got 0"),
        (["--roll-steps", "1"], "--roll-steps must be at least 2, got 1"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
    ],
)
def test_bad_option_exits_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        polyphonic_music.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
