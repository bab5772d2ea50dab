"""dh_t/dh_{t-1} in closed form, its diagonal, its bound, and its products over time.

README.md of this folder has the equations of M = J^T and X, here `_state_map` and `_input_map`. A
masked step has J = I, a reset step J = 0. Results are in the state dtype (float32 for half types).
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.cell import input_products
from jaxgru.core.checks import require_bool, require_flags, require_float
from jaxgru.core.derivatives import Coefficients
from jaxgru.core.flags import Flags
from jaxgru.core.layer_norm import Norm, normalize_jvp
from jaxgru.core.matmul import blocks, like_row, matmul, state_dtype
from jaxgru.core.parameters import GRUParams, require_params
from jaxgru.diagnostics.traces import PLAIN, per_layer, replicate, trace_layers, trace_steps
from jaxgru.stacks.checks import require_one_way, require_step


def step_jacobian(params: GRUParams, x: jax.Array, h: jax.Array) -> jax.Array:
    """Computes J = dh'/dh of one step in closed form, with J[i, j] = dh'_i / dh_j.

    Args:
      params, x, h: as in `gru_cell`. Leading axes are free: xs [T, ..., I] and the state before
        each step give every step of a sequence at once.

    Returns:
      [..., H, H].

    Raises:
      ValueError, TypeError: an argument does not fit, as in `gru_cell`.

    Cost: reset="after" 5H^2 operations a row, "before" one product of [H, H] with [H, H] as well.

    >>> from jaxgru import gru_cell, init_gru
    >>> params, x, h = init_gru(jax.random.key(0), 2, 3), jnp.ones(2), jnp.zeros(3)
    >>> wanted = jax.jacrev(gru_cell, argnums=2)(params, x, h)
    >>> bool(jnp.allclose(step_jacobian(params, x, h), wanted, atol=1e-6))
    True
    """
    return jnp.swapaxes(_state_map(_trace_step("step_jacobian", params, x, h)), -1, -2)


def step_jacobian_diagonal(params: GRUParams, x: jax.Array, h: jax.Array) -> jax.Array:
    """Computes the diagonal of dh'/dh, the derivative of each unit by its own past.

        after:   K + d(w_hz) Z + d(w_hr) R + d(w_hn) Q,    d the diagonal
        before:  K + d(w_hz) Z + A (r d(w_hn) + R e),      e_ji = (w_hr)_ij (w_hn)_ji

    Args:
      params, x, h: as in `gru_cell`.

    Returns:
      [..., H].

    Raises:
      ValueError, TypeError: an argument does not fit, as in `gru_cell`.

    Cost: H operations a row for "after", H^2 for "before"; with layer norm the whole Jacobian.

    >>> from jaxgru import PYTORCH, init_gru
    >>> params, x, h = init_gru(jax.random.key(0), 2, 3, spec=PYTORCH), jnp.ones(2), jnp.zeros(3)
    >>> wanted = jnp.diagonal(step_jacobian(params, x, h))
    >>> bool(jnp.allclose(step_jacobian_diagonal(params, x, h), wanted, atol=1e-6))
    True
    """
    trace = _trace_step("step_jacobian_diagonal", params, x, h)
    if params.g_h is not None:
        return jnp.diagonal(_state_map(trace), axis1=-2, axis2=-1)
    return jacobian_diagonal(trace.params, trace.c)


def jacobian_diagonal(params: GRUParams, c: Coefficients) -> jax.Array:
    """`step_jacobian_diagonal` without layer norm, from a step's coefficients."""
    w_r, w_z, w_n = (w.astype(c.K.dtype) for w in blocks(params.w_h))
    own_r, own_z, own_n = (like_row(jnp.diagonal(w), c.K) for w in (w_r, w_z, w_n))
    if c.Q is not None:
        return c.K + own_z * c.Z + own_r * c.R + own_n * c.Q
    assert c.r is not None
    return c.K + own_z * c.Z + c.A * (c.r * own_n + matmul(c.R, w_r.T * w_n))


