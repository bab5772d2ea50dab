"""Converts the weights of a GRU from one library's file to another's, and checks the result.

    python -m experiments.convert --from torch rnn.safetensors --to onnx rnn.onnx
    python -m experiments.convert --from keras model.weights.h5 --to torch rnn.safetensors
    python -m experiments.convert --from jaxgru RUN --to onnx lm.onnx --to keras gru.safetensors

torch, keras, linen, nnx, equinox, haiku          .safetensors or .npz with the library's own
                                                  names for the arrays
keras                                             also .weights.h5 from `model.save_weights`
                                                  (source only; needs h5py)
onnx                                              .onnx: the GRU nodes of a source, in the order
                                                  of its graph; as a target, a model that runs
jaxgru                                            .safetensors of `interop.save_weights`; as a
                                                  source also the run folder of an experiment
stablehlo                                         the forward program with its weights, written by
                                                  `jax.export` (target only)

The program of a stablehlo file runs on CPU, CUDA and TPU, for any T and B, and does not need
jaxgru. Call `jax.export.deserialize(bytes).call` with xs [T, B, I] and mask [T, B] bool; it returns
(h, outputs). With `--step` it takes x [B, I] and h, a tuple with [B, H] for each layer. A token
model takes tokens instead of inputs.

In files other than PyTorch's, the names of a stack's layers begin with "0/", "1/", ..., followed by
"forward/" and "backward/" if the layer is bidirectional. In the file of a larger model, give
`--layer` once for each GRU layer, bottom layer first, with the beginning of its names: `--layer
rnn.` for the whole GRU of PyTorch, `--layer params/cell/` for Flax, `--layer layers/gru/` for
Keras. For ONNX it is the name of a GRU node. The rest of the model is not converted.

Some files do not hold the activation, or whether the reset gate comes before or after the product;
`--activation` and `--reset` replace the defaults. Pickles (.pt, .pth, .pkl) can run code and are
refused: write `safetensors.torch.save_file(module.state_dict(), FILE)` instead.

The command prints what it read, and which weights it merged or negated. It then reads the new file
again and compares the outputs for a random input in float64. It compares them also with those of
the source in the library that wrote it (of ONNX files in onnxruntime, from the input of the first
GRU to the outputs of the last), and with those of the new file in its own library; a library that
could not be run is listed with the reason. A difference is relative to the largest output. The exit
code is 0 if all differences are rounding in the dtype of the weights, 1 if not, and 2 if the input
cannot be used. A file is written only if it agrees, and no file is overwritten.
"""

import argparse
import contextlib
import io
import itertools
import os
import pathlib
import re
import sys
import tempfile
import warnings
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

import jaxgru
from experiments import runtimes
from experiments.data import DataError
from experiments.runs import run_script
from jaxgru import Bidirectional, GRUParams, interop, models
from jaxgru.models import SequenceParams, TokenParams

