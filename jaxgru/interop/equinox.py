"""Weights of Equinox."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgru.core.parameters import PYTORCH, GRUParams
from jaxgru.interop import common
from jaxgru.interop.common import Exported, Imported

_MERGED = "r and z have one bias in Equinox"
_TARGETS = {"after": common.Target("equinox.nn.GRUCell", ("tanh",), merged=_MERGED)}
_AXES = {"weight_hh": "3H H", "weight_ih": "3H I", "bias": "3H", "bias_n": "H"}


def from_equinox(cell: Any) -> Imported:
    """Converts the weights of an `equinox.nn.GRUCell`.

    w_x = weight_ih^T, w_h = weight_hh^T, b_x = bias, b_h = [0 | 0 | bias_n]. A note says that r and
    z have one bias in the source.

    Args:
      cell: as in `from_linen`. A cell is the module, or a mapping of its weight_ih [3H, I],
        weight_hh [3H, H], bias [3H] and bias_n [H]; the biases are both None or absent without
        bias.

    Returns: parameters nested as `cell`, with the spec `PYTORCH`.
    Raises: as `from_linen`.
    """

    def read(name, source):
        if all(hasattr(source, field) for field in _AXES):
            source = {field: getattr(source, field) for field in _AXES}
        if isinstance(source, Mapping):
            source = {k: v for k, v in source.items() if v is not None}
        arrays = common.named_arrays("from_equinox", name, source)
        bias = "bias" in arrays or "bias_n" in arrays
        axes = {k: v for k, v in _AXES.items() if bias or "bias" not in k}
        common.bind("from_equinox", name, arrays, axes)
        w_x, w_h = arrays["weight_ih"].T, arrays["weight_hh"].T
        biases = (arrays["bias"], common.only_n(arrays["bias_n"])) if bias else ()
        return GRUParams(w_x, w_h, *biases, spec=PYTORCH)

    params = common.read_layers("from_equinox", "cell", cell, read)
    bias = any(cell.b_x is not None for cell in common.cells_of(params))
    return Imported(params, (common.ONE_BIAS,) if bias else ())


def to_equinox(params: Any) -> Exported:
    """Returns the fields of an `equinox.nn.GRUCell`; the two biases of r and of z are summed.

    Write them into a module with
    `equinox.tree_at(lambda c: [getattr(c, k) for k in weights], cell, list(weights.values()))`.

    Args:
      params: as in `to_torch`; with reset "after" and tanh.

    Returns: {"weight_ih": ..., "weight_hh": ..., "bias": ..., "bias_n": ...} for each cell, nested
      as params, and the arguments of each cell.
    Raises: as `to_torch`.
    """

    def write(cell):
        kernels, bias = {"weight_ih": cell.w_x, "weight_hh": cell.w_h}, cell.b_x is not None
        weights = {k: np.ascontiguousarray(v.T) for k, v in kernels.items()}
        if bias:
            weights |= {"bias": cell.b_x, "bias_n": np.split(cell.b_h, 3)[2]}
        sizes = {"input_size": cell.w_x.shape[0], "hidden_size": cell.w_h.shape[0]}
        return weights, sizes | {"use_bias": bias}

    return common.export_cells("to_equinox", params, _TARGETS, write)
