"""Weights of Keras."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgru.core.parameters import Activation, GRUParams
from jaxgru.interop import common
from jaxgru.interop.common import Exported, Imported, reorder
from jaxgru.stacks.forms import Bidirectional

_MERGED = "Keras has one bias where reset_after is False"
_TARGETS = {
    "after": common.Target("keras.layers.GRU"),
    "before": common.Target("keras.layers.GRU", biases=1, merged=_MERGED),
}
NAMES = ("kernel", "recurrent_kernel", "bias")  # in the order of get_weights


def from_keras(
    weights: Any, *, reset_after: bool | None = None, activation: Activation = "tanh"
) -> Imported:
    """Converts the weights of a Keras 3 `GRU`, `Bidirectional` or stack exactly, by reordering.

    kernel [I, 3H] and recurrent_kernel [H, 3H] in blocks z | r | n. bias [2, 3H], the input's row
    first, if the reset gate acts after the product (Keras's default); [3H] if it acts before. Run a
    layer with `go_backwards` with `reverse=True`; Keras returns its outputs in reversed order.

    `model.get_weights()` of two stacked GRUs with I = H has the same shapes as that of one
    `Bidirectional`, and is read as such. Give the layers apart:
    `[v.get_weights() for v in model.layers]`, of its GRU layers alone.

    Args:
      weights: `layer.get_weights()`, which for a `Bidirectional` has both directions; or a mapping
        with those names; or a list of these, for a stack.
      reset_after: the layer's option. It is required for a layer without bias; otherwise the shape
        of the bias shows it, and must agree.
      activation: the layer's; "identity" for "linear". Its recurrent_activation must be sigmoid.

    Returns: a `GRUParams`, a `Bidirectional` (run it with the layer's merge), or a stack.
    Raises: as `from_linen`; ValueError: reset_after is missing or contradicts the bias.

    >>> from_keras([np.ones((2, 9)), np.ones((3, 9)), np.ones((2, 9))]).params.spec.reset
    'after'
    """
    function = "from_keras"
    if reset_after is not None and not isinstance(reset_after, bool):
        raise TypeError(f"from_keras: reset_after must be a bool or None, got {reset_after!r}.")

    def cell(name, arrays):
        bias = arrays.get("bias")
        after = reset_after if bias is None else bias.ndim == 2
        if after is None:
            raise ValueError(
                f"from_keras: reset_after must be True or False for {name}, which has no bias "
                "whose shape shows it, got None."
            )
        if bias is not None and reset_after not in (None, after):
            raise ValueError(
                f"from_keras: reset_after must be {after} for a bias of shape {bias.shape}, got "
                f"{reset_after}."
            )
        axes = {"recurrent_kernel": "H 3H", "kernel": "I 3H", "bias": "2 3H" if after else "3H"}
        common.bind(function, name, arrays, axes, ("bias",))
        w_x, w_h, *biases = (reorder(arrays[key]) for key in NAMES if key in arrays)
        if bias is not None and after:
            biases = biases[0]  # [2, 3H], one row each
        spec = common.spec_of(function, "after" if after else "before", activation)
        return GRUParams(w_x, w_h, *biases, spec=spec)

    def layer(name, source):
        if isinstance(source, Mapping):
            return cell(name, common.named_arrays(function, name, source))
        if not isinstance(source, list | tuple):
            raise TypeError(
                f"from_keras: {name} must be a layer's get_weights(), a mapping, or a list of "
                f"those, got {type(source).__name__}."
            )
        if len(source) not in (2, 3, 4, 6):
            raise ValueError(
                f"from_keras: {name} must hold 2 or 3 arrays, or 4 or 6 of a Bidirectional, got "
                f"{len(source)}; for several layers give a list, [v.get_weights() for v in layers]."
            )
        arrays = [common.as_float_array(function, f"{name}[{i}]", v) for i, v in enumerate(source)]
        cells = [cell(name, named) for named in name_directions(arrays)]
        return Bidirectional(*cells) if len(cells) == 2 else cells[0]

    def is_stack(source):
        return common.is_stack(source) and not any(hasattr(v, "shape") for v in source)

    return Imported(common.read_layers(function, "weights", weights, layer, is_stack), ())


def name_directions(arrays: list[Any]) -> list[dict[str, Any]]:
    """{name: array} of the one or two directions of a layer, from its get_weights()."""
    each = len(arrays) // 2 if len(arrays) > 3 else len(arrays)
    return [dict(zip(NAMES, arrays[i : i + each])) for i in range(0, len(arrays), each)]


def to_keras(params: Any) -> Exported:
    """Returns the arguments of `set_weights` of a Keras 3 `GRU` or `Bidirectional(GRU)`.

    With reset "before" Keras has one bias [3H], which is b_x + b_h.

    Args:
      params: as in `to_torch`; of any equation.

    Returns: a list of arrays in the order of `get_weights`, and the arguments of
      `keras.layers.GRU`; for a stack lists of these, one entry per layer.
    Raises: as `to_torch`.

    >>> source = [np.ones((2, 9)), np.ones((3, 9)), np.ones((2, 9))]
    >>> exported = to_keras(from_keras(source).params)
    >>> [v.shape for v in exported.weights], exported.options["units"]
    ([(2, 9), (3, 9), (2, 9)], 3)
    """

    def write(cells):
        spec, bias, weights = cells[0].spec, cells[0].b_x is not None, []
        after = spec.reset == "after"
        for cell in cells:
            weights += [reorder(cell.w_x), reorder(cell.w_h)]
            if bias:
                weights.append(reorder(np.stack([cell.b_x, cell.b_h]) if after else cell.b_x))
        return weights, {
            "units": cells[0].w_h.shape[0],
            "activation": "linear" if spec.activation == "identity" else spec.activation,
            "reset_after": after,
            "use_bias": bias,
        }

    return common.export_layers("to_keras", params, _TARGETS, write)
