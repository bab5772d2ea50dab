"""Layers around the recurrence: both directions, stacks, dropout between layers, and streams.

A layer is a `GRUParams`, or a `Bidirectional` pair of them; a stack is a tuple of layers. A state
has the form of the parameters it belongs to: [..., H] for a `GRUParams`, a `Bidirectional` of two
for a `Bidirectional`, a tuple with one entry a layer for a stack. All of it is composed of `gru`,
and every derivative rule and policy of `gru` holds for it.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.checks import (
    require_axis,
    require_choice,
    require_count,
    require_first_step,
    require_flags,
    require_float,
    require_rates,
)
from jaxgru.core.noise import drop_steps
from jaxgru.core.parameters import GRUParams, init_gru, require_params
from jaxgru.core.recurrence import Tap, gru

Array = jax.Array
Merge = Literal["concat", "sum"]
_MERGES = get_args(Merge)


class Bidirectional(NamedTuple):
    """A layer of two GRUs that read the sequence in both directions; also its states and taps."""

    forward: Any  # GRUParams; of a state [..., H], of a tap a `Tap`
    backward: Any


Layer = GRUParams | Bidirectional


def init_stack(
    key: Array,
    input_size: int,
    hidden_size: int | Sequence[int],
    num_layers: int | None = None,
    *,
    bidirectional: bool = False,
    merge: Merge = "concat",
    **init_options: Any,
) -> tuple[Layer, ...]:
    """Draws the parameters of a stack; `init_gru` draws each layer and direction.

    Args:
      key: a `jax.random.key`.
      input_size: I of the first layer.
      hidden_size: H of every layer, or a sequence with each layer's own.
      num_layers: at least 1; None for as many as there are sizes, or one.
      bidirectional: True makes every layer a `Bidirectional`.
      merge: how `gru_stack` will join the directions: "concat" makes the next layer's input 2H
        wide, "sum" H.
      **init_options: bias, layer_norm, scheme and dtype, to `init_gru`.

    Returns:
      A tuple of layers.

    Raises:
      ValueError: a size is not positive, the sizes are not one a layer, or merge is unknown.
      TypeError: a size is no integer, or bidirectional no bool.

    >>> layers = init_stack(jax.random.key(0), 2, 3, num_layers=2, bidirectional=True)
    >>> layers[1].backward.w_x.shape
    (6, 9)
    """
    require_count("init_stack", "input_size", input_size)
    several = isinstance(hidden_size, Sequence)
    if num_layers is None:
        num_layers = len(hidden_size) if several else 1
    require_count("init_stack", "num_layers", num_layers)
    require_choice("init_stack", "merge", merge, _MERGES)
    if not isinstance(bidirectional, bool):
        raise TypeError(f"init_stack: bidirectional must be a bool, got {bidirectional!r}.")
    sizes = list(hidden_size) if several else [hidden_size] * num_layers
    if len(sizes) != num_layers:
        raise ValueError(
            f"init_stack: hidden_size must hold one size for each of num_layers={num_layers} "
            f"layers, got {len(sizes)}."
        )
    layers: list[Layer] = []
    for size, layer_key in zip(sizes, jax.random.split(key, num_layers)):
        require_count("init_stack", "hidden_size", size)
        if bidirectional:
            keys = jax.random.split(layer_key)
            layers.append(
                Bidirectional(*(init_gru(k, input_size, size, **init_options) for k in keys))
            )
        else:
            layers.append(init_gru(layer_key, input_size, size, **init_options))
        input_size = 2 * size if bidirectional and merge == "concat" else size
    return tuple(layers)


def init_state(params: Any, batch_shape: Sequence[int] = ()) -> Any:
    """The state of zeros of a layer or stack.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack.
      batch_shape: the batch axes of the sequences, none unless told.

    Returns:
      [*batch_shape, H] in the parameters' dtype; a `Bidirectional` of two for a `Bidirectional`, a
      tuple with one entry a layer for a stack.

    Raises:
      TypeError: params is none of the three, or batch_shape no sequence.

    >>> [h.shape for h in init_state(init_stack(jax.random.key(0), 2, 3, num_layers=2), (4,))]
    [(4, 3), (4, 3)]
    """
    if not isinstance(batch_shape, Sequence):
        raise TypeError(f"init_state: batch_shape must be a sequence, got {batch_shape!r}.")
    if isinstance(params, GRUParams):
        return jnp.zeros((*batch_shape, params.w_h.shape[0]), params.w_h.dtype)
    if isinstance(params, Bidirectional):
        return Bidirectional(*(init_state(direction, batch_shape) for direction in params))
    require_stack("init_state", params)
    return tuple(init_state(layer, batch_shape) for layer in params)


def init_taps(params: Any, lead_shape: Sequence[int]) -> Any:
    """Taps of zeros for a layer or stack: differentiate a loss by them to see its gradient flow.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack.
      lead_shape: that of xs without its last axis, [T, ...], or [B, T] with axis=1.

    Returns:
      A `Tap` of xs [*lead_shape, I] and hs [*lead_shape, H] in the parameters' dtype; a
      `Bidirectional` of two for a `Bidirectional`, a tuple with one entry a layer for a stack.
      Pass it on as `tap`. Where xs is sharded, add zeros made from xs
      (`jnp.zeros_like(xs[..., :1])`) to every array, so that the taps are sharded as it is: inside
      `jax.shard_map` JAX would sum them over the mesh.

    Raises:
      TypeError: params is none of the three, or lead_shape no sequence.

    >>> params = init_gru(jax.random.key(0), 2, 3)
    >>> loss = lambda tap: gru(params, jnp.ones((5, 2)), tap=tap)[0].sum()
    >>> flow = jax.grad(loss)(init_taps(params, (5,)))
    >>> flow.hs[-1].tolist(), flow.xs.shape  # the last state is what the loss sums
    ([1.0, 1.0, 1.0], (5, 2))
    """
    if not isinstance(lead_shape, Sequence):
        raise TypeError(
            "init_taps: lead_shape must be a sequence of sizes, xs.shape[:-1], got "
            f"{_count(lead_shape)}."
        )
    if isinstance(params, GRUParams):
        sizes = (params.w_x.shape[0], params.w_h.shape[0])
        return Tap(*(jnp.zeros((*lead_shape, size), params.w_x.dtype) for size in sizes))
    if isinstance(params, Bidirectional):
        return Bidirectional(*(init_taps(direction, lead_shape) for direction in params))
    require_stack("init_taps", params)
    return tuple(init_taps(layer, lead_shape) for layer in params)


def gru_bidirectional(
    params: Bidirectional,
    xs: Array,
    h0: tuple[Array, Array] | None = None,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    merge: Merge = "concat",
    key: Array | None = None,
    tap: tuple[Tap, Tap] | None = None,
    axis: int = 0,
    **gru_options: Any,
) -> tuple[Bidirectional, Array]:
    """Runs one GRU forward and one backward over a sequence: (h_last, ys).

    ys_t = [forward_t | backward_t], or their sum (Schuster and Paliwal 1997; `torch.nn.GRU` and
    Keras's `Bidirectional` concatenate).

    Args:
      params: of both directions.
      xs: [T, ..., I].
      h0: a pair, forward's [..., H] before the first step and backward's after the last; None for
        zeros.
      mask: [T, ...] bool, True where a step is real. Backward starts with the last real step.
      resets: [T, ...] bool. True at t parts step t from step t - 1 for both directions: forward is
        reset before step t, backward before step t - 1.
      merge: "concat" or "sum".
      key: a `jax.random.key` where a rate acts; each direction draws its own masks.
      tap: a pair of taps, forward's and backward's, in the form of `init_taps`.
      axis: where xs, mask, resets and ys have their time.
      **gru_options: gradient, residuals, recurrent_dropout, zoneout, ... of `gru`, all but
        reverse.

    Returns:
      h_last, a `Bidirectional`: forward's state after the last step and backward's after the first;
      and ys
      [T, ..., 2H], or [T, ..., H] for "sum".

    Raises:
      ValueError: merge is unknown, h0 is no pair, or as `gru`.
      TypeError: params is no `Bidirectional`, or as `gru`.

    Cost: twice that of `gru`.

    >>> (layer,) = init_stack(jax.random.key(0), 2, 3, bidirectional=True)
    >>> h_last, ys = gru_bidirectional(layer, jnp.ones((5, 4, 2)))
    >>> h_last[0].shape, ys.shape
    ((4, 3), (5, 4, 6))
    """
    if not isinstance(params, Bidirectional):
        raise TypeError(
            f"gru_bidirectional: params must be a Bidirectional, got {type(params).__name__}."
        )
    require_choice("gru_bidirectional", "merge", merge, _MERGES)
    if "reverse" in gru_options:
        raise TypeError("gru_bidirectional: reverse must be left out, as both directions are run.")
    _require_pair("gru_bidirectional", "h0", h0)
    _require_pair("gru_bidirectional", "tap", tap, "taps")
    if merge == "sum" and params.forward.w_h.shape != params.backward.w_h.shape:
        raise ValueError(
            "gru_bidirectional: params must have one hidden size in both directions for "
            f"merge='sum', got {params.forward.w_h.shape[0]} and {params.backward.w_h.shape[0]}."
        )
    h0_forward, h0_backward = (None, None) if h0 is None else h0
    tap_forward, tap_backward = (None, None) if tap is None else tap
    key_forward, key_backward = (None, None) if key is None else jax.random.split(key)
    options = {"mask": mask, "axis": axis, **gru_options}
    forward, hs = gru(
        params.forward, xs, h0_forward, resets=resets, key=key_forward, tap=tap_forward, **options
    )
    backward, reverse_hs = gru(
        params.backward, xs, h0_backward, resets=reverse_resets(resets, axis), key=key_backward,
        tap=tap_backward, reverse=True, **options,
    )  # fmt: skip
    ys = hs + reverse_hs if merge == "sum" else jnp.concatenate([hs, reverse_hs], axis=-1)
    return Bidirectional(forward, backward), ys


def gru_stack(
    params: Sequence[Layer],
    xs: Array,
    h0: Sequence[Any] | None = None,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    merge: Merge = "concat",
    residual: bool = False,
    input_dropout: float = 0.0,
    dropout: float = 0.0,
    output_dropout: float = 0.0,
    variational: bool = False,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    key: Array | None = None,
    first_step: int | Array = 0,
    deterministic: bool = False,
    tap: Sequence[Any] | None = None,
    axis: int = 0,
    **gru_options: Any,
) -> tuple[tuple[Any, ...], Array]:
    """Runs a stack of GRU layers over a sequence: (h_last, ys).

        y^0 = drop(xs),   x^l = drop(y^{l-1}) for l > 1,   y^l = layer_l(x^l)
        residual:  y^l = layer_l(x^l) + y^{l-1} for l > 1
        ys = drop(y^L)

    With parameters of spec=PYTORCH that is `torch.nn.GRU(num_layers=..., bidirectional=...,
    dropout=...)`, but for outputs on padding: here they repeat the last state, and there an
    unpacked sequence has zeros.

    Args:
      params: a sequence of `GRUParams` and `Bidirectional` layers.
      xs: [T, ..., I].
      h0: a sequence with each layer's initial state, [..., H] or a pair of them; None for zeros.
      mask: [T, ...] bool, True where a step is real, in every layer and direction.
      resets: [T, ...] bool, True where every layer starts anew; see `gru_bidirectional`.
      merge: how the directions of a `Bidirectional` are joined, "concat" or "sum".
      residual: adds each layer's input to its output, from the second layer on (Wu et al. 2016,
        arXiv:1609.08144, eq. 6).
      input_dropout: rate in [0, 1) of the dropout of xs.
      dropout: rate in [0, 1) of the dropout of every layer's input but the first's; a stack of one
        layer has none.
      output_dropout: rate in [0, 1) of the dropout of ys, for a head that reads them.
      variational: draws one mask for all steps for these three (Gal and Ghahramani 2016,
        arXiv:1512.05287) instead of one a step.
      recurrent_dropout: rate in [0, 1), to `gru`; its mask is the same at every step.
      zoneout: rate in [0, 1), to `gru`.
      key: a `jax.random.key`, needed where a rate acts; the same key draws the same masks at the
        same steps.
      first_step: the number of the first step of xs: with it, and one key, a run in chunks draws
        what the whole run draws. May be traced.
      deterministic: no dropout, and zoneout's mean: for evaluation.
      tap: a sequence with each layer's tap, from `init_taps`: see `gru`.
      axis: where xs, mask, resets and ys have their time; 1 for batch-major.
      **gru_options: gradient, residuals, chunk_size, truncate, unroll, backend of `gru`, and
        reverse where all layers have one direction.

    Returns:
      h_last, a tuple with each layer's last state in the form of h0; and ys [T, ..., H], the top
      layer's outputs (2H if bidirectional and merged by "concat").

    Raises:
      ValueError: sizes of layers do not fit each other or the form of h0 the layers, a rate is
        outside [0, 1) or acts without a key, merge is unknown, or as `gru`.
      TypeError: params is no sequence of layers, or as `gru`.

    Cost: the sum of the layers'. Dropout keeps its key; its masks are drawn again in the backward.
    Batch-major input is copied into the order of time once, and ys once back.

    >>> layers = init_stack(jax.random.key(0), 2, 3, num_layers=2, bidirectional=True)
    >>> h_last, ys = gru_stack(layers, jnp.ones((5, 4, 2)), dropout=0.2, key=jax.random.key(1))
    >>> ys.shape, h_last[1][0].shape
    ((5, 4, 6), (4, 3))
    """
    require_layers("gru_stack", params, xs, merge, residual)
    if not isinstance(variational, bool):
        raise TypeError(f"gru_stack: variational must be a bool, got {variational!r}.")
    require_states("gru_stack", params, h0)
    _require_taps(params, tap)
    rates = {"input_dropout": input_dropout, "dropout": dropout, "output_dropout": output_dropout}
    rates |= {"recurrent_dropout": recurrent_dropout, "zoneout": zoneout}
    require_rates("gru_stack", rates, key, deterministic)
    require_first_step("gru_stack", first_step)
    axis = require_axis("gru_stack", axis, xs.shape)
    require_flags("gru_stack", {"mask": mask, "resets": resets}, xs.shape[:-1])
    ys = jnp.moveaxis(xs, axis, 0)
    mask, resets = (None if v is None else jnp.moveaxis(v, axis, 0) for v in (mask, resets))
    if tap is not None:
        tap = jax.tree.map(lambda v: jnp.moveaxis(v, axis, 0), tap)
    keys = _split(None if deterministic else key, 2 * len(params) + 1)
    numbers = None
    if not variational:
        numbers = first_step + lax.broadcasted_iota(jnp.int32, (ys.shape[0],), 0)
    h_last: list[Any] = []
    for number, layer in enumerate(params):
        rate = dropout if number else input_dropout
        inputs = drop_steps(keys[2 * number], ys, rate, numbers)
        options = {"mask": mask, "resets": resets, "recurrent_dropout": recurrent_dropout}
        options |= {"zoneout": zoneout, "key": keys[2 * number + 1], "deterministic": deterministic}
        options |= {"first_step": first_step, "tap": None if tap is None else tap[number]}
        h0_layer = None if h0 is None else h0[number]
        if isinstance(layer, Bidirectional):
            h, hs = gru_bidirectional(
                layer, inputs, h0_layer, merge=merge, **options, **gru_options
            )
        else:
            h, hs = gru(layer, inputs, h0_layer, **options, **gru_options)
        ys = hs + ys if residual and number else hs
        h_last.append(h)
    ys = drop_steps(keys[-1], ys, output_dropout, numbers)
    return tuple(h_last), jnp.moveaxis(ys, 0, axis)


def gru_stack_cell(
    params: Sequence[Layer], x: Array, h: Sequence[Array], **stack_options: Any
) -> tuple[tuple[Array, ...], Array]:
    """One step of a stack of one direction: (h, y). What a stream calls for each input.

    Args:
      params: a sequence of `GRUParams`.
      x: [..., I].
      h: a sequence with each layer's state [..., H]; the first from `init_state`.
      **stack_options: of `gru_stack` without axis, reverse, truncate and tap; mask and resets are
        [...]. With a rate that acts, give every step of a stream the same key and its own
        first_step.

    Returns:
      h, the states after the step, and y [..., H], the top layer's output.

    Raises:
      ValueError: a layer is `Bidirectional`, which has to see the end before its first output, or
        as `gru_stack`.
      TypeError: an option belongs to sequences, or as `gru_stack`.

    Cost: that of one step; XLA removes the loop of length 1.

    >>> layers = init_stack(jax.random.key(0), 2, 3, num_layers=2)
    >>> h, y = gru_stack_cell(layers, jnp.ones((4, 2)), init_state(layers, (4,)))
    >>> y.shape
    (4, 3)
    """
    require_stack("gru_stack_cell", params)
    if any(isinstance(layer, Bidirectional) for layer in params):
        raise ValueError(
            "gru_stack_cell: params must hold layers of one direction, got a Bidirectional, whose "
            "outputs depend on later inputs; use gru_stack on whole sequences."
        )
    for name in ("axis", "reverse", "truncate", "tap"):
        if name in stack_options:
            raise TypeError(f"gru_stack_cell: {name} must be left out, as one step has no time.")
    require_float("gru_stack_cell", "x", x)
    if x.ndim < 1:
        raise ValueError(f"gru_stack_cell: x must have shape [..., I], got {x.shape}.")
    flags = {name: stack_options.get(name) for name in ("mask", "resets")}
    require_flags("gru_stack_cell", flags, x.shape[:-1], "x without its last axis")
    stack_options |= {name: None if v is None else v[None] for name, v in flags.items()}
    h, ys = gru_stack(params, x[None], h, **stack_options)
    return h, ys[0]


def reverse_resets(resets, axis):
    """Resets of the backward direction: a parting between t - 1 and t comes before step t - 1."""
    if resets is None:
        return None
    resets = jnp.moveaxis(resets, axis, 0)
    none = jnp.zeros_like(resets, shape=(1, *resets.shape[1:]))
    return jnp.moveaxis(jnp.concatenate([resets, none])[1:], 0, axis)


def _split(key, count):
    """Keys, or None for each without one."""
    return [None] * count if key is None else jax.random.split(key, count)


def output_size_of(layer: Layer, merge: Merge) -> int:
    """The size of a layer's outputs."""
    sizes = [direction.w_h.shape[0] for direction in directions_of(layer)]
    return sum(sizes) if merge == "concat" else sizes[0]


