"""The gates of a GRU over a sequence, and their statistics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgru.diagnostics.traces import trace_layers
from jaxgru.stacks.forms import Merge, map_grus


class GateStatistics(NamedTuple):
    """Statistics of each unit over all valid steps of all sequences; [H] each."""

    reset_mean: jax.Array
    update_mean: jax.Array
    kept_mean: jax.Array  # of k, the share of the state that a step keeps: z or 1 - z
    reset_low: jax.Array  # share of the steps with r below `low`
    reset_high: jax.Array  # share above `high`
    update_low: jax.Array
    update_high: jax.Array
    memory: jax.Array  # number of steps over which the kept state falls to 1/e


class GateValues(NamedTuple):
    """The gates of every step; [T, ..., H] each."""

    reset: jax.Array  # r
    update: jax.Array  # z
    candidate: jax.Array  # n
    kept: jax.Array  # k, the share of the state that the step keeps: z or 1 - z


def gate_statistics(
    params: Any, xs: jax.Array, h0: Any = None, *,
    mask: jax.Array | None = None, resets: jax.Array | None = None, merge: Merge = "concat",
    residual: bool = False, low: float = 0.1, high: float = 0.9,
) -> Any:  # fmt: skip
    """Computes means and saturation of the gates of every unit, and how long the unit remembers.

    Saturation is the share of the steps with a gate below 0.1 or above 0.9 (Karpathy et al. 2015,
    arXiv:1506.02078, section 4.2). Memory is -1 / mean log k over steps: the number of steps over
    which a value that a step writes falls to 1/e, along the kept state alone. It is inf where k
    rounds to 1; in float32 its error reaches a thousandth at about 10,000 steps.

    Args:
      params, xs, h0, mask, resets, merge, residual: see `gradient_flow`. Only valid steps count.
      low, high: a gate below `low` is closed, a gate above `high` is open.

    Returns:
      A `GateStatistics` of [H] arrays for each GRU; NaN if there is no valid step.

    Raises:
      ValueError, TypeError: see `gradient_flow`; ValueError also unless 0 <= low < high <= 1.

    >>> from jaxgru import init_gru
    >>> params = jax.tree.map(jnp.zeros_like, init_gru(jax.random.key(0), 2, 3))
    >>> statistics = gate_statistics(params, jnp.ones((5, 2)))
    >>> statistics.update_mean.tolist(), round(float(statistics.memory[0]), 4)  # 1 / log 2
    ([0.5, 0.5, 0.5], 1.4427)
    """
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"gate_statistics: low and high must satisfy 0 <= low < high <= 1, got {low}, {high}."
        )
    traces = trace_layers("gate_statistics", params, xs, h0, mask, resets, merge, residual)
    return map_grus(lambda _, trace: _statistics(trace, low, high), params, traces)


def gate_values(
    params: Any, xs: jax.Array, h0: Any = None, *,
    mask: jax.Array | None = None, resets: jax.Array | None = None, merge: Merge = "concat",
    residual: bool = False,
) -> Any:  # fmt: skip
    """Computes the gates r and z, the candidate n and the share k that is kept, of every step.

    Args:
      params, xs, h0, mask, resets, merge, residual: see `gradient_flow`. The gates of masked
        steps are those of an input of zeros; they have no effect on the state.

    Returns:
      `GateValues` for each GRU.

    Raises:
      ValueError, TypeError: see `gradient_flow`.

    >>> from jaxgru import init_gru
    >>> gate_values(init_gru(jax.random.key(0), 2, 3), jnp.ones((5, 2))).reset.shape
    (5, 3)
    """
    traces = trace_layers("gate_values", params, xs, h0, mask, resets, merge, residual)
    return map_grus(lambda _, t: GateValues(t.gates.r, t.gates.z, t.gates.n, t.c.K), params, traces)


def _statistics(trace, low, high):
    """`GateStatistics` over all axes but the last."""
    r, z, *_ = trace.gates
    valid = jnp.ones_like(r[..., :1], bool) if trace.flags.mask is None else trace.flags.mask
    leading = tuple(range(r.ndim - 1))
    count = valid.sum(axis=leading).astype(r.dtype)

    def mean(v):
        v = v.astype(r.dtype)
        return jnp.where(valid, v, jnp.zeros_like(v)).sum(axis=leading) / count

    return GateStatistics(
        *(mean(v) for v in (r, z, trace.c.K, r < low, r > high, z < low, z > high)),
        memory=1 / jnp.abs(mean(jnp.log(trace.c.K))),
    )
