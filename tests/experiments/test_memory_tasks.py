"""The memory tasks: their sequences, that both models learn them, and messages for bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import stop_and_resume

from experiments import memory_tasks
from experiments.memory_tasks import TASKS

pytestmark = pytest.mark.usefixtures("saved_programs")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run folders of the smoke test, and of the shortest copy task with the GRU."""
    folder = tmp_path_factory.mktemp("runs")
    assert memory_tasks.main(["--smoke", "--out", str(folder / "smoke")]) == 0
    arguments = ["--smoke", "--adding-steps", "--copy-blanks", "1", "--out", str(folder / "copy")]
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(memory_tasks.MODELS, "tanh RNN")  # compiling takes most of the time
        assert memory_tasks.main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    """Run folders of a few updates: uninterrupted, stopped and resumed, and with another seed."""
    folder = tmp_path_factory.mktemp("repeated")
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(memory_tasks.MODELS, "tanh RNN")
        arguments = ["--smoke", "--adding-updates", "3", "--seed"]
        for name, seed in (("first", "5"), ("other", "6")):
            assert memory_tasks.main([*arguments, seed, "--out", str(folder / name)]) == 0
        stop_and_resume(memory_tasks.main, [*arguments, "5"], folder / "second", 2)
    return folder


def read_metrics(run):
    """The records without their times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "sequences_per_second")
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


@pytest.mark.parametrize("name", ["smoke", "copy"])
@pytest.mark.slow
def test_run_leaves_its_files(runs, name):
    names = {path.name for path in (runs / name).iterdir()}
    assert names == {"checkpoints", "config.json", "metrics.jsonl", "memory_tasks.png"}
    assert (runs / name / "memory_tasks.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((runs / name / "config.json").read_text())["gru_learning_rate"] == 0.03


def last_losses(run):
    return {record["model"]: record["test_loss"] for record in read_metrics(run)}


@pytest.mark.slow
def test_gru_solves_a_short_sum_and_the_tanh_network_learns_it(runs):
    losses = last_losses(runs / "smoke")
    assert losses["GRU"] < 0.02 * TASKS["adding"].baseline
    assert losses["tanh RNN"] < 0.6 * TASKS["adding"].baseline
    correct = [r["test_correct"] for r in read_metrics(runs / "smoke") if r["model"] == "GRU"]
    assert correct[-1] > 0.95


@pytest.mark.slow
def test_gru_learns_to_copy(runs):
    assert last_losses(runs / "copy")["GRU"] < 0.8 * TASKS["copy"].baseline


@pytest.mark.slow
def test_same_seed_gives_the_same_metrics_and_another_seed_others(repeated):
    first, second, other = (read_metrics(repeated / n) for n in ("first", "second", "other"))
    assert first == second
    assert first != other


def test_target_of_the_adding_task_is_the_sum_of_one_number_of_each_half():
    xs, targets = TASKS["adding"].draw(np.random.default_rng(0), 11, 400)
    numbers, marks = xs[..., 0], xs[..., 1]
    assert (marks[:5].sum(axis=0) == 1).all() and (marks[5:].sum(axis=0) == 1).all()
    assert (marks.any(axis=1)).all()  # every step is marked in some sequence
    for column in range(400):
        chosen = numbers[marks[:, column] == 1, column]
        assert targets[0, column, 0] == pytest.approx(chosen.sum(), abs=1e-6)
    assert numbers.min() >= 0 and numbers.max() < 1


def test_copy_task_shows_symbols_then_blanks_then_the_signal_at_the_last_blank():
    xs, symbols = TASKS["copy"].draw(np.random.default_rng(0), 4, 50)
    assert xs.shape == (24, 50, 10) and (xs.sum(axis=-1) == 1).all()
    tokens = xs.argmax(axis=-1)
    np.testing.assert_array_equal(tokens[:10], symbols)
    assert set(symbols.ravel()) == set(range(8))
    np.testing.assert_array_equal(tokens[10:, 0], [8, 8, 8, 9] + [8] * 10)
    assert (tokens[10:] == tokens[10:, :1]).all()


@pytest.mark.parametrize("name", list(TASKS))
def test_baseline_is_the_loss_of_the_best_constant_answer(name):
    task = TASKS[name]
    _, targets = task.draw(np.random.default_rng(0), 6, 20_000)
    shape = (task.num_answers, 20_000, task.output_size)
    constant = jnp.ones(shape)  # the mean of the sum; equal logits
    loss, _ = task.judge(constant, jnp.asarray(targets))
    assert float(loss) == pytest.approx(task.baseline, rel=0.02)


def test_answers_within_0_08_of_the_sum_count_as_correct():
    outputs = jnp.array([1.0, 1.0, 1.0, 1.0]).reshape(1, 4, 1)
    targets = jnp.array([1.07, 0.93, 1.09, 0.91]).reshape(1, 4, 1)
    assert float(TASKS["adding"].judge(outputs, targets)[1]) == 0.5


def test_tanh_network_is_its_equation_written_as_a_loop():
    generator = np.random.default_rng(0)
    shapes = {"w_x": (2, 3), "w_h": (3, 3), "b_h": (3,), "w": (3, 1), "b": (1,)}
    arrays = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    xs, h, outputs = generator.normal(size=(5, 4, 2)), np.zeros((4, 3)), []
    for x in xs:
        h = np.tanh(x @ arrays["w_x"] + h @ arrays["w_h"] + arrays["b_h"])
        outputs.append(h @ arrays["w"] + arrays["b"])
    params = memory_tasks.VanillaParams(**{k: jnp.float32(v) for k, v in arrays.items()})
    with jax.numpy_rank_promotion("allow"):
        got = memory_tasks.apply_vanilla(params, jnp.float32(xs))
    np.testing.assert_allclose(got, np.stack(outputs), atol=1e-5)


@pytest.mark.slow
def test_update_gate_starts_with_time_constants_up_to_the_length():
    args = memory_tasks.parse_args(["--smoke"])
    task, key = TASKS["adding"], jax.random.key(0)
    (layer,) = memory_tasks.init_gru_model(key, task, args, 50).layers
    reset, keep, candidate = np.split(np.asarray(layer.b_x), 3)
    constants = 1 / (1 - 1 / (1 + np.exp(-keep)))
    assert 2 <= constants.min() < 10 and 40 < constants.max() <= 51
    assert not reset.any() and not candidate.any()
    args.chrono = False
    (layer,) = memory_tasks.init_gru_model(key, task, args, 50).layers
    assert not layer.b_x.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adding-steps", "10", "1"], "--adding-steps must be at least 2, got 1"),
        (["--copy-blanks", "0"], "--copy-blanks must be at least 1, got 0"),
        (["--adding-steps", "--copy-blanks"], "must not both be empty"),
        (["--adding-updates", "0"], "--adding-updates must be at least 1, got 0"),
        (["--copy-updates", "-1"], "--copy-updates must be at least 1, got -1"),
        (["--hidden-size", "0"], "--hidden-size must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--gru-learning-rate", "0"], "--gru-learning-rate must be finite and above 0, got 0.0"),
        (["--rnn-learning-rate", "nan"], "--rnn-learning-rate must be finite and above 0, got nan"),
        (["--clip-norm", "inf"], "--clip-norm must be finite and above 0, got inf"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--seed", "4294967296"], "--seed must be below 2**32"),
        (["--hidden-size", "many"], "invalid int value: 'many'"),
    ],
)
def test_bad_option_exits_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        memory_tasks.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_folder_that_cannot_be_used_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "keep").write_text("mine")
    for out, message in ((tmp_path, "nothing was overwritten"), (tmp_path / "keep" / "run", "Not")):
        assert memory_tasks.main(["--smoke", "--out", str(out)]) == 2
        captured = capsys.readouterr().err
        assert captured.startswith("memory_tasks: ") and captured.count("\n") == 1
        assert message in captured
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]
    assert (tmp_path / "keep").read_text() == "mine"
