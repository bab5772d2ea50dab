"""Weights with their equation in a safetensors file: arrays and JSON, no code; extra `safetensors`.

The file's metadata say what the arrays are for: the structure, the spec, every size, and a sha256
over all names, dtypes, shapes and bytes. Other programs read the arrays by name; `load_weights`
checks every one of these before it returns anything.
"""

import hashlib
import json
import os
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgru.conversion import as_float_array
from jaxgru.layers import Bidirectional
from jaxgru.models import SequenceParams, TokenParams
from jaxgru.parameters import CHO_2014, GRUParams, GRUSpec, require_spec
from jaxgru.whole_files import write_whole

_FORMAT = "jaxgru weights 1"
_MOST_HEADER = 8 * 2**20  # bytes; a header of a layer takes about 100 an array
_KINDS = {kind.__name__: kind for kind in (GRUParams, Bidirectional, SequenceParams, TokenParams)}
_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NAMES |= {
    f"{kind[0].upper()}{n}": f"{kind}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64)
}
_NAMES["BOOL"] = "bool"


class LoadedWeights(NamedTuple):
    """What `load_weights` read.

    Attributes:
      params: as they were saved, of NumPy arrays.
      spec: their equation.
      metadata: the caller's own.
    """

    params: Any
    spec: GRUSpec
    metadata: dict[str, Any]


def save_weights(
    path: str | os.PathLike,
    params: Any,
    *,
    spec: GRUSpec = CHO_2014,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Writes a layer, a stack or a model, and its spec, into one safetensors file.

    The file appears whole or not at all, and one that exists is replaced. Arrays are named by where
    they stand: "w_x" of a `GRUParams`, "0.forward.w_x" of a stack, "layers.0.w_x" and "embedding"
    of a `TokenParams`.

    Args:
      path: of the file.
      params: a `GRUParams`, `Bidirectional`, stack, `SequenceParams` or `TokenParams`.
      spec: of params.
      metadata: a dict of JSON values to keep with it.

    Raises:
      ImportError: safetensors is not installed.
      OSError: the file cannot be written.
      TypeError: params are of another kind, an array is not floating, or metadata holds what JSON
        cannot.

    Cost: two copies of the arrays.
    """
    safetensors = _library("save_weights")
    require_spec("save_weights", spec)
    structure, arrays = _take_apart(params, "")
    description = {
        "format": _FORMAT,
        "spec": json.dumps({k: getattr(spec, k) for k in GRUSpec.__dataclass_fields__}),
        "structure": json.dumps(structure),
        "sizes": json.dumps({name: list(array.shape) for name, array in arrays.items()}),
        "metadata": json.dumps({} if metadata is None else metadata),
    }
    description["sha256"] = _digest(description, arrays)
    data = safetensors.numpy.save(arrays, metadata=description)
    write_whole(path, lambda file: file.write(data))


def load_weights(path: str | os.PathLike) -> LoadedWeights:
    """Reads what `save_weights` wrote; checks sizes and sha256, and runs no code of the file.

    Args:
      path: of the file.

    Returns:
      LoadedWeights: params in the structure they were saved in, their spec, and the metadata.

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
            "jaxgru.from_torch and the like."
        )
    if description.get("sha256") != _digest(description, arrays):
        raise ValueError(
            f"load_weights: {path} must hold what was saved, got another sha256: it is damaged."
        )
    spec = GRUSpec(**json.loads(description["spec"]))
    params = _put_together(json.loads(description["structure"]), arrays)
    return LoadedWeights(params, spec, json.loads(description["metadata"]))


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
    safetensors = _library(function)
    with open(path, "rb") as file:
        data = file.read()
    size = int.from_bytes(data[:8], "little") if len(data) >= 8 else -1
    if not 0 <= size <= min(_MOST_HEADER, len(data) - 8):
        if data[:2] == b"PK" or data[:1] == b"\x80":
            raise ValueError(
                f"{function}: {path} must be a safetensors file, got a pickle or a zip of one, "
                "which can run code; where it comes from, write one with "
                "safetensors.torch.save_file(module.state_dict(), 'weights.safetensors')."
            )
        raise ValueError(
            f"{function}: {path} must be a whole safetensors file with a header of at most "
            f"{_MOST_HEADER} bytes, got {len(data)} bytes of which the header claims {size}."
        )
    try:
        entries = safetensors.deserialize(data)
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
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


def _library(function):
    """safetensors, or how to get it."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(f"{function}: needs safetensors; install jaxgru[safetensors].") from error
    return safetensors


def _digest(description, arrays):
    """The sha256 of the description, and of names, dtypes, shapes and bytes of the arrays."""
    texts = {k: v for k, v in description.items() if k != "sha256"}
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _take_apart(params: Any, prefix: str) -> tuple[Any, dict[str, np.ndarray]]:
    """(structure in JSON, {name: array}) of parameters."""
    if params is None:
        return None, {}
    kind = type(params).__name__
    if _KINDS.get(kind) is type(params):
        fields = params._asdict()
    elif isinstance(params, tuple | list) and not hasattr(params, "_fields"):
        kind, fields = "stack", {str(i): layer for i, layer in enumerate(params)}
    elif hasattr(params, "shape"):
        name = prefix.removesuffix(".")
        array = as_float_array("save_weights", name, params)
        return name, {name: np.ascontiguousarray(array)}
    else:
        raise TypeError(
            "save_weights: params must be a GRUParams, Bidirectional, stack, SequenceParams or "
            f"TokenParams, got {kind}{f' at {prefix!r}' if prefix else ''}."
        )
    parts = {name: _take_apart(value, f"{prefix}{name}.") for name, value in fields.items()}
    arrays = {name: array for _, inner in parts.values() for name, array in inner.items()}
    return {"kind": kind, "fields": {k: part[0] for k, part in parts.items()}}, arrays


def _put_together(structure, arrays):
    """The parameters of a structure."""
    if structure is None or isinstance(structure, str):
        return None if structure is None else arrays[structure]
    fields = {k: _put_together(v, arrays) for k, v in structure["fields"].items()}
    return (
        tuple(fields.values())
        if structure["kind"] == "stack"
        else _KINDS[structure["kind"]](**fields)
    )