CELLS = ("keras", "linen", "nnx", "equinox", "haiku")
FORMATS = ("torch", *CELLS, "onnx", "jaxgru")
TARGETS = (*FORMATS, "stablehlo")
KERAS = ("kernel", "recurrent_kernel", "bias")
STEPS, BATCH = 16, 4
_PLUMBING = {
    *("Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "GRU", "Gather", "Identity"),
    *("Less", "Range", "ReduceSum", "Reshape", "Shape", "Slice", "Squeeze", "Transpose"),
    *("Unsqueeze", "Where"),
}
# The end of a name that every layer of a format has once; the names are used to find the layers.
_KEYS = {"keras": "recurrent_kernel", "linen": "hn/kernel"}
_KEYS |= {"nnx": "dense_h/kernel", "haiku": "w_h", "equinox": "weight_hh"}


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_args(argv)
    return run_script("convert", lambda: convert(args))


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m experiments.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pair: dict[str, Any] = {"nargs": 2, "metavar": ("FORMAT", "FILE"), "required": True}
    for name, dest, kinds in (("--from", "source", FORMATS), ("--to", "targets", TARGETS)):
        action, often = ("append", "; may be repeated") if name == "--to" else ("store", "")
        listed = f"FORMAT is one of {', '.join(kinds)}{often}"
        parser.add_argument(name, dest=dest, action=action, help=listed, **pair)
    parser.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="PREFIX",
        help="beginning of the names of a layer; once for each layer",
    )
    parser.add_argument(
        "--reset",
        choices=("before", "after"),
        help="reset before or after the product, for a Keras layer without bias",
    )
    parser.add_argument(
        "--activation",
        choices=("tanh", "relu", "sigmoid", "softplus", "identity"),
        help="activation of keras, linen or nnx, whose files do not hold it (default: tanh)",
    )
    parser.add_argument(
        "--merge",
        choices=("concat", "sum"),
        default="concat",
        help="how the outputs of two directions are merged (default: concat)",
    )
    parser.add_argument("--cell", action="store_true", help="write a torch.nn.GRUCell")
    parser.add_argument("--step", action="store_true", help="write the program of one step")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random input")
    args = parser.parse_args(argv)
    args.activation_given = args.activation is not None
    args.activation = args.activation or "tanh"
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
    for option in ("cell", "step"):
        kind = {"cell": "torch", "step": "stablehlo"}[option]
        if getattr(args, option) and {name for name, _ in args.targets} != {kind}:
            parser.error(f"--{option} is only for the target {kind}")
    for (kind, _), kinds in ((args.source, FORMATS), *((v, TARGETS) for v in args.targets)):
        if kind not in kinds:
            parser.error(f"a format must be one of {', '.join(kinds)}, got {kind}")
    return args


def convert(args):
    """Converts one file to all targets; returns the largest exit code."""
    places = [pathlib.Path(file) for _, file in args.targets]
    for place in places:
        if place.exists() or places.count(place) > 1:
            raise DataError(f"{place} exists or is named twice; nothing was overwritten")
        if not place.parent.is_dir():
            raise DataError(f"{place.parent} is not a folder")
    (source, source_file), codes = args.source, []
    with noting() as texts:
        model, notes = read(source, source_file, args)
    print(f"read     {source:8} {source_file}: {describe(layers_of(model))}")
    for number, (target, place) in enumerate(zip([kind for kind, _ in args.targets], places)):
        codes.append(convert_to(args, target, place, model, [*notes, *texts] if not number else []))
    return max(codes)


@contextlib.contextmanager
def noting():
    """Collects the texts of warnings; raises a DataError for an error of the package."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield texts
        except ImportError as error:
            cure = "pip install -e '.[experiments,onnx,safetensors,export]'"
            raise DataError(f"{error} For every format: {cure}") from error
        except MemoryError as error:
            raise DataError("a file declares arrays that do not fit in memory") from error
        except (ValueError, TypeError) as error:
            raise DataError(str(error)) from error
    texts += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def convert_to(args, target, place, model, notes):
    """Writes one target and prints how it compares; returns the exit code.

    The new file is written to a temporary folder next to the target, read again and compared. It
    is moved to the target only if it agrees.
    """
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        new = pathlib.Path(folder) / place.name
        with noting() as texts:
            xs = draw_float64(model, args.seed)
            wanted = run_stack(layers_of(model), xs, args.merge)
            more = write(target, new, model, args)
            errors, reasons = compare(args, target, new, model, xs, wanted)
        for note in dict.fromkeys([*notes, *more, *texts]):
            print(f"note     {note}")
        agree = within_rounding(errors, model)
        if agree:
            os.link(new, place)  # raises if the file was created in the meantime
    print(f"{'wrote' if agree else 'not written, see below:':8} {target:8} {place}")
    print(f"largest difference / largest output, for a random input of T={STEPS}, B={BATCH}:")
    for name, error in errors.items():
        print(f"  {error:8.1e}  {name}")
    for name, reason in reasons.items():
        print(f"  not run   {name}: {reason}")
    return 0 if agree else 1


def within_rounding(errors, model):
    """True where every error is rounding in the model's dtype."""
    dtype = jnp.dtype(first_cell(layers_of(model)).w_x.dtype)
    return bool(np.max(list(errors.values())) <= 100 * float(jnp.finfo(dtype).eps))


