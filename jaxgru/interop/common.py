"""What all converters of weights share: named NumPy arrays in, checked, and what a target can hold.

No array is cast, broadcast or dropped: what does not fit raises, with the whole list.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from jaxgru.core.parameters import Activation, GRUParams, GRUSpec, require_params
from jaxgru.stacks.forms import Bidirectional, directions_of

ONE_BIAS = "r and z have one bias in the source: b_h is zero there, and learns beside b_x from now"
ALL_ACTIVATIONS = get_args(Activation)
_FLOATS = ("float64", "float32", "bfloat16", "float16")
_Z_AFTER_R = np.array([[1], [-1], [1]])


class Imported(NamedTuple):
    """Another library's weights, as this package's.

    Attributes:
      params: a `GRUParams`, a `Bidirectional` or a stack, of NumPy arrays in the source's dtype and
        with its equation as their spec: `gru` and `gru_stack` run them as they are.
      notes: what stands otherwise than in the source, one sentence each; empty for an identity.
    """

    params: Any
    notes: tuple[str, ...]


class Exported(NamedTuple):
    """This package's weights, as another library's.

    Attributes:
      weights: NumPy arrays under the target's names, in the order or nesting that it loads.
      options: what the target's constructor must be told; a list with one entry a layer where
        `weights` is one.
      notes: what was merged, negated or filled in, one sentence each.
    """

    weights: Any
    options: Any
    notes: tuple[str, ...]


class Target(NamedTuple):
    """What another library's GRU can compute."""

    name: str
    resets: tuple[str, ...]
    update: str = "keep"
    activations: tuple[str, ...] = ("tanh",)


