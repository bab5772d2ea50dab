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

    K = dh'/dh with r, z and n fixed, A = dh'/da_n, Z = dh'/da_z, and
    before:  R = d(r * h)/da_r, and r itself           after:  R = dh'/da_r,  Q = dh'/dq
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


def step_vjp(transposed, c, dh):
    """The transpose of `step`: dh_tm1 and, for "before", dp, the cotangent of r * d * h.

    before:  dp = N^T(dh A) w_hn^T,  dh_tm1 = dh K + d * (dp r + N^T[dp R | dh Z] [w_hr | w_hz]^T)
    after:   dh_tm1 = dh K + d * (N^T[dh R | dh Z | dh Q] w_h^T)
    d is recurrent dropout, and N^T the transposed derivative of N (the identity without g_h).
    """
    if c.Q is None:
        w_rz_t, w_n_t = transposed.w
        dp = matmul(normalize_vjp(dh * c.A, transposed.scales[2], c.norms[2]), w_n_t)
        du = [dp * c.R, dh * c.Z]
        dread = dp * c.r + matmul(_norms_vjp(transposed.scales, c.norms, du), w_rz_t)
    else:
        dp, du = None, [dh * c.R, dh * c.Z, dh * c.Q]
        dread = matmul(_norms_vjp(transposed.scales, c.norms, du), transposed.w[0])
    return dh * c.K + drop_state(dread, transposed.dropout), dp


def gates_vjp(c, dh, dp):
    """da and du [..., 3H], the cotangents of N(x w_x) + b_x and of N(read w_h) + b_h.

    read is d * h, but r * d * h in the product with w_hn of "before".

    before:  da = du = [dp R | dh Z | dh A]
    after:   da = [dh R | dh Z | dh A],  du = [dh R | dh Z | dh Q]
    """
    da = jnp.concatenate([(dh if dp is None else dp) * c.R, dh * c.Z, dh * c.A], axis=-1)
    if dp is not None:
        return da, da
    return da, jnp.concatenate([dh * c.R, dh * c.Z, dh * c.Q], axis=-1)


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
        *(None if d is None else d.sum(axis=tuple(range(d.ndim - 1))) for d in rows),
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
    """dx = N^T da w_x^T, in the state dtype."""
    dv = _norms_vjp(blocks(params.g_x), _input_norms(params, xs), blocks(da))
    return matmul(dv, w_x_transposed)


def step_jvp(recurrent, c, th, e):
    """The tangent of `step`: th_t = th_tm1 M + e, linear in th and e.

    s = d * th, where d is recurrent dropout, and N' is the derivative of the normalization.

    before:  th M = th K + N'(s w_hz) Z + N'((s r + N'(s w_hr) R) w_hn) A
    after:   th M = th K + N'(s w_hr) R + N'(s w_hz) Z + N'(s w_hn) Q
    """
    tread, scales = drop_state(th, recurrent.dropout), recurrent.scales
    tv = jnp.split(matmul(tread, recurrent.w[0]), 2 if c.Q is None else 3, axis=-1)
    tu_r, tu_z, *tu_n = map(normalize_jvp, tv, scales, c.norms)
    if c.Q is not None:
        return th * c.K + tu_r * c.R + tu_z * c.Z + tu_n[0] * c.Q + e
    tv_n = matmul(tread * c.r + tu_r * c.R, recurrent.w[1])
    return th * c.K + tu_z * c.Z + normalize_jvp(tv_n, scales[2], c.norms[2]) * c.A + e


def step_jvp_inputs(params, tparams, xs, txs, gates, h_tm1, dropout=None):
    """e of `step_jvp`: what the tangents of parameters and inputs add to th_t.

    e is linear in these tangents, so JAX computes it as the transpose of `cotangents`, which maps
    dh to the cotangents of parameters and inputs. A tangent of None is zero and costs nothing.
    """
    recurrent = split_recurrent(params, dropout)
    c, transposed = coefficients(recurrent, gates, h_tm1), recurrent.transposed()
    tangents = {**tparams.arrays(), "xs": txs}
    tangents = {k: t.astype(h_tm1.dtype) for k, t in tangents.items() if t is not None}

    def cotangents(dh):
        dp = step_vjp(transposed, c, dh)[1]
        da, du = gates_vjp(c, dh, dp)
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
    """dv [..., 2H or 3H], the cotangents before normalization, from du, those after it."""
    return jnp.concatenate(list(map(normalize_vjp, du, scales, norms)), axis=-1)


def _scale_rows(scale, d, norms):
    """The rows whose sum is the cotangent of a layer-norm scale, or None without a scale."""
    return None if scale is None else d * jnp.concatenate([n.y for n in norms], axis=-1)
