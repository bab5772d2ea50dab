"""Compares a GRU with a tanh RNN on two memory tasks of growing length.

    python -m experiments.memory_tasks                         # the default: about five minutes
    python -m experiments.memory_tasks --adding-steps 400 --copy-blanks
    python -m experiments.memory_tasks --no-chrono             # zero gate biases

Adding problem (Hochreiter and Schmidhuber 1997; ranges and halves as in Arjovsky et al. 2016,
arXiv:1511.06464): the input of every step is a number from U(0, 1) and a mark, which is 1 at one
step in each half and 0 otherwise. The target after the last step is the sum of the two marked
numbers. Always answering with the mean, 1, gives a squared error of 1/6. An answer counts as
correct within 0.08, which is the 0.04 of the 1997 paper on this scale.

Copy task (the same sources): the input is 10 symbols out of 8, then T blanks of which the last is
the signal to start, then 10 steps in which the model repeats the symbols. Only these ten steps are
scored. Guessing gives log 8 nats per symbol.

Both models have one layer, and the same size, head, optimizer, number of updates and batches, which
are drawn anew for every update. Their recurrent weights are orthogonal (Saxe et al. 2014,
arXiv:1312.6120). The biases of the GRU's update gate are initialized so that its time constants are
spread up to the length of the sequence (Tallec and Ollivier 2018, arXiv:1804.11188). Each model has
its own learning rate. A run folder holds config.json, metrics.jsonl, checkpoints and
memory_tasks.png.
"""

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgru
from experiments import runs
from jaxgru import losses, models, training

SMOKE = {
    "adding_steps": [10], "copy_blanks": [], "adding_updates": 200, "copy_updates": 200,
    "hidden_size": 32,
}  # fmt: skip
NUM_SYMBOLS, NUM_RECALLED, TEST_SIZE = 8, 10, 1000


class Task(NamedTuple):
    """How a task draws its sequences, and how it scores the outputs of the last steps."""

    draw: Callable  # (generator, length, batch_size) -> xs [T, B, I], targets [S, B, ...]
    judge: Callable  # (outputs [S, B, K], targets) -> loss, fraction of correct answers
    input_size: int
    output_size: int
    num_answers: int  # S, the steps at the end that are scored
    baseline: float  # the best loss without memory
    labels: tuple[str, str, str]  # axis labels of the length and the loss; label of the baseline


class VanillaParams(NamedTuple):
    """The parameters of a tanh RNN with a linear head."""

    w_x: jax.Array  # [I, H]
    w_h: jax.Array  # [H, H]
    b_h: jax.Array  # [H]
    w: jax.Array  # [H, K]
    b: jax.Array  # [K]


def parse_args(argv):
    parser = runs.make_parser("memory_tasks", "Compares a GRU with a tanh RNN on memory tasks.")
    add = parser.add_argument
    add("--smoke", action="store_true", help="seconds: only the adding problem, at one length")
    add("--out", metavar="FOLDER", help="new or empty run folder (default: runs/memory_tasks-DATE)")
    add("--adding-steps", type=int, nargs="*", metavar="T", default=[10, 25, 50, 100, 200],
        help="lengths of the adding problem")  # fmt: skip
    add("--copy-blanks", type=int, nargs="*", metavar="T", default=[5, 10, 20, 30, 50],
        help="numbers of blanks in the copy task")  # fmt: skip
    add("--adding-updates", type=int, default=1000, help="updates per length and model")
    add("--copy-updates", type=int, default=2000, help="updates per length and model")
    add("--hidden-size", type=int, default=64, help="units of each model")
    add("--batch-size", type=int, default=32, help="sequences per update")
    add("--gru-learning-rate", type=float, default=0.03, help="at the start of a cosine to 0")
    add("--rnn-learning-rate", type=float, default=0.003, help="at the start of a cosine to 0")
    add("--clip-norm", type=float, default=1.0, help="largest global norm of the gradient")
    add("--chrono", action=argparse.BooleanOptionalAction, default=True,
        help="spread the time constants of the update gate")  # fmt: skip
    add("--seed", type=int, default=0, help="of the random numbers")
    runs.add_run_options(parser)
    parser.set_defaults(**(SMOKE if runs.parse_first(parser, argv).smoke else {}))
    args = runs.parse_options(parser, argv)
    least = {"adding_steps": 2, "copy_blanks": 1, "seed": 0}
    least |= dict.fromkeys(("adding_updates", "copy_updates", "hidden_size", "batch_size"), 1)
    positive = ("gru_learning_rate", "rnn_learning_rate", "clip_norm")
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        for entry in value if isinstance(value, list) else [value]:
            if name in least and entry < least[name]:
                parser.error(f"{option} must be at least {least[name]}, got {entry}")
            if name in positive and not 0 < entry < math.inf:
                parser.error(f"{option} must be finite and above 0, got {entry}")
    if args.seed >= 2**32:
        parser.error(f"--seed must be below 2**32, got {args.seed}")
    if not args.adding_steps and not args.copy_blanks:
        parser.error("--adding-steps and --copy-blanks must not both be empty")
    return args


