"""Weights of one library as another's, from file to file, checked on a random input.

    python -m experiments.convert --from torch rnn.safetensors --to onnx rnn.onnx
    python -m experiments.convert --from keras model.weights.h5 --to torch rnn.safetensors

torch, keras, linen, nnx, equinox, haiku          .safetensors or .npz of arrays under that
                                                  library's names
keras                                             also .weights.h5, as `model.save_weights` writes
                                                  it (read only; needs h5py)
onnx                                              .onnx; read, its GRU nodes in the graph's order;
                                                  written, a model that runs
jaxgru                                            .safetensors of `interop.save_weights`
stablehlo (written only)                          the forward program with its weights, for CPU,
                                                  CUDA and TPU and any T and B, by `jax.export`

The program of a stablehlo file is `jax.export.deserialize(bytes).call`: of (xs [T, B, I], mask
[T, B] bool), or with `--step` of (x [B, I], h, a tuple of [B, H]); tokens in place of inputs for a
token model. It returns (h, outputs), and needs no jaxgru.

A stack has the layers "0/", "1/", ... before the names, a layer of two directions "forward/" and
"backward/" after that; PyTorch has its own. In a larger model `--layer`, once for each layer,
bottom first, gives what the names of a layer begin with: `--layer rnn.` for PyTorch's whole GRU,
`--layer params/cell/` for Flax, `--layer layers/gru/` for Keras; for ONNX the name of a GRU node.
What a file does not tell is assumed, and can be told: `--activation` and `--reset`. Of a larger
ONNX model or Keras file the GRUs alone are read. Pickles (.pt, .pth, .pkl) can run
code and are refused: write `safetensors.torch.save_file(module.state_dict(), FILE)` instead.

Prints what was read, what is merged or negated, and the largest difference on a random input, of
the largest output: between what was read and the new file, read again, in float64; and to
onnxruntime and torch.nn.GRU themselves where they are installed. The exit code is 0 where that is
rounding of the weights' dtype; else 1, or 2 for unusable input, and nothing is written. No file is
overwritten.
"""

import argparse
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
# What every layer of a format has: the end of its name tells where the layers are.
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
    for name, dest, kinds in (("--from", "source", FORMATS), ("--to", "target", TARGETS)):
        parser.add_argument(
            name,
            dest=dest,
            nargs=2,
            metavar=("FORMAT", "FILE"),
            required=True,
            help=f"one of {', '.join(kinds)}; and the file",
        )
    parser.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="PREFIX",
        help="what a layer's names begin with",
    )
    parser.add_argument(
        "--reset", choices=("before", "after"), help="of a Keras layer without bias"
    )
    parser.add_argument(
        "--activation",
        choices=("tanh", "relu", "sigmoid", "softplus", "identity"),
        help="of keras, linen or nnx, whose files do not tell it; tanh unless told",
    )
    parser.add_argument(
        "--merge", choices=("concat", "sum"), default="concat", help="of two directions"
    )
    parser.add_argument("--cell", action="store_true", help="write a torch.nn.GRUCell")
    parser.add_argument("--step", action="store_true", help="write the program of one step")
    parser.add_argument("--seed", type=int, default=0, help="of the random input")
    args = parser.parse_args(argv)
    args.assumed = args.activation is not None
    args.activation = args.activation or "tanh"
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
    for option in ("cell", "step"):
        kind = {"cell": "torch", "step": "stablehlo"}[option]
        if getattr(args, option) and args.target[0] != kind:
            parser.error(f"--{option} must be left out for any target but {kind}")
    for (kind, _), kinds in ((args.source, FORMATS), (args.target, TARGETS)):
        if kind not in kinds:
            parser.error(f"a format must be one of {', '.join(kinds)}, got {kind}")
    return args


