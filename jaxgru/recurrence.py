"""The GRU over a sequence: `lax.scan` over the cell, and its handwritten derivatives.

Three rules give the same numbers:

* "bptt": a `custom_vjp`. The backward sweep is a reverse scan that carries dh and nothing else; the
  gradients of weights, biases and inputs are bulk products of what it emits, a chunk at a time.
* "tangent": a `custom_jvp`. th_t = th_{t-1} M_t + e_t with every e_t made in bulk; JAX transposes
  that linear scan into the same BPTT, so every mode and order of derivative works.
* "autodiff": JAX differentiates the plain scan. The reference for the other two.

Inside, time is the leading axis, flags are [T, ..., 1] (the mask [T, ..., H] once zoneout is drawn
into it), and the state is in `products.state_dtype`.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxgru.arguments import (
    require_axis,
    require_choice,
    require_count,
    require_first_step,
    require_float,
    require_rates,
)
from jaxgru.cell import (
    coefficients,
    cut_recurrent,
    gates_vjp,
    inputs_vjp,
    params_vjp,
    project,
    step,
    step_drive,
    step_jvp,
    step_vjp,
    transpose_recurrent,
)
from jaxgru.kernels import Backend, fused_backward, fused_forward, require_fused
from jaxgru.masks import draw_kept, draw_kept_per_step, require_flags
from jaxgru.parameters import CHO_2014, GRUParams, GRUSpec, require_params, require_spec
from jaxgru.products import state_dtype, vary_alike
from jaxgru.sweeps import default_chunk_size, default_residuals, sweep
from jaxgru.tiles import count_terms

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
    zoneout: float  # share of the units that a key holds at each step
    kept: float  # share of every unit that is held at each step: the mean of the above
    backend: Backend
    terms: int  # of an operand of the fused kernels: the precision of the call, not of its backward


class Tap(NamedTuple):
    """Zeros that `gru` adds to its inputs and states; None where nothing is to be seen.

    The gradient of a loss by a tap is a Tap of dL/dx_t and dL/dh_t for every step, h_t being what
    step t hands on to its output and to step t + 1.
    """

    xs: Array | None  # [T, ..., I]
    hs: Array | None  # [T, ..., H]


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
    residuals: Residuals | None = None,
    chunk_size: int | None = None,
    unroll: int = 1,
    backend: Backend = "scan",
    truncate: int | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    key: Array | None = None,
    first_step: int | Array = 0,
    deterministic: bool = False,
    tap: Tap | None = None,
    axis: int = 0,
) -> tuple[Array, Array]:
    """Runs a GRU over a sequence: (h_last, hs), the order of `lax.scan`.

    h_t = step(x_t, h_{t-1}) as in `jaxgru.cell`. Where `resets[t]`, h_{t-1} is zero for that step;
    where not `mask[t]`, the step holds its state: h_t = h_{t-1}.

    With recurrent dropout at rate p the products with w_h read d * h_{t-1} in place of h_{t-1}, one
    d for all steps, of entries 0 and 1/(1 - p). With zoneout at rate p each step holds each unit
    with probability p; its mean, h_t = p h_{t-1} + (1 - p) step(x_t, h_{t-1}), is what runs where
    deterministic.

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
        state a chunk; the chunk is run again. None picks by size between the first two: "states"
        for many rows of few numbers (T B H above 2^19 and I + H up to 256), whose gates are redone
        sooner than stored; "gates" where a size is symbolic.
      chunk_size: steps that "bptt" treats at once; None picks by size, and takes all of them where
        T or B is symbolic ("boundaries" then saves nothing), and on a mesh with Auto axes, where
        the devices add up their gradients once a chunk. T need not divide by it.
      unroll: as in `lax.scan`.
      backend: what runs the sequence. "scan": `lax.scan`, on CPU, GPU and TPU. "fused": one kernel
        for the whole sequence each way, for NVIDIA's Hopper GPUs (H100, H200); experimental, for it
        has run in JAX's interpreter alone. "interpreted": those kernels in that interpreter, on one
        CPU device and not inside `jax.checkpoint`, for tests: slow. See the cost below.
      truncate: parts time in windows of that many steps, [0, truncate), ..., and cuts the gradient
        of the state between them: truncated backpropagation through time. Values stay, and so does
        what is kept for the backward. None cuts nothing.
      recurrent_dropout: rate in [0, 1) of Gal and Ghahramani's dropout of the state that is read.
      zoneout: rate in [0, 1) of Krueger et al.'s zoneout.
      key: a `jax.random.key` for the two; the same key draws the same masks at the same steps,
        whatever the policy, the direction and the padding.
      first_step: the number of the first step of xs, for zoneout's draws and the windows of
        truncate: with it a run in chunks and one key is the whole run. May be traced.
      deterministic: no dropout, and zoneout's mean: for evaluation; key is not used.
      tap: a `Tap` of zeros, as `init_taps` makes them, to differentiate by: the gradient of a loss
        by it is dL/dx_t and dL/dh_t of every step, out of the same backward pass. What it holds is
        added to xs and to every h_t, so zeros change nothing.
      axis: where xs, mask, resets and hs have their time; 1 for batch-major [B, T, I].

    Returns:
      h_last [..., H], the state after the last step (the first, if reverse), which is the last
      real state under any mask and h0 for a length of 0; and hs [T, ..., H], time at `axis`.

    Raises:
      ValueError: a shape does not fit, a choice is unknown, or residuals or chunk_size are set for
        a gradient other than "bptt", a rate is outside [0, 1), or one acts without a key; or
        backend="fused" is asked for what it lacks: a gradient other than "bptt", gains, an unroll,
        a symbolic size, or more hidden units than fit (the error says how many do). On another
        device than such a GPU JAX refuses the kernel when it compiles it.
      TypeError: a dtype or kind is wrong; float dtypes must be the same throughout, and not float64
        for "fused".
      NotImplementedError: a second derivative of "fused"; what JAX's interpreter cannot do.

    Dtypes: results have the dtype of xs, each cotangent that of its primal. With bfloat16 and
    float16 every product takes half operands and sums in float32, but for those of the weight
    gradients, whose operands are float32; state, gates, and cotangents between products are
    float32. What is read back from hs is rounded there, so the residuals then differ by roundings.

    Cost: 6TBH(I + H) floating-point operations in products forward and twice that backward, half as
    much again with residuals other than "gates". Kept for the backward beside inputs and outputs,
    in numbers: 3TBH or 4TBH (reset="after") for "gates", none for "states" and "boundaries", and
    one state, BH, a chunk for each of them; the backward of a chunk of C steps sets aside about
    12CBH, with redone gates 16CBH. "boundaries" does not keep hs either: it is free to go
    where only h_last is used. Gains add 3T(BH + B) to "gates", and the product
    x w_x is made again in the backward. "bptt" keeps zoneout's key alone and draws its masks again;
    recurrent dropout keeps BH. A tap costs its own size and that of its gradient, TB(I + H) each.

    With backend="fused" w_h stays in the GPU's shared memory, so H may be 512 for half types, and
    256 for float32, whose products are three of bfloat16 there (16 bits an operand); 512 and one
    product under `jax.default_matmul_precision("bfloat16")`, 128 and six (24 bits) under "highest".
    residuals are "states" unless told, and all of T is one chunk. It has first derivatives alone.
    Arrays that several devices share need `jax.shard_map` around it.

    Sources: Cho et al. 2014 (arXiv:1406.1078), eqs. 5-8, and Chung et al. 2014 (arXiv:1412.3555),
    section 3.2, for the forward equations; Gal and Ghahramani 2016 (arXiv:1512.05287), eq. 7, for
    recurrent dropout; Krueger et al. 2017 (arXiv:1606.01305), eq. 2, for zoneout; the backward pass
    is derived in the README.

    >>> from jaxgru import init_gru
    >>> params = init_gru(jax.random.key(0), 2, 3)
    >>> xs = jnp.ones((5, 4, 2))
    >>> h_last, hs = jax.jit(gru)(params, xs)
    >>> hs.shape, bool(jnp.all(h_last == hs[-1]))
    ((5, 4, 3), True)
    """
    _require_choices(spec, reverse, gradient, residuals, chunk_size, unroll, truncate)
    rates = {"recurrent_dropout": recurrent_dropout, "zoneout": zoneout}
    require_rates("gru", rates, key, deterministic)
    xs, mask, resets, axis = _require_arrays(params, xs, h0, mask, resets, axis)
    require_choice("gru", "backend", backend, get_args(Backend))
    if backend != "scan":
        require_fused(backend, gradient, unroll, params, xs)
    params = jax.tree.map(jnp.asarray, params)  # NumPy arrays come as JAX's own dtypes
    h0 = None if h0 is None else jnp.asarray(h0)
    tap_xs, tap_hs = _require_tap(tap, params, xs, axis)
    xs = xs if tap_xs is None else xs + tap_xs
    if mask is not None:
        xs = jnp.where(mask, xs, jnp.zeros_like(xs))  # before the cell: 0 * NaN is NaN
    if h0 is None:
        h0 = _zero_state(params, xs)
    require_first_step("gru", first_step)
    numbers = first_step + lax.broadcasted_iota(jnp.int32, (xs.shape[0],), 0)
    cuts = None if truncate is None else _cuts(numbers // truncate, mask, h0, reverse)
    scale = zoneout_key = None
    if key is not None and not deterministic and (recurrent_dropout or zoneout):
        scale_key, zoneout_key = jax.random.split(key)
        scale = _draw_scale(scale_key, recurrent_dropout, h0) if recurrent_dropout else None
        zoneout_key = zoneout_key if zoneout else None
    kept, zoneout = (zoneout, 0.0) if deterministic else (0.0, zoneout)
    arrays = (params, xs, h0, mask, resets, cuts, tap_hs, scale)
    params, xs, h0, mask, resets, cuts, tap_hs, scale = vary_alike(arrays, zoneout_key)
    fused = backend != "scan"  # redoes gates in bulk and takes all of time at once, unless told
    residuals = residuals or ("states" if fused else default_residuals(xs, h0))
    if gradient == "bptt" and chunk_size is None and (residuals == "boundaries" or not fused):
        chunk_size = default_chunk_size(xs.shape[0], h0, residuals)
    static = _Static(
        spec,
        reverse,
        residuals,
        chunk_size,
        unroll,
        float(zoneout),
        float(kept),
        backend,
        count_terms(xs.dtype),
    )
    numbers = None if zoneout_key is None else numbers
    steps = _Steps(xs, mask, resets, cuts, numbers, tap_hs)
    rule = {"bptt": _gru_bptt, "tangent": _gru_tangent, "autodiff": _gru_scan}[gradient]
    h_last, hs = rule(static, params, steps, h0, scale, zoneout_key)
    return h_last, jnp.moveaxis(hs, 0, axis)


class _Steps(NamedTuple):
    """What each step is given, [T, ...]; None where there is nothing."""

    xs: Array
    mask: Array | None  # [T, ..., 1], or [T, ..., H] with zoneout drawn
    resets: Array | None  # [T, ..., 1]
    cuts: Array | None  # [T, ..., 1], or [T]: where the gradient of the state that is read ends
    numbers: Array | None  # [T], what zoneout draws by
    tap: Array | None  # [T, ..., H], added to h_t


def _gru_scan(static, params, steps, h0, scale, key):
    """The plain recurrence, differentiated by JAX."""
    h_last, (hs, _), _ = _forward(static, params, steps, h0, scale, key, keep_gates=False)
    return h_last, hs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gru_bptt(static, params, steps, h0, scale, key):
    """The plain recurrence, keeping nothing."""
    return _gru_scan(static, params, steps, h0, scale, key)


def _gru_bptt_fwd(static, params, steps, h0, scale, key):
    primals = (params, steps, h0, scale, key)
    primals = jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))
    keep_gates = static.residuals == "gates"
    h_last, (hs, gates), h_starts = _forward(static, *primals, keep_gates=keep_gates)
    kept_hs = None if static.residuals == "boundaries" else hs
    return (h_last, hs), (primals, kept_hs, gates, h_starts)


def _gru_bptt_bwd(static, residuals, cotangents):
    (params, steps, h0, scale, key), hs, gates, h_starts = residuals
    dh_last, dhs = (None if isinstance(ct, SymbolicZero) else ct for ct in cotangents)
    dtype, recurrent = h_starts.dtype, cut_recurrent(params, static.spec)
    transposed, w_x_t = transpose_recurrent(recurrent), params.w_x.T
    dh_last = jnp.zeros_like(h0) if dh_last is None else dh_last

    def chunk(carry, per_step, h_start):
        dh, dparams = carry
        steps, hs, gates, dhs = per_step
        if static.residuals == "boundaries":
            _, (hs, gates) = _forward_chunk(
                static, params, recurrent, h_start, steps, scale, key, True
            )
        h_tm1 = _shift(static, h_start, hs, steps)
        if static.residuals == "states":
            a = project(params, steps.xs, static.spec)
            gates = step(recurrent, a, h_tm1, static.spec, scale)[1]
        steps = _with_zoneout(static, steps, key, dh)
        c = coefficients(gates, h_tm1, static.spec, scale)
        if static.backend == "scan":
            dh, (dh_t, dp, dtap) = _backward_chunk(
                static, transposed, dh, c, gates.norms, dhs, steps, scale
            )
        else:
            dh, (dh_t, dp, dtap) = _backward_fused(static, params, dh, c, dhs, steps, scale)
        da, du = gates_vjp(c, dh_t, dp)
        of_chunk = params_vjp(params, steps.xs, gates, h_tm1, da, du, static.spec, scale)
        dparams = jax.tree.map(jnp.add, dparams, of_chunk)
        dxs = inputs_vjp(params, w_x_t, steps.xs, da).astype(steps.xs.dtype)
        dtap = None if dtap is None else dtap.astype(steps.xs.dtype)
        return (dh, dparams), (dxs, dtap), None

    dparams = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)
    (dh, dparams), (dxs, dtap), _ = sweep(
        static.chunk_size,
        chunk,
        (dh_last.astype(dtype), dparams),
        (steps, hs, gates, dhs),
        h_starts,
        reverse=not static.reverse,
    )
    dparams = jax.tree.map(lambda d, p: d.astype(p.dtype), dparams, params)
    dsteps = _Steps(dxs, None, None, None, None, dtap)
    return dparams, dsteps, dh.astype(h0.dtype), None, None


_gru_bptt.defvjp(_gru_bptt_fwd, _gru_bptt_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gru_tangent(static, params, steps, h0, scale, key):
    """The plain recurrence."""
    return _gru_scan(static, params, steps, h0, scale, key)


def _gru_tangent_jvp(static, primals, tangents):
    params, steps, h0, scale, key = primals
    tparams, txs, ttap, th0 = jax.tree.map(
        lambda t: None if isinstance(t, SymbolicZero) else t,
        (tangents[0], tangents[1].xs, tangents[1].tap, tangents[2]),
        is_leaf=lambda t: isinstance(t, SymbolicZero),
    )
    h_last, hs = _gru_tangent(static, *primals)  # itself differentiable: every order
    spec, dtype = static.spec, state_dtype(h0.dtype)
    h_tm1 = _shift(static, h0.astype(dtype), hs, steps)
    recurrent = cut_recurrent(params, spec)
    gates = step(recurrent, project(params, steps.xs, spec), h_tm1, spec, scale)[1]
    drive = step_drive(params, tparams, steps.xs, txs, gates, h_tm1, spec, scale)
    th0 = (jnp.zeros_like(h0) if th0 is None else th0).astype(dtype)
    steps = _with_zoneout(static, steps, key, th0)

    def body(th, inputs):
        c, norms, drive, mask, resets, cuts, ttap = inputs
        th_tm1 = _zero_where(cuts, _zero_where(resets, th))
        th_t = step_jvp(recurrent, c, norms, th_tm1, drive, scale)
        th_t = _add_tap(_hold(static, mask, th_t, th_tm1), ttap)
        return th_t, th_t.astype(hs.dtype)

    c = coefficients(gates, h_tm1, spec, scale)
    inputs = (c, gates.norms, drive, steps.mask, steps.resets, steps.cuts, ttap)
    th, ths = lax.scan(body, th0, inputs, reverse=static.reverse, unroll=static.unroll)
    return (h_last, hs), (th.astype(h_last.dtype), ths)


_gru_tangent.defjvp(_gru_tangent_jvp, symbolic_zeros=True)


def _forward(static, params, steps, h0, scale, key, *, keep_gates):
    """h_last, (hs, gates or None), and the state at the start of each chunk [K, ..., H]."""

    def chunk(h, steps, _):
        h_end, outputs = _forward_chunk(static, params, recurrent, h, steps, scale, key, keep_gates)
        return h_end, outputs, h

    h, recurrent = h0.astype(state_dtype(h0.dtype)), cut_recurrent(params, static.spec)
    h, outputs, h_starts = sweep(static.chunk_size, chunk, h, steps, None, reverse=static.reverse)
    return h.astype(h0.dtype), outputs, h_starts


def _forward_chunk(static, params, recurrent, h, steps, scale, key, keep_gates) -> tuple[Any, Any]:
    """A chunk's last state and (hs, gates or None): projection in bulk, then the scan."""

    def body(h, inputs):
        a, mask, resets, cuts, tap = inputs
        h_tm1 = _stop_where(cuts, _zero_where(resets, h))
        h_t, gates = step(recurrent, a, h_tm1, static.spec, scale)
        h_t = _add_tap(_hold(static, mask, h_t, h_tm1), tap)
        return h_t, (h_t.astype(steps.xs.dtype), gates if keep_gates else None)

    steps = _with_zoneout(static, steps, key, h)
    a = project(params, steps.xs, static.spec)
    if static.backend != "scan":
        return fused_forward(static, params, h, a, steps, scale, keep_gates)
    inputs = (a, steps.mask, steps.resets, steps.cuts, steps.tap)
    return lax.scan(body, h, inputs, reverse=static.reverse, unroll=static.unroll)


