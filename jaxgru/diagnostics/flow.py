"""How much gradient reaches every state and input of a GRU, and along which paths.

The cotangent dL/dh_t is the gradient with respect to a tap of zeros, from `gru`'s own backward
pass. Everything else is local to a step and linear in this cotangent; README.md of this folder
has the equations. Functions of a loss are differentiable in reverse mode, the others in both modes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.checks import require_bool, require_flags, require_float, require_shape
from jaxgru.core.layer_norm import normalize_vjp
from jaxgru.core.matmul import blocks, matmul
from jaxgru.core.parameters import GRUParams
from jaxgru.diagnostics.traces import norm, trace_layers, trace_loss
from jaxgru.stacks.forms import Merge, map_grus


class Paths(NamedTuple):
    """The four paths from dL/dh_t back to dL/dh_{t-1}."""

    kept: jax.Array  # k h_{t-1} itself
    update: jax.Array  # through z
    reset: jax.Array  # through r
    candidate: jax.Array  # through n, for a fixed r


class GradientFlow(NamedTuple):
    """Euclidean norms, [T, ...] each, of what one backward pass sends through a GRU."""

    states: jax.Array  # |dL/dh_t|
    inputs: jax.Array  # |dL/dx_t|
    paths: Paths  # of what step t sends back to h_{t-1}


def gradient_flow(
    loss_fn: Callable[[Any, jax.Array], jax.Array], params: Any, xs: jax.Array, h0: Any = None, *,
    mask: jax.Array | None = None, resets: jax.Array | None = None, merge: Merge = "concat",
    residual: bool = False,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Computes the loss and how much gradient reaches every state and input, along which paths.

    For another loss, such as one with dropout or with a model around the layers, pass
    `tap=init_taps(...)` through to `gru` or `gru_stack`, differentiate the loss with respect to it
    as well, and pass its `hs`, dL/dh_t, to `gradient_paths`.

    Args:
      loss_fn: (h_last, ys) -> a scalar, of the results of `gru` (`gru_stack` for a stack).
      params: a `GRUParams`, a `Bidirectional`, or a sequence of these.
      xs: [T, ..., I].
      h0: as in `gru_stack`, or as in `gru` for a single layer; None for zeros.
      mask, resets: [T, ...] bool, as in `gru`.
      merge, residual: as in `gru_stack`.

    Returns:
      The loss, and a `GradientFlow` for each GRU. At a masked step all gradient is on path "kept".

    Raises:
      ValueError: a shape does not fit, a choice is unknown, or a number in params, h0 or the valid
        steps of xs is not finite (inside jit numbers are not checked).
      TypeError: an argument has the wrong kind or dtype, or the loss is not one floating number.

    Cost: a forward and a backward pass, and a second forward pass with gates computed in bulk.

    >>> from jaxgru import init_gru
    >>> params = init_gru(jax.random.key(0), 2, 3)
    >>> loss, flow = gradient_flow(lambda h_last, hs: h_last.sum(), params, jnp.ones((5, 2)))
    >>> flow.states.shape, bool(flow.states[0] < flow.states[-1])
    ((5,), True)
    """
    call = (params, xs, h0, mask, resets, merge, residual)
    loss, taps, traces = trace_loss("gradient_flow", loss_fn, *call)

    def flow(_, trace, tap):
        return GradientFlow(norm(tap.hs), norm(tap.xs), Paths(*map(norm, _paths(trace, tap.hs))))

    return loss, map_grus(flow, params, traces, taps)


