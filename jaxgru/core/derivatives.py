"""The transpose (VJP) and the tangent (JVP) of one GRU step, from its local derivatives.

The equations and their symbols are those of `jaxgru.core.cell`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgru.core.cell import Gates, Norms, Recurrent, gain_blocks, input_products, read_state
from jaxgru.core.layer_norm import normalize_jvp, normalize_vjp
from jaxgru.core.matmul import blocks, gates_and_candidate, like_row, matmul, sum_rows, weight_vjp
from jaxgru.core.parameters import GRUParams, GRUSpec

Array = jax.Array
Pair = tuple[Array, Array]
# f' as a function of n = f(a). relu takes 0 at its kink, as jax.nn.relu does.
_DERIVATIVES = {
    "tanh": lambda n: 1 - n * n,
    "relu": lambda n: (n > 0).astype(n.dtype),
    "sigmoid": lambda n: n * (1 - n),
    "softplus": lambda n: -jnp.expm1(-n),
    "identity": jnp.ones_like,
}


class Coefficients(NamedTuple):
    """A step's local derivatives, which no cotangent or tangent enters: made for all steps at once.

    K = dh'/dh along the kept state, A = dh'/da_n, Z = dh'/da_z, and
    before:  R = d(r * h)/da_r         after:  R = dh'/da_r,  Q = dh'/dq
    For "after" R, Z and Q lie side by side: times dh they are what the one product reads.
    """

    k: Array  # K [..., H]
    a: Array  # A [..., H]
    slopes: tuple[Array, ...]  # before: (R, Z), [..., H] each; after: one [..., 3, H] of R, Z, Q
    reset: Array | None  # before: r [..., H]; after: None


def transpose_recurrent(recurrent: Recurrent) -> Recurrent:
    """With w^T in place of w: what `step_vjp` reads, turned once and not at every step."""
    return dataclasses.replace(recurrent, w=tuple(w.T for w in recurrent.w))


def coefficients(
    gates: Gates, h_tm1: Array, spec: GRUSpec, scale: Array | None = None
) -> Coefficients:
    """K, A, R, Z, Q: every local derivative of a step, from values its forward pass has."""
    r, z, n, q, _ = gates
    keep, write = (z, 1 - z) if spec.update == "keep" else (1 - z, z)
    sign = 1 if spec.update == "keep" else -1
    k_z = sign * (h_tm1 - n) * (z * (1 - z))
    k_a = write * _DERIVATIVES[spec.activation](n)
    if q is None:
        return Coefficients(keep, k_a, (read_state(h_tm1, scale) * (r * (1 - r)), k_z), r)
    v = jnp.stack([k_a * q * (r * (1 - r)), k_z, k_a * r], axis=-2)
    return Coefficients(keep, k_a, (v,), None)


def step_vjp(
    transposed: Recurrent,
    c: Coefficients,
    norms: Norms,
    dh: Array,
    scale: Array | None = None,
) -> tuple[Array, Array | None]:
    """The transpose of `step`: dh_tm1 and, for "before", dp, the cotangent of what w_hn reads.

    before:  dp = N'(dh A) w_hn^T,  dh_tm1 = dh K + scale (dp r + N'[dp R | dh Z] [w_hr | w_hz]^T)
    after:   dh_tm1 = dh K + scale (N'[dh R | dh Z | dh Q] w_h^T)
    with N' the transpose of the normalization, the identity without gains.
    """
    if c.reset is None:
        dv = _normalize_vjp(transposed.g, norms, _flat(c.slopes[0] * dh[..., None, :]))
        return dh * c.k + read_state(matmul(dv, transposed.w[0]), scale), None
    w_rz_t, w_n_t = transposed.w
    dp = matmul(normalize_vjp(dh * c.a, transposed.g[2], norms[2]), w_n_t)
    dv = jnp.concatenate([dp * c.slopes[0], dh * c.slopes[1]], axis=-1)
    dread = dp * c.reset + matmul(_normalize_vjp(transposed.g[:2], norms[:2], dv), w_rz_t)
    return dh * c.k + read_state(dread, scale), dp


def gates_vjp(c: Coefficients, dh: Array, dp: Array | None) -> tuple[Array, Array]:
    """The cotangents [..., 3H] of x w_x + b_x, da, and of h w_h + b_h, du.

    before:  da = du = [dp R | dh Z | dh A]
    after:   da = [dh R | dh Z | dh A],  du = [dh R | dh Z | dh Q]
    """
    da_n = dh * c.a
    if dp is not None:
        da = jnp.concatenate([dp * c.slopes[0], dh * c.slopes[1], da_n], axis=-1)
        return da, da
    du = _flat(c.slopes[0] * dh[..., None, :])
    return jnp.concatenate([gates_and_candidate(du)[0], da_n], axis=-1), du


def params_vjp(
    params: GRUParams,
    xs: Array,
    gates: Gates,
    h_tm1: Array,
    da: Array,
    du: Array,
    scale: Array | None = None,
) -> GRUParams:
    """The cotangents of all parameters, each one product over all leading axes (w_hn its own).

    dw_x = x^T N' da,  [dw_hr | dw_hz] = read^T N' du_rz,
    dw_hn = (r read)^T N' du_n (before) or read^T N' du_n (after), read = scale h; a bias gets the
    sum of da or du, a gain that of its block times the normalized product.
    In the state dtype, whatever the parameters' own.
    """
    (x, dv_x), of_w_h, rows = params_vjp_factors(params, xs, gates, h_tm1, da, du, scale)
    pieces = gates_and_candidate(params.w_h) if params.spec.reset == "before" else [params.w_h]
    dw_h = [weight_vjp(read, dv, w) for (read, dv), w in zip(of_w_h, pieces)]
    return GRUParams(
        weight_vjp(x, dv_x, params.w_x),
        dw_h[0] if len(dw_h) == 1 else jnp.concatenate(dw_h, axis=-1),
        *(None if d is None else sum_rows(d) for d in rows),
        spec=params.spec,
    )


def params_vjp_factors(
    params: GRUParams,
    xs: Array,
    gates: Gates,
    h_tm1: Array,
    da: Array,
    du: Array,
    scale: Array | None = None,
) -> tuple[Pair, list[Pair], list[Array | None]]:
    """What `params_vjp` multiplies and sums over the leading axes.

    The pair (x, dv) whose x^T dv is dw_x; the pairs (read, dv) whose read^T dv lie side by side in
    dw_h; and for b_x, b_h, g_x, g_h the rows [..., 3H] whose sum is the cotangent, None for none.
    """
    read = read_state(h_tm1, scale)
    input_norms = _input_norms(params, xs)
    dv_x = _normalize_vjp(gain_blocks(params.g_x), input_norms, da)
    dv_h = _normalize_vjp(gain_blocks(params.g_h), gates.norms, du)
    before = params.spec.reset == "before"
    reads = [read, gates.r * read] if before else [read]
    dvs = gates_and_candidate(dv_h) if before else [dv_h]
    rows = [
        None if params.b_x is None else da,
        None if params.b_h is None else du,
        _gain_rows(params.g_x, da, input_norms),
        _gain_rows(params.g_h, du, gates.norms),
    ]
    return (xs.astype(h_tm1.dtype), dv_x), list(zip(reads, dvs)), rows


def inputs_vjp(params: GRUParams, w_x_t: Array, xs: Array, da: Array) -> Array:
    """dx = N' da w_x^T, in the state dtype; w_x_t is w_x^T, turned once for all chunks."""
    return matmul(_normalize_vjp(gain_blocks(params.g_x), _input_norms(params, xs), da), w_x_t)


def step_jvp(
    recurrent: Recurrent,
    c: Coefficients,
    norms: Norms,
    th: Array,
    drive: Array,
    scale: Array | None = None,
) -> Array:
    """The tangent of `step`: th_t = th_tm1 M + drive, linear in th and drive.

    before:  th M = th K + N'(t w_hz) Z + N'((t r + N'(t w_hr) R) w_hn) A,  t = scale th
    after:   th M = th K + N'(t w_hr) R + N'(t w_hz) Z + N'(t w_hn) Q
    with N' the derivative of the normalization, the identity without gains.
    """
    tread = read_state(th, scale)
    if c.reset is None:
        y = _normalize_jvp(recurrent.g, norms, matmul(tread, recurrent.w[0]))
        return th * c.k + (c.slopes[0] * y.reshape(c.slopes[0].shape)).sum(axis=-2) + drive
    w_rz, w_n = recurrent.w
    y_rz = _normalize_jvp(recurrent.g[:2], norms[:2], matmul(tread, w_rz))
    y_r, y_z = jnp.split(y_rz, 2, axis=-1)
    y_n = normalize_jvp(matmul(tread * c.reset + y_r * c.slopes[0], w_n), recurrent.g[2], norms[2])
    return th * c.k + y_z * c.slopes[1] + y_n * c.a + drive


def step_drive(
    params: GRUParams,
    tparams: GRUParams,
    xs: Array,
    txs: Array | None,
    gates: Gates,
    h_tm1: Array,
    scale: Array | None = None,
) -> Array:
    """What the tangents of parameters and inputs add to th_t, in bulk over all leading axes.

    With e_g the tangent of N(x w_xg) + b_g and u_g that of N(read w_hg) + b_hg for a fixed state:
    before:  drive = (e_z + u_z) Z + (e_n + u_n + N'(((e_r + u_r) R) w_hn)) A,  u_n of (r read) w_hn
    after:   drive = (e_z + u_z) Z + (e_r + u_r) R + e_n A + u_n Q
    None stands for a tangent that is zero, and costs nothing.
    """
    c, read = coefficients(gates, h_tm1, params.spec, scale), read_state(h_tm1, scale)
    before = params.spec.reset == "before"
    c_r, c_z, *c_q = c.slopes if before else jnp.unstack(c.slopes[0], axis=-2)
    zero = jnp.zeros_like(h_tm1)
    e = [zero] * 3
    if txs is not None:
        e = [v + matmul(txs, w) for v, w in zip(e, blocks(params.w_x))]
    if tparams.w_x is not None:
        e = [v + matmul(xs, w) for v, w in zip(e, blocks(tparams.w_x))]
    e = _affine_jvp(e, params.g_x, _input_norms(params, xs), tparams.g_x, tparams.b_x)
    u = [zero] * 3
    if tparams.w_h is not None:
        reads = (read, read, gates.r * read if before else read)
        u = [matmul(h, w) for h, w in zip(reads, blocks(tparams.w_h))]
    u = _affine_jvp(u, params.g_h, gates.norms, tparams.g_h, tparams.b_h)
    e_r, e_z = e[0] + u[0], e[1] + u[1]
    if before:
        through_r = matmul(e_r * c_r, blocks(params.w_h)[2])
        through_r = normalize_jvp(through_r, gain_blocks(params.g_h)[2], gates.norms[2])
        return e_z * c_z + (e[2] + u[2] + through_r) * c.a
    return e_z * c_z + e_r * c_r + e[2] * c.a + u[2] * c_q[0]


def _input_norms(params, xs):
    """The norms of the three products x w_x, which nothing keeps: they are made again."""
    if params.g_x is None:
        return (None, None, None)
    return tuple(norm for _, norm in input_products(params, xs))


def _flat(v):
    """[..., G, H] as [..., GH]."""
    return v.reshape(*v.shape[:-2], v.shape[-2] * v.shape[-1])


def _normalize_vjp(gains, norms, d):
    """The cotangents of products that lie side by side, from those of their normalizations."""
    return _each_block(normalize_vjp, gains, norms, d)


def _normalize_jvp(gains, norms, t):
    """The tangents of normalizations that lie side by side, from those of their products."""
    return _each_block(normalize_jvp, gains, norms, t)


def _each_block(rule, gains, norms, v):
    """The rule of every block; v itself where there are no gains."""
    if gains[0] is None:
        return v
    parts = jnp.split(v, len(gains), axis=-1)
    return jnp.concatenate(list(map(rule, parts, gains, norms)), axis=-1)


def _gain_rows(g, d, norms):
    """d times the normalized products, or None without a gain."""
    return None if g is None else d * jnp.concatenate([n.y for n in norms], axis=-1)


def _affine_jvp(tv, g, norms, tg, tb):
    """The tangents of N(v) + b from those of v, of the gain and of the bias; None is zero."""
    tu = list(map(normalize_jvp, tv, gain_blocks(g), norms))
    if tg is not None:
        tu = [u + like_row(part, u) * norm.y for u, part, norm in zip(tu, blocks(tg), norms)]
    return tu if tb is None else [u + like_row(part, u) for u, part in zip(tu, blocks(tb))]
