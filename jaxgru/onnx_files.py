"""ONNX models: GRU nodes of files, what such a node computes, files of our own; extra `onnx`.

A node's sequence is [T, B, I] (layout 0) or [B, T, I] (layout 1), its outputs Y [T, D, B, H] or
[B, T, D, H] and Y_h [D, B, H] or [B, D, H] for D directions (ONNX operator GRU-22). Where a
sequence has ended Y is zero, and Y_h of one without a step is zero too, whatever initial_h was (so
does onnxruntime); `jaxgru.gru` holds the state instead. Both are kept apart here: `run_onnx_gru`
computes what a node does, and the files of `write_onnx` compute what this package does.
"""

import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxgru.arguments import require_choice
from jaxgru.conversion import is_stack
from jaxgru.interop import ONNX_ACTIVATIONS, from_onnx, onnx_nodes
from jaxgru.layers import (
    Bidirectional,
    Merge,
    directions_of,
    gru_bidirectional,
    output_size_of,
    require_layers,
    require_stack,
)
from jaxgru.masks import length_mask
from jaxgru.models import SequenceParams, TokenParams, require_head
from jaxgru.parameters import CHO_2014, GRUSpec
from jaxgru.recurrence import gru
from jaxgru.whole_files import write_whole

Array = jax.Array
Outputs = Literal["every", "last"]
_OPSET, _IR_VERSION = 17, 8  # of 2022: any onnxruntime from 1.12 on runs them
_DIRECTIONS: Any = ("forward", "reverse", "bidirectional")
_OPTIONAL_INPUTS = {4: "sequence_lens", 5: "initial_h"}


class OnnxGRU(NamedTuple):
    """A GRU node of an ONNX model.

    Attributes:
      name: the node's, or that of its first output.
      params: a `GRUParams`, or a `Bidirectional`, of NumPy arrays.
      spec: their equation.
      direction: "forward", "reverse" (run it with reverse=True) or "bidirectional".
      layout: 0 for time first, 1 for batch first.
      initial_h: [D, B, H] ([B, D, H] in layout 1) where the file holds it, else None.
      sequence_lens: [B] where the file holds it, else None.
      computed: {"initial_h": name, "sequence_lens": name} of those that the graph is given or
        computes: hand their values to `run_onnx_gru`.
      below: the name of the GRU node whose outputs, at most rearranged or held where a sequence has
        ended, are this one's inputs; "" where it reads anything else.
    """

    name: str
    params: Any
    spec: GRUSpec
    direction: Literal["forward", "reverse", "bidirectional"]
    layout: int
    initial_h: np.ndarray | None
    sequence_lens: np.ndarray | None
    computed: dict[str, str]
    below: str = ""


def read_onnx(
    file: str | os.PathLike, *, inputs: Mapping[str, Any] | None = None
) -> tuple[OnnxGRU, ...]:
    """Every GRU node of an ONNX file, in the graph's order, those of subgraphs too.

    Weights may be initializers, or come of them by nodes that no input of the graph enters
    (constants, slices, transposes).

    Args:
      file: of the model.
      inputs: values of graph inputs by name, for models that are given their weights.

    Returns:
      OnnxGRU for each node. Nodes that follow one another (`below` tells) are a stack:
      `tuple(node.params for node in nodes)`, with the spec that they have in common.

    Raises:
      ImportError: onnx is not installed.
      OSError: the file cannot be read.
      ValueError: it is no whole ONNX model or has no GRU node; inputs names what is no input; a
        node has clip, activations that this package has not or other numbers for them, different
        ones for its two directions, an attribute or shape that the operator does not allow, or
        weights that depend on inputs that are not given.
      TypeError: weights are not floating.

    Cost: one copy of the weights.
    """
    onnx = _library("read_onnx")
    with open(file, "rb") as opened:
        data = opened.read()
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
        onnx.load_external_data_for_model(model, os.path.dirname(os.path.abspath(file)))
    except Exception as error:  # protobuf's DecodeError, onnx's ValidationError, or an OSError
        raise ValueError(f"read_onnx: {file} must be a whole ONNX model, got: {error}.") from error
    given = {name: np.asarray(value) for name, value in (inputs or {}).items()}
    known = {entry.name for entry in [*model.graph.input, *model.graph.initializer]}
    if unknown := sorted(set(given) - known):
        raise ValueError(
            f"read_onnx: inputs must name inputs of the graph, {', '.join(sorted(known))}, got "
            f"{', '.join(unknown)}."
        )
    try:
        found = list(_nodes(onnx, model, model.graph, given))
    except RecursionError as error:
        raise ValueError(f"read_onnx: {file} must not nest nodes so deeply.") from error
    if not found:
        raise ValueError(f"read_onnx: {file} must hold a GRU node of ONNX, got none.")
    return tuple(_read_node(onnx, *place) for place in found)


