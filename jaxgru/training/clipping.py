"""Global norm and clipping of gradients whose squares overflow or underflow."""

import chex
import jax
import jax.numpy as jnp
import optax

from jaxgru.core.checks import is_traced


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Clips a gradient by its global norm, like `optax.clip_by_global_norm`, however large it is.

    A gradient g with norm |g| >= max_norm becomes max_norm * g / |g| (Pascanu et al. 2013,
    https://arxiv.org/abs/1211.5063, algorithm 1).

    The square of 1e30 is infinite in float32, so optax turns such a gradient into zeros. Here the
    entries are scaled by a power of two before they are squared; where optax's result is right, the
    bits are the same. A gradient with NaN or infinity has no direction and is returned unchanged
    (optax turns [inf, 1] into [nan, 0]). Half-precision gradients are squared and added in float32.
    Leaves that are not floating, such as integers or float0, are returned as they are and do not
    count. A tree without floating leaves has norm 0.

    Args:
      max_norm: the largest norm, above 0; also a hyperparameter of `optax.inject_hyperparams`.

    Returns:
      A gradient transformation without state, for `optax.chain`.

    Raises:
      ValueError: max_norm is not above 0.
      TypeError: when it is applied, if a gradient is complex.

    >>> clip = clip_by_global_norm(5.0)
    >>> clip.update(jnp.array([0.0, 8e30]), clip.init(None))[0].tolist()
    [0.0, 5.0]
    """
    if not is_traced(max_norm) and not max_norm > 0:
        raise ValueError(f"clip_by_global_norm: max_norm must be above 0, got {max_norm}.")

    def update(updates, state, params=None):
        scale, scaled_norm = _scaled_norm(updates)
        limit = jnp.asarray(max_norm, scale.dtype)
        # Comparisons with NaN are false, and an infinite entry makes the scaled norm infinite.
        clips = (scaled_norm / scale >= limit) & jnp.isfinite(scaled_norm)

        def clip(g):
            if not _is_floating(g):
                return g
            # Dividing by the norm would fail where the norm itself is infinite.
            clipped = g.astype(scale.dtype) * scale / scaled_norm * limit
            return jnp.where(clips, clipped.astype(g.dtype), g)

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def global_norm(tree: chex.ArrayTree) -> jax.Array:
    """Returns the root of the sum of all squares; it is infinite only if it is itself too large."""
    scale, scaled_norm = _scaled_norm(tree)
    return scaled_norm / scale


def _scaled_norm(tree):
    """(scale, scale * norm), where scale is a power of two near 1 / the largest entry."""
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"the global norm: every leaf must be real, got {leaf.dtype}; use optax's "
                "clip_by_global_norm for complex gradients."
            )
    leaves = [leaf for leaf in jax.tree.leaves(tree) if _is_floating(leaf)]
    doubles = any(leaf.dtype == jnp.float64 for leaf in leaves)
    dtype = jnp.dtype(jnp.float64 if doubles else jnp.float32)
    zero = jnp.zeros((), dtype)  # the norm of a tree without leaves
    # Without the barrier, XLA turns (g * scale)^2 of a constant g into g^2 * scale^2: an overflow.
    leaves = jax.lax.optimization_barrier([leaf.astype(dtype) for leaf in leaves])
    largest = jnp.max(jnp.stack([zero, *(jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves)]))
    # With largest in [2^e, 2^(e+1)), scale is 2^-e. Neither may be subnormal, since compiled
    # programs flush subnormal numbers to zero. The bits of the exponent make an exact power of two
    # on every device; jnp.ldexp calls pow, which accelerators round.
    limits = jnp.finfo(dtype)
    bits = jax.lax.bitcast_convert_type(largest, jnp.dtype(f"uint{limits.bits}")) >> limits.nmant
    bias = limits.maxexp - 1
    bits = (2 * bias - jnp.clip(bits, 1, 2 * bias - 1)) << limits.nmant
    scale = jax.lax.bitcast_convert_type(bits, dtype)
    return scale, jnp.sqrt(sum((jnp.sum(jnp.square(leaf * scale)) for leaf in leaves), zero))


def _is_floating(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)
