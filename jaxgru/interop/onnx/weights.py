"""The arrays of ONNX's GRU nodes, in and out; `jaxgru.interop.onnx.reading` has the files."""

from typing import Any

import numpy as np

from jaxgru.core.parameters import Activation, GRUSpec
from jaxgru.interop.common import (
    ALL_ACTIVATIONS,
    Exported,
    Imported,
    Target,
    as_float_array,
    bias_counts,
    bias_notes,
    bind,
    each_layer,
    filled_biases,
    is_stack,
    numpy_cell,
    reorder,
    require_exportable,
)
from jaxgru.stacks.forms import Bidirectional, directions_of


def from_onnx(
    w: Any,
    r: Any,
    b: Any = None,
    *,
    linear_before_reset: int = 0,
    activation: Activation = "tanh",
) -> Imported:
    """The inputs W, R and B of an ONNX `GRU` node: identical, reordered (`read_onnx` reads files).

    W [D, 3H, I], R [D, 3H, H] and B [D, 6H] = [Wb | Rb] in blocks z | r | h for D directions
    (ONNX operator GRU-22).

    Args:
      w: W.
      r: R.
      b: B, or None.
      linear_before_reset: the node's attribute; 1 resets after the product. ONNX's default is 0.
      activation: the node's second one.

    Returns:
      Imported: a `GRUParams`, or a `Bidirectional` for D = 2. A node of direction "reverse" is run
      with reverse=True.

    Raises:
      ValueError: shapes do not fit, or D is neither 1 nor 2.
      TypeError: an array is not floating, or dtypes differ.

    Cost: one copy of the arrays.

    >>> from_onnx(np.ones((2, 9, 4)), np.ones((2, 9, 3))).params.backward.w_x.shape
    (4, 9)
    """
    sources = {"R": r, "W": w} | ({} if b is None else {"B": b})
    arrays = {k: as_float_array("from_onnx", k, v) for k, v in sources.items()}
    bind(
        "from_onnx",
        "the node",
        arrays,
        {"R": "D 3H H", "W": "D 3H I"} | ({} if b is None else {"B": "D 6H"}),
    )
    count = arrays["R"].shape[0]
    if count not in (1, 2):
        raise ValueError(f"from_onnx: R must have one or two directions in front, got {count}.")

    def cell(d):
        biases = (None, None)
        if b is not None:
            biases = [reorder(v) for v in np.split(arrays["B"][d], 2)]
        kernels = (reorder(arrays[name][d].T) for name in ("W", "R"))
        return numpy_cell(*kernels, *biases, spec=spec)

    if linear_before_reset not in (0, 1):
        raise ValueError(
            f"from_onnx: linear_before_reset must be 0 or 1, got {linear_before_reset!r}."
        )
    spec = GRUSpec("after" if linear_before_reset else "before", "keep", activation)
    return Imported(cell(0) if count == 1 else Bidirectional(cell(0), cell(1)), ())


def to_onnx(params: Any) -> Exported:
    """The inputs of ONNX `GRU` nodes, one a layer; nothing is merged (`write_onnx` writes files).

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack, of any spec. Where the update gate
        writes, its weights and biases are negated.

    Returns:
      Exported: {"W": [D, 3H, I], "R": [D, 3H, H], "B": [D, 6H]}, without B where there is no bias,
      and the node's attributes; for a stack a list of each, one a layer.

    Raises:
      ValueError: params have gains.
      TypeError: params are of another kind.

    Cost: one copy of the arrays.

    >>> exported = to_onnx(from_onnx(np.ones((1, 9, 4)), np.ones((1, 9, 3))).params)
    >>> exported.options["hidden_size"], exported.options["linear_before_reset"]
    (3, 0)
    """
    return onnx_nodes("to_onnx", params)


def onnx_nodes(function: str, params: Any) -> Exported:
    """The inputs and attributes of a node a layer, for the function that is named in errors."""
    params, notes = require_exportable(
        function,
        params,
        Target("ONNX's GRU", ("before", "after"), activations=ALL_ACTIVATIONS),
    )
    layers = params if is_stack(params) else (params,)
    notes += bias_notes(list(map(bias_counts, layers)), 2)

    def layer(params):
        cells = directions_of(params)
        spec = cells[0].spec
        weights = {
            "W": np.stack([reorder(cell.w_x).T for cell in cells]),
            "R": np.stack([reorder(cell.w_h).T for cell in cells]),
        }
        if any(bias_counts(params)):
            pairs = [np.concatenate([reorder(v) for v in filled_biases(cell)]) for cell in cells]
            weights["B"] = np.stack(pairs)
        options = {
            "hidden_size": cells[0].w_h.shape[0],
            "direction": "forward" if len(cells) == 1 else "bidirectional",
            "linear_before_reset": int(spec.reset == "after"),
            "activations": ["Sigmoid", ONNX_ACTIVATIONS[spec.activation]] * len(cells),
        }
        if spec.activation == "identity":  # Affine is 1 x + 0; Sigmoid takes no numbers
            options["activation_alpha"] = [1.0] * len(cells)
            options["activation_beta"] = [0.0] * len(cells)
        return weights, options

    weights, options = each_layer(params, layer)
    return Exported(weights, options, tuple(notes))


ONNX_ACTIVATIONS = {
    "tanh": "Tanh",
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "softplus": "Softplus",
    "identity": "Affine",
}
