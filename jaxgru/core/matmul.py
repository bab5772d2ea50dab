"""Matrix products of a layer in mixed precision, and their transposes.

Sums, gates, states and the operands of weight gradients have the state dtype (`state_dtype` of the
weights); the operands of the other products have the dtype of the weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.sharding import on_auto_mesh


def state_dtype(dtype: Any) -> Any:
    """The dtype of state, gates and sums: float32 for float16 and bfloat16, else dtype."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def blocks(w: jax.Array | None) -> list[Any]:
    """The three blocks r | z | n of the last axis; three None if w is None."""
    return [None, None, None] if w is None else jnp.split(w, 3, axis=-1)


def gates_and_candidate(w: jax.Array) -> list[jax.Array]:
    """The blocks r | z of the last axis, side by side, and the block n."""
    return jnp.split(w, [2 * (w.shape[-1] // 3)], axis=-1)


def like_row(b: jax.Array, v: jax.Array) -> jax.Array:
    """b in the dtype and with the rank of v, so that it broadcasts over the leading axes of v."""
    return b.astype(v.dtype).reshape((1,) * (v.ndim - b.ndim) + b.shape)


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w, summed in the state dtype."""
    axes = (((x.ndim - 1,), (0,)), ((), ()))  # the last of x with the first of w, no batch axes
    dtype = state_dtype(w.dtype)
    return lax.dot_general(x.astype(w.dtype), w, axes, preferred_element_type=dtype)


def weight_vjp(x: jax.Array, dy: jax.Array, w: jax.Array) -> jax.Array:
    """x^T dy: the cotangent of w in y = x w, summed over the leading axes, in the dtype of dy.

    It uses JAX's transpose of `matmul`, because that can sum over an axis that an explicit mesh
    shards; a product x.T @ dy raises an error there.
    """
    x, dy = _flatten(x), _flatten(dy)
    return jax.vjp(lambda w: matmul(x, w), w.astype(dy.dtype))[1](dy)[0]


def _flatten(x):
    """x as a matrix, which is fastest on a CPU; x itself if a leading axis is or may be sharded.

    Flattening a sharded axis would gather its rows on every device. The type of x shows sharding
    over explicit axes of a mesh but not over Auto axes, so with any Auto axis x is not flattened.
    """
    sharding = getattr(jax.typeof(x), "sharding", None)
    explicit = sharding is not None and any(axis is not None for axis in sharding.spec[:-1])
    if explicit or on_auto_mesh():
        return x
    return lax.collapse(x, 0, x.ndim - 1) if x.ndim > 1 else x[None]
