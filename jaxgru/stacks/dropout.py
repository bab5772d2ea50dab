"""Dropout around the layers of a stack."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxgru.core.checks import require_bool, require_rate
from jaxgru.core.noise import (
    Rate,
    as_constant,
    draw_mask,
    draw_masks,
    is_zero,
    scale_kept,
    with_static_numbers,
)


@with_static_numbers
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Rates of the dropout around the layers of a stack.

    Dropout at rate p sets each entry to 0 with probability p and multiplies the others by
    1 / (1 - p). A rate is a number, or a scalar array, which may be traced: see `Noise`.

    Attributes:
      input: in [0, 1), before the first layer.
      between: in [0, 1), before each layer but the first, as `torch.nn.GRU(dropout=...)`.
      output: in [0, 1), after the last layer.
      variational: True draws one mask for all steps (Gal and Ghahramani 2016, arXiv:1512.05287)
        instead of one for each step.

    Raises:
      ValueError: a rate is outside of [0, 1).
      TypeError: a rate is no number or floating scalar array, or variational is no bool.

    >>> Dropout(between=0.2).variational
    False
    """

    input: Rate = 0.0
    between: Rate = 0.0
    output: Rate = 0.0
    variational: bool = False

    def __post_init__(self):
        for name in ("input", "between", "output"):
            object.__setattr__(self, name, require_rate("Dropout", name, getattr(self, name)))
        require_bool("Dropout", "variational", self.variational)


def drop(key, x, rate, numbers=None):
    """x [T, ...] times m / (1 - rate) with a mask m drawn from the key; x itself for key None.

    With the numbers of the steps [T], a mask is drawn for each step by its number, without them one
    for all steps. `jax.checkpoint` saves the key alone: the backward pass draws the masks again.
    """
    if key is None or is_zero(rate):
        return x
    rate = as_constant(rate)

    def masked(key, x):
        if numbers is None:
            mask = draw_mask(key, rate, (1, *x.shape[1:]), x)
        else:
            mask = draw_masks(key, rate, numbers, x.shape[1:], x)
        return jnp.where(mask, scale_kept(x, rate), jnp.zeros_like(x))

    return jax.checkpoint(masked)(key, x)