def read(kind, file, args):
    """(params, notes) of a file."""
    if kind == "jaxgru":
        if args.layer:
            raise DataError("--layer is not for jaxgru, whose files hold their structure")
        path = pathlib.Path(file)
        path = path / "weights.safetensors" if path.is_dir() else path
        return interop.load_weights(path).params, ()
    if kind == "onnx":
        return read_nodes(file, args.layer)
    arrays = read_arrays(file, kind)
    if kind == "torch":
        if len(args.layer) > 1:
            raise DataError("--layer must be given once for torch, whose names number the layers")
        return interop.from_torch(arrays, prefix="".join(args.layer))
    options: dict[str, Any] = {}
    if kind in ("keras", "linen", "nnx"):
        options["activation"] = args.activation
    if kind == "keras" and args.reset:
        options["reset_after"] = args.reset == "after"
    reader = getattr(interop, f"from_{kind}")
    params, notes = reader(nest(arrays, kind, args.layer, file), **options)
    if options.get("activation") == "tanh" and not args.activation_given:
        notes = (*notes, f"{kind} files do not hold the activation; tanh is assumed")
    return params, notes


def read_nodes(file, names):
    """(stack, notes) of all GRU nodes of an ONNX file, or of those named."""
    nodes = interop.read_onnx(file)
    if names:
        found = [node.name for node in nodes]
        if missing := [name for name in names if found.count(name) != 1]:
            raise DataError(f"{file} must hold one GRU node of each of {missing}; it holds {found}")
        nodes = [nodes[found.index(name)] for name in names]
    listed = " ".join(f"--layer {node.name}" for node in nodes)
    for lower, node in itertools.pairwise(nodes):
        if node.below != lower.name and not names:
            raise DataError(
                f"{file}: GRU nodes must be a stack, but node {node.name!r} is not known to read "
                f"just the outputs of {lower.name!r}; choose the nodes of a stack from {listed}"
            )
    for node in nodes:
        if node.direction == "reverse":
            raise DataError(
                f"{file}: node {node.name!r} has only the reverse direction, which no target holds"
            )
        if node.sequence_lens is not None or (
            node.initial_h is not None and np.any(node.initial_h)
        ):
            raise DataError(
                f"{file}: node {node.name!r} has a constant sequence_lens or initial_h, which is "
                "not part of the weights; jaxgru.interop.read_onnx returns it"
            )
    return tuple(node.params for node in nodes), notes_on_rest(file, nodes)


def notes_on_rest(file, nodes):
    """Notes on what an ONNX file computes besides its GRUs."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    tables = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    others = {node.op_type for node in graph.node if node.op_type not in _PLUMBING}
    others |= {"Gather" for v in graph.node if v.op_type == "Gather" and v.input[0] in tables}
    notes = []
    if others:
        notes.append(f"the rest of the ONNX graph is not converted: {', '.join(sorted(others))}")
    if any("initial_h" in node.computed for node in nodes):
        notes.append("initial_h, an input of the ONNX graph or computed in it, is zero here")
    return notes


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
            raise DataError(f"{file} must be an intact .npz file of arrays: {error}") from error
    return interop.read_safetensors(path)


def read_hdf5(path):
    """{name: array} of the GRU cells in a Keras weights file, with Keras's names."""
    try:
        import h5py
    except ImportError as error:
        raise DataError(f"{path} needs h5py; pip install h5py") from error
    arrays = {}

    def visit(name, entry):
        found = re.fullmatch(r"(|.*?/)(?:(forward|backward)_layer/)?cell/vars/([012])", name)
        if found and isinstance(entry, h5py.Dataset):
            if entry.external or entry.is_virtual:
                raise DataError(f"{path}: {name} must be in the file itself, not in another")
            layer, direction, number = found.groups()
            direction = f"{direction}/" if direction else ""
            arrays[f"{layer}{direction}{KERAS[int(number)]}"] = entry[()]

    with open(path, "rb") as opened:  # a missing file raises the same error as for other formats
        try:
            with h5py.File(opened, "r") as file:
                file.visititems(visit)
        except (OSError, RuntimeError, KeyError) as error:
            raise DataError(f"{path} must be an intact HDF5 file of weights: {error}") from error
    if not arrays:
        raise DataError(f"{path} must hold a GRU layer that Keras saved, got none")
    return arrays