def step_jacobian_bound(params: GRUParams, x: jax.Array, h: jax.Array) -> jax.Array:
    """Computes an upper bound of the largest singular value of dh'/dh from gates and weights.

        after:   max K + max|Z| |w_hz| + max|R| |w_hr| + max|Q| |w_hn|
        before:  max K + max|Z| |w_hz| + max|A| |w_hn| (max r + max|R| |w_hr|)

    with |w| the spectral norm. Layer norm with scale g and inverse deviation i multiplies it by
    max|g| i.

    Args:
      params, x, h: as in `gru_cell`.

    Returns:
      [...].

    Raises:
      ValueError, TypeError: an argument does not fit, as in `gru_cell`.

    Cost: three singular value decompositions of [H, H], once; then H operations a row.

    >>> from jaxgru import init_gru
    >>> params, x, h = init_gru(jax.random.key(0), 2, 3), jnp.ones(2), jnp.zeros(3)
    >>> norm = jnp.linalg.norm(step_jacobian(params, x, h), ord=2)
    >>> bool(norm <= step_jacobian_bound(params, x, h))
    True
    """
    trace = _trace_step("step_jacobian_bound", params, x, h)
    c = trace.c

    def size_of(w, scale, norm):
        size = jnp.linalg.norm(w.astype(c.K.dtype), ord=2)
        return size if norm is None else size * largest(scale.astype(size.dtype)) * norm.i[..., 0]

    def largest(v):
        return jnp.abs(v).max(axis=-1)

    parts = (blocks(trace.params.w_h), trace.recurrent.scales, trace.c.norms)
    size_r, size_z, size_n = map(size_of, *parts)
    without_r = largest(c.K) + largest(c.Z) * size_z
    if c.Q is not None:
        return without_r + largest(c.R) * size_r + largest(c.Q) * size_n
    return without_r + largest(c.A) * size_n * (largest(c.r) + largest(c.R) * size_r)


def sequence_jacobians(
    params: Any, xs: jax.Array, h0: Any = None, *,
    mask: jax.Array | None = None, resets: jax.Array | None = None, residual: bool = False,
    reverse: bool = False,
) -> jax.Array:  # fmt: skip
    """Computes dh_t/dh_{t-1} of every step of a sequence, for the joint state of a stack.

    The state of a stack is that of its layers side by side, [h^1 | h^2 | ...], S = sum of H. A
    layer depends on the previous states of the layers below through its input, so that J is block
    lower triangular::

        dh^l_t = dh^l_{t-1} M^l + dx^l_t X^l,    X = dh'/dx,    x^l_t = h^{l-1}_t

    Args:
      params: a `GRUParams`, or a sequence of them.
      xs, h0, mask, resets, residual: see `gradient_flow`.
      reverse: as in `gru`. J[t] is then dh_t/dh_{t+1}; pass J[::-1] where the order of time counts.

    Returns:
      [T, ..., S, S] with J[t, ..., i, j] = dh_t[i] / dh_{t-1}[j].

    Raises:
      ValueError, TypeError: see `gradient_flow`; ValueError also for a `Bidirectional`, whose
        directions have no common order of steps.

    Cost: that of `gru` and, for every step, of `step_jacobian`; T B S^2 numbers in memory. A stack
    adds the products of X^l [I, H] with the layers below.

    >>> from jaxgru import init_stack
    >>> layers = init_stack(jax.random.key(0), 2, 3, num_layers=2)
    >>> sequence_jacobians(layers, jnp.ones((5, 4, 2))).shape
    (5, 4, 6, 6)
    """
    require_bool("sequence_jacobians", "reverse", reverse)
    cure = "; pass its forward and, with reverse=True, its backward separately"
    require_one_way("sequence_jacobians", params, cure)
    call = (params, xs, h0, mask, resets)
    traces = trace_layers("sequence_jacobians", *call, residual=residual, reverse=reverse)
    traces = per_layer(params, traces)
    ends = list(itertools.accumulate(trace.h_tm1.shape[-1] for trace in traces))
    columns, of_output = [], None
    for trace, end in zip(traces, ends):
        column = _state_column(trace, end, ends[-1], of_output)
        columns.append(column)
        of_output = column + of_output if residual and of_output is not None else column
    return jnp.swapaxes(jnp.concatenate(columns, axis=-1), -1, -2)


def jacobian_products(jacobians: jax.Array) -> jax.Array:
    """Computes P_t = J_T J_{T-1} ... J_t = dh_T/dh_{t-1} for every step t.

    Args:
      jacobians: [T, ..., H, H] in the order of time, from `sequence_jacobians`.

    Returns:
      [T, ..., H, H]; the first, P_1, is dh_T/dh_0.

    Raises:
      ValueError, TypeError: jacobians is not a floating array [T, ..., H, H].

    Cost: T products of [H, H] with [H, H], one after the other. On long sequences the product
    underflows; `lyapunov_exponents` returns its rate there.

    >>> jacobian_products(jnp.full((3, 1, 1), 0.5)).ravel().tolist()
    [0.125, 0.25, 0.5]
    """
    jacobians = _require_jacobians("jacobian_products", jacobians)

    def body(after, jacobian):
        product = jnp.matmul(after, jacobian)
        return product, product

    return lax.scan(body, _identities(jacobians), jacobians, reverse=True)[1]


