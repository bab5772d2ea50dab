"""Checkpoints of a training state: Orbax's, verified, and of this run.

A folder holds `step-00000120` for each checkpoint that is kept. A checkpoint is a
folder that Orbax wrote, every process its own parts, with a `manifest.json` in it. Orbax does not
notice a flipped bit, and does not know what a run is: the manifest holds a sha256 of every file,
the names, dtypes and shapes of the arrays, what the caller says of the run, and the step that was
best so far. A checkpoint gets its name when all of this is on the disk.

Orbax's CheckpointManager is not used (orbax-checkpoint 0.12.8). It counts a damaged checkpoint as
one of the last, replaces none, and silently writes nothing below its number. It leaves behind what
a full disk did not let it finish. The sums of its files can be taken only after it has committed.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import warnings
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgru.atomic_files import PREFIX, SUFFIX, flush_folder, remove_leftovers, write_atomically
from jaxgru.core.checks import require_choice, require_count, require_extra
from jaxgru.training.processes import on_all_processes, on_process_zero


class CheckpointError(ValueError):
    """A checkpoint is damaged, or of another model or run."""


class Checkpoint(NamedTuple):
    """One that is intact."""

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
) -> pathlib.Path:
    """Writes a state atomically, then removes all checkpoints but the last three and the best.

    With several processes all of them must call it, on one shared folder; it returns when the
    checkpoint is on the disk.

    Args:
      folder: made where it is missing.
      step: its number, at least 0; an earlier checkpoint of that number is replaced.
      state: pytree of arrays, `jax.random.key` arrays among them.
      run: JSON metadata that must be equal when it is loaded: configuration, a vocabulary's sha256.
      loop: JSON metadata that may differ, for whoever resumes.
      best_step: the step of the checkpoint to keep for being the best.

    Returns:
      The path of the new checkpoint.

    Raises:
      OSError: it cannot be written; the earlier checkpoints are as they were.
      ValueError: step is negative, or metadata holds NaN or infinity.
      TypeError: step is no integer, or metadata is nothing that JSON can hold.
      ImportError: Orbax is missing.

    Cost: what Orbax takes to write the state, and one read of its files for their sha256.
    """
    require_count("save_checkpoint", "step", step, least=0)
    orbax = require_extra("save_checkpoint", "orbax", "orbax.checkpoint").checkpoint
    leaves = _leaves(state)[0]
    arrays = _arrays(leaves)
    record = {
        "format": _FORMAT,
        "leaves": {name: _form(leaf) for name, leaf in leaves.items()},
        "metadata": {"step": step, "run": run or {}, "loop": loop or {}, "best_step": best_step},
    }
    json.dumps(record, allow_nan=False)  # before anything is written; a NaN would equal nothing
    path = checkpoint_path(folder, step)
    temporary = path.absolute().with_name(f"{PREFIX}{path.name}{SUFFIX}")

    def prepare():
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)

    def write():
        try:
            # Not asynchronous: where that fails, its threads hold up the process for minutes.
            with orbax.Checkpointer(orbax.StandardCheckpointHandler()) as checkpointer:
                checkpointer.save(temporary, args=orbax.args.StandardSave(arrays))
        except Exception as error:  # a full disk is Orbax's ValueError
            kind = type(error) if isinstance(error, OSError) else OSError
            raise kind(f"{path} could not be written: {error}") from error

    def commit():
        _write_manifest(temporary, record)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        flush_folder(path.parent)  # the new name is on the disk before others are removed
        _prune(path.parent, {step, best_step})

    on_process_zero(prepare)
    try:
        if jax.process_count() > 1 and hasattr(os, "posix_fallocate"):  # macOS has no such call
            on_all_processes(lambda: _require_room(temporary, arrays.values()))
        on_all_processes(write)
    except OSError:
        if jax.process_index() == 0:
            remove_leftovers(path.parent)
        raise
    on_process_zero(commit)
    return path


def find_checkpoint(
    folder: str | os.PathLike, which: Literal["latest", "best"] = "latest"
) -> Checkpoint | None:
    """The newest intact checkpoint of a folder, or the one that the newest calls the best.

    Each is read and verified, newest first. A damaged or truncated one is skipped with a warning
    that names it, and left where it is. Other files and folders are ignored. A checkpoint that
    cannot be read at all, for want of permission say, is an error.

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
    latest = _first_intact(_numbered(folder))
    if which == "latest" or latest is None or latest.step == latest.best_step:
        return latest
    return find_step(folder, latest.best_step)