def run_onnx_gru(
    node: OnnxGRU,
    xs: Array,
    sequence_lens: Array | None = None,
    initial_h: Array | None = None,
    **gru_options: Any,
) -> tuple[Array, Array]:
    """(Y, Y_h) of a node, by this package's `gru`: differentiable, under any transformation.

    Args:
      node: from `read_onnx`.
      xs: X, [T, B, I], or [B, T, I] in layout 1.
      sequence_lens: [B] integers; None for those of the file, or all T.
      initial_h: [D, B, H], or [B, D, H] in layout 1; None for that of the file, or zeros.
      **gru_options: gradient, residuals, chunk_size, unroll, truncate, dropout, ... of `gru`; not
        mask, spec, reverse, merge and axis, which the node itself tells.

    Returns:
      Y [T, D, B, H] and Y_h [D, B, H]; in layout 1 [B, T, D, H] and [B, D, H].

    Raises:
      ValueError: xs is not of three axes, initial_h not of its shape, or as `gru` and
        `length_mask`.
      TypeError: node is none, an option is the node's own, or as `gru`.

    Cost: that of `gru`.
    """
    if not isinstance(node, OnnxGRU):
        raise TypeError(f"run_onnx_gru: node must be an OnnxGRU, got {type(node).__name__}.")
    if own := {"mask", "spec", "reverse", "merge", "axis"} & gru_options.keys():
        raise TypeError(f"run_onnx_gru: {own.pop()} must be left out, as the node tells it.")
    if getattr(xs, "ndim", None) != 3:
        raise ValueError(
            f"run_onnx_gru: xs must have three axes, got {getattr(xs, 'shape', type(xs).__name__)}."
        )
    lengths = node.sequence_lens if sequence_lens is None else sequence_lens
    h0 = node.initial_h if initial_h is None else initial_h
    if node.layout:
        xs = jnp.swapaxes(xs, 0, 1)
        h0 = None if h0 is None else jnp.swapaxes(h0, 0, 1)
    cells = directions_of(node.params)
    wanted = (len(cells), xs.shape[1], cells[0].w_h.shape[0])
    if h0 is not None and h0.shape != wanted:
        raise ValueError(
            f"run_onnx_gru: initial_h must have shape {wanted} (directions, B, H; in layout 1 B "
            f"first), got {h0.shape}."
        )
    mask = None if lengths is None else length_mask(lengths, xs.shape[0])
    options = {"mask": mask, "spec": node.spec, **gru_options}
    if isinstance(node.params, Bidirectional):
        pair = None if h0 is None else (h0[0], h0[1])
        h, hs = gru_bidirectional(node.params, xs, pair, **options)
        h_last, ys = jnp.stack(h), jnp.stack(jnp.split(hs, 2, axis=-1), axis=1)
    else:
        reverse = node.direction == "reverse"
        h0 = None if h0 is None else h0[0]
        h, hs = gru(node.params, xs, h0, reverse=reverse, **options)
        h_last, ys = h[None], hs[:, None]
    if mask is not None:
        ys = jnp.where(mask[:, None, :, None], ys, jnp.zeros_like(ys))
        has_step = mask.any(axis=0)[None, :, None]
        h_last = jnp.where(has_step, h_last, jnp.zeros_like(h_last))
    if node.layout:
        return jnp.transpose(ys, (2, 0, 1, 3)), jnp.swapaxes(h_last, 0, 1)
    return ys, h_last


