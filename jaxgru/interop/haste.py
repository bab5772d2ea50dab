"""Weights of haste, in and out; `jaxgru.interop` has the table of all layouts."""

from typing import Any

from jaxgru.core.parameters import CHO_2014, PYTORCH, GRUSpec
from jaxgru.interop.common import (
    Exported,
    Imported,
    Target,
    bias_counts,
    bias_notes,
    bind,
    exported_cells,
    filled_biases,
    named_arrays,
    numpy_cell,
    read_layers,
    reorder,
    require_exportable,
)


def from_haste(cell: Any, *, prefix: str = "") -> Imported:
    """The weights of a haste GRU (haste_pytorch, haste_tf): identical, reordered.

    kernel [I, 3H], recurrent_kernel [H, 3H], bias and recurrent_bias [3H] in blocks z | r | g
    (haste, `gru.py`).

    Args:
      cell: a mapping with those names; a list of them is a stack, a `Bidirectional` of them a
        layer.
      prefix: what the names begin with.

    Returns:
      Imported: in the nesting of `cell`; spec is `PYTORCH`.

    Raises:
      ValueError: names are missing, surplus or misshaped, or prefix fits none.
      TypeError: it is no mapping, or an array is not floating.

    Cost: one copy of the arrays.
    """

    def read(name, source):
        arrays = named_arrays(
            "from_haste", name, source, prefix=prefix, known_by=("recurrent_kernel",)
        )
        bind("from_haste", name, arrays, _HASTE)
        w_h, w_x, b_x, b_h = (reorder(arrays[key]) for key in _HASTE)
        return numpy_cell(w_x, w_h, b_x, b_h)

    return Imported(read_layers("from_haste", cell, read), PYTORCH, ())


def to_haste(params: Any, *, spec: GRUSpec = CHO_2014) -> Exported:
    """The parameters of a haste GRU; nothing is merged.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack.
      spec: of params; reset "after" and tanh.

    Returns:
      Exported: names to arrays for each cell, in the nesting of params, and the arguments of each.

    Raises:
      ValueError: haste has no such cell: reset before, another activation, or gains.
      TypeError: params or spec are of another kind.

    Cost: one copy of the arrays.
    """
    params, notes = require_exportable("to_haste", params, spec, Target("haste.GRU", ("after",)))
    notes += bias_notes([bias_counts(params)], 2, always=True)

    def write(name, cell):
        arrays = (cell.w_h, cell.w_x, *filled_biases(cell))
        return {key: reorder(v) for key, v in zip(_HASTE, arrays)}

    def options(name, cell):
        return {"input_size": cell.w_x.shape[0], "hidden_size": cell.w_h.shape[0]}

    return exported_cells("to_haste", params, write, options, notes)


_HASTE = {"recurrent_kernel": "H 3H", "kernel": "I 3H", "bias": "3H", "recurrent_bias": "3H"}
