"""Weights with their equation in a safetensors file: arrays and JSON, no code; extra `safetensors`.

The file's metadata say what the arrays are for: the structure, the spec, every size, and a sha256
over all names, dtypes, shapes and bytes. Other programs read the arrays by name; `load_weights`
checks every one of these before it returns anything.
"""

import dataclasses
import hashlib
import json
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgru.atomic_files import write_atomically
from jaxgru.core.checks import require_extra
from jaxgru.core.parameters import GRUParams, GRUSpec, require_params
from jaxgru.interop.common import as_float_array, is_stack
from jaxgru.models.parameters import SequenceParams, TokenParams
from jaxgru.stacks.forms import Bidirectional

_FORMAT = "jaxgru weights 2"
_MOST_HEADER = 8 * 2**20  # bytes; a header of a layer takes about 100 an array
_KINDS = {kind.__name__: kind for kind in (GRUParams, Bidirectional, SequenceParams, TokenParams)}
# The fields of each kind that hold further layers; all others hold an array, or None.
_PARTS = {"GRUParams": (), "SequenceParams": ("layers",), "TokenParams": ("layers",)}
_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NAMES |= {
    f"{kind[0].upper()}{n}": f"{kind}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64)
}
_NAMES["BOOL"] = "bool"


class LoadedWeights(NamedTuple):
    """What `load_weights` read.

    Attributes:
      params: as they were saved, of NumPy arrays, each `GRUParams` with its spec.
      metadata: the caller's own.
    """

    params: Any
    metadata: dict[str, Any]


