"""Predicts which of a piano's 88 keys sound at the next step, on the JSB Chorales.

    python -m experiments.polyphonic_music                         # the default: some minutes
    python -m experiments.polyphonic_music --data JSB_Chorales.mat
    python -m experiments.polyphonic_music --data Nottingham.mat   # or MuseData, Piano_midi

The benchmark of Chung et al. 2014 (arXiv:1412.3555) on the chorales of Boulanger-Lewandowski et
al. 2012 (arXiv:1206.6392), with the files and the metric of Bai et al. 2018 (arXiv:1803.01271): the
negative log-likelihood of a step given the steps before it, in nats, summed over the keys and
averaged over all predicted steps. Recurrent dropout uses one mask per sequence in the products with
w_h (Gal and Ghahramani 2016, arXiv:1512.05287); output dropout draws a new mask at each step. The
weights of the epoch with the best validation score are tested once, at the end.

A run folder holds config.json, metrics.jsonl, checkpoints, result.json, weights.safetensors,
loss.png and pianoroll.png. The latter shows a test piece, its prediction one step ahead, and a
continuation of its beginning that is sampled from the model.
"""

import functools
import hashlib
import itertools
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgru
from experiments import data, runs
from jaxgru import interop, models, training

SPEC = jaxgru.PYTORCH
SMOKE = {
    "hidden_size": 48, "batch_size": 8, "epochs": 25, "learning_rate": 0.02,
    "recurrent_dropout": 0.2, "output_dropout": 0.2, "prompt_steps": 5,
}  # fmt: skip
PUBLISHED = (("GRU of Chung et al. 2014", 8.54), ("GRU of Bai et al. 2018", 8.43))
MIDI_OF_FIRST_KEY = 21  # A0


def parse_args(argv):
    parser = runs.make_parser("polyphonic_music", "Predicts the next chord.")
    add = parser.add_argument
    add("--data", type=runs.absolute_path, metavar="FILE",
        help=".mat file of the data (default: download JSB Chorales)")  # fmt: skip
    add("--smoke", action="store_true", help="a tiny run of seconds; synthetic data by default")
    add("--out", metavar="FOLDER", help="new or empty folder (default: runs/polyphonic_music-DATE)")
    add("--hidden-size", type=int, default=200, help="units of the GRU")
    add("--batch-size", type=int, default=16, help="pieces per update")
    add("--epochs", type=int, default=120, help="passes over the training pieces")
    add("--learning-rate", type=float, default=6e-3, help="at the start of a cosine to 0")
    add("--clip-norm", type=float, default=1.0, help="largest global norm of the gradient")
    add("--recurrent-dropout", type=float, default=0.6, help="rate in [0, 1)")
    add("--output-dropout", type=float, default=0.5, help="rate in [0, 1)")
    add("--piece", type=int, default=0, help="number of the test piece in pianoroll.png")
    add("--prompt-steps", type=int, default=16, help="first steps of the piece before the sample")
    add("--roll-steps", type=int, default=96, help="largest number of steps in pianoroll.png")
    add("--seed", type=int, default=0, help="of the random numbers")
    runs.add_run_options(parser)
    parser.set_defaults(**(SMOKE if runs.parse_first(parser, argv).smoke else {}))
    args = runs.parse_options(parser, argv)
    least = dict.fromkeys(("hidden_size", "batch_size", "epochs", "prompt_steps"), 1)
    least |= {"piece": 0, "roll_steps": 2, "seed": 0}
    most = {"seed": 2**32 - 1}
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if name in least and not least[name] <= value <= most.get(name, math.inf):
            parser.error(f"{option} must be at least {least[name]}, got {value}")
        if name in ("learning_rate", "clip_norm") and not 0 < value < math.inf:
            parser.error(f"{option} must be finite and above 0, got {value}")
        if name.endswith("dropout") and not 0 <= value < 1:
            parser.error(f"{option} must be at least 0 and below 1, got {value}")
    return args


def main(argv=None):
    args = parse_args(argv)
    extras = ("scipy.io", "safetensors")
    return runs.run_script("polyphonic_music", lambda: train(args), extras, smoke=args.smoke)


