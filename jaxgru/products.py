"""Matrix products of a layer in mixed precision, their transposes, and their normalization.

Operands are in the weights' dtype and sums in the state dtype: float32 for the half types, else the
weights' own. With a gain g, a product v is normalized over its H entries, as in Ba et al. 2016
(arXiv:1607.06450), eq. 4::

    N(v) = g * y,    y = (v - mean v) * i,    i = 1 / sqrt(var v + 1e-5)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
_EPSILON = 1e-5


class Norm(NamedTuple):
    """What the derivatives of a normalization need."""

    y: Array  # [..., H], of mean 0 and variance 1
    i: Array  # [..., 1], the inverse of the standard deviation


def state_dtype(dtype: Any) -> Any:
    """The dtype of state, gates and sums: float32 for half types, else the dtype itself."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def on_auto_mesh() -> bool:
    """True where JAX divides arrays over devices itself: inside a mesh with Auto axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[name] > 1 for name in mesh.auto_axes)


def vary_alike(tree: Any, others: Any = None) -> Any:
    """The tree with every leaf varying over all mesh axes that any leaf of either varies over.

    Inside `jax.shard_map` the scan's carry and the cotangents then have one type, and JAX's own
    transpose of this cast sums the parameters' gradient over the mesh, once.
    """
    axes = frozenset().union(*(varying_axes(v) for v in jax.tree.leaves((tree, others))))

    def cast(v):
        missing = tuple(sorted(axes - varying_axes(v), key=str))
        return lax.pcast(v, missing, to="varying") if missing else v

    return jax.tree.map(cast, tree) if axes else tree


def varying_axes(v: Any) -> frozenset[Any]:
    """The mesh axes over which v varies inside `jax.shard_map`; JAX 0.10 renamed where it says."""
    kind = jax.typeof(v)
    kind = getattr(kind, "manual_axis_type", kind)
    return getattr(kind, "varying", None) or getattr(kind, "vma", frozenset())


def blocks(w: Array) -> list[Array]:
    """The three blocks r | z | n of the last axis."""
    return jnp.split(w, 3, axis=-1)


def gates_and_candidate(w: Array) -> list[Array]:
    """The blocks r | z of the last axis, side by side, and the block n."""
    return jnp.split(w, [2 * (w.shape[-1] // 3)], axis=-1)


def like_row(b: Array, v: Array) -> Array:
    """[H] in v's dtype with as many unit axes in front as v has, to broadcast explicitly."""
    return b.astype(v.dtype).reshape((1,) * (v.ndim - 1) + b.shape)


def sum_rows(d: Array) -> Array:
    """[..., H] summed over all leading axes."""
    return d.sum(axis=tuple(range(d.ndim - 1)))


def matmul(x: Array, w: Array) -> Array:
    """x w."""
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(
        x.astype(w.dtype), w, contract, preferred_element_type=state_dtype(w.dtype)
    )


def weight_vjp(x: Array, d: Array, w: Array) -> Array:
    """x^T d: the cotangent of w in y = x w, summed over the leading axes, in the dtype of d.

    Formed as JAX's own transpose of the product, which knows how to reduce over an axis that an
    explicit mesh shards; a product written out by hand is refused there.
    """
    x, d = _flatten(x), _flatten(d)
    return jax.vjp(lambda w: matmul(x, w), w.astype(d.dtype))[1](d)[0]


def normalize(v: Array, gain: Array | None) -> tuple[Array, Norm | None]:
    """N(v) and what its derivatives need; v itself where there is no gain."""
    if gain is None:
        return v, None
    centered = v - v.mean(axis=-1, keepdims=True)
    i = lax.rsqrt((centered * centered).mean(axis=-1, keepdims=True) + _EPSILON)
    y = centered * i
    return y * like_row(gain, y), Norm(y, i)


def normalize_vjp(d: Array, gain: Array | None, norm: Norm | None) -> Array:
    """The cotangent of v given d, that of N(v): (g d - mean(g d) - y mean(g d y)) i."""
    return d if gain is None else _project_out(d * like_row(gain, d), norm)


def normalize_jvp(t: Array, gain: Array | None, norm: Norm | None) -> Array:
    """The tangent of N(v) given t, that of v: g (t - mean t - y mean(t y)) i."""
    return t if gain is None else _project_out(t, norm) * like_row(gain, t)


def _project_out(d, norm):
    """(d - mean d - y mean(d y)) i, a symmetric map: it is dy/dv and its own transpose."""
    y, i = norm
    along = (d * y).mean(axis=-1, keepdims=True)
    return (d - d.mean(axis=-1, keepdims=True) - y * along) * i


def _flatten(x):
    """[..., F] as one matrix, the fastest form on CPU, unless a leading axis may be sharded.

    Rows that lie on several devices would first be sent to all of them. Explicit axes of a mesh
    tell in the type of x; Auto ones do not, so any of them in the context counts.
    """
    sharding = getattr(jax.typeof(x), "sharding", None)
    if sharding is not None and any(axis is not None for axis in sharding.spec[:-1]):
        return x
    if on_auto_mesh():
        return x
    return lax.collapse(x, 0, x.ndim - 1) if x.ndim > 1 else x[None]
