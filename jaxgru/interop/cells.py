"""Weights of the cells of Flax linen, Flax nnx, Equinox and Haiku."""

from typing import Any

import numpy as np

from jaxgru.core.parameters import CHUNG_2014, PYTORCH, Activation, GRUParams
from jaxgru.interop import common
from jaxgru.interop.common import Exported, Imported, Target, reorder

_LINEN = Target("flax.linen.GRUCell", always=True, merged="r and z have one bias in linen")
_NNX = Target("flax.nnx.GRUCell", biases=1, always=True, merged="r and z have one bias in nnx")
_EQUINOX = Target("equinox.nn.GRUCell", ("tanh",), merged="r and z have one bias in Equinox")
_HAIKU = Target("haiku.GRU", ("tanh",), "write", 1, always=True, merged="Haiku has one bias")


def from_linen(cell: Any, *, prefix: str = "", activation: Activation = "tanh") -> Imported:
    """Converts the weights of a `flax.linen.GRUCell`.

    ir, iz, in [I, H] have a bias, hr, hz [H, H] have none, hn [H, H] has one: b_x = [ir | iz | in],
    b_h = [0 | 0 | hn]. A note says that r and z have one bias in the source.

    Args:
      cell: the arrays of one cell by name, nested or joined by "/". A list of cells is a stack, a
        `Bidirectional` of two cells is a layer of two directions. The arrays are copied.
      prefix: the start of the names of this GRU among those of a larger model. The cell of an
        `nn.RNN` is `variables["params"]["cell"]`, so its prefix is "params/cell/".
      activation: the candidate's activation, which the arrays do not show.

    Returns: parameters nested as `cell`, with reset "after" and update "keep".
    Raises:
      ValueError: keys are missing or unexpected, or sizes do not match (the message lists all of
        them), or no name has the prefix.
      TypeError: the source is of another kind, an array is not floating, or dtypes differ.
    """
    spec = common.spec_of("from_linen", "after", activation)
    axes = {f"h{gate}/kernel": "H H" for gate in "rzn"}
    axes |= {f"i{gate}/kernel": "I H" for gate in "rzn"}
    axes |= {f"i{gate}/bias": "H" for gate in "rzn"} | {"hn/bias": "H"}

    def convert(arrays):
        def joined(name) -> Any:
            return np.concatenate([arrays[name.format(gate)] for gate in "rzn"], axis=-1)

        w_x, w_h, b_x = joined("i{}/kernel"), joined("h{}/kernel"), joined("i{}/bias")
        return GRUParams(w_x, w_h, b_x, common.only_n(arrays["hn/bias"]), spec=spec)

    return common.import_cells("from_linen", cell, axes, convert, prefix, one_bias=True)


def to_linen(params: Any) -> Exported:
    """Returns the parameters of a `flax.linen.GRUCell`; the two biases of r and of z are summed.

    Args:
      params: as in `to_torch`; with reset "after".

    Returns: {"ir": {"kernel": ..., "bias": ...}, ...} for each cell, nested as params, and the
      arguments of each cell. Its activation_fn is a name in `jax.nn`; give that function to the
      cell. Run it with `nn.RNN(cell).apply({"params": {"cell": exported.weights}}, xs)`.
    Raises: as `to_torch`.

    >>> import jax
    >>> from jaxgru import init_gru
    >>> sorted(to_linen(init_gru(jax.random.key(0), 2, 3, spec=PYTORCH)).weights)
    ['hn', 'hr', 'hz', 'in', 'ir', 'iz']
    """

    def write(cell):
        weights, arrays = {}, (cell.w_x, cell.w_h, cell.b_x, cell.b_h)
        for gate, *blocks in zip("rzn", *(np.split(v, 3, -1) for v in arrays)):
            w_x, w_h, b_x, b_h = (block.copy() for block in blocks)
            weights[f"i{gate}"] = {"kernel": w_x, "bias": b_x}
            weights[f"h{gate}"] = {"kernel": w_h} | ({"bias": b_h} if gate == "n" else {})
        return weights, {"features": cell.w_h.shape[0], "activation_fn": cell.spec.activation}

    return common.export_cells("to_linen", params, {"after": _LINEN}, write)


