"""The GRU over a sequence: `lax.scan` over the cell, and its handwritten derivatives.

Three rules give the same numbers:

* "bptt": a `custom_vjp`. The backward sweep is a reverse scan that carries dh and nothing else; the
  gradients of weights, biases and inputs are bulk products of what it emits, a chunk at a time.
* "tangent": a `custom_jvp`. th_t = th_{t-1} M_t + e_t with every e_t made in bulk; JAX transposes
  that linear scan into the same BPTT, so every mode and order of derivative works.
* "autodiff": JAX differentiates the plain scan. The reference for the other two.

Inside, time is the leading axis, masks and resets are [T, ..., 1], and the state is in
`cell.state_dtype`.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxgru.arguments import is_traced, require_choice, require_count, require_float
from jaxgru.cell import (
    CHO_2014,
    GRUParams,
    GRUSpec,
    inputs_vjp,
    params_vjp,
    project,
    require_params,
    require_spec,
    state_dtype,
    step,
    step_drive,
    step_jvp,
    step_vjp,
)

Array = jax.Array
Gradient = Literal["bptt", "tangent", "autodiff"]
Residuals = Literal["gates", "states", "boundaries"]


@dataclasses.dataclass(frozen=True)
class _Static:
    """The choices of a call that are not arrays."""

    spec: GRUSpec
    reverse: bool
    residuals: Residuals
    chunk_size: int | None  # None: the whole sequence at once
    unroll: int


def gru(
    params: GRUParams,
    xs: Array,
    h0: Array | None = None,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    spec: GRUSpec = CHO_2014,
    reverse: bool = False,
    gradient: Gradient = "bptt",
    residuals: Residuals = "gates",
    chunk_size: int | None = None,
    unroll: int = 1,
    axis: int = 0,
) -> tuple[Array, Array]:
    """Runs a GRU over a sequence: (h_last, hs), the order of `lax.scan`.

    h_t = step(x_t, h_{t-1}) as in `jaxgru.cell`. Where `resets[t]`, h_{t-1} is zero for that step;
    where not `mask[t]`, the step holds its state: h_t = h_{t-1}.

    Args:
      params: one layer's, in the dtype of xs and h0 (float64, float32, bfloat16 or float16).
      xs: [T, ..., I]: time, any batch axes or none, input. T may be 0.
      h0: [..., H]; None for zeros.
      mask: [T, ...] bool, True where a step is real. Whatever xs holds elsewhere, NaN included,
        changes no value and no gradient. `length_mask` makes one from lengths.
      resets: [T, ...] bool, True where the state is set to zero before step t, on held steps too.
      spec: which equation; the default is Cho et al. 2014, eqs. 5-8.
      reverse: from the last step to the first; hs keeps the order of xs.
      gradient: "bptt" for reverse mode, the fastest. "tangent" for everything else: jvp, jacfwd,
        linearize, hessian, any order; **forward mode of "bptt" raises a TypeError in JAX: ask for
        gradient="tangent" there.** "autodiff" for the reference.
      residuals: what "bptt" keeps for its backward sweep. "gates": hs and r, z, n (and q, where
        spec.reset="after"). "states": hs; the gates are redone in bulk products. "boundaries": one
        state a chunk; the chunk is run again.
      chunk_size: steps that "bptt" treats at once; None picks by size, and takes all of them where
        T or B is symbolic. T need not divide by it.
      unroll: as in `lax.scan`.
      axis: where xs, mask, resets and hs have their time; 1 for batch-major [B, T, I].

    Returns:
      h_last [..., H], the state after the last step (the first, if reverse), which is the last
      real state under any mask and h0 for a length of 0; and hs [T, ..., H], time at `axis`.

    Raises:
      ValueError: a shape does not fit, a choice is unknown, or residuals or chunk_size are set for
        a gradient other than "bptt".
      TypeError: a dtype or kind is wrong; float dtypes must be the same throughout.

    Dtypes: results have the dtype of xs, each cotangent that of its primal. With bfloat16 and
    float16 every product takes half operands and sums in float32, but for those of the weight
    gradients, whose operands are float32; state, gates, and cotangents between products are
    float32. What is read back from hs is rounded there, so the residuals then differ by roundings.

    Cost: 6TBH(I + H) floating-point operations in products forward and twice that backward, half as
    much again with residuals other than "gates". Kept for the backward beside inputs and outputs,
    in numbers: 3TBH or 4TBH (reset="after") for "gates", none for "states" and "boundaries", and
    one state, BH, a chunk for each of them. "boundaries" does not keep hs either: it is free to go
    where only h_last is used.

    Sources: Cho et al. 2014 (arXiv:1406.1078), eqs. 5-8, and Chung et al. 2014 (arXiv:1412.3555),
    section 3.2, for the forward equations; the backward pass is derived in the README.

    >>> from jaxgru import init_gru
    >>> params = init_gru(jax.random.key(0), 2, 3)
    >>> xs = jnp.ones((5, 4, 2))
    >>> h_last, hs = jax.jit(gru)(params, xs)
    >>> hs.shape, bool(jnp.all(h_last == hs[-1]))
    ((5, 4, 3), True)
    """
    _require_choices(spec, reverse, gradient, residuals, chunk_size, unroll)
    xs, mask, resets, axis = _require_arrays(params, xs, h0, mask, resets, axis)
    params = jax.tree.map(jnp.asarray, params)  # NumPy arrays come as JAX's own dtypes
    h0 = None if h0 is None else jnp.asarray(h0)
    if mask is not None:
        xs = jnp.where(mask, xs, jnp.zeros_like(xs))  # before the cell: 0 * NaN is NaN
    if h0 is None:
        h0 = _zero_state(params, xs)
    params, xs, h0, mask, resets = _vary_alike((params, xs, h0, mask, resets))
    if gradient == "bptt" and chunk_size is None:
        chunk_size = _default_chunk_size(xs.shape[0], h0, residuals)
    static = _Static(spec, reverse, residuals, chunk_size, unroll)
    rule = {"bptt": _gru_bptt, "tangent": _gru_tangent, "autodiff": _gru_scan}[gradient]
    h_last, hs = rule(static, params, xs, h0, mask, resets)
    return h_last, jnp.moveaxis(hs, 0, axis)


def length_mask(lengths: Any, num_steps: int) -> Array:
    """mask[t, ...] = t < lengths[...]: True on the real steps of right-padded sequences.

    Args:
      lengths: [...] integers from 0 to num_steps.
      num_steps: T.

    Returns:
      [T, ...] bool, for `gru(..., mask=...)`; transpose it for batch-major input.

    Raises:
      TypeError: lengths are no integers.
      ValueError: a length is negative or above num_steps. Lengths that are traced cannot be read;
        for them a negative length acts as 0 and one above num_steps as num_steps.

    Cost: one comparison an entry.

    >>> length_mask([2, 0], 3).astype(int).tolist()
    [[1, 0], [1, 0], [0, 0]]
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 0:
        raise ValueError(
            f"length_mask: num_steps must be an integer of at least 0, got {num_steps!r}."
        )
    if not isinstance(lengths, jax.Array):
        lengths = np.asarray(lengths)
        lengths = lengths.astype(np.int32) if lengths.size == 0 else lengths
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"length_mask: lengths must be integers, got dtype {lengths.dtype}.")
    if not is_traced(lengths) and lengths.size:
        values = np.asarray(lengths)
        worst = values.min() if values.min() < 0 else values.max()
        if not 0 <= worst <= num_steps:
            raise ValueError(
                f"length_mask: lengths must lie between 0 and num_steps={num_steps}, got {worst}."
            )
    lengths = jnp.asarray(lengths).astype(jnp.int32)  # a narrow type could not count the steps
    steps = lax.broadcasted_iota(jnp.int32, (num_steps, *lengths.shape), 0)
    return steps < lengths[None]