def directions_of(layer: Any) -> tuple[GRUParams, ...]:
    """The one or two GRUs of a layer."""
    return tuple(layer) if isinstance(layer, Bidirectional) else (layer,)


def require_stack(function, params):
    """TypeError unless params is a sequence of well-formed layers of one dtype."""
    single = isinstance(params, GRUParams | Bidirectional)
    sequence = isinstance(params, list | tuple) and not single
    if not sequence or not params:
        found = "an empty one" if sequence else type(params).__name__
        cure = "; put it into a tuple" if single else ""
        raise TypeError(
            f"{function}: params must be a sequence of layers, GRUParams or Bidirectional, "
            f"got {found}{cure}."
        )
    for number, layer in enumerate(params):
        if not isinstance(layer, GRUParams | Bidirectional):
            raise TypeError(
                f"{function}: params[{number}] must be a GRUParams or a Bidirectional, "
                f"got {type(layer).__name__}."
            )
        for direction in directions_of(layer):
            require_params(function, direction)
            wanted = directions_of(params[0])[0].w_x.dtype
            if direction.w_x.dtype != wanted:
                raise TypeError(
                    f"{function}: params[{number}] must have the dtype of params[0], {wanted}, "
                    f"got {direction.w_x.dtype}; cast one of them."
                )


