"""Weights of the libraries on JAX, in and out: Flax linen and nnx, Equinox, Haiku.

The table of all layouts is in `jaxgru.interop`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgru.conversion import (
    ALL_ACTIVATIONS,
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
    reorder,
    require_exportable,
)
from jaxgru.parameters import CHO_2014, CHUNG_2014, PYTORCH, Activation, GRUSpec

_ONE_BIAS = "r and z have one bias in the source: b_h is zero there, and learns beside b_x from now"


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
      Imported: in the nesting of `cell`; spec resets after and keeps.

    Raises:
      ValueError: names are missing, surplus or misshaped, or prefix fits none.
      TypeError: it is no mapping, or an array is not floating.

    Cost: one copy of the arrays.
    """

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
        return numpy_cell(w_x, w_h, b_x, only_n(arrays["hn/bias"]))

    params = read_layers("from_linen", cell, read)
    return Imported(params, GRUSpec("after", "keep", activation), (_ONE_BIAS,))


def to_linen(params: Any, *, spec: GRUSpec = CHO_2014) -> Exported:
    """The parameters of a `flax.linen.GRUCell`; the two biases of r and of z are summed.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack.
      spec: of params; reset "after".

    Returns:
      Exported: {"ir": {"kernel": ..., "bias": ...}, ...} for each cell, in the nesting of params,
      and the arguments of each cell, activation_fn by its name in `jax.nn`: give that function.
      Run it with `nn.RNN(cell).apply({"params": {"cell": exported.weights}}, xs)`.

    Raises:
      ValueError: linen has no such cell: reset before, or gains.
      TypeError: params or spec are of another kind.

    Cost: one copy of the arrays.

    >>> import jax
    >>> from jaxgru import init_gru
    >>> sorted(to_linen(init_gru(jax.random.key(0), 2, 3), spec=PYTORCH).weights)
    ['hn', 'hr', 'hz', 'in', 'ir', 'iz']
    """
    params, notes = require_exportable(
        "to_linen",
        params,
        spec,
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
        return {"features": cell.w_h.shape[0], "activation_fn": spec.activation}

    return exported_cells("to_linen", params, write, options, notes)


def from_nnx(cell: Any, *, prefix: str = "", activation: Activation = "tanh") -> Imported:
    """The weights of a `flax.nnx.GRUCell`: identical; there is no bias that r multiplies.

    Args:
      cell: `nnx.state(cell, nnx.Param)`, or a mapping with dense_i (kernel [I, 3H], bias [3H]) and
        dense_h (kernel [H, 3H]); a list of them is a stack, a `Bidirectional` of them a layer.
      prefix: what the names begin with, such as "cell/".
      activation: the cell's activation_fn.

    Returns:
      Imported: in the nesting of `cell`, b_h None; spec resets after and keeps.

    Raises:
      ValueError: names are missing, surplus or misshaped, or prefix fits none.
      TypeError: it is no mapping, or an array is not floating.

    Cost: one copy of the arrays.
    """

    def read(name, source):
        arrays = named_arrays("from_nnx", name, source, prefix=prefix, known_by=("dense_h/kernel",))
        axes = {"dense_h/kernel": "H 3H", "dense_i/kernel": "I 3H", "dense_i/bias": "3H"}
        w_h, w_x, b_x = (bind("from_nnx", name, arrays, axes)[key] for key in axes)
        return numpy_cell(w_x, w_h, b_x, None)

    params = read_layers("from_nnx", cell, read)
    return Imported(params, GRUSpec("after", "keep", activation), ())


def to_nnx(params: Any, *, spec: GRUSpec = CHO_2014) -> Exported:
    """The parameters of a `flax.nnx.GRUCell`; the two biases of r and of z are summed.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack, whose b_h has an n block of zeros, or
        that have no b_h.
      spec: of params; reset "after".

    Returns:
      Exported: {"dense_i": {"kernel": ..., "bias": ...}, "dense_h": {"kernel": ...}} for each cell,
      in the nesting of params, and the arguments of each cell, activation_fn by its name in
      `jax.nn`. Put it into a cell with `nnx.update(cell, exported.weights)`.

    Raises:
      ValueError: nnx has no such cell: a bias that r multiplies, reset before, or gains.
      TypeError: params or spec are of another kind.

    Cost: one copy of the arrays.
    """
    params, notes = require_exportable(
        "to_nnx", params, spec, Target("flax.nnx.GRUCell", ("after",), activations=ALL_ACTIVATIONS)
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
        return sizes | {"activation_fn": spec.activation}

    return exported_cells("to_nnx", params, write, options, notes)


def from_equinox(cell: Any) -> Imported:
    """The weights of an `equinox.nn.GRUCell`.

    w_x = weight_ih^T, w_h = weight_hh^T, b_x = bias, b_h = [0 | 0 | bias_n].

    Args:
      cell: the module, or a mapping of its weight_ih [3H, I], weight_hh [3H, H], bias [3H] and
        bias_n [H] (both None or left out without bias); a list of them is a stack, a
        `Bidirectional` of them a layer.

    Returns:
      Imported: in the nesting of `cell`; spec is `PYTORCH`.

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
        return numpy_cell(arrays["weight_ih"].T, arrays["weight_hh"].T, *biases)

    params = read_layers("from_equinox", cell, read)
    return Imported(params, PYTORCH, (_ONE_BIAS,) if any(biased) else ())


def to_equinox(params: Any, *, spec: GRUSpec = CHO_2014) -> Exported:
    """The fields of an `equinox.nn.GRUCell`; the two biases of r and of z are summed.

    Put them into a module with
    `equinox.tree_at(lambda c: [getattr(c, k) for k in weights], cell, list(weights.values()))`.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack.
      spec: of params; reset "after" and tanh.

    Returns:
      Exported: {"weight_ih": ..., "weight_hh": ..., "bias": ..., "bias_n": ...} for each cell, in
      the nesting of params, and the arguments of each cell.

    Raises:
      ValueError: Equinox has no such cell: reset before, another activation, or gains.
      TypeError: params or spec are of another kind.

    Cost: one copy of the arrays.
    """
    params, notes = require_exportable(
        "to_equinox", params, spec, Target("equinox.nn.GRUCell", ("after",))
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


def from_haiku(cell: Any, *, prefix: str = "") -> Imported:
    """The weights of a `haiku.GRU`: identical, reordered; spec is `CHUNG_2014`.

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

    >>> from_haiku({"w_i": np.ones((2, 9)), "w_h": np.ones((3, 9)), "b": np.ones(9)}).spec.update
    'write'
    """

    def read(name, source):
        arrays = named_arrays("from_haiku", name, source, prefix=prefix, known_by=("w_h",))
        axes = {"w_h": "H 3H", "w_i": "I 3H", "b": "3H"}
        w_h, w_x, b_x = (reorder(bind("from_haiku", name, arrays, axes)[key]) for key in axes)
        return numpy_cell(w_x, w_h, b_x, None)

    return Imported(read_layers("from_haiku", cell, read), CHUNG_2014, ())


def to_haiku(params: Any, *, spec: GRUSpec = CHO_2014) -> Exported:
    """The parameters of a `haiku.GRU`; b_x and b_h are summed.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack.
      spec: of params; reset "before" and tanh. An update that keeps is turned by the sign of z's
        weights.

    Returns:
      Exported: {"w_i": ..., "w_h": ..., "b": ...} for each cell, in the nesting of params, and the
      arguments of each module.

    Raises:
      ValueError: Haiku has no such cell: reset after, another activation, or gains.
      TypeError: params or spec are of another kind.

    Cost: one copy of the arrays.
    """
    target = Target("haiku.GRU", ("before",), update="write")
    params, notes = require_exportable("to_haiku", params, spec, target)
    merged = "Haiku has one bias"
    notes += bias_notes([bias_counts(params)], 1, always=True, merged=merged)

    def write(name, cell):
        b = merged_bias(cell, "before")[0]
        return {"w_i": reorder(cell.w_x), "w_h": reorder(cell.w_h), "b": reorder(b)}

    def options(name, cell):
        return {"hidden_size": cell.w_h.shape[0]}

    return exported_cells("to_haiku", params, write, options, notes)
