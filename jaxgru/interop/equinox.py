"""Weights of Equinox, in and out; `jaxgru.interop` has the table of all layouts."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgru.core.parameters import PYTORCH
from jaxgru.interop.common import (
    ONE_BIAS,
    Exported,
    Imported,
    Target,
    bias_counts,
    bias_notes,
    bind,
    exported_cells,
    merged_bias,
    named_arrays,
    numpy_cell,
    only_n,
    read_layers,
    require_exportable,
)


def from_equinox(cell: Any) -> Imported:
    """The weights of an `equinox.nn.GRUCell`.

    w_x = weight_ih^T, w_h = weight_hh^T, b_x = bias, b_h = [0 | 0 | bias_n].

    Args:
      cell: the module, or a mapping of its weight_ih [3H, I], weight_hh [3H, H], bias [3H] and
        bias_n [H] (both None or left out without bias); a list of them is a stack, a
        `Bidirectional` of them a layer.

    Returns:
      Imported: in the nesting of `cell`; their spec is `PYTORCH`.

    Raises:
      ValueError: names are missing, surplus or misshaped.
      TypeError: it is no such module and no mapping, or an array is not floating.

    Cost: one copy of the arrays.
    """
    biased = []

    def read(name, source):
        fields = ("weight_ih", "weight_hh", "bias", "bias_n")
        if all(hasattr(source, field) for field in fields):
            source = {field: getattr(source, field) for field in fields}
        if isinstance(source, Mapping):
            source = {k: v for k, v in source.items() if v is not None}
        arrays = named_arrays("from_equinox", name, source)
        bias = "bias" in arrays or "bias_n" in arrays
        axes = {"weight_hh": "3H H", "weight_ih": "3H I"}
        bind("from_equinox", name, arrays, axes | ({"bias": "3H", "bias_n": "H"} if bias else {}))
        biased.append(bias)
        biases = (arrays["bias"], only_n(arrays["bias_n"])) if bias else (None, None)
        w_x, w_h = arrays["weight_ih"].T, arrays["weight_hh"].T
        return numpy_cell(w_x, w_h, *biases, spec=PYTORCH)

    params = read_layers("from_equinox", cell, read)
    return Imported(params, (ONE_BIAS,) if any(biased) else ())


def to_equinox(params: Any) -> Exported:
    """The fields of an `equinox.nn.GRUCell`; the two biases of r and of z are summed.

    Put them into a module with
    `equinox.tree_at(lambda c: [getattr(c, k) for k in weights], cell, list(weights.values()))`.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack, whose spec has reset "after" and
        tanh.

    Returns:
      Exported: {"weight_ih": ..., "weight_hh": ..., "bias": ..., "bias_n": ...} for each cell, in
      the nesting of params, and the arguments of each cell.

    Raises:
      ValueError: Equinox has no such cell: reset before, another activation, or gains.
      TypeError: params are of another kind.

    Cost: one copy of the arrays.
    """
    params, notes = require_exportable(
        "to_equinox", params, Target("equinox.nn.GRUCell", ("after",))
    )
    bias = any(bias_counts(params))
    merged = "r and z have one bias in Equinox"
    notes += bias_notes([bias_counts(params)], 2, merged=merged)

    def write(name, cell):
        b, b_n = merged_bias(cell, "after")
        weights = {
            "weight_ih": np.ascontiguousarray(cell.w_x.T),
            "weight_hh": np.ascontiguousarray(cell.w_h.T),
        }
        return weights | ({"bias": b, "bias_n": b_n} if bias else {})

    def options(name, cell):
        sizes = {"input_size": cell.w_x.shape[0], "hidden_size": cell.w_h.shape[0]}
        return sizes | {"use_bias": bias}

    return exported_cells("to_equinox", params, write, options, notes)
