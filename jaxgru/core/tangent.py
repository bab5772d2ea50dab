"""The tangent of the recurrence, derived by hand, as a `custom_jvp`."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxgru.core.cell import project, split_recurrent, step
from jaxgru.core.derivatives import coefficients, step_drive, step_jvp
from jaxgru.core.flags import add_tap, hold, previous_states, with_zoneout, zero_where
from jaxgru.core.matmul import state_dtype
from jaxgru.core.scan import scan_gru


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def gru_tangent(static, params, steps, h0, scale, key):
    """The plain recurrence."""
    return scan_gru(static, params, steps, h0, scale, key)


def _gru_tangent_jvp(static, primals, tangents):
    params, steps, h0, scale, key = primals
    tparams, txs, ttap, th0 = jax.tree.map(
        lambda t: None if isinstance(t, SymbolicZero) else t,
        (tangents[0], tangents[1].xs, tangents[1].tap, tangents[2]),
        is_leaf=lambda t: isinstance(t, SymbolicZero),
    )
    h_last, hs = gru_tangent(static, *primals)  # itself differentiable: every order
    dtype = state_dtype(h0.dtype)
    h_tm1 = previous_states(static, h0.astype(dtype), hs, steps)
    recurrent = split_recurrent(params)
    gates = step(recurrent, project(params, steps.xs), h_tm1, scale)[1]
    drive = step_drive(params, tparams, steps.xs, txs, gates, h_tm1, scale)
    th0 = (jnp.zeros_like(h0) if th0 is None else th0).astype(dtype)
    steps = with_zoneout(static, steps, key, th0)

    def body(th, inputs):
        c, norms, drive, mask, resets, cuts, ttap = inputs
        th_tm1 = zero_where(cuts, zero_where(resets, th))
        th_t = step_jvp(recurrent, c, norms, th_tm1, drive, scale)
        th_t = add_tap(hold(static, mask, th_t, th_tm1), ttap)
        return th_t, th_t.astype(hs.dtype)

    c = coefficients(gates, h_tm1, params.spec, scale)
    inputs = (c, gates.norms, drive, steps.mask, steps.resets, steps.cuts, ttap)
    th, ths = lax.scan(body, th0, inputs, reverse=static.reverse, unroll=static.unroll)
    return (h_last, hs), (th.astype(h_last.dtype), ths)


gru_tangent.defjvp(_gru_tangent_jvp, symbolic_zeros=True)
