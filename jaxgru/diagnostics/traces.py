"""What the GRUs of a layer or stack compute over a sequence, for the diagnostics.

Only `gru` itself runs sequentially. Gates and local derivatives are computed from its states for
all steps at once, as with residuals="states".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgru.checks.report import named_leaves, non_finite_entries
from jaxgru.core.cell import Gates, Recurrent, project, split_recurrent, step
from jaxgru.core.checks import is_traced
from jaxgru.core.derivatives import Coefficients, coefficients
from jaxgru.core.flags import Flags
from jaxgru.core.gradient import BPTT, Tangent
from jaxgru.core.matmul import state_dtype
from jaxgru.core.noise import Noise
from jaxgru.core.parameters import GRUParams
from jaxgru.core.recurrence import run_gru
from jaxgru.stacks.checks import StackConfig, require_grus, require_layers
from jaxgru.stacks.dropout import Dropout
from jaxgru.stacks.forms import Bidirectional, as_stack
from jaxgru.stacks.initializers import init_taps
from jaxgru.stacks.run import merge_directions, reverse_resets, run_stack

Array = jax.Array


class Trace(NamedTuple):
    """One GRU over a sequence, in the state dtype."""

    params: GRUParams
    recurrent: Recurrent
    xs: Array  # [T, ..., I], zero at masked steps
    h_tm1: Array  # [T, ..., H], the state that each step reads: zero where it is reset
    gates: Gates
    c: Coefficients
    flags: Flags


def trace_gru(params, xs, h0, mask, resets, reverse) -> tuple[Array, Trace]:
    """hs of `gru`, and the trace of its steps."""
    h_last, hs = run_gru(
        params, xs, h0, mask, resets, None, 0, None,
        reverse=reverse, rule=Tangent(), noise=Noise(), deterministic=True,
    )  # fmt: skip
    params = jax.tree.map(jnp.asarray, params)
    mask, resets = (None if v is None else jnp.asarray(v)[..., None] for v in (mask, resets))
    flags = Flags(mask, resets)
    start = jnp.zeros_like(h_last) if h0 is None else jnp.asarray(h0)
    h_tm1 = flags.states_before(start.astype(state_dtype(start.dtype)), hs, reverse)
    xs = xs if flags.mask is None else jnp.where(flags.mask, xs, jnp.zeros_like(xs))
    return hs, trace_steps(params, xs, h_tm1, flags)


def trace_steps(params: GRUParams, xs: Array, h_tm1: Array, flags: Flags) -> Trace:
    """The trace of steps that read these states."""
    recurrent = split_recurrent(params)
    gates = step(recurrent, project(params, xs), h_tm1)[1]
    c = coefficients(gates, h_tm1, params.spec)
    return Trace(params, recurrent, xs, h_tm1, gates, c, flags)


def trace_layers(
    params, xs, h0, mask, resets, merge: Any = "concat", residual=False, reverse=False
) -> Any:
    """A `Trace` for every GRU, in the form of params."""
    traces, ys = [], xs
    for number, (layer, h) in enumerate(zip(as_stack(params), by_layer(params, h0))):
        if isinstance(layer, Bidirectional):
            starts = (None, None) if h is None else h
            flags = (resets, reverse_resets(resets))
            runs = [trace_gru(layer[d], ys, starts[d], mask, flags[d], bool(d)) for d in range(2)]
            traces.append(Bidirectional(*(trace for _, trace in runs)))
        else:
            runs = [trace_gru(layer, ys, h, mask, resets, reverse)]
            traces.append(runs[0][1])
        joined = merge_directions(merge, *(hs for hs, _ in runs))
        ys = joined + ys if residual and number else joined
    return tuple(traces) if as_stack(params) is params else traces[0]


def by_layer(params, tree) -> Any:
    """A tree in the form of params, or None, as a sequence with one entry for each layer."""
    if tree is None:
        return [None] * len(as_stack(params))
    return tree if as_stack(params) is params else (tree,)


def loss_and_taps(function, loss_fn, params, xs, h0, mask, resets, merge, residual) -> Any:
    """The loss of (h_last, ys) and its gradient with respect to the taps, in the form of params."""
    layers = as_stack(params)
    config = StackConfig(merge, residual, Dropout(), False, BPTT(), Noise(), True)
    starts = by_layer(params, h0)

    def run(taps):
        taps = by_layer(params, taps)
        h_last, ys = run_stack(config, layers, starts, None, 0, xs, mask, resets, taps)
        return (h_last if layers is params else h_last[0]), ys

    like_xs = jnp.zeros_like(xs[..., :1])  # sharded as xs, and varying where xs does
    taps = jax.tree.map(lambda v: v + like_xs, init_taps(params, xs.shape[:-1]))
    require_scalar_loss(function, loss_fn, *jax.eval_shape(run, taps))
    return jax.value_and_grad(lambda taps: loss_fn(*run(taps)))(taps)


def norm(v):
    """The Euclidean norm over the last axis in the state dtype; tiny entries do not underflow."""
    v = v.astype(state_dtype(v.dtype))
    largest = jnp.abs(v).max(axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    return (scale * jnp.linalg.norm(v / scale, axis=-1, keepdims=True))[..., 0]


def require_scalar_loss(function, loss_fn, *args):
    """Raises TypeError or ValueError unless loss_fn(*args) is one floating number."""
    if not callable(loss_fn):
        raise TypeError(f"{function}: loss_fn must be callable, got {type(loss_fn).__name__}.")
    found, need = jax.eval_shape(loss_fn, *args), f"{function}: loss_fn must return"
    if not hasattr(found, "shape"):
        kind = type(found).__name__
        raise TypeError(f"{need} one scalar, got {kind}; return the loss alone.")
    if found.shape != ():
        raise ValueError(f"{need} a scalar, got shape {found.shape}; take its sum or mean.")
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise TypeError(
            f"{need} a floating number, got dtype {found.dtype}, which has no gradient; cast with "
            ".astype before the operation that makes it integral."
        )


def require_sequence(function, params, xs, h0, mask, resets, merge="concat", residual=False):
    """Raises TypeError or ValueError for a sequence that does not fit or is not finite."""
    require_grus(function, params)
    require_layers(function, params, xs, h0, mask, resets, merge, residual)
    _require_finite(function, "xs", xs, mask)
    _require_finite(function, "params", params)
    _require_finite(function, "h0", h0)


def _require_finite(function, argument, tree, mask=None):
    """Raises ValueError if a number that can be read, and is not masked, is NaN or infinite."""
    if any(is_traced(leaf) for leaf in jax.tree.leaves((tree, mask))):
        return
    with jax.ensure_compile_time_eval():
        if mask is not None:
            tree = jnp.where(jnp.asarray(mask)[..., None], tree, jnp.zeros_like(tree))
        if all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree)):
            return
    found = ", ".join(non_finite_entries(named_leaves(argument, tree)))
    cure = "mask such steps or replace the entry" if argument == "xs" else "replace the entry"
    raise ValueError(f"{function}: {argument} must be finite, got {found}; {cure}.")
