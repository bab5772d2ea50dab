"""Random masks of the recurrence: recurrent dropout and zoneout."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgru.core import checks
from jaxgru.core.matmul import state_dtype
from jaxgru.core.sharding import place_like

Rate = float | np.floating | jax.Array  # an array may be traced


def with_static_numbers(kind):
    """Makes a dataclass a pytree: Python numbers in its fields are static, the rest are leaves."""
    names = [field.name for field in dataclasses.fields(kind)]

    def flatten(value):
        values = [getattr(value, name) for name in names]
        static = tuple(v if isinstance(v, int | float) else None for v in values)
        return [v for v in values if not isinstance(v, int | float)], static

    def unflatten(static, data):
        value, data = object.__new__(kind), iter(data)  # no checks: JAX puts any object into fields
        for name, number in zip(names, static):
            object.__setattr__(value, name, next(data) if number is None else number)
        return value

    jax.tree_util.register_pytree_node(kind, flatten, unflatten)
    return kind


@with_static_numbers
@dataclasses.dataclass(frozen=True)
class Noise:
    """Rates of the noise inside the recurrence.

    With recurrent dropout the products with w_h read d * h_{t-1} in place of h_{t-1}. An entry of d
    is 0 with probability recurrent_dropout and 1 / (1 - recurrent_dropout) otherwise; d is the same
    at every step (Gal and Ghahramani 2016, arXiv:1512.05287, eq. 7).

    With zoneout each step keeps each unit of h_{t-1} with probability zoneout (Krueger et al. 2017,
    arXiv:1606.01305, eq. 2). Evaluation (deterministic=True) uses the mean:
    h_t = zoneout h_{t-1} + (1 - zoneout) step(x_t, h_{t-1}).

    A rate that is a number of Python or NumPy is static: 0 costs nothing, and each new value
    compiles the program again. A rate that is a scalar array of JAX may be traced, such as the
    value of a schedule in a train step, and one program serves all values. It gives the same masks
    as a Python float of its value, and has no gradient. The leaves of a Noise are these arrays.

    Attributes:
      recurrent_dropout: in [0, 1); a traced rate cannot be checked.
      zoneout: likewise.

    Raises:
      ValueError: a rate is outside of [0, 1).
      TypeError: a rate is not a number or a floating scalar array.

    >>> Noise(zoneout=0.1)
    Noise(recurrent_dropout=0.0, zoneout=0.1)
    """

    recurrent_dropout: Rate = 0.0
    zoneout: Rate = 0.0

    def __post_init__(self):
        for name, rate in vars(self).items():
            object.__setattr__(self, name, checks.require_rate("Noise", name, rate))


def require_noise(
    function: str, noise: Any, key: Any, deterministic: Any, more: dict[str, Any] | None = None
) -> Noise:
    """The noise, `Noise()` for None. Raises if key is None but a rate of it or `more` needs one."""
    noise = Noise() if noise is None else noise
    if not isinstance(noise, Noise):
        raise TypeError(
            f"{function}: noise must be a Noise or None, got {noise!r}; pass its rates by name, "
            "Noise(recurrent_dropout=...)."
        )
    noise = Noise(**vars(noise))  # checks the rates: `unflatten` did not
    checks.require_bool(function, "deterministic", deterministic)
    rates = (more or {}) | vars(noise)
    acting = [name for name, rate in rates.items() if checks.is_traced(rate) or float(rate)]
    if acting and key is None and not deterministic:
        shown = ", ".join(checks.show_rate(name, rates[name]) for name in acting)
        raise ValueError(
            f"{function}: key must be a jax.random.key for {shown}, got None; pass "
            "deterministic=True for evaluation."
        )
    if key is not None:
        checks.require_key(function, key)
    return noise


def is_zero(rate: Any) -> bool:
    """True for a static rate of 0. An array may hold any rate, so it counts as above 0."""
    return isinstance(rate, int | float) and rate == 0


def as_constant(rate: Any) -> Any:
    """The rate; an array gets no gradient, and the dtype that a Python float would have."""
    if not isinstance(rate, jax.Array):
        return rate
    return lax.stop_gradient(rate.astype(jnp.result_type(float)))


def scale_kept(x: jax.Array, rate: Any) -> jax.Array:
    """x / (1 - rate), in the dtype of x."""
    kept = 1 - rate
    return x / (kept.astype(x.dtype) if isinstance(kept, jax.Array) else kept)


def draw_state_dropout(key: jax.Array, rate: Any, h0: jax.Array) -> jax.Array | None:
    """1/(1 - rate) with probability 1 - rate, else 0; h0's shape, state dtype. None for rate 0."""
    if is_zero(rate):
        return None
    rate = as_constant(rate)
    mask = draw_mask(key, rate, h0.shape, h0)
    return scale_kept(mask.astype(state_dtype(h0.dtype)), rate)


def draw_mask(key: jax.Array, rate: Any, shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Bool of that shape, False with probability `rate`, sharded over a mesh as `like` is."""
    return place_like(jax.random.bernoulli(key, 1 - rate, shape), like)


def draw_masks(
    key: jax.Array, rate: Any, numbers: jax.Array, shape: tuple[int, ...], like: jax.Array
) -> jax.Array:
    """A `draw_mask` for each step, [T, *shape], from the key and the number of that step alone.

    rate: a scalar for all steps, or [T, ...].
    """

    def draw(number, rate=rate):
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, shape)

    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    implementation = str(jax.random.key_impl(key if typed else jax.random.wrap_key_data(key)))
    steps = (numbers, rate) if jnp.ndim(rate) else (numbers,)
    # Under vmap, "threefry" uses the key of each step; "rbg" would draw all from the first key.
    if "threefry" in implementation:
        drawn = jax.vmap(draw)(*steps)
    else:
        drawn = lax.map(lambda step: draw(*step), steps)
    return place_like(drawn, like)
