"""Sequential digits: the smoke run learns, members are independent, and bad input is refused."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import stop_and_resume

from experiments import sequential_digits
from experiments.sequential_digits import IMAGE_SHAPE, SIZES
from jaxgru import losses, models

pytestmark = pytest.mark.usefixtures("saved_programs")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert sequential_digits.main(["--smoke", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The smoke run stopped and resumed, and one with another seed and order of pixels."""
    folder = tmp_path_factory.mktemp("others")
    stop_and_resume(sequential_digits.main, ["--smoke"], folder / "same", 111)
    arguments = ["--smoke", "--permute", "--seed", "1", "--out", str(folder / "other")]
    assert sequential_digits.main(arguments) == 0
    return folder


def read_metrics(run):
    """The records without their times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "images_per_second")
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


@pytest.mark.slow
def test_run_leaves_its_files_and_a_record_an_epoch(run):
    names = {path.name for path in run.iterdir()}
    assert names == {
        "accuracy.png", "checkpoints", "config.json", "digits.png", "metrics.jsonl", "result.json",
    }  # fmt: skip
    for name in ("accuracy.png", "digits.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    config = json.loads((run / "config.json").read_text())
    assert len(read_metrics(run)) == config["epochs"]
    for record in read_metrics(run):
        accuracy = record["validation_accuracy"]
        assert record["validation_lowest"] <= accuracy <= record["validation_highest"]


@pytest.mark.slow
def test_every_member_learns_and_their_average_is_no_worse_than_the_mean(run):
    result = json.loads((run / "result.json").read_text())
    assert len(result["members"]) == 3
    assert result["lowest"] == min(result["members"]) > 0.7  # guessing: 0.1
    assert result["highest"] == max(result["members"])
    assert result["mean"] == pytest.approx(np.mean(result["members"]))
    assert result["standard_deviation"] == pytest.approx(np.std(result["members"], ddof=1))
    assert result["ensemble"] >= result["mean"]
    assert len(set(result["members"])) > 1  # they are not copies of one another


@pytest.mark.slow
def test_same_seed_gives_the_same_though_stopped_and_another_seed_gives_others(run, others):
    assert read_metrics(others / "same") == read_metrics(run)
    assert (others / "same" / "result.json").read_text() == (run / "result.json").read_text()
    assert read_metrics(others / "other")[0]["loss"] != read_metrics(run)[0]["loss"]


@pytest.mark.slow
def test_members_learn_pixels_in_a_shuffled_order_too(others):
    result = json.loads((others / "other" / "result.json").read_text())
    assert result["lowest"] > 0.6


@pytest.mark.slow
def test_gradient_of_a_member_is_that_of_the_member_alone():
    args = sequential_digits.parse_args(["--smoke"])
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: sequential_digits.init_members(args, jax.random.key(0)))
    params = jax.tree.map(lambda v: generator.normal(size=v.shape).astype(np.float32), shapes)
    images = generator.random((3, 5, 8, 8), np.float32)
    labels = generator.integers(0, 10, (3, 5), np.int32)
    loss_fn = sequential_digits.make_loss(args, sequential_digits.choose_order(False))

    def loss_of_one(params, images, labels):
        xs = images.transpose(1, 0, 2)  # row by row
        return losses.categorical_loss(models.final_outputs(params, xs)[1], labels)

    batch, key = (images, labels), jax.random.key(1)
    gradients = jax.jit(jax.grad(lambda p: loss_fn(p, None, batch, key)[0]))(params)
    gradient_of_one = jax.jit(jax.grad(loss_of_one))
    for member in range(3):
        alone = jax.tree.map(lambda v, member=member: v[member], params)
        expected = gradient_of_one(alone, images[member], labels[member])
        for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected)):
            np.testing.assert_allclose(got[member], want, rtol=1e-3, atol=1e-5)


def test_splits_are_fixed_share_no_image_and_hold_every_class():
    splits = sequential_digits.load_splits()
    assert {name: len(labels) for name, (_, labels) in splits.items()} == SIZES
    assert sum(SIZES.values()) == 1797
    again = sequential_digits.load_splits()
    for name, (images, labels) in splits.items():
        np.testing.assert_array_equal(images, again[name][0])
        assert images.shape[1:] == IMAGE_SHAPE and images.min() == 0 and images.max() == 1
        assert np.bincount(labels, minlength=10).min() >= 0.06 * len(labels)
    seen = [{image.tobytes() for image in images} for images, _ in splits.values()]
    assert not (seen[0] & seen[2] or seen[0] & seen[1] or seen[1] & seen[2])


def test_pixels_are_read_one_by_one_in_the_order_asked_for():
    args = sequential_digits.parse_args([])
    images = jnp.arange(3 * 64, dtype=jnp.float32).reshape(3, 8, 8)
    for permute in (False, True):
        order = sequential_digits.choose_order(permute)
        assert sorted(order) == list(range(64))
        assert permute == (list(order) != list(range(64)))
        xs = sequential_digits.as_sequences(args, order, images)
        assert xs.shape == (64, 3, 1)
        np.testing.assert_array_equal(xs[:, 2, 0], 128 + order)


def test_each_member_sees_every_image_once_an_epoch_in_its_own_order():
    args = sequential_digits.parse_args(["--batch-size", "4", "--members", "3"])
    images = np.arange(12, dtype=np.float32)[:, None, None] * np.ones((12, 8, 8), np.float32)
    batches = sequential_digits.draw_batches(args, images, np.arange(12))
    for _ in range(2):
        epoch = [next(batches) for _ in range(3)]
        labels = np.concatenate([labels for _, labels in epoch], axis=1)
        assert (np.sort(labels, axis=1) == np.arange(12)).all()
        assert (labels[0] != labels[1]).any() and (labels[1] != labels[2]).any()
        for images_of_batch, labels_of_batch in epoch:
            np.testing.assert_array_equal(images_of_batch[..., 0, 0], labels_of_batch)


def test_shifted_image_keeps_its_shape_and_moves_by_at_most_the_largest_shift():
    image = np.zeros((8, 8), np.float32)
    image[3, 4] = 1
    images = jnp.asarray(np.tile(image, (300, 1, 1)))
    shifted = np.asarray(sequential_digits.shift_images(jax.random.key(0), images, 1))
    assert shifted.shape == images.shape and (shifted.sum(axis=(1, 2)) == 1).all()
    places = {tuple(np.argwhere(one)[0]) for one in shifted}
    assert places == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}


def test_summary_of_known_probabilities():
    """Two members are right on different halves of four images, and one is certain where right."""
    labels = np.array([0, 1, 2, 3])
    wrong = np.full((4, 10), 0.0)
    wrong[:, 9] = 1
    right = np.eye(10)[labels]
    sure, unsure = 0.9 * right + 0.1 * wrong, 0.4 * right + 0.6 * wrong
    result = sequential_digits.summarize(np.stack([sure, unsure]), labels)
    assert result["members"] == [1.0, 0.0]
    assert result["mean"] == 0.5 and result["lowest"] == 0.0 and result["highest"] == 1.0
    assert result["standard_deviation"] == pytest.approx(2**-0.5)
    assert result["ensemble"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--members", "0"], "--members must be at least 1 and at most 1000, got 0"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--hidden-size", "-2"], "--hidden-size must be at least 1, got -2"),
        (["--batch-size", "1201"], "--batch-size must be at least 1 and at most 1200, got 1201"),
        (["--shift", "4"], "--shift must be at least 0 and at most 3, got 4"),
        (["--seed", "-1"], "--seed must be at least 0 and at most 4294967295, got -1"),
        (["--learning-rate", "nan"], "--learning-rate must be finite and above 0, got nan"),
        (["--learning-rate", "0"], "--learning-rate must be finite and above 0, got 0.0"),
        (["--pixels-per-step", "3"], "invalid choice: 3"),
    ],
)
def test_bad_option_exits_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        sequential_digits.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_folder_that_cannot_be_used_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "keep").write_text("mine")
    for out, message in ((tmp_path, "nothing was overwritten"), (tmp_path / "keep" / "run", "Not")):
        assert sequential_digits.main(["--smoke", "--out", str(out)]) == 2
        captured = capsys.readouterr().err
        assert captured.startswith("sequential_digits: ") and captured.count("\n") == 1
        assert message in captured
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]
    assert (tmp_path / "keep").read_text() == "mine"


def test_missing_scikit_learn_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert sequential_digits.main(["--smoke", "--out", str(tmp_path / "run")]) == 2
    assert "pip install -e" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
