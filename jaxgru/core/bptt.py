"""Backpropagation through time, derived by hand, as a `custom_vjp`; README.md has the equations.

The loop of the backward pass runs from the last step to the first and carries only g = dL/dh_t.
Everything else is computed for all steps of a chunk at once: the local derivatives before the loop,
the gradients of weights, biases and inputs after it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxgru.core.cell import project, split_recurrent, step, zero_gates
from jaxgru.core.chunks import chunk_starts, scan_chunks
from jaxgru.core.derivatives import coefficients, gates_vjp, inputs_vjp, params_vjp, step_vjp
from jaxgru.core.matmul import state_dtype
from jaxgru.core.scan import Inputs, forward, plain_scan, run_chunk, run_unless_masked


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def bptt(configs, params, inputs, h0, dropout, key):
    """(h_last, hs). It runs where no gradient is asked for, and saves nothing."""
    return configs.run(plain_scan, params, inputs, h0, dropout, key)


def _forward(configs, params, inputs, h0, dropout, key):
    """(h_last, hs), and the residuals: what `_backward` reads."""
    primals = (params, inputs, h0, dropout, key)  # each leaf has .value and .perturbed
    primals = jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))
    save_gates = any(config.residuals == "gates" for config in configs)  # for any platform
    results, saved = configs.run(forward_and_residuals, *primals, save_gates=save_gates)
    # "boundaries" is no device's default: if one config has it, all do.
    hs = None if configs.default.residuals == "boundaries" else results[1]
    return results, (primals, hs, *saved)


def forward_and_residuals(config, params, inputs, h0, dropout, key, save_gates):
    """(h_last, hs), and (gates, state at the start of each chunk), None where config saves none.

    save_gates: the config of some platform saves gates. The programs of all platforms must return
    the same arrays, so one that saves no gates returns zeros, which XLA removes if one `jit` has
    both passes.
    """
    arguments = (params, inputs, h0, dropout, key)
    saves = config.residuals == "gates"
    h_last, (hs, gates), h_starts = forward(config, *arguments, save_gates=saves)
    if config.residuals == "boundaries":
        return (h_last, hs), (None, h_starts)
    if save_gates and gates is None:
        gates = zero_gates(params, hs.astype(h_starts.dtype))
    return (h_last, hs), (gates, None)


def _backward(configs, residuals, cotangents):
    """The cotangents of params, inputs and h0."""
    cotangents = [None if isinstance(ct, SymbolicZero) else ct for ct in cotangents]
    dparams, dinputs, dh0 = configs.run(backward, *residuals, cotangents)
    return dparams, dinputs, dh0, None, None


def backward(config, primals, hs, gates, h_starts, cotangents):
    """The cotangents of params, inputs and h0, by chunks, in the reverse of forward's order."""
    params, inputs, h0, dropout, key = primals
    dh_last, dhs = cotangents
    if h_starts is None:
        h_starts = chunk_starts(h0.astype(state_dtype(h0.dtype)), hs, config)
    recurrent = split_recurrent(params, dropout)
    w_x_transposed, transposed = params.w_x.T, recurrent.transposed()

    def chunk(carry, per_step, h_start):
        (g, dparams), (inputs, _, _, dhs) = carry, per_step

        def skip():
            passed = g if dhs is None else g + dhs.astype(g.dtype).sum(axis=0)
            return (passed, dparams), (jnp.zeros_like(inputs.xs), None), None

        run = functools.partial(run_chunk_backward, carry, per_step, h_start)
        return run_unless_masked(config, inputs, run, skip)

    def run_chunk_backward(carry, per_step, h_start):
        (g, dparams), (inputs, hs, gates, dhs) = carry, per_step
        h_tm1, gates = recompute(inputs, hs, gates, h_start)
        flags = inputs.flags.with_zoneout(key, inputs.numbers, g)
        c = coefficients(recurrent, gates, h_tm1)
        run = reverse_scan if config.kernel is None else config.kernel.backward
        g, (dnew, dp, dtap) = run(config, transposed, g, c, dhs, inputs._replace(flags=flags))
        da, du = gates_vjp(c, dnew, dp)
        of_chunk = params_vjp(params, inputs.xs, gates, h_tm1, da, du, dropout)
        dparams = jax.tree.map(jnp.add, dparams, of_chunk)
        dxs = inputs_vjp(params, w_x_transposed, inputs.xs, da).astype(inputs.xs.dtype)
        dtap = None if dtap is None else dtap.astype(inputs.xs.dtype)
        return (g, dparams), (dxs, dtap), None

    def recompute(inputs, hs, gates, h_start):
        """The state that each step read, and its gates, recomputed unless they are saved."""
        if config.residuals == "boundaries":
            _, (hs, gates) = run_chunk(config, params, recurrent, h_start, inputs, key, True)
        h_tm1 = inputs.flags.states_before(h_start, hs, config.reverse)
        if config.residuals == "states":
            gates = step(recurrent, project(params, inputs.xs), h_tm1)[1]
        return h_tm1, gates

    dtype = h_starts.dtype
    g = (jnp.zeros_like(h0) if dh_last is None else dh_last).astype(dtype)
    dparams = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)
    (g, dparams), (dxs, dtap), _ = scan_chunks(
        config.chunk_size, chunk, (g, dparams), (inputs, hs, gates, dhs), h_starts,
        reverse=not config.reverse,
    )  # fmt: skip
    dparams = jax.tree.map(lambda d, p: d.astype(p.dtype), dparams, params)
    dinputs = Inputs(dxs, None, None, dtap)  # type: ignore  # flags and numbers have no gradient
    return dparams, dinputs, g.astype(h0.dtype)


bptt.defvjp(_forward, _backward, symbolic_zeros=True)


def reverse_scan(config, transposed, g, c, dhs, inputs):
    """(g after the loop, (dnew, dp, dtap) of each step).

    dnew is the cotangent of the result of `step`. dp, None for reset="after", is that of r * d * h,
    where d is recurrent dropout. dtap = dL/dh_t, or None without a tap.
    """

    def body(g, per_step):
        c, dhs_t, flags = per_step
        g = g if dhs_t is None else g + dhs_t.astype(g.dtype)
        dtap = None if inputs.tap is None else g
        dnew, passed = flags.leave_vjp(g)
        g_tm1, dp = step_vjp(transposed, c, dnew)
        g_tm1 = g_tm1 if passed is None else g_tm1 + passed
        return flags.enter_linear(g_tm1), (dnew, dp, dtap)

    per_step = (c, dhs, inputs.flags)
    return lax.scan(body, g, per_step, reverse=not config.reverse, unroll=config.unroll)