def main(argv=None):
    args = parse_args(argv)
    return runs.run_script("memory_tasks", lambda: train_all(args), smoke=args.smoke)


def train_all(args):
    run = runs.open_run("memory_tasks", args)
    print(runs.describe_device())
    lengths = {"adding": args.adding_steps, "copy": args.copy_blanks}
    results = []
    for name, task in TASKS.items():
        for length, model in itertools.product(sorted(set(lengths[name])), MODELS):
            print(f"{name}, T={length}, {model}", flush=True)
            results.append(train_one(args, run, name, task, length, model))
    plot(run / "memory_tasks.png", results)
    print_table(results)
    print(f"run folder: {run}")
    return 0


def train_one(args, run, name, task, length, model):
    """Trains one model on one task at one length; returns its last record."""
    # Both models see the same sequences; every task and length has other ones.
    seed = [args.seed, list(TASKS).index(name), length]
    fields = {"task": name, "length": length, "model": model}
    num_updates = getattr(args, f"{name}_updates")
    return train_model(args, run, fields, task, num_updates, seed)[-1]


def train_model(args, run, fields, task, num_updates, seed):
    """Trains one model; returns (params before, params after, last record).

    The sequences depend only on the task, the length and the seed. `fields` are the task, length
    and model; they identify the records and checkpoints.
    """
    length, model = fields["length"], fields["model"]
    generator = np.random.default_rng(seed)
    key_params, key_state = jax.random.split(jax.random.key(generator.integers(2**32)))
    init_params, apply_model = MODELS[model]

    def loss_of(params, xs, targets):
        loss, correct = task.judge(apply_model(params, xs)[-task.num_answers :], targets)
        return loss, {"correct": correct}

    def loss_fn(params, carry, batch, key):
        loss, metrics = loss_of(params, *batch)
        return loss, (carry, metrics)

    test = task.draw(generator, length, TEST_SIZE)
    judge_test = jax.jit(loss_of)

    def evaluate(state):
        loss, metrics = judge_test(state.params, *test)
        return {"test_loss": float(loss), "test_correct": float(metrics["correct"])}

    learning_rate = args.gru_learning_rate if model == "GRU" else args.rnn_learning_rate
    schedule = optax.cosine_decay_schedule(learning_rate, num_updates)
    optimizer = optax.chain(training.clip_by_global_norm(args.clip_norm), optax.adam(schedule))
    before = init_params(key_params, task, args, len(test[0]))
    params = jax.tree.map(jnp.copy, before)  # the train step donates the buffers of its state
    state = training.init_train_state(params, optimizer, key=key_state)
    every = max(1, num_updates // 10)
    part = "-".join(str(value).replace(" ", "_") for value in fields.values())
    drawn = generator.bit_generator.state

    def draw_batches(start):
        generator.bit_generator.state = drawn
        return itertools.islice(
            iter(lambda: task.draw(generator, length, args.batch_size), None), start, None
        )

    state, *_ = training.fit(
        training.make_train_step(loss_fn, optimizer),
        state,
        draw_batches,
        num_updates=num_updates,
        evaluate=evaluate,
        evaluate_every=every,
        checkpoints=runs.checkpoints_of(run, args, every, part),
        callbacks=runs.loggers(run, args, **fields),
        log_every=every,
        items_per_update=args.batch_size,
        items_name="sequences",
    )
    return before, state.params, runs.read_records(run, **fields)[-1]


def init_gru_model(key, task, args, num_steps):
    key_model, key_gate = jax.random.split(key)
    params = models.init_sequence_model(
        key_model, task.input_size, args.hidden_size, task.output_size
    )
    if not args.chrono:
        return params
    # sigmoid(log c) = c / (c + 1): the time constant of the unit is c + 1 steps.
    constants = jax.random.uniform(key_gate, (args.hidden_size,), minval=1.0, maxval=num_steps)
    (layer,) = params.layers
    assert isinstance(layer, jaxgru.GRUParams) and layer.b_x is not None
    update_gate = slice(args.hidden_size, 2 * args.hidden_size)
    b_x = layer.b_x.at[update_gate].set(jnp.log(constants))
    return params._replace(layers=(dataclasses.replace(layer, b_x=b_x),))


def apply_gru_model(params, xs):
    return models.sequence_outputs(params, xs)[1]


def init_vanilla(key, task, args, num_steps):
    key_x, key_h, key_head = jax.random.split(key, 3)
    normal, orthogonal = jax.nn.initializers.lecun_normal(), jax.nn.initializers.orthogonal()
    size = args.hidden_size
    return VanillaParams(
        w_x=normal(key_x, (task.input_size, size)),
        w_h=orthogonal(key_h, (size, size)),
        b_h=jnp.zeros(size),
        w=normal(key_head, (size, task.output_size)),
        b=jnp.zeros(task.output_size),
    )


def apply_vanilla(params, xs):
    """The outputs h_t w + b of h_t = tanh(x_t w_x + h_{t-1} w_h + b_h), by a plain scan."""

    def body(h, projected):
        h = jnp.tanh(projected + h @ params.w_h)
        return h, h

    h0 = jnp.zeros((xs.shape[1], params.w_h.shape[0]))
    _, hs = jax.lax.scan(body, h0, xs @ params.w_x + params.b_h)
    return hs @ params.w + params.b


def draw_adding(generator, num_steps, batch_size):
    """xs [T, B, 2], a number and a mark per step; targets [1, B, 1]."""
    numbers = generator.random((num_steps, batch_size), np.float32)
    half, columns = num_steps // 2, np.arange(batch_size)
    marks = np.zeros_like(numbers)
    marks[generator.integers(0, half, batch_size), columns] = 1
    marks[generator.integers(half, num_steps, batch_size), columns] = 1
    return np.stack([numbers, marks], axis=-1), (numbers * marks).sum(axis=0)[None, :, None]


def draw_copy(generator, num_blanks, batch_size):
    """xs [T + 20, B, 10], one-hot symbols, blank or signal; targets [10, B], the symbols."""
    blank, signal = NUM_SYMBOLS, NUM_SYMBOLS + 1
    symbols = generator.integers(0, NUM_SYMBOLS, (NUM_RECALLED, batch_size), np.int32)
    after = np.full((num_blanks + NUM_RECALLED, batch_size), blank)
    after[num_blanks - 1] = signal
    return np.eye(NUM_SYMBOLS + 2, dtype=np.float32)[np.concatenate([symbols, after])], symbols


def judge_adding(outputs, targets):
    correct = jnp.abs(outputs - targets) < 0.08
    return losses.squared_loss(outputs, targets), correct.mean()


def judge_copy(outputs, targets):
    correct = outputs.argmax(axis=-1) == targets
    return losses.categorical_loss(outputs, targets), correct.mean()


TASKS = {
    "adding": Task(
        draw_adding, judge_adding, 2, 1, 1, 1 / 6,
        ("time steps T", "mean squared error", "always the mean: 1/6"),
    ),
    "copy": Task(
        draw_copy, judge_copy, NUM_SYMBOLS + 2, NUM_SYMBOLS, NUM_RECALLED, math.log(NUM_SYMBOLS),
        ("blanks T", "cross-entropy, nats per symbol", "guessing: log 8"),
    ),
}  # fmt: skip
MODELS = {"GRU": (init_gru_model, apply_gru_model), "tanh RNN": (init_vanilla, apply_vanilla)}


def print_table(results):
    print(f"\n{'task':<8}{'T':>5}{'model':>10}{'test loss':>12}{'baseline':>10}{'correct':>9}")
    for result in results:
        print(
            f"{result['task']:<8}{result['length']:>5}{result['model']:>10}"
            f"{result['test_loss']:>12.5f}{TASKS[result['task']].baseline:>10.4f}"
            f"{100 * result['test_correct']:>8.1f}%"
        )


def plot(path, results):
    """Plots the test loss against the length, with a panel for each task."""
    from matplotlib.figure import Figure

    names = [name for name in TASKS if any(result["task"] == name for result in results)]
    figure = Figure(figsize=(5.2 * len(names), 4.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for name, axes in zip(names, panels):
        task = TASKS[name]
        for model, style in zip(MODELS, ("o-", "s-")):
            chosen = [r for r in results if (r["task"], r["model"]) == (name, model)]
            points = [(result["length"], result["test_loss"]) for result in chosen]
            axes.plot(*zip(*points), style, label=model, markersize=5)
        x_label, y_label, baseline = task.labels
        axes.axhline(task.baseline, color="black", linestyle="--", label=baseline)
        axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label, title=f"{name} task")
        lengths = sorted({result["length"] for result in results if result["task"] == name})
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("Test error after the same number of updates")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
