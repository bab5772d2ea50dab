"""Random masks of the recurrence: recurrent dropout and zoneout."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.checks import require_key_for, require_rate
from jaxgru.core.matmul import state_dtype
from jaxgru.core.sharding import place_like


@dataclasses.dataclass(frozen=True)
class Noise:
    """Rates of the noise inside the recurrence; static.

    With recurrent dropout the products with w_h read d * h_{t-1} in place of h_{t-1}. An entry of d
    is 0 with probability recurrent_dropout and 1 / (1 - recurrent_dropout) otherwise; d is the same
    at every step (Gal and Ghahramani 2016, arXiv:1512.05287, eq. 7).

    With zoneout each step keeps each unit of h_{t-1} with probability zoneout (Krueger et al. 2017,
    arXiv:1606.01305, eq. 2). In evaluation (deterministic=True) its mean acts:
    h_t = zoneout h_{t-1} + (1 - zoneout) step(x_t, h_{t-1}).

    Attributes:
      recurrent_dropout: in [0, 1).
      zoneout: in [0, 1).

    Raises:
      ValueError: a rate is outside of [0, 1).
      TypeError: a rate is not a number, or is traced.

    >>> Noise(zoneout=0.1)
    Noise(recurrent_dropout=0.0, zoneout=0.1)
    """

    recurrent_dropout: float = 0.0
    zoneout: float = 0.0

    def __post_init__(self):
        require_rate("Noise", "recurrent_dropout", self.recurrent_dropout)
        require_rate("Noise", "zoneout", self.zoneout)


def require_noise(
    function: str, noise: Any, key: Any, deterministic: Any, more: dict[str, float] | None = None
) -> Noise:
    """The noise, or `Noise()` for None; raises if it, or a rate of `more`, needs a missing key."""
    noise = Noise() if noise is None else noise
    if not isinstance(noise, Noise):
        raise TypeError(
            f"{function}: noise must be a Noise or None, got {noise!r}; pass its rates by name, "
            "Noise(recurrent_dropout=...)."
        )
    require_key_for(function, {**(more or {}), **dataclasses.asdict(noise)}, key, deterministic)
    return noise


def draw_state_dropout(key: jax.Array, rate: float, h0: jax.Array) -> jax.Array | None:
    """1/(1 - rate) with probability 1 - rate, else 0, as h0 but in the state dtype; or None."""
    if not rate:
        return None
    mask = draw_mask(key, rate, h0.shape, h0)
    return mask.astype(state_dtype(h0.dtype)) / (1 - rate)


def draw_mask(key: jax.Array, rate: float, shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Bool of that shape, False with probability `rate`, sharded over a mesh as `like` is."""
    return place_like(jax.random.bernoulli(key, 1 - rate, shape), like)


def draw_masks(
    key: jax.Array, rate: float, numbers: jax.Array, shape: tuple[int, ...], like: jax.Array
) -> jax.Array:
    """A `draw_mask` for each step, [T, *shape], from the key and the number of that step alone."""

    def draw(number):
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, shape)

    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    implementation = str(jax.random.key_impl(key if typed else jax.random.wrap_key_data(key)))
    # Under vmap the hardware generators draw a whole batch from its first key.
    drawn = jax.vmap(draw)(numbers) if "threefry" in implementation else lax.map(draw, numbers)
    return place_like(drawn, like)