def convert(args):
    """Reads, writes beside the target, compares, and puts the new file in its place."""
    (source, source_file), (target, target_file) = args.source, args.target
    place = pathlib.Path(target_file)
    if place.exists():
        raise DataError(f"{place} exists; nothing was overwritten")
    if not place.parent.is_dir():
        raise DataError(f"{place.parent} is no folder to write into")
    with (
        tempfile.TemporaryDirectory(dir=place.parent) as folder,
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        new = pathlib.Path(folder) / place.name
        try:
            model, notes = read(source, source_file, args)
            print(f"read     {source:8} {source_file}: {describe(layers_of(model))}")
            errors, more = write_and_compare(args, new, model)
        except ImportError as error:
            cure = "pip install -e '.[experiments,onnx,safetensors,export]'"
            raise DataError(f"{error} For every format: {cure}") from error
        except MemoryError as error:
            raise DataError(f"{source_file} claims more than fits into memory") from error
        except (ValueError, TypeError) as error:
            raise DataError(str(error)) from error
        texts = [str(w.message) for w in told if issubclass(w.category, UserWarning)]
        for note in dict.fromkeys([*notes, *more, *texts]):
            print(f"note     {note}")
        agree = within_rounding(errors, model)
        if agree:
            os.link(new, place)  # fails where another has made it in the meantime
        print(f"{'wrote' if agree else 'not written, see below:':8} {target:8} {target_file}")
    print(f"largest difference on a random input, T={STEPS}, B={BATCH}, of the largest output:")
    for name, error in errors.items():
        print(f"  {error:8.1e}  {name}")
    return 0 if agree else 1


def write_and_compare(args, new, model):
    """(errors by name, notes) of the new file."""
    rng = np.random.default_rng(args.seed)
    wanted = run_stack(layers_of(model), draw_wide(model, args.seed), args.merge)
    notes, again = write(args.target[0], new, model, args), None
    if args.target[0] != "stablehlo":
        again = read(args.target[0], new, args_of_target(args, model))
    return compare(args, new, model, again, wanted, rng), notes


def within_rounding(errors, model):
    """True where every error is rounding in the model's dtype."""
    dtype = jnp.dtype(first_cell(layers_of(model)).w_x.dtype)
    return bool(np.max(list(errors.values())) <= 100 * float(jnp.finfo(dtype).eps))


def read(kind, file, args):
    """(params, notes) of a file."""
    if kind == "jaxgru":
        if args.layer:
            raise DataError("--layer must be left out for jaxgru, whose files hold their structure")
        loaded = interop.load_weights(file)
        return loaded.params, ()
    if kind == "onnx":
        return read_nodes(file, args.layer)
    arrays = read_arrays(file, kind)
    if kind == "torch":
        if len(args.layer) > 1:
            raise DataError("--layer must be given once for torch, whose names tell the layers")
        return interop.from_torch(arrays, prefix="".join(args.layer))
    options: dict[str, Any] = {}
    if kind in ("keras", "linen", "nnx"):
        options["activation"] = args.activation
    if kind == "keras" and args.reset:
        options["reset_after"] = args.reset == "after"
    reader = getattr(interop, f"from_{kind}")
    params, notes = reader(nest(arrays, kind, args.layer, file), **options)
    if options.get("activation") == "tanh" and not args.assumed:
        notes = (*notes, f"{kind} files do not tell the activation: tanh is assumed")
    return params, notes


def read_nodes(file, names):
    """(stack, notes) of the GRU nodes of an ONNX file, all or those that are named."""
    nodes = interop.read_onnx(file)
    if names:
        found = {node.name: node for node in nodes}
        if missing := [name for name in names if name not in found]:
            raise DataError(f"{file} must hold GRU nodes {missing}; its own are {list(found)}")
        nodes = [found[name] for name in names]
    listed = " ".join(f"--layer {node.name}" for node in nodes)
    for lower, node in itertools.pairwise(nodes):
        if node.below != lower.name and not names:
            raise DataError(
                f"{file}: node {node.name!r} does not read the outputs of {lower.name!r} alone, so "
                f"they are no stack; name those that are: {listed}"
            )
    for node in nodes:
        if node.direction == "reverse":
            raise DataError(f"{file}: node {node.name!r} goes backward alone; no file here can")
        if node.sequence_lens is not None or (
            node.initial_h is not None and np.any(node.initial_h)
        ):
            raise DataError(
                f"{file}: node {node.name!r} holds its own sequence_lens or initial_h, which no "
                "weights can stand for; jaxgru.interop.read_onnx gives them"
            )
    return tuple(node.params for node in nodes), what_stays(file, nodes)


def what_stays(file, nodes):
    """Notes on what else an ONNX file computes than GRUs and their plumbing."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    tables = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    others = {node.op_type for node in graph.node if node.op_type not in _PLUMBING}
    others |= {"Gather" for v in graph.node if v.op_type == "Gather" and v.input[0] in tables}
    notes = []
    if others:
        notes.append(f"the rest of the ONNX graph stays behind: {', '.join(sorted(others))}")
    if any("initial_h" in node.computed for node in nodes):
        notes.append("initial_h is an input of the ONNX graph, or computed there: zeros here")
    return notes


def read_arrays(file, kind):
    """Names to arrays of a file that cannot run code."""
    path = pathlib.Path(file)
    if kind == "keras" and path.suffix in (".h5", ".hdf5"):
        return read_hdf5(path)
    if path.suffix == ".npz":
        try:
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as opened:
                return {name: opened[name] for name in opened.files}
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise DataError(f"{file} must be a whole .npz of arrays: {error}") from error
    return interop.read_safetensors(path)


def read_hdf5(path):
    """The variables of Keras's GRU cells, under the names that the layer gives them."""
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

    with open(path, "rb") as opened:  # a missing file is said as for every other
        try:
            with h5py.File(opened, "r") as file:
                file.visititems(visit)
        except (OSError, RuntimeError, KeyError) as error:
            raise DataError(f"{path} must be a whole HDF5 file of weights: {error}") from error
    if not arrays:
        raise DataError(f"{path} must hold a GRU that Keras saved, got no cell")
    return arrays


def nest(arrays, kind, prefixes, file):
    """The layers that flat names stand for."""
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
            f"{file} holds several layers, here by name; give them in your model's order, the one "
            f"that reads the input first: {named}"
        )
    else:
        starts = list(places) or [""]
    return [layer_at(arrays, start, file) for start in starts]


