"""What the GRUs of a layer or stack compute over a sequence, laid open for those who look at it.

Everything that is sequential is `gru` itself; gates and local derivatives are made from its states
in bulk, as residuals="states" makes them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgru.checks.report import named_leaves, non_finite_entries
from jaxgru.core.cell import Gates, Recurrent, project, split_recurrent, step
from jaxgru.core.checks import is_traced, require_flags
from jaxgru.core.derivatives import Coefficients, coefficients
from jaxgru.core.matmul import state_dtype
from jaxgru.core.parameters import GRUParams
from jaxgru.core.recurrence import gru
from jaxgru.stacks import (
    Bidirectional,
    Merge,
    directions_of,
    gru_bidirectional,
    gru_stack,
    init_taps,
    require_layers,
    require_states,
    reverse_resets,
)

Array = jax.Array


def tapped(function, loss_fn, params, xs, h0, merge, residual, options):
    """The loss, and (results, its gradient by the taps) in the form of params."""

    def run(tap):
        if isinstance(params, GRUParams):
            return gru(params, xs, h0, tap=tap, **options)
        if isinstance(params, Bidirectional):
            return gru_bidirectional(params, xs, h0, tap=tap, merge=merge, **options)
        return gru_stack(params, xs, h0, tap=tap, merge=merge, residual=residual, **options)

    def loss_of(tap):
        results = run(tap)
        return loss_fn(*results), results

    like_xs = jnp.zeros_like(xs[..., :1])  # sharded as xs, and varying where it does
    taps = jax.tree.map(lambda v: v + like_xs, init_taps(params, xs.shape[:-1]))
    require_scalar_loss(function, loss_fn, *jax.eval_shape(run, taps))
    (loss, results), grads = jax.value_and_grad(loss_of, has_aux=True)(taps)
    return loss, (results, grads)


def by_gru(params, taps):
    """The taps of each layer, one or two of them."""
    taps = [taps] if is_layer(params) else taps
    pairs = zip(as_stack(params), taps)
    return [tap if isinstance(layer, Bidirectional) else (tap,) for layer, tap in pairs]


def norm(v):
    """The Euclidean norm over the last axis in the state dtype; tiny entries do not underflow."""
    v = v.astype(state_dtype(v.dtype))
    largest = jnp.abs(v).max(axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    return (scale * jnp.linalg.norm(v / scale, axis=-1, keepdims=True))[..., 0]


class Trace(NamedTuple):
    """One GRU over a sequence, in the state dtype. Flags are [T, ..., 1], or None for none."""

    params: GRUParams
    recurrent: Recurrent
    xs: Array  # [T, ..., I], zero where a step is held
    h_tm1: Array  # [T, ..., H], what each step reads: zero where it is reset
    gates: Gates
    c: Coefficients
    mask: Array | None
    resets: Array | None


def trace_gru(
    params: GRUParams,
    xs: Array,
    h0: Array | None,
    mask: Array | None,
    resets: Array | None,
    reverse: bool = False,
) -> tuple[tuple[Array, Array], Trace]:
    """(h_last, hs) of `gru`, and the trace of its steps; time is the leading axis."""
    options: Any = {"mask": mask, "resets": resets, "reverse": reverse}
    h_last, hs = gru(params, xs, h0, gradient="tangent", **options)  # differentiable in every mode
    params = jax.tree.map(jnp.asarray, params)
    mask, resets = (
        None if flags is None else jnp.asarray(flags)[..., None] for flags in (mask, resets)
    )
    dtype = state_dtype(params.w_x.dtype)
    start = jnp.zeros_like(h_last) if h0 is None else jnp.asarray(h0)
    joined = [hs, start[None]] if reverse else [start[None], hs]
    h_tm1 = jnp.concatenate(joined)[1:] if reverse else jnp.concatenate(joined)[:-1]
    h_tm1 = zero_where(resets, h_tm1.astype(dtype))
    xs = xs if mask is None else jnp.where(mask, xs, jnp.zeros_like(xs))
    recurrent = split_recurrent(params)
    gates = step(recurrent, project(params, xs), h_tm1)[1]
    c = coefficients(gates, h_tm1, params.spec)
    return (h_last, hs), Trace(params, recurrent, xs, h_tm1, gates, c, mask, resets)


def trace_layers(
    params: Any,
    xs: Array,
    h0: Any,
    mask: Array | None,
    resets: Array | None,
    merge: Merge = "concat",
    residual: bool = False,
    reverse: bool = False,
) -> list[tuple[Trace, ...]]:
    """The traces of each layer of a stack, one or two of them; a single layer counts as a stack."""
    traces, ys = [], xs
    layers = as_stack(params)
    states = [None] * len(layers) if h0 is None else as_states(params, h0)
    for number, (layer, h) in enumerate(zip(layers, states)):
        pair = (None, None) if h is None else h
        starts = pair if isinstance(layer, Bidirectional) else (h,)
        flags = (resets, reverse_resets(resets, 0))
        runs = [
            trace_gru(direction, ys, start, mask, flags[back], bool(back) != reverse)
            for back, (direction, start) in enumerate(zip(directions_of(layer), starts))
        ]
        outputs = [hs for (_, hs), _ in runs]
        joined = sum(outputs[1:], outputs[0]) if merge == "sum" else jnp.concatenate(outputs, -1)
        ys = joined + ys if residual and number else joined
        traces.append(tuple(trace for _, trace in runs))
    return traces


def is_layer(params: Any) -> bool:
    """Whether params is a single layer, not a stack of them."""
    return isinstance(params, GRUParams | Bidirectional)


def as_stack(params: Any) -> Any:
    """The layers; a single one in a tuple."""
    return (params,) if is_layer(params) else params


def as_states(params: Any, h0: Any) -> Any:
    """The states of the layers; a single layer's in a tuple."""
    return (h0,) if is_layer(params) else h0