def _backward_chunk(static, transposed, dh, c, norms, dhs, steps, scale):
    """dh before the chunk; and, of each step, the cotangents of h_t, of what w_hn reads, of a tap.

    Those of h_t are what enters the step: a held step keeps its own from it, but not from a tap.
    """

    def body(dh, inputs):
        c, norms, dh_t, mask, resets, cuts = inputs
        dh = dh if dh_t is None else dh + dh_t.astype(dh.dtype)
        dtap = None if steps.tap is None else dh
        dh, held = _hold_vjp(static, mask, dh)
        dh_tm1, dp = step_vjp(transposed, c, norms, dh, scale)
        dh_tm1 = dh_tm1 if held is None else dh_tm1 + held
        return _zero_where(resets, _zero_where(cuts, dh_tm1)), (dh, dp, dtap)

    inputs = (c, norms, dhs, steps.mask, steps.resets, steps.cuts)
    return lax.scan(body, dh, inputs, reverse=not static.reverse, unroll=static.unroll)


def _backward_fused(static, params, dh, c, dhs, steps, scale):
    """The same by the fused kernel, which gives the whole cotangent of every h_t, a tap's."""
    dh, (dtap, dp) = fused_backward(static, params, dh, c, dhs, steps, scale)
    return dh, (_hold_vjp(static, steps.mask, dtap)[0], dp, None if steps.tap is None else dtap)


