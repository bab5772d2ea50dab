"""Matrix products of a layer in mixed precision, and their transposes.

Operands have the dtype of the weights, but those of weight gradients have the state dtype, as all
sums have: float32 for half types, else the dtype of the weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.sharding import on_auto_mesh


def state_dtype(dtype: Any) -> Any:
    """The dtype of state, gates and sums: float32 for half types, else the dtype itself."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def blocks(w: jax.Array) -> list[jax.Array]:
    """The three blocks r | z | n of the last axis."""
    return jnp.split(w, 3, axis=-1)


def gates_and_candidate(w: jax.Array) -> list[jax.Array]:
    """The blocks r | z of the last axis, side by side, and the block n."""
    return jnp.split(w, [2 * (w.shape[-1] // 3)], axis=-1)


def like_row(b: jax.Array, v: jax.Array) -> jax.Array:
    """[H] in v's dtype with as many unit axes in front as v has, to broadcast explicitly."""
    return b.astype(v.dtype).reshape((1,) * (v.ndim - 1) + b.shape)


def sum_rows(d: jax.Array) -> jax.Array:
    """[..., H] summed over all leading axes."""
    return d.sum(axis=tuple(range(d.ndim - 1)))


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x w."""
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(
        x.astype(w.dtype), w, contract, preferred_element_type=state_dtype(w.dtype)
    )


def weight_vjp(x: jax.Array, d: jax.Array, w: jax.Array) -> jax.Array:
    """x^T d: the cotangent of w in y = x w, summed over the leading axes, in the dtype of d.

    Formed as JAX's own transpose of the product, which knows how to reduce over an axis that an
    explicit mesh shards; a product written out by hand is refused there.
    """
    x, d = _flatten(x), _flatten(d)
    return jax.vjp(lambda w: matmul(x, w), w.astype(d.dtype))[1](d)[0]


def _flatten(x):
    """[..., F] as one matrix, the fastest form on a CPU, where no leading axis can be sharded.

    Rows that lie on several devices would first be sent to all of them. Explicit axes of a mesh are
    visible in the type of x; Auto axes are not, so any mesh with Auto axes counts.
    """
    sharding = getattr(jax.typeof(x), "sharding", None)
    if sharding is not None and any(axis is not None for axis in sharding.spec[:-1]):
        return x
    if on_auto_mesh():
        return x
    return lax.collapse(x, 0, x.ndim - 1) if x.ndim > 1 else x[None]
