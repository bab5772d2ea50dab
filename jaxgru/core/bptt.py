"""Backpropagation through time, derived by hand, as a `custom_vjp`."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxgru.core.cell import project, split_recurrent, step
from jaxgru.core.chunks import sweep
from jaxgru.core.derivatives import (
    coefficients,
    gates_vjp,
    inputs_vjp,
    params_vjp,
    step_vjp,
    transpose_recurrent,
)
from jaxgru.core.flags import Steps, hold_vjp, previous_states, with_zoneout, zero_where
from jaxgru.core.scan import forward, forward_chunk, scan_gru
from jaxgru.experimental.fused.kernels import fused_backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gru_bptt(static, params, steps, h0, scale, key):
    """The plain recurrence, keeping nothing."""
    return scan_gru(static, params, steps, h0, scale, key)


def _forward(static, params, steps, h0, scale, key):
    primals = (params, steps, h0, scale, key)
    primals = jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))
    keep_gates = static.residuals == "gates"
    h_last, (hs, gates), h_starts = forward(static, *primals, keep_gates=keep_gates)
    kept_hs = None if static.residuals == "boundaries" else hs
    return (h_last, hs), (primals, kept_hs, gates, h_starts)


def _backward(static, residuals, cotangents):
    (params, steps, h0, scale, key), hs, gates, h_starts = residuals
    dh_last, dhs = (None if isinstance(ct, SymbolicZero) else ct for ct in cotangents)
    dtype, recurrent = h_starts.dtype, split_recurrent(params)
    transposed, w_x_t = transpose_recurrent(recurrent), params.w_x.T
    dh_last = jnp.zeros_like(h0) if dh_last is None else dh_last

    def chunk(carry, per_step, h_start):
        dh, dparams = carry
        steps, hs, gates, dhs = per_step
        if static.residuals == "boundaries":
            _, (hs, gates) = forward_chunk(
                static, params, recurrent, h_start, steps, scale, key, True
            )
        h_tm1 = previous_states(static, h_start, hs, steps)
        if static.residuals == "states":
            a = project(params, steps.xs)
            gates = step(recurrent, a, h_tm1, scale)[1]
        steps = with_zoneout(static, steps, key, dh)
        c = coefficients(gates, h_tm1, params.spec, scale)
        if static.backend == "scan":
            dh, (dh_t, dp, dtap) = _backward_chunk(
                static, transposed, dh, c, gates.norms, dhs, steps, scale
            )
        else:
            dh, (dh_t, dp, dtap) = _backward_fused(static, params, dh, c, dhs, steps, scale)
        da, du = gates_vjp(c, dh_t, dp)
        of_chunk = params_vjp(params, steps.xs, gates, h_tm1, da, du, scale)
        dparams = jax.tree.map(jnp.add, dparams, of_chunk)
        dxs = inputs_vjp(params, w_x_t, steps.xs, da).astype(steps.xs.dtype)
        dtap = None if dtap is None else dtap.astype(steps.xs.dtype)
        return (dh, dparams), (dxs, dtap), None

    dparams = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)
    (dh, dparams), (dxs, dtap), _ = sweep(
        static.chunk_size,
        chunk,
        (dh_last.astype(dtype), dparams),
        (steps, hs, gates, dhs),
        h_starts,
        reverse=not static.reverse,
    )
    dparams = jax.tree.map(lambda d, p: d.astype(p.dtype), dparams, params)
    dsteps = Steps(dxs, None, None, None, None, dtap)
    return dparams, dsteps, dh.astype(h0.dtype), None, None


gru_bptt.defvjp(_forward, _backward, symbolic_zeros=True)


def _backward_chunk(static, transposed, dh, c, norms, dhs, steps, scale):
    """dh before the chunk; and, of each step, the cotangents of h_t, of what w_hn reads, of a tap.

    Those of h_t are what enters the step: a held step keeps its own from it, but not from a tap.
    """

    def body(dh, inputs):
        c, norms, dh_t, mask, resets, cuts = inputs
        dh = dh if dh_t is None else dh + dh_t.astype(dh.dtype)
        dtap = None if steps.tap is None else dh
        dh, held = hold_vjp(static, mask, dh)
        dh_tm1, dp = step_vjp(transposed, c, norms, dh, scale)
        dh_tm1 = dh_tm1 if held is None else dh_tm1 + held
        return zero_where(resets, zero_where(cuts, dh_tm1)), (dh, dp, dtap)

    inputs = (c, norms, dhs, steps.mask, steps.resets, steps.cuts)
    return lax.scan(body, dh, inputs, reverse=not static.reverse, unroll=static.unroll)


def _backward_fused(static, params, dh, c, dhs, steps, scale):
    """The same by the fused kernel, which gives the whole cotangent of every h_t, a tap's."""
    dh, (dtap, dp) = fused_backward(static, params, dh, c, dhs, steps, scale)
    return dh, (hold_vjp(static, steps.mask, dtap)[0], dp, None if steps.tap is None else dtap)
