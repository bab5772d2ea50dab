"""What the GRUs of a layer or stack compute over a sequence, for the diagnostics.

Only `gru` itself runs sequentially. Gates and local derivatives are computed from its states for
all steps at once, as with residuals="states".
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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
from jaxgru.stacks.create import init_taps
from jaxgru.stacks.dropout import Dropout
from jaxgru.stacks.forms import Bidirectional, as_stack, directions_of
from jaxgru.stacks.run import merge_directions, reverse_resets, run_stack

PLAIN = StackConfig("concat", False, Dropout(), False, BPTT(), Noise(), deterministic=True)


class Trace(NamedTuple):
    """One GRU over a sequence, in the state dtype."""

    params: GRUParams
    recurrent: Recurrent
    xs: jax.Array  # [T, ..., I], zero at masked steps
    h_tm1: jax.Array  # [T, ..., H], the state that each step reads: zero where it is reset
    new: jax.Array  # [T, ..., H], what `step` makes of it, whether the step is masked or not
    gates: Gates
    c: Coefficients
    flags: Flags


def trace_layers(
    function, params, xs, h0, mask, resets, merge: Any = "concat", residual=False, reverse=False
) -> Any:
    """A `Trace` for every GRU, in the form of params, of arguments that are checked first."""
    require_sequence(function, params, xs, h0, mask, resets, merge, residual)
    traces, ys = [], xs
    for number, (layer, h) in enumerate(zip(as_stack(params), per_layer(params, h0))):
        pair = isinstance(layer, Bidirectional)
        starts = h if pair and h is not None else (h, None)
        flags = (resets, reverse_resets(resets) if pair else None)
        runs = [
            _trace_gru(p, ys, starts[d], mask, flags[d], reverse or d == 1)
            for d, p in enumerate(directions_of(layer))
        ]
        joined = merge_directions(merge, *(hs for hs, _ in runs))
        ys = joined + ys if residual and number else joined
        traces.append(Bidirectional(*(trace for _, trace in runs)) if pair else runs[0][1])
    return tuple(traces) if as_stack(params) is params else traces[0]


def _trace_gru(params, xs, h0, mask, resets, reverse):
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


def trace_steps(params: GRUParams, xs: jax.Array, h_tm1: jax.Array, flags: Flags) -> Trace:
    """The trace of steps that read these states."""
    recurrent = split_recurrent(params)
    new, gates = step(recurrent, project(params, xs), h_tm1)
    c = coefficients(recurrent, gates, h_tm1)
    return Trace(params, recurrent, xs, h_tm1, new, gates, c, flags)


def per_layer(params, tree) -> Any:
    """A tree in the form of params, or None, as a sequence with one entry for each layer."""
    if tree is None:
        return [None] * len(as_stack(params))
    return tree if as_stack(params) is params else (tree,)


def trace_loss(function, loss_fn, params, xs, h0, mask, resets, merge, residual) -> Any:
    """The loss of (h_last, ys), its gradient with respect to the taps, and `trace_layers`."""
    traces = trace_layers(function, params, xs, h0, mask, resets, merge, residual)
    layers, starts = as_stack(params), per_layer(params, h0)
    config = dataclasses.replace(PLAIN, merge=merge, residual=residual)

    def run(taps):
        taps = per_layer(params, taps)
        h_last, ys = run_stack(config, layers, starts, None, 0, xs, mask, resets, taps)
        return (h_last if layers is params else h_last[0]), ys

    like_xs = jnp.zeros_like(xs[..., :1])  # sharded as xs, and varying where xs does
    taps = jax.tree.map(lambda v: v + like_xs, init_taps(params, xs.shape[:-1]))
    require_scalar_loss(function, loss_fn, *jax.eval_shape(run, taps))
    return *jax.value_and_grad(lambda taps: loss_fn(*run(taps)))(taps), traces


def norm(v):
    """The Euclidean norm over the last axis in the state dtype; tiny entries do not underflow.

    Its gradient at a vector of zeros is zero. The scale cancels, so no gradient goes through it.
    """
    v = v.astype(state_dtype(v.dtype))
    largest = jnp.abs(lax.stop_gradient(v)).max(axis=-1, keepdims=True)
    zero = largest == 0
    v, scale = (jnp.where(zero, jnp.ones_like(x), x) for x in (v, largest))
    size = scale * jnp.linalg.norm(v / scale, axis=-1, keepdims=True)
    return jnp.where(zero, jnp.zeros_like(size), size)[..., 0]


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
    cure = "mask such steps or replace the entry" if argument == "xs" else "replace the entry"
    with jax.ensure_compile_time_eval():
        if mask is not None:
            tree = jnp.where(jnp.asarray(mask)[..., None], tree, jnp.zeros_like(tree))
        for path, leaf in jax.tree.leaves_with_path(tree):
            if not jnp.isfinite(leaf).all():
                values = np.asarray(leaf).astype(np.float64)
                first = np.argwhere(~np.isfinite(values))[0].tolist()
                raise ValueError(
                    f"{function}: {argument}{jax.tree_util.keystr(path)}{first} must be finite, "
                    f"got {values[tuple(first)]}; {cure}."
                )


def replicate(v: jax.Array) -> jax.Array:
    """v replicated over an explicit mesh, for a loop over an axis that is sharded."""
    sharding = getattr(jax.typeof(v), "sharding", None)
    if sharding is None or all(axis is None for axis in sharding.spec):
        return v
    return jax.sharding.reshard(v, jax.NamedSharding(sharding.mesh, jax.P()))
