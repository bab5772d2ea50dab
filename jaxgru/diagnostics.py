"""Observers of a GRU and its gradient: they read, and change no value.

Each takes a single layer or a stack, runs under `jax.jit`, and answers in the form of the
parameters: one answer for a `GRUParams`, a `Bidirectional` of two, a tuple of these for a stack.
What they see is the plain network, without dropout and zoneout. Time is the leading axis.

The cotangent g = dL/dh_t comes out of `gru`'s own backward pass through a tap of zeros. All else is
local, linear in g, and made for all steps at once; observers that take a loss are differentiable in
reverse mode, the others in both. With the coefficients of `jaxgru.cell`::

    kept:       g K
    update:     N'(g Z) w_hz^T
    before:     dp = N'(g A) w_hn^T,  candidate: dp r,               reset: N'(dp R) w_hr^T
    after:                            candidate: N'(g Q) w_hn^T,     reset: N'(g R) w_hr^T

are the four ways of a step, neither held nor reset, from dL/dh_t to dL/dh_{t-1}. Their sum is
J_t^T g.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.arguments import require_float
from jaxgru.cell import gates_vjp, params_vjp_factors
from jaxgru.layers import Bidirectional, Merge, gru_bidirectional, gru_stack, init_taps
from jaxgru.masks import require_flags
from jaxgru.parameters import CHO_2014, GRUParams, GRUSpec
from jaxgru.products import blocks, matmul, normalize_vjp, state_dtype
from jaxgru.recurrence import gru
from jaxgru.traces import (
    as_stack,
    choose,
    is_layer,
    like_params,
    require_scalar_loss,
    require_sequence,
    trace_layers,
    zero_where,
)

Array = jax.Array


class GateStatistics(NamedTuple):
    """Of each unit, over all real steps of all sequences; [H] each."""

    reset_mean: Array
    update_mean: Array
    kept_mean: Array  # of k, the share of the state that a step keeps: z or 1 - z
    reset_low: Array  # share of the steps with r below `low`
    reset_high: Array  # share above `high`
    update_low: Array
    update_high: Array
    memory: Array  # steps over which the kept state falls to 1/e


class GateValues(NamedTuple):
    """The gates of every step; [T, ..., H] each."""

    reset: Array  # r
    update: Array  # z
    candidate: Array  # n
    kept: Array  # k, the share of the state that the step keeps: z or 1 - z


class Paths(NamedTuple):
    """The four ways from dL/dh_t back to dL/dh_{t-1}."""

    kept: Array  # k h_{t-1} itself
    update: Array  # through z
    reset: Array  # through r
    candidate: Array  # through n, for a fixed r


class GradientFlow(NamedTuple):
    """Euclidean norms, [T, ...] each, of what one backward pass sends through a GRU."""

    states: Array  # |dL/dh_t|
    inputs: Array  # |dL/dx_t|
    paths: Paths  # of what step t sends back to h_{t-1}


def gradient_flow(
    loss_fn: Callable[[Any, Array], Array],
    params: Any,
    xs: Array,
    h0: Any = None,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    spec: GRUSpec = CHO_2014,
    merge: Merge = "concat",
    residual: bool = False,
) -> tuple[Array, Any]:
    """(loss, flow): how much gradient reaches every state and input, and along which paths.

    For any other loss, such as one with dropout or with a model around the layers, pass
    `tap=init_taps(...)` through to `gru` or `gru_stack`, differentiate by it as well, and give
    dL/dh_t, its `hs`, to `gradient_paths`.

    Args:
      loss_fn: (h_last, ys) -> a scalar, of the results of `gru` (`gru_stack` for a stack).
      params: a `GRUParams`, a `Bidirectional`, or a sequence of them.
      xs: [T, ..., I].
      h0: as for those; None for zeros.
      mask: [T, ...] bool.
      resets: [T, ...] bool.
      spec: which equation.
      merge: as in `gru_stack`.
      residual: as in `gru_stack`.

    Returns:
      The loss, and a `GradientFlow` for each GRU. Where a step is held, "kept" is all there is.

    Raises:
      ValueError: the loss is no scalar, a shape does not fit, or a number is not finite
        (seen outside of jit alone).
      TypeError: the loss is no floating number, or as `gru_stack`.

    Cost: one forward and one backward pass, and another forward whose gates are made in bulk.

    >>> from jaxgru import init_gru
    >>> params = init_gru(jax.random.key(0), 2, 3)
    >>> loss, flow = gradient_flow(lambda h_last, hs: h_last.sum(), params, jnp.ones((5, 2)))
    >>> flow.states.shape, bool(flow.states[0] < flow.states[-1])
    ((5,), True)
    """
    options = {"mask": mask, "resets": resets, "spec": spec}
    require_sequence("gradient_flow", params, xs, h0, mask, resets, merge, residual)
    loss, (_, taps) = _tapped("gradient_flow", loss_fn, params, xs, h0, merge, residual, options)
    layers = trace_layers(params, xs, h0, mask, resets, spec, merge, residual)
    flows = []
    for traces, of_layer in zip(layers, _by_gru(params, taps)):
        flows.append(
            tuple(
                GradientFlow(
                    _norm(tap.hs), _norm(tap.xs), Paths(*map(_norm, _paths(trace, tap.hs)))
                )
                for trace, tap in zip(traces, of_layer)
            )
        )
    return loss, like_params(params, flows)


def gradient_paths(
    params: GRUParams,
    xs: Array,
    dhs: Array,
    h0: Array | None = None,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    spec: GRUSpec = CHO_2014,
    reverse: bool = False,
) -> Paths:
    """What every step sends back to the state before it, split by path; the module has equations.

    Args:
      params: of one GRU.
      xs: [T, ..., I].
      dhs: [T, ..., H], dL/dh_t in all, as the gradient by a tap's `hs`.
      h0: [..., H]; None for zeros.
      mask: [T, ...] bool; a held step sends everything along "kept".
      resets: [T, ...] bool; a reset step sends nothing.
      spec: which equation.
      reverse: as in `gru`; "before" is then the step t + 1.

    Returns:
      `Paths` of [T, ..., H] each. Their sum is J_t^T dL/dh_t: what dL/dh_{t-1} has beside the
      gradient of its own output.

    Raises:
      ValueError: a shape does not fit or a number is not finite (seen outside of jit alone).
      TypeError: as `gru`.

    Cost: one forward pass, and 6H^2 multiply-adds a row in bulk.

    >>> from jaxgru import init_gru
    >>> params = init_gru(jax.random.key(0), 2, 3)
    >>> paths = gradient_paths(params, jnp.ones((5, 2)), jnp.ones((5, 3)))
    >>> paths.kept.shape
    (5, 3)
    """
    if not isinstance(params, GRUParams):
        raise TypeError(
            f"gradient_paths: params must be one GRUParams, got {type(params).__name__}; of a "
            "stack pass each layer with its own input and tap."
        )
    require_sequence("gradient_paths", params, xs, h0, mask, resets)
    require_float("gradient_paths", "dhs", dhs, params.w_x.dtype)
    wanted = (*xs.shape[:-1], params.w_h.shape[0])
    if dhs.shape != wanted:
        raise ValueError(f"gradient_paths: dhs must have shape {wanted}, got {dhs.shape}.")
    ((trace,),) = trace_layers(params, xs, h0, mask, resets, spec, reverse=reverse)
    return _paths(trace, dhs)


def credit_reach(norms: Array, fraction: float = 0.01, *, mask: Array | None = None) -> Array:
    """How far back credit reaches: steps from the last one to the first that gets that fraction.

    The largest d with norms[T - 1 - d] >= fraction * norms[T - 1], of norms above 0.

    Args:
      norms: [T, ...], |dL/dh_t| for a loss of the last state alone, from `gradient_flow`.
      fraction: a Python number above 0.
      mask: [T, ...] bool; only real steps count, from the last of them on.

    Returns:
      [...] integers from 0 to T - 1; 0 as well where the last step has no gradient, or NaN.

    Raises:
      ValueError: there is no step, fraction is not positive, or a shape does not fit.
      TypeError: norms is no floating, or mask no bool array.

    Cost: one pass over norms.

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
    real = jnp.ones(norms.shape, bool) if mask is None else jnp.asarray(mask)
    behind = lax.cumsum(real.astype(jnp.int32), reverse=True) - 1  # real steps after this one
    last = jnp.where(real & (behind == 0), norms, jnp.zeros_like(norms)).sum(axis=0)
    enough = norms >= jnp.asarray(fraction, norms.dtype) * last[None]
    return jnp.where(real & enough & (norms > 0) & (last > 0)[None], behind, 0).max(axis=0)