def write_onnx(
    file: str | os.PathLike,
    params: Any,
    *,
    spec: GRUSpec = CHO_2014,
    merge: Merge = "concat",
    residual: bool = False,
    outputs: Outputs = "every",
    lengths: bool = False,
    state: bool = False,
) -> tuple[str, ...]:
    """Writes a model that other runtimes run to this package's values: embedding, stack, head.

    The graph takes "tokens" int64 [T, B] for a `TokenParams`, "xs" [T, B, I] for anything else, and
    gives "outputs", [T, B, K], or [B, K] of the last real step, and "h_last_0" [D, B, H], ... of
    every layer. T and B are free. onnxruntime runs files of float32; its GRU has no float64 and
    float16. Its values are those of `token_logits`, `sequence_outputs`,
    `final_outputs` or `gru_stack` without dropout, on held steps and for empty sequences too.

    Args:
      file: to write; one that exists is replaced, in one step.
      params: a `GRUParams`, `Bidirectional`, stack, `SequenceParams` or `TokenParams`.
      spec: of params.
      merge: "concat" or "sum", as `gru_stack`.
      residual: as `gru_stack`.
      outputs: "every" step's, or the "last" one's.
      lengths: True adds the input "lengths" int32 [B]: the real steps of each sequence.
      state: True adds the inputs "h0_0" [D, B, H], ... of every layer.

    Returns:
      What was merged or negated, one sentence each, as `to_onnx`.

    Raises:
      ImportError: onnx is not installed.
      OSError: the file cannot be written.
      ValueError: params have gains, are bfloat16, or sizes do not fit; outputs is unknown.
      TypeError: params are of another kind.

    Cost: three copies of the arrays; a model of 2 GB is the most that a file holds.
    """
    onnx = _library("write_onnx")
    require_choice("write_onnx", "outputs", outputs, get_args(Outputs))
    model = isinstance(params, SequenceParams | TokenParams)
    layers = params.layers if model else params
    layers: Any = layers if is_stack(layers) else (layers,)
    with jax.enable_x64(True):  # float64 is for the runtime to compute
        require_stack("write_onnx", layers)
        input_size = directions_of(layers[0])[0].w_x.shape[0]
        xs: Any = np.zeros((0, 1, input_size), directions_of(layers[0])[0].w_x.dtype)
        require_layers("write_onnx", layers, xs, merge, residual)
    exported = onnx_nodes("write_onnx", layers, spec)
    layers_dtype = exported.weights[0]["R"].dtype
    if model:
        require_head("write_onnx", params, type(params), merge)
        for name, value in params._asdict().items():
            if name != "layers" and value is not None and value.dtype != layers_dtype:
                raise TypeError(
                    f"write_onnx: params.{name} must have the dtype of the layers, {layers_dtype}, "
                    f"got {value.dtype}; cast one of them."
                )
    graph = _Graph(onnx, layers_dtype, lengths, state)
    ys = _write_inputs(graph, params, layers)
    if lengths:
        graph.input("lengths", onnx.TensorProto.INT32, ["B"])
    final = None
    for number, (weights, options) in enumerate(zip(exported.weights, exported.options)):
        hs, h_last = _write_layer(graph, number, ys, weights, options)
        both = len(weights["R"]) == 2
        joined, last = graph.join(hs, both, merge, 1), graph.join(h_last, both, merge, 0)
        add = residual and number
        ys = graph.node("Add", joined, ys) if add else joined
        final = graph.node("Add", last, final) if residual and number else last
    top = ys if outputs == "every" else final
    if model:
        product = graph.node("MatMul", top, graph.constant("w", params.w))
        top = graph.node("Add", product, graph.constant("b", params.b))
    size = output_size_of(layers[-1], merge)
    if isinstance(params, SequenceParams | TokenParams):
        size = params.w.shape[1]
    graph.output("outputs", top, ["T", "B", size] if outputs == "every" else ["B", size])
    data = graph.finish().SerializeToString()
    write_whole(file, lambda opened: opened.write(data))
    return exported.notes