def require_layers(function: str, params: Any, xs: Array, merge: Merge, residual: bool) -> None:
    """TypeError or ValueError for layers that do not fit xs or each other."""
    require_stack(function, params)
    require_choice(function, "merge", merge, _MERGES)
    if not isinstance(residual, bool):
        raise TypeError(f"{function}: residual must be a bool, got {residual!r}.")
    require_float(function, "xs", xs)
    size = directions_of(params[0])[0].w_x.shape[0]
    if xs.ndim < 2 or xs.shape[-1] != size:
        raise ValueError(
            f"{function}: xs must have shape [T, ..., I] with I={size} (rows of params[0].w_x), "
            f"got {xs.shape}."
        )
    source = "as the other direction"
    for number, layer in enumerate(params):
        for direction in directions_of(layer):
            if direction.w_x.shape[0] != size:
                raise ValueError(
                    f"{function}: params[{number}].w_x must have {size} rows ({source}), "
                    f"got {direction.w_x.shape[0]}."
                )
        output = output_size_of(layer, merge)
        if residual and number and output != size:
            raise ValueError(
                f"{function}: params[{number}] must have outputs of the size of its inputs for "
                f"residual=True, {size}, got {output}."
            )
        size, source = output, f"the outputs of params[{number}], merge={merge!r}"


