"""The plain recurrence: `lax.scan` over the cell, in chunks of time."""

import dataclasses
from typing import Any, Literal

from jax import lax

from jaxgru.core.cell import project, split_recurrent, step
from jaxgru.core.chunks import sweep
from jaxgru.core.flags import add_tap, hold, stop_where, with_zoneout, zero_where
from jaxgru.core.matmul import state_dtype
from jaxgru.experimental.fused.kernels import Backend, fused_forward

Residuals = Literal["gates", "states", "boundaries"]


@dataclasses.dataclass(frozen=True)
class Static:
    """The choices of a call that are not arrays."""

    reverse: bool
    residuals: Residuals
    chunk_size: int | None  # None: the whole sequence at once
    unroll: int
    zoneout: float  # share of the units that a key holds at each step
    kept: float  # share of every unit that is held at each step: the mean of the above
    backend: Backend
    terms: int  # of an operand of the fused kernels: the precision of the call, not of its backward


def scan_gru(static, params, steps, h0, scale, key):
    """The plain recurrence, differentiated by JAX."""
    h_last, (hs, _), _ = forward(static, params, steps, h0, scale, key, keep_gates=False)
    return h_last, hs


def forward(static, params, steps, h0, scale, key, *, keep_gates):
    """h_last, (hs, gates or None), and the state at the start of each chunk [K, ..., H]."""

    def chunk(h, steps, _):
        h_end, outputs = forward_chunk(static, params, recurrent, h, steps, scale, key, keep_gates)
        return h_end, outputs, h

    h, recurrent = h0.astype(state_dtype(h0.dtype)), split_recurrent(params)
    h, outputs, h_starts = sweep(static.chunk_size, chunk, h, steps, None, reverse=static.reverse)
    return h.astype(h0.dtype), outputs, h_starts


def forward_chunk(static, params, recurrent, h, steps, scale, key, keep_gates) -> tuple[Any, Any]:
    """A chunk's last state and (hs, gates or None): projection in bulk, then the scan."""

    def body(h, inputs):
        a, mask, resets, cuts, tap = inputs
        h_tm1 = stop_where(cuts, zero_where(resets, h))
        h_t, gates = step(recurrent, a, h_tm1, scale)
        h_t = add_tap(hold(static, mask, h_t, h_tm1), tap)
        return h_t, (h_t.astype(steps.xs.dtype), gates if keep_gates else None)

    steps = with_zoneout(static, steps, key, h)
    a = project(params, steps.xs)
    if static.backend != "scan":
        return fused_forward(static, params, h, a, steps, scale, keep_gates)
    inputs = (a, steps.mask, steps.resets, steps.cuts, steps.tap)
    return lax.scan(body, h, inputs, reverse=static.reverse, unroll=static.unroll)
