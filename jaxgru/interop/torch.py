"""Weights of PyTorch; this file holds all names of arrays by which they are converted."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgru.core.parameters import PYTORCH, GRUParams
from jaxgru.interop import common
from jaxgru.interop.common import Exported, Imported
from jaxgru.stacks.forms import Bidirectional, as_stack, directions_of

_TARGETS = {"after": common.Target("torch.nn.GRU", ("tanh",))}
_W_X, _W_H, _B_X, _B_H = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
_NAMES = {_W_X: "w_x", _W_H: "w_h", _B_X: "b_x", _B_H: "b_h"}
_ENDS = ("_l{}", "_l{}_reverse")  # of the names of a layer, forward and backward


def from_torch(state_dict: Mapping[str, Any], *, prefix: str = "") -> Imported:
    """Converts the weights of a `torch.nn.GRU` or `torch.nn.GRUCell` exactly, by transposing them.

    w_x = weight_ih^T, w_h = weight_hh^T, b_x = bias_ih, b_h = bias_hh, blocks r | z | n
    (torch.nn.GRU's documentation, "Variables").

    Args:
      state_dict: `module.state_dict()`, names to tensors on the CPU, or to arrays. NumPy has no
        bfloat16, so cast such tensors with .float() first.
      prefix: the start of the names of this GRU in a larger model, for example "encoder.rnn.".

    Returns: for a GRU a stack, also of one layer, with `Bidirectional` layers where there are
      `_reverse` names; for a GRUCell a `GRUParams`. Their spec is `PYTORCH`.
    Raises: as `from_linen`; ValueError: state_dict is the state of an optimizer.

    >>> cell = {"weight_ih": np.ones((9, 2)), "weight_hh": np.ones((9, 3))}
    >>> from_torch(cell).params.w_x.shape
    (2, 9)
    """
    if isinstance(state_dict, Mapping) and {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            "from_torch: state_dict must be of a module, got that of an optimizer, which is not "
            "converted; initialize an optax optimizer."
        )
    known = (f"{_W_H}_l0", _W_H)
    arrays = common.named_arrays("from_torch", "state_dict", state_dict, prefix, ".", known)
    both = any(name.endswith("_reverse") for name in arrays)
    count = sum(name.startswith(_W_H) and not name.endswith("_reverse") for name in arrays)
    suffixes = [[end.format(k) for end in _ENDS[: 1 + both]] for k in range(max(1, count))]
    if single := _W_X in arrays or _W_H in arrays:
        suffixes = [[""]]
    axes = {}
    for k, layer in enumerate(suffixes):
        below = ("2H" if both else "H") if k else "I"
        each = {_W_H: "3H H", _W_X: f"3H {below}", _B_X: "3H", _B_H: "3H"}
        axes |= {name + suffix: wanted for suffix in layer for name, wanted in each.items()}
    biases = [name for name in axes if name.startswith((_B_X, _B_H))]
    common.bind("from_torch", "state_dict", arrays, axes, biases)

    def cell(suffix):
        found = {v: arrays[k + suffix].T for k, v in _NAMES.items() if k + suffix in arrays}
        return GRUParams(**found, spec=PYTORCH)

    layers = [Bidirectional(*map(cell, v)) if v[1:] else cell(*v) for v in suffixes]
    return Imported(layers[0] if single else tuple(layers), ())


def to_torch(params: Any) -> Exported:
    """Returns the state dict of a `torch.nn.GRU` for a stack, of a `GRUCell` for one `GRUParams`.

    For a `torch.nn.GRU` of one layer pass `(params,)`, a stack of one. The arrays are transposed
    and no biases are summed. Load them with
    `module.load_state_dict({k: torch.from_numpy(v) for k, v in exported.weights.items()})`.

    Args:
      params: a `GRUParams`, a `Bidirectional` or a stack, with reset "after" and tanh. The layers
        of a stack have one size and take all outputs of the layer below. The arrays are copied; if
        z has the opposite meaning in the target, the update gate is negated.

    Returns: names to arrays, and the arguments of the module's constructor.
    Raises:
      ValueError: the target cannot compute the equation (reset gate, activation, layer-norm
        scales), or sizes do not fit; for PyTorch also if layers differ in H or in their number of
        directions.
      TypeError: params are of another kind, or dtypes differ.

    >>> params = from_torch({"weight_ih": np.ones((9, 2)), "weight_hh": np.ones((9, 3))}).params
    >>> exported = to_torch((params,))
    >>> sorted(exported.weights), exported.options["num_layers"]
    (['weight_hh_l0', 'weight_ih_l0'], 1)
    """
    params, notes = common.require_exportable("to_torch", params, _TARGETS)
    first = common.cells_of(params)[0]
    input_size, hidden_size, bias = len(first.w_x), len(first.w_h), first.b_x is not None
    options = {"input_size": input_size, "hidden_size": hidden_size, "bias": bias}
    if isinstance(params, GRUParams):
        return Exported(_named(params, ""), options, notes)
    layers, weights = as_stack(params), {}
    kind, both = type(layers[0]), isinstance(layers[0], Bidirectional)
    for k, layer in enumerate(layers):
        wanted = ((1 + both) * hidden_size if k else input_size, hidden_size)
        for cell, end in zip(directions_of(layer), _ENDS):
            found = (len(cell.w_x), len(cell.w_h))
            if type(layer) is not kind or found != wanted:
                raise ValueError(
                    f"to_torch: params[{k}] must be a {kind.__name__} with (I, H) = {wanted}, as "
                    "all layers of a torch.nn.GRU are alike and take all outputs of the layer "
                    f"below, got a {type(layer).__name__} with {found}."
                )
            weights |= _named(cell, end.format(k))
    options |= {"num_layers": len(layers), "bidirectional": both}
    return Exported(weights, options, notes)


def _named(cell, suffix):
    """The arrays of one cell under PyTorch's names."""
    arrays = {name + suffix: getattr(cell, field) for name, field in _NAMES.items()}
    return {k: np.ascontiguousarray(v.T) for k, v in arrays.items() if v is not None}
