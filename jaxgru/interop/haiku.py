"""Weights of Haiku."""

from typing import Any

from jaxgru.core.parameters import CHUNG_2014, GRUParams
from jaxgru.interop import common
from jaxgru.interop.common import Exported, Imported, reorder

_TARGET = common.Target(
    "haiku.GRU", ("tanh",), "write", biases=1, always=True, merged="Haiku has one bias"
)


def from_haiku(cell: Any, *, prefix: str = "") -> Imported:
    """Converts the weights of a `haiku.GRU` exactly, by reordering them.

    w_i [I, 3H], w_h [H, 3H] and b [3H] in blocks z | r | a. The reset gate acts before the product,
    and z writes.

    Args:
      cell, prefix: as in `from_linen`. A cell is `params["gru"]`; with all of `params`, the
        prefix is "gru/".

    Returns: parameters nested as `cell`, with the spec `CHUNG_2014`; b_h is None.
    Raises: as `from_linen`.

    >>> import numpy as np
    >>> from_haiku({"w_i": np.ones((2, 9)), "w_h": np.ones((3, 9)), "b": np.ones(9)}).params.spec
    GRUSpec(reset='before', update='write', activation='tanh')
    """

    axes = {"w_h": "H 3H", "w_i": "I 3H", "b": "3H"}

    def read(name, source):
        arrays = common.named_arrays("from_haiku", name, source, prefix, known_by=("w_h",))
        common.bind("from_haiku", name, arrays, axes)
        w_h, w_x, b_x = (reorder(arrays[key]) for key in axes)
        return GRUParams(w_x, w_h, b_x, spec=CHUNG_2014)

    return Imported(common.read_layers("from_haiku", "cell", cell, read), ())


def to_haiku(params: Any) -> Exported:
    """Returns the parameters of a `haiku.GRU`; b_x and b_h are summed.

    Args:
      params: as in `to_torch`; with reset "before" and tanh.

    Returns: {"w_i": ..., "w_h": ..., "b": ...} for each cell, nested as params, and the arguments
      of each module.
    Raises: as `to_torch`.
    """

    def write(cell):
        arrays = {"w_i": cell.w_x, "w_h": cell.w_h, "b": cell.b_x}
        return {k: reorder(v) for k, v in arrays.items()}, {"hidden_size": cell.w_h.shape[0]}

    return common.export_cells("to_haiku", params, {"before": _TARGET}, write)