def named_arrays(
    function: str,
    argument: str,
    source: Any,
    *,
    prefix: str = "",
    separator: str = "/",
    known_by: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """{name: array} of a mapping, nested ones joined by the separator, of the names with a prefix.

    The arrays are copies: a library that trains on in place does not reach them. Where none of the
    names in `known_by` is there, but behind another prefix, that is said.
    """
    if not isinstance(source, Mapping):
        raise TypeError(
            f"{function}: {argument} must be a mapping of names to arrays, got "
            f"{type(source).__name__}."
        )
    if not isinstance(prefix, str):
        raise TypeError(f"{function}: prefix must be a string, got {prefix!r}.")
    flat = _flatten(function, source, separator)
    ends = [(k, key) for k in flat for key in known_by if k.endswith(separator + key)]
    starts = sorted({k.removesuffix(key) for k, key in ends})
    if starts and not any(prefix + key in flat for key in known_by):
        known = ", ".join(map(repr, starts))
        raise ValueError(
            f"{function}: prefix must be one of {known}, where {argument} holds a GRU, got "
            f"{prefix!r}."
        )
    chosen = {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
    if not chosen:
        raise ValueError(
            f"{function}: prefix must begin a name of {argument}, got {prefix!r}; the names are "
            f"{_listed(flat)}."
        )
    return {
        k: as_float_array(function, f"{argument}[{prefix + k!r}]", v) for k, v in chosen.items()
    }


def as_float_array(function: str, name: str, value: Any) -> np.ndarray:
    """A NumPy copy; TypeError unless floating, a warning where it is not finite."""
    try:
        array = np.asarray(value).copy()
    except (TypeError, RuntimeError, ValueError) as error:
        raise TypeError(
            f"{function}: {name} must be an array that NumPy can hold, got "
            f"{type(value).__name__} ({error}); move it to the CPU, detach it, and cast PyTorch's "
            "bfloat16 with .float()."
        ) from error
    if array.dtype.name not in _FLOATS:
        raise TypeError(
            f"{function}: {name} must be an array of {', '.join(_FLOATS)}, got dtype {array.dtype}."
        )
    bad = array.size - int(np.isfinite(array.astype(np.float64)).sum())
    if bad:
        warnings.warn(f"{function}: {name} holds {bad} values that are not finite.", stacklevel=4)
    return array


def bind(
    function: str, argument: str, arrays: dict[str, np.ndarray], axes: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """The arrays, if they are exactly those of `axes`, of its shapes and one dtype.

    `axes` maps names to axes such as "3H I"; a letter has one size in all of them.

    Raises:
      ValueError: listing every name that is missing, surplus or misshaped.
      TypeError: dtypes differ.
    """
    missing = [f"{name} [{axes[name]}]" for name in axes if name not in arrays]
    surplus = [name for name in arrays if name not in axes]
    sizes = _sizes(arrays, axes)
    misshaped = [
        f"{name} {arrays[name].shape} for [{wanted}]"
        for name, wanted in axes.items()
        if name in arrays and arrays[name].shape != _shape(wanted, sizes)
    ]
    if missing or surplus or misshaped:
        found = [("missing", missing), ("surplus", surplus), ("misshaped", misshaped)]
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in found if names)
        known = ", ".join(f"{unit}={size}" for unit, size in sizes.items())
        raise ValueError(
            f"{function}: {argument} must hold {', '.join(axes)}, got {listed}"
            + (f" (with {known})." if misshaped else ".")
        )
    dtypes = {str(array.dtype) for array in arrays.values()}
    if len(dtypes) > 1:
        found = ", ".join(sorted(dtypes))
        raise TypeError(
            f"{function}: {argument} must hold arrays of one dtype, got {found}; cast them to one."
        )
    return arrays


def map_layers(
    function: str,
    argument: str,
    tree: Any,
    read: Callable[[str, Any], Any],
    is_layer: Callable[[Any], bool] = lambda tree: False,
) -> Any:
    """`read` of each cell of one layer or a stack, in the same nesting; stacks become tuples.

    `is_layer` tells a list that is a layer of the source from a list of layers.
    """
    if isinstance(tree, Bidirectional):
        return Bidirectional(
            read(f"{argument}.forward", tree.forward), read(f"{argument}.backward", tree.backward)
        )
    if is_layer(tree) or not is_stack(tree):
        return read(argument, tree)
    if not tree:
        raise ValueError(f"{function}: {argument} must hold at least one layer, got none.")
    layers = []
    for number, layer in enumerate(tree):
        name = f"{argument}[{number}]"
        if is_stack(layer) and not is_layer(layer):
            raise TypeError(f"{function}: {name} must be one layer, got a list in a list.")
        layers.append(map_layers(function, name, layer, read, is_layer))
    return tuple(layers)


def is_stack(params: Any) -> bool:
    """True for a list or tuple that is none of the package's own."""
    return isinstance(params, list | tuple) and not hasattr(params, "_fields")


def require_fit(function: str, argument: str, params: Any) -> Any:
    """The parameters, if directions and layers fit one another and all are of one dtype."""
    layers = params if is_stack(params) else (params,)
    for number, layer in enumerate(layers):
        name = f"{argument}[{number}]" if is_stack(params) else argument
        sizes = [(cell.w_x.shape[0], cell.w_h.shape[0]) for cell in directions_of(layer)]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"{function}: {name} must have two directions of the same I, H, got {sizes[0]} and "
                f"{sizes[1]}; layers that follow one another go into a list."
            )
        below = [cell.w_h.shape[0] for cell in directions_of(layers[number - 1])]
        if number and sizes[0][0] not in (sum(below), below[0]):
            raise ValueError(
                f"{function}: {name} must read the {sum(below)} outputs of the layer below it, "
                f"got I={sizes[0][0]}."
            )
    dtypes = {str(np.dtype(cell.w_x.dtype)) for cell in cells_of(params)}
    if len(dtypes) > 1:
        found = ", ".join(sorted(dtypes))
        raise TypeError(f"{function}: {argument} must be of one dtype, got {found}; cast them.")
    return params


def require_exportable(function: str, params: Any, target: Target) -> tuple[Any, list[str]]:
    """The parameters as NumPy arrays with the target's meaning of z, and notes of what changed.

    Raises:
      ValueError: the target cannot compute this equation, and why.
      TypeError: params are of another kind.
    """
    negated = []

    def read(name, cell):
        with jax.enable_x64(True):  # float64 is for the caller to enable, where it is computed
            if not isinstance(cell, GRUParams):
                has_layers = hasattr(cell, "layers")
                raise TypeError(
                    f"{function}: {name} must be a GRUParams, got {type(cell).__name__}"
                    + (f"; its layers are {name}.layers." if has_layers else ".")
                )
            require_params(function, cell, name)
        _require_equation(function, name, cell.spec, target)
        if cell.g_x is not None or cell.g_h is not None:
            raise ValueError(
                f"{function}: {name} must have no gains, as {target.name} has no layer "
                "normalization of the gates' products, got g_x or g_h."
            )
        arrays = {k: as_float_array(function, f"{name}.{k}", v) for k, v in _present(cell)}
        cell = dataclasses.replace(cell, **arrays)
        if cell.spec.update == target.update:
            return cell
        negated.append(name)
        return negate_update(cell)

    converted = require_fit(function, "params", map_layers(function, "params", params, read))
    for number, layer in enumerate(converted if is_stack(converted) else (converted,)):
        if len({cell.spec for cell in directions_of(layer)}) > 1:
            raise ValueError(
                f"{function}: layer {number} of params must have one spec in both directions, as "
                f"{target.name} has, got {' and '.join(str(c.spec) for c in directions_of(layer))}."
            )
    notes = []
    if negated:
        notes.append(
            f"the update gate's weights and biases are negated: z {target.update}s in {target.name}"
        )
    return converted, notes


def _require_equation(function, name, spec, target):
    """ValueError where the target cannot compute this equation, and why."""
    if spec.reset not in target.resets:
        raise ValueError(
            f"{function}: {name}.spec.reset must be {' or '.join(map(repr, target.resets))}, which "
            f"is all that {target.name} computes, got {spec.reset!r}: no weights make one of the "
            "two equal to the other; train the model again with the other equation."
        )
    if spec.activation not in target.activations:
        known = ", ".join(map(repr, target.activations))
        raise ValueError(
            f"{function}: {name}.spec.activation must be one of {known}, which is all that "
            f"{target.name} computes, got {spec.activation!r}."
        )


def numpy_cell(w_x: Any, w_h: Any, b_x: Any = None, b_h: Any = None, *, spec: GRUSpec) -> GRUParams:
    """GRUParams of NumPy arrays, which JAX takes wherever it takes its own."""
    return GRUParams(w_x, w_h, b_x, b_h, spec=spec)


def negate_update(params: GRUParams) -> GRUParams:
    """The cell whose z is 1 - z of this one, exactly: s(-a) = 1 - s(a)."""

    def flip(v):
        signs = _Z_AFTER_R.astype(v.dtype)
        return (v.reshape(*v.shape[:-1], 3, -1) * signs).reshape(v.shape)

    other = "write" if params.spec.update == "keep" else "keep"
    spec = dataclasses.replace(params.spec, update=other)
    return dataclasses.replace(params, **{k: flip(v) for k, v in _present(params)}, spec=spec)


def reorder(v: Any) -> np.ndarray:
    """Blocks r | z | n as z | r | n, or back."""
    r, z, n = np.split(np.asarray(v), 3, axis=-1)
    return np.ascontiguousarray(np.concatenate([z, r, n], axis=-1))


def filled_biases(params: GRUParams) -> tuple[np.ndarray, np.ndarray]:
    """b_x and b_h, zeros for an absent one."""
    zeros = np.zeros(params.w_h.shape[1], params.w_h.dtype)
    b_x, b_h = (zeros if b is None else np.asarray(b) for b in (params.b_x, params.b_h))
    return b_x, b_h


def merged_bias(params: GRUParams, reset: str) -> tuple[np.ndarray, np.ndarray]:
    """The sum of what acts outside the reset gate [3H], and what r multiplies [H].

    "before": b_x + b_h and zeros; "after": r and z blocks summed, b_xn, and b_hn by itself.
    """
    b_x, b_h = filled_biases(params)
    if reset == "before":
        return b_x + b_h, np.zeros_like(b_h[: params.w_h.shape[0]])
    outside = b_h.copy()
    outside[2 * params.w_h.shape[0] :] = 0
    return b_x + outside, np.split(b_h, 3)[2]


def bias_counts(params: Any) -> list[int]:
    """How many of its two biases every cell of a layer or stack has."""
    return [2 - (cell.b_x is None) - (cell.b_h is None) for cell in cells_of(params)]


def bias_notes(
    groups: list[list[int]], slots: int, *, always: bool = False, merged: str = ""
) -> list[str]:
    """What becomes of biases in a target that has `slots` of the two, for cells with such counts.

    A group is what has biases together or not at all; `always` is for targets that have them in any
    case. `merged` says of which there is one, where b_x and b_h are summed.
    """
    summed = merged and any(2 in group for group in groups)
    short = any(min(group) < slots for group in groups if always or any(group))
    notes = [f"b_x and b_h are summed: {merged}"] if summed else []
    return notes + (["absent biases are written as zeros"] if short else [])


def cells_of(params: Any) -> list[GRUParams]:
    """Every GRU of a layer or stack, layer by layer, forward first."""
    layers = params if is_stack(params) else (params,)
    return [cell for layer in layers for cell in directions_of(layer)]


def only_n(b_n: np.ndarray) -> np.ndarray:
    """[0 | 0 | b_n]."""
    return np.concatenate([np.zeros(2 * b_n.size, b_n.dtype), b_n])


def exported_cells(
    function: str, params: Any, write: Callable, options: Callable, notes: list[str]
) -> Exported:
    """Exported, cell by cell, in the nesting of params."""
    weights, arguments = (
        map_layers(function, "params", params, visit) for visit in (write, options)
    )
    return Exported(weights, arguments, tuple(notes))


def each_layer(params: Any, layer: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, Any]:
    """(weights, options) of a layer, or lists of them for a stack."""
    if isinstance(params, GRUParams | Bidirectional):
        return layer(params)
    weights, options = zip(*map(layer, params))
    return list(weights), list(options)


def read_layers(function: str, cell: Any, read: Callable[[str, Any], Any]) -> Any:
    """What `read` makes of each cell, in their nesting, if it fits together."""
    return require_fit(function, "cell", map_layers(function, "cell", cell, read))


def _present(params):
    """The (name, array) pairs of the fields that are not None."""
    return [(k, v) for k, v in params.arrays().items() if v is not None]


def _flatten(function, source, separator):
    """{joined name: leaf} of nested mappings."""
    flat: dict[str, Any] = {}
    for key, value in source.items():
        inner = {str(key): value}
        if isinstance(value, Mapping):
            leaves = _flatten(function, value, separator).items()
            inner = {f"{key}{separator}{name}": leaf for name, leaf in leaves}
        if clash := flat.keys() & inner.keys():
            raise ValueError(f"{function}: two arrays have the name {clash.pop()!r}.")
        flat |= inner
    return flat


def _sizes(arrays, axes):
    """{letter: size}, each from the first array that tells; a plain letter before a multiple."""
    sizes = {}
    for multiple in (False, True):
        for name, wanted in axes.items():
            tokens = wanted.split()
            if name not in arrays or arrays[name].ndim != len(tokens):
                continue
            for token, size in zip(tokens, arrays[name].shape):
                unit = token.lstrip("0123456789")
                factor = int(token.removesuffix(unit) or 1)
                if unit and (factor > 1) == multiple and size % factor == 0:
                    sizes.setdefault(unit, size // factor)
    return sizes


def _shape(wanted, sizes):
    """The shape that axes such as "3H I" stand for."""

    def size(token):
        unit = token.lstrip("0123456789")
        return int(token.removesuffix(unit) or 1) * (sizes.get(unit, -1) if unit else 1)

    return tuple(map(size, wanted.split()))


def _listed(names, most=20):
    """The first names, and how many more."""
    names = list(names)
    more = f", ... and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more if names else "none"
