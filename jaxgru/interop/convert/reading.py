"""Reads the GRUs of a file of weights; no code of the file is run."""

import importlib
import itertools
import pathlib
import re
import zipfile
from typing import Any, NamedTuple

import numpy as np

import jaxgru.interop as interop
from jaxgru.extras import require_extra
from jaxgru.interop import keras
from jaxgru.stacks.forms import Bidirectional

_PLUMBING = {
    *("Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "GRU", "Gather", "Identity"),
    *("Less", "Range", "ReduceSum", "Reshape", "Shape", "Slice", "Squeeze", "Transpose"),
    *("Unsqueeze", "Where"),
}
# The end of a name that every layer of a format has once; the names are used to find the layers.
_KEYS = {"keras": "recurrent_kernel", "linen": "hr/kernel"}
_KEYS |= {"nnx": "dense_h/kernel", "haiku": "w_h", "equinox": "weight_hh"}


class Options(NamedTuple):
    """What the command line says about a file that does not say it itself."""

    layer: tuple[str, ...] = ()  # the beginning of each layer's names
    reset: str | None = None  # None: from the shape of the bias
    activation: str | None = None  # None: tanh


def read(kind: str, file: Any, options: Options) -> interop.LoadedWeights | interop.Imported:
    """The params of a file, with notes; of a file of jaxgru with its metadata."""
    if kind == "jaxgru":
        if options.layer:
            raise ValueError("--layer is not for jaxgru, whose files hold their structure")
        path = pathlib.Path(file)
        return interop.load_weights(path / "weights.safetensors" if path.is_dir() else path)
    if kind == "onnx":
        return read_nodes(file, options.layer)
    arrays = read_arrays(file, kind)
    if kind == "torch":
        if len(options.layer) > 1:
            raise ValueError("--layer must be given once for torch, whose names number the layers")
        return interop.from_torch(arrays, prefix="".join(options.layer))
    choices: dict[str, Any] = {}
    if kind in ("keras", "linen", "nnx"):
        choices["activation"] = options.activation or "tanh"
    if kind == "keras" and options.reset:
        choices["reset_after"] = options.reset == "after"
    reader = getattr(interop, f"from_{kind}")
    params, notes = reader(nest(arrays, kind, options.layer, file), **choices)
    if choices and not options.activation:
        notes = (*notes, f"{kind} files do not hold the activation; tanh is assumed")
    return interop.Imported(params, notes)


def read_nodes(file, names):
    """The stack of all GRU nodes of an ONNX file, or of those named."""
    nodes = interop.read_onnx(file)
    found = [node.name for node in nodes]
    if missing := [name for name in names if found.count(name) != 1]:
        raise ValueError(f"{file} must hold one GRU node of each of {missing}; it holds {found}")
    nodes = [nodes[found.index(name)] for name in names] or nodes
    listed = " ".join(f"--layer {node.name}" for node in nodes)
    for lower, node in itertools.pairwise(nodes):
        if node.below != lower.name and not names:
            raise ValueError(
                f"{file}: GRU nodes must be a stack, but node {node.name!r} is not known to read "
                f"just the outputs of {lower.name!r}; choose the nodes of a stack from {listed}"
            )
    for node in nodes:
        if node.direction == "reverse":
            raise ValueError(
                f"{file}: node {node.name!r} has only the reverse direction, which no target holds"
            )
        if node.sequence_lens is not None or np.any(node.initial_h):
            raise ValueError(
                f"{file}: node {node.name!r} has a constant sequence_lens or initial_h, which is "
                "not part of the weights; jaxgru.interop.read_onnx returns it"
            )
    return interop.Imported(tuple(node.params for node in nodes), notes_on_rest(file, nodes))


def notes_on_rest(file, nodes):
    """Notes on what an ONNX file computes besides its GRUs."""
    onnx = require_extra("read_onnx", "onnx")
    graph = onnx.load(file, load_external_data=False).graph
    tables = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    others = {node.op_type for node in graph.node if node.op_type not in _PLUMBING}
    others |= {"Gather" for v in graph.node if v.op_type == "Gather" and v.input[0] in tables}
    notes = []
    if others:
        notes.append(f"the rest of the ONNX graph is not converted: {', '.join(sorted(others))}")
    if any("initial_h" in node.computed for node in nodes):
        notes.append("initial_h, an input of the ONNX graph or computed in it, is zero here")
    return tuple(notes)


def read_arrays(file, kind):
    """{name: array} of a file, read without running code from it."""
    path = pathlib.Path(file)
    if kind == "keras" and path.suffix in (".h5", ".hdf5"):
        return read_hdf5(path)
    if path.suffix == ".npz":
        try:
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as opened:
                return {name: opened[name] for name in opened.files}
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{file} must be an intact .npz file of arrays: {error}") from error
    return interop.read_safetensors(path)


def read_hdf5(path):
    """{name: array} of the GRU cells in a Keras weights file, with Keras's names."""
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise ImportError(f"{path} needs h5py; pip install h5py") from error
    arrays = {}

    def visit(name, entry):
        found = re.fullmatch(r"(|.*?/)(?:(forward|backward)_layer/)?cell/vars/([012])", name)
        if found and isinstance(entry, h5py.Dataset):
            if entry.external or entry.is_virtual:
                raise ValueError(f"{path}: {name} must be in the file itself, not in another")
            layer, direction, number = found.groups()
            direction = f"{direction}/" if direction else ""
            arrays[f"{layer}{direction}{keras.NAMES[int(number)]}"] = entry[()]

    with open(path, "rb") as opened:  # a missing file raises the same error as for other formats
        try:
            with h5py.File(opened, "r") as file:
                file.visititems(visit)
        except (OSError, RuntimeError, KeyError) as error:
            raise ValueError(f"{path} must be an intact HDF5 file of weights: {error}") from error
    if not arrays:
        raise ValueError(f"{path} must hold a GRU layer that Keras saved, got none")
    return arrays


def nest(arrays, kind, prefixes, file):
    """A list of layers from flat names: dicts, or a Bidirectional of two."""
    numbers = [re.match(r"\d+/", name) for name in arrays]
    place = re.compile(rf"(|.*/)(?:(?:forward|backward)/)?{_KEYS[kind]}")
    places = sorted({m[1] for name in arrays if (m := place.fullmatch(name))}, key=by_number)
    if not prefixes and all(numbers):
        prefixes = sorted({m[0] for m in numbers if m}, key=by_number)
    if not prefixes and len(places) > 1:
        named = " ".join(f"--layer {place}" for place in places)
        raise ValueError(
            f"{file} holds several layers; choose them in the order of your model, the one that "
            f"reads the input first: {named}"
        )
    layers = []
    for start in prefixes or places or [""]:
        own = strip(arrays, start)
        if not own:
            names = ", ".join(sorted(arrays)[:20])
            raise ValueError(
                f"{file} has no name that begins with {start!r}; its names are {names}"
            )
        sides = Bidirectional(strip(own, "forward/"), strip(own, "backward/"))
        layers.append(sides if any(sides) else own)
    return layers


def strip(arrays, start):
    """The arrays whose names begin so, without that."""
    return {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}


def by_number(name):
    """A sort key that puts gru_10 after gru_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