def singular_values(jacobians: jax.Array) -> jax.Array:
    """Computes the singular values of every matrix, the largest first.

    Args:
      jacobians: [..., H, H], Jacobians of steps or products of them.

    Returns:
      [..., H]; the first is the largest factor by which a matrix stretches a cotangent. They can be
      differentiated once.

    Raises:
      ValueError, TypeError: jacobians is not a floating array [..., H, H].

    >>> singular_values(jnp.diag(jnp.array([0.5, 2.0]))).tolist()
    [2.0, 0.5]
    """
    return _svd_values(_require_jacobians("singular_values", jacobians, least=2))


def lyapunov_exponents(jacobians: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Computes the rates, in nats a step, at which small differences of the state grow or decay.

        J_t Q_{t-1} = Q_t R_t (QR decomposition),   lambda_i = mean over t of log |(R_t)_ii|

    For large T they are the Lyapunov exponents (Benettin et al. 1980, Meccanica 15, 9-20; for
    recurrent networks Vogt et al. 2022, arXiv:2006.14123); their sum is mean log|det J_t| at any T.
    -1 / lambda is the number of steps over which a difference falls to 1/e.

    Args:
      jacobians: [T, ..., H, H] in the order of time, from `sequence_jacobians`.
      mask: [T, ...] bool; only valid steps count.

    Returns:
      [..., H], the largest first; -inf if a product is singular, and NaN without a valid step.

    Raises:
      ValueError, TypeError: jacobians is not a floating array [T, ..., H, H], or mask does not fit.

    Cost: T products and QR decompositions of [H, H]. Nothing underflows, however large T is. The
    gradient goes through all T decompositions; it is NaN where a product is singular.

    >>> rates = lyapunov_exponents(jnp.stack([jnp.diag(jnp.array([0.5, 1.0]))] * 1000))
    >>> [round(float(rate), 3) for rate in rates]  # 0 and log 0.5; 0.5 ** 1000 itself is 0
    [0.0, -0.693]
    """
    jacobians = _require_jacobians("lyapunov_exponents", jacobians)
    lead = jacobians.shape[:-2]
    require_flags("lyapunov_exponents", {"mask": mask}, lead, "jacobians without its last two axes")
    mask = jnp.ones(lead, bool) if mask is None else replicate(jnp.asarray(mask))
    jacobians = replicate(jacobians)

    def body(carry, inputs):
        q, total = carry
        jacobian, valid = inputs
        # Where the step is masked, q is decomposed itself: its gradient is finite.
        q, r = _qr(jnp.where(valid[..., None, None], jnp.matmul(jacobian, q), q))
        growth = jnp.log(jnp.abs(jnp.diagonal(r, axis1=-2, axis2=-1)))
        return (q, total + jnp.where(valid[..., None], growth, jnp.zeros_like(growth))), None

    q = _identities(jacobians)
    (_, total), _ = lax.scan(body, (q, jnp.zeros_like(q[..., 0])), (jacobians, mask))
    rates = total / mask.sum(axis=0)[..., None].astype(total.dtype)
    return jnp.sort(rates, axis=-1, descending=True)


@jax.custom_jvp
def _svd_values(matrices):
    return _decompose(lambda m: jnp.linalg.svd(m, compute_uv=False), matrices)


@_svd_values.defjvp
def _svd_values_jvp(primals, tangents):
    """ds_i = u_i^T dA v_i."""
    u, s, vt = _decompose(lambda m: jnp.linalg.svd(m), *primals)
    return s, (jnp.matmul(u.mT, tangents[0]) * vt).sum(axis=-1)


@jax.custom_jvp
def _qr(matrices):
    return _decompose(lambda m: tuple(jnp.linalg.qr(m)), matrices)


@_qr.defjvp
def _qr_jvp(primals, tangents):
    """Q^T dA R^-1 = W + dR R^-1, with W = Q^T dQ antisymmetric and dR R^-1 upper triangular."""
    q, r = _qr(*primals)
    both = jnp.matmul(jnp.matmul(q.mT, tangents[0]), _decompose(lambda r: jnp.linalg.inv(r), r))
    w = jnp.tril(both, -1) - jnp.tril(both, -1).mT
    return (q, r), (jnp.matmul(q, w), jnp.matmul(both - w, r))


def _decompose(decomposition, matrices):
    """decomposition of [..., H, H]; on a CPU of one matrix after the other.

    A batched decomposition on a CPU blocks a thread that waits for others of the same pool, so two
    of them in one program, such as singular values and exponents, can deadlock: seen with jaxlib
    0.10.2 on two cores. Its callers have their own derivatives: JAX has none of this.
    """
    matrices = replicate(matrices)
    one_by_one = jax.custom_batching.sequential_vmap(decomposition)
    for _ in matrices.shape[:-2]:
        one_by_one = jax.vmap(one_by_one)
    return lax.platform_dependent(matrices, cpu=one_by_one, default=decomposition)


def _trace_step(function, params, x, h):
    """The trace of one step from any state, of arguments that are checked first."""
    require_params(function, params)
    require_float(function, "h", h)
    require_step(function, params, x, h, None, None, PLAIN, None, 0)
    params, x, h = jax.tree.map(jnp.asarray, (params, x, h))
    return trace_steps(params, x, h.astype(state_dtype(h.dtype)), Flags())


def _state_map(trace):
    """M [..., H, H] with th' = th M, of valid steps without a reset."""
    c, norms, scales = trace.c, trace.c.norms, trace.recurrent.scales
    w_r, w_z, w_n = blocks(trace.params.w_h.astype(c.K.dtype))
    identity = jnp.eye(w_n.shape[-1], dtype=w_n.dtype)
    kept = _map_of_gate(identity, None, None, c.K)
    through_r = _map_of_gate(w_r, scales[0], norms[0], c.R)
    through_z = _map_of_gate(w_z, scales[1], norms[1], c.Z)
    if c.Q is not None:
        return kept + through_r + through_z + _map_of_gate(w_n, scales[2], norms[2], c.Q)
    read = _map_of_gate(identity, None, None, c.r) + through_r
    return kept + through_z + _map_of_gate(matmul(read, w_n), scales[2], norms[2], c.A)


def _input_map(trace):
    """X [..., I, H] with th' = tx X, of valid steps."""
    params, c = trace.params, trace.c
    w_x, norms = params.w_x.astype(c.K.dtype), [n for _, n in input_products(params, trace.xs)]
    parts = map(_map_of_gate, blocks(w_x), blocks(params.g_x), norms, (c.R, c.Z, c.A))
    through_r, through_z, through_n = parts
    if c.Q is None:
        product = matmul(through_r, trace.recurrent.w[1])
        through_r = _map_of_gate(product, trace.recurrent.scales[2], trace.c.norms[2], c.A)
    return through_r + through_z + through_n


def _map_of_gate(w, scale, norm, coefficient):
    """N'(w) diag(coefficient), [..., K, H]; w is [K, H] or [..., K, H]."""
    w = w.reshape((1,) * (coefficient.ndim + 1 - w.ndim) + w.shape)
    norm = None if norm is None else Norm(*(v[..., None, :] for v in norm))
    return normalize_jvp(w, scale, norm) * coefficient[..., None, :]


def _state_column(trace, end, size, of_input):
    """The map of all layers' states to the state of one, [..., S, H]: M, and that of its input."""
    valid = _state_map(trace)
    lead, hidden_size = valid.ndim - 2, valid.shape[-1]
    masked = jnp.broadcast_to(jnp.eye(hidden_size, dtype=valid.dtype), valid.shape)
    rows = [(0, 0)] * lead + [(end - hidden_size, size - end), (0, 0)]
    valid, masked = (jnp.pad(trace.flags.enter_linear(v), rows) for v in (valid, masked))
    if of_input is not None:
        valid = valid + jnp.matmul(of_input, _input_map(trace))
    return trace.flags.leave(valid, masked)


def _identities(jacobians):
    """[..., H, H], an identity for every sequence, made from the Jacobians: sharded as they are."""
    zeros = jnp.zeros_like(jacobians.sum(axis=0))
    return zeros + jnp.broadcast_to(jnp.eye(zeros.shape[-1], dtype=zeros.dtype), zeros.shape)


def _require_jacobians(function, jacobians, least=3):
    """Jacobians in the state dtype; TypeError or ValueError unless [..., H, H] of `least` axes."""
    require_float(function, "jacobians", jacobians)
    shape = jacobians.shape
    if len(shape) < least or shape[-1] != shape[-2]:
        wanted = "[T, ..., H, H]" if least == 3 else "[..., H, H]"
        raise ValueError(f"{function}: jacobians must have shape {wanted}, got {shape}.")
    return jacobians.astype(state_dtype(jacobians.dtype))