def nest(arrays, kind, prefixes, file):
    """A list of layers from flat names."""
    numbers = {int(m[1]) for name in arrays if (m := re.match(r"(\d+)/", name))}
    place = re.compile(rf"(|.*/)(?:(?:forward|backward)/)?{_KEYS[kind]}")
    places = {m[1] for name in arrays if (m := place.fullmatch(name))}
    if prefixes:
        starts = prefixes
    elif all(re.match(r"\d+/", name) for name in arrays):
        starts = [f"{number}/" for number in sorted(numbers)]
    elif len(places) > 1:
        named = " ".join(f"--layer {place}" for place in sorted(places, key=by_number))
        raise DataError(
            f"{file} holds several layers; choose them in the order of your model, the one that "
            f"reads the input first: {named}"
        )
    else:
        starts = list(places) or [""]
    return [layer_at(arrays, start, file) for start in starts]


def by_number(name):
    """A sort key that puts gru_10 after gru_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def layer_at(arrays, prefix, file):
    """The arrays of one layer; a Bidirectional if it has two directions."""
    own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    if not own:
        names = ", ".join(sorted(arrays)[:20])
        raise DataError(f"{file} has no name that begins with {prefix!r}; its names are {names}")
    if not any(k.startswith(("forward/", "backward/")) for k in own):
        return own
    directions: list[Any] = [
        {k.removeprefix(start): v for k, v in own.items() if k.startswith(start)}
        for start in ("forward/", "backward/")
    ]
    return Bidirectional(*directions)


def write(kind, file, model, args):
    """Writes the file; returns notes on what was merged, negated or left out."""
    if kind == "jaxgru":
        interop.save_weights(file, model)
        return []
    if kind == "onnx":
        return list(interop.write_onnx(file, model, merge=args.merge, lengths=True))
    if kind == "stablehlo":
        write_program(file, model, args)
        return []
    layers, notes = layers_of(model), []
    if isinstance(model, SequenceParams | TokenParams):
        notes = [f"{kind} files hold only the GRU layers: head and embedding are not written"]
    if kind == "torch":
        if args.cell and len(layers) > 1:
            raise DataError("--cell is only for a single layer")
        exported = interop.to_torch(layers[0] if args.cell else layers)
        write_arrays(file, exported.weights)
    else:
        exported = getattr(interop, f"to_{kind}")(layers)
        flat = {}
        for number, weights in enumerate(exported.weights):
            start = f"{number}/" if len(layers) > 1 else ""
            flat |= {f"{start}{name}": v for name, v in flatten(weights, kind).items()}
        write_arrays(file, flat)
    return notes + list(exported.notes)


def flatten(weights, kind):
    """{name: array} of one layer."""
    if isinstance(weights, list):  # in the order of Keras's get_weights
        count = 2 if len(weights) > 3 else 1
        each = len(weights) // count
        starts = ["forward/", "backward/"] if count == 2 else [""]
        names = [f"{start}{name}" for start in starts for name in KERAS[:each]]
        return dict(zip(names, weights))
    if isinstance(weights, Bidirectional):
        parts = weights._asdict().items()
        return {f"{d}/{name}": v for d, part in parts for name, v in flatten(part, kind).items()}
    flat = {}
    for name, value in weights.items():
        inner = flatten(value, kind) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}/{rest}".removesuffix("/"): v for rest, v in inner.items()}
    return flat


def write_arrays(file, arrays):
    """Writes a new .npz or .safetensors file."""
    suffix, data = pathlib.Path(file).suffix, io.BytesIO()
    if suffix == ".npz":
        if any(v.dtype.kind == "V" or v.dtype.name == "bfloat16" for v in arrays.values()):
            raise DataError(f"{file} cannot hold bfloat16; write a .safetensors file")
        np.savez(data, **arrays)
    elif suffix == ".safetensors":
        import safetensors.numpy

        plain = {name: np.ascontiguousarray(v) for name, v in arrays.items()}
        data.write(safetensors.numpy.save(plain))
    else:
        raise DataError(f"{file} must end in .safetensors or .npz to hold named arrays")
    with open(file, "xb") as opened:
        opened.write(data.getvalue())


def args_of_target(args, model):
    """The options with which the new file is read again."""
    specs = equations_of(layers_of(model))
    resets = {spec.reset for spec in specs}
    reset = resets.pop() if len(resets) == 1 else None  # None: from the shapes of the biases
    options = {"reset": reset, "activation": specs[0].activation, "activation_given": True}
    return argparse.Namespace(layer=[], merge=args.merge, **options)


def layers_of(model: Any) -> Any:
    """The layers of a model, a stack or a single layer."""
    if isinstance(model, SequenceParams | TokenParams):
        return model.layers
    return (model,) if isinstance(model, GRUParams | Bidirectional) else model


def first_cell(layers: Any) -> Any:
    """The parameters of the bottom layer, or of its forward direction."""
    return layers[0].forward if isinstance(layers[0], Bidirectional) else layers[0]


def equations_of(layers):
    """The different specs of all layers, bottom layer first."""
    cells = jax.tree.leaves(layers, is_leaf=lambda leaf: isinstance(leaf, GRUParams))
    return list(dict.fromkeys(cell.spec for cell in cells))


def describe(layers):
    """One line that describes layers and equations."""
    first = first_cell(layers)
    both = ", bidirectional" if isinstance(layers[0], Bidirectional) else ""
    sizes = f"I={first.w_x.shape[0]} H={first.w_h.shape[0]} {first.w_x.dtype}"
    equations = " / ".join(
        f"reset {spec.reset}, update {spec.update}, {spec.activation}"
        for spec in equations_of(layers)
    )
    return f"{len(layers)} layer{'s' * (len(layers) > 1)}{both}, {sizes}; {equations}"


def compare(args, target, new, model, xs, wanted):
    """({name: largest difference of the outputs for a random input}, {name: why it was not run})"""
    found, reasons, own = {}, {}, args_of_target(args, model)
    dtype = first_cell(layers_of(model)).w_x.dtype
    if target != "stablehlo":
        again = layers_of(read(target, new, own)[0])
        found["read again, float64"] = run_stack(again, xs, args.merge)
    for start, kind, file, options in (
        ("the source ", *args.source, args), ("", target, new, own)
    ):  # fmt: skip
        if kind in runtimes.NAMES:
            width = "float32" if kind == "onnx" else "float64"
            name = f"{start}in {runtimes.NAMES[kind]}, {width}"
            try:
                if kind == "onnx" and dtype != np.float32:
                    raise runtimes.NotRunError(f"its GRU has no {dtype}")
                found[name] = run_library(kind, file, options, xs)
            except ImportError as error:
                reasons[name] = f"{error.name} is not installed"
            except runtimes.NotRunError as error:
                reasons[name] = str(error)
    errors = {k: largest_difference(v, wanted) for k, v in found.items()}
    rng = np.random.default_rng(args.seed)
    if target == "onnx" and "in onnxruntime, float32" in errors:
        name = "in onnxruntime, float32, whole and with random lengths"
        errors[name] = difference_of_onnxruntime(args, new, model, rng)
    if target == "stablehlo":
        error = difference_of_program(args, new, model, rng)
        errors[f"in the program on {jax.default_backend()}, {dtype}"] = error
    return errors, reasons


def run_library(kind, file, args, xs):
    """The outputs of the GRUs of a file, computed by the library that the file is for."""
    if kind == "onnx":
        names = args.layer or [node.name for node in interop.read_onnx(file)]
        return runtimes.run_onnx(file, names, xs, args.merge)
    arrays = read_arrays(file, kind)
    if kind == "torch":
        start = "".join(args.layer)
        arrays = {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}
        return runtimes.run_torch(arrays, xs, args.merge)
    layers, after = nest(arrays, kind, args.layer, file), args.reset != "before"
    return runtimes.run_layers(kind, layers, xs, args.merge, args.activation, after)


def draw_float64(model, seed):
    """A random input sequence in float64."""
    size = first_cell(layers_of(model)).w_x.shape[0]
    return np.random.default_rng(seed).normal(size=(STEPS, BATCH, size))


def largest_difference(got, wanted):
    """The largest error relative to the largest wanted entry; 0 for equal arrays, also with NaN."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    if got.shape != wanted.shape:
        return np.inf
    if np.array_equal(got, wanted, equal_nan=True):
        return 0.0
    valid = ~(np.isnan(got) & np.isnan(wanted))
    got, wanted = got[valid], wanted[valid]
    return float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), np.finfo(np.float32).tiny))


