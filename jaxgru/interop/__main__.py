"""Converts the weights of a GRU from one library's file to another's, and checks the result.

    python -m jaxgru.interop torch rnn.safetensors onnx rnn.onnx
    python -m jaxgru.interop keras model.weights.h5 torch rnn.safetensors
    python -m jaxgru.interop jaxgru RUN onnx lm.onnx keras gru.safetensors

torch, keras, linen, nnx, equinox, haiku
            .safetensors or .npz with the library's own names for the arrays; of keras also
            .weights.h5 from `model.save_weights` (source only; needs h5py)
onnx        .onnx: the GRU nodes of a source, in the order of its graph; as a target, a model
jaxgru      .safetensors of `interop.save_weights`; as a source also a folder with
            weights.safetensors, such as a run of experiments.char_lm
stablehlo   the forward program with its weights, written by `jax.export` (target only)

Files of safetensors, onnx and stablehlo need the extras safetensors, onnx and export.

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
import pathlib
import sys
import tempfile
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgru.atomic_files import place_new
from jaxgru.interop.common import cells_of
from jaxgru.interop.convert.reading import Options, read
from jaxgru.interop.convert.writing import BATCH, STEPS, compare, first_cell, layers_of, write
from jaxgru.stacks.forms import Bidirectional

FORMATS = ("torch", "keras", "linen", "nnx", "equinox", "haiku", "onnx", "jaxgru")
TARGETS = (*FORMATS, "stablehlo")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_args(argv)
    try:
        return convert(args)
    except MemoryError:
        message: Any = "a file declares arrays that do not fit in memory"
    except (ImportError, OSError, ValueError, TypeError) as error:
        message = error
    print(f"jaxgru.interop: {message}", file=sys.stderr)
    return 2


def parse_args(argv):
    """The options of the command; exits with code 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxgru.interop",
        usage="%(prog)s FROM FILE TO FILE [TO FILE ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FROM FILE TO FILE",
        help=f"FROM is one of {', '.join(FORMATS)}; TO is one of these or stablehlo")  # fmt: skip
    add("--layer", action="append", default=[], metavar="PREFIX",
        help="beginning of the names of a layer; once for each layer")  # fmt: skip
    add("--reset", choices=("before", "after"),
        help="reset before or after the product, for a Keras layer without bias")  # fmt: skip
    add("--activation", choices=("tanh", "relu", "sigmoid", "softplus", "identity"),
        help="of keras, linen or nnx, whose files do not hold it (default: tanh)")  # fmt: skip
    add("--merge", choices=("concat", "sum"), default="concat",
        help="how the outputs of two directions are merged (default: concat)")  # fmt: skip
    add("--cell", action="store_true", help="write a torch.nn.GRUCell")
    add("--step", action="store_true", help="write the program of one step")
    add("--seed", type=int, default=0, help="seed of the random input")
    args = parser.parse_intermixed_args(argv)
    pairs = list(zip(args.files[::2], args.files[1::2]))
    if len(pairs) < 2 or len(args.files) % 2:
        parser.error(f"FROM FILE TO FILE must be two or more pairs, got {' '.join(args.files)}")
    args.source, *args.targets = pairs
    args.options = Options(tuple(args.layer), args.reset, args.activation)
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
    for (kind, _), kinds in ((args.source, FORMATS), *((v, TARGETS) for v in args.targets)):
        if kind not in kinds:
            parser.error(f"a format must be one of {', '.join(kinds)}, got {kind}")
    for option, kind in (("cell", "torch"), ("step", "stablehlo")):
        if getattr(args, option) and {name for name, _ in args.targets} != {kind}:
            parser.error(f"--{option} is only for the target {kind}")
    for option, kinds in (("reset", ("keras",)), ("activation", ("keras", "linen", "nnx"))):
        if getattr(args, option) and args.source[0] not in kinds:
            named = ", ".join(kinds)
            parser.error(f"--{option} is only for a source of {named}, got {args.source[0]}")
    return args


def convert(args):
    """Converts one file to all targets; returns the largest exit code."""
    kind, file = args.source
    places = [pathlib.Path(name) for _, name in args.targets]
    for place in places:
        if place.exists() or places.count(place) > 1:
            raise ValueError(f"{place} exists or is named twice; nothing was overwritten")
        if not place.parent.is_dir():
            raise ValueError(f"{place.parent} is not a folder")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = read(kind, file, args.options)
        print(f"read     {kind:8} {file}: {describe(layers_of(source.params))}")
        notes, codes = list(getattr(source, "notes", ())), []
        for (target, _), place in zip(args.targets, places):
            codes.append(convert_to(args, target, place, source, notes, caught))
            notes.clear()  # printed once
            caught.clear()
    return max(codes)


def convert_to(args, target, place, source, notes, caught):
    """Writes a temporary file, compares it and moves it to the target; returns the exit code."""
    model = source.params
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        new = pathlib.Path(folder) / place.name
        more = write(target, new, model, getattr(source, "metadata", {}), args)
        errors, reasons = compare(args, target, new, model)
        texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        for note in dict.fromkeys([*notes, *more, *texts]):
            print(f"note     {note}")
        eps = float(jnp.finfo(first_cell(model).w_x.dtype).eps)
        # Rounding in the dtype of the weights; of half types 100 eps could be a wrong conversion.
        agree = bool(np.max(list(errors.values())) <= min(100 * eps, 0.05))  # False for NaN
        if agree:
            place_new(new, place)  # raises if the file was created in the meantime
    print(f"{'wrote' if agree else 'not written, see below:':8} {target:8} {place}")
    print(f"largest difference / largest output, for a random input of T={STEPS}, B={BATCH}:")
    for name, error in errors.items():
        print(f"  {error:8.1e}  {name}")
    for name, reason in reasons.items():
        print(f"  not run   {name}: {reason}")
    return 0 if agree else 1


def describe(layers):
    """One line that describes layers and equations."""
    first = cells_of(layers)[0]
    both = ", bidirectional" if isinstance(layers[0], Bidirectional) else ""
    sizes = f"I={first.w_x.shape[0]} H={first.w_h.shape[0]} {first.w_x.dtype}"
    equations = " / ".join(
        f"reset {spec.reset}, update {spec.update}, {spec.activation}"
        for spec in dict.fromkeys(cell.spec for cell in cells_of(layers))
    )
    return f"{len(layers)} layer{'s' * (len(layers) > 1)}{both}, {sizes}; {equations}"


if __name__ == "__main__":
    sys.exit(main())
