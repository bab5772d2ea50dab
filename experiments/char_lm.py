"""A character language model, trained through the handwritten backward pass.

    python -m experiments.char_lm                                  # the default: 2 or 3 minutes
    python -m experiments.char_lm --text FILE
    python -m experiments.char_lm --corpus tinyshakespeare
    python -m experiments.char_lm --preset classic                 # one-hot, H=64, SGD, one passage
    python -m experiments.char_lm --sample RUN --prompt "The "
    python -m experiments.char_lm --resume RUN                     # after a crash, Ctrl-C, SIGTERM
    python -m experiments.char_lm --coordinator HOST:PORT --num-processes 2 --process-id 0  # and 1

The script first compares its gradient with that of `jax.grad`, on its own model and first batch.
Then it trains on contiguous streams of text. The state is carried from batch to batch, and the
gradient is cut between them (truncated BPTT). The batch is divided over the devices of all
processes. A run folder holds config.json, metrics.jsonl, checkpoints, loss.png, samples.txt,
cross_check.txt and weights.safetensors.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import re
import sys
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgru
from experiments import char_lm_report as report
from experiments import data, distributed, runs
from jaxgru import interop, models, training

HEADING = "--- update"  # the line above each sample in samples.txt begins with this
WEIGHTS = "weights.safetensors"
SPECS = {"cho": jaxgru.CHO_2014, "chung": jaxgru.CHUNG_2014, "pytorch": jaxgru.PYTORCH}
PRESETS = {
    "default": {},
    # The setting of "Gated Recurrent Unit (GRU)" with its NumPy code: z weighs the candidate, the
    # initial weights are small and normal, the loss of one long sequence is summed over its steps,
    # and the final state is the initial state of the next update.
    "classic": {
        "spec": "chung", "init": "small", "embedding_size": 0, "hidden_size": 64,
        "optimizer": "sgd", "learning_rate": 0.01, "warm_up": 0, "clip_norm": 0.0,
        "clip_value": 5.0, "weight_decay": 0.0, "reduction": "sum", "passage": 5000,
        "epochs": 100, "evaluate_every": 25, "sample_size": 100, "temperature": 1.0,
    },
    "smoke": {
        "passage": 4000, "embedding_size": 8, "hidden_size": 16, "batch_size": 4,
        "num_steps": 32, "epochs": 1, "warm_up": 5, "evaluate_every": 15, "sample_size": 40,
    },
}  # fmt: skip


def parse_args(argv):
    parser = runs.make_parser("char_lm", "Trains a character language model.")
    add = parser.add_argument
    add("--text", type=runs.absolute_path, metavar="FILE", help="train on this UTF-8 file")
    add("--corpus", choices=data.CORPORA, default="pydoc", help="without --text: the text to read")
    add("--preset", choices=("default", "classic"), default="default",
        help="classic: the setting of the article with NumPy code")  # fmt: skip
    add("--smoke", action="store_true", help="a tiny run of seconds that tests the script")
    add("--skip-check", action="store_true", help="do not check the gradient before training")
    add("--sample", metavar="RUN", help="continue --prompt with the weights of this run folder")
    add("--out", metavar="FOLDER", help="new or empty run folder (default: runs/char_lm-DATE)")
    add("--prompt", help="what samples begin with (default: 'The ', classic: 'T')")
    add("--temperature", type=float, default=0.8, help="of samples; 0 for the likeliest character")
    add("--sample-size", type=int, default=200, help="characters per sample")
    add("--passage", type=int, default=0, help="use only the first N characters; 0 for all")
    add("--spec", choices=SPECS, default="cho", help="equation of the GRU")
    add("--init", choices=("orthogonal", "pytorch", "keras", "small"), default="orthogonal",
        help="distribution of the initial weights")  # fmt: skip
    add("--embedding-size", type=int, default=64, help="0 for one-hot inputs")
    add("--hidden-size", type=int, default=256, help="units of the GRU")
    add("--batch-size", type=int, default=32, help="sequences per update")
    add("--num-steps", type=int, default=128, help="time steps per batch (truncated BPTT)")
    add("--epochs", type=int, default=10, help="passes over the training text")
    add("--optimizer", choices=("adamw", "sgd"), default="adamw",
        help="adamw with a cosine to 0, or sgd with a constant learning rate")  # fmt: skip
    add("--learning-rate", type=float, default=3e-3, help="of adamw at its peak, or of sgd")
    add("--warm-up", type=int, default=100, help="updates of warm-up before the cosine (adamw)")
    add("--weight-decay", type=float, default=1e-4, help="of adamw")
    add("--clip-norm", type=float, default=1.0, help="largest global norm; 0 for no clipping")
    add("--clip-value", type=float, default=0.0, help="largest entry; 0 for no clipping")
    add("--reduction", choices=("mean", "sum"), default="mean", help="of the loss over time")
    add("--evaluate-every", type=int, default=0, help="in updates; 0 for once per epoch")
    add("--seed", type=int, default=0, help="of the random numbers")
    runs.add_run_options(parser)
    distributed.add_options(add)
    preset = runs.parse_first(parser, argv)
    parser.set_defaults(**PRESETS[preset.preset], **(PRESETS["smoke"] if preset.smoke else {}))
    args = runs.parse_options(parser, argv)
    counts = ("hidden_size", "batch_size", "num_steps", "epochs", "sample_size")
    amounts = (
        "passage", "embedding_size", "evaluate_every", "warm_up", "learning_rate", "weight_decay",
        "clip_norm", "clip_value", "temperature",
    )  # fmt: skip
    for name in (*counts, *amounts):
        value, least = getattr(args, name), 1 if name in counts else 0
        if not least <= value < math.inf:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} must be finite and at least {least}, got {value}")
    if args.prompt == "":
        parser.error("--prompt must not be empty")
    return args


def main(argv=None):
    args = parse_args(argv)
    return runs.run_script(
        "char_lm",
        lambda: sample(args) if args.sample else train(args),
        ("safetensors",),
        smoke=args.smoke,
    )


class Problem(NamedTuple):
    """The text as streams for this process, and how they are divided over the devices."""

    text: str
    vocabulary: str
    inputs: np.ndarray  # [number of batches, T, B of this process]
    targets: np.ndarray
    validation: Any  # such inputs and targets on the devices, or None
    layout: training.Layout
    rows: slice  # of the batch, in this process

    @property
    def digests(self):
        """Checksums that a checkpoint must have to belong to this text."""
        return {"vocabulary_sha256": digest(self.vocabulary), "text_sha256": digest(self.text)}


def make_problem(args):
    """Reads the text and cuts it; the classic preset sets the sizes of the batch."""
    text = distributed.process_zero_first(lambda: load_text(args))
    distributed.require_same("the text", text)
    distributed.require_same("the set of options", json.dumps(runs.config_of(args)))
    vocabulary = "".join(sorted(set(text)))
    tokens = data.encode(text, vocabulary)
    classic = args.preset == "classic"
    cut = len(tokens) if classic else int(0.9 * len(tokens))
    if classic:  # the whole passage is one training sequence
        args.batch_size, args.num_steps = 1, len(tokens) - 1
    layout = distributed.make_layout(args.batch_size, batch_axes=(1, 1, None))
    rows, size = layout.process_rows(args.batch_size), (args.batch_size, args.num_steps)
    validation = None
    if not classic:
        subject = "the last tenth of the text, for validation,"
        validation = data.streams(tokens[cut:], *size, subject, rows=rows)
        validation = dataclasses.replace(layout, batch_axes=2).place_batch(validation)
    inputs, targets = data.streams(tokens[:cut], *size, rows=rows)
    return Problem(text, vocabulary, inputs, targets, validation, layout, rows)


def train(args):
    distributed.start(args)
    problem = make_problem(args)
    vocabulary, inputs, targets = problem.vocabulary, problem.inputs, problem.targets
    prompt = choose_prompt(args, problem.text, vocabulary)
    num_updates, main = args.epochs * len(inputs), distributed.is_main()
    metadata = {"vocabulary": vocabulary, "num_updates": num_updates}
    run = distributed.share_path(lambda: runs.open_run("char_lm", args, **metadata))
    key_params, key_state = jax.random.split(jax.random.key(args.seed))
    params = init_params(args, key_params, len(vocabulary))
    if main:
        report.print_begin(args, problem, params, run)
    h0 = jaxgru.init_state(params.layers, (args.batch_size,))
    # A resumed run passed the check when it began.
    checked = args.skip_check or (run / runs.CHECKPOINTS).exists()
    local_h0 = jax.tree.map(lambda h: h[problem.rows], h0)
    passed = training.on_process_zero(
        lambda: checked or report.cross_check(args, run, params, local_h0, inputs[0], targets[0])
    )
    if not training.broadcast_from_process_zero(passed):
        return 1
    optimizer = make_optimizer(args, num_updates)
    state = training.init_train_state(params, optimizer, key=key_state, carry=h0)
    evaluate = functools.partial(evaluate_streams, args, streams=problem.validation)
    every, layout = args.evaluate_every or len(inputs), problem.layout

    def draw_batches(start):
        restart = args.preset != "classic"
        batches = data.epochs(inputs, targets, args.epochs, start, restart=restart)
        return map(layout.place_batch, batches)

    try:
        state, *_ = training.fit(
            training.make_train_step(make_loss(args), optimizer, layout=layout),
            layout.place_state(state),
            draw_batches,
            num_updates=num_updates,
            evaluate=evaluate if problem.validation else lambda state: {},  # for `Samples`
            evaluate_every=every,
            checkpoints=runs.checkpoints_of(run, args, every, **problem.digests),
            callbacks=[*runs.loggers(run, args), Samples(args, run, vocabulary, prompt)],
            items_per_update=args.batch_size * args.num_steps,
            items_name="characters",
        )
    except training.NonFiniteError as error:
        if main:
            save_weights(run, args, error.state.params, vocabulary)
            print(f"char_lm: {error} The weights are in {run}.", file=sys.stderr)
        return 1
    if main:
        save_weights(run, args, state.params, vocabulary)
        print("\n" + draw(args, state.params, vocabulary, prompt, args.sample_size, args.seed))
        report.print_end(args, run, prompt)
    return 0


def load_text(args):
    """The text that the options name, shortened to --passage characters."""
    text = data.read_text(args.text) if args.text else data.load_corpus(args.corpus)
    return text[: args.passage] if args.passage else text


def sample(args):
    """Continues a prompt with the weights of a run folder."""
    trained, vocabulary, params = load_run(pathlib.Path(args.sample))
    trained.temperature, trained.prompt = args.temperature, args.prompt
    prompt = choose_prompt(trained, vocabulary, vocabulary)
    print(draw(trained, params, vocabulary, prompt, args.sample_size, args.seed))
    return 0


def load_run(run):
    """Reads (options, vocabulary, params) from a run folder.

    Raises:
      DataError: a file is missing, or the files do not fit together.
    """
    try:
        config = json.loads((run / "config.json").read_text("utf-8"))
        vocabulary = config["vocabulary"]
        trained = argparse.Namespace(**config)
        expected = jax.eval_shape(lambda: init_params(trained, jax.random.key(0), len(vocabulary)))
        params, metadata = interop.load_weights(run / WEIGHTS)
        if metadata["vocabulary_sha256"] != digest(vocabulary):
            raise data.DataError(f"{run}: the weights have another vocabulary than config.json")
        if sizes(params) != sizes(expected):
            raise data.DataError(f"{run}: the weights belong to another model than config.json")
        return trained, vocabulary, jax.tree.map(jnp.asarray, params)
    except (FileNotFoundError, KeyError) as error:
        missing = getattr(error, "filename", None) or error
        raise data.DataError(f"{run} is not a run folder of char_lm: it has no {missing}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise data.DataError(f"{run} is not an intact run folder: {error}") from None


def save_weights(run, args, params, vocabulary):
    """Writes weights.safetensors with the options and the checksum of the vocabulary."""
    metadata = {"config": runs.config_of(args), "vocabulary_sha256": digest(vocabulary)}
    interop.save_weights(run / WEIGHTS, params, metadata=metadata)


def sizes(params):
    """The tree structure of parameters, with the shape and dtype of each leaf."""
    return jax.tree.structure(params), [(v.shape, v.dtype) for v in jax.tree.leaves(params)]


def init_params(args, key, vocab_size):
    scheme = "orthogonal" if args.init == "small" else args.init
    embedding_size = args.embedding_size or None
    params = models.init_token_model(
        key, vocab_size, args.hidden_size, embedding_size=embedding_size, scheme=scheme,
        spec=SPECS[args.spec],
    )  # fmt: skip
    if args.init == "small":  # 0.01 N(0, 1) for every matrix, zero biases
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        params = treedef.unflatten(
            0.01 * jax.random.normal(k, v.shape) if v.ndim == 2 else jnp.zeros_like(v)
            for k, v in zip(keys, leaves)
        )
    return params


def make_loss(args, **gru_options):
    """loss_fn for `make_train_step`; no gradient flows through the state that it carries."""

    def loss_fn(params, carry, batch, key):
        tokens, targets, start = batch
        h0 = jax.tree.map(lambda h: jnp.where(start, jnp.zeros_like(h), h), carry)
        loss, h_last = models.token_loss(
            params, tokens, targets, h0, reduction=args.reduction,
            **gru_options,
        )  # fmt: skip
        per_character = loss / (tokens.size if args.reduction == "sum" else 1)
        return loss, (h_last, {"bits_per_character": per_character / math.log(2)})

    return loss_fn


def make_optimizer(args, num_updates):
    clips = [optax.clip(args.clip_value)] if args.clip_value else []
    clips += [training.clip_by_global_norm(args.clip_norm)] if args.clip_norm else []
    if args.optimizer == "sgd":
        return optax.chain(*clips, optax.sgd(args.learning_rate))
    warm_up = min(args.warm_up, num_updates // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, warm_up, num_updates)
    return optax.chain(*clips, optax.adamw(schedule, weight_decay=args.weight_decay))


def evaluate_streams(args, state, *, streams):
    """Mean cross-entropy over the validation streams; the state is carried between batches."""
    inputs, targets = streams
    loss = _mean_loss(state.params, inputs, targets)
    return {report.VALIDATION: float(loss) / math.log(2)}


@jax.jit
def _mean_loss(params, inputs, targets):
    def body(h, batch):
        tokens, targets = batch
        loss, h = models.token_loss(params, tokens, targets, h)
        return h, loss

    h0 = jaxgru.init_state(params.layers, inputs.shape[2:])
    return jax.lax.scan(body, h0, (inputs, targets))[1].mean()


def choose_prompt(args, text, vocabulary):
    """The prompt of the options, or a default.

    Where the default has characters outside the vocabulary, the first one of the text replaces it.
    """
    if args.prompt is None:
        default = "T" if args.preset == "classic" else "The "
        return default if set(default) <= set(vocabulary) else text[0]
    data.encode(args.prompt, vocabulary, "--prompt")
    return args.prompt


def draw(args, params, vocabulary, prompt, count, seed):
    """The prompt, followed by `count` sampled characters."""
    params = jax.tree.map(jnp.asarray, jax.device_get(params))  # from all devices onto one
    tokens = models.generate(
        params, jax.random.key(seed), jnp.asarray(data.encode(prompt, vocabulary)), count,
        temperature=args.temperature,
    )[1]  # fmt: skip
    return prompt + data.decode(np.asarray(tokens), vocabulary)


class Samples:
    """A callback of `fit` that writes a sample to samples.txt and the screen at each evaluation."""

    def __init__(self, args, run, vocabulary, prompt):
        self.args, self.path = args, run / "samples.txt"
        self.vocabulary, self.prompt = vocabulary, prompt

    def __call__(self, state, record):
        from tqdm import tqdm

        args, update = self.args, record["update"]
        due = args.evaluate_every and update % args.evaluate_every == 0
        if not (due or report.VALIDATION in record):
            return
        seed = args.seed + update
        text = draw(args, state.params, self.vocabulary, self.prompt, args.sample_size, seed)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{HEADING} {update}\n{text}\n")
        except OSError as error:
            warnings.warn(
                f"the sample of update {update} was not written to {self.path}: {error}",
                stacklevel=2,
            )
        shown = {k: v for k, v in record.items() if "bits" in k}
        words = ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in shown.items())
        tqdm.write(f"update {update}: {words}\n  {text[:100]!r}")

    def resume(self, update):
        """Removes the samples of later updates."""
        text = self.path.read_text("utf-8") if self.path.exists() else ""
        for start in re.finditer(rf"^{HEADING} (\d+)$", text, re.M):
            if int(start[1]) > update:
                runs.replace_text(self.path, text[: start.start()])
                return


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
