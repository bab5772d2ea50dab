"""Gradients computed forward in time from the influence of parameters on the state: RTRL, SnAp-1.

The influence P_t = dh_t/dtheta follows the state (Williams and Zipser 1989, Neural Computation 1,
270-280, eq. 8), and the gradient is a sum over the losses of the steps::

    P_t = J_t P_{t-1} + I_t,    P_0 = 0,    dL/dtheta = sum_t (dL_t/dh_t) P_t

where I_t is the derivative of h_t by theta at fixed h_{t-1}. Both J_t and I_t are the transpose of
the step, `jaxgru.core.derivatives.step_vjp`, applied to the unit cotangents. Only P is carried from
step to step: the memory does not grow with T, and the gradient is known at every step.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core import derivatives
from jaxgru.core.cell import project, split_recurrent, step
from jaxgru.core.checks import require_choice
from jaxgru.core.flags import Flags, choose
from jaxgru.core.matmul import blocks, state_dtype
from jaxgru.diagnostics.jacobians import own_slopes
from jaxgru.diagnostics.traces import by_layer, require_scalar_loss, require_sequence
from jaxgru.stacks.forms import Bidirectional, as_stack
from jaxgru.stacks.initializers import init_state

Array = jax.Array
Influence = Literal["exact", "snap-1"]


def rtrl(
    loss_fn: Callable[[Array, Any], Array], params: Any, xs: Array, targets: Any, h0: Any = None, *,
    mask: Array | None = None, resets: Array | None = None, residual: bool = False,
    influence: Influence = "exact",
) -> tuple[Array, Any]:  # fmt: skip
    """Computes sum_t loss_fn(y_t, targets[t]) and its gradient forward in time.

    Args:
      loss_fn: (y_t, target_t) -> a scalar: the loss of one step, of all sequences together.
      params: a `GRUParams`, or a sequence of them.
      targets: a pytree of [T, ...] arrays; step t receives entry t of each.
      xs, h0, resets, residual: see `jaxgru.diagnostics`.
      mask: [T, ...] bool. A masked step keeps its state and its influence, and its loss counts;
        loss_fn can exclude it through the targets.
      influence: "exact", which gives the gradient of backpropagation through time; or "snap-1",
        which stores only those entries of P that are nonzero after one step (Menick et al. 2021,
        arXiv:2006.07232, section 3): an approximation, for a single layer without layer norm.

    Returns:
      The loss, summed in float32 for half types, and its gradient in the form and dtypes of params.

    Raises:
      ValueError, TypeError: see `jaxgru.diagnostics`; ValueError also for a `Bidirectional`, whose
        outputs depend on later inputs, and for "snap-1" with a stack or layer norm.

    Cost: for N parameters 2 H^2 N operations a row and step, and H N numbers a row, whatever T is.
    "snap-1" with reset="after" stores N numbers a row and adds 2 N operations to a step and its
    transpose. With "before" each weight of the reset gate moves every unit in one step, so their
    influence is computed exactly, with a third of the exact memory. Not under `jax.shard_map`.

    >>> from jaxgru import gru, init_gru
    >>> params, xs = init_gru(jax.random.key(0), 2, 3), jnp.ones((5, 4, 2))
    >>> targets = jnp.zeros((5, 4, 3))
    >>> squared = lambda y, target: ((y - target) ** 2).sum()
    >>> loss, dparams = jax.jit(rtrl, static_argnums=0)(squared, params, xs, targets)
    >>> bptt = jax.jit(jax.grad(lambda p: squared(gru(p, xs)[1], targets)))(params)
    >>> bool(jnp.allclose(dparams.w_h, bptt.w_h, atol=1e-5))
    True
    """
    require_sequence("rtrl", params, xs, h0, mask, resets, residual=residual)
    require_choice("rtrl", "influence", influence, get_args(Influence))
    layers = jax.tree.map(jnp.asarray, tuple(as_stack(params)))
    _require_forward(layers, influence)
    lead, dtype = xs.shape[1:-1], state_dtype(xs.dtype)
    states = zip(layers, by_layer(params, h0))
    states = [init_state(p, lead) if h is None else jnp.asarray(h) for p, h in states]
    states = tuple(h.astype(dtype) for h in states)
    for leaf in jax.tree.leaves(targets):
        shape = jnp.shape(leaf)
        if shape[:1] != xs.shape[:1]:
            raise ValueError(
                f"rtrl: targets must be arrays of {xs.shape[0]} steps, as xs, got {shape}."
            )
    targets = jax.tree.map(jnp.asarray, targets)
    first = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), targets)
    output = jax.ShapeDtypeStruct(states[-1].shape, xs.dtype)
    require_scalar_loss("rtrl", loss_fn, output, first)
    start, follow = (_start_snap, _follow_snap) if influence == "snap-1" else (_start, _follow)

    def body(carry, inputs):
        states, influences, loss, grads = carry
        x, target, *flags = inputs
        mask, resets = (None if f is None else f[..., None] for f in flags)
        flags = Flags(mask, resets)
        states, influences, y, pull = follow(layers, x, states, influences, flags, residual)
        value, dy = jax.value_and_grad(loss_fn)(y.astype(xs.dtype), target)
        grads = jax.tree.map(jnp.add, grads, pull(dy.astype(dtype)))
        return (states, influences, loss + value.astype(loss.dtype), grads), None

    grads = jax.tree.map(lambda v: jnp.zeros_like(v, dtype=dtype), layers)
    loss = jnp.zeros((), state_dtype(jax.eval_shape(loss_fn, output, first).dtype))
    carry = (states, start(layers, lead, dtype), loss, grads)
    (_, _, loss, grads), _ = lax.scan(body, carry, (xs, targets, mask, resets))
    grads = jax.tree.map(lambda d, p: d.astype(p.dtype), grads, layers)
    return loss, jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(grads))


class _Linear(NamedTuple):
    """A step and its derivatives, without an axis of time; rows are those of dh'_i."""

    h: Array  # [..., H]
    by_state: Array  # J [..., H, H]
    by_input: Array  # [..., H, I]
    immediate: Any  # I, a GRUParams of [..., H, *shape]


