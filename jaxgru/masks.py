"""Makes masks from lengths, and resets from the ends of episodes; `core/flags.py` applies both."""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgru.core.checks import (
    explain_unknown_arguments,
    is_traced,
    require_count,
    require_flags,
)


@explain_unknown_arguments
def length_mask(lengths: Any, num_steps: int, *, axis: int = 0) -> jax.Array:
    """mask[t, ...] = t < lengths[...]: True on the valid steps of right-padded sequences.

    Args:
      lengths: [...] integers from 0 to num_steps.
      num_steps: T; it may be a symbolic dimension of `jax.export`.
      axis: the axis of time of the mask; 1 for [B, T].

    Returns:
      [T, ...] bool, for `gru(..., mask=...)`.

    Raises:
      TypeError: lengths, num_steps or axis are not integers.
      ValueError: a length is outside [0, num_steps], or the mask has no such axis. Traced lengths
        cannot be checked; they are clipped to that range.

    Cost: one comparison per entry.

    >>> length_mask([2, 0], 3).astype(int).tolist()
    [[1, 0], [1, 0], [0, 0]]
    """
    if not jax.export.is_symbolic_dim(num_steps):
        require_count("length_mask", "num_steps", num_steps, 0)
    if not isinstance(lengths, jax.Array):
        lengths = np.asarray(lengths)
        lengths = lengths.astype(np.int32) if lengths.size == 0 else lengths  # [] is float64
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"length_mask: lengths must be integers, got dtype {lengths.dtype}.")
    if not is_traced(lengths) and lengths.size:
        values = np.asarray(lengths)
        worst = values.min() if values.min() < 0 else values.max()
        if not 0 <= worst <= num_steps:
            raise ValueError(
                f"length_mask: lengths must lie between 0 and num_steps={num_steps}, got {worst}."
            )
    lengths = jnp.asarray(lengths).astype(jnp.int32)
    steps = lax.broadcasted_iota(jnp.int32, (num_steps, *lengths.shape), 0)
    return jnp.moveaxis(steps < lengths[None], 0, _require_axis("length_mask", axis, steps))


@explain_unknown_arguments
def resets_from_dones(
    dones: jax.Array, done_before: jax.Array | None = None, *, axis: int = 0
) -> jax.Array:
    """resets[t] = dones[t - 1]: an episode that ends with step t - 1 starts step t from zeros.

    Args:
      dones: [T, ...] bool: True where step t is the last of its episode.
      done_before: [...] bool, dones[-1] of the previous rollout; None: step 0 uses the given h0.
      axis: the axis of time of dones; 1 for [B, T].

    Returns:
      The shape of dones, bool, for `gru(..., resets=...)`.

    Raises:
      TypeError: an array is not bool.
      ValueError: dones has no such axis, or done_before is not [...].

    Cost: one copy.

    >>> resets_from_dones(jnp.array([False, True, False])).tolist()
    [False, False, True]
    """
    if dones is None:
        raise TypeError("resets_from_dones: dones must be a bool array, got None.")
    require_flags("resets_from_dones", {"dones": dones})
    dones = jnp.moveaxis(dones, _require_axis("resets_from_dones", axis, dones), 0)
    if done_before is None:
        done_before = jnp.zeros_like(dones, shape=dones.shape[1:])
    shape, meaning = dones.shape[1:], "dones without its axis of time"
    require_flags("resets_from_dones", {"done_before": done_before}, shape, meaning)
    return jnp.moveaxis(jnp.concatenate([jnp.asarray(done_before)[None], dones])[:-1], 0, axis)


def _require_axis(function, axis, flags):
    """The axis; TypeError unless it is an integer, ValueError unless the array has it."""
    require_count(function, "axis", axis, -flags.ndim)
    if axis >= flags.ndim:
        raise ValueError(f"{function}: axis must be one of shape {flags.shape}, got {axis}.")
    return axis
