"""Weights of Flax linen and nnx."""

from typing import Any

import numpy as np

from jaxgru.core.parameters import Activation, GRUParams
from jaxgru.interop import common
from jaxgru.interop.common import Exported, Imported

_LINEN = common.Target("flax.linen.GRUCell", always=True, merged="r and z have one bias in linen")
_NNX = common.Target(
    "flax.nnx.GRUCell", biases=1, always=True, merged="r and z have one bias in nnx"
)


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

    def read(name, source):
        arrays = common.named_arrays("from_linen", name, source, prefix, known_by=("hn/kernel",))
        common.bind("from_linen", name, arrays, axes)

        def joined(kind) -> Any:
            return np.concatenate([arrays[kind.format(gate)] for gate in "rzn"], axis=-1)

        w_x, w_h, b_x = joined("i{}/kernel"), joined("h{}/kernel"), joined("i{}/bias")
        return GRUParams(w_x, w_h, b_x, common.only_n(arrays["hn/bias"]), spec=spec)

    return Imported(common.read_layers("from_linen", "cell", cell, read), (common.ONE_BIAS,))


def to_linen(params: Any) -> Exported:
    """Returns the parameters of a `flax.linen.GRUCell`; the two biases of r and of z are summed.

    Args:
      params: as in `to_torch`; with reset "after".

    Returns: {"ir": {"kernel": ..., "bias": ...}, ...} for each cell, nested as params, and the
      arguments of each cell. Its activation_fn is a name in `jax.nn`; give that function to the
      cell. Run it with `nn.RNN(cell).apply({"params": {"cell": exported.weights}}, xs)`.
    Raises: as `to_torch`.

    >>> import jax
    >>> from jaxgru import PYTORCH, init_gru
    >>> sorted(to_linen(init_gru(jax.random.key(0), 2, 3, spec=PYTORCH)).weights)
    ['hn', 'hr', 'hz', 'in', 'ir', 'iz']
    """

    def write(cell):
        w_x, w_h, b_x, b_h = (
            [block.copy() for block in np.split(v, 3, -1)]
            for v in (cell.w_x, cell.w_h, cell.b_x, cell.b_h)
        )
        weights = {}
        for k, gate in enumerate("rzn"):
            weights[f"i{gate}"] = {"kernel": w_x[k], "bias": b_x[k]}
            weights[f"h{gate}"] = {"kernel": w_h[k]}
        weights["hn"]["bias"] = b_h[2]
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

    def read(name, source):
        known_by = ("dense_h/kernel",)
        arrays = common.named_arrays("from_nnx", name, source, prefix, known_by=known_by)
        common.bind("from_nnx", name, arrays, axes)
        w_h, w_x, b_x = (arrays[key] for key in axes)
        return GRUParams(w_x, w_h, b_x, spec=spec)

    return Imported(common.read_layers("from_nnx", "cell", cell, read), ())


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
