"""Dropout around the layers of a stack."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxgru.core.checks import require_bool, require_rate
from jaxgru.core.noise import draw_mask, draw_masks


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Rates of the dropout around the layers of a stack; static.

    Dropout at rate p multiplies by 0 with probability p and by 1 / (1 - p) else.

    Attributes:
      input: in [0, 1), before the first layer.
      between: in [0, 1), before every other layer, as `torch.nn.GRU(dropout=...)`.
      output: in [0, 1), after the last layer.
      variational: True draws one mask for all steps (Gal and Ghahramani 2016, arXiv:1512.05287)
        instead of one for each step.

    Raises:
      ValueError: a rate is outside of [0, 1).
      TypeError: a rate is no Python number, or variational no bool.

    >>> Dropout(between=0.2).variational
    False
    """

    input: float = 0.0
    between: float = 0.0
    output: float = 0.0
    variational: bool = False

    def __post_init__(self):
        for name in ("input", "between", "output"):
            require_rate("Dropout", name, getattr(self, name))
        require_bool("Dropout", "variational", self.variational)


def drop(key, x, rate, numbers=None):
    """x [T, ...] times m / (1 - rate) with a mask m drawn from the key; x itself for key None.

    With the numbers of the steps [T], a mask is drawn for each step by its number, without them one
    for all steps. `jax.checkpoint` saves the key alone: the backward pass draws the masks again.
    """
    if key is None or rate == 0:
        return x

    def masked(key, x):
        if numbers is None:
            mask = draw_mask(key, rate, (1, *x.shape[1:]), x)
        else:
            mask = draw_masks(key, rate, numbers, x.shape[1:], x)
        return jnp.where(mask, x / (1 - rate), jnp.zeros_like(x))

    return jax.checkpoint(masked)(key, x)
