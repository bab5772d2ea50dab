"""One GRU step, from the projected input a = N(x w_x) + b_x + b_h and the state h.

Everything here is a pure function of arrays with any leading axes: `lax.scan` runs `step` on
[B, H], and the backward pass runs it on [T, B, H] to recompute the gates of all steps.

An axis of 3H has the blocks reset | update | candidate (r | z | n), PyTorch's order. With
reset="after", b_hn is in q and not in a_n::

    r = sigmoid(a_r + N(h w_hr))       z = sigmoid(a_z + N(h w_hz))
    reset="before":  n = f(a_n + N((r * h) w_hn))
    reset="after":   n = f(a_n + r * q),   q = N(h w_hn) + b_hn
    update="keep":   h' = z * h + (1 - z) * n
    update="write":  h' = (1 - z) * h + z * n

N is layer normalization of each gate's H columns, with the scales g_x and g_h; it is the identity
where these are None (see `layer_norm.py`). With recurrent dropout d, d * h takes the place of h in
the products with w_h, but not in the two lines of h' (see `Noise`).
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgru.core.checks import explain_unknown_arguments, require_float, require_shape
from jaxgru.core.layer_norm import Norm, normalize
from jaxgru.core.matmul import blocks, gates_and_candidate, like_row, matmul, state_dtype
from jaxgru.core.parameters import GRUParams, GRUSpec, require_params

Norms = tuple[Norm | None, Norm | None, Norm | None]
# f, and its derivative f' as a function of n, the value of f. For relu f'(0) = 0, as in JAX.
ACTIVATIONS = {
    "tanh": (jnp.tanh, lambda n: 1 - n * n),
    "relu": (jax.nn.relu, lambda n: (n > 0).astype(n.dtype)),
    "sigmoid": (jax.nn.sigmoid, lambda n: n * (1 - n)),
    "softplus": (jax.nn.softplus, lambda n: -jnp.expm1(-n)),
    "identity": (lambda a: a, jnp.ones_like),
}


class Gates(NamedTuple):
    """r, z, the candidate n, and q = N(h w_hn) + b_hn of a step; q is None for reset="before".

    norms: the `Norm` of each product with w_h; None without g_h.
    """

    r: jax.Array
    z: jax.Array
    n: jax.Array
    q: jax.Array | None
    norms: Norms = (None, None, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Recurrent:
    """What `step` reads besides a and h, split before the loop so that no step copies slices."""

    w: tuple[jax.Array, ...]  # ([w_hr | w_hz], w_hn) for reset="before", (w_h,) for reset="after"
    b_q: jax.Array | None  # [H], b_hn for "after", where r multiplies it
    scales: tuple[jax.Array | None, ...]  # the blocks of g_h
    dropout: jax.Array | None  # d [..., H]
    spec: GRUSpec = dataclasses.field(metadata={"static": True})

    def transposed(self) -> "Recurrent":
        """w^T in place of w, for `step_vjp`: transposed once, outside the loop."""
        return dataclasses.replace(self, w=tuple(w.T for w in self.w))


@explain_unknown_arguments
def gru_cell(params: GRUParams, x: jax.Array, h: jax.Array) -> jax.Array:
    """One GRU step, h' from x and h.

        r = sigmoid(x w_xr + h w_hr + b_r)        z = sigmoid(x w_xz + h w_hz + b_z)
        n = tanh(x w_xn + (r * h) w_hn + b_n)     h' = z * h + (1 - z) * n

    b = b_x + b_h. This is `CHO_2014`, the default of `init_gru` (Cho et al. 2014, arXiv:1406.1078,
    eqs. 5-8, which have no biases); `GRUSpec` has the other equations.

    Args:
      params: the parameters of one layer; params.spec is its equation.
      x: [..., I], with any number of leading axes, or none.
      h: [..., H], with the same leading axes, in the dtype of params, or float32 (see below).

    Returns:
      h' [..., H] in the dtype of h. With half-precision parameters, h may be float32: h' is
      then not rounded, so single steps compute the same states as the loop of `gru`.

    Raises:
      ValueError: shapes do not fit.
      TypeError: an array is not floating, or dtypes differ.

    Cost: 6 H (I + H) floating-point operations per row. JAX differentiates this function, in both
    modes.

    >>> from jaxgru import init_gru
    >>> params = init_gru(jax.random.key(0), 2, 3)
    >>> gru_cell(params, jnp.ones((4, 2)), jnp.zeros((4, 3))).shape
    (4, 3)
    """
    input_size, hidden_size = require_params("gru_cell", params)
    require_float("gru_cell", "x", x, params.w_x.dtype)
    require_float("gru_cell", "h", h, params.w_x.dtype, wide=True)
    if x.ndim < 1 or x.shape[-1] != input_size:
        raise ValueError(
            f"gru_cell: x must have shape [..., I] with I={input_size} (rows of params.w_x), "
            f"got {x.shape}."
        )
    meaning = f"x's leading axes, then H={hidden_size}, the rows of params.w_h"
    require_shape("gru_cell", "h", h, (*x.shape[:-1], hidden_size), meaning)
    params, x, h = jax.tree.map(jnp.asarray, (params, x, h))
    h_t, _ = step(split_recurrent(params), project(params, x), h.astype(state_dtype(h.dtype)))
    return h_t.astype(h.dtype)


def project(params, xs):
    """a_r, a_z, a_n = N(x w_x) + the biases that r does not multiply, in the state dtype.

    They are three arrays and not one of width 3H, so that the loop needs no slicing.
    """
    a = [v for v, _ in input_products(params, xs)]
    b_x, b_h = blocks(params.b_x), blocks(params.b_h)
    if params.spec.reset == "after":
        b_h[2] = None  # it belongs to q, which r multiplies
    for bias in (b_x, b_h):
        a = [v if b is None else v + like_row(b, v) for v, b in zip(a, bias)]
    return tuple(a)


def split_recurrent(params, dropout=None):
    """The `Recurrent` of a layer; dropout is the mask d of recurrent dropout, or None."""
    before = params.spec.reset == "before"
    w = tuple(gates_and_candidate(params.w_h)) if before else (params.w_h,)
    b_q = None if before or params.b_h is None else blocks(params.b_h)[2]
    return Recurrent(w, b_q, tuple(blocks(params.g_h)), dropout, params.spec)


def step(recurrent, a, h):
    """h' and the `Gates` from the projected input a and the state h, all [..., H]."""
    spec, (g_r, g_z, g_n) = recurrent.spec, recurrent.scales
    (f, _), before = ACTIVATIONS[spec.activation], spec.reset == "before"
    read = drop_state(h, recurrent.dropout)
    # With "after" no product waits for r, so one product of width 3H computes all three.
    v = jnp.split(matmul(read, recurrent.w[0]), 2 if before else 3, axis=-1)
    (u_r, norm_r), (u_z, norm_z) = normalize(v[0], g_r), normalize(v[1], g_z)
    r, z = jax.nn.sigmoid(a[0] + u_r), jax.nn.sigmoid(a[1] + u_z)
    u_n, norm_n = normalize(matmul(r * read, recurrent.w[1]) if before else v[2], g_n)
    if before:
        q, n = None, f(a[2] + u_n)
    else:
        q = u_n if recurrent.b_q is None else u_n + like_row(recurrent.b_q, u_n)
        n = f(a[2] + r * q)
    new = z * h + (1 - z) * n if spec.update == "keep" else (1 - z) * h + z * n
    return new, Gates(r, z, n, q, (norm_r, norm_z, norm_n))


def zero_gates(params, hs):
    """`Gates` of zeros for all steps, with the shape [T, ..., H] and the dtype of hs."""
    zeros = jnp.zeros_like(hs)
    norm = None if params.g_h is None else Norm(zeros, zeros[..., :1])
    q = None if params.spec.reset == "before" else zeros
    return Gates(zeros, zeros, zeros, q, (norm, norm, norm))


def drop_state(h, dropout):
    """d * h, elementwise: its own transpose, so the backward pass uses it too."""
    return h if dropout is None else h * like_row(dropout, h)


_FEW_ROWS = 64


def input_products(params, xs):
    """N(x w_x) and its norm, for each of the three blocks.

    With fewer rows than _FEW_ROWS one product is computed and then split: 1.5 times as fast in a
    loop of single steps (H=256). With more, w_x is split: slices of a large product cost more.
    """
    if all(isinstance(n, int) for n in xs.shape) and math.prod(xs.shape[:-1]) < _FEW_ROWS:
        products = blocks(matmul(xs, params.w_x))
    else:
        products = [matmul(xs, w) for w in blocks(params.w_x)]
    return list(map(normalize, products, blocks(params.g_x)))
