"""Writes models of this package as ONNX graphs; needs the extra `onnx`."""

import os
from typing import Any, Literal, get_args

import jax
import numpy as np

from jaxgru.atomic_files import write_atomically
from jaxgru.core.checks import require_bool, require_choice
from jaxgru.extras import require_extra
from jaxgru.interop.common import is_stack
from jaxgru.interop.onnx.weights import onnx_nodes
from jaxgru.models.parameters import SequenceParams, TokenParams, require_model
from jaxgru.stacks.checks import require_sizes
from jaxgru.stacks.forms import Merge, directions_of, output_size_of

Outputs = Literal["every", "last"]
_OPSET, _IR_VERSION = 17, 8  # released in 2022; onnxruntime 1.12 and newer run them


def write_onnx(
    path: str | os.PathLike, params: Any, *, merge: Merge = "concat", residual: bool = False,
    outputs: Outputs = "every", lengths: bool = False, state: bool = False,
) -> tuple[str, ...]:  # fmt: skip
    """Writes a stack or a model as an ONNX graph that other runtimes can run.

    The graph computes the values of `token_logits`, `sequence_outputs`, `final_outputs` or
    `gru_stack` without dropout, also at masked steps and for empty sequences. Its input is "tokens"
    int64 [T, B] for a `TokenParams` and "xs" [T, B, I] otherwise. Its outputs are, in this order,
    "outputs" [T, B, K], or [B, K] of the last valid step, and "h_last_0" [D, B, H], ... of every
    layer. T and B are free. onnxruntime runs files of float32; its GRU has no float64 and no
    float16.

    Args:
      path: the path of the file; an existing file is replaced atomically.
      params: a `GRUParams`, `Bidirectional`, stack, `SequenceParams` or `TokenParams`.
      merge, residual: as in `gru_stack`.
      outputs: "every" for the outputs of all steps, "last" for those of the last valid step.
      lengths: True adds the input "lengths" int32 [B], the number of valid steps of each sequence.
      state: True adds the inputs "h0_0" [D, B, H], ... of every layer.

    Returns: the notes of `to_onnx`.

    Raises:
      ImportError, OSError: onnx is not installed, or the file cannot be written.
      ValueError: params have a layer-norm scale or are bfloat16, sizes do not fit, or outputs is
        unknown.
      TypeError: params are of another kind, or residual, lengths or state is not a bool.

    Cost: three copies of the arrays. A file holds at most 2 GB.
    """
    onnx = require_extra("write_onnx", "onnx")
    require_choice("write_onnx", "outputs", outputs, get_args(Outputs))
    require_bool("write_onnx", "lengths", lengths)
    require_bool("write_onnx", "state", state)
    model: Any = params if isinstance(params, SequenceParams | TokenParams) else None
    layers: Any = params if model is None else model.layers
    layers = layers if is_stack(layers) else (layers,)
    root = "params" if model is None else "params.layers"
    exported = onnx_nodes("write_onnx", layers, root)
    dtype = exported.weights[0]["R"].dtype
    with jax.enable_x64(True):  # float64 is accepted: nothing is computed
        require_sizes("write_onnx", layers, merge, residual, root)
        if model is not None:
            require_model("write_onnx", model, type(model), merge)
    graph = _Graph(onnx, dtype, state)
    ys = _write_inputs(graph, params, layers)
    if lengths:
        graph.write_lengths(ys)
    final, states = None, []
    for number, (weights, options) in enumerate(zip(exported.weights, exported.options)):
        hs, h_last = _write_layer(graph, number, ys, weights, options)
        states.append(h_last)
        both = len(weights["R"]) == 2
        joined, last = graph.join(hs, both, merge, 1), graph.join(h_last, both, merge, 0)
        add = residual and number
        ys = graph.node("Add", joined, ys) if add else joined
        final = graph.node("Add", last, final) if add else last
    top, size = ys if outputs == "every" else final, output_size_of(layers[-1], merge)
    if model:
        product = graph.node("MatMul", top, graph.constant("w", model.w))
        top, size = graph.node("Add", product, graph.constant("b", model.b)), model.w.shape[1]
    graph.output("outputs", top, ["T", "B", size] if outputs == "every" else ["B", size])
    for number, (h_last, weights) in enumerate(zip(states, exported.weights)):
        directions, _, hidden_size = weights["R"].shape
        graph.output(f"h_last_{number}", h_last, [directions, "B", hidden_size])
    write_atomically(path, graph.serialize())
    return exported.notes


