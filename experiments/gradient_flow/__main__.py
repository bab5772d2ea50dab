"""How gradient flows through a tanh RNN and a GRU, before and after training: one picture.

    python -m experiments.gradient_flow                        # the default: about three minutes
    python -m experiments.gradient_flow --run runs/char_lm-DATE   # a saved character model
    python -m experiments.gradient_flow --text FILE

Both networks are trained on the adding problem (see `experiments.memory_tasks`; the GRU without the
spread gate biases used there) and on predicting the next character of a real text, one-hot. The
loss that is looked at is that of the last step, so |dL/dh_t| tells how much credit is left after
T - t steps. A row of the report is a task:

* credit over distance, and its split into the four paths of a step;
* singular values of dh_t/dh_{t-1} against time;
* gates, and the memory of every unit along its kept state.

The last row holds the three cases of the article "Gated Recurrent Unit Networks": where its printed
Jacobian, without the paths through the gates, is right (saturated gates alone), and how far it is
off in the trained networks. A run folder holds gradient_flow.json, gradient_flow.png and
metrics.jsonl.
"""

import argparse
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
    "text_updates": 20,
    "hidden_size": 8,
    "batch_size": 8,
}
MOST_SEQUENCES, MOST_NUMBERS = 32, 1 << 28  # of all Jacobians together: 1 GB of float32


def parse_args(argv):
    parser = argparse.ArgumentParser(
        "python -m experiments.gradient_flow", description="Draws how gradient flows."
    )
    add = parser.add_argument
    add("--smoke", action="store_true", help="seconds, to see that all of it works")
    add("--run", metavar="FOLDER", help="look at the model of this char_lm run instead")
    add("--text", metavar="FILE", help="UTF-8 text to learn, or to show to --run")
    add("--out", metavar="FOLDER", help="run folder, new or empty; runs/gradient_flow-DATE else")
    add("--num-steps", type=int, default=100, help="T of every sequence")
    add("--adding-updates", type=int, default=1500)
    add("--text-updates", type=int, default=1000)
    add("--hidden-size", type=int, default=64)
    add("--batch-size", type=int, default=32)
    add("--gru-learning-rate", type=float, default=0.01, help="falls to 0 by a cosine")
    add("--rnn-learning-rate", type=float, default=0.003, help="falls to 0 by a cosine")
    add("--clip-norm", type=float, default=1.0)
    add("--seed", type=int, default=0)
    runs.add_run_options(parser)
    parser.set_defaults(**(SMOKE if parser.parse_known_args(argv)[0].smoke else {}))
    args = runs.take_options(parser, argv)
    least = dict.fromkeys(("adding_updates", "text_updates", "hidden_size", "batch_size"), 1)
    least |= {"num_steps": 2, "seed": 0}
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if name in least and value < least[name]:
            parser.error(f"{option} must be at least {least[name]}, got {value}")
        if isinstance(value, float) and not 0 < value < math.inf:
            parser.error(f"{option} must be finite and above 0, got {value}")
    if args.seed >= 2**32:
        parser.error(f"--seed must be below 2**32, got {args.seed}")
    args.chrono = False  # the gates start unspread: what they become is what is looked at
    return args


def main(argv=None):
    args = parse_args(argv)
    return runs.run_script("gradient_flow", lambda: run_all(args))


def run_all(args):
    inspected = inspect_run(args) if args.run else None  # before a folder is made
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
            f"the text has {len(text)} characters, fewer than 20 sequences of {args.num_steps}; "
            "lower --num-steps"
        )
    return text


def train_tasks(args, run, text):
    """For each task and model what is seen before and after training, and the test losses."""
    tasks = {
        "adding": (memory_tasks.TASKS["adding"], args.adding_updates),
        "text": (text_task(text, args.num_steps), args.text_updates),
    }
    found = {}
    for number, (name, (task, num_updates)) in enumerate(tasks.items()):
        found[name] = {"title": TITLES[name], "models": {}}
        for model in memory_tasks.MODELS:
            print(f"{name}, T={args.num_steps}, {model}", flush=True)
            fields = {"task": name, "length": args.num_steps, "model": model}
            seed = [args.seed, number, args.num_steps]
            *networks, last = memory_tasks.train_model(args, run, fields, task, num_updates, seed)
            count = count_sequences(args.num_steps, args.hidden_size)
            xs, targets = task.draw(np.random.default_rng([*seed, 1]), args.num_steps, count)
            loss_fn = LastLoss(task, targets[-1:])
            seen = [observe.observe(as_network(params), xs, loss_fn) for params in networks]
            found[name]["models"][model] = {
                "test_loss": last["test_loss"], "baseline": task.baseline,
                "before": seen[0], "after": seen[1],
            }  # fmt: skip
    return found


