"""Matrix products of a layer in mixed precision, and their transposes.

The state dtype is float32 for float16 and bfloat16 weights, else that of the weights. Sums, gates,
states and the operands of weight gradients have it; other operands have the dtype of the weights.
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
    contract, dtype = (((x.ndim - 1,), (0,)), ((), ())), state_dtype(w.dtype)
    return lax.dot_general(x.astype(w.dtype), w, contract, preferred_element_type=dtype)


def weight_vjp(x: jax.Array, d: jax.Array, w: jax.Array) -> jax.Array:
    """x^T d: the cotangent of w in y = x w, summed over the leading axes, in the dtype of d.

    It uses JAX's transpose of `matmul`, because that can sum over an axis that an explicit mesh
    shards; a product x.T @ d raises an error there.
    """
    x, d = _flatten(x), _flatten(d)
    return jax.vjp(lambda w: matmul(x, w), w.astype(d.dtype))[1](d)[0]


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
