"""Writes models as new files of weights and as programs, and compares files by their outputs."""

import importlib
import io
import pathlib
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

import jaxgru.interop as interop
from jaxgru.extras import require_extra
from jaxgru.interop.common import cells_of, named_leaves
from jaxgru.interop.convert import libraries
from jaxgru.interop.convert.reading import Options, nest, read, read_arrays, strip
from jaxgru.interop.keras import name_directions
from jaxgru.masks import length_mask
from jaxgru.models.outputs import sequence_outputs, token_logits
from jaxgru.models.parameters import SequenceParams, TokenParams
from jaxgru.stacks.create import init_state
from jaxgru.stacks.forms import Bidirectional, as_stack
from jaxgru.stacks.run import gru_stack

STEPS, BATCH = 16, 4  # of the random input


def write(kind, file, model, metadata, args):
    """Writes the file; returns notes on what was merged, negated or left out."""
    if kind == "jaxgru":
        interop.save_weights(file, model, metadata=metadata)
        return []
    if kind == "onnx":
        return interop.write_onnx(file, model, merge=args.merge, lengths=True)
    if kind == "stablehlo":
        write_program(file, model, args)
        return []
    layers, left = layers_of(model), []
    if isinstance(model, SequenceParams | TokenParams):
        left = [f"{kind} files hold only the GRU layers: head and embedding are not written"]
    if args.cell and len(layers) > 1:
        raise ValueError("--cell is only for a single layer")
    weights, _, notes = getattr(interop, f"to_{kind}")(layers[0] if args.cell else layers)
    if kind == "keras":
        named = map(name_directions, weights)
        weights = [Bidirectional(*v) if len(v) == 2 else v[0] for v in named]
    if kind != "torch":
        parts = [v._asdict() if isinstance(v, Bidirectional) else v for v in weights]
        weights = dict(enumerate(parts)) if len(parts) > 1 else parts[0]
    write_arrays(file, dict(named_leaves(weights, "/")))
    return [*left, *notes]


def write_arrays(file, arrays):
    """Writes a new .npz or .safetensors file."""
    suffix, data = pathlib.Path(file).suffix, io.BytesIO()
    if suffix == ".npz":
        if any(v.dtype.name == "bfloat16" for v in arrays.values()):
            raise ValueError(f"{file} cannot hold bfloat16; write a .safetensors file")
        np.savez(data, **arrays)
    elif suffix == ".safetensors":
        safetensors = require_extra("jaxgru.interop", "safetensors", "safetensors.numpy")
        plain = {name: np.ascontiguousarray(v) for name, v in arrays.items()}
        data.write(safetensors.numpy.save(plain))
    else:
        raise ValueError(f"{file} must end in .safetensors or .npz to hold named arrays")
    pathlib.Path(file).write_bytes(data.getvalue())


def write_program(file, model, args):
    """Writes the serialized forward program of a sequence or a step, with symbolic T and B."""
    layers = layers_of(model)
    if args.step and any(isinstance(layer, Bidirectional) for layer in layers):
        raise ValueError("--step is not for two directions: one of them begins at the last step")
    require_extra("jaxgru.interop", "flatbuffers", extra="export")

    def sequence(xs, mask):
        return run_model(model, xs, None, args.merge, mask)

    def step(x, h):
        h, outputs = run_model(model, x[None], h, args.merge)
        return h, outputs[0]

    with enable_dtype_of(model):
        steps, batch = jax.export.symbolic_shape("t, b")
        xs, _ = draw_inputs(model, np.random.default_rng(0))
        x = jax.ShapeDtypeStruct((batch, *xs.shape[2:]), jnp.asarray(xs).dtype)
        given = (x.update(shape=(steps, *x.shape)), jax.ShapeDtypeStruct((steps, batch), bool))
        if args.step:
            h = [jax.ShapeDtypeStruct((batch, len(v.w_h)), v.w_h.dtype) for v in layers]
            given = (x, tuple(h))
        program = jax.jit(step if args.step else sequence)
        exported = jax.export.export(program, platforms=("cpu", "cuda", "tpu"))(*given)
    pathlib.Path(file).write_bytes(exported.serialize())


