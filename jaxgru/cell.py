"""One GRU step: its equation, its transpose (VJP), its tangent (JVP), and nothing that loops.

Everything here is a pure function of arrays with any leading axes, so the same `step` that a scan
runs on `[B, H]` also redoes a whole sequence of gates in bulk on `[T, B, H]`.

Blocks of `3H` are reset | update | candidate (r | z | n), PyTorch's order. With
`a = N(x w_x) + b_x` split into `a_r, a_z, a_n`::

    r = sigmoid(a_r + N(h w_hr) + b_hr)       z = sigmoid(a_z + N(h w_hz) + b_hz)
    reset="before":  n = f(a_n + N((r * h) w_hn) + b_hn)
    reset="after":   n = f(a_n + r * q),   q = N(h w_hn) + b_hn
    update="keep":   h' = z * h + (1 - z) * n
    update="write":  h' = (1 - z) * h + z * n

N is the identity unless params hold gains. With them it is layer normalization (Ba et al. 2016,
arXiv:1607.06450, eq. 4) of each gate's product by itself; the biases are added after it.

Recurrent dropout scales what the products read, not the state that is kept: in w_h's products h is
then `scale * h` with a scale [..., H] that is the same at every step (Gal and Ghahramani 2016,
arXiv:1512.05287, eq. 7).

With half-precision parameters (bfloat16, float16) the operands of every product are half, but for
those of the weight gradients; sums, gates, the state and cotangents between products are float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgru.arguments import require_float
from jaxgru.parameters import CHO_2014, GRUParams, GRUSpec, require_params, require_spec
from jaxgru.products import (
    Norm,
    blocks,
    gates_and_candidate,
    like_row,
    matmul,
    matmul_transposed,
    normalize,
    normalize_jvp,
    normalize_vjp,
    state_dtype,
    sum_rows,
    weight_vjp,
)

Array = jax.Array
Norms = tuple[Norm | None, Norm | None, Norm | None]

_ACTIVATIONS = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "identity": lambda a: a,
}
# f' as a function of n = f(a). relu takes 0 at its kink, as jax.nn.relu does.
_DERIVATIVES = {
    "tanh": lambda n: 1 - n * n,
    "relu": lambda n: (n > 0).astype(n.dtype),
    "sigmoid": lambda n: n * (1 - n),
    "softplus": lambda n: -jnp.expm1(-n),
    "identity": jnp.ones_like,
}


class Gates(NamedTuple):
    """The r, z, n and q of a step, or what belongs to each; q is None where reset="before".

    norms are those of the three products with w_h, each None where params.g_h is.
    """

    r: Array
    z: Array
    n: Array
    q: Array | None
    norms: Norms = (None, None, None)


class Coefficients(NamedTuple):
    """A step's local derivatives, all [..., H]; products of a cotangent or tangent with them.

    `k` is dh'/dh along the kept state, `z` and `a` are dh'/da_z and dh'/da_n. `r` is dh'/da_r for
    reset="after" and d(r * h)/da_r for reset="before"; `q` is dh'/dq, None for reset="before".
    """

    k: Array
    z: Array
    a: Array
    r: Array
    q: Array | None


def gru_cell(params: GRUParams, x: Array, h: Array, *, spec: GRUSpec = CHO_2014) -> Array:
    """One GRU step, h' from x and h; the module docstring has the equations.

    Args:
      params: of one layer.
      x: [..., I], any leading axes, none included.
      h: [..., H], the same leading axes.
      spec: which equation; Cho et al. 2014, eqs. 5-8, unless told.

    Returns:
      h' [..., H] in the dtype of the arguments. With half types the step computes in float32 and
      rounds its result: `gru` over a sequence rounds only what it returns, not its state.

    Raises:
      ValueError: shapes do not fit.
      TypeError: an array is not floating, or dtypes differ.

    Cost: 3H(I + H) multiply-adds a row; JAX differentiates it in every mode.

    >>> from jaxgru import init_gru
    >>> params = init_gru(jax.random.key(0), 2, 3)
    >>> gru_cell(params, jnp.ones((4, 2)), jnp.zeros((4, 3))).shape
    (4, 3)
    """
    input_size, hidden_size = require_params("gru_cell", params)
    require_float("gru_cell", "x", x, params.w_x.dtype)
    require_float("gru_cell", "h", h, params.w_x.dtype)
    require_spec("gru_cell", spec)
    if x.ndim < 1 or x.shape[-1] != input_size:
        raise ValueError(
            f"gru_cell: x must have shape [..., I] with I={input_size} (rows of params.w_x), "
            f"got {x.shape}."
        )
    wanted = (*x.shape[:-1], hidden_size)
    if h.shape != wanted:
        raise ValueError(
            f"gru_cell: h must have shape {wanted} (x's leading axes, then H={hidden_size} rows of "
            f"params.w_h), got {h.shape}."
        )
    params, x, h = jax.tree.map(jnp.asarray, (params, x, h))
    a = project(params, x, spec)
    return step(params, a, h.astype(state_dtype(h.dtype)), spec)[0].astype(h.dtype)


def project(params: GRUParams, xs: Array, spec: GRUSpec) -> tuple[Array, Array, Array]:
    """a_r, a_z, a_n = N(x w_x) + every bias that acts outside the reset gate, in the state dtype.

    Three arrays rather than one of width 3H: a scan over them needs no slicing inside its loop.
    """
    a = [v for v, _ in _input_products(params, xs)]
    merged_biases = 3 if spec.reset == "before" else 2
    for b, count in ((params.b_x, 3), (params.b_h, merged_biases)):
        if b is not None:
            a[:count] = [v + like_row(part, v) for v, part in zip(a, blocks(b)[:count])]
    return a[0], a[1], a[2]


def step(
    params: GRUParams,
    a: tuple[Array, Array, Array],
    h: Array,
    spec: GRUSpec,
    scale: Array | None = None,
) -> tuple[Array, Gates]:
    """h' and the gates from the projected input a and the state h, all [..., H]."""
    read, activation = _read(h, scale), _ACTIVATIONS[spec.activation]
    g_n = _gains(params.g_h)[2]
    if spec.reset == "before":
        w_rz, w_n = gates_and_candidate(params.w_h)
        v_r, v_z = jnp.split(matmul(read, w_rz), 2, axis=-1)
        (r, norm_r), (z, norm_z) = _open_gates(params, a, v_r, v_z)
        u_n, norm_n = normalize(matmul(r * read, w_n), g_n)
        n, q = activation(a[2] + u_n), None
    else:  # one product of width 3H: nothing in it waits for r
        v_r, v_z, v_n = blocks(matmul(read, params.w_h))
        (r, norm_r), (z, norm_z) = _open_gates(params, a, v_r, v_z)
        q, norm_n = normalize(v_n, g_n)
        q = q if params.b_h is None else q + like_row(blocks(params.b_h)[2], q)
        n = activation(a[2] + r * q)
    h = z * h + (1 - z) * n if spec.update == "keep" else (1 - z) * h + z * n
    return h, Gates(r, z, n, q, (norm_r, norm_z, norm_n))


