"""Trains a character language model in PyTorch, for comparison with `experiments.char_lm`.

    python -m experiments.benchmarks.torch_char_lm --text tinyshakespeare.txt
    python -m experiments.benchmarks.torch_char_lm --text FILE --epochs 10 --seed 1 --out runs/torch

The model is an embedding, one GRU layer and a linear head, with PyTorch's own initialization. It
sees the same batches as jaxgru's and is trained by truncated BPTT: the text is cut into
`--batch-size` contiguous streams, and the state is carried from batch to batch, detached, and set
to zero at the start of each epoch. The first 90 % of the text are for training, the last 10 % for
validation after every epoch, where the state is carried in the same way.

AdamW decays every parameter, also the biases. The learning rate of update u = 0, 1, ... of U is
peak * u / W during the warm-up of W updates, then peak * (1 + cos(pi (u - W) / (U - W))) / 2.
Gradients are clipped by their global norm.

The script prints a line for each epoch, and then the result as JSON, which it also writes to
`--out`/torch_char_lm.json: losses in nats and bits per character, seconds, characters per second.
Training seconds do not include validation. If the text cannot be used, the script prints one line
to stderr and exits with code 2.
"""

import argparse
import dataclasses
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments import runs
from experiments.benchmarks.timing import describe_machine

try:
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]
    from tqdm import tqdm
except ImportError as missing:
    raise SystemExit(runs.fail_without("torch_char_lm", missing, "peers")) from None

TRAIN_FRACTION = 0.9
Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, [T, B] each


class CharModel(nn.Module):
    """Embedding -> GRU -> linear head over the vocabulary."""

    def __init__(self, vocabulary_size: int, embedding_size: int, hidden_size: int):
        """Makes the three modules with PyTorch's own initialization."""
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.gru = nn.GRU(embedding_size, hidden_size)
        self.head = nn.Linear(hidden_size, vocabulary_size)

    def forward(self, ids: torch.Tensor, h0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps ids [T, B] and h0 [1, B, H] to logits [T, B, V] and the last state [1, B, H]."""
        hs, h_last = self.gru(self.embedding(ids), h0)
        return self.head(hs), h_last


@dataclasses.dataclass(frozen=True)
class Split:
    """Contiguous streams [B, num_batches * T] of one part of the text."""

    inputs: np.ndarray
    targets: np.ndarray
    num_steps: int

    @property
    def num_batches(self) -> int:
        """The number of batches in one epoch."""
        return self.inputs.shape[1] // self.num_steps

    @property
    def num_chars(self) -> int:
        """The number of characters predicted in one epoch."""
        return self.inputs.size

    def batches(self) -> Iterator[Batch]:
        """Yields the batches in the order of the text, time-major."""
        for k in range(self.num_batches):
            columns = slice(k * self.num_steps, (k + 1) * self.num_steps)
            inputs, targets = self.inputs[:, columns].T, self.targets[:, columns].T
            yield (
                torch.from_numpy(np.ascontiguousarray(inputs)),
                torch.from_numpy(np.ascontiguousarray(targets)),
            )


def make_split(ids: np.ndarray, batch_size: int, num_steps: int, name: str) -> Split:
    """Cuts ids into streams; ids at the end that do not fill a batch are dropped.

    Raises:
      ValueError: ids has less than one batch.
    """
    num_batches = (len(ids) - 1) // (batch_size * num_steps)
    if num_batches < 1:
        raise ValueError(
            f"its {name} part has {len(ids)} characters, but one batch of {batch_size} x "
            f"{num_steps} needs {batch_size * num_steps + 1}"
        )
    used = batch_size * num_batches * num_steps
    inputs = ids[:used].reshape(batch_size, -1)
    targets = ids[1 : used + 1].reshape(batch_size, -1)
    return Split(inputs, targets, num_steps)


def load_text(path: Path, batch_size: int, num_steps: int) -> tuple[Split, Split, int]:
    """Training split, validation split and vocabulary size of a UTF-8 text.

    Raises:
      OSError, UnicodeDecodeError: the file cannot be read as text.
      ValueError: it is empty or too short.
    """
    text = path.read_bytes().decode("utf-8")  # keeps line ends as they are
    if not text:
        raise ValueError("it is empty")
    vocabulary = sorted(set(text))
    index = {char: k for k, char in enumerate(vocabulary)}
    ids = np.array([index[char] for char in text], dtype=np.int64)
    border = int(TRAIN_FRACTION * len(ids))
    train = make_split(ids[:border], batch_size, num_steps, "training")
    valid = make_split(ids[border:], batch_size, num_steps, "validation")
    return train, valid, len(vocabulary)


def learning_rate_factor(update: int, warm_up: int, num_updates: int) -> float:
    """Linear from 0 to 1 during the warm-up, then half a cosine to 0 at the last update."""
    if update < warm_up:
        return update / warm_up
    return 0.5 * (1 + math.cos(math.pi * (update - warm_up) / max(1, num_updates - warm_up)))


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy over [T, B], in nats."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def initial_state(model: CharModel, batch_size: int) -> torch.Tensor:
    """A state of zeros [1, B, H]."""
    return torch.zeros(1, batch_size, model.gru.hidden_size)


def train_epoch(model, optimizer, scheduler, split: Split, clip: float, bar: tqdm) -> float:
    """Trains for one epoch; returns the mean training loss."""
    model.train()
    h = initial_state(model, split.inputs.shape[0])
    total = torch.zeros(())
    for inputs, targets in split.batches():
        logits, h = model(inputs, h.detach())
        loss = cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        total += loss.detach()
        bar.update()
    return float(total) / split.num_batches


@torch.no_grad()
def evaluate(model: CharModel, split: Split) -> float:
    """The mean cross-entropy of a split in nats per character."""
    model.eval()
    h = initial_state(model, split.inputs.shape[0])
    total = torch.zeros(())
    for inputs, targets in split.batches():
        logits, h = model(inputs, h)
        total += cross_entropy(logits, targets)
    return float(total) / split.num_batches


def train(model: CharModel, train_split: Split, valid_split: Split, args) -> list[dict[str, Any]]:
    """Trains for all epochs; prints and returns a record for each."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=args.weight_decay,
    )
    num_updates = args.epochs * train_split.num_batches
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: learning_rate_factor(update, args.warm_up, num_updates)
    )
    history = []
    with tqdm(total=num_updates, unit="update", disable=None) as bar:
        for epoch in range(1, args.epochs + 1):
            start = time.perf_counter()
            loss = train_epoch(model, optimizer, scheduler, train_split, args.clip, bar)
            seconds = time.perf_counter() - start
            valid_loss = evaluate(model, valid_split)
            history.append(
                {"epoch": epoch, "train_nats": loss, "valid_nats": valid_loss, "seconds": seconds}
            )
            tqdm.write(
                f"epoch {epoch:3d}  training {loss:.4f}  validation {valid_loss:.4f} nats "
                f"({valid_loss / math.log(2):.4f} bits)  {seconds:.1f} s"
            )
            sys.stdout.flush()
    return history


