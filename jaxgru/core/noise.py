"""Random masks: recurrent dropout, zoneout, and dropout between layers."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.matmul import state_dtype
from jaxgru.core.sharding import place_like

Array = jax.Array


def draw_scale(key, rate, h0):
    """1/(1 - rate) with probability 1 - rate, else 0, in the shape of h0 and the state dtype."""
    kept = draw_kept(key, rate, h0.shape, h0)
    return kept.astype(state_dtype(h0.dtype)) / (1 - rate)


def draw_kept(key: Array, rate: float, shape: tuple[int, ...], like: Array) -> Array:
    """Bool of that shape, False with probability `rate`, laid out over a mesh as `like` is."""
    return place_like(jax.random.bernoulli(key, 1 - rate, shape), like)


def draw_kept_per_step(
    key: Array, rate: float, numbers: Array, shape: tuple[int, ...], like: Array
) -> Array:
    """The same for each step, [T, *shape], from the key and the number of that step alone."""

    def draw(number):
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, shape)

    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    implementation = str(jax.random.key_impl(key if typed else jax.random.wrap_key_data(key)))
    # Under vmap the hardware generators draw a whole batch from its first key.
    drawn = jax.vmap(draw)(numbers) if "threefry" in implementation else lax.map(draw, numbers)
    return place_like(drawn, like)


def drop(key: Array | None, x: Array, rate: float) -> Array:
    """x m / (1 - rate) with a mask m drawn from the key; x itself without one.

    Under `jax.checkpoint` the key is all that is kept: the backward draws the mask again.
    """
    return _drop(key, x, rate, lambda key, x: draw_kept(key, rate, x.shape, x))


def drop_steps(key, x, rate, numbers):
    """`drop` of x [T, ...]: a mask a step, by its number, or one for all where there are none."""

    def draw(key, x):
        if numbers is None:
            return draw_kept(key, rate, (1, *x.shape[1:]), x)
        return draw_kept_per_step(key, rate, numbers, x.shape[1:], x)

    return _drop(key, x, rate, draw)


def _drop(key, x, rate, draw):
    if key is None or rate == 0:
        return x

    def masked(key, x):
        return jnp.where(draw(key, x), x / (1 - rate), jnp.zeros_like(x))

    return jax.checkpoint(masked)(key, x)
