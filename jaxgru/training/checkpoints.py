"""Atomic, verified checkpoints of a training state, written by Orbax: see README.md."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import warnings
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgru.atomic_files import (
    PREFIX,
    SUFFIX,
    UNSUPPORTED,
    flush_folder,
    remove_leftovers,
    replace_folder,
    require_json,
    write_atomically,
)
from jaxgru.core.checks import require_choice, require_count
from jaxgru.extras import require_extra
from jaxgru.training.processes import on_all_processes, on_process_zero

_FORMAT = "jaxgru checkpoint 1"
_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_NUM_LAST = 3  # checkpoints that are retained in addition to the best
_MAX_METADATA = 2**20  # bytes that Orbax writes in addition to the arrays


class CheckpointError(ValueError):
    """A checkpoint is damaged, or belongs to another model or run."""


class Checkpoint(NamedTuple):
    """An intact checkpoint."""

    path: pathlib.Path
    step: int
    run: dict[str, Any]  # the caller's metadata of the run
    loop: dict[str, Any]  # counters of the training loop
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
    """Writes a state atomically, then removes all checkpoints except the last three and the best.

    All processes must call it, with one shared folder. It returns when the checkpoint is on disk.

    Args:
      folder: of the checkpoints; it is created if missing.
      step: at least 0; an earlier checkpoint of the same step is replaced.
      state: pytree of arrays, which may include `jax.random.key` arrays.
      run: JSON metadata that must be equal on loading: configuration, a vocabulary's sha256.
      loop: JSON metadata that may differ.
      best_step: the step of the best checkpoint, which is retained.

    Returns:
      The path of the checkpoint.

    Raises:
      OSError: it cannot be written; the earlier checkpoints are unchanged.
      ValueError: a step is negative, or metadata changes when it is saved as JSON and loaded: it
        contains NaN, infinity, a tuple, or a key that is not a string.
      TypeError: a step is not an integer, a leaf is no array or has a dtype that JAX would change,
        such as float64 without x64, or metadata is no dict of JSON values.
      ImportError: Orbax is missing.

    Cost: Orbax's write of the state, and one read of its files for the sha256.
    """
    step = _require_step("step", step)
    best_step = None if best_step is None else _require_step("best_step", best_step)
    orbax = require_extra("save_checkpoint", "orbax", "orbax.checkpoint").checkpoint
    metadata = {"run": {} if run is None else run, "loop": {} if loop is None else loop}
    for name, value in metadata.items():
        _require_metadata("save_checkpoint", name, value)
    leaves = _leaves("save_checkpoint", "state", state)[0]
    arrays = _arrays(leaves)
    record = {
        "format": _FORMAT,
        "leaves": {name: _form(leaf) for name, leaf in leaves.items()},
        "metadata": {"step": step, **metadata, "best_step": best_step},
    }
    path = pathlib.Path(folder) / f"step-{step:08}"
    temporary = path.absolute().with_name(f"{PREFIX}{path.name}{SUFFIX}")

    def prepare():
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)

    def write():
        try:
            # Not asynchronous: after a failure its threads would block the process for minutes.
            with orbax.Checkpointer(orbax.StandardCheckpointHandler()) as checkpointer:
                checkpointer.save(temporary, args=orbax.args.StandardSave(arrays))
        except Exception as error:  # Orbax raises ValueError when the disk is full
            kind = type(error) if isinstance(error, OSError) else OSError
            raise kind(f"save_checkpoint: {path} could not be written: {error}") from error

    def commit():
        text = json.dumps({**record, "files": _sums(temporary, flush=True)})
        with_checksum = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text}
        write_atomically(temporary / _MANIFEST, json.dumps(with_checksum).encode())
        replace_folder(path, temporary)  # also on the disk, before other checkpoints are removed
        for old_step, old in list_checkpoints(path.parent)[_NUM_LAST:]:
            if old_step not in (step, best_step):
                shutil.rmtree(old, ignore_errors=True)  # it may be a file with such a name
        remove_leftovers(path.parent)

    on_process_zero(prepare)
    try:
        # Where one process cannot write, Orbax's other processes wait for 20 minutes or longer.
        if jax.process_count() > 1 and hasattr(os, "posix_fallocate"):  # macOS has no such call
            on_all_processes(lambda: _require_room(path.parent, arrays.values()))
        on_all_processes(write)
        on_process_zero(commit)
    except OSError:
        if jax.process_index() == 0:
            remove_leftovers(path.parent)
        raise
    return path


def find_checkpoint(
    folder: str | os.PathLike, which: Literal["latest", "best"] = "latest"
) -> Checkpoint | None:
    """Finds the newest intact checkpoint of a folder, or the best one according to the newest.

    A damaged checkpoint is skipped with a warning that names it. Other files are ignored.

    Args:
      folder: as given to `save_checkpoint`; it may be missing.
      which: "latest" or "best".

    Returns:
      The Checkpoint, or None if there is none.

    Raises:
      OSError: the folder or a checkpoint cannot be read, e.g. without permission.
      ValueError: which is unknown.

    Cost: one read of the checkpoint for its sha256.
    """
    require_choice("find_checkpoint", "which", which, ("latest", "best"))
    latest = _first_intact(list_checkpoints(folder))
    if which == "latest" or latest is None or latest.step == latest.best_step:
        return latest
    return find_step(folder, latest.best_step)


def find_step(folder: str | os.PathLike, step: int | None) -> Checkpoint | None:
    """Returns the checkpoint of that step, or None if it is missing or damaged."""
    return _first_intact([(n, path) for n, path in list_checkpoints(folder) if n == step])


def list_checkpoints(folder: str | os.PathLike) -> list[tuple[int, pathlib.Path]]:
    """Returns (step, path) of all checkpoints of a folder, intact or not, newest first."""
    folder = pathlib.Path(folder)
    paths = folder.iterdir() if folder.exists() else ()
    found = [(_NAME.fullmatch(path.name), path) for path in paths]
    return sorted(((int(m[1]), path) for m, path in found if m), reverse=True)


def load_checkpoint(
    path: str | os.PathLike, like: Any, *, run: dict[str, Any] | None = None
) -> Any:
    """Loads the state of a checkpoint onto the devices of `like`.

    Args:
      path: of the checkpoint.
      like: a state of arrays with the same structure, shapes, dtypes, and the wanted sharding.
      run: the metadata that the checkpoint must have been saved with; None accepts any.

    Returns:
      The state.

    Raises:
      OSError: the checkpoint cannot be read.
      CheckpointError: it is damaged, or belongs to another model or run.
      ValueError, TypeError: run or a leaf of like is refused as in `save_checkpoint`.
      ImportError: Orbax is missing.

    Cost: two reads, one of them for the sha256.
    """
    orbax = require_extra("load_checkpoint", "orbax", "orbax.checkpoint").checkpoint
    if run is not None:
        _require_metadata("load_checkpoint", "run", run)
    leaves, treedef = _leaves("load_checkpoint", "like", like)
    path = pathlib.Path(path)
    try:
        record = _read_manifest(path)
    except ValueError as error:
        raise CheckpointError(f"load_checkpoint: {error}.") from None
    if run is not None and (differences := "; ".join(_differences(record["metadata"]["run"], run))):
        raise CheckpointError(
            f"load_checkpoint: {path} belongs to another run: {differences}. Resume "
            "with the values it was saved with, or choose a new folder."
        )
    _require_same_forms(path, record["leaves"], leaves)
    target = {
        # An array without committed devices is loaded to the host.
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
        if array.committed
        else np.empty(array.shape, array.dtype)
        for name, array in _arrays(leaves).items()
    }
    with orbax.Checkpointer(orbax.StandardCheckpointHandler()) as checkpointer:
        arrays = checkpointer.restore(path.absolute(), args=orbax.args.StandardRestore(target))
    loaded = [_leaf(arrays.get(str(n)), leaf) for n, leaf in enumerate(leaves.values())]
    return jax.tree_util.tree_unflatten(treedef, loaded)


def _require_step(argument, step):
    """The step as a Python integer, from one of NumPy or JAX too."""
    step = step.item() if getattr(step, "shape", None) == () else step
    require_count("save_checkpoint", argument, step, least=0)
    return step


def _require_metadata(function, name, value):
    """TypeError unless value is a dict of JSON values, ValueError if JSON changes one of them."""
    if not isinstance(value, dict):
        raise TypeError(f"{function}: {name} must be a dict, got {value!r}.")
    require_json(function, name, value)


def _first_intact(numbered):
    """The first intact checkpoint; warns of each damaged one before it."""
    for step, path in numbered:
        try:
            metadata = _read_manifest(path)["metadata"]
            if metadata["step"] != step:
                raise ValueError(f"{path} holds step {metadata['step']}")
            return Checkpoint(path, **metadata)
        except ValueError as error:
            warnings.warn(f"find_checkpoint: checkpoint skipped: {error}", stacklevel=3)
    return None


def _require_room(folder, arrays):
    """Raises OSError unless the disk has room for the parts of this process, where it can tell."""
    parts = [part for array in arrays for part in array.addressable_shards if part.replica_id == 0]
    size = sum(part.data.nbytes for part in parts) + _MAX_METADATA
    with tempfile.NamedTemporaryFile(prefix=PREFIX, suffix=SUFFIX, dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise


def _read_manifest(path):
    """The manifest; ValueError if it or another file is damaged, missing or unexpected."""
    try:
        if not (path / _MANIFEST).exists():
            raise ValueError(f"{_MANIFEST} is missing")
        with_checksum = json.loads((path / _MANIFEST).read_bytes())
        text = with_checksum["manifest"]
        if with_checksum["sha256"] != hashlib.sha256(text.encode()).hexdigest():
            raise ValueError(f"{_MANIFEST} does not match its sha256")
        record = json.loads(text)
        if record["format"] != _FORMAT:
            raise ValueError(f"its format is {record['format']!r}")
        sums, found = record["files"], _sums(path)
        changed = sorted(name for name in {*sums, *found} if sums.get(name) != found.get(name))
        if changed:
            raise ValueError(f"files {changed} were changed")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be an intact {_FORMAT!r}: {error}") from None
    return record


def _sums(path, *, flush=False):
    """{name: sha256} of every file below a folder, except the manifest."""
    sums = {}
    for parent, _, names in os.walk(path, onerror=_raise):
        for name in names:
            file = pathlib.Path(parent, name)
            with open(file, "rb") as opened:
                if flush:  # Orbax flushes arrays, but no other files
                    os.fsync(opened)
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            sums[file.relative_to(path).as_posix()] = digest
        if flush:
            flush_folder(parent)
    sums.pop(_MANIFEST, None)
    return sums


def _raise(error):
    raise error


def _differences(saved, wanted, prefix=""):
    """A phrase for each entry of the metadata that differs."""
    for name in sorted({*saved, *wanted}):
        pair = saved.get(name), wanted.get(name)
        if all(isinstance(value, dict) for value in pair):
            yield from _differences(*pair, f"{prefix}{name}.")
        elif pair[0] != pair[1]:
            texts = [json.dumps(value) for value in pair]
            got, need = (text if len(text) <= 80 else f"{text[:77]}..." for text in texts)
            yield f"{prefix}{name} must be {need}, got {got}"


def _leaves(function, argument, tree):
    """({path in the tree: leaf}, treedef); TypeError for a leaf that JAX would change."""
    found, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in found}
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise TypeError(
                f"{function}: {argument}{path} must be an array, got {type(leaf).__name__}; make "
                "one, e.g. with jnp.asarray."
            )
        try:
            kept = jnp.asarray(leaf).dtype == leaf.dtype
        except TypeError:  # text or objects
            kept = False
        if not kept:
            raise TypeError(
                f"{function}: {argument}{path} must have a dtype that JAX keeps, got {leaf.dtype}; "
                "cast it or enable x64."
            )
    return leaves, treedef


def _arrays(leaves):
    """{number: array} for Orbax, which takes neither keys nor empty arrays."""
    arrays = {str(n): _data(leaf) for n, leaf in enumerate(leaves.values())}
    return {number: array for number, array in arrays.items() if array.size}


def _data(leaf):
    return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _form(leaf):
    """[dtype, shape] as JSON values; the dtype of a key names its implementation."""
    dtype = f"key {jax.random.key_impl(leaf)}" if _is_key(leaf) else str(leaf.dtype)
    return [dtype, list(leaf.shape)]


def _leaf(array, like):
    """`array` as a leaf like `like`; None stands for an empty array, which Orbax does not store."""
    array = _data(like) if array is None else jnp.asarray(array)
    if not _is_key(like):
        return array
    return jax.random.wrap_key_data(array, impl=str(jax.random.key_impl(like)))


def _require_same_forms(path, saved, leaves):
    """Raises CheckpointError unless names, shapes and dtypes are those of the leaves."""
    wanted = {name: _form(leaf) for name, leaf in leaves.items()}
    names = [name for name in {**wanted, **saved} if wanted.get(name) != saved.get(name)]
    if not names:
        return

    def text(name):
        if name not in saved or name not in wanted:
            return f"{name} is {'missing' if name in wanted else 'not in the model'}"
        need, got = (f"{dtype}{shape}" for dtype, shape in (wanted[name], saved[name]))
        return f"{name} must be {need}, got {got}"

    parts = dict.fromkeys(m[1] for name in names if (m := re.match(r"\.(\w+)", name)))
    where = f" in {' and '.join(parts)}" if parts else ""  # of a TrainState
    raise CheckpointError(
        f"load_checkpoint: {path} belongs to another model: {len(names)} different leaves{where}, "
        f"the first: {'; '.join(map(text, names[:3]))}. Resume with the model and optimizer it was "
        "saved with, or choose a new folder."
    )
