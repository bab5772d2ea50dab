"""Weights of Equinox; `jaxgru.interop` describes all layouts and the shared arguments."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgru.core.parameters import PYTORCH, GRUParams
from jaxgru.interop import common
from jaxgru.interop.common import Exported, Imported

_TARGET = common.Target(
    "equinox.nn.GRUCell", ("after",), ("tanh",), merged="r and z have one bias in Equinox"
)


def from_equinox(cell: Any) -> Imported:
    """Converts the weights of an `equinox.nn.GRUCell`.

    w_x = weight_ih^T, w_h = weight_hh^T, b_x = bias, b_h = [0 | 0 | bias_n]. A note says that r and
    z have one bias in the source.

    Args:
      cell: see `jaxgru.interop`. A cell is the module, or a mapping of its weight_ih [3H, I],
        weight_hh [3H, H], bias [3H] and bias_n [H]; the biases are both None or absent without
        bias.

    Returns: parameters nested as `cell`, with the spec `PYTORCH`.
    Raises: see `jaxgru.interop`.
    """
    biased = []

    def read(name, source):
        fields = ("weight_ih", "weight_hh", "bias", "bias_n")
        if all(hasattr(source, field) for field in fields):
            source = {field: getattr(source, field) for field in fields}
        if isinstance(source, Mapping):
            source = {k: v for k, v in source.items() if v is not None}
        arrays = common.named_arrays("from_equinox", name, source)
        axes, biases = {"weight_hh": "3H H", "weight_ih": "3H I"}, (None, None)
        if bias := "bias" in arrays or "bias_n" in arrays:
            axes |= {"bias": "3H", "bias_n": "H"}
        common.bind("from_equinox", name, arrays, axes)
        if bias:
            biases = (arrays["bias"], common.only_n(arrays["bias_n"]))
        biased.append(bias)
        return GRUParams(arrays["weight_ih"].T, arrays["weight_hh"].T, *biases, spec=PYTORCH)

    params = common.read_layers("from_equinox", cell, read)
    return Imported(params, (common.ONE_BIAS,) if any(biased) else ())


def to_equinox(params: Any) -> Exported:
    """Returns the fields of an `equinox.nn.GRUCell`; the two biases of r and of z are summed.

    Write them into a module with
    `equinox.tree_at(lambda c: [getattr(c, k) for k in weights], cell, list(weights.values()))`.

    Args:
      params: see `jaxgru.interop`; with reset "after" and tanh.

    Returns: {"weight_ih": ..., "weight_hh": ..., "bias": ..., "bias_n": ...} for each cell, nested
      as params, and the arguments of each cell.
    Raises: see `jaxgru.interop`.
    """

    def write(name, cell, bias):
        kernels = {"weight_ih": cell.w_x, "weight_hh": cell.w_h}
        weights = {k: np.ascontiguousarray(v.T) for k, v in kernels.items()}
        if bias:
            weights |= dict(zip(("bias", "bias_n"), common.merged_bias(cell)))
        sizes = {"input_size": cell.w_x.shape[0], "hidden_size": cell.w_h.shape[0]}
        return weights, sizes | {"use_bias": bias}

    return common.export_cells("to_equinox", params, _TARGET, write)
