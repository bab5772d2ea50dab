"""Helpers of all converters: checks of named arrays, and what a target library can compute.

No array is cast, broadcast or dropped. Arrays that do not fit raise one error that lists all.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from jaxgru.core.parameters import Activation, GRUParams, require_params
from jaxgru.stacks.forms import Bidirectional, as_stack, directions_of

ONE_BIAS = (
    "r and z have one bias in the source: b_h starts at zero for them and is trained beside b_x"
)
_FLOATS = ("float64", "float32", "bfloat16", "float16")


class Imported(NamedTuple):
    """The weights of another library as parameters of this package.

    Attributes:
      params: a `GRUParams`, a `Bidirectional` or a stack (a tuple), of NumPy arrays in the source's
        dtype, with the source's equation as their spec.
      notes: one sentence for each difference from the source; empty if there is none.
    """

    params: Any
    notes: tuple[str, ...]


class Exported(NamedTuple):
    """Parameters of this package as the weights of another library.

    Attributes:
      weights: NumPy arrays under the target's names, in the order or nesting that it loads.
      options: the arguments of the target's constructor; a list with one entry per layer where
        `weights` is such a list.
      notes: one sentence each for what was summed, negated or filled with zeros.
    """

    weights: Any
    options: Any
    notes: tuple[str, ...]


class Target(NamedTuple):
    """What another library's GRU can compute, and which biases it has."""

    name: str
    resets: tuple[str, ...] = ("before", "after")
    activations: tuple[str, ...] = get_args(Activation)
    update: str = "keep"
    biases: int = 2  # how many of b_x and b_h it has
    always: bool = False  # whether it always has them
    merged: str = ""  # which biases it has once, for a note, where b_x and b_h are summed


def named_arrays(function, argument, source, prefix="", separator="/", known_by=()) -> Any:
    """{name: array} of the names in a mapping that begin with a prefix, without that prefix.

    The names of nested mappings are joined by the separator. The arrays are copies, so a library
    that updates its own in place does not change them. If a name of `known_by` occurs only behind
    other prefixes, the error lists those.
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
        raise ValueError(
            f"{function}: prefix must be one of {', '.join(map(repr, starts))}, where {argument} "
            f"holds a GRU, got {prefix!r}."
        )
    chosen = {k: v for k, v in flat.items() if k.startswith(prefix)}
    if not chosen:
        names, most = [str(k) for k in flat], 20
        more = [f"... and {len(names) - most} more"] if len(names) > most else []
        raise ValueError(
            f"{function}: prefix must be the start of a name in {argument}, got {prefix!r}; the "
            f"names are {', '.join(names[:most] + more) or 'none'}."
        )
    return {
        k.removeprefix(prefix): as_float_array(function, f"{argument}[{k!r}]", v)
        for k, v in chosen.items()
    }


def as_float_array(function: str, name: str, value: Any) -> np.ndarray:
    """A NumPy copy; TypeError unless it is floating, a warning if a value is not finite."""
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


def bind(function: str, argument: str, arrays: Any, axes: Mapping[str, str]) -> Any:
    """The arrays, if their names are exactly those of `axes`, with its shapes and one dtype.

    `axes` maps names to axes such as "3H I"; a letter has the same size in all of them. The error
    lists all missing keys, unexpected keys and size mismatches.
    """
    sizes = _sizes(arrays, axes)
    found = {
        "missing keys": [f"{name} [{axes[name]}]" for name in axes if name not in arrays],
        "unexpected keys": [name for name in arrays if name not in axes],
        "size mismatch": [
            f"{name} {arrays[name].shape} for [{wanted}]"
            for name, wanted in axes.items()
            if name in arrays and arrays[name].shape != _shape(wanted, sizes)
        ],
    }
    if any(found.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in found.items() if names)
        known = ", ".join(f"{letter}={size}" for letter, size in sizes.items())
        raise ValueError(
            f"{function}: {argument} must hold {', '.join(axes)}, got {listed}"
            + (f" (with {known})." if found["size mismatch"] else ".")
        )
    _require_one_dtype(function, argument, arrays.values())
    return arrays


def _require_one_dtype(function, argument, arrays):
    """TypeError if dtypes differ."""
    dtypes = sorted({str(np.dtype(array.dtype)) for array in arrays})
    if len(dtypes) > 1:
        found = ", ".join(dtypes)
        raise TypeError(f"{function}: {argument} must have one dtype, got {found}; cast to one.")


def map_layers(function, argument, tree, read, is_layer=lambda tree: False) -> Any:
    """read(name, cell) of each cell of a layer or a stack, in the same nesting; a stack is a tuple.

    `is_layer` is True for a list that is one layer of the source, not a list of layers.
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
            raise TypeError(f"{function}: {name} must be one layer, got a list inside a list.")
        layers.append(map_layers(function, name, layer, read, is_layer))
    return tuple(layers)


