"""Weights of Keras; `jaxgru.interop` describes all layouts and the shared arguments."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgru.core.parameters import Activation, GRUParams, GRUSpec
from jaxgru.interop import common
from jaxgru.interop.common import Exported, Imported, reorder
from jaxgru.stacks.forms import Bidirectional, as_stack, directions_of

_TARGETS = {  # by the spec's reset
    "after": common.Target("keras.layers.GRU"),
    "before": common.Target(
        "keras.layers.GRU", biases=1, merged="Keras has one bias where reset_after is False"
    ),
}


def from_keras(
    weights: Any, *, reset_after: bool | None = None, activation: Activation = "tanh"
) -> Imported:
    """Converts the weights of a Keras 3 `GRU`, `Bidirectional` or stack exactly, by reordering.

    kernel [I, 3H] and recurrent_kernel [H, 3H] in blocks z | r | n. bias [2, 3H], the input's row
    first, if the reset gate acts after the product (Keras's default); [3H] if it acts before. Run a
    layer with `go_backwards` with `reverse=True`; Keras returns its outputs in reversed order.

    Args:
      weights: `layer.get_weights()`, which for a `Bidirectional` has both directions; or a mapping
        with those names; or a list of these, for a stack.
      reset_after: the layer's option. It is required for a layer without bias; otherwise the shape
        of the bias shows it, and must agree.
      activation: the layer's; "identity" for "linear". Its recurrent_activation must be sigmoid.

    Returns: a `GRUParams`, a `Bidirectional` (run it with the layer's merge), or a stack.
    Raises: see `jaxgru.interop`; ValueError: reset_after is missing or contradicts the bias.

    >>> from_keras([np.ones((2, 9)), np.ones((3, 9)), np.ones((2, 9))]).params.spec.reset
    'after'
    """
    function = "from_keras"
    if reset_after is not None and not isinstance(reset_after, bool):
        raise TypeError(f"from_keras: reset_after must be a bool or None, got {reset_after!r}.")

    def cell(name, arrays):
        axes, bias = {"recurrent_kernel": "H 3H", "kernel": "I 3H"}, arrays.get("bias")
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
        if bias is not None:
            axes["bias"] = "2 3H" if after else "3H"
        arrays = {k: reorder(v) for k, v in common.bind(function, name, arrays, axes).items()}
        biases = (arrays.get("bias"), None)
        if bias is not None and after:
            biases = tuple(arrays["bias"])
        spec = GRUSpec("after" if after else "before", "keep", activation)
        return GRUParams(arrays["kernel"], arrays["recurrent_kernel"], *biases, spec=spec)

    def layer(name, source):
        if isinstance(source, Mapping):
            return cell(name, common.named_arrays(function, name, source))
        count = {2: 1, 3: 1, 4: 2, 6: 2}.get(len(source))
        if count is None:
            raise ValueError(
                f"from_keras: {name} must hold 2 or 3 arrays, or 4 or 6 of a Bidirectional, got "
                f"{len(source)}; for several layers give a list, [v.get_weights() for v in layers]."
            )
        each = len(source) // count
        names = ("kernel", "recurrent_kernel", "bias")[:each]
        arrays = [common.as_float_array(function, f"{name}[{i}]", v) for i, v in enumerate(source)]
        cells = [cell(name, dict(zip(names, v))) for v in (arrays[:each], arrays[each:])[:count]]
        return cells[0] if count == 1 else Bidirectional(*cells)

    if not isinstance(weights, Mapping | list | tuple):
        raise TypeError(
            "from_keras: weights must be a layer's get_weights(), a mapping, or a list of those, "
            f"got {type(weights).__name__}."
        )

    def is_layer(source):
        return isinstance(source, Mapping) or any(hasattr(v, "shape") for v in source)

    params = common.map_layers(function, "weights", weights, layer, is_layer)
    return Imported(common.require_fit(function, "weights", params), ())


def to_keras(params: Any) -> Exported:
    """Returns the arguments of `set_weights` of a Keras 3 `GRU` or `Bidirectional(GRU)`.

    With reset "before" Keras has one bias [3H], which is b_x + b_h.

    Args:
      params: see `jaxgru.interop`; of any equation.

    Returns: a list of arrays in the order of `get_weights`, and the arguments of
      `keras.layers.GRU`; for a stack lists of these, one entry per layer.
    Raises: see `jaxgru.interop`.

    >>> source = [np.ones((2, 9)), np.ones((3, 9)), np.ones((2, 9))]
    >>> exported = to_keras(from_keras(source).params)
    >>> [v.shape for v in exported.weights], exported.options["units"]
    ([(2, 9), (3, 9), (2, 9)], 3)
    """
    params, notes = common.require_exportable("to_keras", params, _TARGETS["after"])
    for reset, target in _TARGETS.items():
        layers = [v for v in as_stack(params) if directions_of(v)[0].spec.reset == reset]
        found = common.bias_notes(list(map(common.bias_counts, layers)), target)
        notes += [note for note in found if note not in notes]

    def arrays(cell, bias):
        after = cell.spec.reset == "after"
        b = np.stack(common.filled_biases(cell)) if after else common.merged_bias(cell)[0]
        return [reorder(v) for v in (cell.w_x, cell.w_h, b)[: 2 + bias]]

    def layer(params):
        bias, first = any(common.bias_counts(params)), directions_of(params)[0]
        activation = first.spec.activation
        options = {
            "units": first.w_h.shape[0],
            "activation": "linear" if activation == "identity" else activation,
            "reset_after": first.spec.reset == "after",
            "use_bias": bias,
        }
        return [v for cell in directions_of(params) for v in arrays(cell, bias)], options

    return common.export_layers(params, layer, notes)
