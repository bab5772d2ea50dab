"""The norm of each example's own gradient."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.derivatives import gates_vjp, params_vjp_factors
from jaxgru.core.layer_norm import normalize_vjp
from jaxgru.core.matmul import blocks, matmul
from jaxgru.core.parameters import GRUParams
from jaxgru.diagnostics.traces import loss_and_taps, norm, require_sequence, trace_layers
from jaxgru.stacks.forms import Merge, map_grus

Array = jax.Array


def example_gradient_norms(
    loss_fn: Callable[[Any, Array], Array],
    params: Any,
    xs: Array,
    h0: Any = None,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
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
    function = "example_gradient_norms"
    require_sequence(function, params, xs, h0, mask, resets, merge, residual)
    loss, taps = loss_and_taps(function, loss_fn, params, xs, h0, mask, resets, merge, residual)
    traces = trace_layers(params, xs, h0, mask, resets, merge, residual)
    norms = map_grus(lambda _, trace, tap: _example_norms(trace, tap.hs), params, traces, taps)
    return loss, norms


def _example_norms(trace, dhs):
    """A GRUParams of norms [...], from dL/dh_t [T, ..., H]."""
    g, _ = trace.flags.leave_vjp(dhs.astype(trace.h_tm1.dtype))
    c, dp = trace.c, None
    if c.reset is not None:
        dv = normalize_vjp(g * c.a, trace.recurrent.g[2], trace.gates.norms[2])
        dp = matmul(dv, blocks(trace.params.w_h)[2].T)
    of_w_x, of_w_h, rows = params_vjp_factors(
        trace.params, trace.xs, trace.gates, trace.h_tm1, *gates_vjp(c, g, dp)
    )
    of_w_h = [_outer_square(*pair) for pair in of_w_h]
    return GRUParams(
        jnp.sqrt(_outer_square(*of_w_x)),
        jnp.sqrt(sum(of_w_h[1:], of_w_h[0])),
        *(None if d is None else norm(d.sum(axis=0)) for d in rows),
        spec=trace.params.spec,
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