def train(args):
    splits, digest = load_splits(args)
    train_rolls, valid_rolls, test_rolls = splits
    if args.piece >= len(test_rolls):
        raise data.DataError(
            f"--piece must be below {len(test_rolls)}, the number of test pieces, got {args.piece}"
        )
    run = runs.open_run("polyphonic_music", args, data_sha256=digest)
    counts = f"{len(train_rolls)} training, {len(valid_rolls)} validation, {len(test_rolls)} test"
    print(f"{counts} pieces; {runs.describe_device()}")
    updates_per_epoch = math.ceil(len(train_rolls) / args.batch_size)
    best = fit_model(args, run, updates_per_epoch, train_rolls, valid_rolls, digest)
    metadata = {"config": runs.config_of(args)}
    interop.save_weights(run / "weights.safetensors", best.params, metadata=metadata)
    records = training.read_json_lines(run / runs.METRICS)
    scores = score_best(best, updates_per_epoch, train_rolls, valid_rolls, test_rolls)
    runs.write_json(run / "result.json", scores)
    plot_losses(run / "loss.png", records, scores)
    key = jax.random.fold_in(jax.random.key(args.seed), 1)
    plot_rolls(run / "pianoroll.png", args, best.params, key, test_rolls[args.piece])
    print_table(args, scores, digest)
    print(f"{records[-1]['seconds']:.0f} s of training; run folder: {run}")
    return 0


def load_splits(args):
    """The piano rolls for training, validation and test, and the checksum of their file."""
    if args.smoke and args.data is None:
        return [data.draw_chords(count, seed) for seed, count in enumerate((24, 8, 8))], None
    path = args.data
    if path is None:
        path = data.cache_path("JSB_Chorales.mat")
        data.download(data.JSB_CHORALES_URL, data.JSB_CHORALES_SHA256, path, "--data")
    rolls = data.read_piano_rolls(path)
    digest = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    return [rolls[name] for name in data.ROLL_SPLITS], digest


def fit_model(args, run, updates_per_epoch, train_rolls, valid_rolls, digest):
    """Trains; returns the training state of the epoch with the best validation score."""
    key_params, key_state = jax.random.split(jax.random.key(args.seed))
    params = init_params(args, key_params, train_rolls)
    num_updates = args.epochs * updates_per_epoch
    schedule = optax.cosine_decay_schedule(args.learning_rate, num_updates)
    optimizer = optax.chain(training.clip_by_global_norm(args.clip_norm), optax.adam(schedule))
    state = training.init_train_state(params, optimizer, key=key_state)
    batches = cut_batches(valid_rolls)

    def evaluate(state):
        epoch = int(state.step) // updates_per_epoch
        return {"epoch": epoch, "validation_nll": mean_nll(state.params, batches)}

    logs = runs.loggers(run, args)
    if not (run / runs.METRICS).exists():
        for log in logs:
            log(state, {"update": 0, **evaluate(state)})
    fitted = training.fit(
        training.make_train_step(make_loss(args), optimizer),
        state,
        lambda start: itertools.islice(draw_batches(args, train_rolls), start, None),
        num_updates=num_updates,
        evaluate=evaluate,
        evaluate_every=updates_per_epoch,
        monitor=training.Monitor("validation_nll"),
        checkpoints=runs.checkpoints_of(run, args, updates_per_epoch, data_sha256=digest),
        log_every=updates_per_epoch,
        callbacks=logs,
    )
    assert fitted.best is not None  # `fit` evaluates at least once
    return fitted.best


def init_params(args, key, rolls):
    """A model that first predicts, nearly, the frequency of each key in the training steps."""
    key_model, key_head = jax.random.split(key)
    shares = np.concatenate(rolls).mean(axis=0)
    params = models.init_sequence_model(
        key_model, len(shares), args.hidden_size, len(shares), spec=SPEC
    )
    w = 0.5 / math.sqrt(args.hidden_size) * jax.random.normal(key_head, params.w.shape)
    return params._replace(w=w, b=share_logits(shares))


def share_logits(shares):
    """The log-odds of each key's frequency, finite also for keys that never or always sound."""
    return jnp.asarray(np.log((shares + 1e-3) / (1 - shares + 1e-3)), jnp.float32)


