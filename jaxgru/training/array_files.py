"""Files of arrays with their dtypes, sha256 sums and metadata; loading runs no code."""

import hashlib
import json
import os
import zipfile
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgru.atomic_files import write_whole


def save_arrays(path: str | os.PathLike, tree: Any, metadata: dict[str, Any]) -> None:
    """Writes a pytree of arrays and a dict of JSON values into one .npz file.

    The file appears whole or not at all: a temporary file in the same folder is written, flushed
    to the disk and renamed. An existing file is replaced. Equal arrays and metadata make equal
    bytes.

    Args:
      path: of the file.
      tree: pytree of arrays, `jax.random.key` arrays among them; leaves are named by their path
        in it.
      metadata: values that `json` can write.

    Raises:
      OSError: the file cannot be written.
      TypeError: metadata holds what JSON cannot.
    """
    plain, dtypes = {}, {}
    for name, leaf in named_leaves(tree)[0].items():
        plain[name], dtypes[name] = to_plain(leaf)
    header = json.dumps(
        {
            "format": _FORMAT,
            "dtypes": dtypes,
            "sha256": {name: _sha256(array) for name, array in plain.items()},
            "metadata": metadata,
        }
    )
    write_whole(
        path,
        lambda file: np.savez(file, **{_HEADER: np.array(header)}, **plain),  # pyright: ignore[reportArgumentType]
    )


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a file that `save_arrays` wrote, the whole of which is checked.

    Args:
      path: of the file.

    Returns:
      The dict.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no such file, or damaged.
    """
    return read_arrays(path)[0]["metadata"]


def load_arrays(path: str | os.PathLike, like: Any) -> Any:
    """The pytree of a file that `save_arrays` wrote; runs no code of the file.

    Args:
      path: of the file.
      like: a pytree of arrays, or of `jax.ShapeDtypeStruct`, of the structure, shapes and dtypes
        that the file must hold. A leaf that was put on devices says where the loaded one is to lie.

    Returns:
      The pytree, its leaves jax arrays.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no such file, is damaged, or holds other names, shapes or dtypes.
    """
    return assemble(path, *read_arrays(path), like)


def assemble(path: str | os.PathLike, header: Any, arrays: Any, like: Any) -> Any:
    """The pytree of what `read_arrays` returned; ValueError where it is of another form."""
    leaves, treedef = named_leaves(like)
    require_names("load_arrays", path, arrays, leaves)
    loaded, wrong = [], []
    for name, leaf in leaves.items():
        try:
            loaded.append(from_plain(arrays[name], header["dtypes"][name], leaf))
        except ValueError as error:
            wrong.append(f"{name} {error}")
    if wrong:
        raise ValueError(f"load_arrays: {path} is of another model: {'; '.join(wrong)}.")
    return jax.tree_util.tree_unflatten(treedef, loaded)


def named_leaves(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves by their path in the tree, in its order, and the tree's structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(entry): leaf for entry, leaf in leaves}, treedef


def require_names(function: str, path: str | os.PathLike, found: Any, wanted: Any) -> None:
    """ValueError unless a file has exactly the leaves that are wanted."""
    missing, surplus = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or surplus:
        raise ValueError(
            f"{function}: {path} must hold the leaves of `like`, got missing {missing} and "
            f"surplus {surplus}."
        )


def to_plain(leaf: Any) -> tuple[np.ndarray, str]:
    """A leaf as an array of NumPy's own dtypes, and the name of its dtype.

    NumPy's files know no bfloat16, which travels as bits, and no key, which travels as its data.
    """
    if is_key(leaf):
        return np.asarray(jax.random.key_data(leaf)), f"{_KEY}{jax.random.key_impl(leaf)}"
    array = np.asarray(leaf)
    plain = array if array.dtype.kind in "biufc" else array.view(f"u{array.dtype.itemsize}")
    return plain, str(array.dtype)


def from_plain(array: np.ndarray, dtype: str, like: Any) -> jax.Array:
    """The leaf of `to_plain`, laid out as `like`; ValueError where shape or dtype are others."""
    if dtype.startswith(_KEY) != is_key(like):
        raise ValueError(f"must be {like.dtype}{list(like.shape)}, got {dtype}")
    if dtype.startswith(_KEY):
        place = jax.random.key_data(like) if _is_placed(like) else None
        key = jax.random.wrap_key_data(_place(array, place), impl=dtype.removeprefix(_KEY))
        if (key.shape, key.dtype) != (like.shape, like.dtype):
            raise ValueError(f"must be {like.dtype}{list(like.shape)}, got {dtype}")
        return key
    true_dtype = jnp.dtype(dtype)
    array = array if array.dtype == true_dtype else array.view(true_dtype)
    if array.shape != like.shape or true_dtype != like.dtype:
        raise ValueError(
            f"must be {like.dtype}{list(like.shape)}, got {true_dtype}{list(array.shape)}"
        )
    return _place(array, like)


def is_key(leaf: Any) -> bool:
    """True of a typed PRNG key."""
    return jnp.issubdtype(getattr(leaf, "dtype", np.dtype(float)), jax.dtypes.prng_key)


def _is_placed(like):
    return isinstance(like, jax.Array) and like.committed


def _place(array, like):
    """The array on the devices of `like`; wherever JAX wants it, if that is on none of its own."""
    if not _is_placed(like):
        return jnp.asarray(array)
    return jax.make_array_from_callback(
        array.shape, like.sharding, lambda index: np.asarray(array[index])
    )


def _sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


_FORMAT = "jaxgru arrays 2"
_HEADER = "jaxgru"
_KEY = "key "
_DAMAGE = (
    *(KeyError, TypeError, ValueError, EOFError, OSError, RuntimeError, AttributeError),
    *(zipfile.BadZipFile, zlib.error),
)


def read_arrays(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(header, arrays) of a file; ValueError where it is damaged or another's."""
    with open(path, "rb") as opened:
        try:
            with np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(str(arrays.pop(_HEADER)))
            if header["format"] != _FORMAT:
                raise ValueError(f"format {header['format']!r}")
            if set(header["dtypes"]) != set(arrays) or not isinstance(header["metadata"], dict):
                raise ValueError("its header does not fit its arrays")
            for name, array in arrays.items():
                if header["sha256"][name] != _sha256(array):
                    raise ValueError(f"the sha256 of {name} is another")
        except _DAMAGE as error:
            message = f"{os.fspath(path)} must be a whole {_FORMAT!r} file: {error}"
            raise ValueError(message) from error
    return header, arrays
