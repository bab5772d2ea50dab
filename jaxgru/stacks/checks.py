"""The checks of a call of a layer or stack. They run once for each call of a public function.

`root` is how the caller names the layers: "params", or "params.layers" in a model.
"""

import dataclasses
import functools
import sys
import warnings
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxgru.core.checks import (
    found_kind,
    require_bool,
    require_choice,
    require_first_step,
    require_flags,
    require_float,
    require_rate,
    show_rate,
)
from jaxgru.core.gradient import as_rule
from jaxgru.core.noise import is_zero, require_noise
from jaxgru.core.parameters import GRUParams, require_params, torch_cure
from jaxgru.core.recurrence import Tap, require_inputs, require_state, require_tap
from jaxgru.stacks.dropout import Dropout
from jaxgru.stacks.forms import (
    Bidirectional,
    Merge,
    as_stack,
    describe,
    directions_of,
    output_size_of,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("dropout", "noise"),
    meta_fields=("merge", "residual", "reverse", "rule", "deterministic", "root"),
)
@dataclasses.dataclass(frozen=True)
class StackConfig:
    """The choices of a call, as they are given; `_require_options` returns them checked.

    All are static but for the rates among them that are arrays.
    """

    merge: Merge
    residual: bool
    dropout: Any  # checked: a `Dropout`
    reverse: bool
    rule: Any  # checked: a `Rule`
    noise: Any  # checked: a `Noise`
    deterministic: bool
    root: str = "params"


def require_call(function, params, xs, h0, mask, resets, config, key, axis, first_step, tap):
    """The checked choices, the axis of time, and (xs, mask, resets, tap) with time in front."""
    config = _require_options(function, params, config, key, first_step)
    merge, residual, root = config.merge, config.residual, config.root
    axis = require_layers(function, params, xs, h0, mask, resets, merge, residual, axis, root)
    for place, p, entry in _entries(function, "tap", params, tap, root):
        sizes = (p.w_x.shape[0], p.w_h.shape[0])
        require_tap(function, f"tap{place}", entry, xs.shape[:-1], sizes, p)
    return config, axis, jax.tree.map(lambda v: jnp.moveaxis(v, axis, 0), (xs, mask, resets, tap))


def _require_options(function, params, config, key, first_step):
    """The checked choices, but for merge and residual, which `require_layers` checks."""
    dropout = config.dropout
    if not isinstance(dropout, Dropout):
        dropout = Dropout(between=require_rate(function, "dropout", dropout))
        if not is_zero(dropout.between) and len(params) == 1 and not config.deterministic:
            given = show_rate("dropout", dropout.between)
            warnings.warn(
                f"{function}: {given} acts between layers, and there is one layer, so it does "
                "nothing; pass Dropout(input=...) or Dropout(output=...).",
                stacklevel=_stacklevel_of_caller(),
            )
    dropout = Dropout(**vars(dropout))  # checked again: JAX fills a pytree with anything
    rule = as_rule(function, config.rule)
    rates = {f"dropout.{name}": getattr(dropout, name) for name in ("input", "between", "output")}
    noise = require_noise(function, config.noise, key, config.deterministic, rates)
    require_first_step(function, first_step)
    require_bool(function, "reverse", config.reverse)
    if config.reverse and any(isinstance(layer, Bidirectional) for layer in params):
        raise ValueError(
            f"{function}: reverse must be False for a Bidirectional layer, which runs in both "
            "directions, got True."
        )
    return dataclasses.replace(config, dropout=dropout, rule=rule, noise=noise)


