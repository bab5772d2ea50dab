"""Masks, resets, truncation and zoneout: what they do to the state around each step.

    h_tm1 = enter(h_{t-1})      h_{t-1}, but 0 at a reset; no gradient flows back through a cut
    new = step(x_t, h_tm1)
    h_t = leave(new, h_tm1)     new, but h_tm1 where the step is masked or the unit zoned out

A cut is where one window of `BPTT.truncate` follows another. `enter_linear` is the derivative of
`enter`, and its own transpose. `leave` is linear, so it is its own derivative; `leave_vjp` is its
transpose.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.noise import draw_masks, is_zero, with_static_numbers


@with_static_numbers
@dataclasses.dataclass(frozen=True, eq=False)
class Flags:
    """The flags of all steps [T, ..., 1], or of one [..., 1] inside the loop; None if not given."""

    mask: jax.Array | None = None  # False: h_t = h_tm1; [T, ..., H] after with_zoneout
    resets: jax.Array | None = None
    cuts: jax.Array | None = None  # no gradient flows to the state before the step
    # The rate of zoneout: a number, or an array with one for each step. It becomes 0 once a mask is
    # drawn. Without a key none is drawn, and the rate is the share of h_tm1 in h_t.
    zoneout: Any = 0.0

    def enter(self, h: jax.Array) -> jax.Array:
        """The state that the step reads."""
        h = zero_where(self.resets, h)
        return h if self.cuts is None else choose(self.cuts, lax.stop_gradient(h), h)

    def enter_linear(self, dh: jax.Array) -> jax.Array:
        """The derivative of `enter`, and its transpose: zero where the step is reset or cut."""
        return zero_where(self.resets, zero_where(self.cuts, dh))

    def leave(self, new: jax.Array, h_tm1: jax.Array) -> jax.Array:
        """The state after the step, or its tangent."""
        if not is_zero(self.zoneout):
            written, kept = self._shares(new.dtype)
            new = written * new + kept * h_tm1
        return choose(self.mask, new, h_tm1)

    def leave_vjp(self, dh: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The cotangents of new and h_tm1 (None for zero), given dh, that of leave(new, h_tm1)."""
        dh_tm1 = None
        if self.mask is not None:
            zero = jnp.zeros_like(dh)
            dh, dh_tm1 = choose(self.mask, dh, zero), choose(self.mask, zero, dh)
        if not is_zero(self.zoneout):
            written, kept = self._shares(dh.dtype)
            share = kept * dh
            dh, dh_tm1 = written * dh, share if dh_tm1 is None else dh_tm1 + share
        return dh, dh_tm1

    def _shares(self, dtype):
        """The shares of new and of h_tm1 in the mean of h_t under zoneout."""
        shares = (1 - self.zoneout, self.zoneout)
        return [v.astype(dtype) if isinstance(v, jax.Array) else v for v in shares]

    def states_before(self, h_start: jax.Array, hs: jax.Array, reverse: bool) -> jax.Array:
        """The state that each step reads, [T, ..., H]."""
        pair = [h_start[None], hs.astype(h_start.dtype)]
        if reverse:
            return self.enter(jnp.concatenate(pair[::-1])[1:])
        return self.enter(jnp.concatenate(pair)[:-1])  # slices last, so that T may be 0

    def with_zoneout(self, key: jax.Array | None, numbers: Any, h: jax.Array) -> "Flags":
        """Flags whose mask is also False where zoneout keeps a unit; self without a key."""
        if key is None:
            return self
        written = draw_masks(key, self.zoneout, numbers, h.shape, h)
        mask = written if self.mask is None else self.mask & written
        return dataclasses.replace(self, mask=mask, zoneout=0.0)


def zero_where(flags: jax.Array | None, h: jax.Array) -> jax.Array:
    """0 where flagged, else h."""
    return h if flags is None else choose(flags, jnp.zeros_like(h), h)


def choose(flags: jax.Array | None, where: jax.Array, elsewhere: jax.Array) -> jax.Array:
    """jnp.where(flags, where, elsewhere), with last axes added to flags; `where` if None."""
    if flags is None:
        return where
    flags = flags.reshape(flags.shape + (1,) * (where.ndim - flags.ndim))
    return jnp.where(flags, where, elsewhere)


def find_cuts(
    windows: jax.Array, mask: jax.Array | None, h0: jax.Array, reverse: bool
) -> jax.Array:
    """[T, ..., 1], True at a valid step whose window differs from that of the previous valid step.

    windows [T] holds the number of each step's window. "Previous" means in the order of the loop.
    The first valid step is never cut, so padding does not separate a sequence from its h0.
    """
    shape = (windows.shape[0],) + (1,) * h0.ndim
    windows = (-windows if reverse else windows).reshape(shape)  # increasing along the loop
    mask = jnp.ones(shape, bool) if mask is None else mask
    none = jnp.iinfo(windows.dtype).min  # where no valid step came before
    valid = jnp.where(mask, windows, jnp.full_like(windows, none))
    latest = lax.cummax(valid, axis=0, reverse=reverse)  # of the valid steps up to this one
    shift = (-1, 1, 0) if reverse else (1, -1, 0)  # by one step
    before = lax.pad(latest, jnp.int32(none), [shift] + [(0, 0, 0)] * (latest.ndim - 1))
    return mask & (before != none) & (before != windows)