def from_nnx(cell: Any, *, prefix: str = "", activation: Activation = "tanh") -> Imported:
    """Converts the weights of a `flax.nnx.GRUCell` exactly; it has no bias that r multiplies.

    Args:
      cell, prefix, activation: as in `from_linen`. A cell is `nnx.state(cell, nnx.Param)`, or a
        mapping with dense_i (kernel [I, 3H], bias [3H]) and dense_h (kernel [H, 3H]).

    Returns: parameters nested as `cell`, with reset "after" and update "keep"; b_h is None.
    Raises: as `from_linen`.
    """
    spec = common.spec_of("from_nnx", "after", activation)
    axes = {"dense_h/kernel": "H 3H", "dense_i/kernel": "I 3H", "dense_i/bias": "3H"}

    def convert(arrays):
        w_h, w_x, b_x = (arrays[name] for name in axes)
        return GRUParams(w_x, w_h, b_x, spec=spec)

    return common.import_cells("from_nnx", cell, axes, convert, prefix)


def to_nnx(params: Any) -> Exported:
    """Returns the parameters of a `flax.nnx.GRUCell`; the two biases of r and of z are summed.

    Args:
      params: as in `to_torch`; with reset "after", and a b_h whose n block is zero, or no b_h.

    Returns: {"dense_i": {"kernel": ..., "bias": ...}, "dense_h": {"kernel": ...}} for each cell,
      nested as params, and the arguments of each cell; its activation_fn is a name in `jax.nn`.
      Write the weights into a cell with `nnx.update(cell, exported.weights)`.
    Raises: as `to_torch`; ValueError: the n block of b_h is not zero.
    """

    def write(cell):
        dense_i, dense_h = {"kernel": cell.w_x, "bias": cell.b_x}, {"kernel": cell.w_h}
        sizes = {"in_features": cell.w_x.shape[0], "hidden_features": cell.w_h.shape[0]}
        options = sizes | {"activation_fn": cell.spec.activation}
        return {"dense_i": dense_i, "dense_h": dense_h}, options

    return common.export_cells("to_nnx", params, {"after": _NNX}, write)


def from_equinox(cell: Any, *, prefix: str = "") -> Imported:
    """Converts the weights of an `equinox.nn.GRUCell`.

    w_x = weight_ih^T, w_h = weight_hh^T, b_x = bias, b_h = [0 | 0 | bias_n]. A note says that r and
    z have one bias in the source.

    Args:
      cell, prefix: as in `from_linen`. A cell is the module, or a mapping of its weight_ih [3H, I],
        weight_hh [3H, H], bias [3H] and bias_n [H]; the biases are both None or absent without
        bias.

    Returns: parameters nested as `cell`, with the spec `PYTORCH`.
    Raises: as `from_linen`.
    """
    axes = {"weight_hh": "3H H", "weight_ih": "3H I", "bias": "3H", "bias_n": "H"}

    def convert(arrays):
        biases = (arrays["bias"], common.only_n(arrays["bias_n"])) if "bias" in arrays else ()
        return GRUParams(arrays["weight_ih"].T, arrays["weight_hh"].T, *biases, spec=PYTORCH)

    biases = ("bias", "bias_n")
    return common.import_cells("from_equinox", cell, axes, convert, prefix, biases, True, True)


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

    return common.export_cells("to_equinox", params, {"after": _EQUINOX}, write)


def from_haiku(cell: Any, *, prefix: str = "") -> Imported:
    """Converts the weights of a `haiku.GRU` exactly, by reordering them.

    w_i [I, 3H], w_h [H, 3H] and b [3H] in blocks z | r | a. The reset gate acts before the product,
    and z writes.

    Args:
      cell, prefix: as in `from_linen`. A cell is `params["gru"]`; with all of `params`, the
        prefix is "gru/".

    Returns: parameters nested as `cell`, with the spec `CHUNG_2014`; b_h is None.
    Raises: as `from_linen`.

    >>> from_haiku({"w_i": np.ones((2, 9)), "w_h": np.ones((3, 9)), "b": np.ones(9)}).params.spec
    GRUSpec(reset='before', update='write', activation='tanh')
    """
    axes = {"w_h": "H 3H", "w_i": "I 3H", "b": "3H"}

    def convert(arrays):
        w_h, w_x, b_x = (reorder(arrays[name]) for name in axes)
        return GRUParams(w_x, w_h, b_x, spec=CHUNG_2014)

    return common.import_cells("from_haiku", cell, axes, convert, prefix)


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

    return common.export_cells("to_haiku", params, {"before": _HAIKU}, write)
