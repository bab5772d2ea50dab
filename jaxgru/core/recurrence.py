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

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.bptt import gru_bptt
from jaxgru.core.cell import project
from jaxgru.core.checks import (
    require_axis,
    require_choice,
    require_count,
    require_first_step,
    require_flags,
    require_float,
    require_rates,
)
from jaxgru.core.chunks import default_chunk_size, default_residuals
from jaxgru.core.flags import Steps, truncation_cuts
from jaxgru.core.noise import draw_scale
from jaxgru.core.parameters import GRUParams, require_params
from jaxgru.core.scan import Residuals, Static, scan_gru
from jaxgru.core.sharding import vary_alike
from jaxgru.core.tangent import gru_tangent
from jaxgru.experimental.fused.kernels import Backend, require_fused
from jaxgru.experimental.fused.tiling import count_terms

Array = jax.Array
Gradient = Literal["bptt", "tangent", "autodiff"]


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

    h_t = step(x_t, h_{t-1}) as in `jaxgru.core.cell`. Where `resets[t]`, h_{t-1} is zero for that
    step; where not `mask[t]`, the step holds its state: h_t = h_{t-1}.

    With recurrent dropout at rate p the products with w_h read d * h_{t-1} in place of h_{t-1}, one
    d for all steps, of entries 0 and 1/(1 - p). With zoneout at rate p each step holds each unit
    with probability p; its mean, h_t = p h_{t-1} + (1 - p) step(x_t, h_{t-1}), is what runs where
    deterministic.

    Args:
      params: one layer's, in the dtype of xs and h0 (float64, float32, bfloat16 or float16); its
        spec says which equation.
      xs: [T, ..., I]: time, any batch axes or none, input. T may be 0.
      h0: [..., H]; None for zeros.
      mask: [T, ...] bool, True where a step is real. Whatever xs holds elsewhere, NaN included,
        changes no value and no gradient. `length_mask` makes one from lengths.
      resets: [T, ...] bool, True where the state is set to zero before step t, on held steps too.
      reverse: from the last step to the first; hs keeps the order of xs.
      gradient: "bptt" for reverse mode, the fastest. "tangent" for everything else: jvp, jacfwd,
        linearize, hessian, any order; **forward mode of "bptt" raises a TypeError in JAX: ask for
        gradient="tangent" there.** "autodiff" for the reference.
      residuals: what "bptt" keeps for its backward sweep. "gates": hs and r, z, n (and q, for
        reset="after"). "states": hs; the gates are redone in bulk products. "boundaries": one
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
    _require_choices(reverse, gradient, residuals, chunk_size, unroll, truncate)
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
    cuts = None if truncate is None else truncation_cuts(numbers // truncate, mask, h0, reverse)
    scale = zoneout_key = None
    if key is not None and not deterministic and (recurrent_dropout or zoneout):
        scale_key, zoneout_key = jax.random.split(key)
        scale = draw_scale(scale_key, recurrent_dropout, h0) if recurrent_dropout else None
        zoneout_key = zoneout_key if zoneout else None
    kept, zoneout = (zoneout, 0.0) if deterministic else (0.0, zoneout)
    arrays = (params, xs, h0, mask, resets, cuts, tap_hs, scale)
    params, xs, h0, mask, resets, cuts, tap_hs, scale = vary_alike(arrays, zoneout_key)
    fused = backend != "scan"  # redoes gates in bulk and takes all of time at once, unless told
    residuals = residuals or ("states" if fused else default_residuals(xs, h0))
    if gradient == "bptt" and chunk_size is None and (residuals == "boundaries" or not fused):
        chunk_size = default_chunk_size(xs.shape[0], h0, residuals)
    static = Static(
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
    steps = Steps(xs, mask, resets, cuts, numbers, tap_hs)
    rule = {"bptt": gru_bptt, "tangent": gru_tangent, "autodiff": scan_gru}[gradient]
    h_last, hs = rule(static, params, steps, h0, scale, zoneout_key)
    return h_last, jnp.moveaxis(hs, 0, axis)


def _zero_state(params, xs):
    """Zeros [..., H], made from the data so that they are sharded as the state will be.

    Only their type comes from the product; no value of it is used and jit leaves it out.
    """
    return jnp.zeros_like(project(params, xs.sum(axis=0))[0], dtype=xs.dtype)


def _require_choices(reverse, gradient, residuals, chunk_size, unroll, truncate):
    """TypeError or ValueError naming the choice that is none."""
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