def _linearize(params, x, h):
    """The step from x and h, and `step_vjp` of every unit cotangent."""
    recurrent, lead = split_recurrent(params), h.ndim - 1
    h_t, gates = step(recurrent, project(params, x), h)
    c = derivatives.coefficients(gates, h, params.spec)
    rows, norms, row_x = jax.tree.map(lambda v: jnp.expand_dims(v, lead), (c, gates.norms, x))
    units = jnp.eye(h.shape[-1], dtype=h.dtype)
    units = units.reshape((1,) * lead + units.shape)
    transposed = derivatives.transpose_recurrent(recurrent)
    by_state, dp = derivatives.step_vjp(transposed, rows, norms, units)
    da, du = derivatives.gates_vjp(rows, units, dp)
    by_input = derivatives.inputs_vjp(params, params.w_x.T, row_x, da)
    return _Linear(h_t, by_state, by_input, _immediate(params, x, h, gates, da, du))


def _immediate(params, x, h, gates, da, du):
    """I: x^T da, h^T du, ... of every row of da and du by itself, leaves [..., (H,) *shape].

    The leading axes of x are those of da, which may have one more, the unit of h'.
    """

    def of_row(x, gates, h, da, du):
        single: Any = jax.tree.map(lambda v: v[None], (x, gates, h, da, du))
        return derivatives.params_vjp(params, *single)

    if da.ndim > x.ndim:
        of_row = jax.vmap(of_row, (None, None, None, 0, 0))
    for _ in range(x.ndim - 1):
        of_row = jax.vmap(of_row)
    return of_row(x, gates, h, da, du)


def _start(layers, lead, dtype):
    """P_0: for each layer a tuple, by the parameters of each layer up to it; leaves [..., H, *]."""

    def by(params, size):
        return jax.tree.map(lambda v: jnp.zeros((*lead, size, *v.shape), dtype), params)

    sizes = [params.w_h.shape[0] for params in layers]
    return tuple(tuple(by(p, size) for p in layers[: n + 1]) for n, size in enumerate(sizes))


