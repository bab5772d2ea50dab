"""Masks, resets, truncation and zoneout: how they act on a state, and the transposes of that."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.noise import draw_kept_per_step

Array = jax.Array


class Steps(NamedTuple):
    """What each step is given, [T, ...]; None where there is nothing."""

    xs: Array
    mask: Array | None  # [T, ..., 1], or [T, ..., H] with zoneout drawn
    resets: Array | None  # [T, ..., 1]
    cuts: Array | None  # [T, ..., 1], or [T]: where the gradient of the state that is read ends
    numbers: Array | None  # [T], what zoneout draws by
    tap: Array | None  # [T, ..., H], added to h_t


def with_zoneout(static, steps, key, h):
    """The steps with the units that zoneout holds, drawn again from the key, in their mask."""
    if key is None:
        return steps
    written = draw_kept_per_step(key, static.zoneout, steps.numbers, h.shape, h)
    return steps._replace(mask=written if steps.mask is None else steps.mask & written)


def truncation_cuts(windows, mask, h0, reverse):
    """Where a real step lies in another window [T] than the real step run before it: [T, ..., 1].

    Before the first real step there is none, so that no padding parts a sequence from its states.
    """
    shape = (windows.shape[0],) + (1,) * h0.ndim
    windows, mask = windows.reshape(shape), jnp.ones(shape, bool) if mask is None else mask
    none = jnp.int32(jnp.iinfo(jnp.int32).max if reverse else -1)
    passed = jnp.where(mask, windows, none)
    edge = jnp.full_like(passed, none, shape=(1, *passed.shape[1:]))
    if reverse:
        before = jnp.concatenate([lax.cummin(passed, axis=0, reverse=True), edge])[1:]
    else:
        before = jnp.concatenate([edge, lax.cummax(passed, axis=0)])[:-1]
    return mask & (before != none) & (before != windows)


def previous_states(static, h_start, hs, steps):
    """h_{t-1} of every step, as the step saw it: joined first and sliced after, so T may be 0."""
    hs, h_start = hs.astype(h_start.dtype), h_start[None]
    if static.reverse:
        h_tm1 = jnp.concatenate([hs, h_start])[1:]
    else:
        h_tm1 = jnp.concatenate([h_start, hs])[:-1]
    return stop_where(steps.cuts, zero_where(steps.resets, h_tm1))


def stop_where(cuts, h):
    """h, without its gradient where cut: derivatives of a derivative need it too."""
    return h if cuts is None else jnp.where(cuts, lax.stop_gradient(h), h)


def zero_where(resets, h):
    """0 where reset, else h."""
    return h if resets is None else jnp.where(resets, jnp.zeros_like(h), h)


def hold(static, mask, h_t, h_tm1):
    """h_t on real steps, h_tm1 on the others; on real ones a share may be kept."""
    if static.kept:
        h_t = (1 - static.kept) * h_t + static.kept * h_tm1
    return h_t if mask is None else jnp.where(mask, h_t, h_tm1)


def add_tap(h_t, tap):
    """h_t, with what a tap adds to it."""
    return h_t if tap is None else h_t + tap.astype(h_t.dtype)


def hold_vjp(static, mask, dh):
    """The transpose of `_hold`: the cotangents of h_t and, None for zero, of h_tm1."""
    held = None
    if mask is not None:
        zero = jnp.zeros_like(dh)
        dh, held = jnp.where(mask, dh, zero), jnp.where(mask, zero, dh)
    if static.kept:
        kept = static.kept * dh
        dh, held = (1 - static.kept) * dh, kept if held is None else held + kept
    return dh, held