def find_step(folder: str | os.PathLike, step: int | None) -> Checkpoint | None:
    """The checkpoint of that number, if it is there and intact."""
    return _first_intact([(n, path) for n, path in _numbered(folder) if n == step])


def checkpoint_path(folder: str | os.PathLike, step: int) -> pathlib.Path:
    """Where the checkpoint of that number lies."""
    return pathlib.Path(folder) / f"step-{step:08}"


def has_checkpoints(folder: str | os.PathLike) -> bool:
    """Whether a folder holds any checkpoint, intact or not."""
    return bool(_numbered(folder))


def load_checkpoint(
    path: str | os.PathLike, like: Any, *, run: dict[str, Any] | None = None
) -> Any:
    """The state of a checkpoint, laid out over devices as `like` is.

    Args:
      path: of the checkpoint.
      like: a state of the same structure, shapes and dtypes; the layout that the checkpoint was
        written under does not matter.
      run: the metadata that it must have been saved with; None for any.

    Returns:
      The state.

    Raises:
      OSError: it cannot be read.
      CheckpointError: it is damaged, or of another model or run; every difference is named.
      ImportError: Orbax is missing.

    Cost: two reads, of which one for the sha256.
    """
    orbax = require_extra("load_checkpoint", "orbax", "orbax.checkpoint").checkpoint
    path = pathlib.Path(path)
    try:
        record = _read_manifest(path)
    except ValueError as error:
        raise CheckpointError(f"load_checkpoint: {error}.") from None
    wanted = None if run is None else json.loads(json.dumps(run))
    differences = [] if run is None else list(_differences(record["metadata"]["run"], wanted))
    if differences:
        raise CheckpointError(
            f"load_checkpoint: {path} is of another run: {'; '.join(differences)}. Resume with "
            "what it was made with, or give a new folder."
        )
    leaves, treedef = _leaves(like)
    _require_same_forms(path, record["leaves"], leaves)
    target = {name: _target(array) for name, array in _arrays(leaves).items()}
    with orbax.Checkpointer(orbax.StandardCheckpointHandler()) as checkpointer:
        arrays = checkpointer.restore(path.absolute(), args=orbax.args.StandardRestore(target))
    loaded = [_leaf(arrays.get(str(n)), leaf) for n, leaf in enumerate(leaves.values())]
    return jax.tree_util.tree_unflatten(treedef, loaded)


# The folder.

_NAME = re.compile(r"step-(\d{8,})")
_KEPT = 3  # of the last checkpoints, beside the best
_MOST_METADATA = 2**20  # bytes that Orbax writes beside the arrays


def _numbered(folder):
    """[(step, path)] of all that is named as a checkpoint, newest first."""
    folder = pathlib.Path(folder)
    if not folder.exists():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(((int(m[1]), path) for m, path in found if m), reverse=True)


def _first_intact(numbered):
    """The first that is intact; a warning for each before it."""
    for step, path in numbered:
        try:
            metadata = _read_manifest(path)["metadata"]
            if metadata["step"] != step:
                raise ValueError(f"{path} holds step {metadata['step']}")
            return Checkpoint(path, **metadata)
        except ValueError as error:
            warnings.warn(f"checkpoint skipped: {error}", stacklevel=3)
    return None


def _require_room(temporary, arrays):
    """OSError where the disk has no room for what this process is to write.

    Orbax's processes wait 20 minutes, or for ever, for one of them that could not write its part.
    """
    parts = [part for array in arrays for part in array.addressable_shards if part.replica_id == 0]
    size = sum(part.data.nbytes for part in parts) + _MOST_METADATA
    path = temporary.with_name(f"{PREFIX}{jax.process_index()}-{temporary.name}")
    try:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    finally:
        path.unlink(missing_ok=True)


def _prune(folder, kept):
    """Removes all but the last checkpoints and those in `kept`, and what a killed writer left."""
    for step, path in _numbered(folder)[_KEPT:]:
        if step not in kept:
            with contextlib.suppress(OSError):  # a stray file of that name, say
                shutil.rmtree(path)
    remove_leftovers(folder)


# The manifest.

