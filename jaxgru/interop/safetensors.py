"""Parameters in safetensors files: arrays and JSON, no code; needs the extra `safetensors`.

The metadata of a file describe its arrays: the structure, the spec of every GRU, and a sha256 over
all names, dtypes, shapes and bytes. Other programs can read the arrays by name.
"""

import dataclasses
import hashlib
import json
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgru.atomic_files import require_json, write_atomically
from jaxgru.core.parameters import GRUParams, GRUSpec, require_params
from jaxgru.extras import require_extra
from jaxgru.interop.common import as_float_array, is_stack
from jaxgru.models.parameters import SequenceParams, TokenParams, require_model
from jaxgru.stacks.checks import require_grus, require_sizes
from jaxgru.stacks.forms import Bidirectional, as_stack, directions_of, output_size_of

_FORMAT = "jaxgru weights 2"
_MOST_HEADER = 8 * 2**20  # bytes; an array takes about 100 bytes of the header
_KINDS = {kind.__name__: kind for kind in (GRUParams, Bidirectional, SequenceParams, TokenParams)}
_PARTS = ("layers", "forward", "backward")  # the fields that hold other kinds, not an array
_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NAMES |= {f"{k[0].upper()}{n}": f"{k}{n}" for k in ("int", "uint") for n in (8, 16, 32, 64)}
_NAMES["BOOL"] = "bool"


class LoadedWeights(NamedTuple):
    """The contents of a file that `save_weights` wrote.

    Attributes:
      params: the saved structure, of NumPy arrays, each `GRUParams` with its spec.
      metadata: the dict that was given to `save_weights`.
    """

    params: Any
    metadata: dict[str, Any]


def save_weights(
    path: str | os.PathLike, params: Any, *, metadata: dict[str, Any] | None = None
) -> None:
    """Writes a layer, a stack or a model, with the spec of every GRU, into one safetensors file.

    The write is atomic, and an existing file is replaced. Arrays are named by their place: "w_x" in
    a `GRUParams`, "0.forward.w_x" in a stack, "layers.0.w_x" and "embedding" in a `TokenParams`.

    Args:
      path: the path of the file.
      params: a `GRUParams`, `Bidirectional`, stack, `SequenceParams` or `TokenParams`.
      metadata: a dict of JSON values with strings as keys, which is saved too.

    Raises:
      ImportError, OSError: safetensors is not installed, or the file cannot be written.
      TypeError: params are of another kind, an array is not floating, dtypes differ, or metadata is
        not a dict that JSON can hold.
      ValueError: shapes do not fit, or metadata changes when it is saved as JSON and loaded: it
        holds NaN, infinity, a tuple, or a key that is not a string.
    """
    safetensors = require_extra("save_weights", "safetensors", "safetensors.numpy")
    if metadata is not None and not isinstance(metadata, dict):
        raise TypeError(f"save_weights: metadata must be a dict or None, got {metadata!r}.")
    require_json("save_weights", "metadata", metadata)
    structure, arrays = _flatten("save_weights", params, "")
    _require_fit("save_weights", params)
    description = {
        "format": _FORMAT,
        "structure": json.dumps(structure),
        "metadata": json.dumps({} if metadata is None else metadata),
    }
    description["sha256"] = _digest(description, arrays)
    data = safetensors.numpy.save(arrays, metadata=description)
    write_atomically(path, data)


