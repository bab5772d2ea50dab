"""Classifies handwritten digits pixel by pixel, with an ensemble trained at once by `jax.vmap`.

    python -m experiments.sequential_digits                    # the default: two to four minutes
    python -m experiments.sequential_digits --permute --members 3
    python -m experiments.sequential_digits --pixels-per-step 8  # row by row: seconds

The 8 x 8 images that come with scikit-learn (Alpaydin and Kaynak 1998, UCI "Optical Recognition of
Handwritten Digits") are sequences of 64 numbers, and the class is predicted from the last state.
Le, Jaitly and Hinton (2015, arXiv:1504.00941) do the same with MNIST, also with the pixels in one
random order for all images (`--permute`).

Each member of the ensemble has its own initial weights, order of images and random shifts. The
parameters of all members are stacked on a leading axis. The loss is the sum over members of a
vmapped loss, so each member has its own gradient. Adam works on each entry separately, so one
update trains all members independently. The test images choose nothing; the weights are those after
the last epoch. A run folder holds config.json, metrics.jsonl, checkpoints, result.json,
accuracy.png and digits.png.
"""

import functools
import itertools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgru
from experiments import runs
from jaxgru import models, training

SMOKE = {"pixels_per_step": 8, "hidden_size": 24, "members": 3, "epochs": 8, "shift": 0}
SIZES = {"train": 1200, "validation": 200, "test": 397}
IMAGE_SHAPE, NUM_CLASSES = (8, 8), 10


def parse_args(argv):
    description = "Trains an ensemble of GRUs to classify digits pixel by pixel."
    parser = runs.make_parser("sequential_digits", description)
    add = parser.add_argument
    add("--smoke", action="store_true", help="a tiny run of seconds, row by row")
    add(
        "--out", metavar="FOLDER", help="new or empty folder (default: runs/sequential_digits-DATE)"
    )
    add("--members", type=int, default=5, help="GRUs in the ensemble")
    add("--permute", action="store_true", help="read the pixels in a fixed random order")
    add("--pixels-per-step", type=int, choices=(1, 2, 4, 8, 16, 32, 64), default=1,
        help="pixels that the GRU reads in one step")  # fmt: skip
    add("--hidden-size", type=int, default=64, help="units of each GRU")
    add("--batch-size", type=int, default=48, help="images per member and update")
    add("--epochs", type=int, default=60, help="passes over the training images")
    add("--learning-rate", type=float, default=0.01, help="at the start of a cosine to 0")
    add("--shift", type=int, default=1, help="largest shift of a training image, in pixels")
    add("--seed", type=int, default=0, help="of the random numbers")
    runs.add_run_options(parser)
    parser.set_defaults(**(SMOKE if runs.parse_first(parser, argv).smoke else {}))
    args = runs.parse_options(parser, argv)
    limits = {"members": (1, 1000), "hidden_size": (1, math.inf), "epochs": (1, math.inf)}
    limits |= {"batch_size": (1, SIZES["train"]), "shift": (0, 3), "seed": (0, 2**32 - 1)}
    for name, (least, most) in limits.items():
        if not least <= getattr(args, name) <= most:
            option = f"--{name.replace('_', '-')}"
            upper = "" if most == math.inf else f" and at most {most}"
            parser.error(f"{option} must be at least {least}{upper}, got {getattr(args, name)}")
    if not 0 < args.learning_rate < math.inf:
        parser.error(f"--learning-rate must be finite and above 0, got {args.learning_rate}")
    return args


def main(argv=None):
    args = parse_args(argv)
    return runs.run_script(
        "sequential_digits", lambda: train(args), ("sklearn.datasets",), smoke=args.smoke
    )