def _gru_scan(static, params, xs, h0, mask, resets):
    """The plain recurrence, differentiated by JAX."""
    h_last, (hs, _), _ = _forward(static, params, xs, h0, mask, resets, keep_gates=False)
    return h_last, hs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gru_bptt(static, params, xs, h0, mask, resets):
    """The plain recurrence, keeping nothing."""
    return _gru_scan(static, params, xs, h0, mask, resets)


def _gru_bptt_fwd(static, params, xs, h0, mask, resets):
    primals = (params, xs, h0, mask, resets)
    primals = jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))
    keep_gates = static.residuals == "gates"
    h_last, (hs, gates), h_starts = _forward(static, *primals, keep_gates=keep_gates)
    kept_hs = None if static.residuals == "boundaries" else hs
    return (h_last, hs), (primals, kept_hs, gates, h_starts)


def _gru_bptt_bwd(static, residuals, cotangents):
    (params, xs, h0, mask, resets), hs, gates, h_starts = residuals
    dh_last, dhs = (None if isinstance(ct, SymbolicZero) else ct for ct in cotangents)
    dtype = h_starts.dtype
    dh_last = jnp.zeros_like(h0) if dh_last is None else dh_last

    def chunk(carry, per_step, h_start):
        dh, dparams = carry
        xs, mask, resets, hs, gates, dhs = per_step
        if static.residuals == "boundaries":
            _, (hs, gates) = _forward_chunk(static, params, h_start, xs, mask, resets, True)
        h_tm1 = _shift(static, h_start, hs, resets)
        if static.residuals == "states":
            gates = step(params, project(params, xs, static.spec), h_tm1, static.spec)[1]
        dh, da = _backward_chunk(static, params, dh, gates, h_tm1, dhs, mask, resets)
        of_chunk = params_vjp(params, xs, gates, h_tm1, da, static.spec)
        dparams = jax.tree.map(jnp.add, dparams, of_chunk)
        return (dh, dparams), inputs_vjp(params, da).astype(xs.dtype), None

    dparams = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)
    (dh, dparams), dxs, _ = _sweep(
        static,
        chunk,
        (dh_last.astype(dtype), dparams),
        (xs, mask, resets, hs, gates, dhs),
        h_starts,
        reverse=not static.reverse,
    )
    dparams = jax.tree.map(lambda d, p: d.astype(p.dtype), dparams, params)
    return dparams, dxs, dh.astype(h0.dtype), None, None