def _with_zoneout(static, steps, key, h):
    """The steps with the units that zoneout holds, drawn again from the key, in their mask."""
    if key is None:
        return steps
    written = draw_kept_per_step(key, static.zoneout, steps.numbers, h.shape, h)
    return steps._replace(mask=written if steps.mask is None else steps.mask & written)


def _cuts(windows, mask, h0, reverse):
    """Where a real step lies in another window [T] than the real step run before it: [T, ..., 1].

    Before the first real step there is none, so that no padding parts a sequence from its states.
    """
    shape = (windows.shape[0],) + (1,) * h0.ndim
    windows, mask = windows.reshape(shape), jnp.ones(shape, bool) if mask is None else mask
    none = jnp.int32(jnp.iinfo(jnp.int32).max if reverse else -1)
    passed = jnp.where(mask, windows, none)
    edge = jnp.full_like(passed, none, shape=(1, *passed.shape[1:]))
    if reverse:
        before = jnp.concatenate([lax.cummin(passed, axis=0, reverse=True), edge])[1:]
    else:
        before = jnp.concatenate([edge, lax.cummax(passed, axis=0)])[:-1]
    return mask & (before != none) & (before != windows)


def _shift(static, h_start, hs, steps):
    """h_{t-1} of every step, as the step saw it: joined first and sliced after, so T may be 0."""
    hs, h_start = hs.astype(h_start.dtype), h_start[None]
    if static.reverse:
        h_tm1 = jnp.concatenate([hs, h_start])[1:]
    else:
        h_tm1 = jnp.concatenate([h_start, hs])[:-1]
    return _stop_where(steps.cuts, _zero_where(steps.resets, h_tm1))