def gate_statistics(
    params: Any,
    xs: Array,
    h0: Any = None,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    spec: GRUSpec = CHO_2014,
    merge: Merge = "concat",
    residual: bool = False,
    low: float = 0.1,
    high: float = 0.9,
) -> Any:
    """Means and saturation of the gates of every unit, and how long it remembers.

    Saturation as Karpathy et al. 2015 (arXiv:1506.02078, section 4.2) count it: the share of the
    steps with a gate below 0.1 or above 0.9. Memory is -1 / mean log k over steps with keep
    fractions k: along the kept state alone, what a step writes falls to 1/e in so many steps; inf
    where k rounds to 1, and in float32 a thousandth off from some 10,000 steps on.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a sequence of them.
      xs: [T, ..., I].
      h0: as in `gru_stack`.
      mask: [T, ...] bool; only real steps count.
      resets: [T, ...] bool.
      spec: which equation.
      merge: as in `gru_stack`.
      residual: as in `gru_stack`.
      low: a gate below is closed.
      high: a gate above is open.

    Returns:
      A `GateStatistics` of [H] arrays for each GRU; NaN where there is no real step.

    Raises:
      ValueError: a shape does not fit, a number is not finite (seen outside of jit alone), or not
        0 <= low < high <= 1.
      TypeError: as `gru_stack`.

    Cost: one forward pass, its gates once more in bulk, and their sums.

    >>> from jaxgru import init_gru
    >>> params = jax.tree.map(jnp.zeros_like, init_gru(jax.random.key(0), 2, 3))
    >>> statistics = gate_statistics(params, jnp.ones((5, 2)))
    >>> statistics.update_mean.tolist(), round(float(statistics.memory[0]), 4)  # 1 / log 2
    ([0.5, 0.5, 0.5], 1.4427)
    """
    require_sequence("gate_statistics", params, xs, h0, mask, resets, merge, residual)
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"gate_statistics: low and high must satisfy 0 <= low < high <= 1, got {low}, {high}."
        )
    layers = trace_layers(params, xs, h0, mask, resets, spec, merge, residual)
    return like_params(
        params, [tuple(_statistics(trace, low, high) for trace in traces) for traces in layers]
    )


