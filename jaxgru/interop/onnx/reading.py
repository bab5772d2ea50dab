"""Reads the GRU nodes of ONNX files; needs the extra `onnx`."""

import functools
import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxgru.core.checks import require_choice
from jaxgru.extras import require_extra
from jaxgru.interop.onnx.stacks import Stacks
from jaxgru.interop.onnx.weights import ONNX_ACTIVATIONS, from_onnx

_INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h")
# Operators that exporters use to compute weights; the outputs of each are no larger than its
# inputs.
_OF_CONSTANTS = {
    *("Cast", "Concat", "Constant", "DequantizeLinear", "Identity", "Reshape", "Slice", "Split"),
    *("Squeeze", "Transpose", "Unsqueeze"),
}


class OnnxGRU(NamedTuple):
    """A GRU node of an ONNX model, with D directions (ONNX operator GRU-22).

    Attributes:
      name: the node's name, or that of its first output.
      params: a `GRUParams`, or a `Bidirectional`, of NumPy arrays.
      direction: "forward", "reverse" (run it with reverse=True) or "bidirectional".
      layout: 0 for time first, with outputs [T, D, B, H] and [D, B, H]; 1 for batch first.
      initial_h: [D, B, H] ([B, D, H] in layout 1) if the file holds it, else None.
      sequence_lens: [B] if the file holds it, else None.
      computed: {"initial_h": name, "sequence_lens": name} of those that are inputs of the graph or
        that it computes. A run of this node needs their values.
      below: the name of the GRU node whose outputs Y, at all valid steps and with the directions
        side by side or summed, are proven to be this node's inputs X; "" otherwise, and also if the
        two differ in their sequence_lens, if the initial state depends on the data, if a direction
        is "reverse", in a subgraph, or if several nodes have that name.
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
    path: str | os.PathLike, *, inputs: Mapping[str, Any] | None = None
) -> tuple[OnnxGRU, ...]:
    """Reads every GRU node of an ONNX file and its subgraphs, in the graph's order.

    Weights may be initializers, or results of nodes that depend only on constants (slices,
    transposes, ...).

    Args:
      path: the path of the model.
      inputs: values of graph inputs by name, for models whose weights are inputs.

    Returns: an `OnnxGRU` for each node. Nodes that follow one another (see `below`) are the stack
      `tuple(node.params for node in nodes)`.

    Raises:
      ImportError, OSError: onnx is not installed, or the file cannot be read.
      ValueError: the file is not an intact ONNX model or has no GRU node; inputs has an unknown
        name; or a node has clip, unsupported activations, an attribute or shape that the operator
        does not allow, or weights that depend on inputs without a value.
      TypeError: weights are not floating.
    """
    onnx = require_extra("read_onnx", "onnx", "onnx.reference")
    with open(path, "rb") as opened:
        try:
            model = onnx.load(opened, format="protobuf")
        except Exception as error:  # protobuf's DecodeError, onnx's ValidationError, or an OSError
            raise ValueError(
                f"read_onnx: {path} must be an intact ONNX model, got: {error}."
            ) from error
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
        raise ValueError(
            f"read_onnx: {path} must compute its weights with fewer nodes, got a chain of nodes "
            "beyond Python's recursion limit."
        ) from error
    if not found:
        raise ValueError(f"read_onnx: {path} must hold a GRU node of ONNX, got none.")
    names = [node.name for node in found]
    return tuple(v._replace(below="") if names.count(v.below) > 1 else v for v in found)


def _nodes(onnx, model, graph, known, outer=None):
    """(node, value_of, below) of every GRU.

    value_of(name) is the value of a name, or None if it is not constant. `below` is the GRU node
    whose outputs this node reads, or None.
    """
    evaluate = functools.partial(_evaluate, onnx, model)
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer} | known
    makers = {name: node for node in graph.node for name in node.output if name}

    def value_of(name):
        if name in values:
            return values[name]
        node = makers.get(name)
        if node is None:
            return outer(name) if outer else None
        values[name] = None
        if node.op_type in _OF_CONSTANTS and node.domain in ("", "ai.onnx"):
            arguments = {i: value_of(i) for i in node.input if i}
            if all(v is not None for v in arguments.values()):
                values.update(zip(node.output, evaluate(node, arguments)))
        return values[name]

    stacks = None if outer else Stacks(onnx, model, value_of, evaluate)
    for node in graph.node:
        if node.op_type == "GRU" and node.domain in ("", "ai.onnx"):
            yield node, value_of, stacks.below(node) if stacks and node.input else None
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from _nodes(onnx, model, inner, {}, value_of)


def _evaluate(onnx, model, node, arguments):
    """The outputs of a node, computed with the opset of its model."""
    helper = onnx.helper
    infos = (map(helper.make_empty_tensor_value_info, names) for names in (arguments, node.output))
    graph = helper.make_graph([node], "constants", *infos)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    try:
        return onnx.reference.ReferenceEvaluator(graph, opsets).run(None, arguments)
    except Exception as error:  # a malformed node can raise any error
        raise ValueError(
            f"read_onnx: node {_name_of(node)!r} must be a valid {node.op_type}, got: {error}."
        ) from error


def _name_of(node):
    """A node's name, or that of its first output; "" for None."""
    return "" if node is None else node.name or next(filter(None, node.output), "")


