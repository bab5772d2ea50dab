"""The gates of a GRU over a sequence, and their statistics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgru.diagnostics.traces import require_sequence, trace_layers
from jaxgru.stacks.forms import Merge, map_grus

Array = jax.Array


class GateStatistics(NamedTuple):
    """Of each unit, over all real steps of all sequences; [H] each."""

    reset_mean: Array
    update_mean: Array
    kept_mean: Array  # of k, the share of the state that a step keeps: z or 1 - z
    reset_low: Array  # share of the steps with r below `low`
    reset_high: Array  # share above `high`
    update_low: Array
    update_high: Array
    memory: Array  # steps over which the kept state falls to 1/e


class GateValues(NamedTuple):
    """The gates of every step; [T, ..., H] each."""

    reset: Array  # r
    update: Array  # z
    candidate: Array  # n
    kept: Array  # k, the share of the state that the step keeps: z or 1 - z


def gate_statistics(
    params: Any,
    xs: Array,
    h0: Any = None,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    merge: Merge = "concat",
    residual: bool = False,
    low: float = 0.1,
    high: float = 0.9,
) -> Any:
    """Means and saturation of the gates of every unit, and how long it remembers.

    Saturation as Karpathy et al. 2015 (arXiv:1506.02078, section 4.2) count it: the share of the
    steps with a gate below 0.1 or above 0.9. Memory is -1 / mean log k over steps with keep
    fractions k: along the kept state alone, what a step writes falls to 1/e in so many steps; inf
    where k rounds to 1, and in float32 a thousandth off from some 10,000 steps on.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a sequence of them.
      xs: [T, ..., I].
      h0: as in `gru_stack`.
      mask: [T, ...] bool; only real steps count.
      resets: [T, ...] bool.
      merge: as in `gru_stack`.
      residual: as in `gru_stack`.
      low: a gate below is closed.
      high: a gate above is open.

    Returns:
      A `GateStatistics` of [H] arrays for each GRU; NaN where there is no real step.

    Raises:
      ValueError: a shape does not fit, a number is not finite (seen outside of jit alone), or not
        0 <= low < high <= 1.
      TypeError: as `gru_stack`.

    Cost: one forward pass, its gates once more in bulk, and their sums.

    >>> from jaxgru import init_gru
    >>> params = jax.tree.map(jnp.zeros_like, init_gru(jax.random.key(0), 2, 3))
    >>> statistics = gate_statistics(params, jnp.ones((5, 2)))
    >>> statistics.update_mean.tolist(), round(float(statistics.memory[0]), 4)  # 1 / log 2
    ([0.5, 0.5, 0.5], 1.4427)
    """
    require_sequence("gate_statistics", params, xs, h0, mask, resets, merge, residual)
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"gate_statistics: low and high must satisfy 0 <= low < high <= 1, got {low}, {high}."
        )
    traces = trace_layers(params, xs, h0, mask, resets, merge, residual)
    return map_grus(lambda _, trace: _statistics(trace, low, high), params, traces)


def gate_values(
    params: Any,
    xs: Array,
    h0: Any = None,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    merge: Merge = "concat",
    residual: bool = False,
) -> Any:
    """The gates r, z, the candidate n and the keep fraction k of every step: for histograms.

    Args:
      params: a `GRUParams`, a `Bidirectional`, or a sequence of them.
      xs: [T, ..., I].
      h0: as in `gru_stack`.
      mask: [T, ...] bool; gates of held steps act on nothing, and are those of an input of zeros.
      resets: [T, ...] bool.
      merge: as in `gru_stack`.
      residual: as in `gru_stack`.

    Returns:
      `GateValues` for each GRU.

    Raises:
      ValueError: a shape does not fit or a number is not finite (seen outside of jit alone).
      TypeError: as `gru_stack`.

    Cost: one forward pass, and its gates once more in bulk.

    >>> from jaxgru import init_gru
    >>> gates = gate_values(init_gru(jax.random.key(0), 2, 3), jnp.ones((5, 2)))
    >>> gates.reset.shape
    (5, 3)
    """
    require_sequence("gate_values", params, xs, h0, mask, resets, merge, residual)
    traces = trace_layers(params, xs, h0, mask, resets, merge, residual)
    return map_grus(lambda _, t: GateValues(t.gates.r, t.gates.z, t.gates.n, t.c.k), params, traces)


def _statistics(trace, low, high):
    """`GateStatistics` over all axes but the last."""
    r, z, *_ = trace.gates
    real = jnp.ones_like(r[..., :1], bool) if trace.flags.mask is None else trace.flags.mask
    leading = tuple(range(r.ndim - 1))
    count = real.sum(axis=leading).astype(r.dtype)

    def mean(v):
        v = v.astype(r.dtype)
        return jnp.where(real, v, jnp.zeros_like(v)).sum(axis=leading) / count

    return GateStatistics(
        *(mean(v) for v in (r, z, trace.c.k, r < low, r > high, z < low, z > high)),
        memory=1 / jnp.abs(mean(jnp.log(trace.c.k))),
    )