def train(args):
    splits = load_splits()
    run = runs.open_run("sequential_digits", args, sizes=SIZES)
    num_steps = math.prod(IMAGE_SHAPE) // args.pixels_per_step
    print(f"{args.members} members, {num_steps} steps per image; {runs.describe_device()}")

    key_params, key_state = jax.random.split(jax.random.key(args.seed))
    params = init_members(args, key_params)
    updates_per_epoch = SIZES["train"] // args.batch_size
    num_updates = args.epochs * updates_per_epoch
    # The optimizer must not mix members, as clipping by the global norm would.
    optimizer = optax.adam(optax.cosine_decay_schedule(args.learning_rate, num_updates))
    order = choose_order(args.permute)
    state, *_ = training.fit(
        training.make_train_step(make_loss(args, order), optimizer),
        training.init_train_state(params, optimizer, key=key_state),
        lambda start: itertools.islice(draw_batches(args, *splits["train"]), start, None),
        num_updates=num_updates,
        evaluate=functools.partial(evaluate, args, order, splits["validation"]),
        evaluate_every=updates_per_epoch,
        checkpoints=runs.checkpoints_of(run, args, updates_per_epoch),
        callbacks=runs.loggers(run, args),
        log_every=num_updates,
        items_per_update=args.members * args.batch_size,
        items_name="images",
    )
    records = runs.read_records(run)
    images, labels = splits["test"]
    probabilities = np.asarray(predict(args, order, state.params, images))
    result = summarize(probabilities, labels)
    runs.write_json(run / "result.json", result)
    mean = probabilities.mean(axis=0)
    plot_accuracy(run / "accuracy.png", records, updates_per_epoch, mean, labels)
    plot_digits(run / "digits.png", images, mean, labels)
    print_result(result)
    print(f"run folder: {run}")
    return 0


def load_splits():
    """Images [N, 8, 8] in [0, 1] and labels [N] of each split, which do not depend on the seed."""
    from sklearn.datasets import load_digits

    pixels, targets = map(np.asarray, load_digits(return_X_y=True))
    images, labels = (pixels.reshape(-1, 8, 8) / 16).astype(np.float32), targets.astype(np.int32)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    ends = np.cumsum(list(SIZES.values()))[:-1]
    return {
        name: (images[chosen], labels[chosen])
        for name, chosen in zip(SIZES, np.split(shuffled, ends))
    }


def choose_order(permute):
    """The order in which the pixels are read."""
    pixels = np.arange(math.prod(IMAGE_SHAPE))
    return np.random.default_rng(1).permutation(pixels) if permute else pixels


def init_members(args, key):
    """The parameters of all members, stacked on a leading axis."""
    # A loop takes less time than compiling a vmapped orthogonal initializer.
    members = [
        models.init_sequence_model(key, args.pixels_per_step, args.hidden_size, NUM_CLASSES)
        for key in jax.random.split(key, args.members)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def draw_batches(args, images, labels):
    """Yields images [M, B, 8, 8] and labels [M, B] without end; each member has its own order."""
    generator = np.random.default_rng(args.seed)
    order = np.tile(np.arange(len(labels)), (args.members, 1))
    while True:
        order = generator.permuted(order, axis=1)
        for start in range(0, len(labels) - args.batch_size + 1, args.batch_size):
            batch = order[:, start : start + args.batch_size]
            yield images[batch], labels[batch]


def as_sequences(args, order, images):
    """xs [T, B, I]: the pixels of images [B, 8, 8] in the given order."""
    pixels = images.reshape(len(images), -1)[:, order]
    return pixels.reshape(len(images), -1, args.pixels_per_step).swapaxes(0, 1)


def shift_images(key, images, largest):
    """Each image shifted by up to `largest` pixels along both axes, and filled with zeros."""
    padded = jnp.pad(images, ((0, 0), (largest, largest), (largest, largest)))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * largest + 1)
    return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, corner, IMAGE_SHAPE))(
        padded, corners
    )


def make_loss(args, order):
    """loss_fn for `make_train_step`: the sum over members, so that each has its own gradient."""

    def member_loss(params, key, images, labels):
        shifted = shift_images(key, images, args.shift) if args.shift else images
        _, logits = models.final_outputs(params, as_sequences(args, order, shifted))
        return jaxgru.losses.categorical_loss(logits, labels), (
            logits.argmax(axis=-1) == labels
        ).mean()

    def loss_fn(params, carry, batch, key):
        keys = jax.random.split(key, args.members)
        losses, accuracies = jax.vmap(member_loss)(params, keys, *batch)
        return losses.sum(), (carry, {"nats": losses.mean(), "accuracy": accuracies.mean()})

    return loss_fn


