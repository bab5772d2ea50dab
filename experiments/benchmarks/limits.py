"""What a task asks of a device at least, counted, and what the device can do at most, measured.

The limits are those of one large copy and one large product through JAX: what a program that does
nothing else gets, not the data sheet's figures.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarks.problems import Size, Task, compile_program
from experiments.benchmarks.timing import interleave, summarize

DTYPES = ("bfloat16", "float32")


class Sizes(NamedTuple):
    """How much is copied and multiplied, and for how long."""

    copied: int  # float32 numbers
    side: int  # of the square matrices
    options: dict[str, Any]  # of interleave
    seconds: float = 0.5


FULL = Sizes(2**30, 8192, {})
SMOKE = Sizes(2**12, 32, {"min_rounds": 1, "burst_seconds": 0.001, "pause_seconds": 0.0}, 0.001)


def count_flops(size: Size, task: Task) -> int:
    """Floating-point operations of the products: 6TBH(D + H), three times that for training."""
    num_steps, batch_size, input_size, hidden_size = size
    forward = 6 * num_steps * batch_size * hidden_size * (input_size + hidden_size)
    return {"forward": forward, "training": 3 * forward}[task]


def count_bytes(size: Size, task: Task, dtype: str) -> int:
    """Bytes of inputs and outputs, each read or written once, and nothing that a program keeps.

    Forward: params, xs and h0 are read, hs and h_last written. Training reads dhs and dh_last too,
    and writes the gradients of params, xs and h0 (and the value, which is nothing).
    """
    num_steps, batch_size, input_size, hidden_size = size
    params = 3 * hidden_size * (input_size + hidden_size + 2)
    inputs = num_steps * batch_size * input_size
    states = num_steps * batch_size * hidden_size
    state = batch_size * hidden_size
    numbers = params + inputs + states + 2 * state
    if task == "training":
        numbers += (states + state) + (params + inputs + state)
    return numbers * jnp.dtype(dtype).itemsize


def measure_limits(sizes: Sizes, seed: int = 0) -> dict[str, Any]:
    """Bytes a second of a copy on the device, and operations a second of products in each dtype.

    Products have JAX's default precision, as what is measured beside them has. Their operands are
    random, since a GPU is quicker with zeros.
    """
    copied = jnp.ones(sizes.copied, jnp.float32)
    seconds = _seconds(jnp.copy, (copied,), sizes)
    limits = {"bytes_per_second": 2 * copied.nbytes / seconds, "flops_per_second": {}}
    for dtype in DTYPES:
        keys = jax.random.split(jax.random.key(seed))
        operands = tuple(jax.random.normal(key, (sizes.side,) * 2, dtype) for key in keys)
        seconds = _seconds(jnp.matmul, operands, sizes)
        limits["flops_per_second"][dtype] = 2 * sizes.side**3 / seconds
    return limits


def _seconds(function: Any, arguments: tuple, sizes: Sizes) -> float:
    """The median of its calls."""
    program = compile_program(function, arguments, lambda result: {})
    samples = interleave({"": program.call}, sizes.seconds, **sizes.options)
    return summarize(samples[""])["median_ms"] / 1e3


def shares(
    size: Size, task: Task, dtype: str, milliseconds: float, limits: dict[str, Any]
) -> dict[str, float]:
    """The part of that time for which the products, or the bytes, alone would take."""
    seconds = milliseconds / 1e3
    flops, num_bytes = count_flops(size, task), count_bytes(size, task, dtype)
    return {
        "matmul_share": flops / limits["flops_per_second"][dtype] / seconds,
        "memory_share": num_bytes / limits["bytes_per_second"] / seconds,
    }
