"""Draws the parameters of a stack, and the states and taps that have its form."""

import functools
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxgru.core.checks import (
    explain_unknown_arguments,
    require_bool,
    require_choice,
    require_count,
    require_key,
)
from jaxgru.core.parameters import CHO_2014, GRUSpec
from jaxgru.core.recurrence import Tap
from jaxgru.initializers import Scheme, init_gru
from jaxgru.stacks.checks import require_grus
from jaxgru.stacks.forms import Bidirectional, Layer, Merge, describe, map_grus, output_size_of


@explain_unknown_arguments
def init_stack(
    key: jax.Array, input_size: int, hidden_size: int | Sequence[int],
    num_layers: int | None = None, *, spec: GRUSpec = CHO_2014, bidirectional: bool = False,
    merge: Merge = "concat", bias: bool = True, layer_norm: bool = False,
    scheme: Scheme = "orthogonal", dtype: Any = jnp.float32,
) -> tuple[Layer, ...]:  # fmt: skip
    """Draws the parameters of a stack; `init_gru` draws each layer and direction.

    Args:
      key: a `jax.random.key`.
      input_size: I of the first layer.
      hidden_size: H of every layer, or a sequence with the H of each.
      num_layers: at least 1; None for as many as there are sizes, or one.
      spec: the equation of every layer, as in `init_gru`.
      bidirectional: True makes every layer a `Bidirectional`.
      merge: how `gru_stack` will join the directions: with "concat" the input of the next layer has
        size 2H, with "sum" H.
      bias, layer_norm, scheme, dtype: as in `init_gru`.

    Returns:
      A tuple of layers.

    Raises:
      ValueError: a size is not positive, sizes and layers differ in number, or a choice is unknown.
      TypeError: a size is no integer, or an argument is of another kind.

    >>> layers = init_stack(jax.random.key(0), 2, 3, num_layers=2, bidirectional=True)
    >>> layers[1].backward.w_x.shape
    (6, 9)
    """
    require_key("init_stack", key)
    require_count("init_stack", "input_size", input_size)
    if num_layers is not None:
        require_count("init_stack", "num_layers", num_layers)
    require_choice("init_stack", "merge", merge, get_args(Merge))
    require_bool("init_stack", "bidirectional", bidirectional)
    several = isinstance(hidden_size, Sequence)
    sizes = list(hidden_size) if several else [hidden_size] * (num_layers or 1)
    if not sizes or len(sizes) != (num_layers or len(sizes)):
        each = f"one size for each of num_layers={num_layers} layers"
        wanted = each if num_layers else "at least one size"
        raise ValueError(f"init_stack: hidden_size must hold {wanted}, got {hidden_size}.")
    draw = functools.partial(
        init_gru, spec=spec, bias=bias, layer_norm=layer_norm, scheme=scheme, dtype=dtype
    )
    layers: list[Layer] = []
    for size, layer_key in zip(sizes, jax.random.split(key, len(sizes))):
        require_count("init_stack", "hidden_size", size)
        keys = jax.random.split(layer_key) if bidirectional else [layer_key]
        directions = [draw(k, input_size, size) for k in keys]
        layers.append(Bidirectional(*directions) if bidirectional else directions[0])
        input_size = output_size_of(layers[-1], merge)
    return tuple(layers)


def init_state(params: Any, batch_shape: Sequence[int] = ()) -> Any:
    """The state of zeros of a layer or stack.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack.
      batch_shape: the batch axes of the sequences; none by default.

    Returns:
      [*batch_shape, H] in the dtype of the parameters for each GRU, in the form of params.

    Raises:
      TypeError: params is none of the three, or batch_shape no sequence.

    >>> [h.shape for h in init_state(init_stack(jax.random.key(0), 2, 3, num_layers=2), (4,))]
    [(4, 3), (4, 3)]
    """
    if not isinstance(batch_shape, Sequence):
        cure = f"; pass ({batch_shape},)" if isinstance(batch_shape, int) else ""
        raise TypeError(f"init_state: batch_shape must be a sequence, got {batch_shape!r}{cure}.")
    require_grus("init_state", params)
    return map_grus(lambda p: jnp.zeros((*batch_shape, p.w_h.shape[0]), p.w_h.dtype), params)


def init_taps(params: Any, lead_shape: Sequence[int]) -> Any:
    """Taps of zeros for a layer or stack, to differentiate a loss with respect to every state.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a stack.
      lead_shape: the shape of xs without its last axis: [T, ...], or [B, T] with axis=1.

    Returns:
      A `Tap` of xs [*lead_shape, I] and hs [*lead_shape, H] in the dtype of the parameters for each
      GRU, in the form of params. Pass it on as `tap`. Where xs is sharded, add zeros made from xs
      (`jnp.zeros_like(xs[..., :1])`) to every array, so that the taps are sharded as it is: inside
      `jax.shard_map` JAX would sum them over the mesh.

    Raises:
      TypeError: params is none of the three, or lead_shape no sequence.

    >>> from jaxgru import gru
    >>> params = init_gru(jax.random.key(0), 2, 3)
    >>> loss = lambda tap: gru(params, jnp.ones((5, 2)), tap=tap)[0].sum()
    >>> flow = jax.grad(loss)(init_taps(params, (5,)))
    >>> flow.hs[-1].tolist(), flow.xs.shape  # the last state is what the loss sums
    ([1.0, 1.0, 1.0], (5, 2))
    """
    if not isinstance(lead_shape, Sequence):
        raise TypeError(
            "init_taps: lead_shape must be a sequence of sizes, xs.shape[:-1], got "
            f"{describe(lead_shape)}."
        )
    require_grus("init_taps", params)

    def zeros_like_rows(w):
        return jnp.zeros((*lead_shape, w.shape[0]), w.dtype)

    return map_grus(lambda p: Tap(zeros_like_rows(p.w_x), zeros_like_rows(p.w_h)), params)
