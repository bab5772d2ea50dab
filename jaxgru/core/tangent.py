"""The tangent of the recurrence, derived by hand, as a `custom_jvp`: th_t = th_{t-1} M_t + e_t.

`step_jvp` defines M_t, and `step_jvp_inputs` computes e_t of all steps at once. The loop is linear
in th and e, so JAX can transpose it (that is BPTT), and can differentiate it again.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxgru.core.cell import project, split_recurrent, step
from jaxgru.core.derivatives import coefficients, step_jvp, step_jvp_inputs
from jaxgru.core.matmul import state_dtype
from jaxgru.core.scan import plain_scan


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def tangent(config, params, inputs, h0, dropout, key):
    """(h_last, hs) of `plain_scan`; its derivative is `_tangent_jvp`."""
    return plain_scan(config, params, inputs, h0, dropout, key)


def _tangent_jvp(config, primals, tangents):
    params, inputs, h0, dropout, key = primals
    tparams, txs, ttap, th0 = jax.tree.map(
        lambda t: None if isinstance(t, SymbolicZero) else t,
        (tangents[0], tangents[1].xs, tangents[1].tap, tangents[2]),
        is_leaf=lambda t: isinstance(t, SymbolicZero),
    )
    h_last, hs = tangent(config, *primals)  # not plain_scan: higher derivatives use this rule too
    dtype, flags = state_dtype(h0.dtype), inputs.flags
    h_tm1 = flags.states_before(h0.astype(dtype), hs, config.reverse)
    recurrent = split_recurrent(params, dropout)
    gates = step(recurrent, project(params, inputs.xs), h_tm1)[1]
    e = step_jvp_inputs(params, tparams, inputs.xs, txs, gates, h_tm1, dropout)
    th0 = (jnp.zeros_like(h0) if th0 is None else th0).astype(dtype)
    flags = flags.with_zoneout(key, inputs.numbers, th0)

    def body(th, per_step):
        c, e, flags, ttap = per_step
        th_tm1 = flags.enter_linear(th)
        th_t = flags.leave(step_jvp(recurrent, c, th_tm1, e), th_tm1)
        th_t = th_t if ttap is None else th_t + ttap.astype(th_t.dtype)
        return th_t, th_t.astype(hs.dtype)

    per_step = (coefficients(recurrent, gates, h_tm1), e, flags, ttap)
    th, ths = lax.scan(body, th0, per_step, reverse=config.reverse, unroll=config.unroll)
    return (h_last, hs), (th.astype(h_last.dtype), ths)


tangent.defjvp(_tangent_jvp, symbolic_zeros=True)
