"""Weights of PyTorch, in and out; `jaxgru.interop` has the table of all layouts."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgru.core.parameters import PYTORCH, GRUParams
from jaxgru.interop.common import (
    Exported,
    Imported,
    Target,
    bias_counts,
    bias_notes,
    bind,
    filled_biases,
    named_arrays,
    numpy_cell,
    require_exportable,
)
from jaxgru.stacks.forms import Bidirectional, directions_of


def from_torch(state_dict: Mapping[str, Any], *, prefix: str = "") -> Imported:
    """The weights of a `torch.nn.GRU` or `torch.nn.GRUCell`: identical, transposed.

    w_x = weight_ih^T, w_h = weight_hh^T, b_x = bias_ih, b_h = bias_hh, blocks r | z | n
    (torch.nn.GRU's documentation, "Variables").

    Args:
      state_dict: names to tensors on the CPU, or to arrays: `module.state_dict()`.
      prefix: what the GRU's names begin with in a larger model's, such as "encoder.rnn.".

    Returns:
      Imported: a stack (a tuple, of one layer too) for a GRU, its layers `Bidirectional` where
      there are `_reverse` names; one `GRUParams` for a GRUCell. their spec is `PYTORCH`.

    Raises:
      ValueError: names are missing, surplus or misshaped, all of them listed; or prefix fits none;
        or it is an optimizer's state.
      TypeError: it is no mapping, or an array is not floating; bfloat16 tensors, which NumPy does
        not know, are cast with .float() first.

    Cost: one copy of the arrays.

    >>> cell = {"weight_ih": np.ones((9, 2)), "weight_hh": np.ones((9, 3))}
    >>> from_torch(cell).params.w_x.shape
    (2, 9)
    """
    function = "from_torch"
    if isinstance(state_dict, Mapping) and {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            "from_torch: state_dict must be a module's, got an optimizer's; its moments belong to "
            "PyTorch's arrays and do not move: start an optax optimizer anew."
        )
    known = {"known_by": ("weight_hh_l0", "weight_hh"), "prefix": prefix, "separator": "."}
    arrays = named_arrays(function, "state_dict", state_dict, **known)
    bias = any("bias" in name for name in arrays)

    def cell(suffix):
        biases = [arrays.get(f"bias_{side}{suffix}") for side in ("ih", "hh")]
        kernels = (arrays[f"weight_{side}{suffix}"].T for side in ("ih", "hh"))
        return numpy_cell(*kernels, *biases, spec=PYTORCH)

    if any(f"weight_{side}" in arrays for side in ("ih", "hh")):
        bind(function, "state_dict", arrays, _torch_axes("", "I", bias))
        return Imported(cell(""), ())
    count = max(1, sum(name.startswith("weight_hh") and "rev" not in name for name in arrays))
    both = any(name.endswith("_reverse") for name in arrays)
    suffixes = [[f"_l{k}", f"_l{k}_reverse"][: 1 + both] for k in range(count)]
    axes = {}
    for k, layer in enumerate(suffixes):
        for suffix in layer:
            axes |= _torch_axes(suffix, ("2H" if both else "H") if k else "I", bias)
    bind(function, "state_dict", arrays, axes)
    layers = tuple(
        Bidirectional(*map(cell, layer)) if both else cell(layer[0]) for layer in suffixes
    )
    return Imported(layers, ())


def to_torch(params: Any) -> Exported:
    """The state dict of a `torch.nn.GRU`, or of a `torch.nn.GRUCell` for a single `GRUParams`.

    The transpose of `from_torch`; nothing is merged. Load it with
    `module.load_state_dict({k: torch.from_numpy(v) for k, v in exported.weights.items()})`.

    Args:
      params: a stack of one size, whose directions are side by side; or a `GRUParams` or a
        `Bidirectional`. Their spec must have reset "after" and tanh; where the update gate writes,
        its weights and biases are negated.

    Returns:
      Exported: names to arrays, and the arguments of the module's constructor.

    Raises:
      ValueError: PyTorch has no such cell (reset before, another activation, gains), or the layers
        differ in size or direction.
      TypeError: params are of another kind.

    Cost: one copy of the arrays.

    >>> params = from_torch({"weight_ih": np.ones((9, 2)), "weight_hh": np.ones((9, 3))}).params
    >>> exported = to_torch((params,))
    >>> sorted(exported.weights), exported.options["num_layers"]
    (['weight_hh_l0', 'weight_ih_l0'], 1)
    """
    params, notes = require_exportable("to_torch", params, Target("torch.nn.GRU", ("after",)))
    bias = any(bias_counts(params))
    notes += bias_notes([bias_counts(params)], 2)
    if isinstance(params, GRUParams):
        sizes = {"input_size": params.w_x.shape[0], "hidden_size": params.w_h.shape[0]}
        return Exported(_torch_cell(params, "", bias), sizes | {"bias": bias}, tuple(notes))
    layers = (params,) if isinstance(params, Bidirectional) else params
    both = isinstance(layers[0], Bidirectional)
    first = directions_of(layers[0])[0]
    input_size, hidden_size = first.w_x.shape[0], first.w_h.shape[0]
    weights = {}
    for k, layer in enumerate(layers):
        if isinstance(layer, Bidirectional) != both:
            raise ValueError(
                "to_torch: params must have layers that are all Bidirectional or none, as "
                f"torch.nn.GRU has, got another kind in layer {k}."
            )
        wanted = (input_size if k == 0 else (1 + both) * hidden_size, hidden_size)
        for cell, suffix in zip(directions_of(layer), (f"_l{k}", f"_l{k}_reverse")):
            found = (cell.w_x.shape[0], cell.w_h.shape[0])
            if found != wanted:
                raise ValueError(
                    f"to_torch: params must have layers of one size H that read all outputs below, "
                    f"as torch.nn.GRU has, got I, H = {found} in layer {k} for {wanted}."
                )
            weights |= _torch_cell(cell, suffix, bias)
    options = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": len(layers)}
    return Exported(weights, options | {"bias": bias, "bidirectional": both}, tuple(notes))


def _torch_axes(suffix, input_axis, bias):
    """The names and axes of one cell in PyTorch."""
    axes = {f"weight_hh{suffix}": "3H H", f"weight_ih{suffix}": f"3H {input_axis}"}
    return axes | ({f"bias_ih{suffix}": "3H", f"bias_hh{suffix}": "3H"} if bias else {})


def _torch_cell(cell, suffix, bias):
    """One cell's arrays under PyTorch's names."""
    kernels = {"ih": cell.w_x, "hh": cell.w_h}
    weights = {f"weight_{k}{suffix}": np.ascontiguousarray(v.T) for k, v in kernels.items()}
    if bias:
        weights |= {f"bias_{k}{suffix}": v for k, v in zip(kernels, filled_biases(cell))}
    return weights