def is_stack(params: Any) -> bool:
    """True for a list or tuple that is not a named tuple of this package."""
    return isinstance(params, list | tuple) and not hasattr(params, "_fields")


def read_layers(function: str, cell: Any, read: Callable[[str, Any], Any]) -> Any:
    """What `read` returns for each cell, in the nesting of `cell`, if the layers fit together."""
    return require_fit(function, "cell", map_layers(function, "cell", cell, read))


def require_fit(function: str, argument: str, params: Any) -> Any:
    """The parameters, if directions and layers fit together and all have one dtype."""
    layers = as_stack(params)
    for number, layer in enumerate(layers):
        name = f"{argument}[{number}]" if is_stack(params) else argument
        sizes = [(cell.w_x.shape[0], cell.w_h.shape[0]) for cell in directions_of(layer)]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"{function}: {name} must have the same I and H in both directions, got {sizes[0]} "
                f"and {sizes[1]}; give consecutive layers as a list."
            )
        below = [cell.w_h.shape[0] for cell in directions_of(layers[number - 1])]
        if number and sizes[0][0] not in (sum(below), below[0]):
            raise ValueError(
                f"{function}: {name} must take the {sum(below)} outputs of the layer below it, "
                f"got I={sizes[0][0]}."
            )
    _require_one_dtype(function, argument, [cell.w_x for cell in cells_of(params)])
    return params


def require_exportable(function: str, params: Any, target: Target) -> tuple[Any, list[str]]:
    """The parameters as NumPy arrays with the target's meaning of z, and notes of what changed."""
    negated = []

    def read(name, cell):
        if not isinstance(cell, GRUParams):
            cure = f"; pass {name}.layers." if hasattr(cell, "layers") else "."
            raise TypeError(
                f"{function}: {name} must be a GRUParams, got {type(cell).__name__}{cure}"
            )
        with jax.enable_x64(True):  # nothing is computed, so float64 need not be enabled
            require_params(function, cell, name)
        _require_equation(function, name, cell, target)
        arrays = {k: as_float_array(function, f"{name}.{k}", v) for k, v in _present(cell)}
        cell = dataclasses.replace(cell, **arrays)
        if cell.spec.update == target.update:
            return cell
        negated.append(name)
        return negate_update(cell)

    converted = require_fit(function, "params", map_layers(function, "params", params, read))
    for number, layer in enumerate(as_stack(converted)):
        if len({cell.spec for cell in directions_of(layer)}) > 1:
            raise ValueError(
                f"{function}: layer {number} of params must have one spec in both directions, as "
                f"{target.name} has, got {' and '.join(str(c.spec) for c in directions_of(layer))}."
            )
    negation = "the update gate's weights and biases are negated: "
    return converted, [f"{negation}z {target.update}s in {target.name}"] if negated else []


def _require_equation(function, name, cell, target):
    """ValueError if the target cannot compute the equation of a cell."""
    for field, known in (("reset", target.resets), ("activation", target.activations)):
        value = getattr(cell.spec, field)
        if value not in known:
            raise ValueError(
                f"{function}: {name}.spec.{field} must be {' or '.join(map(repr, known))}, which "
                f"is all that {target.name} computes, got {value!r}; no weights make the two "
                f"equations equal, so train a model with {field}={known[0]!r}."
            )
    if cell.g_x is not None or cell.g_h is not None:
        raise ValueError(
            f"{function}: {name} must have no layer-norm scale, because {target.name} has no layer "
            "normalization of the gates' products, got g_x or g_h."
        )


def negate_update(params: GRUParams) -> GRUParams:
    """The cell whose z is 1 - z of this one, exactly: sigmoid(-a) = 1 - sigmoid(a)."""

    def negate(v):
        signs = np.array([[1], [-1], [1]], v.dtype)  # of the blocks r | z | n
        return (v.reshape(*v.shape[:-1], 3, -1) * signs).reshape(v.shape)

    other = "write" if params.spec.update == "keep" else "keep"
    spec = dataclasses.replace(params.spec, update=other)
    return dataclasses.replace(params, **{k: negate(v) for k, v in _present(params)}, spec=spec)


