"""Callbacks of `fit` that write its records: as lines of JSON, or for TensorBoard."""

import json
import math
import os
import pathlib
import time
import warnings
from typing import Any, Protocol

from jaxgru.atomic_files import write_atomically
from jaxgru.extras import require_extra


class Callback(Protocol):
    """Called with (state, record); it must copy what it keeps of the state: buffers are reused.

    When a run resumes, `fit` also calls callback.resume(update), if that method exists: it must
    drop the records of later updates, which come again, and return the last one left, or None.
    """

    def __call__(self, state: Any, record: dict[str, Any], /) -> Any: ...


class JsonLines:
    """Appends each record to a file as one line of JSON; NaN and infinity become null.

    A full disk does not stop training: the log warns, keeps the unwritten lines and writes them
    with the next record.

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
            size = self.path.stat().st_size if self.path.exists() else 0
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(self.waiting)
            except OSError:
                os.truncate(self.path, size)  # removes a partly written line
                raise
            self.waiting = ""
        except OSError as error:
            warnings.warn(
                f"JsonLines: a record could not be written, and is written with the next: {error}",
                stacklevel=2,
            )

    def resume(self, update: int) -> dict[str, Any] | None:
        """Drops this log's records of later updates; returns the last remaining one, or None."""
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
    """Writes the numbers of each record as TensorBoard scalars, with the package tensorboardX.

    They reach the files within ten seconds, or when the process ends.

    Raises:
      ImportError: tensorboardX is missing; install the extra `tensorboard`.
    """

    def __init__(self, folder: str | os.PathLike):
        self.package = require_extra("TensorBoard", "tensorboardX", extra="tensorboard")
        self.folder, self.writer = os.fspath(folder), None

    def __call__(self, state: Any, record: dict[str, Any], /) -> None:
        if self.writer is None:
            self.writer = self._open()
        for name, value in record.items():
            value = json_values(value)
            if isinstance(value, int | float) and name != "update":
                self.writer.add_scalar(name, value, record["update"])

    def resume(self, update: int) -> None:
        """Makes TensorBoard hide the scalars of later updates."""
        self.writer = self._open(purge_step=update + 1)

    def _open(self, **options):
        # tensorboardX names files by the second and would overwrite one of the same second.
        options |= {"filename_suffix": f".{time.time_ns()}", "flush_secs": 10}
        return self.package.SummaryWriter(self.folder, **options)


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads the records of a file of JSON lines, without a truncated last line.

    Args:
      path: of the file.

    Returns:
      The records in order; an empty list if the file is missing.

    Raises:
      OSError: the file cannot be read.
      ValueError: a line other than the last is not a JSON object.
    """
    path = pathlib.Path(path)
    records = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
            if not isinstance(records[-1], dict):
                raise ValueError(f"it is a {type(records[-1]).__name__}")
        except ValueError as error:
            raise ValueError(
                f"read_json_lines: {path} must hold one JSON object per line, got line {number}: "
                f"{error}; remove that line."
            ) from None
    return records


def json_values(value: Any) -> Any:
    """Converts a value for JSON: NaN and infinity to None, values of other types to text.

    Args:
      value: nested dicts, lists and tuples of any values.

    Returns:
      Dicts and lists that `json.dumps(..., allow_nan=False)` accepts.

    Raises:
      RecursionError: value contains itself.

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