def compare(args, target, new, model):
    """({name: largest difference of the outputs for a random input}, {name: why it was not run})"""
    layers, found, reasons = layers_of(model), {}, {}
    specs = [cell.spec for cell in cells_of(layers)]
    resets = {spec.reset for spec in specs}
    own = Options(reset=resets.pop() if len(resets) == 1 else None, activation=specs[0].activation)
    w_x, rng = first_cell(model).w_x, np.random.default_rng(args.seed)
    xs, dtype = rng.normal(size=(STEPS, BATCH, len(w_x))), w_x.dtype
    wanted = run_stack(layers, xs, args.merge)
    if target != "stablehlo":
        again = layers_of(read(target, new, own).params)
        found["read again, float64"] = run_stack(again, xs, args.merge)
    files = (("the source ", *args.source, args.options), ("", target, new, own))
    for start, kind, file, options in files:
        if kind in libraries.NAMES:
            width = "float32" if kind == "onnx" else "float64"
            name = f"{start}in {libraries.NAMES[kind]}, {width}"
            try:
                if kind == "onnx" and dtype != np.float32:
                    raise libraries.NotRunError(f"its GRU has no {dtype}")
                found[name] = run_library(kind, file, options, xs, args.merge)
            except ImportError as error:
                reasons[name] = f"{error.name} is not installed"
            except libraries.NotRunError as error:
                reasons[name] = str(error)
    errors = {k: largest_difference(v, wanted) for k, v in found.items()}
    name = "in onnxruntime, float32"
    if target == "stablehlo" or (target == "onnx" and name in errors):
        name += ", whole and with random lengths"
        if target == "stablehlo":
            name = f"in the program on {jax.default_backend()}, {dtype}"
        errors[name] = largest_difference(*run_program(args, target, new, model, rng))
    return errors, reasons


def run_library(kind, file, options, xs, merge):
    """The outputs of the GRUs of a file, computed by the library that the file is for."""
    if kind == "onnx":
        names = options.layer or [node.name for node in interop.read_onnx(file)]
        return libraries.run_onnx(file, names, xs, merge)
    arrays = read_arrays(file, kind)
    if kind == "torch":
        return libraries.run_torch(strip(arrays, "".join(options.layer)), xs, merge)
    layers, after = nest(arrays, kind, options.layer, file), options.reset != "before"
    return libraries.run_layers(kind, layers, xs, merge, options.activation or "tanh", after)


def run_stack(layers, xs, merge):
    """The outputs of every step, computed in float64."""
    with jax.enable_x64(True):
        layers = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), layers)
        return np.asarray(gru_stack(layers, xs, merge=merge)[1])


def run_program(args, target, new, model, rng):
    """The outputs of a whole ONNX file or program, of random lengths or step by step, and ours."""
    xs, lengths = draw_inputs(model, rng)
    with enable_dtype_of(model):
        mask = None if args.step else length_mask(lengths, STEPS)
        wanted = run_model(model, jnp.asarray(xs), None, args.merge, mask)[1]
        if target == "onnx":
            session = importlib.import_module("onnxruntime").InferenceSession(new)
            name = "tokens" if isinstance(model, TokenParams) else "xs"
            return session.run(["outputs"], {name: xs, "lengths": lengths})[0], wanted
        program = jax.export.deserialize(bytearray(new.read_bytes()))
        if not args.step:
            return program.call(jnp.asarray(xs), mask)[1], wanted
        h, outputs = init_state(layers_of(model), (BATCH,)), []
        for x in xs:
            h, output = program.call(jnp.asarray(x), h)
            outputs.append(output)
        return jnp.stack(outputs), wanted


def run_model(model, xs, h0, merge, mask=None):
    """(h_last, outputs) of a model or a stack, in its own dtype."""
    runs: Any = {TokenParams: token_logits, SequenceParams: sequence_outputs}
    run = runs.get(type(model), gru_stack)
    params = layers_of(model) if run is gru_stack else model
    return run(params, xs, h0, mask=mask, merge=merge)


def draw_inputs(model, rng):
    """Random tokens or inputs for a model, and random lengths for a mask."""
    lengths = rng.integers(0, STEPS + 1, BATCH).astype(np.int32)
    if isinstance(model, TokenParams):
        return rng.integers(0, model.w.shape[1], (STEPS, BATCH)), lengths
    w_x = first_cell(model).w_x
    return rng.normal(size=(STEPS, BATCH, len(w_x))).astype(w_x.dtype), lengths


def enable_dtype_of(model):
    """JAX in 64-bit mode if the model is float64."""
    return jax.enable_x64(first_cell(model).w_x.dtype == np.float64)


def layers_of(model: Any) -> Any:
    """The layers of a model, a stack or a single layer."""
    return model.layers if isinstance(model, SequenceParams | TokenParams) else as_stack(model)


def first_cell(model: Any) -> Any:
    """The parameters of the bottom layer, or of its forward direction."""
    return cells_of(layers_of(model))[0]


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