class _Graph:
    """An ONNX graph as it grows: every method returns the name of a value."""

    def __init__(self, onnx, dtype, lengths, state):
        names = {"float64": "DOUBLE", "float32": "FLOAT", "float16": "FLOAT16"}
        if dtype.name not in names:
            raise ValueError(
                f"write_onnx: params must be {', '.join(names)}, got {dtype}; cast them first."
            )
        self.onnx, self.dtype, self.state = onnx, dtype, state
        self.float = getattr(onnx.TensorProto, names[dtype.name])
        self.nodes, self.initializers, self.inputs, self.outputs = [], [], [], []
        self.lengths, self.mask = "lengths" if lengths else "", ""

    def input(self, name, kind, shape):
        self.inputs.append(self.onnx.helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name, value, shape):
        self.node("Identity", value, name=name)
        self.outputs.append(self.onnx.helper.make_tensor_value_info(name, self.float, shape))

    def constant(self, name, value):
        array = np.ascontiguousarray(value)
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

    def real_steps(self, xs):
        """The mask [T, 1, B, 1] of the real steps."""
        if not self.mask:
            zero, one = (self.constant(n, np.array(v, np.int64)) for n, v in (("0", 0), ("1", 1)))
            num_steps = self.node("Gather", self.node("Shape", xs), zero, axis=0)
            steps = self.node("Range", zero, num_steps, one)
            steps = self.node("Unsqueeze", steps, self.axes(1, 2, 3))
            lengths = self.node("Cast", self.lengths, to=self.onnx.TensorProto.INT64)
            lengths = self.node("Unsqueeze", lengths, self.axes(0, 1, 3))
            self.mask = self.node("Less", steps, lengths)
        return self.mask

    def finish(self):
        helper = self.onnx.helper
        graph = helper.make_graph(
            self.nodes, "jaxgru", self.inputs, self.outputs, self.initializers
        )
        opset = [helper.make_operatorsetid("", _OPSET)]
        model = helper.make_model(
            graph, opset_imports=opset, ir_version=_IR_VERSION, producer_name="jaxgru"
        )
        model = self.onnx.shape_inference.infer_shapes(model, strict_mode=True)
        self.onnx.checker.check_model(model, full_check=True)
        return model


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
    """(hs [T, D, B, H], h_last [D, B, H]) of a layer, its state held where a sequence has ended."""
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
        mask = graph.real_steps(xs)
        has_step = graph.node("Cast", graph.lengths, to=graph.onnx.TensorProto.BOOL)
        has_step = graph.node("Unsqueeze", has_step, graph.axes(0, 2))
        h_last = graph.node("Where", has_step, h_last, start)
        held = h_last
        if directions == 2:  # backward has not begun where forward has ended
            forward = graph.node("Gather", h_last, graph.axes(0), axis=0)
            backward = graph.node("Gather", start, graph.axes(1), axis=0)
            backward = graph.node("Expand", backward, graph.node("Shape", forward))
            held = graph.node("Concat", forward, backward, axis=0)
        hs = graph.node("Where", mask, hs, graph.node("Unsqueeze", held, graph.axes(0)))
    graph.output(f"h_last_{number}", h_last, [directions, "B", hidden_size])
    return hs, h_last


def _library(function):
    """onnx, or how to get it."""
    try:
        import onnx
        import onnx.reference
    except ImportError as error:
        raise ImportError(f"{function}: needs onnx; install jaxgru[onnx].") from error
    return onnx


# What weights of exporters come through; nothing here grows its inputs.
_OF_CONSTANTS = {
    *("Cast", "Concat", "Constant", "DequantizeLinear", "Identity", "Reshape", "Slice", "Split"),
    *("Squeeze", "Transpose", "Unsqueeze"),
}
# Nodes that rearrange the outputs of a GRU, and which of their inputs those are.
_PLAIN = ("Identity", "ReduceSum", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_REARRANGED = dict.fromkeys(_PLAIN, 0) | {"Where": 1}


def _nodes(onnx, model, graph, known, outer=lambda name: None):
    """(node, value_of, below) of every GRU.

    value_of(name) is the value of a name, None where it varies, and below the name of the GRU whose
    outputs a node reads.
    """
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer} | known
    makers = {name: node for node in graph.node for name in node.output if name}

    def value_of(name):
        if name in values:
            return values[name]
        node = makers.get(name)
        if node is None:
            return outer(name)
        values[name] = None
        if node.op_type in _OF_CONSTANTS and node.domain in ("", "ai.onnx"):
            arguments = {i: value_of(i) for i in node.input if i}
            if all(v is not None for v in arguments.values()):
                values.update(zip(node.output, _evaluate(onnx, model, node, arguments)))
        return values[name]

    def below(name):
        node = makers.get(name)
        while node is not None and node.op_type in _REARRANGED:
            node = makers.get(node.input[_REARRANGED[node.op_type]])
        return _name_of(node) if node is not None and node.op_type == "GRU" else ""

    for node in graph.node:
        if node.op_type == "GRU" and node.domain in ("", "ai.onnx"):
            yield node, value_of, below(node.input[0] if node.input else "")
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from _nodes(onnx, model, inner, {}, value_of)