def require_states(function: str, params: Sequence[Layer], h0: Any) -> None:
    """ValueError for an h0 that has not the form of the layers."""
    if h0 is None:
        return
    if not isinstance(h0, list | tuple) or len(h0) != len(params):
        raise ValueError(
            f"{function}: h0 must be a sequence of {len(params)} states, one for each layer, got "
            f"{_count(h0)}; init_state(params, batch_shape) has the form, and torch's "
            "[layers, B, H] is tuple(h0), with two directions tuple(zip(h0[::2], h0[1::2]))."
        )
    for number, (layer, h) in enumerate(zip(params, h0)):
        if isinstance(layer, Bidirectional):
            _require_pair(function, f"h0[{number}]", h)
        elif isinstance(h, list | tuple):
            raise ValueError(
                f"{function}: h0[{number}] must be one array [..., H], as params[{number}] has one "
                f"direction, got {len(h)} of them."
            )
        for direction, state in zip(
            directions_of(layer), h if isinstance(h, list | tuple) else [h]
        ):
            size = direction.w_h.shape[0]
            if state is not None and jnp.shape(state)[-1:] != (size,):
                raise ValueError(
                    f"{function}: h0[{number}] must have shape [..., {size}] (the rows of "
                    f"params[{number}]'s w_h), got {jnp.shape(state)}."
                )


