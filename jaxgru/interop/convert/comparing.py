"""Compares files of weights by their outputs for random inputs."""

import importlib

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

import jaxgru.interop as interop
from jaxgru.interop.common import cells_of
from jaxgru.interop.convert import libraries
from jaxgru.interop.convert.reading import Options, nest, read, read_arrays
from jaxgru.interop.convert.writing import (
    BATCH,
    STEPS,
    draw_inputs,
    first_cell,
    is_float64,
    layers_of,
    run_model,
)
from jaxgru.masks import length_mask
from jaxgru.models.parameters import TokenParams
from jaxgru.stacks.create import init_state
from jaxgru.stacks.run import gru_stack


def options_of_target(model):
    """The options with which the new file is read again."""
    specs = [cell.spec for cell in cells_of(layers_of(model))]
    resets = {spec.reset for spec in specs}
    return Options(reset=resets.pop() if len(resets) == 1 else None, activation=specs[0].activation)


def compare(args, target, new, model):
    """({name: largest difference of the outputs for a random input}, {name: why it was not run})"""
    found, reasons, own = {}, {}, options_of_target(model)
    w_x, rng = first_cell(model).w_x, np.random.default_rng(args.seed)
    xs, dtype = rng.normal(size=(STEPS, BATCH, len(w_x))), w_x.dtype
    wanted = run_stack(layers_of(model), xs, args.merge)
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
    if target == "onnx" and "in onnxruntime, float32" in errors:
        name = "in onnxruntime, float32, whole and with random lengths"
        errors[name] = difference_of_onnxruntime(args, new, model, rng)
    if target == "stablehlo":
        error = difference_of_program(args, new, model, rng)
        errors[f"in the program on {jax.default_backend()}, {dtype}"] = error
    return errors, reasons


def run_library(kind, file, options, xs, merge):
    """The outputs of the GRUs of a file, computed by the library that the file is for."""
    if kind == "onnx":
        names = options.layer or [node.name for node in interop.read_onnx(file)]
        return libraries.run_onnx(file, names, xs, merge)
    arrays = read_arrays(file, kind)
    if kind == "torch":
        start = "".join(options.layer)
        arrays = {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}
        return libraries.run_torch(arrays, xs, merge)
    layers, after = nest(arrays, kind, options.layer, file), options.reset != "before"
    return libraries.run_layers(kind, layers, xs, merge, options.activation or "tanh", after)


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
        return np.asarray(gru_stack(layers, xs, merge=merge)[1])


def difference_of_onnxruntime(args, new, model, rng):
    """The error of onnxruntime's outputs of the whole model for random lengths."""
    onnxruntime = importlib.import_module("onnxruntime")
    xs, lengths = draw_inputs(model, rng)
    mask = length_mask(lengths, STEPS)
    wanted = run_model(model, jnp.asarray(xs), None, args.merge, mask)[1]
    session = onnxruntime.InferenceSession(new)
    name = "tokens" if isinstance(model, TokenParams) else "xs"
    return largest_difference(session.run(["outputs"], {name: xs, "lengths": lengths})[0], wanted)


def difference_of_program(args, new, model, rng):
    """The error of the written program, for random lengths or called step by step."""
    program = jax.export.deserialize(bytearray(new.read_bytes()))
    xs, lengths = draw_inputs(model, rng)
    with jax.enable_x64(is_float64(model)):
        mask = None if args.step else length_mask(lengths, STEPS)
        wanted = run_model(model, jnp.asarray(xs), None, args.merge, mask)[1]
        if not args.step:
            return largest_difference(program.call(jnp.asarray(xs), mask)[1], wanted)
        h, outputs = init_state(layers_of(model), (BATCH,)), []
        for x in xs:
            h, output = program.call(jnp.asarray(x), h)
            outputs.append(output)
        return largest_difference(jnp.stack(outputs), wanted)