def _evaluate(onnx, model, node, arguments):
    """The outputs of a node, as the opset of its model has it."""
    helper = onnx.helper
    inputs, outputs = (
        [helper.make_empty_tensor_value_info(name) for name in names]
        for names in (arguments, node.output)
    )
    graph = helper.make_graph([node], "constants", inputs, outputs)
    alone = helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version, functions=[]
    )
    try:
        return onnx.reference.ReferenceEvaluator(alone).run(None, arguments)
    except Exception as error:  # whatever a malformed node raises
        raise ValueError(
            f"read_onnx: node {_name_of(node)!r} must be a whole {node.op_type}, got: {error}."
        ) from error


def _name_of(node):
    """A node's name, or that of its first output."""
    return node.name or next(filter(None, node.output), "")


def _read_node(onnx, node, value_of, below):
    """The OnnxGRU of a node."""
    name = _name_of(node)
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    names = [*node.input, *[""] * (6 - len(node.input))]
    weights = {label: value_of(source) for label, source in zip("WRB", names[1:4]) if source}
    for label, source in zip("WRB", names[1:4]):
        if source and weights[label] is None:
            raise ValueError(
                f"read_onnx: inputs must give {source!r}, the {label} of node {name!r}, which the "
                f"file does not hold: inputs={{{source!r}: array}}."
            )
    direction, count, layout = _form(name, attributes, weights)
    activation = _activation(name, attributes, count)
    imported = from_onnx(
        weights["W"],
        weights["R"],
        weights.get("B"),
        linear_before_reset=int(bool(attributes.get("linear_before_reset", 0))),
        activation=activation,
    )
    optional = {label: names[i] for i, label in _OPTIONAL_INPUTS.items()}
    held = {label: value_of(source) if source else None for label, source in optional.items()}
    computed = {k: source for k, source in optional.items() if source and held[k] is None}
    return OnnxGRU(name, *imported[:2], direction, layout, **held, computed=computed, below=below)


def _form(name: str, attributes: dict[str, Any], weights: dict[str, Any]) -> tuple[Any, int, int]:
    """(direction, D, layout) of a node; ValueError where attributes and weights do not fit."""
    direction = attributes.get("direction", b"forward")
    direction = direction.decode() if isinstance(direction, bytes) else direction
    require_choice("read_onnx", f"direction of {name!r}", direction, _DIRECTIONS)
    count, layout = 1 + (direction == "bidirectional"), attributes.get("layout", 0)
    require_choice("read_onnx", f"layout of {name!r}", str(layout), ("0", "1"))
    missing = [label for label in "WR" if label not in weights]
    if missing or any(weights[label].ndim != 3 for label in "WR"):
        raise ValueError(
            f"read_onnx: node {name!r} must have W [D, 3H, I] and R [D, 3H, H], got "
            f"{ {label: v.shape for label, v in weights.items()} }."
        )
    found = (len(weights["R"]), weights["R"].shape[2])
    if found != (count, attributes.get("hidden_size", found[1])):
        raise ValueError(
            f"read_onnx: node {name!r} must have R of {count} directions and its hidden_size, got "
            f"{found} for direction {direction!r} and hidden_size {attributes.get('hidden_size')}."
        )
    return direction, count, layout


def _activation(name, attributes, count):
    """The candidate's activation of a node; ValueError where this package cannot compute it."""
    if "clip" in attributes:
        raise ValueError(
            f"read_onnx: node {name!r} must have no clip, which this package has no derivative "
            f"for, got {attributes['clip']}."
        )
    found = [a.decode() for a in attributes.get("activations", [b"Sigmoid", b"Tanh"] * count)]
    pairs = {tuple(v.lower() for v in found[i : i + 2]) for i in range(0, len(found), 2)}
    known: Any = {onnx_name.lower(): ours for ours, onnx_name in ONNX_ACTIVATIONS.items()}
    gate, candidate = pairs.pop() if pairs else ("", "")
    affine = (attributes.get("activation_alpha"), attributes.get("activation_beta"))
    plain = candidate != "affine" or affine == ([1.0] * count, [0.0] * count)
    if len(found) != 2 * count or pairs or gate != "sigmoid" or candidate not in known or not plain:
        raise ValueError(
            f"read_onnx: node {name!r} must have the activations Sigmoid and one of "
            f"{', '.join(ONNX_ACTIVATIONS.values())} (Affine with alpha 1 and beta 0), the same in "
            f"both directions, got {found} with alpha {affine[0]} and beta {affine[1]}."
        )
    return known[candidate]
