"""Plots how the gradient flows through a tanh RNN and a GRU, before and after training.

    python -m experiments.gradient_flow                        # the default: one to three minutes
    python -m experiments.gradient_flow --run runs/char_lm-DATE   # a saved character model
    python -m experiments.gradient_flow --text FILE

Both networks are trained on the adding problem and on predicting the next character of a text,
given one-hot. The adding problem is that of `experiments.memory_tasks`, but the gate biases of the
GRU start at zero. The loss that is differentiated is that of the last step. So |dL/dh_t| is the
gradient that is left after T - t steps; it is called the credit of step t. The figure has panels
for each task:

* the credit against the distance from the last step, for the GRU also divided among the four paths
  by which dL/dh_t reaches h_{t-1};
* the singular values of dh_t/dh_{t-1} against time;
* the gates, and the memory of every unit: the steps in which the part of the state that is kept
  falls to 1/e.

The last panels are about the Jacobian that the article "Gated Recurrent Unit Networks" prints
without the paths through the gates. They show that this is right only for saturated gates, in the
article's three cases, and how large its error is in the trained networks. A run folder holds
config.json, metrics.jsonl, checkpoints, gradient_flow.json and gradient_flow.png.
"""

import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from experiments import char_lm, data, memory_tasks, runs
from experiments.gradient_flow import observe, report
from jaxgru import models

SMOKE = {
    "num_steps": 12,
    "adding_updates": 20,
    "text_updates": 0,
    "hidden_size": 8,
    "batch_size": 8,
}
MAX_SEQUENCES = 32
MAX_JACOBIAN_ENTRIES = 1 << 28  # of all Jacobians together: 1 GB in float32


def parse_args(argv):
    parser = runs.make_parser("gradient_flow", "Plots how the gradient flows.")
    add = parser.add_argument
    add("--smoke", action="store_true", help="a tiny run of seconds that tests the script")
    add("--run", type=runs.absolute_path, metavar="FOLDER",
        help="use the trained model of this char_lm run instead")  # fmt: skip
    add("--text", type=runs.absolute_path, metavar="FILE",
        help="UTF-8 text to train on, or the input of --run's model")  # fmt: skip
    add("--out", metavar="FOLDER", help="new or empty folder (default: runs/gradient_flow-DATE)")
    add("--num-steps", type=int, default=100, help="time steps T of every sequence")
    add("--adding-updates", type=int, default=1500, help="on the adding problem; 0 to leave it out")
    add("--text-updates", type=int, default=1000, help="on text; 0 to leave it out")
    add("--hidden-size", type=int, default=64, help="units of each network")
    add("--batch-size", type=int, default=32, help="sequences per update")
    add("--gru-learning-rate", type=float, default=0.01, help="at the start of a cosine to 0")
    add("--rnn-learning-rate", type=float, default=0.003, help="at the start of a cosine to 0")
    add("--clip-norm", type=float, default=1.0, help="largest global norm of the gradient")
    add("--seed", type=int, default=0, help="of the random numbers")
    runs.add_run_options(parser)
    parser.set_defaults(**(SMOKE if runs.parse_first(parser, argv).smoke else {}))
    args = runs.parse_options(parser, argv)
    least = {"adding_updates": 0, "text_updates": 0, "hidden_size": 1, "batch_size": 1}
    least |= {"num_steps": 2, "seed": 0}
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if name in least and value < least[name]:
            parser.error(f"{option} must be at least {least[name]}, got {value}")
        if isinstance(value, float) and not 0 < value < math.inf:
            parser.error(f"{option} must be finite and above 0, got {value}")
    if args.seed >= 2**32:
        parser.error(f"--seed must be below 2**32, got {args.seed}")
    if not args.adding_updates and not args.text_updates:
        parser.error("--adding-updates and --text-updates must not both be 0")
    args.chrono = False  # zero gate biases, so that the gates show what training alone does
    return args


def main(argv=None):
    args = parse_args(argv)
    return runs.run_script("gradient_flow", lambda: run_all(args), smoke=args.smoke)


def run_all(args):
    inspected = inspect_run(args) if args.run else None  # raises before a folder is made
    text = None if args.run else load_text(args)
    run = runs.open_run("gradient_flow", args)
    print(runs.describe_device(), flush=True)
    tasks = inspected or train_tasks(args, run, text)
    found = {"tasks": tasks, "cases": observe.saturation_cases(args.seed)}
    found |= {"device": runs.describe_device(), "options": vars(args)}
    runs.write_json(run / "gradient_flow.json", found)
    report.print_table(tasks)
    report.plot(run / "gradient_flow.png", found)
    print(f"run folder: {run}")
    return 0


def load_text(args):
    text = data.read_text(args.text) if args.text else data.load_corpus("pydoc")
    if len(text) < 20 * (args.num_steps + 1):
        raise data.DataError(
            f"the text must have at least 20 sequences of {args.num_steps + 1} characters, got "
            f"{len(text)} characters; lower --num-steps"
        )
    return text