_FORMAT = "jaxgru checkpoint 1"
_MANIFEST = "manifest.json"


def _write_manifest(path, record):
    """Adds the sha256 of every file, and of the manifest itself; all are on the disk after it."""
    text = json.dumps({**record, "files": _sums(path, flush=True)})
    sealed = json.dumps({"sha256": _sha256(text), "manifest": text})
    write_atomically(path / _MANIFEST, sealed.encode())


def _read_manifest(path):
    """The manifest; ValueError where it is damaged or a file is not what it says."""
    try:
        if not (path / _MANIFEST).exists():
            raise ValueError(f"{_MANIFEST} is missing")
        sealed = json.loads((path / _MANIFEST).read_bytes())
        if sealed["sha256"] != _sha256(sealed["manifest"]):
            raise ValueError(f"the sha256 of {_MANIFEST} is another")
        record = json.loads(sealed["manifest"])
        if record["format"] != _FORMAT:
            raise ValueError(f"its format is {record['format']!r}")
        sums, found = record["files"], _sums(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be an intact {_FORMAT!r}: {error}") from None
    changed = sorted(name for name in {*sums, *found} if sums.get(name) != found.get(name))
    if changed:
        raise ValueError(f"{path} must be an intact {_FORMAT!r}: {changed} were changed")
    return record


def _sums(path, *, flush=False):
    """The sha256 of each file below a folder but the manifest, by its path in the folder."""
    sums = {}
    for parent, _, names in os.walk(path, onerror=_raise):
        for name in names:
            file = pathlib.Path(parent, name)
            with open(file, "rb") as opened:
                if flush:  # Orbax flushes arrays, but not what it writes beside them
                    os.fsync(opened)
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            sums[file.relative_to(path).as_posix()] = digest
        if flush:
            flush_folder(parent)
    sums.pop(_MANIFEST, None)
    return sums


def _sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def _raise(error):
    raise error


def _differences(saved, wanted, prefix=""):
    """A phrase for each piece of metadata that differs, by its path."""
    for name in sorted({*saved, *wanted}):
        pair = saved.get(name), wanted.get(name)
        if all(isinstance(value, dict) for value in pair):
            yield from _differences(*pair, f"{prefix}{name}.")
        elif pair[0] != pair[1]:
            yield f"{prefix}{name} must be {_short(pair[1])}, got {_short(pair[0])}"


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# The arrays.


def _leaves(tree):
    """The leaves by their path in the tree, in its order, and the tree's structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(entry): leaf for entry, leaf in leaves}, treedef


def _arrays(leaves):
    """What Orbax is given, by number: key data for keys, and no empty arrays, which it refuses."""
    arrays = {str(n): _data(leaf) for n, leaf in enumerate(leaves.values())}
    return {number: array for number, array in arrays.items() if array.size}


def _data(leaf):
    return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _form(leaf):
    """[dtype, shape] in JSON; the dtype of a key names its implementation."""
    dtype = f"key {jax.random.key_impl(leaf)}" if _is_key(leaf) else str(leaf.dtype)
    return [dtype, list(leaf.shape)]


def _target(array):
    """Where Orbax is to put an array: on its devices; on the host if it is committed to none."""
    if not array.committed:
        return np.empty(array.shape, array.dtype)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _leaf(array, like):
    """The leaf of a restored array; None stands for an empty one."""
    array = _data(like) if array is None else jnp.asarray(array)
    if not _is_key(like):
        return array
    return jax.random.wrap_key_data(array, impl=str(jax.random.key_impl(like)))


def _require_same_forms(path, saved, leaves):
    """CheckpointError unless a checkpoint has the names, shapes and dtypes of these leaves."""
    missing, unexpected = sorted(leaves.keys() - saved), sorted(saved.keys() - leaves)
    if missing or unexpected:
        raise CheckpointError(
            f"load_checkpoint: {path} must hold the leaves of `like`, got missing keys {missing} "
            f"and unexpected keys {unexpected}."
        )
    pairs = [(name, _form(leaf), saved[name]) for name, leaf in leaves.items()]
    wrong = [
        f"{name} must be {wanted[0]}{wanted[1]}, got {found[0]}{found[1]}"
        for name, wanted, found in pairs
        if wanted != found
    ]
    if wrong:
        raise CheckpointError(f"load_checkpoint: {path} is of another model: {'; '.join(wrong)}.")
