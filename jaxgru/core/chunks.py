"""Scans over time in chunks, so that temporaries fit in a CPU's caches; defaults of `BPTT`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

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
_GPU_UNROLL = 8  # 4 at batches of more than 128, where an unrolled backward loop reads more memory


def scan_chunks(size, chunk, carry, per_step, per_chunk, *, reverse):
    """Scans `chunk` over time, `size` steps at once; a shorter last chunk takes the remainder.

    chunk(carry, per_step, per_chunk) -> carry, per_step outputs, per_chunk outputs. Inputs
    and outputs have leaves [T, ...] in per_step and [number of chunks, ...] in per_chunk.
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

    def part(carry, of_steps, of_chunks):
        steps = jax.tree.map(lambda v: v[of_steps], per_step)
        chunks = jax.tree.map(lambda v: v[of_chunks], per_chunk)
        return scan_chunks(size, chunk, carry, steps, chunks, reverse=reverse)

    full = num_steps - rest
    parts = [(slice(full), slice(count)), (slice(full, None), slice(count, None))]
    found: list[Any] = [None, None]
    for i in (1, 0) if reverse else (0, 1):
        carry, *found[i] = part(carry, *parts[i])
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

    Gates are 3H or 4H numbers per row; to recompute them takes 3H(I + H) multiply-adds. On a CPU
    that is faster for small I + H and large T B H. It saves launches on a GPU at every size; on a
    TPU products are cheap at every I + H. A kernel has one chunk and recomputes gates by default.
    """
    (num_steps, *_, input_size), residuals, kernel = xs.shape, rule.residuals, rule.kernel
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

    Symbolic sizes give None (one chunk). Without "boundaries" so do short sequences, and meshes
    with Auto axes, where every chunk would add an all-reduce of the weight gradients. A divisor of
    T is preferred, so that no shorter last chunk is compiled.
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
    return next((size for size in range(target, 2 * target) if num_steps % size == 0), target)