def run_stack(layers, xs, merge):
    """The outputs of every step, computed in float64."""
    with jax.enable_x64(True):
        layers = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), layers)
        return np.asarray(jaxgru.gru_stack(layers, xs, merge=merge)[1])


def run_model(model, xs, h0, merge, mask=None):
    """(h_last, outputs) of a model or a stack, in its own dtype."""
    options: dict[str, Any] = {"mask": mask, "merge": merge}
    if isinstance(model, TokenParams):
        return models.token_logits(model, xs, h0, **options)
    if isinstance(model, SequenceParams):
        return models.sequence_outputs(model, xs, h0, **options)
    return jaxgru.gru_stack(layers_of(model), xs, h0, **options)


def draw_inputs(model, rng):
    """Random tokens or inputs for a model, and random lengths for a mask."""
    lengths = rng.integers(0, STEPS + 1, BATCH).astype(np.int32)
    if isinstance(model, TokenParams):
        return rng.integers(0, model.w.shape[1], (STEPS, BATCH)), lengths
    w_x = first_cell(layers_of(model)).w_x
    return rng.normal(size=(STEPS, BATCH, w_x.shape[0])).astype(w_x.dtype), lengths


def difference_of_onnxruntime(args, new, model, rng):
    """The error of onnxruntime's outputs of the whole model for random lengths."""
    import onnxruntime

    xs, lengths = draw_inputs(model, rng)
    mask = jaxgru.length_mask(lengths, STEPS)
    wanted = run_model(model, jnp.asarray(xs), None, args.merge, mask)[1]
    session = onnxruntime.InferenceSession(new)
    name = "tokens" if isinstance(model, TokenParams) else "xs"
    return largest_difference(session.run(["outputs"], {name: xs, "lengths": lengths})[0], wanted)


