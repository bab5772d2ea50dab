"""Scans over time in chunks, so that temporaries fit in a CPU's caches; defaults of `BPTT`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.matmul import state_dtype
from jaxgru.core.sharding import on_auto_mesh

# Measured on two CPU cores by `python -m experiments.benchmarks.peers`: the first two with
# --chunks, the last two by comparing "jaxgru gates" with "jaxgru states".
_WHOLE_SEQUENCE = 1 << 18  # T * B * H up to which all of time is one chunk
_CHUNK = 1 << 17  # chunk_size * B * H, with a chunk_size of at least 8
_MANY_GATES = 1 << 19  # T * B * H above which saved gates no longer fit in the caches
_CHEAP_PRODUCT = 256  # the largest I + H for which recomputing gates is then faster
# On a GPU each launch of a kernel costs microseconds, and on a TPU each operation has an overhead:
# `python -m experiments.benchmarks.compiled` counts them.
_ACCELERATOR_CHUNK = 64
# B * H up to which a GPU's chunk has up to twice as many steps: at H=128 a training step then has 3
# to 5 % fewer launches and 1.6 times the temporaries. Half types keep the shorter chunk: their
# gates are float32 too, so a longer chunk would take back the memory that a half type saves.
_SMALL_STATE = 1 << 12
_GPU_UNROLL = 8  # 4 at batches of more than 128, where an unrolled backward loop reads more memory


def scan_chunks(size, chunk, carry, per_step, per_chunk, *, reverse):
    """Scans `chunk` over time, `size` steps at once; a shorter last chunk takes the remainder.

    chunk(carry, per_step, per_chunk) -> carry, per_step outputs, per_chunk outputs. `chunk` takes
    and returns leaves [size, ...] per step and [...] per chunk; `scan_chunks` takes and returns
    [T, ...] and [number of chunks, ...]. Without a size there is one chunk.
    """
    num_steps = jax.tree.leaves(per_step)[0].shape[0]
    if size is None or size >= num_steps:
        carry, steps, chunks = chunk(carry, per_step, jax.tree.map(lambda v: v[0], per_chunk))
        return carry, steps, jax.tree.map(lambda v: v[None], chunks)
    count, rest = divmod(num_steps, size)
    if rest == 0:

        def body(carry, inputs):
            carry, *outputs = chunk(carry, *inputs)
            return carry, outputs

        split = jax.tree.map(lambda v: v.reshape(count, size, *v.shape[1:]), per_step)
        carry, (steps, chunks) = lax.scan(body, carry, (split, per_chunk), reverse=reverse)
        return carry, jax.tree.map(lambda v: v.reshape(num_steps, *v.shape[2:]), steps), chunks

    # Either part is one of the cases above: `full` is a multiple of size, and rest is below it.
    def part(carry, of_steps, of_chunks):
        steps = jax.tree.map(lambda v: v[of_steps], per_step)
        chunks = jax.tree.map(lambda v: v[of_chunks], per_chunk)
        return scan_chunks(size, chunk, carry, steps, chunks, reverse=reverse)

    full = num_steps - rest
    parts = [(slice(full), slice(count)), (slice(full, None), slice(count, None))]
    found: list[Any] = [None, None]
    for i in (1, 0) if reverse else (0, 1):
        carry, steps, chunks = part(carry, *parts[i])
        found[i] = (steps, chunks)
    steps, chunks = jax.tree.map(lambda u, v: jnp.concatenate([u, v]), *found)
    return carry, steps, chunks


def chunk_starts(h0, hs, config):
    """[number of chunks, ..., H], the state at the start of each chunk, read from hs."""
    size, h0 = config.chunk_size, h0[None]
    if size is None or size >= hs.shape[0]:
        return h0
    if config.reverse:
        return jnp.concatenate([hs[size::size].astype(h0.dtype), h0])
    return jnp.concatenate([h0, hs[size - 1 : -1 : size].astype(h0.dtype)])


def resolve_options(rule, platform, xs, h0):
    """(residuals, chunk_size, unroll) of a `BPTT`, with defaults by size and device.

    Gates are 3H or 4H numbers per row; to recompute them takes 3H(I + H) multiply-adds. That is
    faster on a CPU for small I + H and large T B H. It has fewer estimated cycles on a TPU for
    large T B H, and on a GPU it saves the launches that store the gates of each step, at every
    size. With `BPTT.kernel` the default is to recompute them, in one chunk.
    """
    num_steps, input_size = xs.shape[0], xs.shape[-1]
    residuals, kernel = rule.residuals, rule.kernel
    if residuals is None:
        known = all(isinstance(size, int) for size in (*xs.shape, *h0.shape))
        many = known and num_steps * h0.size > _MANY_GATES
        cheap = known and (platform == "tpu" or input_size + h0.shape[-1] <= _CHEAP_PRODUCT)
        residuals = "states" if kernel or platform == "gpu" or (many and cheap) else "gates"
    chunk_size, unroll = rule.chunk_size, rule.unroll
    if chunk_size is None and (kernel is None or residuals == "boundaries"):
        chunk_size = _default_chunk_size(platform, num_steps, h0, residuals)
    if unroll is None:
        rows = math.prod(size for size in h0.shape[:-1] if isinstance(size, int))
        launches = platform == "gpu" and kernel is None and isinstance(num_steps, int)
        unroll = (_GPU_UNROLL if rows <= 128 else _GPU_UNROLL // 2) if launches else 1
    return residuals, chunk_size, unroll


def _default_chunk_size(platform, num_steps, h0, residuals):
    """sqrt(T) for "boundaries"; else 64 on a GPU or TPU, or what fits in a CPU's caches.

    It is None (one chunk) for symbolic sizes and, without "boundaries", for short sequences and on
    meshes with Auto axes, where every chunk would add an all-reduce of the weight gradients. A
    divisor of T is preferred, up to twice the target, so that no shorter last chunk is compiled:
    the smallest, but the largest on a GPU with a small state, except for "boundaries".
    """
    if not all(isinstance(size, int) for size in (num_steps, *h0.shape)):
        return None
    if residuals == "boundaries":
        target = max(1, math.isqrt(num_steps))
    elif on_auto_mesh() or num_steps * h0.size <= _WHOLE_SEQUENCE:
        return None
    elif platform in ("gpu", "tpu"):
        target = _ACCELERATOR_CHUNK
    else:
        target = max(_CHUNK // max(1, h0.size), 8)
    divisors = [n for n in range(target, 2 * target + 1) if num_steps % n == 0] or [target]
    small = h0.size <= _SMALL_STATE and h0.dtype == state_dtype(h0.dtype)
    # "boundaries" saves one state per chunk, and must save the same number on every device.
    longest = platform == "gpu" and small and residuals != "boundaries"
    return divisors[-1 if longest else 0]