class _Graph:
    """Builds an ONNX graph; the methods return names of values."""

    def __init__(self, onnx, dtype, state):
        names = ("float64", "float32", "float16")
        if dtype.name not in names:
            raise ValueError(
                f"write_onnx: params must be {', '.join(names)}, got {dtype}; cast them first."
            )
        self.onnx, self.dtype, self.state = onnx, dtype, state
        self.float = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        self.nodes, self.initializers, self.inputs, self.outputs = [], [], [], []
        self.lengths = self.valid = self.has_step = ""

    def input(self, name, kind, shape):
        self.inputs.append(self.onnx.helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name, value, shape):
        self.node("Identity", value, name=name)
        self.outputs.append(self.onnx.helper.make_tensor_value_info(name, self.float, shape))

    def constant(self, name, value):
        array = np.asarray(value, order="C")  # leaves the shape of a scalar unchanged
        self.initializers.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def node(self, operator, *inputs, name="", count=1, **attributes):
        names = [name or f"{operator.lower()}_{len(self.nodes)}"]
        names += [f"{names[0]}_{i}" for i in range(1, count)]
        node = self.onnx.helper.make_node(operator, inputs, names, names[0], **attributes)
        self.nodes.append(node)
        return names[0] if count == 1 else names

    def axes(self, *values):
        return self.constant(f"axes_{len(self.initializers)}", np.array(values, np.int64))

    def join(self, values, both, merge, axis):
        """[..., D, B, H] with D at `axis` as [..., B, H] or [..., B, 2H]."""
        if not both:
            return self.node("Squeeze", values, self.axes(axis))
        if merge == "sum":
            return self.node("ReduceSum", values, self.axes(axis), keepdims=0)
        order = [*range(axis), axis + 1, axis, axis + 2]
        rows = self.node("Transpose", values, perm=order)
        return self.node("Reshape", rows, self.axes(*[0] * (axis + 1), -1))

    def write_lengths(self, xs):
        """Adds the input "lengths", and the masks of valid steps and of sequences that have one."""
        kinds = self.onnx.TensorProto
        self.lengths = self.input("lengths", kinds.INT32, ["B"])
        zero, one = (self.constant(n, np.array(v, np.int64)) for n, v in (("0", 0), ("1", 1)))
        num_steps = self.node("Gather", self.node("Shape", xs), zero, axis=0)
        steps = self.node("Unsqueeze", self.node("Range", zero, num_steps, one), self.axes(1, 2, 3))
        lengths = self.node("Cast", self.lengths, to=kinds.INT64)
        lengths = self.node("Unsqueeze", lengths, self.axes(0, 1, 3))
        self.valid = self.node("Less", steps, lengths)  # [T, 1, B, 1]
        has_step = self.node("Cast", self.lengths, to=kinds.BOOL)
        self.has_step = self.node("Unsqueeze", has_step, self.axes(0, 2))  # [1, B, 1]

    def serialize(self):
        helper = self.onnx.helper
        contents = (self.nodes, "jaxgru", self.inputs, self.outputs, self.initializers)
        opset = [helper.make_operatorsetid("", _OPSET)]
        versions = {"opset_imports": opset, "ir_version": _IR_VERSION, "producer_name": "jaxgru"}
        model = helper.make_model(helper.make_graph(*contents), **versions)
        model = self.onnx.shape_inference.infer_shapes(model, strict_mode=True)
        self.onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()


def _write_inputs(graph, params, layers):
    """The input of the first layer, [T, B, I]."""
    if not isinstance(params, TokenParams):
        input_size = directions_of(layers[0])[0].w_x.shape[0]
        return graph.input("xs", graph.float, ["T", "B", input_size])
    tokens = graph.input("tokens", graph.onnx.TensorProto.INT64, ["T", "B"])
    if params.embedding is not None:
        return graph.node("Gather", graph.constant("embedding", params.embedding), tokens, axis=0)
    depth = graph.constant("depth", np.array(params.w.shape[1], np.int64))
    values = graph.constant("off_on", np.array([0, 1], graph.dtype))
    return graph.node("OneHot", tokens, depth, values, axis=-1)


def _write_layer(graph, number, xs, weights, options):
    """(hs [T, D, B, H], h_last [D, B, H]) of a layer; masked steps repeat the state."""
    directions, hidden_size = weights["R"].shape[0], weights["R"].shape[2]
    constants = {k: graph.constant(f"{k}_{number}", v) for k, v in weights.items()}
    h0 = ""
    if graph.state:
        h0 = graph.input(f"h0_{number}", graph.float, [directions, "B", hidden_size])
    inputs = [xs, constants["W"], constants["R"], constants.get("B", ""), graph.lengths, h0]
    hs, h_last = graph.node("GRU", *inputs, name=f"gru_{number}", count=2, **options)
    if graph.lengths:
        shape = (directions, 1, hidden_size)
        start = h0 or graph.constant(f"zeros_{number}", np.zeros(shape, graph.dtype))
        h_last = graph.node("Where", graph.has_step, h_last, start)
        repeated = h_last  # the state at masked steps
        if directions == 2:  # the backward direction starts there, so its state is the initial one
            forward = graph.node("Gather", h_last, graph.axes(0), axis=0)
            backward = graph.node("Gather", start, graph.axes(1), axis=0)
            backward = graph.node("Expand", backward, graph.node("Shape", forward))
            repeated = graph.node("Concat", forward, backward, axis=0)
        hs = graph.node("Where", graph.valid, hs, graph.node("Unsqueeze", repeated, graph.axes(0)))
    return hs, h_last
