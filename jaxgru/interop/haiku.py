"""Weights of Haiku, in and out; `jaxgru.interop` has the table of all layouts."""

from typing import Any

from jaxgru.core.parameters import CHUNG_2014
from jaxgru.interop.common import (
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
    read_layers,
    reorder,
    require_exportable,
)


def from_haiku(cell: Any, *, prefix: str = "") -> Imported:
    """The weights of a `haiku.GRU`: identical, reordered; their spec is `CHUNG_2014`.

    w_i [I, 3H], w_h [H, 3H] and b [3H] in blocks z | r | a. Reset before, and z writes.

    Args:
      cell: the module's own entry of the parameters, `params["gru"]`; a list of them is a stack, a
        `Bidirectional` of them a layer.
      prefix: what the names begin with where all parameters are given, such as "gru/".

    Returns:
      Imported: in the nesting of `cell`, b_h None.

    Raises:
      ValueError: names are missing, surplus or misshaped, or prefix fits none.
      TypeError: it is no mapping, or an array is not floating.

    Cost: one copy of the arrays.

    >>> import numpy as np
    >>> from_haiku({"w_i": np.ones((2, 9)), "w_h": np.ones((3, 9)), "b": np.ones(9)}).params.spec
    GRUSpec(reset='before', update='write', activation='tanh')
    """

    def read(name, source):
        arrays = named_arrays("from_haiku", name, source, prefix=prefix, known_by=("w_h",))
        axes = {"w_h": "H 3H", "w_i": "I 3H", "b": "3H"}
        w_h, w_x, b_x = (reorder(bind("from_haiku", name, arrays, axes)[key]) for key in axes)
        return numpy_cell(w_x, w_h, b_x, spec=CHUNG_2014)

    return Imported(read_layers("from_haiku", cell, read), ())


def to_haiku(params: Any) -> Exported:
    """The parameters of a `haiku.GRU`; b_x and b_h are summed.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack, whose spec has reset "before" and
        tanh. Where the update gate keeps, its weights and biases are negated.

    Returns:
      Exported: {"w_i": ..., "w_h": ..., "b": ...} for each cell, in the nesting of params, and the
      arguments of each module.

    Raises:
      ValueError: Haiku has no such cell: reset after, another activation, or gains.
      TypeError: params are of another kind.

    Cost: one copy of the arrays.
    """
    target = Target("haiku.GRU", ("before",), update="write")
    params, notes = require_exportable("to_haiku", params, target)
    merged = "Haiku has one bias"
    notes += bias_notes([bias_counts(params)], 1, always=True, merged=merged)

    def write(name, cell):
        b = merged_bias(cell, "before")[0]
        return {"w_i": reorder(cell.w_x), "w_h": reorder(cell.w_h), "b": reorder(b)}

    def options(name, cell):
        return {"hidden_size": cell.w_h.shape[0]}

    return exported_cells("to_haiku", params, write, options, notes)
