"""Dropout around the layers of a stack."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgru.core.checks import is_traced, require_bool, require_rate
from jaxgru.core.noise import draw_mask, draw_masks


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Rates of the dropout around the layers of a stack; static.

    Dropout at rate p sets each entry to 0 with probability p and multiplies the others by
    1 / (1 - p). A rate is a number; a scalar array that is not traced becomes one.

    Attributes:
      input: in [0, 1), before the first layer.
      between: in [0, 1), before each layer but the first, as `torch.nn.GRU(dropout=...)`.
      output: in [0, 1), after the last layer.
      variational: True draws one mask for all steps (Gal and Ghahramani 2016, arXiv:1512.05287)
        instead of one for each step.

    Raises:
      ValueError: a rate is outside of [0, 1).
      TypeError: a rate is no number or is traced, or variational is no bool.

    >>> Dropout(between=0.2).variational
    False
    """

    input: float = 0.0
    between: float = 0.0
    output: float = 0.0
    variational: bool = False

    def __post_init__(self):
        for name in ("input", "between", "output"):
            object.__setattr__(self, name, as_rate("Dropout", name, getattr(self, name)))
        require_bool("Dropout", "variational", self.variational)


def as_rate(function: str, argument: str, rate: Any) -> Any:
    """The rate as a number of Python; TypeError or ValueError unless it is one in [0, 1)."""
    if isinstance(rate, np.generic | np.ndarray | jax.Array) and not is_traced(rate):
        rate = rate.item() if rate.shape == () else rate
    require_rate(function, argument, rate)
    return rate


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
