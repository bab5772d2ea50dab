"""Dropout around the layers of a stack."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxgru.core.checks import require_bool, require_rate
from jaxgru.core.noise import draw_mask, draw_masks

Array = jax.Array


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

    def rates(self) -> dict[str, float]:
        """The rates by the name that errors use."""
        names = ("input", "between", "output")
        return {f"dropout.{name}": getattr(self, name) for name in names}


def require_dropout(function: str, dropout: Any) -> Dropout:
    """The dropout, that between layers for a number; TypeError or ValueError for anything else."""
    if isinstance(dropout, Dropout):
        return dropout
    require_rate(function, "dropout", dropout)
    return Dropout(between=dropout)


def drop(key: Array | None, x: Array, rate: float) -> Array:
    """x m / (1 - rate) with a mask m drawn from the key; x itself for key None.

    `jax.checkpoint` saves the key alone: the backward pass draws the mask again.
    """
    return _drop(key, x, rate, lambda key, x: draw_mask(key, rate, x.shape, x))


def drop_steps(key, x, rate, numbers):
    """`drop` of x [T, ...]: one mask for each step, by its number, or one for all for None."""

    def draw(key, x):
        if numbers is None:
            return draw_mask(key, rate, (1, *x.shape[1:]), x)
        return draw_masks(key, rate, numbers, x.shape[1:], x)

    return _drop(key, x, rate, draw)


def _drop(key, x, rate, draw):
    if key is None or rate == 0:
        return x

    def masked(key, x):
        return jnp.where(draw(key, x), x / (1 - rate), jnp.zeros_like(x))

    return jax.checkpoint(masked)(key, x)