def gate_values(
    params: Any,
    xs: Array,
    h0: Any = None,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    spec: GRUSpec = CHO_2014,
    merge: Merge = "concat",
    residual: bool = False,
) -> Any:
    """The gates r, z, the candidate n and the keep fraction k of every step: for histograms.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a sequence of them.
      xs: [T, ..., I].
      h0: as in `gru_stack`.
      mask: [T, ...] bool; gates of held steps act on nothing, and are those of an input of zeros.
      resets: [T, ...] bool.
      spec: which equation.
      merge: as in `gru_stack`.
      residual: as in `gru_stack`.

    Returns:
      `GateValues` for each GRU.

    Raises:
      ValueError: a shape does not fit or a number is not finite (seen outside of jit alone).
      TypeError: as `gru_stack`.

    Cost: one forward pass, and its gates once more in bulk.

    >>> from jaxgru import init_gru
    >>> gates = gate_values(init_gru(jax.random.key(0), 2, 3), jnp.ones((5, 2)))
    >>> gates.reset.shape
    (5, 3)
    """
    require_sequence("gate_values", params, xs, h0, mask, resets, merge, residual)
    layers = trace_layers(params, xs, h0, mask, resets, spec, merge, residual)

    values = [tuple(GateValues(*t.gates[:3], t.c.k) for t in traces) for traces in layers]
    return like_params(params, values)


def example_gradient_norms(
    loss_fn: Callable[[Any, Array], Array],
    params: Any,
    xs: Array,
    h0: Any = None,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    spec: GRUSpec = CHO_2014,
    merge: Merge = "concat",
    residual: bool = False,
) -> tuple[Array, Any]:
    """(loss, norms): of each example, the norm of its own gradient of every array of parameters.

    Of a weight [I, K] an example's gradient is sum_t x_t^T d_t, and

        |sum_t x_t^T d_t|^2 = sum_{t,s} (x_t . x_s) (d_t . d_s)

    (Goodfellow 2015, arXiv:1510.01799, for one step; over steps Li et al. 2022, arXiv:2110.05679,
    section 4). Where T^2 < I K that is what is summed, and no gradient is formed; on longer
    sequences that of one example and array at a time is, which is then less work. For one batch
    axis the norm over all arrays is `jax.vmap(optax.global_norm)(norms)`.

    Args:
      loss_fn: (h_last, ys) -> a scalar, a sum of terms that each see one example: a mean over a
        batch of B gives gradients, and norms, that are B times too small.
      params: a `GRUParams`, a `Bidirectional`, or a sequence of them.
      xs: [T, ..., I].
      h0: as in `gru_stack`.
      mask: [T, ...] bool.
      resets: [T, ...] bool.
      spec: which equation.
      merge: as in `gru_stack`.
      residual: as in `gru_stack`.

    Returns:
      The loss, and norms in the form of params: [...] in place of every array.

    Raises:
      ValueError: the loss is no scalar, a shape does not fit, or a number is not finite
        (seen outside of jit alone).
      TypeError: the loss is no floating number, or as `gru_stack`.

    Cost: a forward and a backward pass without gradients of weights; then for each example, one
    after the other, and each weight T times the lesser of T (I + K) and I K multiply-adds, with the
    lesser of T^2 and I K numbers at a time.

    >>> from jaxgru import init_gru
    >>> params, xs = init_gru(jax.random.key(0), 2, 3), jnp.ones((5, 4, 2))
    >>> loss, norms = example_gradient_norms(lambda h_last, hs: h_last.sum(), params, xs)
    >>> norms.w_x.shape
    (4,)
    """
    options = {"mask": mask, "resets": resets, "spec": spec}
    require_sequence("example_gradient_norms", params, xs, h0, mask, resets, merge, residual)
    loss, (_, taps) = _tapped(
        "example_gradient_norms", loss_fn, params, xs, h0, merge, residual, options
    )
    layers = trace_layers(params, xs, h0, mask, resets, spec, merge, residual)
    norms = [
        tuple(_example_norms(trace, tap.hs, spec) for trace, tap in zip(traces, of_layer))
        for traces, of_layer in zip(layers, _by_gru(params, taps))
    ]
    return loss, like_params(params, norms)


