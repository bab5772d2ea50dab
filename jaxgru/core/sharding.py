"""Arrays on several devices: meshes, and types inside `jax.shard_map`."""

from typing import Any

import jax
from jax import lax


def on_auto_mesh() -> bool:
    """True inside a mesh with an Auto axis of several devices, over which the compiler shards."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[name] > 1 for name in mesh.auto_axes)


def cast_to_common_varying_axes(tree: Any, others: Any = None) -> Any:
    """The tree, each leaf cast to vary over all mesh axes over which a leaf of either tree varies.

    The carries and cotangents of a scan then have equal types inside `jax.shard_map`, and the
    transpose of the cast sums the gradient of the parameters over the mesh, once per call.
    """
    axes = frozenset().union(*(varying_axes(v) for v in jax.tree.leaves((tree, others))))

    def cast(v):
        missing = tuple(sorted(axes - varying_axes(v), key=str))
        return lax.pcast(v, missing, to="varying") if missing else v

    return jax.tree.map(cast, tree) if axes else tree


def varying_axes(v: Any) -> frozenset[Any]:
    """The mesh axes over which v varies inside `jax.shard_map`."""
    return jax.typeof(v).manual_axis_type.varying


def place_like(v, like):
    """v sharded over an explicit mesh as `like` is, on the last axes of equal size."""
    sharding = getattr(jax.typeof(like), "sharding", None)
    if sharding is None or all(axis is None for axis in sharding.spec):
        return v
    lead = v.ndim - like.ndim
    sizes = zip(v.shape[lead:], like.shape, sharding.spec)
    spec = [axis if size == whole else None for size, whole, axis in sizes]
    return jax.sharding.reshard(v, jax.P(*[None] * lead, *spec))
