"""Finds the GRU nodes of an ONNX graph whose inputs are exactly the outputs of another GRU node.

The operators between the two are evaluated on random numbers, for several T and B and for lengths.
Only operators that move entries, or sum them, may read these numbers, so their equality is a proof.
"""

import math
from typing import Any

import numpy as np

# The operators that may stand between two GRUs, and which of their inputs may depend on the data.
_OPERATORS: dict[str, Any] = dict.fromkeys(
    ("Cast", "Dropout", "Expand", "Flatten", "Gather", "Identity", "ReduceSum", "Reshape", "Shape",
     "Split", "Squeeze", "Transpose", "Unsqueeze"), (0,)
)  # fmt: skip
_OPERATORS |= {"Concat": range(2**31), "Where": (1, 2), "Less": (), "Range": ()}
_DOMAINS = ("", "ai.onnx")
_MOST = 2**26  # entries of an array between two GRUs


class _Unproven(Exception):
    """The operators between two nodes may change the numbers."""


class Stacks:
    """The GRU nodes of one graph; `value_of` and `evaluate` are those of its reader."""

    def __init__(self, onnx, model, value_of, evaluate):
        graph, self.helper = model.graph, onnx.helper
        self.nodes, self.value_of, self.evaluate = graph.node, value_of, evaluate
        self.opset = max((v.version for v in model.opset_import if v.domain in _DOMAINS), default=0)
        self.makers = {name: node for node in graph.node for name in node.output if name}
        self.lower = {}  # the GRU below a node, by the name of the node's first output
        self.known: dict[str, Any] = {}  # see `_start`

    def attribute(self, node, name):
        return {v.name: self.helper.get_attribute_value(v) for v in node.attribute}.get(name)

    def below(self, upper):
        """The GRU node whose outputs Y are the inputs X of this one, or None."""
        lower: Any = self.makers.get(upper.input[0])
        for _ in self.nodes:
            if places := _OPERATORS.get(getattr(lower, "op_type", ""), ()):
                lower = self.makers.get(lower.input[places[0]])
        if lower is None or (lower.op_type, lower.domain in _DOMAINS) != ("GRU", True):
            return None
        try:
            if not self._reads_outputs(lower, upper):
                return None
        except Exception:  # _Unproven, or any error of a malformed node
            return None
        self.lower[upper.output[0]] = lower
        return lower

    def _reads_outputs(self, lower, upper):
        """True if X of `upper` is proven to be Y of `lower`."""
        directions = {self.attribute(node, "direction") for node in (lower, upper)}
        if b"reverse" in directions or _input(lower, 4) != _input(upper, 4):
            return False
        if self._leaves(_input(upper, 5)) & self._leaves(upper.input[0]):
            return False  # the initial state depends on the data
        count, _, size = self.value_of(lower.input[2]).shape
        first, second, third = [n for n in range(2, 9) if n not in (count, size, count * size)][:3]
        rng = np.random.default_rng(0)
        for steps, batch in ((second, first), (first, third)):
            y = rng.random((steps, count, batch, size))
            side_by_side = y.transpose(0, 2, 1, 3).reshape(steps, batch, -1)
            for lengths in (np.full(batch, steps), np.arange(batch) % (steps + 1)):
                self.known = self._start(lower, y, lengths)
                got: Any = self._get(upper.input[0])[0]
                if self.attribute(upper, "layout"):
                    got = got.transpose(1, 0, 2)
                valid = np.arange(steps)[:, None] < lengths
                if not any(
                    got.shape == wanted.shape and np.array_equal(got[valid], wanted[valid])
                    for wanted in (side_by_side, y.sum(axis=1))
                ):
                    return False
        return True

    def _leaves(self, name):
        """The inputs of the graph on which a value depends, but not by its shape.

        "" stands for a GRU or a subgraph.
        """
        leaves, seen, waiting = set(), set(), [name] if name else []
        while waiting:
            name = waiting.pop()
            node = self.makers.get(name)
            if name in seen or self.value_of(name) is not None:
                continue
            seen.add(name)
            if node is None:
                leaves.add(name)
            elif node.op_type != "Shape":
                opaque = node.op_type == "GRU" or any(v.HasField("g") for v in node.attribute)
                leaves |= {""} if opaque or not node.input else set()
                waiting += filter(None, node.input[:1] if node.op_type == "GRU" else node.input)
        return leaves

    def _start(self, lower, y, lengths):
        """{name: (array, kinds)} for the outputs y of the lower node and for lengths.

        The kinds are "data" if it depends on the inputs or the GRUs, "lengths" if on the lengths,
        "shape" if on T or B. What is neither y nor computed from it is NaN.
        """
        (steps, _, batch, _), node, known = y.shape, lower, {}
        self.dtype = self.value_of(lower.input[1]).dtype
        while node is not None:  # all nodes of the stack have one T and B
            count, _, size = self.value_of(node.input[1]).shape
            hidden_size = self.value_of(node.input[2]).shape[2]
            shapes = [(steps, batch, size), (count, batch, hidden_size)]
            if self.attribute(node, "layout"):
                shapes = [(batch, steps, size), (batch, count, hidden_size)]
            places = zip((node.input[0], _input(node, 5), *node.output[1:]), (*shapes, shapes[1]))
            known |= {name: (np.full(shape, np.nan), {"data"}) for name, shape in places}
            node = self.lower.get(node.output[0])
        known[lower.output[0]] = y, {"data"}
        if self.attribute(lower, "layout"):
            known[lower.output[0]] = y.transpose(2, 0, 1, 3), {"data"}
        known[_input(lower, 4)] = lengths, {"lengths"}  # "" if there are none
        return known

    def _get(self, name):
        """(array, kinds) of a value; _Unproven if it may be more than data in another place."""
        if name in self.known and name:
            return self.known[name]
        if (constant := self.value_of(name)) is not None:
            exact = constant.dtype.kind in "iub"
            return constant if exact else constant.astype(np.float64), set()
        node: Any = self.makers.get(name)
        places: Any = _OPERATORS.get(getattr(node, "op_type", ""))
        if places is None or node.domain not in _DOMAINS:
            raise _Unproven
        entries = [self._get(i) if i else (None, set()) for i in node.input]
        arrays, kinds = [v for v, _ in entries], set().union(*(kinds for _, kinds in entries))
        if any("data" in kinds and n not in places for n, (_, kinds) in enumerate(entries)):
            raise _Unproven
        self._require(node, arrays, [kinds for _, kinds in entries])
        unchanged = node.op_type in ("Cast", "Dropout") and name == node.output[0]
        if "data" in kinds and unchanged:
            return arrays[0], kinds
        kinds = {"shape"} if node.op_type == "Shape" else kinds
        arguments = {i: v for i, v in zip(node.input, arrays) if i}
        for output, value in zip(node.output, self.evaluate(node, arguments)):
            self.known[output] = np.asarray(value), kinds
        return self.known[name]

    def _require(self, node, arrays, kinds):
        """Raises _Unproven if an operator does more than move entries here, or makes too many."""
        size, operator = sum(v.size for v in arrays if v is not None), node.op_type
        proven = True
        if operator == "Cast" and "data" in kinds[0]:  # to the dtype of the weights
            to = self.helper.tensor_dtype_to_np_dtype(self.attribute(node, "to"))
            proven = to == self.dtype
        elif operator == "Dropout":
            training = arrays[2] if len(arrays) > 2 else None
            proven = self.opset >= 7 and (training is None or not training.any())
        elif operator == "Less":  # a step is valid
            proven = kinds == [{"shape"}, {"lengths"}]
        elif operator == "Where":
            proven = kinds[0] == {"shape", "lengths"} or kinds[0] == {"lengths"}
        elif operator == "Gather":
            size = arrays[0].size * arrays[1].size
        elif operator == "Expand":
            size = math.prod(np.broadcast_shapes(arrays[0].shape, tuple(arrays[1].tolist())))
        elif operator == "Range":
            start, limit, step = (v.item() for v in arrays)
            size = abs(limit - start) / abs(step)
        if not proven or size > _MOST:
            raise _Unproven


def _input(node, number):
    """The name of an input of a node; "" if it is absent."""
    return node.input[number] if len(node.input) > number else ""
