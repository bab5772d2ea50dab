"""The GRU over a sequence: `gru`."""

from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax import lax

from jaxgru.core import checks
from jaxgru.core.bptt import bptt
from jaxgru.core.cell import project
from jaxgru.core.chunks import resolve_options
from jaxgru.core.flags import Flags, find_cuts
from jaxgru.core.gradient import BPTT, Gradient, Rule, Tangent, as_rule
from jaxgru.core.noise import Noise, as_constant, draw_state_dropout, is_zero, require_noise
from jaxgru.core.parameters import GRUParams, require_params
from jaxgru.core.scan import Config, Configs, Inputs, plain_scan
from jaxgru.core.sharding import cast_to_common_varying_axes
from jaxgru.core.tangent import tangent


class Tap(NamedTuple):
    """Arrays, usually zeros, added to xs and to every h_t; their gradients are dL/dx_t and dL/dh_t.

    dL/dh_t counts every path from h_t to the loss, through hs[t] and step t + 1, as `h_t.grad` does
    after `h_t.retain_grad()` in PyTorch. Give None for a gradient that you do not need.
    """

    xs: jax.Array | None  # [T, ..., I]
    hs: jax.Array | None  # [T, ..., H]


jax.export.register_namedtuple_serialization(Tap, serialized_name="jaxgru.Tap")


