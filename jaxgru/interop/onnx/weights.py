"""The arrays of ONNX's GRU nodes; `jaxgru.interop.onnx.reading` reads files."""

from typing import Any

import numpy as np

from jaxgru.core.parameters import Activation, GRUParams
from jaxgru.interop import common
from jaxgru.interop.common import Exported, Imported, reorder
from jaxgru.stacks.forms import Bidirectional

_TARGETS = dict.fromkeys(("before", "after"), common.Target("ONNX's GRU"))
ONNX_ACTIVATIONS = {"tanh": "Tanh", "relu": "Relu", "sigmoid": "Sigmoid", "softplus": "Softplus"}
ONNX_ACTIVATIONS |= {"identity": "Affine"}


def from_onnx(
    w: Any, r: Any, b: Any = None, *, linear_before_reset: int = 0, activation: Activation = "tanh"
) -> Imported:
    """Converts the inputs W, R and B of an ONNX `GRU` node exactly; `read_onnx` reads files.

    W [D, 3H, I], R [D, 3H, H] and B [D, 6H] = [Wb | Rb] in blocks z | r | h for D directions
    (ONNX operator GRU-22).

    Args:
      w, r, b: W, R, and B or None.
      linear_before_reset: the node's attribute; 1 applies the reset gate after the product. ONNX's
        default is 0.
      activation: the second entry of the node's attribute `activations`.

    Returns: a `GRUParams`, or a `Bidirectional` for D = 2. Run a node of direction "reverse" with
      reverse=True.
    Raises: as `from_linen`; ValueError: D is neither 1 nor 2.

    >>> from_onnx(np.ones((2, 9, 4)), np.ones((2, 9, 3))).params.backward.w_x.shape
    (4, 9)
    """
    sources = {"R": r, "W": w, "B": b}
    arrays = {
        k: common.as_float_array("from_onnx", k, v) for k, v in sources.items() if v is not None
    }
    axes = {"R": "D 3H H", "W": "D 3H I", "B": "D 6H"}
    count = len(common.bind("from_onnx", "the node", arrays, axes, ("B",))["R"])
    if count not in (1, 2):
        raise ValueError(f"from_onnx: R must have one or two directions (axis 0), got {count}.")
    if linear_before_reset not in (0, 1):
        raise ValueError(
            f"from_onnx: linear_before_reset must be 0 or 1, got {linear_before_reset!r}."
        )
    spec = common.spec_of("from_onnx", "after" if linear_before_reset else "before", activation)

    def cell(d):
        biases = (None, None) if b is None else map(reorder, np.split(arrays["B"][d], 2))
        return GRUParams(*(reorder(arrays[k][d].T) for k in "WR"), *biases, spec=spec)

    return Imported(cell(0) if count == 1 else Bidirectional(cell(0), cell(1)), ())


def to_onnx(params: Any) -> Exported:
    """Returns the inputs of ONNX `GRU` nodes, one per layer; `write_onnx` writes files.

    Args:
      params: as in `to_torch`; of any equation. No biases are summed.

    Returns: {"W": [D, 3H, I], "R": [D, 3H, H], "B": [D, 6H]}, without B if there is no bias, and
      the node's attributes; for a stack lists of these, one entry per layer.
    Raises: as `to_torch`.

    >>> exported = to_onnx(from_onnx(np.ones((1, 9, 4)), np.ones((1, 9, 3))).params)
    >>> exported.options["hidden_size"], exported.options["linear_before_reset"]
    (3, 0)
    """
    return onnx_nodes("to_onnx", params)


def onnx_nodes(function: str, params: Any, argument: str = "params") -> Exported:
    """The inputs and attributes of one node per layer; errors name the function."""

    def write(cells):
        spec, count = cells[0].spec, len(cells)
        weights = {
            "W": np.stack([reorder(cell.w_x).T for cell in cells]),
            "R": np.stack([reorder(cell.w_h).T for cell in cells]),
        }
        if cells[0].b_x is not None:
            pairs = [[reorder(cell.b_x), reorder(cell.b_h)] for cell in cells]
            weights["B"] = np.stack(list(map(np.concatenate, pairs)))
        options = {
            "hidden_size": cells[0].w_h.shape[0],
            "direction": "forward" if count == 1 else "bidirectional",
            "linear_before_reset": int(spec.reset == "after"),
            "activations": ["Sigmoid", ONNX_ACTIVATIONS[spec.activation]] * count,
        }
        if spec.activation == "identity":  # Affine computes 1 x + 0; Sigmoid takes no numbers
            options |= {"activation_alpha": [1.0] * count, "activation_beta": [0.0] * count}
        return weights, options

    return common.export_layers(function, params, _TARGETS, write, argument)