_gru_bptt.defvjp(_gru_bptt_fwd, _gru_bptt_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gru_tangent(static, params, xs, h0, mask, resets):
    """The plain recurrence."""
    return _gru_scan(static, params, xs, h0, mask, resets)


def _gru_tangent_jvp(static, primals, tangents):
    params, xs, h0, mask, resets = primals
    tparams, txs, th0 = jax.tree.map(
        lambda t: None if isinstance(t, SymbolicZero) else t,
        tangents[:3],
        is_leaf=lambda t: isinstance(t, SymbolicZero),
    )
    h_last, hs = _gru_tangent(static, *primals)  # itself differentiable: every order
    spec, dtype = static.spec, state_dtype(h0.dtype)
    h_tm1 = _shift(static, h0.astype(dtype), hs, resets)
    gates = step(params, project(params, xs, spec), h_tm1, spec)[1]
    drive = step_drive(params, tparams, xs, txs, gates, h_tm1, spec)
    th0 = jnp.zeros_like(h0) if th0 is None else th0

    def body(th, inputs):
        gates, h_tm1, drive, mask, resets = inputs
        th_tm1 = _zero_where(resets, th)
        th_t = step_jvp(params, gates, h_tm1, th_tm1, drive, spec)
        th_t = _hold(mask, th_t, th_tm1)
        return th_t, th_t.astype(hs.dtype)

    inputs = (gates, h_tm1, drive, mask, resets)
    th, ths = lax.scan(
        body, th0.astype(dtype), inputs, reverse=static.reverse, unroll=static.unroll
    )
    return (h_last, hs), (th.astype(h_last.dtype), ths)


_gru_tangent.defjvp(_gru_tangent_jvp, symbolic_zeros=True)


def _forward(static, params, xs, h0, mask, resets, *, keep_gates):
    """h_last, (hs, gates or None), and the state at the start of each chunk [K, ..., H]."""

    def chunk(h, per_step, _):
        xs, mask, resets = per_step
        h_end, outputs = _forward_chunk(static, params, h, xs, mask, resets, keep_gates)
        return h_end, outputs, h

    h = h0.astype(state_dtype(h0.dtype))
    h, outputs, h_starts = _sweep(
        static, chunk, h, (xs, mask, resets), None, reverse=static.reverse
    )
    return h.astype(h0.dtype), outputs, h_starts


def _forward_chunk(static, params, h, xs, mask, resets, keep_gates) -> tuple[Any, Any]:
    """A chunk's last state and (hs, gates or None): projection in bulk, then the scan."""

    def body(h, inputs):
        a, mask, resets = inputs
        h_tm1 = _zero_where(resets, h)
        h_t, gates = step(params, a, h_tm1, static.spec)
        h_t = _hold(mask, h_t, h_tm1)
        return h_t, (h_t.astype(xs.dtype), gates if keep_gates else None)

    inputs = (project(params, xs, static.spec), mask, resets)
    return lax.scan(body, h, inputs, reverse=static.reverse, unroll=static.unroll)


def _backward_chunk(static, params, dh, gates, h_tm1, dhs, mask, resets):
    """dh before the chunk and the cotangents of a_r, a_z, a_n (and q) of each of its steps."""

    def body(dh, inputs):
        gates, h_tm1, dh_t, mask, resets = inputs
        dh = dh if dh_t is None else dh + dh_t.astype(dh.dtype)
        through = None if mask is None else jnp.where(mask, jnp.zeros_like(dh), dh)
        dh = dh if mask is None else jnp.where(mask, dh, jnp.zeros_like(dh))
        dh_tm1, da = step_vjp(params, gates, h_tm1, dh, static.spec)
        dh_tm1 = dh_tm1 if through is None else dh_tm1 + through
        return _zero_where(resets, dh_tm1), da

    inputs = (gates, h_tm1, dhs, mask, resets)
    return lax.scan(body, dh, inputs, reverse=not static.reverse, unroll=static.unroll)


def _sweep(static, chunk, carry, per_step, per_chunk, *, reverse):
    """Scans `chunk` over time in chunks; a last one takes the steps that are left over.

    chunk(carry, per_step, per_chunk) -> carry, per_step outputs, per_chunk outputs. Leaves of
    per_step are [T, ...] and those of per_chunk [number of chunks, ...], in and out.
    """
    num_steps, size = jax.tree.leaves(per_step)[0].shape[0], static.chunk_size
    if size is None or size >= num_steps:
        carry, steps, chunks = chunk(carry, per_step, jax.tree.map(lambda v: v[0], per_chunk))
        return carry, steps, jax.tree.map(lambda v: v[None], chunks)
    count, rest = divmod(num_steps, size)
    full = count * size

    def run_full(carry):
        split = jax.tree.map(lambda v: v[:full].reshape(count, size, *v.shape[1:]), per_step)
        inputs = (split, jax.tree.map(lambda v: v[:count], per_chunk))

        def body(carry, inputs):
            carry, *outputs = chunk(carry, *inputs)
            return carry, outputs

        carry, (steps, chunks) = lax.scan(body, carry, inputs, reverse=reverse)
        return carry, jax.tree.map(lambda v: v.reshape(full, *v.shape[2:]), steps), chunks

    def run_rest(carry):
        steps = jax.tree.map(lambda v: v[full:], per_step)
        carry, steps, chunks = chunk(carry, steps, jax.tree.map(lambda v: v[count], per_chunk))
        return carry, steps, jax.tree.map(lambda v: v[None], chunks)

    if rest == 0:
        return run_full(carry)
    if reverse:
        carry, *late = run_rest(carry)
        carry, *early = run_full(carry)
    else:
        carry, *early = run_full(carry)
        carry, *late = run_rest(carry)
    steps, chunks = jax.tree.map(lambda u, v: jnp.concatenate([u, v]), early, late)
    return carry, steps, chunks


def _shift(static, h_start, hs, resets):
    """h_{t-1} of every step, as the step saw it: joined first and sliced after, so T may be 0."""
    hs, h_start = hs.astype(h_start.dtype), h_start[None]
    if static.reverse:
        h_tm1 = jnp.concatenate([hs, h_start])[1:]
    else:
        h_tm1 = jnp.concatenate([h_start, hs])[:-1]
    return _zero_where(resets, h_tm1)


def _zero_where(resets, h):
    """0 where reset, else h."""
    return h if resets is None else jnp.where(resets, jnp.zeros_like(h), h)


def _hold(mask, h_t, h_tm1):
    """h_t on real steps, h_tm1 on the others."""
    return h_t if mask is None else jnp.where(mask, h_t, h_tm1)


def _zero_state(params, xs):
    """Zeros [..., H], made from the data so that they are sharded as the state will be.

    Only their type comes from the product; no value of it is used and jit leaves it out.
    """
    return jnp.zeros_like(project(params, xs.sum(axis=0), CHO_2014)[0], dtype=xs.dtype)


def _vary_alike(tree):
    """The tree with every leaf varying over all mesh axes that any leaf varies over.

    Inside `jax.shard_map` the scan's carry and the cotangents then have one type, and JAX's own
    transpose of this cast sums the parameters' gradient over the mesh, once.
    """
    axes = frozenset().union(*(_varying_axes(v) for v in jax.tree.leaves(tree)))

    def cast(v):
        missing = tuple(sorted(axes - _varying_axes(v), key=str))
        return lax.pcast(v, missing, to="varying") if missing else v

    return jax.tree.map(cast, tree) if axes else tree


def _varying_axes(v):
    """The mesh axes over which v varies inside `jax.shard_map`; JAX 0.10 renamed where it says."""
    kind = jax.typeof(v)
    kind = getattr(kind, "manual_axis_type", kind)
    return getattr(kind, "varying", None) or getattr(kind, "vma", frozenset())


def _default_chunk_size(num_steps, h0, residuals):
    """The chunk whose temporaries stay in a core's cache; sqrt(T) where only its ends are kept.

    A divisor of T where one is near, so that no shorter last chunk is compiled. None, the whole
    sequence, where a size is symbolic (`jax.export`) and cannot be compared.
    """
    if not all(isinstance(size, int) for size in (num_steps, *h0.shape)):
        return None
    if residuals == "boundaries":
        target = max(1, math.isqrt(num_steps))
    elif num_steps * h0.size <= _WHOLE_SEQUENCE:
        return max(1, num_steps)
    else:
        target = min(max(_CHUNK // max(1, h0.size), 16), 32)
    near = [size for size in range(target, 2 * target) if num_steps % size == 0]
    return near[0] if near else target


# Numbers of state entries, T * B * H and chunk_size * B * H; measured on two cores with
# `python -m experiments.benchmarks.scan`.
_WHOLE_SEQUENCE = 1 << 18
_CHUNK = 1 << 17


def _require_choices(spec, reverse, gradient, residuals, chunk_size, unroll):
    """TypeError or ValueError naming the choice that is none."""
    require_spec("gru", spec)
    require_choice("gru", "gradient", gradient, get_args(Gradient))
    require_choice("gru", "residuals", residuals, get_args(Residuals))
    require_count("gru", "unroll", unroll)
    if not isinstance(reverse, bool):
        raise TypeError(f"gru: reverse must be a bool, got {reverse!r}.")
    if chunk_size is not None:
        require_count("gru", "chunk_size", chunk_size)
    if gradient != "bptt" and (residuals != "gates" or chunk_size is not None):
        raise ValueError(
            f"gru: residuals and chunk_size belong to gradient='bptt' and must be left out with "
            f"gradient={gradient!r}, got residuals={residuals!r}, chunk_size={chunk_size}."
        )


def _require_arrays(params, xs, h0, mask, resets, axis):
    """(xs, mask, resets, axis) with time in front and flags [T, ..., 1]; errors name the array."""
    input_size, hidden_size = require_params("gru", params)
    require_float("gru", "xs", xs, params.w_x.dtype)
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"gru: axis must be an integer, got {axis!r}.")
    if xs.ndim < 2 or xs.shape[-1] != input_size:
        raise ValueError(
            f"gru: xs must have shape [T, ..., I] with I={input_size} (rows of params.w_x), "
            f"got {xs.shape}."
        )
    if not -xs.ndim <= axis < xs.ndim - 1 or axis == -1:
        raise ValueError(
            f"gru: axis must name an axis of xs other than its last, got {axis} for shape "
            f"{xs.shape}."
        )
    axis %= xs.ndim
    time_and_batch = xs.shape[:-1]
    for name, flags in (("mask", mask), ("resets", resets)):
        if flags is None:
            continue
        if getattr(flags, "dtype", None) != jnp.bool_:
            found = getattr(flags, "dtype", type(flags).__name__)
            raise TypeError(f"gru: {name} must be a bool array, got {found}.")
        if flags.shape != time_and_batch:
            raise ValueError(
                f"gru: {name} must have shape {time_and_batch} (xs without its last axis), "
                f"got {flags.shape}."
            )
    if h0 is not None:
        require_float("gru", "h0", h0, params.w_x.dtype)
        wanted = (*time_and_batch[:axis], *time_and_batch[axis + 1 :], hidden_size)
        if h0.shape != wanted:
            raise ValueError(
                f"gru: h0 must have shape {wanted} (the batch axes of xs, then H={hidden_size} "
                f"rows of params.w_h), got {h0.shape}."
            )

    def prepare(flags):
        return None if flags is None else jnp.moveaxis(flags, axis, 0)[..., None]

    return jnp.moveaxis(xs, axis, 0), prepare(mask), prepare(resets), axis
