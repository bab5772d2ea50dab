"""The forms of parameters: a GRU, two directions of one layer, a stack of layers."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.export

from jaxgru.core.parameters import GRUParams
from jaxgru.core.recurrence import Tap

Merge = Literal["concat", "sum"]


class Bidirectional(NamedTuple):
    """One layer: a forward and a backward GRU. Its states and taps have the same form."""

    forward: Any  # a GRUParams; in a state an array [..., H], in a tap a `Tap`
    backward: Any


jax.export.register_namedtuple_serialization(Bidirectional, serialized_name="jaxgru.Bidirectional")
Layer = GRUParams | Bidirectional


def as_stack(params: Any) -> Any:
    """The layers of a stack; a single layer in a tuple."""
    return (params,) if isinstance(params, GRUParams | Bidirectional) else params


def directions_of(layer: Any) -> tuple[GRUParams, ...]:
    """The one or two GRUs of a layer."""
    return tuple(layer) if isinstance(layer, Bidirectional) else (layer,)


def output_size_of(layer: Layer, merge: Merge) -> int:
    """The size of the outputs of a layer."""
    sizes = [direction.w_h.shape[0] for direction in directions_of(layer)]
    return sum(sizes) if merge == "concat" else sizes[0]


def map_grus(function: Callable[..., Any], params: Any, *trees: Any) -> Any:
    """params with each GRUParams p replaced by function(p, the trees' entries at its place)."""
    first, *others = (tuple(t) if isinstance(t, list) else t for t in (params, *trees))
    return jax.tree.map(function, first, *others, is_leaf=lambda p: isinstance(p, GRUParams))


def describe(tree):
    """What a wrong state or tap is, in words."""
    if isinstance(tree, Tap):
        return "one Tap"
    if isinstance(tree, list | tuple):
        return f"{len(tree)} of them"
    shape = getattr(tree, "shape", None)
    return type(tree).__name__ if shape is None else f"an array of shape {shape}"