def _stop_where(cuts, h):
    """h, without its gradient where cut: derivatives of a derivative need it too."""
    return h if cuts is None else jnp.where(cuts, lax.stop_gradient(h), h)


def _zero_where(resets, h):
    """0 where reset, else h."""
    return h if resets is None else jnp.where(resets, jnp.zeros_like(h), h)


def _hold(static, mask, h_t, h_tm1):
    """h_t on real steps, h_tm1 on the others; on real ones a share may be kept."""
    if static.kept:
        h_t = (1 - static.kept) * h_t + static.kept * h_tm1
    return h_t if mask is None else jnp.where(mask, h_t, h_tm1)


def _add_tap(h_t, tap):
    """h_t, with what a tap adds to it."""
    return h_t if tap is None else h_t + tap.astype(h_t.dtype)


def _hold_vjp(static, mask, dh):
    """The transpose of `_hold`: the cotangents of h_t and, None for zero, of h_tm1."""
    held = None
    if mask is not None:
        zero = jnp.zeros_like(dh)
        dh, held = jnp.where(mask, dh, zero), jnp.where(mask, zero, dh)
    if static.kept:
        kept = static.kept * dh
        dh, held = (1 - static.kept) * dh, kept if held is None else held + kept
    return dh, held


def _zero_state(params, xs):
    """Zeros [..., H], made from the data so that they are sharded as the state will be.

    Only their type comes from the product; no value of it is used and jit leaves it out.
    """
    return jnp.zeros_like(project(params, xs.sum(axis=0), CHO_2014)[0], dtype=xs.dtype)


