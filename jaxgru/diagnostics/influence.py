"""Gradients computed forward in time from the influence of parameters on the state: RTRL, SnAp-1.

`_follow` and `_follow_snap` compute one step of one sequence; `rtrl` maps them over the batch axes
with vmap. J and I of `rtrl` are the transpose of the step, `jaxgru.core.derivatives.step_vjp`,
applied to the unit cotangents.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core import derivatives
from jaxgru.core.checks import require_choice
from jaxgru.core.flags import Flags, choose
from jaxgru.core.matmul import blocks, state_dtype
from jaxgru.core.sharding import cast_to_common_varying_axes
from jaxgru.diagnostics.jacobians import jacobian_diagonal
from jaxgru.diagnostics.traces import (
    per_layer,
    replicate,
    require_scalar_loss,
    require_sequence,
    trace_steps,
)
from jaxgru.stacks.checks import require_one_way
from jaxgru.stacks.create import init_state
from jaxgru.stacks.forms import as_stack

Influence = Literal["exact", "snap-1"]


class RTRLState(NamedTuple):
    """What `rtrl` carries from one step to the next, in float32 for half types."""

    h: Any  # the state, in the form of h0
    influence: Any  # P = dh/dtheta, or the entries of it that "snap-1" stores


class RTRLResult(NamedTuple):
    """What `rtrl` returns."""

    loss: jax.Array
    grads: Any  # in the form and dtypes of params
    state: RTRLState  # after the last step, to go on with


def rtrl(
    loss_fn: Callable[[jax.Array, Any], jax.Array], params: Any, xs: jax.Array, targets: Any,
    h0: Any = None, *, mask: jax.Array | None = None, resets: jax.Array | None = None,
    residual: bool = False, influence: Influence = "exact", state: RTRLState | None = None,
) -> RTRLResult:  # fmt: skip
    """Computes sum_t loss_fn(y_t, targets[t]) and its gradient forward in time.

    The influence P_t = dh_t/dtheta follows the state, and the gradient sums over the steps' losses
    (Williams and Zipser 1989, Neural Computation 1, 270-280, eq. 8)::

        P_t = J_t P_{t-1} + I_t,    P_0 = 0,    dL/dtheta = sum_t (dL_t/dh_t) P_t

    with J_t = dh_t/dh_{t-1} and I_t the derivative of h_t by theta at fixed h_{t-1}. Only P is
    carried from step to step: memory does not grow with T.

    For online learning, pass the `state` of one call to the next. A sequence may be cut into pieces
    of any length, down to one step, and the parameters updated between them. Without updates the
    losses and gradients of the pieces sum to those of the whole. After an update P still holds
    derivatives at the earlier parameters, so that the gradient is approximate; its error is
    proportional to the size of the updates since the last reset, and small learning rates make it
    small (Williams and Zipser 1989, on real-time learning).

    Args:
      loss_fn: (y_t, target_t) -> a scalar: the loss of one step, of all sequences together.
      params: a `GRUParams`, or a sequence of them.
      targets: a pytree of [T, ...] arrays; step t receives entry t of each.
      xs, h0, resets, residual: see `gradient_flow`.
      mask: [T, ...] bool. A masked step keeps its state and its influence, and its loss counts;
        loss_fn can exclude it through the targets.
      influence: "exact", which gives the gradient of backpropagation through time; or "snap-1",
        which stores only those entries of P that are nonzero after one step (Menick et al. 2021,
        arXiv:2006.07232, section 3): an approximation, for a single layer without layer norm.

      state: that of the call for the steps before these, with the same influence and batch, in
        place of h0; None starts a sequence from h0.

    Returns:
      `RTRLResult`: the loss, summed in float32 for half types, its gradient, and the `RTRLState`
      after the last step. The gradient leaves out how h0, or the losses of earlier calls, depend on
      params. With no steps (T=0) the state is the one to start from, as `jax.lax.scan` needs it.

    Raises:
      ValueError, TypeError: see `gradient_flow`; ValueError also for a `Bidirectional`, whose
        outputs depend on later inputs, for "snap-1" with a stack or layer norm, and for a state of
        another form or beside h0.

    Cost: for N parameters 2 H^2 N operations a row and step, and H N numbers a row, whatever T is.
    "snap-1" with reset="after" stores N numbers a row and adds 2 N operations to a step and its
    transpose. With "before" each weight of the reset gate moves every unit in one step, so their
    influence is computed exactly, with a third of the exact memory.
    Inside `jax.shard_map` loss and gradient are those of the device's rows: sum them by `lax.psum`.

    >>> from jaxgru import gru, init_gru
    >>> params, xs = init_gru(jax.random.key(0), 2, 3), jnp.ones((5, 4, 2))
    >>> targets = jnp.zeros((5, 4, 3))
    >>> squared = lambda y, target: ((y - target) ** 2).sum()
    >>> loss, dparams, _ = jax.jit(rtrl, static_argnums=0)(squared, params, xs, targets)
    >>> bptt = jax.jit(jax.grad(lambda p: squared(gru(p, xs)[1], targets)))(params)
    >>> bool(jnp.allclose(dparams.w_h, bptt.w_h, atol=1e-5))
    True
    """
    layers = _require_rtrl(params, xs, targets, h0, mask, resets, residual, influence)
    lead, dtype = xs.shape[1:-1], state_dtype(xs.dtype)
    start = _start if influence == "exact" else _start_snap
    states = zip(layers, per_layer(params, h0))
    states = [init_state(p, lead) if h is None else jnp.asarray(h) for p, h in states]
    begin = tuple(h.astype(dtype) for h in states), start(layers, lead, dtype)
    states, influences = begin if state is None else _require_state(params, h0, state, begin)
    targets = jax.tree.map(jnp.asarray, targets)
    arrays = (layers, xs, targets, mask, resets, states, influences)
    arrays = cast_to_common_varying_axes(arrays)
    layers, xs, targets, mask, resets, states, influences = arrays
    first = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), targets)
    output = jax.ShapeDtypeStruct(states[-1].shape, xs.dtype)
    require_scalar_loss("rtrl", loss_fn, output, first)
    if influence == "exact":
        follow, pull = functools.partial(_follow, layers, residual), _pull
    else:
        follow, pull = functools.partial(_follow_snap, layers[0]), _pull_snap
    for _ in lead:
        follow = jax.vmap(follow)

    def body(carry, inputs):
        states, influences, loss, grads = carry
        x, target, *flags = inputs
        states, influences, y, of_y = follow(x, states, influences, *flags)
        value, dy = jax.value_and_grad(loss_fn)(y.astype(xs.dtype), target)
        grads = jax.tree.map(jnp.add, grads, pull(dy.astype(dtype), of_y))
        return (states, influences, loss + value.astype(loss.dtype), grads), None

    grads = jax.tree.map(lambda v: jnp.zeros_like(v, dtype=dtype), layers)
    loss = jnp.zeros((), state_dtype(jax.eval_shape(loss_fn, output, first).dtype))
    loss, grads = cast_to_common_varying_axes((loss, grads), arrays)
    carry, inputs = jax.tree.map(
        replicate, ((states, influences, loss, grads), (xs, targets, mask, resets))
    )
    carry, _ = lax.scan(body, carry, inputs)
    states, influences, loss, grads = carry
    grads = jax.tree.map(lambda d, p: d.astype(p.dtype), grads, layers)
    grads = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(grads))
    h = states if as_stack(params) is params else states[0]
    return RTRLResult(loss, grads, RTRLState(h, influences))


def _require_rtrl(params, xs, targets, h0, mask, resets, residual, influence):
    """The layers of checked arguments; raises as `rtrl` says."""
    cure = ", whose outputs depend on later inputs; use jax.grad of gru_stack"
    require_one_way("rtrl", params, cure)
    require_sequence("rtrl", params, xs, h0, mask, resets, residual=residual)
    require_choice("rtrl", "influence", influence, get_args(Influence))
    layers = jax.tree.map(jnp.asarray, tuple(as_stack(params)))
    if influence == "snap-1" and (len(layers) > 1 or layers[0].g_x is not None):
        found = f"{len(layers)} layers" if len(layers) > 1 else "a layer with layer norm"
        raise ValueError(
            "rtrl: params must be one layer without layer norm for influence='snap-1', got "
            f"{found}, where every parameter moves many units at once; use influence='exact'."
        )
    for leaf in jax.tree.leaves(targets):
        shape = jnp.shape(leaf)
        if shape[:1] != xs.shape[:1]:
            raise ValueError(
                f"rtrl: targets must be arrays of {xs.shape[0]} steps, as xs, got {shape}."
            )
    return layers


def _require_state(params, h0, state, begin):
    """(states, influences) of a state; TypeError or ValueError unless it has the form of begin."""
    if not isinstance(state, RTRLState):
        kind = type(state).__name__
        raise TypeError(f"rtrl: state must be the RTRLState of an earlier call, got {kind}.")
    if h0 is not None:
        raise ValueError("rtrl: h0 must be None with a state, which holds h, got both.")
    given = (tuple(per_layer(params, state.h)), state.influence)
    same = jax.tree.structure(given) == jax.tree.structure(begin)
    found, wanted = ([f"{v.dtype}{[*v.shape]}" for v in jax.tree.leaves(s)] for s in (given, begin))
    if not same or found != wanted:
        pairs = zip(found, wanted) if same else ()
        differ = next((f"{a} in place of {b}" for a, b in pairs if a != b), "another form")
        raise ValueError(
            "rtrl: state must be that of a call with the same layers, batch axes, dtype and "
            f"influence, got {differ}; pass state=None to start a sequence."
        )
    return given


def _pull_units(trace):
    """J [H, H], dh'/dx [H, I] and I, a GRUParams of [H, *shape]: row i is what dh'_i = 1 gives."""
    params, x, gates, h, c = trace.params, trace.xs, trace.gates, trace.h_tm1, trace.c
    transposed = trace.recurrent.transposed()

    def of_unit(unit):
        dh, dp = derivatives.step_vjp(transposed, c, unit)
        da, du = derivatives.gates_vjp(c, unit, dp)
        dx = derivatives.inputs_vjp(params, params.w_x.T, x, da)
        return dh, dx, derivatives.params_vjp(params, x, gates, h, da, du)

    return jax.vmap(of_unit)(jnp.eye(h.shape[-1], dtype=h.dtype))


def _start(layers, lead, dtype):
    """P_0: for each layer a tuple, by the parameters of each layer up to it; leaves [..., H, *]."""

    def zeros(params, size):
        return jax.tree.map(lambda v: jnp.zeros((*lead, size, *v.shape), dtype), params)

    sizes = [params.w_h.shape[0] for params in layers]
    return tuple(tuple(zeros(p, size) for p in layers[: n + 1]) for n, size in enumerate(sizes))


def _follow(layers, residual, x, states, influences, mask, resets):
    """One step: P^l = J^l P^l + (dh^l/dx^l) P of x^l + I^l; also y and its influence."""
    flags = Flags(mask, resets)
    before = jax.tree.map(flags.enter, (states, influences))
    after, y, of_y = [], x, ()
    for params, h, of_h in zip(layers, *before):
        trace = trace_steps(params, choose(mask, y, jnp.zeros_like(y)), h, Flags())
        by_state, by_input, immediate = _pull_units(trace)
        through = (*_times(by_input, of_y), immediate)
        moved = jax.tree.map(jnp.add, _times(by_state, of_h), through)
        h, of_h = jax.tree.map(flags.leave, (trace.new, moved), (h, of_h))
        after.append((h, of_h))
        if residual and of_y:
            y, of_y = h + y, (*jax.tree.map(jnp.add, of_h[:-1], of_y), of_h[-1])
        else:
            y, of_y = h, of_h
    return *zip(*after), y, of_y


def _pull(dy, of_y):
    """dy P."""
    return jax.tree.map(lambda p: jnp.tensordot(dy, p, dy.ndim), of_y)


def _start_snap(layers, lead, dtype):
    """P_0 of SnAp-1: for each parameter its own unit; for the reset gate's parameters all units.

    The second, leaves [..., H, *shape of a block], is None for "after", where I is diagonal.
    """
    (params,) = layers
    own = jax.tree.map(lambda v: jnp.zeros((*lead, *v.shape), dtype), params)
    if params.spec.reset == "after":
        return own, None
    of_r = jax.tree.map(lambda v: blocks(v)[0], params)
    return own, _start((of_r,), lead, dtype)[0][0]


def _follow_snap(params, x, states, influences, mask, resets):
    """One step of the state and of the entries of P that SnAp-1 stores."""
    flags = Flags(mask, resets)
    before = jax.tree.map(flags.enter, (*states, *influences))
    h, own, of_r = before
    trace = trace_steps(params, choose(mask, x, jnp.zeros_like(x)), h, Flags())
    dp = None if of_r is None else jnp.zeros_like(h)
    # I is diagonal: all its rows at once.
    da, du = derivatives.gates_vjp(trace.c, jnp.ones_like(h), dp)
    immediate = derivatives.params_vjp(params, trace.xs, trace.gates, h, da, du)
    slopes = jacobian_diagonal(params, trace.c)
    own = jax.tree.map(lambda p, i: _by_unit(slopes, p) + i, own, immediate)
    if of_r is not None:
        by_state, _, immediate = _pull_units(trace)
        of_r = jax.tree.map(lambda p, i: p + blocks(i)[0], _times(by_state, of_r), immediate)
    h, own, of_r = jax.tree.map(flags.leave, (trace.new, own, of_r), before)
    return (h,), (own, of_r), h, (own, of_r)


def _pull_snap(dy, of_y):
    """dy P, of the entries of P that SnAp-1 stores."""
    own, of_r = of_y
    grads = jax.tree.map(lambda p: _by_unit(dy, p).sum(axis=tuple(range(dy.ndim - 1))), own)
    if of_r is None:
        return (grads,)

    def replace_r(grad, r):
        return jnp.concatenate([r, grad[..., r.shape[-1] :]], axis=-1)

    return (jax.tree.map(replace_r, grads, _pull(dy, of_r)),)


def _by_unit(v, p):
    """v [..., H] times each of the three blocks of p's last axis, [..., *shape]."""
    v = jnp.concatenate([v] * 3, axis=-1)
    return p * v.reshape(v.shape[:-1] + (1,) * (p.ndim - v.ndim) + v.shape[-1:])


def _times(rows, influence):
    """rows [H, K] times every leaf [K, *shape]."""
    return jax.tree.map(lambda p: jnp.tensordot(rows, p, 1), influence)