def by_number(name):
    """Sorts gru_10 behind gru_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def layer_at(arrays, prefix, file):
    """The arrays of one layer, both directions in a Bidirectional."""
    own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    if not own:
        names = ", ".join(sorted(arrays)[:20])
        raise DataError(f"{file} has no name that begins with {prefix!r}; its names: {names}")
    if not any(k.startswith(("forward/", "backward/")) for k in own):
        return own
    directions: list[Any] = [
        {k.removeprefix(start): v for k, v in own.items() if k.startswith(start)}
        for start in ("forward/", "backward/")
    ]
    return Bidirectional(*directions)


def write(kind, file, model, args):
    """Writes the file; returns what changed on the way."""
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
        notes = [f"the head and embedding stay behind: {kind} files hold the layers alone"]
    if kind == "torch":
        if args.cell and len(layers) > 1:
            raise DataError("--cell must be left out for more than one layer")
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
    """Names to arrays of one layer."""
    if isinstance(weights, list):  # Keras's order
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
    """A new .npz or .safetensors file."""
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
    """The options that read the written file again."""
    specs = equations_of(layers_of(model))
    resets = {spec.reset for spec in specs}
    reset = resets.pop() if len(resets) == 1 else None  # else their biases tell
    return argparse.Namespace(layer=[], reset=reset, activation=specs[0].activation, assumed=True)


def layers_of(model: Any) -> Any:
    """The stack of a model, of a stack, or of one layer."""
    if isinstance(model, SequenceParams | TokenParams):
        return model.layers
    return (model,) if isinstance(model, GRUParams | Bidirectional) else model


def first_cell(layers: Any) -> Any:
    """The bottom layer, or its forward direction."""
    return layers[0].forward if isinstance(layers[0], Bidirectional) else layers[0]


def equations_of(layers):
    """The specs of all layers, each once, bottom first."""
    cells = jax.tree.leaves(layers, is_leaf=lambda leaf: isinstance(leaf, GRUParams))
    return list(dict.fromkeys(cell.spec for cell in cells))


def describe(layers):
    """One line on layers and equations."""
    first = first_cell(layers)
    both = ", two directions" if isinstance(layers[0], Bidirectional) else ""
    sizes = f"I={first.w_x.shape[0]} H={first.w_h.shape[0]} {first.w_x.dtype}"
    equations = " / ".join(
        f"reset {spec.reset}, z {spec.update}s, {spec.activation}" for spec in equations_of(layers)
    )
    return f"{len(layers)} layer{'s' * (len(layers) > 1)}{both}, {sizes}; {equations}"


def compare(args, new, model, again, wanted, rng):
    """The largest differences on a random input, by name."""
    xs = draw_wide(model, args.seed)
    found: dict[str, Any] = {}
    if again is not None:
        found["read again, float64"] = run_stack(layers_of(again[0]), xs, args.merge)
    if args.source[0] == "torch":
        found["the source in torch.nn.GRU, float64"] = run_torch(
            args.source[1], args.layer, args, xs
        )
    if args.target[0] == "torch":
        found["in torch.nn.GRU, float64"] = run_torch(new, [], args, xs)
    errors = {k: largest_difference(v, wanted) for k, v in found.items() if v is not None}
    dtype = first_cell(layers_of(model)).w_x.dtype
    if args.target[0] == "onnx" and dtype == np.float32:
        error = difference_of_onnxruntime(args, new, model, rng)
        errors |= {} if error is None else {"in onnxruntime, float32": error}
    if args.target[0] == "stablehlo":
        error = difference_of_program(args, new, model, rng)
        errors |= {f"of the program on {jax.default_backend()}, {dtype}": error}
    return errors


def draw_wide(model, seed):
    """A random sequence in float64."""
    size = first_cell(layers_of(model)).w_x.shape[0]
    return np.random.default_rng(seed).normal(size=(STEPS, BATCH, size))


def largest_difference(got, wanted):
    """The largest error, relative to the largest wanted entry; 0 for the same, NaN included."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    if np.array_equal(got, wanted, equal_nan=True):
        return 0.0
    return float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), np.finfo(np.float32).tiny))