def summarize(history: list[dict[str, Any]], chars_per_epoch: int) -> dict[str, Any]:
    """The final and the best validation loss, and the speed of training."""
    best = min(history, key=lambda record: record["valid_nats"])
    final, seconds = history[-1], sum(record["seconds"] for record in history)
    return {
        "final_valid_nats": final["valid_nats"],
        "final_valid_bits": final["valid_nats"] / math.log(2),
        "best_valid_nats": best["valid_nats"],
        "best_valid_bits": best["valid_nats"] / math.log(2),
        "best_epoch": best["epoch"],
        "training_seconds": seconds,
        "chars_per_second": len(history) * chars_per_epoch / seconds,
    }


def main(argv: list[str] | None = None) -> int:
    """Trains, prints and writes; returns 0, or 2 if the text or the folder cannot be used."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    try:
        train_split, valid_split, vocabulary_size = load_text(
            args.text, args.batch_size, args.num_steps
        )
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        path = error.filename if isinstance(error, OSError) else args.text
        print(f"torch_char_lm: cannot use {path}: {reason}.", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    model = CharModel(vocabulary_size, args.embedding_size, args.hidden_size)
    history = train(model, train_split, valid_split, args)
    options = {name: v for name, v in vars(args).items() if name not in ("text", "out")}
    result = {
        "command": shlex.join(["python", "-m", "experiments.benchmarks.torch_char_lm", *argv]),
        **summarize(history, train_split.num_chars),
        "total_seconds": time.perf_counter() - start,
        **options,
        "vocabulary_size": vocabulary_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "updates": args.epochs * train_split.num_batches,
        "train_chars": train_split.num_chars,
        "valid_chars": valid_split.num_chars,
        "device": "cpu",
        **describe_machine(("torch", "numpy")),
        "history": history,
    }
    text = json.dumps(result, indent=1)
    (args.out / "torch_char_lm.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parses the options."""
    parser = runs.make_parser("benchmarks.torch_char_lm", (__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    add("--embedding-size", type=_count, default=64, help="size of a character's vector")
    add("--hidden-size", type=_count, default=256, help="units of the GRU")
    add("--batch-size", type=_count, default=32, help="number of streams")
    add("--num-steps", type=_count, default=128, help="time steps per batch")
    add("--epochs", type=_count, default=10, help="passes over the training text")
    add("--learning-rate", type=positive_number, default=3e-3, help="peak value")
    add("--warm-up", type=_count, default=100, help="in updates")
    add("--weight-decay", type=non_negative_number, default=1e-4, help="of every parameter")
    add("--clip", type=positive_number, default=1.0, help="largest global norm of the gradient")
    add("--seed", type=int, default=0, help="of the random numbers")
    add("--threads", type=_count, default=os.cpu_count() or 1, help="threads of torch")
    add("--out", type=Path, default=Path("runs/benchmark_torch_char_lm"), metavar="FOLDER",
        help="folder of torch_char_lm.json")  # fmt: skip
    return parser.parse_args(argv)


def _count(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """A finite number above 0."""
    if non_negative_number(text) == 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return float(text)


def non_negative_number(text: str) -> float:
    """A finite number of at least 0."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return float(text)


if __name__ == "__main__":
    sys.exit(main())
