"""The transpose (VJP) and the tangent (JVP) of one GRU step, from its local derivatives.

The equations and their symbols are those of `jaxgru.core.cell` and `jaxgru/core/README.md`.
`dropout` is that of the state, [..., H] or None.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgru.core.cell import drop_state, input_products, scale_blocks, split_recurrent
from jaxgru.core.layer_norm import normalize_jvp, normalize_vjp
from jaxgru.core.matmul import gates_and_candidate, matmul, sum_rows, weight_vjp
from jaxgru.core.parameters import GRUParams

# f' as a function of n = f(a). relu takes 0 at its kink, as jax.nn.relu does.
_DERIVATIVES = {
    "tanh": lambda n: 1 - n * n,
    "relu": lambda n: (n > 0).astype(n.dtype),
    "sigmoid": lambda n: n * (1 - n),
    "softplus": lambda n: -jnp.expm1(-n),
    "identity": jnp.ones_like,
}


class Coefficients(NamedTuple):
    """The local derivatives of a step; they are computed for all steps at once.

    K = dh'/dh directly, A = dh'/da_n, Z = dh'/da_z, and
    before:  R = d(r * h)/da_r         after:  R = dh'/da_r,  Q = dh'/dq
    For "after", R, Z and Q are side by side, so that dh times them is the operand of one product.
    """

    k: jax.Array  # K [..., H]
    a: jax.Array  # A [..., H]
    slopes: tuple[
        jax.Array, ...
    ]  # before: (R, Z), [..., H] each; after: one [..., 3, H] of R, Z, Q
    gate_r: jax.Array | None  # before: the gate r [..., H]; after: None

    def _slope(self, i):
        return self.slopes[i] if self.gate_r is not None else self.slopes[0][..., i, :]

    r = property(lambda self: self._slope(0), doc="R [..., H]")
    z = property(lambda self: self._slope(1), doc="Z [..., H]")
    q = property(lambda self: self._slope(2), doc='Q [..., H], of "after" alone')


def transpose_recurrent(recurrent):
    """With w^T in place of w, which `step_vjp` reads; transposed once, not at every step."""
    return dataclasses.replace(recurrent, w=tuple(w.T for w in recurrent.w))


def coefficients(gates, h_tm1, spec, dropout=None):
    """`Coefficients` from values of the forward pass."""
    r, z, n, q, _ = gates
    keep, write = (z, 1 - z) if spec.update == "keep" else (1 - z, z)
    sign = 1 if spec.update == "keep" else -1
    k_z = sign * (h_tm1 - n) * (z * (1 - z))
    k_a = write * _DERIVATIVES[spec.activation](n)
    if q is None:
        return Coefficients(keep, k_a, (drop_state(h_tm1, dropout) * (r * (1 - r)), k_z), r)
    slopes = jnp.stack([k_a * q * (r * (1 - r)), k_z, k_a * r], axis=-2)
    return Coefficients(keep, k_a, (slopes,), None)


def step_vjp(transposed, c, norms, dh, dropout=None):
    """The transpose of `step`: dh_tm1 and, for "before", dp, the cotangent of r * d * h.

    before:  dp = N'(dh A) w_hn^T,  dh_tm1 = dh K + d * (dp r + N'[dp R | dh Z] [w_hr | w_hz]^T)
    after:   dh_tm1 = dh K + d * (N'[dh R | dh Z | dh Q] w_h^T)
    with d the recurrent dropout and N' the transpose of the normalization (identity without it).
    """
    if c.gate_r is None:
        dv = _each_block(normalize_vjp, transposed.g, norms, _flat(c.slopes[0] * dh[..., None, :]))
        return dh * c.k + drop_state(matmul(dv, transposed.w[0]), dropout), None
    w_rz_t, w_n_t = transposed.w
    dp = matmul(normalize_vjp(dh * c.a, transposed.g[2], norms[2]), w_n_t)
    dv = jnp.concatenate([dp * c.r, dh * c.z], axis=-1)
    dread = dp * c.gate_r + matmul(
        _each_block(normalize_vjp, transposed.g[:2], norms[:2], dv), w_rz_t
    )
    return dh * c.k + drop_state(dread, dropout), dp


def gates_vjp(c, dh, dp):
    """da and du [..., 3H], the cotangents of N(x w_x) + b_x and of N(p w_h) + b_h.

    p is what each product reads: d * h, or r * d * h for w_hn of "before".

    before:  da = du = [dp R | dh Z | dh A]
    after:   da = [dh R | dh Z | dh A],  du = [dh R | dh Z | dh Q]
    """
    da_n = dh * c.a
    if dp is not None:
        da = jnp.concatenate([dp * c.r, dh * c.z, da_n], axis=-1)
        return da, da
    du = _flat(c.slopes[0] * dh[..., None, :])
    return jnp.concatenate([gates_and_candidate(du)[0], da_n], axis=-1), du


def params_vjp(params, xs, gates, h_tm1, da, du, dropout=None):
    """The cotangents of all parameters, in the state dtype: products over all leading axes.

    dw_x = x^T N' da,  [dw_hr | dw_hz] = read^T N' du_rz,  read = d * h,
    dw_hn = (r read)^T N' du_n (before) or read^T N' du_n (after). A bias gets the sum of da or du,
    a layer-norm scale the sum of da or du times the normalized product y.
    """
    (x, dv_x), of_w_h, rows = params_vjp_factors(params, xs, gates, h_tm1, da, du, dropout)
    pieces = gates_and_candidate(params.w_h) if params.spec.reset == "before" else [params.w_h]
    dw_h = [weight_vjp(read, dv, w) for (read, dv), w in zip(of_w_h, pieces)]
    return GRUParams(
        weight_vjp(x, dv_x, params.w_x),
        dw_h[0] if len(dw_h) == 1 else jnp.concatenate(dw_h, axis=-1),
        *(None if d is None else sum_rows(d) for d in rows),
        spec=params.spec,
    )


def params_vjp_factors(params, xs, gates, h_tm1, da, du, dropout=None):
    """What `params_vjp` multiplies and sums over the leading axes.

    The pair (x, dv) whose x^T dv is dw_x; the pairs (read, dv) whose read^T dv are side by side in
    dw_h; and for b_x, b_h, g_x, g_h the rows [..., 3H] whose sum is the cotangent, or None.
    """
    read, input_norms = drop_state(h_tm1, dropout), _input_norms(params, xs)
    dv_x = _each_block(normalize_vjp, scale_blocks(params.g_x), input_norms, da)
    dv_h = _each_block(normalize_vjp, scale_blocks(params.g_h), gates.norms, du)
    before = params.spec.reset == "before"
    reads = [read, gates.r * read] if before else [read]
    dvs = gates_and_candidate(dv_h) if before else [dv_h]
    rows = [
        None if params.b_x is None else da,
        None if params.b_h is None else du,
        _scale_rows(params.g_x, da, input_norms),
        _scale_rows(params.g_h, du, gates.norms),
    ]
    return (xs.astype(h_tm1.dtype), dv_x), list(zip(reads, dvs)), rows


def inputs_vjp(params, w_x_transposed, xs, da):
    """dx = N' da w_x^T, in the state dtype."""
    dv = _each_block(normalize_vjp, scale_blocks(params.g_x), _input_norms(params, xs), da)
    return matmul(dv, w_x_transposed)


def step_jvp(recurrent, c, norms, th, e, dropout=None):
    """The tangent of `step`: th_t = th_tm1 M + e, linear in th and e.

    before:  th M = th K + N'(t w_hz) Z + N'((t r + N'(t w_hr) R) w_hn) A,  t = d * th
    after:   th M = th K + N'(t w_hr) R + N'(t w_hz) Z + N'(t w_hn) Q
    with d the recurrent dropout and N' the derivative of the normalization.
    """
    tread = drop_state(th, dropout)
    if c.gate_r is None:
        y = _each_block(normalize_jvp, recurrent.g, norms, matmul(tread, recurrent.w[0]))
        return th * c.k + (c.slopes[0] * y.reshape(c.slopes[0].shape)).sum(axis=-2) + e
    w_rz, w_n = recurrent.w
    y_rz = _each_block(normalize_jvp, recurrent.g[:2], norms[:2], matmul(tread, w_rz))
    y_r, y_z = jnp.split(y_rz, 2, axis=-1)
    y_n = normalize_jvp(matmul(tread * c.gate_r + y_r * c.r, w_n), recurrent.g[2], norms[2])
    return th * c.k + y_z * c.z + y_n * c.a + e


def step_jvp_inputs(params, tparams, xs, txs, gates, h_tm1, dropout=None):
    """e of `step_jvp`: what the tangents of parameters and inputs add to th_t, for a fixed state.

    This map is the transpose of the one from dh to the cotangents of parameters and inputs, so JAX
    makes it from the functions above. A tangent of None is zero and costs nothing.
    """
    c = coefficients(gates, h_tm1, params.spec, dropout)
    transposed = transpose_recurrent(split_recurrent(params))
    tangents = {**tparams.arrays(), "xs": txs}
    tangents = {k: t.astype(h_tm1.dtype) for k, t in tangents.items() if t is not None}

    def cotangents(dh):
        dp = step_vjp(transposed, c, gates.norms, dh, dropout)[1]
        da, du = gates_vjp(c, dh, dp)
        dparams = params_vjp(params, xs, gates, h_tm1, da, du, dropout)
        found = {**dparams.arrays(), "xs": inputs_vjp(params, params.w_x.T, xs, da)}
        return {name: found[name] for name in tangents}

    return jax.linear_transpose(cotangents, h_tm1)(tangents)[0]


def _input_norms(params, xs):
    """The norms of the three products x w_x, recomputed since nothing saves them."""
    if params.g_x is None:
        return (None, None, None)
    return tuple(norm for _, norm in input_products(params, xs))


def _flat(v):
    """[..., G, H] as [..., GH]."""
    return v.reshape(*v.shape[:-2], v.shape[-2] * v.shape[-1])


def _each_block(rule, scales, norms, v):
    """The rule applied to every block; v itself without layer norm."""
    if scales[0] is None:
        return v
    parts = jnp.split(v, len(scales), axis=-1)
    return jnp.concatenate(list(map(rule, parts, scales, norms)), axis=-1)


def _scale_rows(g, d, norms):
    """d times the normalized products, or None without layer norm."""
    return None if g is None else d * jnp.concatenate([n.y for n in norms], axis=-1)
