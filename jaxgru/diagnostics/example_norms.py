"""The norm of each example's own gradient."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core import derivatives
from jaxgru.core.matmul import matmul
from jaxgru.core.parameters import GRUParams
from jaxgru.diagnostics.traces import norm, replicate, trace_loss
from jaxgru.stacks.forms import Merge, map_grus


def example_gradient_norms(
    loss_fn: Callable[[Any, jax.Array], jax.Array], params: Any, xs: jax.Array, h0: Any = None, *,
    mask: jax.Array | None = None, resets: jax.Array | None = None, merge: Merge = "concat",
    residual: bool = False,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Computes the loss and, for each example and parameter array, the norm of its own gradient.

    An example's gradient of a weight [I, K] is sum_t x_t^T d_t, and

        |sum_t x_t^T d_t|^2 = sum_{t,s} (x_t . x_s) (d_t . d_s)

    (Goodfellow 2015, arXiv:1510.01799, for one step; over steps Li et al. 2022, arXiv:2110.05679,
    section 4). If T^2 < I K, the right-hand side is summed and no gradient is formed. On longer
    sequences the gradient of one example and array at a time is formed, which is then less work.
    For one batch axis the norm over all arrays is `jax.vmap(optax.global_norm)(norms)`.

    Args:
      loss_fn: (h_last, ys) -> a scalar, a sum of terms that each depend on one example. A mean over
        a batch of B gives gradients, and norms, that are B times too small.
      params, xs, h0, mask, resets, merge, residual: see `gradient_flow`.

    Returns:
      The loss, and norms in the form of params: [...] in place of every array.

    Raises:
      ValueError, TypeError: see `gradient_flow`.

    Cost: a forward pass, and a backward pass without gradients of weights; then for each example,
    one after the other, and each weight T times the smaller of T (I + K) and I K multiply-adds, and
    memory for the smaller of T^2 and I K numbers.

    >>> from jaxgru import init_gru
    >>> params, xs = init_gru(jax.random.key(0), 2, 3), jnp.ones((5, 4, 2))
    >>> loss, norms = example_gradient_norms(lambda h_last, hs: h_last.sum(), params, xs)
    >>> norms.w_x.shape
    (4,)
    """
    call = (params, xs, h0, mask, resets, merge, residual)
    loss, taps, traces = trace_loss("example_gradient_norms", loss_fn, *call)
    return loss, map_grus(lambda _, *one: _example_norms(*one), params, traces, taps)


def _example_norms(trace, tap):
    """A GRUParams of norms [...]; tap.hs is dL/dh_t [T, ..., H]."""
    g, _ = trace.flags.leave_vjp(tap.hs.astype(trace.h_tm1.dtype))
    transposed = trace.recurrent.transposed()
    dp = derivatives.step_vjp(transposed, trace.c, g)[1]
    arrays = (trace.xs, trace.gates, trace.h_tm1, *derivatives.gates_vjp(trace.c, g, dp))
    of_w_x, of_w_h, rows = derivatives.params_vjp_factors(trace.params, *arrays)
    return GRUParams(
        _root(_outer_square(*of_w_x)),
        _root(sum(itertools.starmap(_outer_square, of_w_h))),
        *(None if d is None else norm(d.sum(axis=0)) for d in rows),
        spec=trace.params.spec,
    )


def _root(square):
    """sqrt(square), with a gradient of zero at zero: that of an example without a valid step."""
    zero = square == 0
    root = jnp.sqrt(jnp.where(zero, jnp.ones_like(square), square))
    return jnp.where(zero, jnp.zeros_like(root), root)


def _outer_square(x, d):
    """|sum_t x_t^T d_t|^2 of each example [...], from x [T, ..., I] and d [T, ..., K]."""
    lead = x.shape[1:-1]
    short = x.shape[0] ** 2 < x.shape[-1] * d.shape[-1]

    def of_example(pair):
        x, d = pair
        if short:  # may round to just below 0 if the sum cancels
            return jnp.maximum(jnp.vdot(matmul(x, x.T), matmul(d, d.T)), 0)
        return jnp.square(matmul(x.T, d)).sum()

    whole = [replicate(v) for v in (x, d)]
    flat = [jnp.moveaxis(v.reshape(len(v), math.prod(lead), v.shape[-1]), 0, 1) for v in whole]
    return lax.map(of_example, tuple(flat)).reshape(lead)