def make_loss(args):
    """loss_fn for `make_train_step`; it needs no carry, as every piece starts from zeros."""

    def loss_fn(params, carry, batch, key):
        xs, lengths = batch
        mask = jaxgru.length_mask(lengths, xs.shape[0] - 1)
        _, logits = models.sequence_outputs(
            params, xs[:-1], mask=mask, noise=jaxgru.Noise(args.recurrent_dropout),
            dropout=jaxgru.Dropout(output=args.output_dropout), key=key,
        )  # fmt: skip
        return jaxgru.losses.bernoulli_loss(logits, xs[1:], mask), (carry, {})

    return loss_fn


def draw_batches(args, rolls):
    """Yields batches of pieces with similar lengths for all epochs, each in a new order."""
    generator = np.random.default_rng(args.seed)
    lengths = np.array([len(roll) - 1 for roll in rolls])
    for _ in range(args.epochs):
        noise = np.exp(0.08 * generator.normal(size=len(rolls)))  # new batches in each epoch
        order = np.argsort(lengths * noise, kind="stable")
        starts = range(0, len(rolls), args.batch_size)
        for start in generator.permutation(starts):
            chosen = order[start : start + args.batch_size]
            yield pad([rolls[number] for number in chosen], args.batch_size)


def cut_batches(rolls, batch_size=32):
    """Batches of all rolls, shortest first."""
    rolls = sorted(rolls, key=len)
    starts = range(0, len(rolls), batch_size)
    return [pad(rolls[start : start + batch_size], batch_size) for start in starts]


def pad(rolls, batch_size):
    """xs [T + 1, batch_size, K], and the number of predicted steps of each row, 0 for unused rows.

    T is a power of 2 or 1.5 times a power of 2, so that jit compiles few programs.
    """
    lengths = np.zeros(batch_size, np.int32)
    lengths[: len(rolls)] = [len(roll) - 1 for roll in rolls]
    power = 1 << int(lengths.max() - 1).bit_length()
    num_steps = power * 3 // 4 if lengths.max() <= power * 3 // 4 else power
    xs = np.zeros((num_steps + 1, batch_size, rolls[0].shape[1]), np.float32)
    for row, roll in enumerate(rolls):
        xs[: len(roll), row] = roll
    return xs, lengths


def mean_nll(params, batches):
    """The mean negative log-likelihood over all predicted steps of all pieces, in nats."""
    totals = [float(_sum_nll(params, xs, lengths)) for xs, lengths in batches]
    return sum(totals) / sum(int(lengths.sum()) for _, lengths in batches)


@jax.jit
def _sum_nll(params, xs, lengths):
    mask = jaxgru.length_mask(lengths, xs.shape[0] - 1)
    _, logits = models.sequence_outputs(params, xs[:-1], mask=mask)
    return jaxgru.losses.bernoulli_loss(logits, xs[1:], mask, reduction="sum")


def score_best(best, updates_per_epoch, train_rolls, valid_rolls, test_rolls):
    """NLL of the best parameters, and of a constant prediction: the frequency of each key."""
    valid_batches, test_batches = cut_batches(valid_rolls), cut_batches(test_rolls)
    shares = np.concatenate(train_rolls).mean(axis=0)
    params, nll = best.params, mean_nll(best.params, valid_batches)
    constant = params._replace(w=jnp.zeros_like(params.w), b=share_logits(shares))
    return {
        "best_epoch": int(best.step) // updates_per_epoch,
        "best_validation_nll": nll,
        "test_nll": mean_nll(params, test_batches),
        "shares_validation_nll": mean_nll(constant, valid_batches),
        "shares_test_nll": mean_nll(constant, test_batches),
    }