def coefficients(
    gates: Gates, h_tm1: Array, spec: GRUSpec, scale: Array | None = None
) -> Coefficients:
    """K, Z, A, R, Q: every local derivative of a step, from values its forward pass has."""
    r, z, n, q, _ = gates
    keep, write = (z, 1 - z) if spec.update == "keep" else (1 - z, z)
    sign = 1 if spec.update == "keep" else -1
    k_z = sign * (h_tm1 - n) * (z * (1 - z))
    k_a = write * _DERIVATIVES[spec.activation](n)
    if q is None:
        return Coefficients(keep, k_z, k_a, _read(h_tm1, scale) * (r * (1 - r)), None)
    return Coefficients(keep, k_z, k_a, k_a * q * (r * (1 - r)), k_a * r)


def step_vjp(
    params: GRUParams,
    gates: Gates,
    h_tm1: Array,
    dh: Array,
    spec: GRUSpec,
    scale: Array | None = None,
) -> tuple[Array, Gates]:
    """The transpose of `step`: dh_tm1, and the cotangents of a_r, a_z, a_n and q.

    before:  dp = N'(dh A) w_hn^T,  da = (dp R, dh Z, dh A)
             dh_tm1 = dh K + scale (dp r + N'[da_r | da_z] [w_hr | w_hz]^T)
    after:   da = (dh R, dh Z, dh A),  dq = dh Q
             dh_tm1 = dh K + scale (N'[da_r | da_z | dq] w_h^T)
    with N' the transpose of the normalization, the identity without gains.
    """
    c = coefficients(gates, h_tm1, spec, scale)
    da_z, da_n = dh * c.z, dh * c.a
    if c.q is None:
        w_rz, w_n = gates_and_candidate(params.w_h)
        (g_r, g_z, g_n), (norm_r, norm_z, norm_n) = _gains(params.g_h), gates.norms
        dp = matmul_transposed(normalize_vjp(da_n, g_n, norm_n), w_n)
        da = Gates(dp * c.r, da_z, da_n, None)
        dv_r, dv_z = normalize_vjp(da.r, g_r, norm_r), normalize_vjp(da.z, g_z, norm_z)
        dv_rz = jnp.concatenate([dv_r, dv_z], axis=-1)
        dread = dp * gates.r + matmul_transposed(dv_rz, w_rz)
    else:
        da = Gates(dh * c.r, da_z, da_n, dh * c.q)
        dv = jnp.concatenate(_products_vjp(params, gates, da), axis=-1)
        dread = matmul_transposed(dv, params.w_h)
    return dh * c.k + _read(dread, scale), da


