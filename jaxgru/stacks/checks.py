"""The checks of a call of a layer or stack. They run once for each call of a public function."""

import dataclasses
from typing import Any, get_args

import jax

from jaxgru.core.checks import (
    require_bool,
    require_choice,
    require_first_step,
    require_flags,
    require_float,
)
from jaxgru.core.gradient import Rule, as_rule
from jaxgru.core.noise import Noise, require_noise
from jaxgru.core.parameters import GRUParams, require_params
from jaxgru.core.recurrence import Tap, require_inputs, require_state, require_tap
from jaxgru.stacks.dropout import Dropout, require_dropout
from jaxgru.stacks.forms import (
    Bidirectional,
    Merge,
    as_stack,
    describe,
    directions_of,
    output_size_of,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """The static choices of a call, checked."""

    merge: Merge
    residual: bool
    dropout: Dropout
    reverse: bool
    rule: Rule
    noise: Noise
    deterministic: bool


def require_call(
    function: str, params: Any, xs: Any, h0: Any, mask: Any, resets: Any, merge: Any,
    residual: Any, dropout: Any, noise: Any, key: Any, deterministic: Any, reverse: Any, axis: Any,
    gradient: Any, first_step: Any, tap: Any,
) -> tuple[StackConfig, int]:  # fmt: skip
    """The checked choices and the axis of time, of a layer or a stack that is well-formed."""
    config = require_options(
        function, params, merge, residual, dropout, noise, key, deterministic, reverse, gradient,
        first_step,
    )  # fmt: skip
    axis = require_layers(function, params, xs, h0, mask, resets, merge, residual, axis)
    _require_taps(function, params, tap, xs.shape[:-1])
    return config, axis


def require_options(
    function: str, params: Any, merge: Any, residual: Any, dropout: Any, noise: Any, key: Any,
    deterministic: Any, reverse: Any, gradient: Any, first_step: Any,
) -> StackConfig:  # fmt: skip
    """The choices of a layer or a stack; merge and residual are checked with its sizes."""
    dropout = require_dropout(function, dropout)
    rule = as_rule(function, gradient)
    noise = require_noise(function, noise, key, deterministic, dropout.rates())
    require_first_step(function, first_step)
    require_bool(function, "reverse", reverse)
    if reverse and any(isinstance(layer, Bidirectional) for layer in as_stack(params)):
        raise ValueError(
            f"{function}: reverse must be False for a Bidirectional layer, which runs in both "
            "directions, got True."
        )
    return StackConfig(merge, residual, dropout, reverse, rule, noise, deterministic)


def require_stack(function: str, params: Any) -> None:
    """TypeError unless params is a sequence of layers, each well-formed and of one dtype."""
    if isinstance(params, GRUParams | Bidirectional):
        raise TypeError(
            f"{function}: params must be a sequence of layers, GRUParams or Bidirectional, "
            f"got {type(params).__name__}; put it into a tuple."
        )
    require_grus(function, params)


def require_grus(function: str, params: Any) -> None:
    """TypeError unless params is a layer or a sequence of them, well-formed and of one dtype."""
    if not isinstance(params, GRUParams | list | tuple) or not params:
        found = "an empty one" if isinstance(params, list | tuple) else type(params).__name__
        raise TypeError(
            f"{function}: params must be a sequence of layers, GRUParams or Bidirectional, "
            f"got {found}."
        )
    for place, layer in _named_layers(params):
        if not isinstance(layer, GRUParams | Bidirectional):
            raise TypeError(
                f"{function}: {place} must be a GRUParams or a Bidirectional, "
                f"got {type(layer).__name__}."
            )
        for name, direction in _named_directions(place, layer):
            require_params(function, direction, name)
            first, bottom = _bottom(params)
            found, wanted = direction.w_x.dtype, bottom.w_x.dtype
            if found != wanted:
                raise TypeError(
                    f"{function}: {name} must have the dtype of {first}, {wanted}, got {found}; "
                    "cast one of them."
                )


def require_layers(
    function: str, params: Any, xs: Any, h0: Any = None, mask: Any = None, resets: Any = None,
    merge: Any = "concat", residual: Any = False, axis: Any = None,
) -> int:  # fmt: skip
    """The axis of time of a layer or stack; TypeError or ValueError for what does not fit.

    axis: None for a function without that option, where it is 0.
    """
    (name, bottom), found = _bottom(params), 0 if axis is None else axis
    size = bottom.w_x.shape[0]
    found = require_inputs(function, bottom, xs, size, mask, resets, found, f"{name}.w_x")
    require_sizes(function, params, merge, residual)
    batch = (*xs.shape[:found], *xs.shape[found + 1 : -1])
    time_major = xs if axis is not None and found == 0 else None
    require_states(function, "h0", params, h0, batch, time_major)
    return found


def require_step(
    function: str, params: Any, x: Any, h: Any, mask: Any, resets: Any, residual: Any
) -> None:
    """TypeError or ValueError for what does not fit one step of a stack."""
    name, bottom = _bottom(params)
    size = bottom.w_x.shape[0]
    require_float(function, "x", x, bottom.w_x.dtype)
    if x.ndim < 1 or x.shape[-1] != size:
        raise ValueError(
            f"{function}: x must have shape [..., I] with I={size} (rows of {name}.w_x), got "
            f"{x.shape}."
        )
    lead = x.shape[:-1]
    require_flags(function, {"mask": mask, "resets": resets}, lead, "x without its last axis")
    require_sizes(function, params, "concat", residual)
    require_states(function, "h", params, h, lead, source="x")


def require_sizes(function: str, params: Any, merge: Any, residual: Any) -> None:
    """TypeError or ValueError unless every layer reads what the layer below it returns."""
    require_choice(function, "merge", merge, get_args(Merge))
    require_bool(function, "residual", residual)
    size, source = _bottom(params)[1].w_x.shape[0], "as the other direction"
    for number, (name, layer) in enumerate(_named_layers(params)):
        for direction_name, direction in _named_directions(name, layer):
            if direction.w_x.shape[0] != size:
                raise ValueError(
                    f"{function}: {direction_name}.w_x must have {size} rows ({source}), "
                    f"got {direction.w_x.shape[0]}."
                )
        sizes = [direction.w_h.shape[0] for direction in directions_of(layer)]
        if merge == "sum" and len(set(sizes)) > 1:
            raise ValueError(
                f"{function}: {name} must have one hidden size in both directions for "
                f"merge='sum', got {sizes[0]} and {sizes[1]}."
            )
        output = output_size_of(layer, merge)
        if residual and number and output != size:
            raise ValueError(
                f"{function}: {name} must have outputs of the size of its inputs for "
                f"residual=True, {size}, got {output}."
            )
        size, source = output, f"the outputs of {name}, merge={merge!r}"


def require_states(
    function: str, argument: str, params: Any, h: Any, batch: tuple[int, ...],
    time_major: Any = None, source: str = "xs",
) -> None:  # fmt: skip
    """TypeError or ValueError unless h is None or has the form of params."""

    def check(name, place, p, h):
        shape = (*batch, p.w_h.shape[0])
        require_state(function, name, h, shape, p, time_major, f"{place}.w_h", source)

    cure = "; init_state(params, batch_shape) has the form"
    stack = not isinstance(params, GRUParams | Bidirectional)
    if stack and not (isinstance(h, list | tuple) and len(h) == len(params)):
        cure += (
            f", and torch's [layers, B, H] is tuple({argument}), with two directions "
            f"tuple(zip({argument}[::2], {argument}[1::2]))"
        )
    _visit(function, argument, "params", params, h, ("state", "an array [..., H]"), check, cure)


def _require_taps(function, params, tap, lead):
    """TypeError or ValueError unless tap is None or has the form of params."""

    def check(name, _, p, one):
        require_tap(function, name, one, lead, (p.w_x.shape[0], p.w_h.shape[0]), p)

    cure = "; init_taps(params, lead_shape) has the form"
    _visit(function, "tap", "params", params, tap, ("tap", "one Tap"), check, cure)


def _visit(function, name, place, params, tree, nouns, check, cure):
    """check(name, place, GRUParams, entry) for every GRU; ValueError for another form."""
    if tree is None:
        return
    several = isinstance(tree, list | tuple) and not isinstance(tree, Tap)
    noun, one = nouns
    if isinstance(params, GRUParams):
        if several:
            raise ValueError(
                f"{function}: {name} must be {one}, as {place} has one direction, got "
                f"{describe(tree)}{cure}."
            )
        return check(name, place, params, tree)
    pair = isinstance(params, Bidirectional)
    if not several or len(tree) != len(params):
        wanted = (
            f"a pair of {noun}s, forward and backward" if pair
            else f"a sequence of {len(params)} {noun}s, one for each layer"
        )  # fmt: skip
        raise ValueError(f"{function}: {name} must be {wanted}, got {describe(tree)}{cure}.")
    steps = [".forward", ".backward"] if pair else [f"[{n}]" for n in range(len(params))]
    for step, p, entry in zip(steps, params, tree):
        _visit(function, name + step, place + step, p, entry, nouns, check, cure)


def _named_layers(params):
    """(name, layer) of every layer of a stack, or of the one that params are."""
    if isinstance(params, GRUParams | Bidirectional):
        return [("params", params)]
    return [(f"params[{number}]", layer) for number, layer in enumerate(params)]


def _named_directions(name, layer):
    """(name, GRUParams) of the one or two directions of a layer."""
    if isinstance(layer, Bidirectional):
        return [(f"{name}.{field}", p) for field, p in zip(layer._fields, layer)]
    return [(name, layer)]


def _bottom(params):
    """(name, GRUParams) of what reads the sequence first."""
    return _named_directions(*_named_layers(params)[0])[0]