def save_weights(
    path: str | os.PathLike,
    params: Any,
    *,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Writes a layer, a stack or a model, and the spec of every GRU, into one safetensors file.

    The file appears whole or not at all, and one that exists is replaced. Arrays are named by where
    they stand: "w_x" of a `GRUParams`, "0.forward.w_x" of a stack, "layers.0.w_x" and "embedding"
    of a `TokenParams`.

    Args:
      path: of the file.
      params: a `GRUParams`, `Bidirectional`, stack, `SequenceParams` or `TokenParams`.
      metadata: a dict of JSON values to keep with it, its keys strings.

    Raises:
      ImportError: safetensors is not installed.
      OSError: the file cannot be written.
      TypeError: params are of another kind, an array is not floating or of another dtype than its
        cell, or metadata is no dict of what JSON can hold.
      ValueError: shapes do not fit, or metadata holds NaN.

    Cost: two copies of the arrays.
    """
    safetensors = require_extra("save_weights", "safetensors", "safetensors.numpy")
    if metadata is not None and not isinstance(metadata, dict):
        raise TypeError(f"save_weights: metadata must be a dict or None, got {metadata!r}.")
    structure, arrays = _take_apart("save_weights", params, "")
    description = {
        "format": _FORMAT,
        "structure": json.dumps(structure),
        "sizes": json.dumps({name: list(array.shape) for name, array in arrays.items()}),
        "metadata": json.dumps({} if metadata is None else metadata, allow_nan=False),
    }
    description["sha256"] = _digest(description, arrays)
    data = safetensors.numpy.save(arrays, metadata=description)
    write_atomically(path, data)


def load_weights(path: str | os.PathLike) -> LoadedWeights:
    """Reads what `save_weights` wrote; checks sizes and sha256, and runs no code of the file.

    Args:
      path: of the file.

    Returns:
      LoadedWeights: params in the structure they were saved in (a stack as a tuple), and the
      metadata.

    Raises:
      ImportError: safetensors is not installed.
      OSError: the file cannot be read.
      ValueError: it is no such file (a pickle, another program's safetensors file), is damaged, or
        its header is larger than 8 MiB.

    Cost: reads the file twice over in memory.
    """
    arrays, description = _read("load_weights", path)
    if description.get("format") != _FORMAT:
        raise ValueError(
            f"load_weights: {path} must be a file of {_FORMAT!r}, got format "
            f"{description.get('format')!r}; arrays of other libraries go through "
            "jaxgru.interop.from_torch and the like."
        )
    if description.get("sha256") != _digest(description, arrays):
        raise ValueError(
            f"load_weights: {path} must hold what was saved, got another sha256: it is damaged."
        )
    try:
        sizes = {name: list(array.shape) for name, array in arrays.items()}
        if json.loads(description["sizes"]) != sizes:
            raise ValueError("its sizes are not those of its arrays")
        params = _put_together(json.loads(description["structure"]), dict(arrays))
        again = _take_apart("load_weights", params, "")[1]
        if again.keys() != arrays.keys():
            raise ValueError("its structure does not use all of its arrays")
        return LoadedWeights(params, _metadata("load_weights", description["metadata"]))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"load_weights: {path} must describe parameters of this package, got {error!r}."
        ) from error


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of any program's safetensors file, for `from_torch` and the like.

    Args:
      path: of the file.

    Returns:
      Names to NumPy arrays; bfloat16 too, which NumPy alone does not know.

    Raises:
      ImportError: safetensors is not installed.
      OSError: the file cannot be read.
      ValueError: it is a pickle, which could run code; or no whole safetensors file; or its header
        is larger than 8 MiB; or it holds a dtype that NumPy has no form of.

    Cost: reads the file twice over in memory.
    """
    return _read("read_safetensors", path)[0]


def _read(function, path):
    """(arrays by name, metadata) of a safetensors file."""
    safetensors = require_extra(function, "safetensors")
    with open(path, "rb") as file:
        start, whole = file.read(8), os.fstat(file.fileno()).st_size
        size = int.from_bytes(start, "little")
        plausible = len(start) == 8 and size <= min(_MOST_HEADER, whole - 8)
        data = start + file.read() if plausible else b""
    if not plausible:
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise ValueError(
                f"{function}: {path} must be a safetensors file, got a pickle or a zip of one, "
                "which can run code; where it comes from, write one with "
                "safetensors.torch.save_file(module.state_dict(), 'weights.safetensors')."
            )
        raise ValueError(
            f"{function}: {path} must be a whole safetensors file with a header of at most "
            f"{_MOST_HEADER} bytes, got {whole} bytes of which the header claims {size}."
        )
    try:
        entries = safetensors.deserialize(data)
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
        arrays = {
            name: np.frombuffer(bytes(entry["data"]), jnp.dtype(_NAMES[entry["dtype"]]))
            .reshape(entry["shape"])
            .copy()
            for name, entry in entries
        }
    except KeyError as error:
        raise ValueError(
            f"{function}: {path} must hold arrays of {', '.join(_NAMES)}, got {error}."
        ) from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(
            f"{function}: {path} must be a whole safetensors file, got: {error}."
        ) from error
    return arrays, metadata


def _digest(description, arrays):
    """The sha256 of the description, and of names, dtypes, shapes and bytes of the arrays."""
    texts = {k: v for k, v in description.items() if k != "sha256"}
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _metadata(function, text):
    """The dict of a JSON text."""
    metadata = json.loads(text)
    if not isinstance(metadata, dict):
        raise TypeError(f"{function}: metadata must be a dict, got {metadata!r}.")
    return metadata


def _take_apart(function: str, params: Any, prefix: str) -> tuple[Any, dict[str, np.ndarray]]:
    """(structure in JSON, {name: array}) of a layer, a stack or a model."""
    kind, name = type(params).__name__, prefix.removesuffix(".") or "params"
    if isinstance(params, GRUParams):
        with jax.enable_x64(True):  # float64 is for the caller to enable, where it is computed
            require_params(function, params, name)
    if isinstance(params, GRUParams):
        fields = params.arrays()
    elif _KINDS.get(kind) is type(params):
        fields = params._asdict()
    elif is_stack(params) and params:
        kind, fields = "stack", {str(i): layer for i, layer in enumerate(params)}
    else:
        raise TypeError(
            f"{function}: {name} must be a GRUParams, Bidirectional, stack, SequenceParams or "
            f"TokenParams, got {kind}."
        )
    structure, arrays = {}, {}
    for field, value in fields.items():
        place = f"{prefix}{field}"
        if kind in _PARTS and field not in _PARTS[kind]:
            structure[field], inner = _take_array(function, value, place)
        else:
            structure[field], inner = _take_apart(function, value, f"{place}.")
        arrays |= inner
    described = {"kind": kind, "fields": structure}
    if isinstance(params, GRUParams):
        described["spec"] = dataclasses.asdict(params.spec)
    return described, arrays


def _take_array(function, value, name):
    """(name, {name: array}) of a field that holds an array, or (None, {})."""
    if value is None:
        return None, {}
    return name, {name: np.ascontiguousarray(as_float_array(function, name, value))}


def _put_together(structure, arrays):
    """The parameters of a structure."""
    if structure is None or isinstance(structure, str):
        return None if structure is None else arrays[structure]
    fields = {k: _put_together(v, arrays) for k, v in structure["fields"].items()}
    if structure["kind"] == "stack":
        return tuple(fields.values())
    if structure["kind"] == "GRUParams":
        spec = structure["spec"]  # no default stands for what it leaves out
        told = {field.name: spec[field.name] for field in dataclasses.fields(GRUSpec)}
        return GRUParams(**fields, spec=GRUSpec(**(told | spec)))
    return _KINDS[structure["kind"]](**fields)
