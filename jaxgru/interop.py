"""Weights of other libraries, in and out: NumPy arrays under their names and in their layouts.

The equation is this package's, with a cell's spec; what differs is where the numbers stand:

===========  =========================  ======  ==================================  ======
library      kernels                    blocks  biases                              reset
===========  =========================  ======  ==================================  ======
PyTorch      [3H, I], [3H, H]           r z n   [3H] and [3H], or none              after
Keras 3      [I, 3H], [H, 3H]           z r n   after: [2, 3H]; before: [3H]        either
Flax linen   [I, H], [H, H] per gate    names   r, z: one; n: one each side of r    after
Flax nnx     [I, 3H], [H, 3H]           r z n   [3H], none that r multiplies        after
Equinox      [3H, I], [3H, H]           r z n   [3H], and [H] that r multiplies     after
Haiku        [I, 3H], [H, 3H]           z r n   [3H]; z writes                      before
ONNX         [D, 3H, I], [D, 3H, H]     z r n   [D, 6H], D directions               either
haste        [I, 3H], [H, 3H]           z r n   [3H] and [3H]                       after
===========  =========================  ======  ==================================  ======

z keeps the old state in all but Haiku; since s(-a) = 1 - s(a), the update gate's weights with the
other sign change the one into the other exactly. Biases that only ever act as a sum may be summed:
outputs and the gradients of everything else stay what they were, but two biases that both learn
move their sum twice as fast as one. For that reason, and as moments belong to single arrays, an
optimizer's state does not survive a conversion that notes anything: start it anew.

Every `from_*` returns `Imported`, every `to_*` takes a `GRUParams`, a `Bidirectional` or a stack
and returns `Exported`. Where a library keeps one set of arrays a cell, a list of them is a stack
and a `Bidirectional` of them a layer of two directions. No other library is imported. Here are
PyTorch, Keras and haste; `jaxgru.interop_jax` has Flax, Equinox and Haiku, `jaxgru.onnx_weights`
ONNX.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgru.conversion import (
    ALL_ACTIVATIONS,
    Exported,
    Imported,
    Target,
    as_float_array,
    bias_counts,
    bias_notes,
    bind,
    each_layer,
    exported_cells,
    filled_biases,
    is_stack,
    map_layers,
    merged_bias,
    named_arrays,
    numpy_cell,
    read_layers,
    reorder,
    require_exportable,
    require_fit,
)
from jaxgru.layers import Bidirectional, directions_of
from jaxgru.parameters import CHO_2014, PYTORCH, Activation, GRUParams, GRUSpec


def from_torch(state_dict: Mapping[str, Any], *, prefix: str = "") -> Imported:
    """The weights of a `torch.nn.GRU` or `torch.nn.GRUCell`: identical, transposed.

    w_x = weight_ih^T, w_h = weight_hh^T, b_x = bias_ih, b_h = bias_hh, blocks r | z | n
    (torch.nn.GRU's documentation, "Variables").

    Args:
      state_dict: names to tensors on the CPU, or to arrays: `module.state_dict()`.
      prefix: what the GRU's names begin with in a larger model's, such as "encoder.rnn.".

    Returns:
      Imported: a stack (a tuple, of one layer too) for a GRU, its layers `Bidirectional` where
      there are `_reverse` names; one `GRUParams` for a GRUCell. spec is `PYTORCH`.

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
        return numpy_cell(arrays[f"weight_ih{suffix}"].T, arrays[f"weight_hh{suffix}"].T, *biases)

    if any(f"weight_{side}" in arrays for side in ("ih", "hh")):
        bind(function, "state_dict", arrays, _torch_axes("", "I", bias))
        return Imported(cell(""), PYTORCH, ())
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
    return Imported(layers, PYTORCH, ())


def to_torch(params: Any, *, spec: GRUSpec = CHO_2014) -> Exported:
    """The state dict of a `torch.nn.GRU`, or of a `torch.nn.GRUCell` for a single `GRUParams`.

    The transpose of `from_torch`; nothing is merged. Load it with
    `module.load_state_dict({k: torch.from_numpy(v) for k, v in exported.weights.items()})`.

    Args:
      params: a stack of one size, whose directions are side by side; or a `GRUParams` or a
        `Bidirectional`.
      spec: of params; reset "after" and tanh. An update that writes is turned by the sign of the
        update gate's weights.

    Returns:
      Exported: names to arrays, and the arguments of the module's constructor.

    Raises:
      ValueError: PyTorch has no such cell (reset before, another activation, gains), or the layers
        differ in size or direction.
      TypeError: params or spec are of another kind.

    Cost: one copy of the arrays.

    >>> params = from_torch({"weight_ih": np.ones((9, 2)), "weight_hh": np.ones((9, 3))}).params
    >>> exported = to_torch((params,), spec=PYTORCH)
    >>> sorted(exported.weights), exported.options["num_layers"]
    (['weight_hh_l0', 'weight_ih_l0'], 1)
    """
    params, notes = require_exportable("to_torch", params, spec, Target("torch.nn.GRU", ("after",)))
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


def from_keras(
    weights: Any, *, reset_after: bool | None = None, activation: Activation = "tanh"
) -> Imported:
    """The weights of a Keras 3 `GRU` layer, a `Bidirectional` or a stack: identical, reordered.

    kernel [I, 3H] and recurrent_kernel [H, 3H] in blocks z | r | n; bias [2, 3H], the input's row
    first, where the reset gate acts after the product (Keras's default), [3H] where before it. A
    layer with `go_backwards` is run with `reverse=True`; Keras gives its outputs last step first.

    Args:
      weights: of a layer, `layer.get_weights()`, for a `Bidirectional` of both directions; or a
        mapping with those names; or a list of these, a stack.
      reset_after: the layer's, for a layer without bias; else its shape tells, and must agree.
      activation: the layer's; "identity" for "linear". Its recurrent_activation must be sigmoid.

    Returns:
      Imported: a `GRUParams`, a `Bidirectional` (run it with the merge that the layer had), or a
      stack of them.

    Raises:
      ValueError: arrays are missing, surplus or misshaped; reset_after is not given where nothing
        else tells, or belies the bias; or the layers of a stack differ in it.
      TypeError: an array is not floating.

    Cost: one copy of the arrays.

    >>> from_keras([np.ones((2, 9)), np.ones((3, 9)), np.ones((2, 9))]).spec.reset
    'after'
    """
    function, resets = "from_keras", set()
    if reset_after is not None and not isinstance(reset_after, bool):
        raise TypeError(f"from_keras: reset_after must be a bool or None, got {reset_after!r}.")

    def cell(name, arrays):
        axes = {"recurrent_kernel": "H 3H", "kernel": "I 3H"}
        bias = arrays.get("bias")
        after = reset_after if bias is None else bias.ndim == 2
        if after is None:
            raise ValueError(
                f"from_keras: reset_after must be True or False for {name}, which has no bias that "
                "tells, got None."
            )
        if bias is not None and reset_after not in (None, after):
            raise ValueError(
                f"from_keras: reset_after must be {after} for a bias of shape {bias.shape}, got "
                f"{reset_after}."
            )
        resets.add("after" if after else "before")
        if bias is not None:
            axes["bias"] = "2 3H" if after else "3H"
        arrays = {k: reorder(v) for k, v in bind(function, name, arrays, axes).items()}
        biases = (None, None)
        if bias is not None:
            biases = tuple(arrays["bias"]) if after else (arrays["bias"], None)
        return numpy_cell(arrays["kernel"], arrays["recurrent_kernel"], *biases)

    def layer(name, source):
        if isinstance(source, Mapping):
            return cell(name, named_arrays(function, name, source))
        count = {2: 1, 3: 1, 4: 2, 6: 2}.get(len(source))
        if count is None:
            raise ValueError(
                f"from_keras: {name} must hold 2 or 3 arrays, or 4 or 6 of a Bidirectional, got "
                f"{len(source)}; of several layers give a list, [v.get_weights() for v in layers]."
            )
        each = len(source) // count
        names = ("kernel", "recurrent_kernel", "bias")[:each]
        arrays = [as_float_array(function, f"{name}[{i}]", v) for i, v in enumerate(source)]
        parts = [arrays[:each], arrays[each:]][:count]
        cells = [cell(name, dict(zip(names, part))) for part in parts]
        return cells[0] if count == 1 else Bidirectional(*cells)

    if not isinstance(weights, Mapping | list | tuple):
        raise TypeError(
            "from_keras: weights must be a layer's get_weights(), a mapping, or a list of those, "
            f"got {type(weights).__name__}."
        )
    params = map_layers(function, "weights", weights, layer, _is_keras_layer)
    if len(resets) > 1:
        raise ValueError(
            "from_keras: weights must be of layers with one reset_after, got both; import each "
            "with its own spec."
        )
    require_fit(function, "weights", params)
    return Imported(params, GRUSpec(resets.pop(), "keep", activation), ())


def _is_keras_layer(source):
    """True for one layer's list of arrays, or its mapping."""
    return isinstance(source, Mapping) or any(hasattr(v, "shape") for v in source)


def to_keras(params: Any, *, spec: GRUSpec = CHO_2014) -> Exported:
    """What `set_weights` of a Keras 3 `GRU` or `Bidirectional(GRU)` takes.

    With reset "before" Keras has one bias [3H]: b_x + b_h.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack.
      spec: of params; any. An update that writes is turned by the sign of z's weights.

    Returns:
      Exported: a list of arrays in the order of `get_weights`, and the arguments of `keras.layers.
      GRU`; for a stack a list of each, one a layer.

    Raises:
      ValueError: params have gains.
      TypeError: params or spec are of another kind.

    Cost: one copy of the arrays.

    >>> source = [np.ones((2, 9)), np.ones((3, 9)), np.ones((2, 9))]
    >>> exported = to_keras(from_keras(source).params, spec=PYTORCH)
    >>> [v.shape for v in exported.weights], exported.options["units"]
    ([(2, 9), (3, 9), (2, 9)], 3)
    """
    params, notes = require_exportable(
        "to_keras",
        params,
        spec,
        Target("keras.layers.GRU", ("before", "after"), activations=ALL_ACTIVATIONS),
    )
    after = spec.reset == "after"
    layers = params if is_stack(params) else (params,)
    merged = "" if after else "Keras has one bias where reset_after is False"
    notes += bias_notes(list(map(bias_counts, layers)), 2 if after else 1, merged=merged)

    def arrays(cell, bias):
        b = np.stack(filled_biases(cell)) if after else merged_bias(cell, "before")[0]
        kernels = [reorder(cell.w_x), reorder(cell.w_h)]
        return kernels + ([reorder(b)] if bias else [])

    def layer(params):
        bias = any(bias_counts(params))
        options = {
            "units": directions_of(params)[0].w_h.shape[0],
            "activation": "linear" if spec.activation == "identity" else spec.activation,
            "reset_after": after,
            "use_bias": bias,
        }
        return [v for cell in directions_of(params) for v in arrays(cell, bias)], options

    weights, options = each_layer(params, layer)
    return Exported(weights, options, tuple(notes))


def from_haste(cell: Any, *, prefix: str = "") -> Imported:
    """The weights of a haste GRU (haste_pytorch, haste_tf): identical, reordered.

    kernel [I, 3H], recurrent_kernel [H, 3H], bias and recurrent_bias [3H] in blocks z | r | g
    (haste, `gru.py`).

    Args:
      cell: a mapping with those names; a list of them is a stack, a `Bidirectional` of them a
        layer.
      prefix: what the names begin with.

    Returns:
      Imported: in the nesting of `cell`; spec is `PYTORCH`.

    Raises:
      ValueError: names are missing, surplus or misshaped, or prefix fits none.
      TypeError: it is no mapping, or an array is not floating.

    Cost: one copy of the arrays.
    """

    def read(name, source):
        arrays = named_arrays(
            "from_haste", name, source, prefix=prefix, known_by=("recurrent_kernel",)
        )
        bind("from_haste", name, arrays, _HASTE)
        w_h, w_x, b_x, b_h = (reorder(arrays[key]) for key in _HASTE)
        return numpy_cell(w_x, w_h, b_x, b_h)

    return Imported(read_layers("from_haste", cell, read), PYTORCH, ())


def to_haste(params: Any, *, spec: GRUSpec = CHO_2014) -> Exported:
    """The parameters of a haste GRU; nothing is merged.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack.
      spec: of params; reset "after" and tanh.

    Returns:
      Exported: names to arrays for each cell, in the nesting of params, and the arguments of each.

    Raises:
      ValueError: haste has no such cell: reset before, another activation, or gains.
      TypeError: params or spec are of another kind.

    Cost: one copy of the arrays.
    """
    params, notes = require_exportable("to_haste", params, spec, Target("haste.GRU", ("after",)))
    notes += bias_notes([bias_counts(params)], 2, always=True)

    def write(name, cell):
        arrays = (cell.w_h, cell.w_x, *filled_biases(cell))
        return {key: reorder(v) for key, v in zip(_HASTE, arrays)}

    def options(name, cell):
        return {"input_size": cell.w_x.shape[0], "hidden_size": cell.w_h.shape[0]}

    return exported_cells("to_haste", params, write, options, notes)


_HASTE = {"recurrent_kernel": "H 3H", "kernel": "I 3H", "bias": "3H", "recurrent_bias": "3H"}
