"""Weights of Keras, in and out; `jaxgru.interop` has the table of all layouts."""

from collections.abc import Mapping
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
    map_layers,
    merged_bias,
    named_arrays,
    numpy_cell,
    reorder,
    require_exportable,
    require_fit,
)
from jaxgru.stacks.forms import Bidirectional, directions_of


def from_keras(
    weights: Any, *, reset_after: bool | None = None, activation: Activation = "tanh"
) -> Imported:
    """The weights of a Keras 3 `GRU` layer, a `Bidirectional` or a stack: identical, reordered.

    kernel [I, 3H] and recurrent_kernel [H, 3H] in blocks z | r | n; bias [2, 3H], the input's row
    first, where the reset gate acts after the product (Keras's default), [3H] where before it. A
    layer with `go_backwards` is run with `reverse=True`; Keras gives its outputs last step first.

    Args:
      weights: of a layer, `layer.get_weights()`, for a `Bidirectional` of both directions; or a
        mapping with those names; or a list of these, a stack.
      reset_after: the layer's, for a layer without bias; else its shape tells, and must agree.
      activation: the layer's; "identity" for "linear". Its recurrent_activation must be sigmoid.

    Returns:
      Imported: a `GRUParams`, a `Bidirectional` (run it with the merge that the layer had), or a
      stack of them.

    Raises:
      ValueError: arrays are missing, surplus or misshaped; reset_after is not given where nothing
        else tells, or contradicts the bias.
      TypeError: an array is not floating.

    Cost: one copy of the arrays.

    >>> from_keras([np.ones((2, 9)), np.ones((3, 9)), np.ones((2, 9))]).params.spec.reset
    'after'
    """
    function = "from_keras"
    if reset_after is not None and not isinstance(reset_after, bool):
        raise TypeError(f"from_keras: reset_after must be a bool or None, got {reset_after!r}.")

    def cell(name, arrays):
        axes = {"recurrent_kernel": "H 3H", "kernel": "I 3H"}
        bias = arrays.get("bias")
        after = reset_after if bias is None else bias.ndim == 2
        if after is None:
            raise ValueError(
                f"from_keras: reset_after must be True or False for {name}, which has no bias that "
                "tells, got None."
            )
        if bias is not None and reset_after not in (None, after):
            raise ValueError(
                f"from_keras: reset_after must be {after} for a bias of shape {bias.shape}, got "
                f"{reset_after}."
            )
        if bias is not None:
            axes["bias"] = "2 3H" if after else "3H"
        arrays = {k: reorder(v) for k, v in bind(function, name, arrays, axes).items()}
        biases = (None, None)
        if bias is not None:
            biases = tuple(arrays["bias"]) if after else (arrays["bias"], None)
        spec = GRUSpec("after" if after else "before", "keep", activation)
        return numpy_cell(arrays["kernel"], arrays["recurrent_kernel"], *biases, spec=spec)

    def layer(name, source):
        if isinstance(source, Mapping):
            return cell(name, named_arrays(function, name, source))
        count = {2: 1, 3: 1, 4: 2, 6: 2}.get(len(source))
        if count is None:
            raise ValueError(
                f"from_keras: {name} must hold 2 or 3 arrays, or 4 or 6 of a Bidirectional, got "
                f"{len(source)}; of several layers give a list, [v.get_weights() for v in layers]."
            )
        each = len(source) // count
        names = ("kernel", "recurrent_kernel", "bias")[:each]
        arrays = [as_float_array(function, f"{name}[{i}]", v) for i, v in enumerate(source)]
        parts = [arrays[:each], arrays[each:]][:count]
        cells = [cell(name, dict(zip(names, part))) for part in parts]
        return cells[0] if count == 1 else Bidirectional(*cells)

    if not isinstance(weights, Mapping | list | tuple):
        raise TypeError(
            "from_keras: weights must be a layer's get_weights(), a mapping, or a list of those, "
            f"got {type(weights).__name__}."
        )
    params = map_layers(function, "weights", weights, layer, _is_keras_layer)
    require_fit(function, "weights", params)
    return Imported(params, ())


def _is_keras_layer(source):
    """True for one layer's list of arrays, or its mapping."""
    return isinstance(source, Mapping) or any(hasattr(v, "shape") for v in source)


def to_keras(params: Any) -> Exported:
    """What `set_weights` of a Keras 3 `GRU` or `Bidirectional(GRU)` takes.

    With reset "before" Keras has one bias [3H]: b_x + b_h.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack, of any spec. Where the update gate
        writes, its weights and biases are negated.

    Returns:
      Exported: a list of arrays in the order of `get_weights`, and the arguments of `keras.layers.
      GRU`; for a stack a list of each, one a layer.

    Raises:
      ValueError: params have gains.
      TypeError: params are of another kind.

    Cost: one copy of the arrays.

    >>> source = [np.ones((2, 9)), np.ones((3, 9)), np.ones((2, 9))]
    >>> exported = to_keras(from_keras(source).params)
    >>> [v.shape for v in exported.weights], exported.options["units"]
    ([(2, 9), (3, 9), (2, 9)], 3)
    """
    params, notes = require_exportable(
        "to_keras",
        params,
        Target("keras.layers.GRU", ("before", "after"), activations=ALL_ACTIVATIONS),
    )
    layers = params if is_stack(params) else (params,)
    for after in (True, False):
        counts = [bias_counts(layer) for layer in layers if _resets_after(layer) == after]
        merged = "" if after else "Keras has one bias where reset_after is False"
        notes += [n for n in bias_notes(counts, 2 if after else 1, merged=merged) if n not in notes]

    def arrays(cell, bias):
        after = cell.spec.reset == "after"
        b = np.stack(filled_biases(cell)) if after else merged_bias(cell, "before")[0]
        kernels = [reorder(cell.w_x), reorder(cell.w_h)]
        return kernels + ([reorder(b)] if bias else [])

    def layer(params):
        bias, first = any(bias_counts(params)), directions_of(params)[0]
        activation = first.spec.activation
        options = {
            "units": first.w_h.shape[0],
            "activation": "linear" if activation == "identity" else activation,
            "reset_after": _resets_after(params),
            "use_bias": bias,
        }
        return [v for cell in directions_of(params) for v in arrays(cell, bias)], options

    weights, options = each_layer(params, layer)
    return Exported(weights, options, tuple(notes))


def _resets_after(layer):
    """Whether the reset gate of a layer acts after the product."""
    return directions_of(layer)[0].spec.reset == "after"
