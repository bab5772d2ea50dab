"""Writes models as new files of weights, and as programs."""

import io
import pathlib
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

import jaxgru.interop as interop
from jaxgru.extras import require_extra
from jaxgru.interop.common import cells_of
from jaxgru.interop.convert.reading import KERAS
from jaxgru.models.outputs import sequence_outputs, token_logits
from jaxgru.models.parameters import SequenceParams, TokenParams
from jaxgru.stacks.forms import Bidirectional, as_stack
from jaxgru.stacks.run import gru_stack

STEPS, BATCH = 16, 4  # of the random input


def write(kind, file, model, metadata, args):
    """Writes the file; returns notes on what was merged, negated or left out."""
    if kind == "jaxgru":
        interop.save_weights(file, model, metadata=metadata)
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
            raise ValueError("--cell is only for a single layer")
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
            raise ValueError(f"{file} cannot hold bfloat16; write a .safetensors file")
        np.savez(data, **arrays)
    elif suffix == ".safetensors":
        safetensors = require_extra("jaxgru.interop", "safetensors", "safetensors.numpy")
        plain = {name: np.ascontiguousarray(v) for name, v in arrays.items()}
        data.write(safetensors.numpy.save(plain))
    else:
        raise ValueError(f"{file} must end in .safetensors or .npz to hold named arrays")
    with open(file, "xb") as opened:
        opened.write(data.getvalue())


def layers_of(model: Any) -> Any:
    """The layers of a model, a stack or a single layer."""
    if isinstance(model, SequenceParams | TokenParams):
        return model.layers
    return as_stack(model)


def first_cell(model: Any) -> Any:
    """The parameters of the bottom layer, or of its forward direction."""
    return cells_of(layers_of(model))[0]


def run_model(model, xs, h0, merge, mask=None):
    """(h_last, outputs) of a model or a stack, in its own dtype."""
    options: dict[str, Any] = {"mask": mask, "merge": merge}
    if isinstance(model, TokenParams):
        return token_logits(model, xs, h0, **options)
    if isinstance(model, SequenceParams):
        return sequence_outputs(model, xs, h0, **options)
    return gru_stack(layers_of(model), xs, h0, **options)


def draw_inputs(model, rng):
    """Random tokens or inputs for a model, and random lengths for a mask."""
    lengths = rng.integers(0, STEPS + 1, BATCH).astype(np.int32)
    if isinstance(model, TokenParams):
        return rng.integers(0, model.w.shape[1], (STEPS, BATCH)), lengths
    w_x = first_cell(model).w_x
    return rng.normal(size=(STEPS, BATCH, w_x.shape[0])).astype(w_x.dtype), lengths


def is_float64(model):
    """True if the model is float64, for which JAX needs jax.enable_x64."""
    return first_cell(model).w_x.dtype == np.float64


def write_program(file, model, args):
    """Writes the serialized forward program of a sequence or a step, with symbolic T and B."""
    if args.step and any(isinstance(layer, Bidirectional) for layer in layers_of(model)):
        raise ValueError("--step is not for two directions: one of them begins at the last step")
    require_extra("jaxgru.interop", "flatbuffers", extra="export")

    def sequence(xs, mask):
        return run_model(model, xs, None, args.merge, mask)

    def step(x, h):
        h, outputs = run_model(model, x[None], h, args.merge)
        return h, outputs[0]

    with jax.enable_x64(is_float64(model)):
        steps, batch = jax.export.symbolic_shape("t, b")
        xs, _ = draw_inputs(model, np.random.default_rng(0))
        x = jax.ShapeDtypeStruct((batch, *xs.shape[2:]), jnp.asarray(xs).dtype)
        given = (x.update(shape=(steps, *x.shape)), jax.ShapeDtypeStruct((steps, batch), bool))
        if args.step:
            cells = [jnp.asarray(layer.w_h) for layer in layers_of(model)]
            h = tuple(jax.ShapeDtypeStruct((batch, w.shape[0]), w.dtype) for w in cells)
            given = (x, h)
        program = jax.jit(step if args.step else sequence)
        exported = jax.export.export(program, platforms=("cpu", "cuda", "tpu"))(*given)
    with open(file, "xb") as opened:
        opened.write(exported.serialize())