@checks.explain_unknown_arguments
def gru(
    params: GRUParams, xs: jax.Array, h0: jax.Array | None = None, *,
    mask: jax.Array | None = None, resets: jax.Array | None = None, reverse: bool = False,
    axis: int = 0, gradient: Gradient = "bptt", noise: Noise | None = None,
    key: jax.Array | None = None, deterministic: bool = False, first_step: int | jax.Array = 0,
    tap: Tap | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Runs a GRU over a sequence and returns (h_last, hs), the order of `lax.scan`.

        h_t = step(x_t, h_{t-1})        the equation of params.spec, see `gru_cell`
        h_t = h_{t-1}                   where mask[t] is False
        h_{t-1} = 0 before step t       where resets[t] is True, on masked steps too

    Sources: Cho et al. 2014 (arXiv:1406.1078), eqs. 5-8, and Chung et al. 2014 (arXiv:1412.3555),
    section 3.2. `jaxgru/core/README.md` has the backward pass.

    Args:
      params: of one layer, in the dtype of xs and h0 (float64, float32, bfloat16 or float16).
      xs: [T, ..., I]: time, any number of batch axes (or none), inputs. T may be 0.
      h0: [..., H], the initial state; None for zeros.
      mask: [T, ...] bool, True = valid step. The values of xs at masked steps, NaN included, change
        no result and no gradient. `length_mask` makes a mask [T, ...] from lengths. A mask with
        time and batch swapped raises an error, unless T = B.
      resets: [T, ...] bool. `resets_from_dones` computes them from the ends of episodes.
      reverse: runs from the last step to the first; hs keeps the order of xs.
      axis: the axis of time in xs, mask, resets and hs; 1 for batch-major [B, T, I].
      gradient: "bptt" (handwritten, reverse mode, the fastest), "tangent" (handwritten, forward and
        reverse mode), "autodiff" (JAX's own, the reference), or one of `BPTT`, `Tangent` and
        `Autodiff` with options. `jax.jvp`, `jax.jacfwd` and `jax.linearize` need "tangent" (or
        "autodiff"). With "bptt" they raise a TypeError; inside `jax.jit` and `jax.linearize` it
        is JAX's own, "can't apply forward-mode autodiff (jvp) to a custom_vjp function". All three
        rules have higher derivatives.
      noise: rates of recurrent dropout and zoneout, which may be traced; None for neither.
      key: a `jax.random.key`, needed in training where a rate of noise is above 0 or traced. One
        key draws the same masks at the same steps, whatever the gradient, direction and padding.
      deterministic: True for evaluation: no dropout, and the mean of zoneout; key is not used.
      first_step: the number of the first step of xs, for zoneout's draws and the windows of
        `BPTT.truncate`. With it, consecutive pieces of a sequence give the values of the whole
        sequence. Where a window starts at the first step of xs, the gradient still reaches h0; pass
        `jax.lax.stop_gradient(h0)` to cut it. first_step may be traced.
      tap: a `Tap`, from `init_taps`, whose gradients are dL/dx_t and dL/dh_t.

    Returns:
      h_last [..., H], the state after the last step (the first, if reverse). With a mask, but no
      resets or tap, that is the state after the last valid step, or h0 if no step is valid. And hs
      [T, ..., H], with time at `axis`. Both have the dtype of xs, and each gradient that of its
      argument. (`torch.nn.GRU` returns its outputs first, and h_n with an axis of layers.)

    Raises:
      ValueError: a shape does not fit, a choice is unknown, or a rate is above 0 without a key.
      TypeError: an argument has the wrong kind or dtype.

    bfloat16 and float16: gates, sums and the state are float32, see `jaxgru.core.matmul`.

    Cost: 6 T B H (I + H) floating-point operations in products forward and twice that backward.
    `jaxgru/core/README.md` says what each choice of residuals saves and recomputes.

    >>> from jaxgru import init_gru
    >>> params = init_gru(jax.random.key(0), 2, 3)
    >>> xs = jnp.ones((5, 4, 2))
    >>> h_last, hs = jax.jit(gru)(params, xs)
    >>> hs.shape, bool(jnp.all(h_last == hs[-1]))
    ((5, 4, 3), True)
    """
    rule = as_rule("gru", gradient)
    noise = require_noise("gru", noise, key, deterministic)
    checks.require_bool("gru", "reverse", reverse)
    checks.require_first_step("gru", first_step)
    sizes = require_params("gru", params)
    axis = require_inputs("gru", params, xs, sizes[0], mask, resets, axis)
    shape = (*xs.shape[:axis], *xs.shape[axis + 1 : -1], sizes[1])
    require_state("gru", "h0", h0, shape, params, xs if axis == 0 else None)
    require_tap("gru", "tap", tap, xs.shape[:-1], sizes, params)
    arrays = (xs, mask, resets, tap)
    xs, mask, resets, tap = jax.tree.map(lambda v: jnp.moveaxis(v, axis, 0), arrays)
    h_last, hs = run_gru(
        params, xs, h0, mask, resets, key, first_step, tap, reverse=reverse, rule=rule, noise=noise,
        deterministic=deterministic,
    )  # fmt: skip
    return h_last, jnp.moveaxis(hs, 0, axis)


def run_gru(
    params: GRUParams, xs: Any, h0: Any, mask: Any, resets: Any, key: Any, first_step: Any,
    tap: Tap | None, *, reverse: bool, rule: Rule, noise: Noise, deterministic: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`gru` without its checks, with time as the first axis."""
    kernel = rule.kernel.prepare(params, xs) if isinstance(rule, BPTT) and rule.kernel else None
    params = jax.tree.map(jnp.asarray, params)  # NumPy arrays become JAX's
    mask, resets = (None if v is None else jnp.asarray(v)[..., None] for v in (mask, resets))
    tap_xs, tap_hs = (None, None) if tap is None else tap
    xs = xs if tap_xs is None else xs + tap_xs
    if mask is not None:
        xs = jnp.where(mask, xs, jnp.zeros_like(xs))  # 0 * NaN is NaN in gradients
    if h0 is None:  # zeros, sharded as a projected step; jit removes the product and the sum
        any_step = xs.sum(axis=0)  # not xs[0]: T may be 0
        h0 = jnp.zeros_like(project(params, any_step)[0], dtype=xs.dtype)
    h0 = jnp.asarray(h0)
    first_step = jnp.asarray(first_step).astype(jnp.int32)  # the dtype of the numbers
    numbers = first_step + lax.broadcasted_iota(jnp.int32, (xs.shape[0],), 0)
    cuts = None
    if rule.truncate is not None:
        cuts = find_cuts(numbers // rule.truncate, mask, h0, reverse)
    dropout = zoneout_key = None
    if key is not None and not deterministic:
        dropout_key, zoneout_key = jax.random.split(key)
        dropout = draw_state_dropout(dropout_key, noise.recurrent_dropout, h0)
        zoneout_key = None if is_zero(noise.zoneout) else zoneout_key
    zoneout = as_constant(noise.zoneout)
    if isinstance(zoneout, jax.Array):
        if kernel is not None and zoneout_key is None:
            raise TypeError(
                "gru: noise.zoneout must be a Python float with a kernel and deterministic=True, "
                "got an array; pass a float, or leave BPTT's kernel out."
            )
        zoneout = jnp.broadcast_to(zoneout, (xs.shape[0],) + (1,) * h0.ndim)
    arrays = (params, xs, h0, Flags(mask, resets, cuts, zoneout), tap_hs, dropout)
    arrays = cast_to_common_varying_axes(arrays, zoneout_key)
    params, xs, h0, flags, tap_hs, dropout = arrays
    inputs = Inputs(xs, flags, None if zoneout_key is None else numbers, tap_hs)
    arguments = (params, inputs, h0, dropout, zoneout_key)
    if isinstance(rule, BPTT):
        kinds = ("cpu", "gpu", "tpu")
        choices = [Config(reverse, kernel, *resolve_options(rule, kind, xs, h0)) for kind in kinds]
        try:
            return bptt(Configs(*choices), *arguments)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise TypeError(
                "gradient must be 'tangent' or 'autodiff' for jax.jvp and jax.jacfwd, got 'bptt'."
            ) from error
    run = tangent if isinstance(rule, Tangent) else plain_scan
    config = Config(reverse, kernel=None, residuals=None, chunk_size=None, unroll=rule.unroll)
    return run(config, *arguments)


def require_inputs(
    function: str, params: Any, xs: Any, input_size: int, mask: Any, resets: Any, axis: Any,
    rows: str = "params.w_x",
) -> int:  # fmt: skip
    """Checks xs, mask and resets; returns the axis of time as a non-negative integer."""
    checks.require_float(function, "xs", xs, params.w_x.dtype)
    if xs.ndim < 2 or xs.shape[-1] != input_size:
        raise ValueError(
            f"{function}: xs must have shape [T, ..., I] with I={input_size} (rows of {rows}), "
            f"got {xs.shape}."
        )
    checks.require_flags(function, {"mask": mask, "resets": resets}, xs.shape[:-1])
    return checks.require_axis(function, axis, xs.shape)


def require_state(
    function: str, name: str, h: Any, shape: tuple[int, ...], params: Any,
    time_major_xs: Any = None, rows: str = "params.w_h", source: str = "xs", wide: bool = False,
) -> None:  # fmt: skip
    """TypeError or ValueError unless h is None or a state of that shape.

    time_major_xs: xs if axis is 0, for the advice to pass axis=1.
    wide: the dtype of h may also be float32 with half-precision parameters.
    """
    if h is None:
        return
    cure = "cast it if it is a state; pass a mask by name, lengths as mask=length_mask(lengths, T)"
    checks.require_float(function, name, h, params.w_x.dtype, cure, wide=wide)
    swapped = time_major_xs is not None and h.shape[:1] == time_major_xs.shape[:1]
    cure = "; for batch-major xs pass axis=1" if swapped else ""
    if h.shape == (1, *shape):
        cure = f"; {name}[0] has this shape, as torch's h_0 is [1, B, H]"
    meaning = f"the batch axes of {source}, then H={shape[-1]}, the rows of {rows}"
    checks.require_shape(function, name, h, shape, meaning, cure)


def require_tap(
    function: str, name: str, tap: Any, lead: tuple[int, ...], sizes: tuple[int, int], params: Any
) -> None:
    """TypeError or ValueError unless tap is None or a Tap with the shapes of xs and hs."""
    if tap is None:
        return
    if not isinstance(tap, Tap):
        raise TypeError(
            f"{function}: {name} must be a Tap of two arrays, got {type(tap).__name__}; init_taps "
            "makes one."
        )
    for field, size, value in zip(Tap._fields, sizes, tap):
        if value is not None:
            place, cure = f"{name}.{field}", "; init_taps(params, xs.shape[:-1]) makes it"
            checks.require_float(function, place, value, params.w_x.dtype)
            checks.require_shape(function, place, value, (*lead, size), f"as {field}", cure)