def train_tasks(args, run, text):
    """Trains each model on each task; returns observations before and after, and test losses."""
    tasks = {
        "adding": (memory_tasks.TASKS["adding"], args.adding_updates),
        "text": (text_task(text, args.num_steps), args.text_updates),
    }
    found = {}
    for number, (name, (task, num_updates)) in enumerate(tasks.items()):
        if not num_updates:
            continue
        found[name] = {"title": TITLES[name], "models": {}}
        for model in memory_tasks.MODELS:
            print(f"{name}, T={args.num_steps}, {model}", flush=True)
            fields = {"task": name, "length": args.num_steps, "model": model}
            seed = [args.seed, number, args.num_steps]
            *networks, last = memory_tasks.train_model(args, run, fields, task, num_updates, seed)
            count = count_sequences(args.num_steps, args.hidden_size)
            xs, targets = task.draw(np.random.default_rng([*seed, 1]), args.num_steps, count)
            loss_fn = LastLoss(task, targets[-1:])
            observed = [observe.observe(as_network(params), xs, loss_fn) for params in networks]
            found[name]["models"][model] = {
                "test_loss": last["test_loss"], "baseline": task.baseline,
                "before": observed[0], "after": observed[1],
            }  # fmt: skip
    return found


def count_sequences(num_steps, hidden_size):
    """The number of sequences to observe: 32, or as many as have Jacobians of 1 GB in total."""
    count = min(MAX_SEQUENCES, MAX_JACOBIAN_ENTRIES // (num_steps * hidden_size**2))
    if count < 1:
        raise data.DataError(
            f"{num_steps} Jacobians of size {hidden_size} take more than 1 GB; lower --num-steps"
        )
    return count


TITLES = {"adding": "adding problem", "text": "next character of a text"}


class LastLoss:
    """Maps outputs of the last step [B, K] to the loss of each sequence [B], as the task does."""

    def __init__(self, task, targets):
        self.task, self.targets = task, targets

    def __call__(self, outputs):
        def one(output, target):
            return self.task.judge(output[None, None], target[:, None])[0]

        return jax.vmap(one, in_axes=(0, 1))(outputs, jnp.asarray(self.targets))


def as_network(params):
    """The layer and head of parameters that `memory_tasks` trained."""
    if isinstance(params, memory_tasks.VanillaParams):
        return observe.vanilla_network(params)
    (layer,) = params.layers
    return observe.Network(layer, params.w, params.b)


def text_task(text, num_steps):
    """A `memory_tasks.Task`: prediction of the next character in random passages, one-hot."""
    vocabulary = "".join(sorted(set(text)))
    tokens = data.encode(text, vocabulary)
    rows = np.eye(len(vocabulary), dtype=np.float32)

    def draw(generator, length, batch_size):
        starts = generator.integers(0, len(tokens) - length, batch_size)
        passages = np.stack([tokens[start : start + length + 1] for start in starts], axis=1)
        return rows[passages[:-1]], passages[1:]

    size = len(vocabulary)
    labels = ("time steps T", "nats per character", "guessing: log V")
    return memory_tasks.Task(
        draw, memory_tasks.judge_copy, size, size, num_steps, math.log(size), labels
    )


def inspect_run(args):
    """The record of `train_tasks` for the model of a char_lm run.

    The passages come from the tenth of its text that the run holds out for validation.
    """
    folder = pathlib.Path(args.run)
    trained, vocabulary, params = char_lm.load_run(folder)
    trained.text = args.text or trained.text
    tokens = data.encode(char_lm.load_text(trained), vocabulary)
    tokens = tokens[int(0.9 * len(tokens)) :]
    if len(tokens) <= args.num_steps:
        raise data.DataError(
            f"the held-out tenth of the text of {folder} has {len(tokens)} characters, but a "
            f"sequence needs {args.num_steps + 1}; lower --num-steps"
        )
    count = count_sequences(args.num_steps, trained.hidden_size)
    starts = np.random.default_rng(args.seed).integers(0, len(tokens) - args.num_steps, count)
    passages = np.stack([tokens[s : s + args.num_steps + 1] for s in starts], axis=1)
    key, _ = jax.random.split(jax.random.key(trained.seed))
    before = char_lm.init_params(trained, key, len(vocabulary))
    spec, observed = char_lm.SPECS[trained.spec], []
    loss_fn = LastLoss(memory_tasks.TASKS["copy"], passages[-1:])
    for params_of in (before, params):
        table = params_of.embedding
        table = jnp.eye(len(vocabulary)) if table is None else table
        (layer,) = params_of.layers
        network = observe.Network(layer, params_of.w, params_of.b)
        observed.append(observe.observe(network, table[passages[:-1]], loss_fn))
    tokens, targets = jnp.asarray(passages[:-1]), jnp.asarray(passages[1:])
    loss = models.token_loss(params, tokens, targets)[0]
    record = {"test_loss": float(loss), "baseline": math.log(len(vocabulary))}
    record |= {"before": observed[0], "after": observed[1]}
    return {
        "run": {
            "title": f"character model (reset {spec.reset}, update {spec.update})",
            "models": {"GRU": record},
        }
    }


if __name__ == "__main__":
    sys.exit(main())