def params_vjp(
    params: GRUParams,
    xs: Array,
    gates: Gates,
    h_tm1: Array,
    da: Gates,
    spec: GRUSpec,
    scale: Array | None = None,
) -> GRUParams:
    """The cotangents of all parameters, each one product over all leading axes (w_hn its own).

    dw_x = x^T N'[da_r | da_z | da_n],  [dw_hr | dw_hz] = read^T N'[da_r | da_z],
    dw_hn = (r read)^T N' da_n (before) or read^T N' dq (after), read = scale h; a bias gets the sum
    of its block, a gain that of its block times the normalized product.
    In the state dtype, whatever the parameters' own.
    """
    read = _read(h_tm1, scale)
    da_x = jnp.concatenate([da.r, da.z, da.n], axis=-1)
    da_h = da_x if da.q is None else jnp.concatenate([da.r, da.z, da.q], axis=-1)
    dv_x, dv_h = da_x, da_h
    if params.g_x is not None:
        dv_x = jnp.concatenate(_inputs_vjp(params, xs, da), axis=-1)
    if params.g_h is not None:
        dv_h = jnp.concatenate(_products_vjp(params, gates, da), axis=-1)
    if da.q is None:
        w_rz, w_n = gates_and_candidate(params.w_h)
        dv_rz, dv_n = gates_and_candidate(dv_h)
        dw_h = [weight_vjp(read, dv_rz, w_rz), weight_vjp(gates.r * read, dv_n, w_n)]
        dw_h = jnp.concatenate(dw_h, axis=-1)
    else:
        dw_h = weight_vjp(read, dv_h, params.w_h)
    return GRUParams(
        weight_vjp(xs.astype(h_tm1.dtype), dv_x, params.w_x),
        dw_h,
        None if params.b_x is None else sum_rows(da_x),
        None if params.b_h is None else sum_rows(da_h),
        _gain_vjp(params.g_x, da_x, _input_norms(params, xs)),
        _gain_vjp(params.g_h, da_h, gates.norms),
    )


def inputs_vjp(params: GRUParams, xs: Array, da: Gates) -> Array:
    """dx = N'[da_r | da_z | da_n] w_x^T, in the state dtype."""
    dv = jnp.concatenate(_inputs_vjp(params, xs, da), axis=-1)
    return matmul_transposed(dv, params.w_x)


def step_jvp(
    params: GRUParams,
    gates: Gates,
    h_tm1: Array,
    th: Array,
    drive: Array,
    spec: GRUSpec,
    scale: Array | None = None,
) -> Array:
    """The tangent of `step`: th_t = th_tm1 M + drive, linear in th and drive.

    before:  th M = th K + N'(t w_hz) Z + N'((t r + N'(t w_hr) R) w_hn) A,  t = scale th
    after:   th M = th K + N'(t w_hz) Z + N'(t w_hr) R + N'(t w_hn) Q
    with N' the derivative of the normalization, the identity without gains.
    """
    c, tread = coefficients(gates, h_tm1, spec, scale), _read(th, scale)
    g_r, g_z, g_n = _gains(params.g_h)
    norm_r, norm_z, norm_n = gates.norms
    if c.q is None:
        w_rz, w_n = gates_and_candidate(params.w_h)
        y_r, y_z = jnp.split(matmul(tread, w_rz), 2, axis=-1)
        tp = tread * gates.r + normalize_jvp(y_r, g_r, norm_r) * c.r
        y_n = normalize_jvp(matmul(tp, w_n), g_n, norm_n)
        return th * c.k + normalize_jvp(y_z, g_z, norm_z) * c.z + y_n * c.a + drive
    y_r, y_z, y_q = blocks(matmul(tread, params.w_h))
    y_r, y_z = normalize_jvp(y_r, g_r, norm_r), normalize_jvp(y_z, g_z, norm_z)
    return th * c.k + y_z * c.z + y_r * c.r + normalize_jvp(y_q, g_n, norm_n) * c.q + drive


