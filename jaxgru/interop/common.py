"""What all converters share: checks of named arrays, the walk over a stack, the biases of a target.

No array is cast, broadcast or dropped. Arrays that do not fit raise one error that lists all.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from jaxgru.core.checks import require_choice
from jaxgru.core.parameters import Activation, GRUParams, GRUSpec, require_params
from jaxgru.stacks.forms import Bidirectional, as_stack, directions_of, map_grus

_ONE_BIAS = (
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
      options: the arguments of the target's constructor, for each entry where `weights` is a
        list, a tuple or a `Bidirectional`.
      notes: one sentence each for what was summed, negated or filled with zeros.
    """

    weights: Any
    options: Any
    notes: tuple[str, ...]


class Target(NamedTuple):
    """What the GRU of another library computes with one of the resets, and which biases it has."""

    name: str
    activations: tuple[str, ...] = get_args(Activation)
    update: str = "keep"
    biases: int = 2  # how many of b_x and b_h it has
    always: bool = False  # True if its biases cannot be left out
    merged: str = ""  # note that says which biases the target has only once; empty if it has both


def named_arrays(
    function, argument, source, prefix="", separator="/", known_by=(), optional=()
) -> Any:
    """{name: array} of the names in a mapping that begin with a prefix, without that prefix.

    The names of nested mappings are joined by the separator. The arrays are copies, so a library
    that updates its own in place does not change them. If a name of `known_by` occurs only behind
    other prefixes, the error lists those. A name of `optional` may be None, and is then left out.
    """
    if not isinstance(source, Mapping):
        cure = "; pass its state_dict()" if hasattr(source, "state_dict") else ""
        raise TypeError(
            f"{function}: {argument} must be a mapping of names to arrays, got "
            f"{type(source).__name__}{cure}."
        )
    if not isinstance(prefix, str):
        raise TypeError(f"{function}: prefix must be a string, got {prefix!r}.")
    flat: dict[str, Any] = {}
    for name, value in named_leaves(source, separator):
        if name in flat:
            raise ValueError(f"{function}: two arrays have the name {name!r}.")
        flat[name] = value
    ends = [(k, key) for k in flat for key in known_by if k.endswith(separator + key)]
    starts = sorted({k.removesuffix(key) for k, key in ends})
    if starts and not any(prefix + key in flat for key in known_by):
        raise ValueError(
            f"{function}: prefix must be one of {', '.join(map(repr, starts))}, where {argument} "
            f"holds a GRU, got {prefix!r}."
        )
    if not any(k.startswith(prefix) for k in flat):
        names, most = list(flat), 20
        more = [f"... and {len(names) - most} more"] if len(names) > most else []
        raise ValueError(
            f"{function}: prefix must be the start of a name in {argument}, got {prefix!r}; the "
            f"names are {', '.join(names[:most] + more) or 'none'}."
        )
    return {
        k.removeprefix(prefix): as_float_array(function, f"{argument}[{k!r}]", v)
        for k, v in flat.items()
        if k.startswith(prefix) and not (v is None and k.removeprefix(prefix) in optional)
    }


def as_float_array(function: str, name: str, value: Any) -> np.ndarray:
    """A NumPy copy in the byte order of this machine, which JAX and hashes of bytes need.

    TypeError unless it is floating, a warning if a value is not finite.
    """
    try:
        array = np.asarray(value)
        array = array.astype(array.dtype.newbyteorder("="))
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