def _draw_scale(key, rate, h0):
    """1/(1 - rate) with probability 1 - rate, else 0, in the shape of h0 and the state dtype."""
    kept = draw_kept(key, rate, h0.shape, h0)
    return kept.astype(state_dtype(h0.dtype)) / (1 - rate)


def _require_choices(spec, reverse, gradient, residuals, chunk_size, unroll, truncate):
    """TypeError or ValueError naming the choice that is none."""
    require_spec("gru", spec)
    require_choice("gru", "gradient", gradient, get_args(Gradient))
    if residuals is not None:
        require_choice("gru", "residuals", residuals, get_args(Residuals))
    require_count("gru", "unroll", unroll)
    if not isinstance(reverse, bool):
        raise TypeError(f"gru: reverse must be a bool, got {reverse!r}.")
    for name, count in (("chunk_size", chunk_size), ("truncate", truncate)):
        if count is not None:
            require_count("gru", name, count)
    if gradient != "bptt" and (residuals, chunk_size) != (None, None):
        raise ValueError(
            f"gru: residuals and chunk_size belong to gradient='bptt' and must be left out with "
            f"gradient={gradient!r}, got residuals={residuals!r}, chunk_size={chunk_size}."
        )


def _require_arrays(params, xs, h0, mask, resets, axis):
    """(xs, mask, resets, axis) with time in front and flags [T, ..., 1]; errors name the array."""
    input_size, hidden_size = require_params("gru", params)
    require_float("gru", "xs", xs, params.w_x.dtype)
    if xs.ndim < 2 or xs.shape[-1] != input_size:
        raise ValueError(
            f"gru: xs must have shape [T, ..., I] with I={input_size} (rows of params.w_x), "
            f"got {xs.shape}."
        )
    axis = require_axis("gru", axis, xs.shape)
    time_and_batch = xs.shape[:-1]
    require_flags("gru", {"mask": mask, "resets": resets}, time_and_batch)
    if h0 is not None:
        require_float("gru", "h0", h0, params.w_x.dtype)
        wanted = (*time_and_batch[:axis], *time_and_batch[axis + 1 :], hidden_size)
        if h0.shape != wanted:
            batch_major = axis == 0 and h0.shape[:1] == xs.shape[:1]
            cure = "; for batch-major xs pass axis=1" if batch_major else ""
            raise ValueError(
                f"gru: h0 must have shape {wanted} (the batch axes of xs, then H={hidden_size} "
                f"rows of params.w_h), got {h0.shape}{cure}."
            )

    def prepare(flags):
        return None if flags is None else jnp.moveaxis(flags, axis, 0)[..., None]

    return jnp.moveaxis(xs, axis, 0), prepare(mask), prepare(resets), axis


def _require_tap(tap, params, xs, axis):
    """(xs, hs) of a tap with time in front, each None or as xs and hs; errors name the array."""
    if tap is None:
        return None, None
    if not isinstance(tap, Tap):
        raise TypeError(
            f"gru: tap must be a Tap of two arrays, got {type(tap).__name__}; init_taps makes one."
        )
    lead = jnp.moveaxis(xs, 0, axis).shape[:-1]
    sizes = {"xs": params.w_x.shape[0], "hs": params.w_h.shape[0]}
    for (name, size), value in zip(sizes.items(), tap):
        if value is None:
            continue
        require_float("gru", f"tap.{name}", value, params.w_x.dtype)
        if value.shape != (*lead, size):
            raise ValueError(
                f"gru: tap.{name} must have shape {(*lead, size)} (as {name}), got {value.shape}; "
                "init_taps(params, xs.shape[:-1]) makes it."
            )
    return tuple(None if v is None else jnp.moveaxis(v, axis, 0) for v in tap)
