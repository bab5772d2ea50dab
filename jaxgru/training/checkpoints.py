"""Checkpoints of a training state: whole, verified, of this run, and one run to a folder.

A folder holds `step-00000120.npz` for each checkpoint kept, or with Orbax a folder
`step-00000120.orbax` beside a `step-00000120.json`, and `lock`. A checkpoint is its arrays and a
manifest: the format's version, dtypes, a sha256 of every array (of every file, with Orbax), what
the caller says of the run, and the step that was best so far.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgru.atomic_files import remove_leftovers
from jaxgru.core.checks import require_choice, require_count
from jaxgru.training.array_files import assemble, is_key, read_arrays, read_metadata, save_arrays
from jaxgru.training.processes import by_first
from jaxgru.training.sharded_files import (
    load_sharded,
    read_sharded_metadata,
    remove_sharded,
    save_sharded,
)

Format = Literal["npz", "orbax"]
FORMATS = ("npz", "orbax")


class CheckpointError(ValueError):
    """A checkpoint is damaged, or of another model or run."""


class Checkpoint(NamedTuple):
    """One that is whole."""

    path: pathlib.Path
    step: int
    run: dict[str, Any]  # what the caller said of the run
    loop: dict[str, Any]  # counters of the loop that wrote it
    best_step: int | None


def save_checkpoint(
    folder: str | os.PathLike,
    step: int,
    state: Any,
    *,
    run: dict[str, Any] | None = None,
    loop: dict[str, Any] | None = None,
    best_step: int | None = None,
    keep: int = 3,
    format: Format = "npz",
) -> pathlib.Path:
    """Writes a state whole or not at all, then removes all but the last `keep` and the best.

    In several processes all must call it, on one shared folder: with "npz" the arrays are gathered
    and process 0 writes them, with "orbax" each process writes the parts that it holds. It returns
    where the checkpoint is on the disk. Equal states and facts make equal bytes ("npz").

    Args:
      folder: made where it is missing.
      step: its number, at least 0; an earlier checkpoint of that number is replaced.
      state: pytree of arrays, keys among them.
      run: JSON facts that must be the same when it is loaded: configuration, a vocabulary's sha256.
      loop: JSON facts that may differ, for whoever goes on.
      best_step: the step of the checkpoint to keep for being best.
      keep: how many of the last are kept.
      format: "npz" for arrays that one host can hold, "orbax" (extra `orbax`) for larger ones.

    Returns:
      The path of the new checkpoint.

    Raises:
      OSError: it cannot be written; the folder is as it was.
      ValueError: step or keep are too small, format is unknown, a fact is none that JSON has.
      TypeError: step or keep are no integers, or a fact is none that JSON has.
      ImportError: format is "orbax" and Orbax is missing.

    Cost: one copy of the state on the host, its sha256, one write and fsync.
    """
    require_count("save_checkpoint", "step", step, least=0)
    require_count("save_checkpoint", "keep", keep)
    require_choice("save_checkpoint", "format", format, FORMATS)
    json.dumps([run, loop], allow_nan=False)  # a fact that is NaN would differ from itself
    facts = {"step": step, "run": run or {}, "loop": loop or {}, "best_step": best_step}
    folder = pathlib.Path(folder)
    path = folder / f"step-{step:08}.{format}"
    by_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    if format == "orbax":
        save_sharded(path, state, facts)
    else:
        whole = _gathered(state)
        by_first(lambda: save_arrays(path, whole, facts))
    by_first(lambda: _prune(folder, keep, path, {step, best_step}))
    return path


def find_checkpoint(
    folder: str | os.PathLike, which: Literal["latest", "best"] = "latest"
) -> Checkpoint | None:
    """The newest checkpoint of a folder that is whole, or the one that the newest calls the best.

    Each is read and verified, newest first; one that is damaged or torn is left where it is,
    skipped, and named in a warning. Other files and folders are not looked at. One that cannot be
    read at all, for want of permission say, is an error.

    Args:
      folder: as given to `save_checkpoint`; it may be missing.
      which: "latest" or "best".

    Returns:
      The Checkpoint, or None where there is none.

    Raises:
      OSError: the folder cannot be read.
      ValueError: which is unknown.

    Cost: one read of the checkpoint and its sha256.
    """
    require_choice("find_checkpoint", "which", which, ("latest", "best"))
    latest = _first_whole(_numbered(folder))
    if which == "latest" or latest is None or latest.step == latest.best_step:
        return latest
    return find_step(folder, latest.best_step)


def find_step(folder: str | os.PathLike, step: int | None) -> Checkpoint | None:
    """The checkpoint of that number, if it is there and whole."""
    return _first_whole([(n, path) for n, path in _numbered(folder) if n == step])


def has_checkpoints(folder: str | os.PathLike) -> bool:
    """True where a folder holds any, whole or not."""
    return bool(_numbered(folder))


def load_checkpoint(
    path: str | os.PathLike, like: Any, *, run: dict[str, Any] | None = None
) -> Any:
    """The state of a checkpoint, laid out over devices as `like` is.

    Args:
      path: of the checkpoint.
      like: a state of the same structure, shapes and dtypes; the layout that the checkpoint was
        written under does not matter.
      run: the facts that it must have been saved with; None for any.

    Returns:
      The state.

    Raises:
      OSError: it cannot be read.
      CheckpointError: it is damaged, or of another model or run; every difference is named.
      ImportError: it is of Orbax, which is missing.

    Cost: one read and its sha256.
    """
    path = pathlib.Path(path)
    try:
        if path.suffix == ".orbax":
            facts, load = read_sharded_metadata(path), functools.partial(load_sharded, path)
        else:
            header, arrays = read_arrays(path)
            facts, load = header["metadata"], functools.partial(assemble, path, header, arrays)
        saved = facts["run"]
        differences = [] if run is None else list(_differences(saved, json.loads(json.dumps(run))))
        if not differences:
            return load(like)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    raise CheckpointError(
        f"load_checkpoint: {path} is of another run: {'; '.join(differences)}. Resume with what it "
        "was made with, or give a new folder."
    )


@contextlib.contextmanager
def locked(folder: str | os.PathLike, *, new: bool = False) -> Iterator[None]:
    """Holds a folder for this run alone; OSError where a living process holds it.

    The lock is the kernel's, and process 0's: it goes with that process and those it forked,
    however they end. With `new` a folder that holds checkpoints is refused.
    """
    import fcntl  # which Windows has not

    folder, descriptors = pathlib.Path(folder), []

    def lock():
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        descriptors.append(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            raise OSError(
                f"{folder} is in use by the run of process {holder}; wait for its end or give "
                "another folder"
            ) from None
        if new and _numbered(folder):
            raise FileExistsError(
                f"{folder} holds the checkpoints of another run; resume it or give another folder. "
                "Nothing was overwritten"
            )
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())

    try:
        by_first(lock)
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _differences(saved, wanted, prefix=""):
    """A phrase for each fact that is another, by its path in the facts."""
    for name in sorted({*saved, *wanted}):
        pair = saved.get(name), wanted.get(name)
        if all(isinstance(value, dict) for value in pair):
            yield from _differences(*pair, f"{prefix}{name}.")
        elif pair[0] != pair[1]:
            yield f"{prefix}{name} must be {_short(pair[1])}, got {_short(pair[0])}"


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _numbered(folder):
    """[(step, path)] of all that is named as a checkpoint, newest first."""
    folder = pathlib.Path(folder)
    if not folder.exists():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(((int(m[1]), path) for m, path in found if m), reverse=True)


def _first_whole(numbered):
    """The first that is whole; a warning for each before it."""
    for step, path in numbered:
        try:
            facts = _read_facts(path)
            if facts["step"] != step:
                raise ValueError(f"{path} holds step {facts['step']}")
            return Checkpoint(path, step, facts["run"], facts["loop"], facts["best_step"])
        except (ValueError, KeyError, IsADirectoryError, NotADirectoryError) as error:
            warnings.warn(f"checkpoint skipped: {error}", stacklevel=3)
    return None


def _read_facts(path):
    return read_sharded_metadata(path) if path.suffix == ".orbax" else read_metadata(path)


def _prune(folder, keep, newest, kept):
    """Removes all but the last `keep`, those in `kept`, and what a killed writer left."""
    for number, (step, path) in enumerate(_numbered(folder)):
        replaced = path != newest and path.stem == newest.stem  # in another format
        if replaced or (number >= keep and step not in kept):
            with contextlib.suppress(OSError):  # a foreign folder of that name, say
                _remove(path)
    remove_leftovers(folder)


def _remove(path):
    remove_sharded(path) if path.suffix == ".orbax" else path.unlink()


def _gathered(state):
    """The state with every array whole in this process."""
    if jax.process_count() == 1:
        return state

    def gather(leaf):
        if is_key(leaf):
            data = gather(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if leaf.is_fully_addressable:
            return leaf
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(gather, state)


_NAME = re.compile(r"step-(\d{8,})\.(?:npz|orbax)")
