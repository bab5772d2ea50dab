"""Where the records of a training loop go: lines of JSON, or TensorBoard's files.

A callback of `fit` is called as callback(state, record). If it has a method resume(update), that is
called when a run goes on from a checkpoint of that update: what the callback wrote of later ones is
to be dropped, for they come again. It returns the last record that is left, or None.
"""

import json
import math
import os
import pathlib
import time
import warnings
from typing import Any, Protocol, runtime_checkable

from jaxgru.atomic_files import write_atomically
from jaxgru.core.checks import require_extra


class Callback(Protocol):
    """Whatever takes a record; it may keep a copy of the state, whose buffers are then reused."""

    def __call__(self, state: Any, record: dict[str, Any], /) -> Any: ...


@runtime_checkable
class Resumable(Protocol):
    """A callback that can drop what it wrote of updates that come again."""

    def resume(self, update: int) -> dict[str, Any] | None: ...


class JsonLines:
    """Appends each record as one line of JSON; a number that is not finite becomes null.

    A disk that is full stops no training: lines that could not be written are warned of, kept, and
    written with the next one.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> log = JsonLines(path, run="a")
    >>> log(None, {"update": 1, "loss": 0.5})
    >>> log(None, {"update": 2, "loss": float("nan")})
    >>> print(path.read_text(), end="")
    {"run": "a", "update": 1, "loss": 0.5}
    {"run": "a", "update": 2, "loss": null}
    >>> log.resume(1)
    {'run': 'a', 'update': 1, 'loss': 0.5}
    """

    def __init__(self, path: str | os.PathLike, **fields: Any):
        self.path, self.fields, self.waiting = pathlib.Path(path), fields, ""

    def __call__(self, state: Any, record: dict[str, Any], /) -> None:
        self.waiting += json.dumps(json_values({**self.fields, **record}), allow_nan=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = self.path.stat().st_size if self.path.exists() else 0
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(self.waiting)
            except OSError:
                os.truncate(self.path, whole)  # no half lines
                raise
            self.waiting = ""
        except OSError as error:
            warnings.warn(f"JsonLines: a record waits to be written: {error}", stacklevel=2)

    def resume(self, update: int) -> dict[str, Any] | None:
        """Drops this log's records of later updates; gives the last that is left, or None."""
        kept, last, self.waiting = [], None, ""
        for record in read_json_lines(self.path):
            own = all(record.get(name) == value for name, value in json_values(self.fields).items())
            if own and record.get("update", 0) > update:
                continue
            kept.append(json.dumps(record) + "\n")
            last = record if own else last
        if self.path.exists():
            write_atomically(self.path, "".join(kept).encode())
        return last


class TensorBoard:
    """Writes the numbers of each record as scalars for TensorBoard, with the package tensorboardX.

    They are in its files within ten seconds, or at the end of the process.

    Raises:
      ImportError: tensorboardX is missing; install the extra `tensorboard`.
    """

    def __init__(self, folder: str | os.PathLike):
        self.package = require_extra("TensorBoard", "tensorboardX", extra="tensorboard")
        self.folder = os.fspath(folder)
        self.writer = None

    def __call__(self, state: Any, record: dict[str, Any], /) -> None:
        if self.writer is None:
            self.writer = self._open()
        for name, value in record.items():
            value = json_values(value)
            if isinstance(value, int | float) and name != "update":
                self.writer.add_scalar(name, value, record["update"])

    def resume(self, update: int) -> None:
        """Tells TensorBoard to hide what was written of later updates."""
        self.writer = self._open(purge_step=update + 1)

    def _open(self, **options):
        # Files are named by the second, and one of the same second would be overwritten.
        suffix = f".{time.time_ns()}"
        return self.package.SummaryWriter(
            self.folder, filename_suffix=suffix, flush_secs=10, **options
        )


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, without a truncated last line; none if it is missing.

    Args:
      path: of the file.

    Returns:
      The records in order.

    Raises:
      OSError: the file cannot be read.
      ValueError: a line other than the last is no JSON.
    """
    path = pathlib.Path(path)
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} must hold one JSON object a line: {error}") from None


def json_values(value: Any) -> Any:
    """The value as JSON has it: None for NaN and infinity, text for what JSON has no form of.

    Args:
      value: dicts, lists, tuples, numbers, strings, None, and whatever else, nested.

    Returns:
      The same of dicts and lists with what `json.dumps(..., allow_nan=False)` writes.

    Raises:
      RecursionError: value holds itself.

    >>> json_values({1: (float("nan"), pathlib.PurePosixPath("a"))})
    {'1': [None, 'a']}
    """
    if isinstance(value, dict):
        return {str(name): json_values(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(entry) for entry in value]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a number of NumPy or JAX
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
