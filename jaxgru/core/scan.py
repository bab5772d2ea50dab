"""The forward loop by `lax.scan`, in chunks of steps, with no derivative rule but JAX's own.

All inputs of a chunk are projected at once; then the loop runs its steps.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.cell import project, split_recurrent, step, zero_gates
from jaxgru.core.chunks import scan_chunks
from jaxgru.core.flags import Flags
from jaxgru.core.gradient import Kernel, Residuals
from jaxgru.core.matmul import state_dtype


class Config(NamedTuple):
    """The static options of a call, defaults filled in."""

    reverse: bool
    kernel: Kernel | None
    residuals: Residuals | None  # None for Tangent and Autodiff
    chunk_size: int | None  # None: the whole sequence at once
    unroll: int


class Configs(NamedTuple):
    """The `Config` for each kind of device that a program may be compiled for."""

    default: Config
    gpu: Config
    tpu: Config

    def run(self, function, *arrays, **static) -> Any:
        """function(config, *arrays, **static) with the config of the device.

        JAX knows the device when it lowers the program, not when it traces it. Configs that differ
        are therefore all traced, and only that of the device is compiled.
        """
        kinds = {"cuda": self.gpu, "rocm": self.gpu, "tpu": self.tpu}
        bound = {  # one function for equal configs
            c: functools.partial(function, c, **static) for c in (self.default, *kinds.values())
        }
        others = {name: bound[c] for name, c in kinds.items() if c != self.default}
        if not others:
            return bound[self.default](*arrays)
        return lax.platform_dependent(*arrays, default=bound[self.default], **others)


class Inputs(NamedTuple):
    """The inputs of all steps, [T, ...]; None where absent."""

    xs: jax.Array
    flags: Flags
    numbers: jax.Array | None  # [T], the numbers of the steps, folded into the key of zoneout
    tap: jax.Array | None  # [T, ..., H], added to h_t


def plain_scan(config, params, inputs, h0, dropout, key):
    """(h_last, hs). dropout: mask of recurrent dropout, or None; key: draws zoneout, or None."""
    h_last, (hs, _), _ = forward(config, params, inputs, h0, dropout, key, save_gates=False)
    return h_last, hs


def forward(config, params, inputs, h0, dropout, key, *, save_gates):
    """h_last, (hs, gates or None), and the state at the start of each chunk [chunks, ..., H]."""
    h0_wide, recurrent = h0.astype(state_dtype(h0.dtype)), split_recurrent(params, dropout)

    def chunk(h, inputs, _):
        def run():
            return run_chunk(config, params, recurrent, h, inputs, key, save_gates)

        def skip():
            hs = jnp.broadcast_to(h[None], inputs.xs.shape[:1] + h.shape)
            gates = zero_gates(params, hs) if save_gates else None
            return h, (hs.astype(inputs.xs.dtype), gates)

        h_end, found = run_unless_masked(config, inputs, run, skip)
        return h_end, found, h

    h, *found = scan_chunks(config.chunk_size, chunk, h0_wide, inputs, None, reverse=config.reverse)
    return h.astype(h0.dtype), *found


def run_unless_masked(config, inputs, run, skip):
    """run(), or skip() if there is a chunk_size and all steps of this chunk are masked (padding).

    A reset or a tap changes the state on masked steps too: a chunk with a reset runs, and so does
    every chunk if there is a tap or a kernel. Under `jax.vmap` over masks both are computed, and no
    time is saved.
    """
    mask, resets = inputs.flags.mask, inputs.flags.resets
    if mask is None or config.chunk_size is None or config.kernel or inputs.tap is not None:
        return run()
    acts = mask.any() if resets is None else mask.any() | resets.any()
    return lax.cond(acts, run, skip)


def run_chunk(config, params, recurrent, h, inputs, key, save_gates):
    """(h_end, (hs, gates or None)) of a chunk: projects its inputs, then runs the loop."""
    flags = inputs.flags.with_zoneout(key, inputs.numbers, h)
    inputs, a = inputs._replace(flags=flags), project(params, inputs.xs)
    run = scan_steps if config.kernel is None else config.kernel.forward
    return run(config, recurrent, h, a, inputs, save_gates)


def scan_steps(config, recurrent, h, a, inputs, save_gates) -> Any:
    """h after the chunk, and (hs, gates or None), from the projected inputs a."""
    dtype = inputs.xs.dtype

    def body(h, per_step):
        a, flags, tap = per_step
        h_tm1 = flags.enter(h)
        new, gates = step(recurrent, a, h_tm1)
        h_t = flags.leave(new, h_tm1)
        h_t = h_t if tap is None else h_t + tap.astype(h_t.dtype)
        return h_t, (h_t.astype(dtype), gates if save_gates else None)

    per_step = (a, inputs.flags, inputs.tap)
    return lax.scan(body, h, per_step, reverse=config.reverse, unroll=config.unroll)