def _tapped(function, loss_fn, params, xs, h0, merge, residual, options):
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


def _by_gru(params, taps):
    """The taps of each layer, one or two of them."""
    taps = [taps] if is_layer(params) else taps
    pairs = zip(as_stack(params), taps)
    return [tap if isinstance(layer, Bidirectional) else (tap,) for layer, tap in pairs]


def _paths(trace, dhs):
    """`Paths` in the state dtype."""
    c, dhs = trace.c, dhs.astype(trace.h_tm1.dtype)
    g = choose(trace.mask, dhs, jnp.zeros_like(dhs))

    def back(gate, dv):
        dv = normalize_vjp(dv, trace.recurrent.g[gate], trace.gates.norms[gate])
        return matmul(dv, blocks(trace.params.w_h)[gate].T)

    if c.reset is None:
        c_r, c_z, c_q = jnp.unstack(c.slopes[0], axis=-2)
        reset, candidate = back(0, g * c_r), back(2, g * c_q)
    else:
        c_r, c_z = c.slopes
        dp = back(2, g * c.a)
        reset, candidate = back(0, dp * c_r), dp * c.reset
    kept = choose(trace.mask, dhs * c.k, dhs)
    paths = Paths(kept, back(1, g * c_z), reset, candidate)
    return Paths(*(zero_where(trace.resets, v) for v in paths))


def _statistics(trace, low, high):
    """`GateStatistics` over all axes but the last."""
    r, z, *_ = trace.gates
    real = jnp.ones_like(r[..., :1], bool) if trace.mask is None else trace.mask
    leading = tuple(range(r.ndim - 1))
    count = real.sum(axis=leading).astype(r.dtype)

    def mean(v):
        v = v.astype(r.dtype)
        return jnp.where(real, v, jnp.zeros_like(v)).sum(axis=leading) / count

    return GateStatistics(
        *(mean(v) for v in (r, z, trace.c.k, r < low, r > high, z < low, z > high)),
        memory=1 / jnp.abs(mean(jnp.log(trace.c.k))),
    )


def _example_norms(trace, dhs, spec):
    """A GRUParams of norms [...], from dL/dh_t [T, ..., H]."""
    g = choose(trace.mask, dhs, jnp.zeros_like(dhs)).astype(trace.h_tm1.dtype)
    c, dp = trace.c, None
    if c.reset is not None:
        dv = normalize_vjp(g * c.a, trace.recurrent.g[2], trace.gates.norms[2])
        dp = matmul(dv, blocks(trace.params.w_h)[2].T)
    of_w_x, of_w_h, rows = params_vjp_factors(
        trace.params, trace.xs, trace.gates, trace.h_tm1, *gates_vjp(c, g, dp), spec
    )
    of_w_h = [_outer_square(*pair) for pair in of_w_h]
    return GRUParams(
        jnp.sqrt(_outer_square(*of_w_x)),
        jnp.sqrt(sum(of_w_h[1:], of_w_h[0])),
        *(None if d is None else _norm(d.sum(axis=0)) for d in rows),
    )


def _outer_square(x, d):
    """|sum_t x_t^T d_t|^2 of each example [...], from x [T, ..., I] and d [T, ..., K]."""
    lead = x.shape[1:-1]
    short = x.shape[0] ** 2 < x.shape[-1] * d.shape[-1]

    def of_example(pair):
        x, d = pair
        if short:  # may round to just below 0 where the sum cancels
            return jnp.maximum(jnp.vdot(matmul(x, x.T), matmul(d, d.T)), 0)
        return jnp.square(matmul(x.T, d)).sum()

    flat = [jnp.moveaxis(v.reshape(v.shape[0], math.prod(lead), v.shape[-1]), 0, 1) for v in (x, d)]
    return lax.map(of_example, tuple(flat)).reshape(lead)


def _norm(v):
    """The Euclidean norm over the last axis in the state dtype; tiny entries do not underflow."""
    v = v.astype(state_dtype(v.dtype))
    largest = jnp.abs(v).max(axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    return (scale * jnp.linalg.norm(v / scale, axis=-1, keepdims=True))[..., 0]