def load_weights(path: str | os.PathLike) -> LoadedWeights:
    """Reads a file of `save_weights`, checks all of its metadata, and runs no code of the file.

    Args:
      path: the path of the file.

    Returns: the params in the structure in which they were saved (a stack as a tuple), and the
      metadata.

    Raises:
      ImportError, OSError: safetensors is not installed, or the file cannot be read.
      ValueError: the file is of another kind (a pickle, another program's safetensors file) or of
        an older version of this package, is damaged, or has a header larger than 8 MiB.
    """
    arrays, description = _read("load_weights", path)
    found = description.get("format")
    if found != _FORMAT:
        cure = (
            "convert arrays of other libraries with read_safetensors and jaxgru.interop.from_torch "
            "(or another from_*)."
        )
        if found == "jaxgru weights 1":
            cure = (
                "an older version of jaxgru wrote it, and its GRUParams have no spec: read the "
                "arrays with read_safetensors, make each GRUParams with the spec that it was "
                "trained with, and save them with save_weights."
            )
        raise ValueError(
            f"load_weights: {path} must be a file of {_FORMAT!r}, got format {found!r}; {cure}"
        )
    if description.get("sha256") != _digest(description, arrays):
        raise ValueError(
            f"load_weights: {path} must have the sha256 that it was saved with, got another: the "
            "file is damaged."
        )
    try:
        params = _unflatten(json.loads(description["structure"]), arrays)
        if _flatten("load_weights", params, "")[1].keys() != arrays.keys():
            raise ValueError("its structure does not use all of its arrays")
        _require_fit("load_weights", params)
        metadata = json.loads(description["metadata"])
        if not isinstance(metadata, dict):
            raise TypeError(f"load_weights: metadata must be a dict, got {metadata!r}.")
        return LoadedWeights(params, metadata)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"load_weights: {path} must describe parameters of this package, got {error!r}."
        ) from error


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the arrays of any program's safetensors file, for `from_torch` and other `from_*`.

    Args:
      path: the path of the file.

    Returns: names to NumPy arrays, of bfloat16 too.

    Raises:
      ImportError, OSError: safetensors is not installed, or the file cannot be read.
      ValueError: the file is a pickle, which could run code, or not an intact safetensors file, or
        has a header larger than 8 MiB or a dtype that NumPy cannot hold.
    """
    return _read("read_safetensors", path)[0]


def _read(function, path):
    """(arrays by name, metadata) of a safetensors file."""
    safetensors = require_extra(function, "safetensors")
    with open(path, "rb") as file:
        start, total = file.read(8), os.fstat(file.fileno()).st_size
        size = int.from_bytes(start, "little")
        plausible = len(start) == 8 and size <= min(_MOST_HEADER, total - 8)
        data = start + file.read() if plausible else b""
    if not plausible:
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise ValueError(
                f"{function}: {path} must be a safetensors file, got a pickle or a zip of one, "
                "which can run code; save the weights again with "
                "safetensors.torch.save_file(module.state_dict(), 'weights.safetensors')."
            )
        raise ValueError(
            f"{function}: {path} must be an intact safetensors file with a header of at most "
            f"{_MOST_HEADER} bytes, got a file of {total} bytes with a header of {size}."
        )
    try:
        entries = safetensors.deserialize(data)
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
        arrays = {
            name: np.frombuffer(entry["data"], jnp.dtype(_NAMES[entry["dtype"]]))
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
            f"{function}: {path} must be an intact safetensors file, got: {error}."
        ) from error
    return arrays, metadata


def _digest(description, arrays):
    """The sha256 of the description, and of names, dtypes, shapes and bytes of the arrays."""
    texts = {k: v for k, v in description.items() if k != "sha256"}
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _flatten(function, params, prefix):
    """(structure in JSON, {name: array}) of a layer, a stack or a model."""
    kind, name = type(params).__name__, prefix.removesuffix(".") or "params"
    spec: dict[str, Any] = {}
    if isinstance(params, GRUParams):
        with jax.enable_x64(True):  # float64 is accepted: nothing is computed
            require_params(function, params, name)
        fields, spec = params.arrays(), {"spec": dataclasses.asdict(params.spec)}
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
        if kind == "stack" or field in _PARTS:
            structure[field], inner = _flatten(function, value, f"{place}.")
            arrays |= inner
        elif value is None and (kind == "GRUParams" or field == "embedding"):
            structure[field] = None
        else:
            structure[field] = place
            arrays[place] = np.ascontiguousarray(as_float_array(function, place, value))
    return {"kind": kind, "fields": structure} | spec, arrays


def _require_fit(function, params):
    """TypeError or ValueError unless the parts fit together with one of the merges."""
    model: Any = params if isinstance(params, SequenceParams | TokenParams) else None
    layers: Any = as_stack(params) if model is None else model.layers
    root = "params" if model is None else "params.layers"
    with jax.enable_x64(True):
        require_grus(function, layers, stack=True, root=root)
        rows = [directions_of(layer)[0].w_x.shape[:1] for layer in layers[1:]]
        rows += [] if model is None else [np.shape(model.w)[:1]]
        summed = any(
            isinstance(layer, Bidirectional) and found == (output_size_of(layer, "sum"),)
            for layer, found in zip(layers, rows)
        )
        merge = "sum" if summed else "concat"
        require_sizes(function, layers, merge, False, root)
        if model is not None:
            require_model(function, model, type(model), merge)


def _unflatten(structure, arrays):
    """The parameters of a structure."""
    if structure is None or isinstance(structure, str):
        return None if structure is None else arrays[structure]
    fields = {k: _unflatten(v, arrays) for k, v in structure["fields"].items()}
    if structure["kind"] == "stack":
        return tuple(fields.values())
    if structure["kind"] == "GRUParams":
        spec = structure["spec"]
        required = {field.name: spec[field.name] for field in dataclasses.fields(GRUSpec)}
        fields["spec"] = GRUSpec(**(required | spec))
    return _KINDS[structure["kind"]](**fields)