def bind(function: str, argument: str, arrays: Any, axes: Mapping[str, str], biases=()) -> Any:
    """The arrays, if their names are exactly those of `axes`, with its shapes and one dtype.

    `axes` maps names to axes such as "3H I"; a letter has the same size in all of them. All of
    `biases` may be absent together. The error lists all missing keys, unexpected keys and size
    mismatches.
    """
    if not any(name in arrays for name in biases):
        axes = {name: wanted for name, wanted in axes.items() if name not in biases}
    shapes, sizes = _shapes(arrays, axes)
    found = {
        "missing keys": [f"{name} [{axes[name]}]" for name in axes if name not in arrays],
        "unexpected keys": [name for name in arrays if name not in axes],
        "size mismatch": [
            f"{name} {arrays[name].shape} for [{wanted}]"
            for name, wanted in axes.items()
            if name in arrays and arrays[name].shape != shapes[name]
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


def is_stack(params: Any) -> bool:
    """True for a list or tuple that is not a named tuple of this package."""
    return isinstance(params, list | tuple) and not hasattr(params, "_fields")


def import_cells(
    function, cell, axes, convert, prefix="", biases=(), one_bias=False, modules=False
) -> Imported:
    """Imported with convert(arrays) of each cell, whose arrays have the axes; see `bind`.

    A cell has the first name of `axes`; its `biases` may be None. `one_bias` says that the biases
    need a note, if there are some, and `modules` that a cell may be an object that has the arrays
    as attributes.
    """

    def read(name, source):
        if modules and all(hasattr(source, field) for field in axes):
            source = {field: getattr(source, field) for field in axes}
        known_by = (next(iter(axes)),)
        arrays = named_arrays(function, name, source, prefix, known_by=known_by, optional=biases)
        return convert(bind(function, name, arrays, axes, biases))

    params = read_layers(function, "cell", cell, read)
    noted = one_bias and any(v.b_x is not None for v in cells_of(params))
    return Imported(params, (_ONE_BIAS,) if noted else ())


def read_layers(function, argument, tree, read, is_stack=is_stack) -> Any:
    """read(name, cell) of each cell of a layer or a stack, in the same nesting; a stack is a tuple.

    `is_stack` is False for a list that is one layer of the source. Raises a ValueError if the
    layers that were read do not fit together.
    """

    def walk(name, tree):
        if isinstance(tree, Bidirectional):
            return Bidirectional(*(read(f"{name}.{k}", v) for k, v in tree._asdict().items()))
        if is_stack(tree):
            raise TypeError(f"{function}: {name} must be one layer, got a list inside a list.")
        return read(name, tree)

    several = is_stack(tree)
    if several and not tree:
        raise ValueError(f"{function}: {argument} must hold at least one layer, got none.")
    names = [f"{argument}[{number}]" for number in range(len(tree))] if several else [argument]
    layers = tuple(map(walk, names, tree if several else [tree]))
    for number, (name, layer) in enumerate(zip(names, layers)):
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
    _require_one_dtype(function, argument, [cell.w_x for cell in cells_of(layers)])
    return layers if several else layers[0]


def spec_of(function, reset, activation) -> GRUSpec:
    """The spec of a source whose z keeps; ValueError that names the function and its argument."""
    require_choice(function, "activation", activation, get_args(Activation))
    return GRUSpec(reset, "keep", activation)


def require_exportable(function, params, targets, each_layer=False, argument="params") -> Any:
    """The parameters as NumPy arrays with the target's z and biases, and notes of what changed.

    `targets` has a `Target` for each reset that the library computes. All cells get both biases, or
    none if no cell has one; with `each_layer`, all cells of a layer.
    """
    notes = {}  # the keys, in their order

    def read(name, cell):
        if not isinstance(cell, GRUParams):
            more = " or a Bidirectional" if name.endswith("]") else ""
            more = ", a Bidirectional or a stack of them" if name == argument else more
            found = type(cell).__name__ + (f"; pass {name}.layers" * hasattr(cell, "layers"))
            raise TypeError(f"{function}: {name} must be a GRUParams{more}, got {found}.")
        with jax.enable_x64(True):  # float64 is accepted: nothing is computed
            require_params(function, cell, name)
        target = _require_target(function, name, cell, targets)

        def copy(path, v):
            return as_float_array(function, name + jax.tree_util.keystr(path), v)

        cell = jax.tree_util.tree_map_with_path(copy, cell)
        if cell.spec.update == target.update:
            return cell
        negation = "the update gate's weights and biases are negated: z"
        notes[f"{negation} {target.update}s in {target.name}"] = None
        return negate_update(cell)

    params = read_layers(function, argument, params, read)
    for number, layer in enumerate(as_stack(params)):
        specs = [cell.spec for cell in directions_of(layer)]
        if len(set(specs)) > 1:
            raise ValueError(
                f"{function}: layer {number} of {argument} must have one spec in both directions, "
                f"as {targets[specs[0].reset].name} has, got {specs[0]} and {specs[1]}."
            )
    if each_layer:
        params = tuple(_with_biases(layer, targets, notes) for layer in as_stack(params))
    else:
        params = _with_biases(params, targets, notes)
    return params, tuple(notes)


def _require_target(function, name, cell, targets) -> Target:
    """The target of a cell; ValueError if it cannot compute the cell's equation."""
    target = targets.get(cell.spec.reset) or next(iter(targets.values()))
    for field, known in (("reset", tuple(targets)), ("activation", target.activations)):
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
    if target.biases == 1 and cell.spec.reset == "after" and cell.b_h is not None:
        b_n = np.abs(np.split(np.asarray(cell.b_h), 3)[2])
        if b_n.any():
            raise ValueError(
                f"{function}: {name}.b_h must be zero in its n block, as {target.name} has no bias "
                f"that the reset gate multiplies, got up to {b_n.max():.3g}; flax.linen.GRUCell "
                "has one (to_linen)."
            )
    return target


def negate_update(params: GRUParams) -> GRUParams:
    """The cell whose z is 1 - z of this one, exactly: sigmoid(-a) = 1 - sigmoid(a)."""

    def negate(v):
        return v * np.repeat(np.array([1, -1, 1], v.dtype), v.shape[-1] // 3)  # blocks r | z | n

    other = "write" if params.spec.update == "keep" else "keep"
    spec = dataclasses.replace(params.spec, update=other)
    return dataclasses.replace(jax.tree.map(negate, params), spec=spec)


def _with_biases(params, targets, notes):
    """The cells with the biases of their target; adds notes.

    An absent bias is zero. Where the target has one bias, b_x is the sum and b_h is zero: with
    reset "before" all of b_h, with "after" its blocks r and z.
    """

    def fill(cell):
        target, pair = targets[cell.spec.reset], (cell.b_x, cell.b_h)
        count, size = sum(b is not None for b in pair), cell.w_h.shape[1]
        if target.merged and count == 2:
            notes[f"b_x and b_h are summed: {target.merged}"] = None
        if count < target.biases:
            notes["absent biases are written as zeros"] = None
        b_x, b_h = (np.zeros(size, cell.w_h.dtype) if b is None else b for b in pair)
        if target.merged:
            once = slice(size if cell.spec.reset == "before" else size // 3 * 2)
            b_x[once] += b_h[once]
            b_h[once] = 0
        return dataclasses.replace(cell, b_x=b_x, b_h=b_h)

    needed = any(
        targets[cell.spec.reset].always or cell.b_x is not None or cell.b_h is not None
        for cell in cells_of(params)
    )
    return map_grus(fill, params) if needed else params


def reorder(v: Any) -> Any:
    """Blocks r | z | n as z | r | n, or back."""
    r, z, n = np.split(np.asarray(v), 3, axis=-1)
    return np.ascontiguousarray(np.concatenate([z, r, n], axis=-1))


def only_n(b_n: np.ndarray) -> Any:
    """[0 | 0 | b_n]."""
    return np.pad(b_n, (2 * b_n.size, 0))


def cells_of(params: Any) -> list[GRUParams]:
    """Every GRU of a layer or stack, layer by layer, forward first."""
    return [cell for layer in as_stack(params) for cell in directions_of(layer)]


def export_cells(function: str, params: Any, targets: Any, write: Callable) -> Exported:
    """Exported with the (weights, options) of write(cell) for each cell, nested as params."""
    params, notes = require_exportable(function, params, targets)
    weights, options = (map_grus(lambda cell, i=i: write(cell)[i], params) for i in range(2))
    return Exported(weights, options, notes)


def export_layers(function, params, targets, write: Callable, argument="params") -> Exported:
    """Exported with the (weights, options) of write(cells) for a layer; of a stack, lists."""
    layers, notes = require_exportable(function, params, targets, True, argument)
    weights, options = map(list, zip(*(write(directions_of(layer)) for layer in layers)))
    if is_stack(params):
        return Exported(weights, options, notes)
    return Exported(weights[0], options[0], notes)


def named_leaves(source, separator, start=""):
    """(joined name, leaf) of nested mappings, in their order."""
    for key, value in source.items():
        if isinstance(value, Mapping):
            yield from named_leaves(value, separator, f"{start}{key}{separator}")
        else:
            yield f"{start}{key}", value


def _shapes(arrays, axes):
    """{name: shape} for axes such as "3H I", and {letter: size}; -1 for a size that is unknown.

    A size is that of the first array that has the letter; an axis H is used before an axis 3H.
    """
    parsed = {
        name: [(int(n or 1), letter) for n, letter in re.findall(r"(?=\S)(\d*)([A-Z]?)", wanted)]
        for name, wanted in axes.items()
    }
    found = [
        (*axis, size)
        for name, wanted in parsed.items()
        if name in arrays and arrays[name].ndim == len(wanted)
        for axis, size in zip(wanted, arrays[name].shape)
    ]
    sizes = {}
    for factor, letter, size in sorted(found, key=lambda entry: entry[0] > 1):
        if letter and size % factor == 0:
            sizes.setdefault(letter, size // factor)
    known = {"": 1} | sizes
    shapes = {k: tuple(n * known.get(v, -1) for n, v in wanted) for k, wanted in parsed.items()}
    return shapes, sizes
