"""Weights of Flax linen and nnx; `jaxgru.interop` describes all layouts and shared arguments."""

from typing import Any

import numpy as np

from jaxgru.core.parameters import Activation, GRUParams, GRUSpec
from jaxgru.interop import common
from jaxgru.interop.common import Exported, Imported

_LINEN = common.Target(
    "flax.linen.GRUCell", ("after",), always=True, merged="r and z have one bias in linen"
)
_NNX = common.Target(
    "flax.nnx.GRUCell", ("after",), biases=1, always=True, merged="r and z have one bias in nnx"
)


def from_linen(cell: Any, *, prefix: str = "", activation: Activation = "tanh") -> Imported:
    """Converts the weights of a `flax.linen.GRUCell`.

    ir, iz, in [I, H] have a bias, hr, hz [H, H] have none, hn [H, H] has one: b_x = [ir | iz | in],
    b_h = [0 | 0 | hn]. A note says that r and z have one bias in the source.

    Args:
      cell, prefix, activation: see `jaxgru.interop`. The cell of an `nn.RNN` is
        `variables["params"]["cell"]`, so its prefix is "params/cell/".

    Returns: parameters nested as `cell`, with reset "after" and update "keep".
    Raises: see `jaxgru.interop`.
    """
    spec = GRUSpec("after", "keep", activation)

    def read(name, source):
        arrays = common.named_arrays("from_linen", name, source, prefix, known_by=("hn/kernel",))
        axes = {f"h{gate}/kernel": "H H" for gate in "rzn"}
        axes |= {f"i{gate}/kernel": "I H" for gate in "rzn"}
        axes |= {f"i{gate}/bias": "H" for gate in "rzn"} | {"hn/bias": "H"}
        common.bind("from_linen", name, arrays, axes)
        gates = {"w_x": "i{}/kernel", "w_h": "h{}/kernel", "b_x": "i{}/bias"}
        joined: Any = {
            field: np.concatenate([arrays[name.format(gate)] for gate in "rzn"], axis=-1)
            for field, name in gates.items()
        }
        return GRUParams(**joined, b_h=common.only_n(arrays["hn/bias"]), spec=spec)

    return Imported(common.read_layers("from_linen", cell, read), (common.ONE_BIAS,))


def to_linen(params: Any) -> Exported:
    """Returns the parameters of a `flax.linen.GRUCell`; the two biases of r and of z are summed.

    Args:
      params: see `jaxgru.interop`; with reset "after".

    Returns: {"ir": {"kernel": ..., "bias": ...}, ...} for each cell, nested as params, and the
      arguments of each cell. Its activation_fn is a name in `jax.nn`; give that function to the
      cell. Run it with `nn.RNN(cell).apply({"params": {"cell": exported.weights}}, xs)`.
    Raises: see `jaxgru.interop`.

    >>> import jax
    >>> from jaxgru import PYTORCH, init_gru
    >>> sorted(to_linen(init_gru(jax.random.key(0), 2, 3, spec=PYTORCH)).weights)
    ['hn', 'hr', 'hz', 'in', 'ir', 'iz']
    """

    def write(name, cell, bias):
        b, b_n = common.merged_bias(cell)
        w_x, w_h, b = (np.split(v, 3, -1) for v in (cell.w_x, cell.w_h, b))
        weights: dict[str, dict[str, np.ndarray]] = {}
        for k, gate in enumerate("rzn"):
            weights[f"i{gate}"] = {"kernel": w_x[k].copy(), "bias": b[k].copy()}
            weights[f"h{gate}"] = {"kernel": w_h[k].copy()}
        weights["hn"]["bias"] = b_n.copy()
        return weights, {"features": cell.w_h.shape[0], "activation_fn": cell.spec.activation}

    return common.export_cells("to_linen", params, _LINEN, write)


def from_nnx(cell: Any, *, prefix: str = "", activation: Activation = "tanh") -> Imported:
    """Converts the weights of a `flax.nnx.GRUCell` exactly; it has no bias that r multiplies.

    Args:
      cell, prefix, activation: see `jaxgru.interop`. A cell is `nnx.state(cell, nnx.Param)`, or a
        mapping with dense_i (kernel [I, 3H], bias [3H]) and dense_h (kernel [H, 3H]).

    Returns: parameters nested as `cell`, with reset "after" and update "keep"; b_h is None.
    Raises: see `jaxgru.interop`.
    """
    spec = GRUSpec("after", "keep", activation)

    def read(name, source):
        known = ("dense_h/kernel",)
        arrays = common.named_arrays("from_nnx", name, source, prefix, known_by=known)
        axes = {"dense_h/kernel": "H 3H", "dense_i/kernel": "I 3H", "dense_i/bias": "3H"}
        w_h, w_x, b_x = (common.bind("from_nnx", name, arrays, axes)[key] for key in axes)
        return GRUParams(w_x, w_h, b_x, spec=spec)

    return Imported(common.read_layers("from_nnx", cell, read), ())


def to_nnx(params: Any) -> Exported:
    """Returns the parameters of a `flax.nnx.GRUCell`; the two biases of r and of z are summed.

    Args:
      params: see `jaxgru.interop`; with reset "after", and a b_h whose n block is zero, or no b_h.

    Returns: {"dense_i": {"kernel": ..., "bias": ...}, "dense_h": {"kernel": ...}} for each cell,
      nested as params, and the arguments of each cell; its activation_fn is a name in `jax.nn`.
      Write the weights into a cell with `nnx.update(cell, exported.weights)`.
    Raises: see `jaxgru.interop`; ValueError: the n block of b_h is not zero.
    """

    def write(name, cell, bias):
        b, b_n = common.merged_bias(cell)
        if np.any(b_n):
            raise ValueError(
                f"to_nnx: {name}.b_h must be zero in its n block, as flax.nnx.GRUCell has no bias "
                f"that the reset gate multiplies, got up to {np.abs(b_n).max():.3g}; "
                "flax.linen.GRUCell has one (to_linen)."
            )
        weights = {"dense_i": {"kernel": cell.w_x, "bias": b}, "dense_h": {"kernel": cell.w_h}}
        sizes = {"in_features": cell.w_x.shape[0], "hidden_features": cell.w_h.shape[0]}
        return weights, sizes | {"activation_fn": cell.spec.activation}

    return common.export_cells("to_nnx", params, _NNX, write)