def run_stack(layers, xs, merge):
    """The outputs of every step, in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), layers)
        return np.asarray(jaxgru.gru_stack(wide, xs, merge=merge)[1])


def run_torch(file, layer, args, xs):
    """What torch.nn.GRU makes of a file, in float64; None without torch, and for cells and sums."""
    start = "".join(layer)
    whole = read_arrays(file, "torch")
    arrays = {k.removeprefix(start): v for k, v in whole.items() if k.startswith(start)}
    try:
        import torch
    except ImportError:
        return None
    if "weight_ih" in arrays or args.merge == "sum":
        return None
    layers = interop.from_torch(arrays).params
    module = torch.nn.GRU(**interop.to_torch(layers).options, dtype=torch.float64)
    module.load_state_dict({k: torch.from_numpy(v.astype(np.float64)) for k, v in arrays.items()})
    with torch.no_grad():
        return module(torch.from_numpy(xs))[0].numpy()


def run_model(model, xs, h0, merge, mask=None):
    """(h_last, outputs) of a model or a stack, in its own dtype."""
    options: dict[str, Any] = {"mask": mask, "merge": merge}
    if isinstance(model, TokenParams):
        return models.token_logits(model, xs, h0, **options)
    if isinstance(model, SequenceParams):
        return models.sequence_outputs(model, xs, h0, **options)
    return jaxgru.gru_stack(layers_of(model), xs, h0, **options)


def draw_inputs(model, rng):
    """Random tokens or inputs of a model, and a ragged mask's lengths."""
    lengths = rng.integers(0, STEPS + 1, BATCH).astype(np.int32)
    if isinstance(model, TokenParams):
        return rng.integers(0, model.w.shape[1], (STEPS, BATCH)), lengths
    w_x = first_cell(layers_of(model)).w_x
    return rng.normal(size=(STEPS, BATCH, w_x.shape[0])).astype(w_x.dtype), lengths


def difference_of_onnxruntime(args, new, model, rng):
    """The error of onnxruntime's outputs with ragged lengths; None without it."""
    try:
        import onnxruntime
    except ImportError:
        return None
    xs, lengths = draw_inputs(model, rng)
    mask = jaxgru.length_mask(lengths, STEPS)
    wanted = run_model(model, jnp.asarray(xs), None, args.merge, mask)[1]
    session = onnxruntime.InferenceSession(new)
    name = "tokens" if isinstance(model, TokenParams) else "xs"
    return largest_difference(session.run(["outputs"], {name: xs, "lengths": lengths})[0], wanted)


def is_wide(model):
    """True where the model is float64, which JAX computes in under x64 alone."""
    return first_cell(layers_of(model)).w_x.dtype == np.float64


def write_program(file, model, args):
    """The serialized forward program, of a sequence or a step, with symbolic T and B."""
    if args.step and any(isinstance(layer, Bidirectional) for layer in layers_of(model)):
        raise DataError("--step must be left out for two directions: one waits for the last step")

    def sequence(xs, mask):
        return run_model(model, xs, None, args.merge, mask)

    def step(x, h):
        h, outputs = run_model(model, x[None], h, args.merge)
        return h, outputs[0]

    with jax.enable_x64(is_wide(model)):
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
    """The error of a written program: of a ragged batch, or of steps one after another."""
    program = export.deserialize(bytearray(new.read_bytes()))
    xs, lengths = draw_inputs(model, rng)
    with jax.enable_x64(is_wide(model)):
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
