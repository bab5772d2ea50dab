"""The transpose (VJP) and the tangent (JVP) of one GRU step, from its local derivatives.

The equations and their symbols are those of `jaxgru.core.cell` and `jaxgru/core/README.md`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgru.core.cell import ACTIVATIONS, Norms, drop_state, input_products, split_recurrent
from jaxgru.core.layer_norm import normalize_jvp, normalize_vjp
from jaxgru.core.matmul import blocks, gates_and_candidate, matmul, weight_vjp
from jaxgru.core.parameters import GRUParams


class Coefficients(NamedTuple):
    """The local derivatives of a step, computed for all steps of a chunk at once.

    K is that of h' with respect to h, with r, z and n held fixed; A is that of h' with respect to
    a_n, and Z that of h' with respect to a_z.
    before:  R is that of r * d * h with respect to a_r (d is recurrent dropout); r is the gate.
    after:   R is that of h' with respect to a_r, and Q that of h' with respect to q.
    """

    K: jax.Array
    A: jax.Array
    R: jax.Array
    Z: jax.Array
    Q: jax.Array | None  # None for "before"
    r: jax.Array | None  # None for "after"
    norms: Norms


def coefficients(recurrent, gates, h_tm1):
    """The `Coefficients` of steps from their gates and the states that they read."""
    (r, z, n, q, norms), spec = gates, recurrent.spec
    keep, write = (z, 1 - z) if spec.update == "keep" else (1 - z, z)
    sign = 1 if spec.update == "keep" else -1
    Z = sign * (h_tm1 - n) * (z * (1 - z))
    A = write * ACTIVATIONS[spec.activation][1](n)
    if spec.reset == "before":
        read = drop_state(h_tm1, recurrent.dropout)
        return Coefficients(keep, A, read * (r * (1 - r)), Z, None, r, norms)
    return Coefficients(keep, A, A * q * (r * (1 - r)), Z, A * r, None, norms)


def step_vjp(transposed, c, dnew):
    """The VJP of `step`: dh_tm1, and dp, the cotangent of r * d * h, from dnew, that of h'.

    before:  dp = N^T(dnew A) w_hn^T
             dh_tm1 = dnew K + d * (dp r + N^T[dp R | dnew Z] [w_hr | w_hz]^T)
    after:   dh_tm1 = dnew K + d * (N^T[dnew R | dnew Z | dnew Q] w_h^T)
    d is recurrent dropout, and N^T the transposed derivative of N (the identity without g_h).
    dp is None for "after".
    """
    if transposed.spec.reset == "before":
        w_rz_t, w_n_t = transposed.w
        dp = matmul(normalize_vjp(dnew * c.A, transposed.scales[2], c.norms[2]), w_n_t)
        dv = _norms_vjp(transposed.scales[:2], c.norms[:2], [dp * c.R, dnew * c.Z])
        dread = dp * c.r + matmul(dv, w_rz_t)
    else:
        dp, du = None, [dnew * c.R, dnew * c.Z, dnew * c.Q]
        dread = matmul(_norms_vjp(transposed.scales, c.norms, du), transposed.w[0])
    return dnew * c.K + drop_state(dread, transposed.dropout), dp


def gates_vjp(c, dnew, dp):
    """da and du [..., 3H], the cotangents of N(x w_x) + b_x and of N((d * h) w_h) + b_h.

    In the block n of "before", the second product is that of r * d * h.

    before:  da = du = [dp R | dnew Z | dnew A]
    after:   da = [dnew R | dnew Z | dnew A],  du = [dnew R | dnew Z | dnew Q]
    """
    da = jnp.concatenate([(dnew if dp is None else dp) * c.R, dnew * c.Z, dnew * c.A], axis=-1)
    if dp is not None:
        return da, da
    return da, jnp.concatenate([dnew * c.R, dnew * c.Z, dnew * c.Q], axis=-1)


def params_vjp(params, xs, gates, h_tm1, da, du, dropout=None):
    """The cotangents of all parameters, in the state dtype, summed over all leading axes.

    dw_x = x^T N^T(da),  dw_h = read^T N^T(du) with read = d * h, but (r * read)^T N^T(du) in the
    block n of "before". A bias gets the sum of da or du, and a layer-norm scale the sum of
    da * y or du * y, where y is the normalized product.
    """
    (x, dv_x), of_w_h, rows = params_vjp_factors(params, xs, gates, h_tm1, da, du, dropout)
    w_h = split_recurrent(params).w
    dw_h = [weight_vjp(read, dv, w) for (read, dv), w in zip(of_w_h, w_h)]
    return GRUParams(
        weight_vjp(x, dv_x, params.w_x),
        jnp.concatenate(dw_h, axis=-1),
        *(None if v is None else v.sum(axis=tuple(range(v.ndim - 1))) for v in rows),
        spec=params.spec,
    )


def params_vjp_factors(params, xs, gates, h_tm1, da, du, dropout=None):
    """What `params_vjp` multiplies and sums.

    First (x, dv), with dw_x = x^T dv. Then the pairs (read, dv) whose products read^T dv are the
    column blocks of dw_h. Then for b_x, b_h, g_x, g_h the rows [..., 3H] to sum, or None.
    """
    read, input_norms = drop_state(h_tm1, dropout), _input_norms(params, xs)
    dv_x = _norms_vjp(blocks(params.g_x), input_norms, blocks(da))
    dv_h = _norms_vjp(blocks(params.g_h), gates.norms, blocks(du))
    before = params.spec.reset == "before"
    reads = [read, gates.r * read] if before else [read]
    dvs = gates_and_candidate(dv_h) if before else [dv_h]
    biases = [None if b is None else d for b, d in ((params.b_x, da), (params.b_h, du))]
    scales = [_scale_rows(params.g_x, da, input_norms), _scale_rows(params.g_h, du, gates.norms)]
    return (xs.astype(h_tm1.dtype), dv_x), list(zip(reads, dvs)), biases + scales


def inputs_vjp(params, w_x_transposed, xs, da):
    """dx = N^T(da) w_x^T, in the state dtype."""
    dv = _norms_vjp(blocks(params.g_x), _input_norms(params, xs), blocks(da))
    return matmul(dv, w_x_transposed)


def step_jvp(recurrent, c, th, e):
    """The tangent of `step`, that of h': th M + e, linear in th and e.

    td = d * th, where d is recurrent dropout, and N' is the derivative of the normalization.

    before:  th M = th K + N'(td w_hz) Z + N'((td r + N'(td w_hr) R) w_hn) A
    after:   th M = th K + N'(td w_hr) R + N'(td w_hz) Z + N'(td w_hn) Q
    """
    td, scales = drop_state(th, recurrent.dropout), recurrent.scales
    tv = matmul(td, recurrent.w[0])
    if recurrent.spec.reset == "after":
        tu_r, tu_z, tu_n = map(normalize_jvp, jnp.split(tv, 3, axis=-1), scales, c.norms)
        return th * c.K + tu_r * c.R + tu_z * c.Z + tu_n * c.Q + e
    tu_r, tu_z = map(normalize_jvp, jnp.split(tv, 2, axis=-1), scales[:2], c.norms[:2])
    tv_n = matmul(td * c.r + tu_r * c.R, recurrent.w[1])
    return th * c.K + tu_z * c.Z + normalize_jvp(tv_n, scales[2], c.norms[2]) * c.A + e


def step_jvp_inputs(params, tparams, xs, txs, gates, h_tm1, dropout=None):
    """e of `step_jvp`: what the tangents of parameters and inputs add to the tangent of h'.

    e is linear in these tangents, so JAX computes it as the transpose of `cotangents`, which maps
    dnew to the cotangents of parameters and inputs. A tangent of None is zero and costs nothing.
    """
    recurrent = split_recurrent(params, dropout)
    c, transposed = coefficients(recurrent, gates, h_tm1), recurrent.transposed()
    tangents = {**tparams.arrays(), "xs": txs}
    tangents = {k: t.astype(h_tm1.dtype) for k, t in tangents.items() if t is not None}

    def cotangents(dnew):
        dp = step_vjp(transposed, c, dnew)[1]
        da, du = gates_vjp(c, dnew, dp)
        dparams = params_vjp(params, xs, gates, h_tm1, da, du, dropout)
        found = {**dparams.arrays(), "xs": inputs_vjp(params, params.w_x.T, xs, da)}
        return {name: found[name] for name in tangents}

    return jax.linear_transpose(cotangents, h_tm1)(tangents)[0]  # h_tm1 gives shape and dtype


def _input_norms(params, xs):
    """The `Norm` of each of the three products x w_x, recomputed because none is saved."""
    if params.g_x is None:
        return (None, None, None)
    return tuple(norm for _, norm in input_products(params, xs))


def _norms_vjp(scales, norms, du):
    """dv [..., 2H or 3H], the cotangents of the products v, from the list du, those of N(v)."""
    parts = zip(du, scales, norms, strict=True)
    return jnp.concatenate([normalize_vjp(*part) for part in parts], axis=-1)


def _scale_rows(scale, du, norms):
    """The rows whose sum is the cotangent of a layer-norm scale, or None without a scale."""
    return None if scale is None else du * jnp.concatenate([n.y for n in norms], axis=-1)