def is_float64(model):
    """True if the model is float64, for which JAX needs jax.enable_x64."""
    return first_cell(layers_of(model)).w_x.dtype == np.float64


def write_program(file, model, args):
    """Writes the serialized forward program of a sequence or a step, with symbolic T and B."""
    if args.step and any(isinstance(layer, Bidirectional) for layer in layers_of(model)):
        raise DataError("--step is not for two directions: one of them begins at the last step")

    def sequence(xs, mask):
        return run_model(model, xs, None, args.merge, mask)

    def step(x, h):
        h, outputs = run_model(model, x[None], h, args.merge)
        return h, outputs[0]

    with jax.enable_x64(is_float64(model)):
        steps, batch = export.symbolic_shape("t, b")
        xs, _ = draw_inputs(model, np.random.default_rng(0))
        x = jax.ShapeDtypeStruct((batch, *xs.shape[2:]), jnp.asarray(xs).dtype)
        given = (x.update(shape=(steps, *x.shape)), jax.ShapeDtypeStruct((steps, batch), bool))
        if args.step:
            cells = [jnp.asarray(layer.w_h) for layer in layers_of(model)]
            h = tuple(jax.ShapeDtypeStruct((batch, w.shape[0]), w.dtype) for w in cells)
            given = (x, h)
        program = jax.jit(step if args.step else sequence)
        exported = export.export(program, platforms=("cpu", "cuda", "tpu"))(*given)
    with open(file, "xb") as opened:
        opened.write(exported.serialize())


def difference_of_program(args, new, model, rng):
    """The error of the written program, for random lengths or called step by step."""
    program = export.deserialize(bytearray(new.read_bytes()))
    xs, lengths = draw_inputs(model, rng)
    with jax.enable_x64(is_float64(model)):
        mask = None if args.step else jaxgru.length_mask(lengths, STEPS)
        wanted = run_model(model, jnp.asarray(xs), None, args.merge, mask)[1]
        if not args.step:
            return largest_difference(program.call(jnp.asarray(xs), mask)[1], wanted)
        h, outputs = jaxgru.init_state(layers_of(model), (BATCH,)), []
        for x in xs:
            h, output = program.call(jnp.asarray(x), h)
            outputs.append(output)
        return largest_difference(jnp.stack(outputs), wanted)


if __name__ == "__main__":
    sys.exit(main())
