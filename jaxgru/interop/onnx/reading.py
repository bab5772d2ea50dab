"""GRU nodes of ONNX files; extra `onnx`.

A node's sequence is [T, B, I] (layout 0) or [B, T, I] (layout 1), its outputs Y [T, D, B, H] or
[B, T, D, H] and Y_h [D, B, H] or [B, D, H] for D directions (ONNX operator GRU-22). Where a
sequence has ended Y is zero, and Y_h of one without a step is zero too, whatever initial_h was
(onnxruntime does the same). `jaxgru.gru` repeats the last state there instead, and so do the files
of `write_onnx`.
"""

import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxgru.core.checks import require_choice, require_extra
from jaxgru.interop.onnx.weights import ONNX_ACTIVATIONS, from_onnx

Array = jax.Array
_DIRECTIONS: Any = ("forward", "reverse", "bidirectional")
_OPTIONAL_INPUTS = {4: "sequence_lens", 5: "initial_h"}


class OnnxGRU(NamedTuple):
    """A GRU node of an ONNX model.

    Attributes:
      name: the node's, or that of its first output.
      params: a `GRUParams`, or a `Bidirectional`, of NumPy arrays.
      direction: "forward", "reverse" (run it with reverse=True) or "bidirectional".
      layout: 0 for time first, 1 for batch first.
      initial_h: [D, B, H] ([B, D, H] in layout 1) where the file holds it, else None.
      sequence_lens: [B] where the file holds it, else None.
      computed: {"initial_h": name, "sequence_lens": name} of those that the graph is given or
        computes. A run of this node needs their values.
      below: the name of the GRU node whose outputs, at most rearranged or held where a sequence has
        ended, are this one's inputs; "" where it reads anything else.
    """

    name: str
    params: Any
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
      `tuple(node.params for node in nodes)`.

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
    onnx = require_extra("read_onnx", "onnx", "onnx.reference")
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
        places = _nodes(onnx, model, model.graph, given)
        found = tuple(_read_node(onnx, *place) for place in places)
    except RecursionError as error:
        raise ValueError(f"read_onnx: {file} must not nest nodes so deeply.") from error
    if not found:
        raise ValueError(f"read_onnx: {file} must hold a GRU node of ONNX, got none.")
    return found


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
    params, _ = from_onnx(
        weights["W"],
        weights["R"],
        weights.get("B"),
        linear_before_reset=int(bool(attributes.get("linear_before_reset", 0))),
        activation=activation,
    )
    optional = {label: names[i] for i, label in _OPTIONAL_INPUTS.items()}
    held = {label: value_of(source) if source else None for label, source in optional.items()}
    computed = {k: source for k, source in optional.items() if source and held[k] is None}
    return OnnxGRU(name, params, direction, layout, **held, computed=computed, below=below)


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