def count_sequences(num_steps, hidden_size):
    """How many sequences are looked at: as many as memory allows for their Jacobians."""
    count = min(MOST_SEQUENCES, MOST_NUMBERS // (num_steps * hidden_size**2))
    if count < 1:
        raise data.DataError(
            f"{num_steps} Jacobians of size {hidden_size} take more than 1 GB; lower --num-steps"
        )
    return count


TITLES = {"adding": "adding problem", "text": "next character of a text"}


class LastLoss:
    """outputs of the last step [B, K] -> the loss of each sequence [B], by a task's own judge."""

    def __init__(self, task, targets):
        self.task, self.targets = task, targets

    def __call__(self, outputs):
        def one(output, target):
            return self.task.judge(output[None, None], target[:, None])[0]

        return jax.vmap(one, in_axes=(0, 1))(outputs, jnp.asarray(self.targets))


def as_network(params):
    """The layer and head of what `memory_tasks` trains."""
    if isinstance(params, memory_tasks.VanillaParams):
        return observe.vanilla_network(params)
    (layer,) = params.layers
    return observe.Network(layer, params.w, params.b)


def text_task(text, num_steps):
    """Prediction of the next character, one-hot: a `memory_tasks.Task` of random passages."""
    vocabulary = "".join(sorted(set(text)))
    tokens = data.encode(text, vocabulary)
    rows = np.eye(len(vocabulary), dtype=np.float32)

    def draw(generator, length, batch_size):
        starts = generator.integers(0, len(tokens) - length, batch_size)
        passages = np.stack([tokens[start : start + length + 1] for start in starts], axis=1)
        return rows[passages[:-1]], passages[1:]

    size = len(vocabulary)
    labels = ("steps of the sequence, T", "nats per character", "guessing: log V")
    return memory_tasks.Task(
        draw, memory_tasks.judge_copy, size, size, num_steps, math.log(size), labels
    )


def inspect_run(args):
    """The same record for the model of a char_lm run, on passages of its own held-out tenth."""
    folder = pathlib.Path(args.run)
    trained, vocabulary, params = char_lm.load_run(folder)
    trained.text = args.text or trained.text
    tokens = data.encode(char_lm.load_text(trained), vocabulary)
    tokens = tokens[int(0.9 * len(tokens)) :]
    if len(tokens) <= args.num_steps:
        raise data.DataError(
            f"the held-out tenth of the text of {folder} has {len(tokens)} characters, fewer than "
            f"the {args.num_steps + 1} of a sequence; lower --num-steps"
        )
    count = count_sequences(args.num_steps, trained.hidden_size)
    starts = np.random.default_rng(args.seed).integers(0, len(tokens) - args.num_steps, count)
    passages = np.stack([tokens[s : s + args.num_steps + 1] for s in starts], axis=1)
    key, _ = jax.random.split(jax.random.key(trained.seed))
    before = char_lm.init_params(trained, key, len(vocabulary))
    spec, seen = char_lm.SPECS[trained.spec], []
    loss_fn = LastLoss(memory_tasks.TASKS["copy"], passages[-1:])
    for params_of in (before, params):
        table = params_of.embedding
        table = jnp.eye(len(vocabulary)) if table is None else table
        (layer,) = params_of.layers
        network = observe.Network(layer, params_of.w, params_of.b)
        seen.append(observe.observe(network, table[passages[:-1]], loss_fn))
    tokens, targets = jnp.asarray(passages[:-1]), jnp.asarray(passages[1:])
    loss = models.token_loss(params, tokens, targets)[0]
    record = {"test_loss": float(loss), "baseline": math.log(len(vocabulary))}
    record |= {"before": seen[0], "after": seen[1]}
    return {
        "run": {
            "title": f"character model (reset {spec.reset}, update {spec.update})",
            "models": {"GRU": record},
        }
    }


if __name__ == "__main__":
    sys.exit(main())