def _stacklevel_of_caller():
    """The stacklevel with which a warning of the calling function points out of the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("jaxgru."):
        level, frame = level + 1, frame.f_back
    return level


def require_grus(function, params, stack=False, root="params"):
    """TypeError unless params is a well-formed stack of one dtype, or a layer if not `stack`."""
    single = isinstance(params, GRUParams | Bidirectional)
    if not isinstance(params, GRUParams | list | tuple) or not params or (stack and single):
        empty = isinstance(params, list | tuple) and not params
        cure = "; put it into a tuple" if single else torch_cure(params)
        if isinstance(params, dict) and not cure:
            cure = "; make each layer of its arrays by GRUParams(**arrays, spec=...)"
        found = "an empty one" if empty else found_kind(params, cure)
        raise TypeError(
            f"{function}: {root} must be a sequence of layers, GRUParams or Bidirectional, "
            f"got {found}."
        )
    for place, layer, directions in _layers(params, root):
        if not isinstance(layer, GRUParams | Bidirectional):
            raise TypeError(
                f"{function}: {place} must be a GRUParams or a Bidirectional, "
                f"got {found_kind(layer)}."
            )
        for name, direction in directions:
            require_params(function, direction, name)
            first, bottom = _bottom(params, root)
            found, wanted = direction.w_x.dtype, bottom.w_x.dtype
            if found != wanted:
                raise TypeError(
                    f"{function}: {name} must have the dtype of {first}, {wanted}, got {found}; "
                    "cast one of them."
                )


def require_one_way(function, params, cure, root="params"):
    """ValueError if a layer of a layer or stack is a `Bidirectional`."""
    if any(isinstance(layer, Bidirectional) for layer in as_stack(params)):
        raise ValueError(
            f"{function}: {root} must hold layers of one direction, got a Bidirectional{cure}."
        )


def require_layers(
    function, params, xs, h0=None, mask=None, resets=None, merge="concat", residual=False,
    axis=None, root="params",
):  # fmt: skip
    """The axis of time of a layer or stack; TypeError or ValueError for what does not fit.

    axis: None for a function without that option, where it is 0.
    """
    (name, bottom), found = _bottom(params, root), 0 if axis is None else axis
    size = bottom.w_x.shape[0]
    found = require_inputs(function, bottom, xs, size, mask, resets, found, f"{name}.w_x")
    require_sizes(function, params, merge, residual, root)
    batch = (*xs.shape[:found], *xs.shape[found + 1 : -1])
    time_major_xs = xs if axis is not None and found == 0 else None
    _require_states(function, "h0", params, h0, batch, time_major_xs, root=root)
    return found


def require_step(function, params, x, h, mask, resets, config, key, first_step):
    """The checked choices; TypeError or ValueError for what does not fit one step of a stack."""
    cure = ", whose outputs depend on later inputs; use gru_stack on whole sequences"
    require_one_way(function, params, cure)
    config = _require_options(function, params, config, key, first_step)
    if config.rule.truncate is not None:
        raise ValueError(
            f"{function}: gradient must have truncate=None, since one step has no windows, got "
            f"{config.rule.truncate}; cut the gradient with jax.lax.stop_gradient(h)."
        )
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
    require_sizes(function, params, "concat", config.residual)
    _require_states(function, "h", params, h, lead, source="x", wide=True)
    return config


def require_sizes(function, params, merge, residual, root="params"):
    """TypeError or ValueError unless every layer reads what the layer below it returns."""
    require_choice(function, "merge", merge, get_args(Merge))
    require_bool(function, "residual", residual)
    size, source = _bottom(params)[1].w_x.shape[0], "as the other direction"
    for number, (name, layer, directions) in enumerate(_layers(params, root)):
        for direction_name, p in directions:
            if p.w_x.shape[0] != size:
                raise ValueError(
                    f"{function}: {direction_name}.w_x must have {size} rows ({source}), "
                    f"got {p.w_x.shape[0]}."
                )
        sizes = [p.w_h.shape[0] for _, p in directions]
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


def _require_states(
    function, argument, params, h, batch, time_major_xs=None, source="xs", root="params", wide=False
):
    """TypeError or ValueError unless h is None or has the form of params."""
    for place, p, entry in _entries(function, argument, params, h, root):
        name, shape, rows = argument + place, (*batch, p.w_h.shape[0]), f"{root}{place}.w_h"
        require_state(function, name, entry, shape, p, time_major_xs, rows, source, wide)


def _entries(function, argument, params, tree, root, place="") -> Any:
    """(place, GRUParams, entry of the tree) of every GRU; nothing where the tree is None.

    ValueError unless the tree has the form of params. The place is what follows the name of params
    or of the argument: "", ".forward", "[1]" or "[1].forward".
    """
    if tree is None:
        return
    parts, several = _parts(params), isinstance(tree, list | tuple) and not isinstance(tree, Tap)
    if several != bool(parts) or (several and len(tree) != len(parts)):
        noun, one, cure = "state", "an array [..., H]", f"init_state({root}, batch_shape)"
        if argument == "tap":
            noun, one, cure = "tap", "one Tap", f"init_taps({root}, lead_shape)"
        cure, shape = f"{cure} has the form", getattr(tree, "shape", ())
        if isinstance(params, GRUParams):
            wanted = f"{one}, as {root}{place} has one direction"
        elif isinstance(params, Bidirectional):
            wanted = f"a pair of {noun}s, forward and backward"
        else:
            wanted = f"a sequence of {len(params)} {noun}s, one for each layer"
            count = sum(len(directions_of(layer)) for layer in params)
            if len(shape) > 2 and shape[0] == count > len(params):
                cure = f"of torch's h_0 pass tuple(zip({argument}[::2], {argument}[1::2]))"
            elif len(shape) > 2 and shape[0] == count:
                cure = f"of torch's h_0 pass tuple({argument})"
            elif not several and count == 1:
                cure = f"pass ({argument},)"
        if not jnp.issubdtype(getattr(tree, "dtype", jnp.floating), jnp.floating):
            cure = "pass a mask by name, lengths as mask=length_mask(lengths, T)"
        raise ValueError(
            f"{function}: {argument}{place} must be {wanted}, got {describe(tree)}; {cure}."
        )
    if not parts:
        yield place, params, tree
        return
    for (step, part), entry in zip(parts, tree):
        yield from _entries(function, argument, part, entry, root, place + step)


def _parts(params):
    """(place, part) of the layers of a stack or the directions of a layer; none of a GRUParams."""
    if isinstance(params, Bidirectional):
        return [(f".{field}", direction) for field, direction in params._asdict().items()]
    return [(f"[{n}]", p) for n, p in enumerate(params)] if isinstance(params, list | tuple) else []


def _layers(params, root="params"):
    """(name, layer, its (name, GRUParams) pairs) of every layer; params are a stack or a layer."""
    for place, layer in _parts(params) if as_stack(params) is params else [("", params)]:
        name = f"{root}{place}"
        yield name, layer, [(name + side, p) for side, p in _parts(layer) or [("", layer)]]


def _bottom(params, root="params"):
    """(name, GRUParams) of what reads the sequence first."""
    return next(_layers(params, root))[2][0]