def _follow(layers, x, states, influences, flags, residual):
    """One step of states and influences: P^l = J^l P^l + (dh^l/dx^l) P of x^l + I^l."""
    new_states, new_influences = [], []
    y, of_y = x, ()
    for params, h, of_h in zip(layers, states, influences):
        h, of_h = flags.enter(h), jax.tree.map(flags.enter, of_h)
        now = _linearize(params, choose(flags.mask, y, jnp.zeros_like(y)), h)
        through = [*(_times(now.by_input, p) for p in of_y), now.immediate]
        moved = [jax.tree.map(jnp.add, _times(now.by_state, p), i) for p, i in zip(of_h, through)]
        of_h = jax.tree.map(flags.leave, tuple(moved), of_h)
        h = flags.leave(now.h, h)
        new_states.append(h)
        new_influences.append(of_h)
        skip = residual and len(new_states) > 1
        y = h + y if skip else h
        of_skip = [jax.tree.map(jnp.add, a, b) for a, b in zip(of_h, of_y)]
        of_y = (*of_skip, of_h[-1]) if skip else of_h

    def pull(dy):
        return tuple(jax.tree.map(lambda p: jnp.tensordot(dy, p, dy.ndim), of_y))

    return tuple(new_states), tuple(new_influences), y, pull


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


def _follow_snap(layers, x, states, influences, flags, _):
    """One step of the state and of the entries of P that SnAp-1 stores."""
    ((params,), (h,), (own, of_r)) = layers, states, influences
    h, before = flags.enter(h), jax.tree.map(flags.enter, (own, of_r))
    x = choose(flags.mask, x, jnp.zeros_like(x))
    h_t, gates = step(split_recurrent(params), project(params, x), h)
    c = derivatives.coefficients(gates, h, params.spec)
    slopes = own_slopes(params, c)
    dp = None if of_r is None else jnp.zeros_like(h)
    da, du = derivatives.gates_vjp(c, jnp.ones_like(h), dp)  # I is diagonal: all its rows at once
    immediate = _immediate(params, x, h, gates, da, du)
    own = jax.tree.map(lambda p, i: _by_unit(slopes, p) + i, before[0], immediate)
    if of_r is not None:
        now = _linearize(params, x, h)
        moved = _times(now.by_state, before[1])
        of_r = jax.tree.map(lambda p, i: p + blocks(i)[0], moved, now.immediate)
    own, of_r = jax.tree.map(flags.leave, (own, of_r), before)
    h = flags.leave(h_t, h)

    def pull(dy):
        def of_leaf(p, r=None):
            grad = _by_unit(dy, p).sum(axis=tuple(range(dy.ndim - 1)))
            if r is None:
                return grad
            r = jnp.tensordot(dy, r, dy.ndim)
            return jnp.concatenate([r, grad[..., r.shape[-1] :]], axis=-1)

        return (jax.tree.map(of_leaf, own, *(() if of_r is None else (of_r,))),)

    return (h,), (own, of_r), h, pull


def _by_unit(v, p):
    """v [..., H] times each of the three blocks of p's last axis, [..., *shape]."""
    v = jnp.concatenate([v] * 3, axis=-1)
    return p * v.reshape(v.shape[:-1] + (1,) * (p.ndim - v.ndim) + v.shape[-1:])


def _times(rows, influence):
    """rows [..., H, K] times every leaf [..., K, *shape]."""

    def product(p):
        lead, shape = rows.ndim - 2, p.shape[rows.ndim - 1 :]
        flat = p.reshape(*p.shape[: lead + 1], math.prod(shape))
        return jnp.matmul(rows, flat).reshape(*rows.shape[:-1], *shape)

    return jax.tree.map(product, influence)


def _require_forward(layers, influence):
    """Raises ValueError for what cannot be followed forward in time."""
    if any(isinstance(layer, Bidirectional) for layer in layers):
        raise ValueError(
            "rtrl: params must hold layers of one direction, got a Bidirectional, whose outputs "
            "depend on later inputs; use jax.grad of gru_stack."
        )
    if influence == "snap-1" and (len(layers) > 1 or layers[0].g_x is not None):
        found = f"{len(layers)} layers" if len(layers) > 1 else "a layer with layer norm"
        raise ValueError(
            "rtrl: params must be one layer without layer norm for influence='snap-1', got "
            f"{found}, where every parameter moves many units at once; use influence='exact'."
        )