@functools.partial(jax.jit, static_argnames="prompt_steps")
def predict_and_sample(params, key, roll, prompt_steps):
    """(probabilities of steps 1 to T - 1 given the true steps before; a sample).

    The sample begins with the first `prompt_steps` of the roll. After that the model reads its own
    steps. Each key is sampled independently.
    """
    _, logits = models.sequence_outputs(params, roll[:-1])
    h, _ = jaxgru.gru_stack(params.layers, roll[:prompt_steps])

    def body(carry, key):
        h, logits = carry
        x = jax.random.bernoulli(key, jax.nn.sigmoid(logits)).astype(roll.dtype)
        h, y = jaxgru.gru_stack_cell(params.layers, x, h)
        return (h, y @ params.w + params.b), x

    keys = jax.random.split(key, roll.shape[0] - prompt_steps)
    _, xs = jax.lax.scan(body, (h, logits[prompt_steps - 1]), keys)
    return jax.nn.sigmoid(logits), jnp.concatenate([roll[:prompt_steps], xs])


def print_table(args, scores, digest):
    """Prints the NLL, for the JSB Chorales with the published figures."""
    print("\nnegative log-likelihood, nats per step    validation     test")
    label = f"this run, best epoch {scores['best_epoch']} of {args.epochs}"
    print(f"{label:<40}  {scores['best_validation_nll']:10.3f}  {scores['test_nll']:7.3f}")
    if digest == data.JSB_CHORALES_SHA256:
        for label, nll in PUBLISHED:
            print(f"{label:<40}  {'':>10}  {nll:6.2f}")
    label = "constant frequency of each key"
    print(f"{label:<40}  {scores['shares_validation_nll']:10.3f}  {scores['shares_test_nll']:7.3f}")


def plot_losses(path, records, scores):
    """Plots the NLL of training and validation against epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    losses = [(record["epoch"], record["loss"]) for record in records if "loss" in record]
    axes.plot(*zip(*losses), label="training, with dropout")
    axes.plot(*zip(*[(r["epoch"], r["validation_nll"]) for r in records]), label="validation")
    axes.plot(
        scores["best_epoch"], scores["best_validation_nll"], "o", color="C1",
        label=f"best: {scores['best_validation_nll']:.3f}, test {scores['test_nll']:.3f}",
    )  # fmt: skip
    axes.set(xlabel="epoch", ylabel="nats per step", title="Negative log-likelihood of a step")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_rolls(path, args, params, key, roll):
    """Plots three piano rolls: a test piece, its prediction, and a sample."""
    from matplotlib.figure import Figure

    roll = roll[: args.roll_steps]
    prompt_steps = min(args.prompt_steps, len(roll) - 1)
    probabilities, sample = predict_and_sample(params, key, jnp.asarray(roll), prompt_steps)
    # There is no prediction for step 0.
    probabilities = np.concatenate([np.full_like(roll[:1], np.nan), probabilities])
    sounding = roll.any(axis=0) | np.asarray(sample).any(axis=0)
    used = np.flatnonzero(sounding if sounding.any() else ~sounding)
    limits = (max(used.min() - 2, 0) - 0.5, min(used.max() + 2, roll.shape[1] - 1) + 0.5)
    octaves = [k for k in range(roll.shape[1]) if (k + MIDI_OF_FIRST_KEY) % 12 == 0]

    figure = Figure(figsize=(11, 9), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, sharey=True)
    titles = (
        f"truth: test piece {args.piece}",
        "prediction: probability of each key, given the true steps before",
        f"sample: the first {prompt_steps} steps of the piece, then (after the line) the model's",
    )
    for axes, values, title in zip(panels, (roll, probabilities, sample), titles):
        axes.imshow(
            np.asarray(values).T, origin="lower", aspect="auto", interpolation="nearest",
            cmap="magma_r", vmin=0, vmax=1,
        )  # fmt: skip
        axes.set_yticks(octaves, [f"C{(k + MIDI_OF_FIRST_KEY) // 12 - 1}" for k in octaves])
        axes.set(ylabel="key (C4: MIDI 60)", title=title, ylim=limits)
        axes.hlines([k - 0.5 for k in octaves], *axes.get_xlim(), color="0.6", linewidth=0.6)
    panels[-1].axvline(prompt_steps - 0.5, color="C0")
    panels[-1].set_xlabel("time step")
    figure.colorbar(
        panels[0].images[0], ax=panels, label="probability; 1: the key sounds", shrink=0.5
    )
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