def reorder(v: Any) -> Any:
    """Blocks r | z | n as z | r | n, or back."""
    r, z, n = np.split(np.asarray(v), 3, axis=-1)
    return np.ascontiguousarray(np.concatenate([z, r, n], axis=-1))


def only_n(b_n: np.ndarray) -> Any:
    """[0 | 0 | b_n]."""
    return np.concatenate([np.zeros(2 * b_n.size, b_n.dtype), b_n])


def filled_biases(params: GRUParams) -> tuple[np.ndarray, np.ndarray]:
    """b_x and b_h, zeros for an absent one."""
    zeros = np.zeros(params.w_h.shape[1], params.w_h.dtype)
    b_x, b_h = (zeros if b is None else np.asarray(b) for b in (params.b_x, params.b_h))
    return b_x, b_h


def merged_bias(params: GRUParams) -> tuple[np.ndarray, np.ndarray]:
    """The bias that r does not multiply [3H], and the one that r multiplies [H].

    With reset "before" they are b_x + b_h and zeros. With "after" the r and z blocks of b_x and b_h
    are summed, and the n block of b_h is the second result.
    """
    b_x, b_h = filled_biases(params)
    r, z, n = np.split(b_h, 3)
    if params.spec.reset == "before":
        return b_x + b_h, np.zeros_like(n)
    return b_x + np.concatenate([r, z, np.zeros_like(n)]), n


def bias_counts(params: Any) -> list[int]:
    """How many of its two biases every cell of a layer or stack has."""
    return [2 - (cell.b_x is None) - (cell.b_h is None) for cell in cells_of(params)]


def bias_notes(groups: list[list[int]], target: Target) -> list[str]:
    """Notes on summed and absent biases, from the `bias_counts` of cells.

    The cells of one group have biases in the target either all together or not at all.
    """
    summed = target.merged and any(2 in group for group in groups)
    short = any(min(group) < target.biases for group in groups if target.always or any(group))
    notes = [f"b_x and b_h are summed: {target.merged}"] if summed else []
    return notes + (["absent biases are written as zeros"] if short else [])


def cells_of(params: Any) -> list[GRUParams]:
    """Every GRU of a layer or stack, layer by layer, forward first."""
    return [cell for layer in as_stack(params) for cell in directions_of(layer)]


def export_cells(function: str, params: Any, target: Target, write: Callable) -> Exported:
    """Exported with one entry for each cell, in the nesting of params.

    write(name, cell, bias) returns its weights and options; `bias` is True if any cell has one.
    """
    params, notes = require_exportable(function, params, target)
    counts = bias_counts(params)

    def part(i):
        return map_layers(function, "params", params, lambda *cell: write(*cell, any(counts))[i])

    return Exported(part(0), part(1), (*notes, *bias_notes([counts], target)))


def export_layers(params: Any, layer: Callable[[Any], tuple[Any, Any]], notes: Any) -> Exported:
    """Exported with the (weights, options) of a layer, or with lists of them for a stack."""
    if isinstance(params, GRUParams | Bidirectional):
        return Exported(*layer(params), tuple(notes))
    weights, options = zip(*map(layer, params))
    return Exported(list(weights), list(options), tuple(notes))


def _present(params):
    """The (name, array) pairs of the arrays that are not None."""
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
    """{letter: size} from the first array that has it; an axis H is used before an axis 3H."""
    found = [
        (*_factor_and_letter(axis), size)
        for name, wanted in axes.items()
        if name in arrays and arrays[name].ndim == len(wanted.split())
        for axis, size in zip(wanted.split(), arrays[name].shape)
    ]
    sizes = {}
    for factor, letter, size in sorted(found, key=lambda entry: entry[0] > 1):
        if letter and size % factor == 0:
            sizes.setdefault(letter, size // factor)
    return sizes


def _shape(wanted, sizes):
    """The shape of axes such as "3H I"."""
    axes = map(_factor_and_letter, wanted.split())
    return tuple(n * (sizes.get(letter, -1) if letter else 1) for n, letter in axes)


def _factor_and_letter(axis):
    """(3, "H") of "3H", (1, "H") of "H", (2, "") of "2"."""
    letter = axis.lstrip("0123456789")
    return int(axis.removesuffix(letter) or 1), letter