def _require_taps(params, tap):
    """ValueError of `gru_stack` for a tap that has not the form of its layers."""
    if tap is None:
        return
    wrong = isinstance(tap, Tap) or not isinstance(tap, list | tuple) or len(tap) != len(params)
    found = "one Tap" if isinstance(tap, Tap) else _count(tap)
    for number, (layer, taps) in enumerate(() if wrong else zip(params, tap)):
        several = isinstance(layer, Bidirectional)
        for one in taps if several and isinstance(taps, list | tuple) else [taps]:
            if one is not None and not isinstance(one, Tap):
                wrong, found = True, f"{type(one).__name__} for layer {number}"
    if wrong:
        raise ValueError(
            f"gru_stack: tap must be a sequence of {len(params)} taps, one for each layer, got "
            f"{found}; init_taps(params, lead_shape) has the form."
        )


def _require_pair(function, argument, pair, noun="states"):
    """ValueError unless it is None or a pair."""
    single = isinstance(pair, Tap) or not isinstance(pair, list | tuple) or len(pair) != 2
    if pair is not None and single:
        found = "one Tap" if isinstance(pair, Tap) else _count(pair)
        raise ValueError(
            f"{function}: {argument} must be a pair of {noun}, forward and backward, got {found}."
        )


def _count(states):
    """What a wrong state is, in words."""
    if isinstance(states, list | tuple):
        return f"{len(states)} of them"
    shape = getattr(states, "shape", None)
    return type(states).__name__ if shape is None else f"an array of shape {shape}"