def gradient_paths(
    params: GRUParams, xs: jax.Array, dhs: jax.Array, h0: jax.Array | None = None, *,
    mask: jax.Array | None = None, resets: jax.Array | None = None, reverse: bool = False,
) -> Paths:  # fmt: skip
    """Computes what every step of one GRU sends back to the state before it, split by path.

    Args:
      dhs: [T, ..., H], the whole dL/dh_t: the gradient with respect to a tap's `hs`.
      params, xs, h0, mask, resets: see `gradient_flow`; params is one `GRUParams`. A masked step
        sends all gradient along "kept", a reset step sends none.
      reverse: as in `gru`; the state before step t is then that of step t + 1.

    Returns:
      `Paths` of [T, ..., H] each. Their sum is J_t^T dL/dh_t: dL/dh_{t-1} without the gradient of
      the output at t - 1.

    Raises:
      ValueError, TypeError: see `gradient_flow`.

    Cost: a forward pass, and 6H^2 multiply-adds a row in bulk.

    >>> from jaxgru import init_gru
    >>> params = init_gru(jax.random.key(0), 2, 3)
    >>> gradient_paths(params, jnp.ones((5, 2)), jnp.ones((5, 3))).kept.shape
    (5, 3)
    """
    if not isinstance(params, GRUParams):
        raise TypeError(
            f"gradient_paths: params must be one GRUParams, got {type(params).__name__}; pass "
            "each layer of a stack with its own input and tap."
        )
    require_bool("gradient_paths", "reverse", reverse)
    trace = trace_layers("gradient_paths", params, xs, h0, mask, resets, reverse=reverse)
    require_float("gradient_paths", "dhs", dhs, params.w_x.dtype)
    require_shape("gradient_paths", "dhs", dhs, trace.new.shape, "that of hs")
    return _paths(trace, dhs)


def credit_reach(
    norms: jax.Array, fraction: float = 0.01, *, mask: jax.Array | None = None
) -> jax.Array:
    """Computes how many steps back from the last one the gradient keeps a fraction of its norm.

    The largest distance d from the last step at which the norm is above 0 and still at least
    `fraction` of that of the last step.

    Args:
      norms: [T, ...], |dL/dh_t| for a loss of the last state alone, from `gradient_flow`.
      fraction: a Python number above 0.
      mask: [T, ...] bool. Only valid steps count, back from the last of them.

    Returns:
      [...] integers from 0 to T - 1; also 0 if the gradient of the last step is 0 or NaN.

    Raises:
      ValueError: there is no step, fraction is not positive, or a shape does not fit.
      TypeError: norms is not a floating array, or mask not a bool array.

    >>> int(credit_reach(jnp.array([0.0, 0.5, 0.001, 0.1, 1.0]), 0.1))
    3
    """
    require_float("credit_reach", "norms", norms)
    if norms.ndim < 1 or not norms.shape[0]:
        raise ValueError(
            f"credit_reach: norms must have shape [T, ...] with T>0, got {norms.shape}."
        )
    if not 0 < fraction < math.inf:
        raise ValueError(f"credit_reach: fraction must be positive and finite, got {fraction}.")
    require_flags("credit_reach", {"mask": mask}, norms.shape, "that of norms")
    valid = jnp.ones_like(norms, bool) if mask is None else jnp.asarray(mask)
    after = lax.cumsum(valid.astype(jnp.int32), reverse=True) - 1  # valid steps after this one
    last = jnp.where(valid & (after == 0), norms, jnp.zeros_like(norms)).sum(axis=0)
    enough = norms >= jnp.asarray(fraction, norms.dtype) * last[None]
    return jnp.where(valid & enough & (norms > 0) & (last > 0)[None], after, 0).max(axis=0)


def _paths(trace, dhs):
    """`Paths` in the state dtype."""
    c, dhs = trace.c, dhs.astype(trace.h_tm1.dtype)
    g, _ = trace.flags.leave_vjp(dhs)

    def back(gate, dv):
        dv = normalize_vjp(dv, trace.recurrent.scales[gate], trace.c.norms[gate])
        return matmul(dv, blocks(trace.params.w_h)[gate].T)

    if c.Q is not None:
        reset, candidate = back(0, g * c.R), back(2, g * c.Q)
    else:
        dp = back(2, g * c.A)
        reset, candidate = back(0, dp * c.R), dp * c.r
    kept = trace.flags.leave(dhs * c.K, dhs)
    paths = Paths(kept, back(1, g * c.Z), reset, candidate)
    return Paths(*map(trace.flags.enter_linear, paths))