def step_drive(
    params: GRUParams,
    tparams: GRUParams,
    xs: Array,
    txs: Array | None,
    gates: Gates,
    h_tm1: Array,
    spec: GRUSpec,
    scale: Array | None = None,
) -> Array:
    """What the tangents of parameters and inputs add to th_t, in bulk over all leading axes.

    With e_g the tangent of N(x w_xg) + b_g and u_g that of N(read w_hg) + b_hg for a fixed state:
    before:  drive = (e_z + u_z) Z + (e_n + u_n + N'(((e_r + u_r) R) w_hn)) A,  u_n of (r read) w_hn
    after:   drive = (e_z + u_z) Z + (e_r + u_r) R + e_n A + u_n Q
    None stands for a tangent that is zero, and costs nothing.
    """
    c, read = coefficients(gates, h_tm1, spec, scale), _read(h_tm1, scale)
    zero = jnp.zeros_like(h_tm1)
    e = [zero] * 3
    if txs is not None:
        e = [v + matmul(txs, w) for v, w in zip(e, blocks(params.w_x))]
    if tparams.w_x is not None:
        e = [v + matmul(xs, w) for v, w in zip(e, blocks(tparams.w_x))]
    e = _affine_jvp(e, params.g_x, _input_norms(params, xs), tparams.g_x, tparams.b_x)
    u = [zero] * 3
    if tparams.w_h is not None:
        reads = (read, read, gates.r * read if c.q is None else read)
        u = [matmul(h, w) for h, w in zip(reads, blocks(tparams.w_h))]
    u = _affine_jvp(u, params.g_h, gates.norms, tparams.g_h, tparams.b_h)
    e_r, e_z = e[0] + u[0], e[1] + u[1]
    if c.q is None:
        through_r = matmul(e_r * c.r, blocks(params.w_h)[2])
        through_r = normalize_jvp(through_r, _gains(params.g_h)[2], gates.norms[2])
        return e_z * c.z + (e[2] + u[2] + through_r) * c.a
    return e_z * c.z + e_r * c.r + e[2] * c.a + u[2] * c.q


def _open_gates(params, a, v_r, v_z):
    """r and z, each with the norm of its product."""
    g_r, g_z, _ = _gains(params.g_h)
    (u_r, norm_r), (u_z, norm_z) = normalize(v_r, g_r), normalize(v_z, g_z)
    return (jax.nn.sigmoid(a[0] + u_r), norm_r), (jax.nn.sigmoid(a[1] + u_z), norm_z)


def _read(h, scale):
    """What the products read of a state, or its transpose: scale h."""
    return h if scale is None else h * scale.reshape((1,) * (h.ndim - scale.ndim) + scale.shape)


def _gains(g):
    """The three blocks of a gain, or None for each."""
    return (None, None, None) if g is None else blocks(g)


def _input_products(params, xs):
    """N(x w_x) and its norm, for each of the three blocks."""
    gains = _gains(params.g_x)
    return [normalize(matmul(xs, w), g) for w, g in zip(blocks(params.w_x), gains)]


def _input_norms(params, xs):
    """The norms of the three products x w_x, which nothing keeps: they are made again."""
    if params.g_x is None:
        return (None, None, None)
    return tuple(norm for _, norm in _input_products(params, xs))


def _inputs_vjp(params, xs, da):
    """The cotangents of the three products x w_x."""
    du = (da.r, da.z, da.n)
    return list(map(normalize_vjp, du, _gains(params.g_x), _input_norms(params, xs)))


def _products_vjp(params, gates, da):
    """The cotangents of the three products with w_h."""
    du = (da.r, da.z, da.n if da.q is None else da.q)
    return list(map(normalize_vjp, du, _gains(params.g_h), gates.norms))


def _gain_vjp(g, da, norms):
    """The sum over rows of da times the normalized products, or None without a gain."""
    return None if g is None else sum_rows(da * jnp.concatenate([n.y for n in norms], axis=-1))


def _affine_jvp(tv, g, norms, tg, tb):
    """The tangents of N(v) + b from those of v, of the gain and of the bias; None is zero."""
    tu = list(map(normalize_jvp, tv, _gains(g), norms))
    if tg is not None:
        tu = [u + like_row(part, u) * norm.y for u, part, norm in zip(tu, blocks(tg), norms)]
    return tu if tb is None else [u + like_row(part, u) for u, part in zip(tu, blocks(tb))]
