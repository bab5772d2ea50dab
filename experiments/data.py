"""Text corpora, their encoding, and batches of contiguous streams."""

import hashlib
import importlib
import os
import pathlib
import urllib.error
import urllib.request
from collections.abc import Iterator

import numpy as np

TINYSHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/"
    "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt"
)
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CORPORA = ("pydoc", "tinyshakespeare")


class DataError(Exception):
    """Data that cannot be used; its message is one line for the person who named it."""


def read_text(path: str | os.PathLike) -> str:
    """The whole of a UTF-8 file."""
    try:
        text = pathlib.Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not text:
        raise DataError(f"{path} is empty")
    return text


def load_corpus(name: str) -> str:
    """The text of a named corpus: one of CORPORA."""
    if name == "pydoc":
        # Every Python carries the topics of its own manual: real English prose, no network.
        topics = importlib.import_module("pydoc_data.topics").topics
        return "\n".join(topics[topic] for topic in sorted(topics))
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    path = cache / "jaxgru" / "tinyshakespeare.txt"
    return read_text(download(TINYSHAKESPEARE_URL, TINYSHAKESPEARE_SHA256, path))


def download(url: str, sha256: str, path: pathlib.Path) -> pathlib.Path:
    """Fetches a file to path unless it is there already; its bytes must have the checksum."""
    if path.exists():
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(f"{path} has a wrong checksum; remove it to download it again")
        return path
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(
            f"{url} cannot be downloaded ({reason}); when offline, pass a file with --text"
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{url} has a wrong checksum; nothing was saved")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)
    return path


def encode(text: str, vocabulary: str, subject: str = "the text") -> np.ndarray:
    """int32 positions of the characters in the vocabulary; subject names the text in an error."""
    index = {character: i for i, character in enumerate(vocabulary)}
    unknown = sorted(set(text) - set(vocabulary))
    if unknown:
        shown = " ".join(repr(character) for character in unknown[:10])
        raise DataError(f"{subject} has characters outside of the vocabulary: {shown}")
    return np.array([index[character] for character in text], np.int32)


def decode(tokens: np.ndarray, vocabulary: str) -> str:
    """The characters at those positions."""
    return "".join(vocabulary[int(token)] for token in tokens)


def streams(
    tokens: np.ndarray, batch_size: int, num_steps: int, subject: str = "the text"
) -> tuple[np.ndarray, np.ndarray]:
    """Contiguous streams: (inputs, targets) [number of batches, T, B], targets one step ahead.

    The tokens are cut into B streams of equal length; batch k holds steps kT to (k + 1)T of each,
    so the state after one batch is the state before the next. The tail that fills no batch is left
    out.
    """
    batch = batch_size * num_steps
    num_batches = (len(tokens) - 1) // batch if batch else 0
    if num_batches < 1:
        raise DataError(
            f"{subject} has {len(tokens)} characters, fewer than the {batch + 1} of one batch of "
            f"{batch_size} x {num_steps}; lower --batch-size or --num-steps"
        )
    used = num_batches * batch_size * num_steps

    def cut(tokens):
        split = tokens.reshape(batch_size, num_batches, num_steps)
        return np.ascontiguousarray(split.transpose(1, 2, 0))

    return cut(tokens[:used]), cut(tokens[1 : used + 1])


def epochs(
    inputs: np.ndarray, targets: np.ndarray, num_epochs: int, *, restart: bool = True
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(inputs, targets, start) of every batch; start is True where the state is to be zero.

    That is before every epoch, or before the first alone where restart is False.
    """
    for epoch in range(num_epochs):
        for batch in range(len(inputs)):
            start = np.array(batch == 0 and (restart or epoch == 0))
            yield inputs[batch], targets[batch], start
