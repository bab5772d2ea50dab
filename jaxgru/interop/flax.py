"""Weights of Flax linen and nnx, in and out; `jaxgru.interop` has the table of all layouts."""

from typing import Any

import numpy as np

from jaxgru.core.parameters import Activation, GRUSpec
from jaxgru.interop.common import (
    ALL_ACTIVATIONS,
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


def from_linen(cell: Any, *, prefix: str = "", activation: Activation = "tanh") -> Imported:
    """The weights of a `flax.linen.GRUCell`.

    ir, iz, in [I, H] with a bias, hr, hz [H, H] without, hn [H, H] with one: b_x = [ir | iz | in],
    b_h = [0 | 0 | hn]. One bias of r and z stands for two, which is noted.

    Args:
      cell: the cell's own entry of the parameters (`variables["params"]["cell"]` of an `nn.RNN`),
        nested or with names joined by "/"; a list of them is a stack, a `Bidirectional` of them a
        layer.
      prefix: what the names begin with, such as "params/cell/".
      activation: the cell's activation_fn.

    Returns:
      Imported: in the nesting of `cell`; their spec resets after and keeps.

    Raises:
      ValueError: names are missing, surplus or misshaped, or prefix fits none.
      TypeError: it is no mapping, or an array is not floating.

    Cost: one copy of the arrays.
    """
    spec = GRUSpec("after", "keep", activation)

    def read(name, source):
        arrays = named_arrays("from_linen", name, source, prefix=prefix, known_by=("hn/kernel",))
        kernels = {f"h{gate}/kernel": "H H" for gate in "rzn"}
        kernels |= {f"i{gate}/kernel": "I H" for gate in "rzn"}
        biases = {f"i{gate}/bias": "H" for gate in "rzn"} | {"hn/bias": "H"}
        bind("from_linen", name, arrays, kernels | biases)
        w_x, w_h, b_x = (
            np.concatenate([arrays[f"{side}{gate}/{kind}"] for gate in "rzn"], axis=-1)
            for side, kind in (("i", "kernel"), ("h", "kernel"), ("i", "bias"))
        )
        return numpy_cell(w_x, w_h, b_x, only_n(arrays["hn/bias"]), spec=spec)

    params = read_layers("from_linen", cell, read)
    return Imported(params, (ONE_BIAS,))


def to_linen(params: Any) -> Exported:
    """The parameters of a `flax.linen.GRUCell`; the two biases of r and of z are summed.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack, whose spec has reset "after".

    Returns:
      Exported: {"ir": {"kernel": ..., "bias": ...}, ...} for each cell, in the nesting of params,
      and the arguments of each cell, activation_fn by its name in `jax.nn`: give that function.
      Run it with `nn.RNN(cell).apply({"params": {"cell": exported.weights}}, xs)`.

    Raises:
      ValueError: linen has no such cell: reset before, or gains.
      TypeError: params are of another kind.

    Cost: one copy of the arrays.

    >>> import jax
    >>> from jaxgru import PYTORCH, init_gru
    >>> sorted(to_linen(init_gru(jax.random.key(0), 2, 3, spec=PYTORCH)).weights)
    ['hn', 'hr', 'hz', 'in', 'ir', 'iz']
    """
    params, notes = require_exportable(
        "to_linen",
        params,
        Target("flax.linen.GRUCell", ("after",), activations=ALL_ACTIVATIONS),
    )
    merged = "r and z have one bias in linen"
    notes += bias_notes([bias_counts(params)], 2, always=True, merged=merged)

    def write(name, cell):
        b, b_n = merged_bias(cell, "after")
        weights: dict[str, dict[str, np.ndarray]] = {}
        for gate, w_x, w_h, bias in zip(
            "rzn", *(np.split(v, 3, -1) for v in (cell.w_x, cell.w_h, b))
        ):
            weights[f"i{gate}"] = {"kernel": w_x.copy(), "bias": bias.copy()}
            weights[f"h{gate}"] = {"kernel": w_h.copy()}
        weights["hn"]["bias"] = b_n.copy()
        return weights

    def options(name, cell):
        return {"features": cell.w_h.shape[0], "activation_fn": cell.spec.activation}

    return exported_cells("to_linen", params, write, options, notes)


def from_nnx(cell: Any, *, prefix: str = "", activation: Activation = "tanh") -> Imported:
    """The weights of a `flax.nnx.GRUCell`: identical; there is no bias that r multiplies.

    Args:
      cell: `nnx.state(cell, nnx.Param)`, or a mapping with dense_i (kernel [I, 3H], bias [3H]) and
        dense_h (kernel [H, 3H]); a list of them is a stack, a `Bidirectional` of them a layer.
      prefix: what the names begin with, such as "cell/".
      activation: the cell's activation_fn.

    Returns:
      Imported: in the nesting of `cell`, b_h None; their spec resets after and keeps.

    Raises:
      ValueError: names are missing, surplus or misshaped, or prefix fits none.
      TypeError: it is no mapping, or an array is not floating.

    Cost: one copy of the arrays.
    """
    spec = GRUSpec("after", "keep", activation)

    def read(name, source):
        arrays = named_arrays("from_nnx", name, source, prefix=prefix, known_by=("dense_h/kernel",))
        axes = {"dense_h/kernel": "H 3H", "dense_i/kernel": "I 3H", "dense_i/bias": "3H"}
        w_h, w_x, b_x = (bind("from_nnx", name, arrays, axes)[key] for key in axes)
        return numpy_cell(w_x, w_h, b_x, spec=spec)

    params = read_layers("from_nnx", cell, read)
    return Imported(params, ())


def to_nnx(params: Any) -> Exported:
    """The parameters of a `flax.nnx.GRUCell`; the two biases of r and of z are summed.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack, whose b_h has an n block of zeros, or
        that have no b_h. Their spec must have reset "after".

    Returns:
      Exported: {"dense_i": {"kernel": ..., "bias": ...}, "dense_h": {"kernel": ...}} for each cell,
      in the nesting of params, and the arguments of each cell, activation_fn by its name in
      `jax.nn`. Put it into a cell with `nnx.update(cell, exported.weights)`.

    Raises:
      ValueError: nnx has no such cell: a bias that r multiplies, reset before, or gains.
      TypeError: params are of another kind.

    Cost: one copy of the arrays.
    """
    params, notes = require_exportable(
        "to_nnx", params, Target("flax.nnx.GRUCell", ("after",), activations=ALL_ACTIVATIONS)
    )
    merged = "r and z have one bias in nnx"
    notes += bias_notes([bias_counts(params)], 1, always=True, merged=merged)

    def write(name, cell):
        b, b_n = merged_bias(cell, "after")
        if np.any(b_n):
            raise ValueError(
                f"to_nnx: the n block of {name}.b_h must be zero, as flax.nnx.GRUCell has no bias "
                f"that the reset gate multiplies, got up to {np.abs(b_n).max():.3g}; "
                "flax.linen.GRUCell has one (to_linen)."
            )
        return {
            "dense_i": {"kernel": cell.w_x, "bias": b},
            "dense_h": {"kernel": cell.w_h},
        }

    def options(name, cell):
        sizes = {"in_features": cell.w_x.shape[0], "hidden_features": cell.w_h.shape[0]}
        return sizes | {"activation_fn": cell.spec.activation}

    return exported_cells("to_nnx", params, write, options, notes)
