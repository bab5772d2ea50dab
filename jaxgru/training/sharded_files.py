"""Arrays of any number of processes in Orbax's folders, with a manifest that verifies them.

Orbax writes and reads the parts that each process holds, and does not notice a flipped bit. The
manifest beside its folder, a .json file of the same name, is written last: it holds a sha256 of
every file of Orbax, and a folder without one is no checkpoint.
"""

import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp

from jaxgru.atomic_files import PREFIX, SUFFIX, remove_leftovers, write_whole
from jaxgru.core.checks import require_extra
from jaxgru.training.array_files import is_key, named_leaves, require_names
from jaxgru.training.processes import by_first


def save_sharded(path: pathlib.Path, tree: Any, metadata: dict[str, Any]) -> None:
    """Writes a pytree of arrays and a dict of JSON values; called by every process."""
    checkpoints = require_extra("save_checkpoint", "orbax", "orbax.checkpoint").checkpoint
    path = path.absolute()
    leaves = named_leaves(tree)[0]
    record = {
        "format": _FORMAT,
        "names": list(leaves),
        "dtypes": [_dtype_tag(leaf) for leaf in leaves.values()],
        "shapes": [list(leaf.shape) for leaf in leaves.values()],
        "metadata": json.loads(json.dumps(metadata)),  # before anything is written
    }
    by_first(lambda: remove_leftovers(path.parent))
    arrays = {str(n): _data(leaf) for n, leaf in enumerate(leaves.values())}
    temporary = path.with_name(f"{PREFIX}{path.name}{SUFFIX}")
    try:
        with checkpoints.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary, arrays)
    except Exception as error:  # a full disk is Orbax's ValueError
        raise OSError(f"{path} could not be written: {error}") from error

    def seal():
        text = json.dumps({**record, "files": _sha256_of_files(temporary)})
        sealed = json.dumps({"sha256": _sha256(text), "manifest": text})
        if path.exists():
            remove_sharded(path)
        temporary.rename(path)
        write_whole(_manifest(path), lambda file: file.write(sealed.encode()))

    by_first(seal)


def read_sharded_metadata(path: pathlib.Path) -> dict[str, Any]:
    """The metadata of what `save_sharded` wrote, every file of which is checked."""
    return _read_manifest(path)["metadata"]


def load_sharded(path: pathlib.Path, like: Any) -> Any:
    """The pytree of what `save_sharded` wrote, each leaf laid out as that of `like`."""
    checkpoints = require_extra("load_checkpoint", "orbax", "orbax.checkpoint").checkpoint
    record = _read_manifest(path)
    leaves, treedef = named_leaves(like)
    require_names("load_checkpoint", path, record["names"], leaves)
    numbers = {name: number for number, name in enumerate(record["names"])}
    target, wrong = {}, []
    for name, leaf in leaves.items():
        number = numbers[name]
        found = (record["dtypes"][number], record["shapes"][number])
        if found != (_dtype_tag(leaf), list(leaf.shape)):
            wanted = f"{_dtype_tag(leaf)}{list(leaf.shape)}"
            wrong.append(f"{name} must be {wanted}, got {found[0]}{found[1]}")
        data = _data(leaf)
        target[str(number)] = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=data.sharding)
    if wrong:
        raise ValueError(f"load_checkpoint: {path} is of another model: {'; '.join(wrong)}.")
    with checkpoints.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(path.absolute(), target)
    loaded = []
    for name, leaf in leaves.items():
        array = arrays[str(numbers[name])]
        if is_key(leaf):
            array = jax.random.wrap_key_data(array, impl=str(jax.random.key_impl(leaf)))
        loaded.append(array)
    return jax.tree_util.tree_unflatten(treedef, loaded)


def remove_sharded(path: pathlib.Path) -> None:
    """Removes the manifest first, without which the rest is no checkpoint."""
    _manifest(path).unlink(missing_ok=True)
    shutil.rmtree(path)


_FORMAT = "jaxgru orbax 1"


def _data(leaf):
    return jax.random.key_data(leaf) if is_key(leaf) else jnp.asarray(leaf)


def _dtype_tag(leaf):
    return f"key {jax.random.key_impl(leaf)}" if is_key(leaf) else str(leaf.dtype)


def _manifest(path):
    return path.with_suffix(".json")


def _read_manifest(path):
    """The manifest; ValueError where it is no whole one or a file is not what it says."""
    try:
        if not _manifest(path).exists():
            raise ValueError("it is missing")
        sealed = json.loads(_manifest(path).read_bytes())
        if sealed["sha256"] != _sha256(sealed["manifest"]):
            raise ValueError("its sha256 is another")
        record = json.loads(sealed["manifest"])
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']!r}")
        sums = record["files"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path} must have a whole {_FORMAT!r} manifest beside it: {error}"
        raise ValueError(message) from None
    found = _sha256_of_files(path)
    changed = sorted(name for name in {*sums, *found} if sums.get(name) != found.get(name))
    if changed:
        raise ValueError(f"{path} must be as it was written; others are now {changed}")
    return record


def _sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256_of_files(path):
    """The sha256 of each file below a folder, by its path in it."""
    sums = {}
    for parent, _, names in os.walk(path):
        for name in names:
            file = pathlib.Path(parent, name)
            with open(file, "rb") as opened:
                sums[file.relative_to(path).as_posix()] = hashlib.file_digest(
                    opened, "sha256"
                ).hexdigest()
    return sums