def _read_node(onnx, node, value_of, below):
    """The OnnxGRU of a node."""
    name = _name_of(node)
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    sources = {label: source for label, source in zip(_INPUTS, node.input) if source}
    values = {label: value_of(source) for label, source in sources.items()}
    for label in "WRB":
        if label in sources and values[label] is None:
            source = sources[label]
            raise ValueError(
                f"read_onnx: inputs must hold {source!r}, the {label} of node {name!r}, which the "
                f"file does not hold: pass inputs={{{source!r}: array}}."
            )
    weights = {label: values[label] for label in "WRB" if label in values}
    direction, count, layout = _form(name, attributes, weights)
    activation, after = _activation(name, attributes, count), attributes.get("linear_before_reset")
    params, _ = from_onnx(
        *(weights.get(label) for label in "WRB"),
        linear_before_reset=int(bool(after)),
        activation=activation,
    )
    held = {label: values.get(label) for label in _INPUTS[4:]}
    computed = {k: sources[k] for k, value in held.items() if k in sources and value is None}
    form = (name, params, direction, layout)
    return OnnxGRU(*form, **held, computed=computed, below=_name_of(below))


def _form(name, attributes, weights) -> tuple[Any, int, int]:
    """(direction, D, layout) of a node; ValueError if its attributes and weights do not fit."""
    direction = attributes.get("direction", b"forward")
    direction = direction.decode() if isinstance(direction, bytes) else direction
    directions = ("forward", "reverse", "bidirectional")
    require_choice("read_onnx", f"direction of {name!r}", direction, directions)
    count, layout = 1 + (direction == "bidirectional"), attributes.get("layout", 0)
    require_choice("read_onnx", f"layout of {name!r}", str(layout), ("0", "1"))
    found = {label: v.shape for label, v in weights.items()}
    size = attributes.get("hidden_size", (found.get("R") or (0,))[-1])
    if found.get("R") != (count, 3 * size, size) or len(found.get("W", ())) != 3:
        raise ValueError(
            f"read_onnx: node {name!r} must have W [D, 3H, I] and R [D, 3H, H], got {found} for "
            f"direction {direction!r} and hidden_size {attributes.get('hidden_size')}."
        )
    return direction, count, layout


def _activation(name, attributes, count):
    """The candidate's activation of a node; ValueError if this package cannot compute it."""
    if "clip" in attributes:
        raise ValueError(
            f"read_onnx: node {name!r} must have no clip, which this package does not compute, got "
            f"{attributes['clip']}."
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