def like_params(params: Any, of_layers: list[tuple[Any, ...]]) -> Any:
    """One value for each GRU in the form of params: itself, a Bidirectional, or a tuple of them."""
    formed = [
        Bidirectional(*values) if isinstance(layer, Bidirectional) else values[0]
        for layer, values in zip(as_stack(params), of_layers)
    ]
    return formed[0] if is_layer(params) else tuple(formed)


def zero_where(flags: Array | None, v: Array) -> Array:
    """0 where flagged, else v; flags have v's leading axes, and as many axes as v or fewer."""
    return v if flags is None else jnp.where(_align(flags, v), jnp.zeros_like(v), v)


def choose(mask: Array | None, real: Array, held: Array) -> Array:
    """real on real steps, held on the others."""
    return real if mask is None else jnp.where(_align(mask, real), real, held)


def _align(flags, v):
    """[T, ..., 1] with unit axes behind it, as many axes as v."""
    return flags.reshape(flags.shape + (1,) * (v.ndim - flags.ndim))


def require_scalar_loss(function: str, loss_fn: Callable[..., Any], *args: Any) -> None:
    """TypeError or ValueError unless loss_fn(*args) is one floating number."""
    if not callable(loss_fn):
        raise TypeError(f"{function}: loss_fn must be callable, got {type(loss_fn).__name__}.")
    found = jax.eval_shape(loss_fn, *args)
    if not hasattr(found, "shape"):
        raise TypeError(
            f"{function}: loss_fn must return one scalar, got {type(found).__name__}; return the "
            "loss alone."
        )
    if found.shape != ():
        raise ValueError(
            f"{function}: loss_fn must return a scalar, got shape {found.shape}; take its sum or "
            "mean."
        )
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise TypeError(
            f"{function}: loss_fn must return a floating number, got dtype {found.dtype}, which "
            "has no gradient; cast it with .astype before what makes it integral."
        )


def require_finite(function: str, subject: str, tree: Any, mask: Array | None = None) -> None:
    """ValueError if a number that is known, and not masked, is NaN or infinite."""
    leaves = jax.tree.leaves((tree, mask))
    if any(is_traced(leaf) for leaf in leaves):
        return
    with jax.ensure_compile_time_eval():
        if mask is not None:
            tree = jnp.where(jnp.asarray(mask)[..., None], tree, jnp.zeros_like(tree))
        if all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree)):
            return
    found = ", ".join(non_finite_entries(named_leaves(subject, tree)))
    cure = "mask such steps or replace the entry" if subject == "xs" else "replace the entry"
    raise ValueError(f"{function}: {subject} must be finite, got {found}; {cure}.")


def require_sequence(
    function: str,
    params: Any,
    xs: Array,
    h0: Any,
    mask: Array | None,
    resets: Array | None,
    merge: Merge = "concat",
    residual: bool = False,
) -> None:
    """TypeError or ValueError for a sequence that does not fit its layers or is not finite."""
    layers = as_stack(params)
    require_layers(function, layers, xs, merge, residual)
    require_states(function, layers, None if h0 is None else as_states(params, h0))
    require_flags(function, {"mask": mask, "resets": resets}, xs.shape[:-1])
    require_finite(function, "xs", xs, mask)
    require_finite(function, "params", params)
    require_finite(function, "h0", h0)
