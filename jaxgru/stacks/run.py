"""Runs layers of one or two directions, and stacks of them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.checks import explain_unknown_arguments
from jaxgru.core.gradient import Gradient
from jaxgru.core.noise import Noise, Rate
from jaxgru.core.parameters import GRUParams
from jaxgru.core.recurrence import run_gru
from jaxgru.stacks.checks import StackConfig, require_call, require_grus, require_step
from jaxgru.stacks.dropout import Dropout, drop
from jaxgru.stacks.forms import Bidirectional, Layer, Merge


@explain_unknown_arguments
def gru_bidirectional(
    params: Bidirectional, xs: jax.Array,
    h0: Bidirectional | tuple[jax.Array, jax.Array] | None = None, *,
    mask: jax.Array | None = None, resets: jax.Array | None = None, merge: Merge = "concat",
    axis: int = 0, gradient: Gradient = "bptt", noise: Noise | None = None,
    key: jax.Array | None = None, deterministic: bool = False, first_step: int | jax.Array = 0,
    tap: Any = None,
) -> tuple[Bidirectional, jax.Array]:  # fmt: skip
    """Runs one GRU forward and one backward over a sequence and returns (h_last, ys).

    ys_t = [forward_t | backward_t], or their sum (Schuster and Paliwal 1997; `torch.nn.GRU` and
    Keras's `Bidirectional` concatenate).

    Args:
      params: of both directions.
      xs: [T, ..., I].
      h0: forward's state [..., H] before the first step and backward's after the last, a pair or
        `Bidirectional`; None for zeros.
      mask: [T, ...] bool, True = valid step. Backward starts with the last valid step.
      resets: [T, ...] bool. True at t separates step t from step t - 1 in both directions: forward
        is reset before step t, backward before step t - 1.
      merge: "concat" or "sum".
      axis, gradient, noise, key, deterministic, first_step: as in `gru`; each direction draws its
        own masks.
      tap: a pair of taps, from `init_taps`; see `gru`.

    Returns:
      h_last, a `Bidirectional` of forward's state after the last step and backward's after the
      first; and ys [T, ..., 2H], or [T, ..., H] for "sum".

    Raises:
      ValueError: merge is unknown, h0 is no pair, or as `gru`.
      TypeError: params is no `Bidirectional`, or as `gru`.

    >>> from jaxgru import init_stack
    >>> (layer,) = init_stack(jax.random.key(0), 2, 3, bidirectional=True)
    >>> h_last, ys = gru_bidirectional(layer, jnp.ones((5, 4, 2)))
    >>> h_last.forward.shape, ys.shape
    ((4, 3), (5, 4, 6))
    """
    function = "gru_bidirectional"
    if not isinstance(params, Bidirectional):
        found = type(params).__name__
        cure = ""
        if isinstance(params, GRUParams):
            cure = "; run one direction by gru"
        elif isinstance(params, list | tuple):
            cure = "; pass one layer, such as params[0], or run a stack by gru_stack"
        raise TypeError(f"{function}: params must be a Bidirectional, got {found}{cure}.")
    require_grus(function, params)
    config = StackConfig(merge, False, 0.0, False, gradient, noise, deterministic)
    return check_and_run(function, params, xs, h0, mask, resets, config, key, axis, first_step, tap)


@explain_unknown_arguments
def gru_stack(
    params: Sequence[Layer], xs: jax.Array, h0: Sequence[Any] | None = None, *,
    mask: jax.Array | None = None, resets: jax.Array | None = None, merge: Merge = "concat",
    residual: bool = False, dropout: Rate | Dropout = 0.0, reverse: bool = False, axis: int = 0,
    gradient: Gradient = "bptt", noise: Noise | None = None, key: jax.Array | None = None,
    deterministic: bool = False, first_step: int | jax.Array = 0, tap: Sequence[Any] | None = None,
) -> tuple[tuple[Any, ...], jax.Array]:  # fmt: skip
    """Runs a stack of GRU layers over a sequence and returns (h_last, ys).

        y^0 = drop(xs),   x^l = drop(y^{l-1}) for l > 1,   y^l = layer_l(x^l)
        residual:  y^l = layer_l(x^l) + y^{l-1} for l > 1
        ys = drop(y^L)

    With parameters of spec=PYTORCH that is `torch.nn.GRU(num_layers=..., bidirectional=...,
    dropout=...)`, but for outputs on padding: here they repeat the last state, and there they are
    zeros after `pad_packed_sequence`.

    Args:
      params: a sequence of `GRUParams` and `Bidirectional` layers; each may have its own spec.
      xs: [T, ..., I].
      h0: a sequence with the initial state of each layer, as from `init_state`; None for zeros.
      mask: [T, ...] bool, True = valid step, in every layer and direction.
      resets: [T, ...] bool, in every layer; see `gru_bidirectional`.
      merge: how the directions of a `Bidirectional` are joined, "concat" or "sum".
      residual: True adds each layer's input to its output, from the second layer on (Wu et al.
        2016, arXiv:1609.08144, eq. 6).
      dropout: the rate in [0, 1) between layers, which may be traced, or a `Dropout`. A rate
        between layers does nothing in a stack of one layer, and gives a UserWarning there.
      reverse: as in `gru`, where no layer is `Bidirectional`.
      axis, gradient, noise, key, deterministic, first_step: as in `gru`; dropout needs a key, too.
      tap: a sequence with the tap of each layer, from `init_taps`; see `gru`.

    Returns:
      h_last, a tuple with the last state of each layer, in the form of `init_state`; and ys
      [T, ..., H], the outputs of the top layer ([T, ..., 2H] if bidirectional and "concat").

    Raises:
      ValueError: the sizes of layers or states do not fit, a rate is above 0 without a key, a
        choice is unknown, or as `gru`.
      TypeError: params is no sequence of layers, or as `gru`.

    Cost: that of the layers. Dropout saves its key alone, and the backward pass draws its masks
    again. Batch-major xs are transposed once, and ys once back.

    >>> from jaxgru import init_stack
    >>> layers = init_stack(jax.random.key(0), 2, 3, num_layers=2, bidirectional=True)
    >>> h_last, ys = gru_stack(layers, jnp.ones((5, 4, 2)), dropout=0.2, key=jax.random.key(1))
    >>> ys.shape, h_last[1].forward.shape
    ((5, 4, 6), (4, 3))
    """
    function = "gru_stack"
    require_grus(function, params, stack=True)
    config = StackConfig(merge, residual, dropout, reverse, gradient, noise, deterministic)
    return check_and_run(function, params, xs, h0, mask, resets, config, key, axis, first_step, tap)


@explain_unknown_arguments
def gru_stack_cell(
    params: Sequence[Layer], x: jax.Array, h: Sequence[jax.Array], *,
    mask: jax.Array | None = None, resets: jax.Array | None = None, residual: bool = False,
    dropout: Rate | Dropout = 0.0, noise: Noise | None = None, key: jax.Array | None = None,
    deterministic: bool = False, gradient: Gradient = "bptt", first_step: int | jax.Array = 0,
) -> tuple[tuple[jax.Array, ...], jax.Array]:  # fmt: skip
    """Runs a stack for one step and returns (h, y): for streams.

    Args:
      params: a sequence of `GRUParams`.
      x: [..., I].
      h: a sequence with the state [..., H] of each layer; the first from `init_state`. With
        half-precision parameters it may be float32, and then stays so, unrounded, as the state is
        inside `gru_stack`.
      mask, resets: [...] bool.
      residual, dropout, noise, deterministic: as in `gru_stack`.
      gradient: as in `gru_stack`, without truncate: `jax.lax.stop_gradient(h)` cuts the gradient.
      key: as in `gru_stack`. Give every step of a stream the same key and its own first_step.
      first_step: the number of the step.

    Returns:
      h, the states after the step, and y [..., H], the output of the top layer.

    Raises:
      ValueError: a layer is `Bidirectional`, the gradient has a truncate, or as `gru_stack`.
      TypeError: as `gru_stack`.

    Cost: that of one step; XLA removes the loop of length 1. Outside jit it is compiled once for
    each shape and choice, not once a step.

    >>> from jaxgru import init_stack, init_state
    >>> layers = init_stack(jax.random.key(0), 2, 3, num_layers=2)
    >>> h, y = gru_stack_cell(layers, jnp.ones((4, 2)), init_state(layers, (4,)))
    >>> y.shape
    (4, 3)
    """
    require_grus("gru_stack_cell", params, stack=True)
    config = StackConfig("concat", residual, dropout, False, gradient, noise, deterministic)
    config = require_step("gru_stack_cell", params, x, h, mask, resets, config, key, first_step)
    h = h and tuple(h)  # as it is returned, so that the second step is compiled as the first
    return _run_step(config, params, h, key, first_step, x, mask, resets)


@functools.partial(jax.jit, inline=True)
def _run_step(config, params, h, key, first_step, *arrays):
    """`gru_stack_cell` of checked arguments: without jit its loop would be compiled every time."""
    xs, mask, resets = (None if v is None else jnp.asarray(v)[None] for v in arrays)
    h_next, ys = run_stack(config, params, h, key, first_step, xs, mask, resets)
    return h_next, ys[0]


def check_and_run(function, params, xs, h0, mask, resets, config, key, axis, first_step, tap):
    """(h_last, ys) of a `Bidirectional` or a stack that `require_grus` has checked."""
    config, axis, arrays = require_call(
        function, params, xs, h0, mask, resets, config, key, axis, first_step, tap
    )
    run = _run_layer if isinstance(params, Bidirectional) else run_stack
    h_last, ys = run(config, params, h0, key, first_step, *arrays)
    return h_last, jnp.moveaxis(ys, 0, axis)


def run_stack(config, params, h0, key, first_step, xs, mask, resets, tap=None) -> Any:
    """`gru_stack` of checked arguments, with time in front."""
    dropout, keys = config.dropout, draw_keys(config, params, key)
    steps = lax.broadcasted_iota(jnp.int32, (xs.shape[0],), 0)
    numbers = None if dropout.variational else first_step + steps
    h0, tap = (v or [None] * len(params) for v in (h0, tap))
    ys, h_last = xs, []
    for n, layer in enumerate(params):
        inputs = drop(keys[2 * n], ys, dropout.between if n else dropout.input, numbers)
        h, hs = _run_layer(
            config, layer, h0[n], keys[2 * n + 1], first_step, inputs, mask, resets, tap[n]
        )
        ys = hs + ys if config.residual and n else hs
        h_last.append(h)
    return tuple(h_last), drop(keys[-1], ys, dropout.output, numbers)


def draw_keys(config, params, key):
    """Two keys a layer, for the dropout before it and for it, and one for the dropout of ys."""
    count = 2 * len(params) + 1
    return [None] * count if key is None or config.deterministic else jax.random.split(key, count)


def _run_layer(config, layer, h0, key, first_step, xs, mask, resets, tap) -> Any:
    """(h_last, ys) of one layer, in one direction or both."""
    run = functools.partial(
        run_gru, rule=config.rule, noise=config.noise, deterministic=config.deterministic
    )
    if isinstance(layer, GRUParams):
        return run(layer, xs, h0, mask, resets, key, first_step, tap, reverse=config.reverse)
    keys = (None, None) if key is None else jax.random.split(key)
    h0, tap = (v or (None, None) for v in (h0, tap))
    forward, hs = run(layer[0], xs, h0[0], mask, resets, keys[0], first_step, tap[0], reverse=False)
    resets = reverse_resets(resets)
    backward, ys = run(layer[1], xs, h0[1], mask, resets, keys[1], first_step, tap[1], reverse=True)
    return Bidirectional(forward, backward), merge_directions(config.merge, hs, ys)


def merge_directions(merge: Merge, *outputs: jax.Array) -> jax.Array:
    """The outputs of one or two directions side by side, or their sum."""
    return sum(outputs[1:], outputs[0]) if merge == "sum" else jnp.concatenate(outputs, axis=-1)


def reverse_resets(resets: jax.Array | None) -> jax.Array | None:
    """Resets of the backward direction.

    A reset between steps t - 1 and t comes before step t - 1 when the sequence is run backward.
    """
    if resets is None:
        return None
    return lax.pad(resets, False, [(-1, 1, 0)] + [(0, 0, 0)] * (resets.ndim - 1))