def predict(args, order, params, images):
    """The probabilities [M, N, 10] of every member."""
    return _predict(params, as_sequences(args, order, images))


@jax.jit
def _predict(params, xs):
    return jax.nn.softmax(jax.vmap(lambda p: models.final_outputs(p, xs)[1])(params), axis=-1)


def evaluate(args, order, split, state):
    images, labels = split
    probabilities = np.asarray(predict(args, order, state.params, images))
    accuracies = (probabilities.argmax(axis=-1) == labels).mean(axis=1)
    return {
        "validation_accuracy": float(accuracies.mean()),
        "validation_lowest": float(accuracies.min()),
        "validation_highest": float(accuracies.max()),
    }


def summarize(probabilities, labels):
    """Test accuracies of each member, their mean and spread, and that of the mean probabilities."""
    accuracies = (probabilities.argmax(axis=-1) == labels).mean(axis=1)
    return {
        "members": accuracies.tolist(),
        "mean": float(accuracies.mean()),
        "standard_deviation": float(accuracies.std(ddof=1)) if len(accuracies) > 1 else 0.0,
        "lowest": float(accuracies.min()),
        "highest": float(accuracies.max()),
        "ensemble": float((probabilities.mean(axis=0).argmax(axis=-1) == labels).mean()),
    }


def print_result(result):
    percent = {name: f"{100 * result[name]:.2f} %" for name in result if name != "members"}
    print(
        f"\ntest accuracy of {len(result['members'])} members: mean {percent['mean']}, standard "
        f"deviation {percent['standard_deviation']}, lowest {percent['lowest']}, highest "
        f"{percent['highest']}\ntest accuracy of the ensemble's mean probabilities: "
        f"{percent['ensemble']}"
    )


def plot_accuracy(path, records, updates_per_epoch, probabilities, labels):
    """Plots the accuracy of the members by epoch, and the ensemble's confusion matrix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes, matrix = figure.subplots(1, 2)
    epochs = [record["update"] / updates_per_epoch for record in records]
    curves = {
        name: [100 * record[name] for record in records]
        for name in ("accuracy", "validation_accuracy", "validation_lowest", "validation_highest")
    }
    axes.plot(epochs, curves["accuracy"], color="tab:gray", label="training, mean of members")
    axes.plot(epochs, curves["validation_accuracy"], label="validation, mean of members")
    axes.fill_between(
        epochs, curves["validation_lowest"], curves["validation_highest"],
        alpha=0.25, label="validation, lowest to highest member",
    )  # fmt: skip
    axes.set(xlabel="epoch", ylabel="accuracy, %", title="Training", ylim=(0, 101))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    counts = np.zeros((NUM_CLASSES, NUM_CLASSES), int)
    np.add.at(counts, (labels, probabilities.argmax(axis=-1)), 1)
    wrong = counts * (1 - np.eye(NUM_CLASSES, dtype=int))
    matrix.imshow(wrong, cmap="Reds", vmin=0, vmax=max(4, 2 * wrong.max()))
    for (row, column), count in np.ndenumerate(counts):
        if count:
            matrix.text(column, row, count, ha="center", va="center")
    matrix.set(xlabel="predicted", ylabel="true", title="Test images, averaged probabilities")
    matrix.set(xticks=range(NUM_CLASSES), yticks=range(NUM_CLASSES))
    figure.savefig(path, dpi=150)


def plot_digits(path, images, probabilities, labels):
    """Plots the test images whose true class has the smallest probability."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    own = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    for axes, index in zip(figure.subplots(2, 4).flat, own.argsort()):
        guess = probabilities[index].argmax()
        axes.imshow(images[index], cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(
            f"{labels[index]} predicted {guess}\n({100 * probabilities[index, guess]:.0f} %)",
            color="tab:red" if guess != labels[index] else "tab:green",
        )
        axes.set_axis_off()
    figure.suptitle("The hardest test images: true class, prediction and its probability")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
