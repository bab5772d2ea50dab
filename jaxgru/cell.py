"""One GRU step: its equation, its transpose (VJP), its tangent (JVP), and nothing that loops.

Everything here is a pure function of arrays with any leading axes, so the same `step` that a scan
runs on `[B, H]` also redoes a whole sequence of gates in bulk on `[T, B, H]`.

Blocks of `3H` are reset | update | candidate (r | z | n), PyTorch's order. With
`a = x w_x + b_x` split into `a_r, a_z, a_n`::

    r = sigmoid(a_r + h w_hr + b_hr)          z = sigmoid(a_z + h w_hz + b_hz)
    reset="before":  n = f(a_n + (r * h) w_hn + b_hn)
    reset="after":   n = f(a_n + r * q),   q = h w_hn + b_hn
    update="keep":   h' = z * h + (1 - z) * n
    update="write":  h' = (1 - z) * h + z * n

With half-precision parameters (bfloat16, float16) the operands of every product are half, but for
those of the weight gradients; sums, gates, the state and cotangents between products are float32.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.arguments import require_choice, require_count, require_dtype, require_float

Array = jax.Array
Activation = Literal["tanh", "relu", "sigmoid", "softplus", "identity"]
Scheme = Literal["orthogonal", "pytorch", "keras"]

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


class GRUParams(NamedTuple):
    """The arrays of one GRU layer, blocks r | z | n on the last axis.

    An absent bias is None, which is a legal pytree: optax, `jax.tree.map` and `jax.grad` accept it.
    """

    w_x: Array  # [I, 3H]
    w_h: Array  # [H, 3H]
    b_x: Array | None  # [3H]
    b_h: Array | None  # [3H]


@dataclasses.dataclass(frozen=True)
class GRUSpec:
    """Which GRU equation: static and hashable, so it may be a static argument of `jax.jit`.

    Attributes:
      reset: the reset gate acts on the state "before" the recurrent product of the candidate
        (Cho et al. 2014, eq. 8) or "after" it (PyTorch, cuDNN, Keras's default).
      update: the update gate z says how much of the old state to "keep" (Cho et al. 2014, eq. 7)
        or how much of the candidate to "write" (Chung et al. 2014, section 3.2).
      activation: the candidate's f: tanh, relu, sigmoid, softplus or identity.

    Raises:
      ValueError: a field is none of its choices.

    >>> GRUSpec(reset="after")
    GRUSpec(reset='after', update='keep', activation='tanh')
    """

    reset: Literal["before", "after"] = "before"
    update: Literal["keep", "write"] = "keep"
    activation: Activation = "tanh"

    def __post_init__(self):
        require_choice("GRUSpec", "reset", self.reset, ("before", "after"))
        require_choice("GRUSpec", "update", self.update, ("keep", "write"))
        require_choice("GRUSpec", "activation", self.activation, tuple(_ACTIVATIONS))


CHO_2014 = GRUSpec(reset="before", update="keep")
CHUNG_2014 = GRUSpec(reset="before", update="write")
PYTORCH = GRUSpec(reset="after", update="keep")


class Gates(NamedTuple):
    """The r, z, n and q of a step, or what belongs to each; q is None where reset="before"."""

    r: Array
    z: Array
    n: Array
    q: Array | None


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


def init_gru(
    key: Array,
    input_size: int,
    hidden_size: int,
    *,
    bias: bool = True,
    scheme: Scheme = "orthogonal",
    dtype: Any = jnp.float32,
) -> GRUParams:
    """Draws the parameters of one GRU layer.

    ============  ======================  =============================  ==================
    scheme        w_x                     w_h                            b_x, b_h
    ============  ======================  =============================  ==================
    orthogonal    LeCun normal per gate   orthogonal per gate            0
    pytorch       U(-1/sqrt(H), 1/sqrt(H)) for every array, as `torch.nn.GRU`
    keras         Glorot uniform [I, 3H]  orthonormal rows of [H, 3H]    0
    ============  ======================  =============================  ==================

    Args:
      key: a `jax.random.key`.
      input_size: I, at least 1.
      hidden_size: H, at least 1.
      bias: False leaves both biases out (None).
      scheme: "orthogonal" (default; Saxe et al. 2014, arXiv:1312.6120), "pytorch" or "keras".
      dtype: of every array; half types are drawn in float32 and rounded.

    Returns:
      GRUParams: w_x [I, 3H], w_h [H, 3H], b_x [3H], b_h [3H].

    Raises:
      ValueError: a size is not positive, or the scheme is unknown.
      TypeError: a size is no integer, or dtype is not one of float64 (which needs JAX's x64 mode),
        float32, bfloat16 and float16.

    Cost: the orthogonal schemes take three QR decompositions of [H, H] or one of [3H, H].

    >>> params = init_gru(jax.random.key(0), 2, 3)
    >>> params.w_x.shape, params.w_h.shape, params.b_x.shape
    ((2, 9), (3, 9), (9,))
    """
    require_count("init_gru", "input_size", input_size)
    require_count("init_gru", "hidden_size", hidden_size)
    require_choice("init_gru", "scheme", scheme, get_args(Scheme))
    dtype = require_dtype("init_gru", dtype)
    draw = state_dtype(dtype)
    shape_x, shape_h = (input_size, 3 * hidden_size), (hidden_size, 3 * hidden_size)
    key_x, key_h, key_bx, key_bh = jax.random.split(key, 4)
    b_x, b_h = jnp.zeros(3 * hidden_size, draw), jnp.zeros(3 * hidden_size, draw)
    init = jax.nn.initializers
    if scheme == "pytorch":
        bound = hidden_size**-0.5

        def uniform(key, shape):
            return jax.random.uniform(key, shape, draw, -bound, bound)

        w_x, w_h = uniform(key_x, shape_x), uniform(key_h, shape_h)
        b_x, b_h = uniform(key_bx, b_x.shape), uniform(key_bh, b_h.shape)
    elif scheme == "keras":
        w_x = init.glorot_uniform()(key_x, shape_x, draw)
        w_h = init.orthogonal()(key_h, shape_h, draw)
    else:

        def per_gate(initializer, key, rows):
            keys = jax.random.split(key, 3)
            blocks = [initializer(k, (rows, hidden_size), draw) for k in keys]
            return jnp.concatenate(blocks, axis=-1)

        w_x = per_gate(init.lecun_normal(), key_x, input_size)
        w_h = per_gate(init.orthogonal(), key_h, hidden_size)
    params = GRUParams(w_x, w_h, b_x if bias else None, b_h if bias else None)
    return jax.tree.map(lambda v: v.astype(dtype), params)


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
    """a_r, a_z, a_n = x w_x + every bias that acts outside the reset gate, in the state dtype.

    Three arrays rather than one of width 3H: a scan over them needs no slicing inside its loop.
    """
    a = [_matmul(xs, w) for w in _blocks(params.w_x)]
    merged_biases = 3 if spec.reset == "before" else 2
    for b, blocks in ((params.b_x, 3), (params.b_h, merged_biases)):
        if b is not None:
            parts = _blocks(b.astype(a[0].dtype))[:blocks]
            a[:blocks] = [v + _like_row(part, v) for v, part in zip(a, parts)]
    return a[0], a[1], a[2]


def step(
    params: GRUParams, a: tuple[Array, Array, Array], h: Array, spec: GRUSpec
) -> tuple[Array, Gates]:
    """h' and the gates from the projected input a and the state h, all [..., H]."""
    a_r, a_z, a_n = a
    activation = _ACTIVATIONS[spec.activation]
    if spec.reset == "before":
        w_rz, w_n = _gates_and_candidate(params.w_h)
        u_r, u_z = jnp.split(_matmul(h, w_rz), 2, axis=-1)
        r = jax.nn.sigmoid(a_r + u_r)
        z = jax.nn.sigmoid(a_z + u_z)
        n, q = activation(a_n + _matmul(r * h, w_n)), None
    else:  # one product of width 3H: nothing in it waits for r
        u_r, u_z, q = _blocks(_matmul(h, params.w_h))
        if params.b_h is not None:
            q = q + _like_row(_blocks(params.b_h.astype(q.dtype))[2], q)
        r = jax.nn.sigmoid(a_r + u_r)
        z = jax.nn.sigmoid(a_z + u_z)
        n = activation(a_n + r * q)
    h = z * h + (1 - z) * n if spec.update == "keep" else (1 - z) * h + z * n
    return h, Gates(r, z, n, q)


def coefficients(gates: Gates, h_tm1: Array, spec: GRUSpec) -> Coefficients:
    """K, Z, A, R, Q: every local derivative of a step, from values its forward pass has."""
    r, z, n, q = gates
    keep, write = (z, 1 - z) if spec.update == "keep" else (1 - z, z)
    sign = 1 if spec.update == "keep" else -1
    k_z = sign * (h_tm1 - n) * (z * (1 - z))
    k_a = write * _DERIVATIVES[spec.activation](n)
    if q is None:
        return Coefficients(keep, k_z, k_a, h_tm1 * (r * (1 - r)), None)
    return Coefficients(keep, k_z, k_a, k_a * q * (r * (1 - r)), k_a * r)


def step_vjp(
    params: GRUParams, gates: Gates, h_tm1: Array, dh: Array, spec: GRUSpec
) -> tuple[Array, Gates]:
    """The transpose of `step`: dh_tm1, and the cotangents of a_r, a_z, a_n and q.

    before:  dp = (dh A) w_hn^T,  da = (dp R, dh Z, dh A)
             dh_tm1 = dh K + dp r + [da_r | da_z] [w_hr | w_hz]^T
    after:   da = (dh R, dh Z, dh A),  dq = dh Q
             dh_tm1 = dh K + [da_r | da_z | dq] w_h^T
    """
    c = coefficients(gates, h_tm1, spec)
    da_z, da_n = dh * c.z, dh * c.a
    if c.q is None:
        w_rz, w_n = _gates_and_candidate(params.w_h)
        dp = _matmul_transposed(da_n, w_n)
        da_r, dq = dp * c.r, None
        du = jnp.concatenate([da_r, da_z], axis=-1)
        dh_tm1 = dh * c.k + dp * gates.r + _matmul_transposed(du, w_rz)
    else:
        da_r, dq = dh * c.r, dh * c.q
        du = jnp.concatenate([da_r, da_z, dq], axis=-1)
        dh_tm1 = dh * c.k + _matmul_transposed(du, params.w_h)
    return dh_tm1, Gates(da_r, da_z, da_n, dq)


def params_vjp(
    params: GRUParams, xs: Array, gates: Gates, h_tm1: Array, da: Gates, spec: GRUSpec
) -> GRUParams:
    """The cotangents of all parameters, each one product over all leading axes (w_hn its own).

    dw_x = x^T [da_r | da_z | da_n],  dw_hr = h^T da_r,  dw_hz = h^T da_z,
    dw_hn = (r h)^T da_n (before) or h^T dq (after); a bias gets the sum of its block.
    In the state dtype, whatever the parameters' own.
    """
    xs = xs.astype(h_tm1.dtype)
    da_x = jnp.concatenate([da.r, da.z, da.n], axis=-1)
    if da.q is None:
        w_rz, w_n = _gates_and_candidate(params.w_h)
        du = da_x[..., : w_rz.shape[-1]]
        dw_h = [_weight_vjp(h_tm1, du, w_rz), _weight_vjp(gates.r * h_tm1, da.n, w_n)]
        da_h, dw_h = da_x, jnp.concatenate(dw_h, axis=-1)
    else:
        da_h = jnp.concatenate([da.r, da.z, da.q], axis=-1)
        dw_h = _weight_vjp(h_tm1, da_h, params.w_h)
    return GRUParams(
        _weight_vjp(xs, da_x, params.w_x),
        dw_h,
        None if params.b_x is None else da_x.sum(axis=tuple(range(da_x.ndim - 1))),
        None if params.b_h is None else da_h.sum(axis=tuple(range(da_h.ndim - 1))),
    )


def inputs_vjp(params: GRUParams, da: Gates) -> Array:
    """dx = [da_r | da_z | da_n] w_x^T, in the state dtype."""
    return _matmul_transposed(jnp.concatenate([da.r, da.z, da.n], axis=-1), params.w_x)


def step_jvp(
    params: GRUParams, gates: Gates, h_tm1: Array, th: Array, drive: Array, spec: GRUSpec
) -> Array:
    """The tangent of `step`: th_t = th_tm1 M + drive, linear in th and drive.

    before:  th M = th K + (th w_hz) Z + ((th r + (th w_hr) R) w_hn) A
    after:   th M = th K + (th w_hz) Z + (th w_hr) R + (th w_hn) Q
    """
    c = coefficients(gates, h_tm1, spec)
    if c.q is None:
        w_rz, w_n = _gates_and_candidate(params.w_h)
        y_r, y_z = jnp.split(_matmul(th, w_rz), 2, axis=-1)
        tp = th * gates.r + y_r * c.r
        return th * c.k + y_z * c.z + _matmul(tp, w_n) * c.a + drive
    y_r, y_z, y_q = _blocks(_matmul(th, params.w_h))
    return th * c.k + y_z * c.z + y_r * c.r + y_q * c.q + drive


def step_drive(
    params: GRUParams,
    tparams: GRUParams,
    xs: Array,
    txs: Array | None,
    gates: Gates,
    h_tm1: Array,
    spec: GRUSpec,
) -> Array:
    """What the tangents of parameters and inputs add to th_t, in bulk over all leading axes.

    With e_g = tx w_xg + x tw_xg + tb_g + h tw_hg for each block g:
    before:  drive = e_z Z + (e_n + (e_r R) w_hn) A,  where e_n has (r h) tw_hn
    after:   drive = e_z Z + e_r R + e_n A,           where e_n has r (h tw_hn + tb_hn)
    None stands for a tangent that is zero, and costs nothing.
    """
    c = coefficients(gates, h_tm1, spec)
    e: list[Array] = [jnp.zeros_like(h_tm1)] * 3
    if txs is not None:
        e = [v + _matmul(txs, w) for v, w in zip(e, _blocks(params.w_x))]
    if tparams.w_x is not None:
        e = [v + _matmul(xs, w) for v, w in zip(e, _blocks(tparams.w_x))]
    if tparams.b_x is not None:
        tb = _blocks(tparams.b_x.astype(h_tm1.dtype))
        e = [v + _like_row(b, v) for v, b in zip(e, tb)]
    u: list[Array] = [jnp.zeros_like(h_tm1)] * 3
    if tparams.w_h is not None:
        h_n = gates.r * h_tm1 if c.q is None else h_tm1
        u = [_matmul(h, w) for h, w in zip((h_tm1, h_tm1, h_n), _blocks(tparams.w_h))]
    if tparams.b_h is not None:
        tb = _blocks(tparams.b_h.astype(h_tm1.dtype))
        u = [v + _like_row(b, v) for v, b in zip(u, tb)]
    e_r, e_z = e[0] + u[0], e[1] + u[1]
    if c.q is None:
        e_n = e[2] + u[2] + _matmul(e_r * c.r, _blocks(params.w_h)[2])
        return e_z * c.z + e_n * c.a
    return e_z * c.z + e_r * c.r + e[2] * c.a + u[2] * c.q


def state_dtype(dtype: Any) -> Any:
    """The dtype of state, gates and sums: float32 for half types, else the dtype itself."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def _blocks(w):
    """The three blocks r | z | n of the last axis."""
    return jnp.split(w, 3, axis=-1)


def _gates_and_candidate(w):
    """The blocks r | z of the last axis, side by side, and the block n."""
    return jnp.split(w, [2 * (w.shape[-1] // 3)], axis=-1)


def _like_row(b, v):
    """[H] with as many unit axes in front as v has, so that the sum broadcasts explicitly."""
    return b.reshape((1,) * (v.ndim - 1) + b.shape)


def _matmul(x, w):
    """x w: operands in w's dtype, summed in the state dtype."""
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(
        x.astype(w.dtype), w, contract, preferred_element_type=state_dtype(w.dtype)
    )


def _matmul_transposed(d, w):
    """d w^T, with the dtypes of `_matmul`."""
    contract = (((d.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(
        d.astype(w.dtype), w, contract, preferred_element_type=state_dtype(w.dtype)
    )


def _weight_vjp(x, d, w):
    """x^T d: the cotangent of w in y = x w, summed over the leading axes.

    Formed as JAX's own transpose of the product, which knows how to reduce over an axis that an
    explicit mesh shards; a product written out by hand is refused there.
    """
    x, d = _flatten(x), _flatten(d)
    return jax.vjp(lambda w: _matmul(x, w), w.astype(d.dtype))[1](d)[0]


def _flatten(x):
    """[..., F] as one matrix, the fastest form on CPU, unless a leading axis is sharded."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    if sharding is not None and any(axis is not None for axis in sharding.spec[:-1]):
        return x
    return lax.collapse(x, 0, x.ndim - 1) if x.ndim > 1 else x[None]


def require_spec(function: str, spec: Any) -> None:
    """TypeError unless spec is a GRUSpec."""
    if not isinstance(spec, GRUSpec):
        raise TypeError(f"{function}: spec must be a GRUSpec, got {spec!r}.")


def require_params(function: str, params: Any) -> tuple[int, int]:
    """(I, H) of well-formed parameters; TypeError or ValueError naming the array that is not."""
    if not isinstance(params, GRUParams):
        raise TypeError(f"{function}: params must be a GRUParams, got {type(params).__name__}.")
    require_float(function, "params.w_x", params.w_x)
    arrays: dict[str, Any] = params._asdict()
    for name in ("w_x", "w_h"):
        value = arrays[name]
        require_float(function, f"params.{name}", value, params.w_x.dtype)
        if value.ndim != 2:
            raise ValueError(
                f"{function}: params.{name} must have two axes, got shape {value.shape}."
            )
    hidden_size = params.w_h.shape[0]
    wanted = {
        "w_x": (params.w_x.shape[0], 3 * hidden_size),
        "w_h": (hidden_size, 3 * hidden_size),
        "b_x": (3 * hidden_size,),
        "b_h": (3 * hidden_size,),
    }
    for name, shape in wanted.items():
        value = arrays[name]
        if value is None:
            continue
        require_float(function, f"params.{name}", value, params.w_x.dtype)
        if value.shape != shape:
            raise ValueError(
                f"{function}: params.{name} must have shape {shape} (H={hidden_size}, the rows of "
                f"params.w_h), got {value.shape}."
            )
    return params.w_x.shape[0], hidden_size
