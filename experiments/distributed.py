"""One script on one device, on many, and in several processes, each with its rows of the batch.

In several processes every one runs the whole script. What they do with the devices they do
together; process 0 alone writes and prints.
"""

import math
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from experiments.data import DataError
from jaxgru import training

Result = TypeVar("Result")


def add_options(add: Callable[..., Any]) -> None:
    """The options of a script that may be one of several processes."""
    add("--coordinator", metavar="HOST:PORT", help="address of process 0, where there are several")
    add("--num-processes", type=int, help="how many there are; with --coordinator")
    add("--process-id", type=int, help="which of them this is, from 0; with --coordinator")
    add("--distributed", action="store_true", help="several, as the cluster itself tells JAX")


def start(args: Any) -> None:
    """Joins the other processes, if any: before anything that asks JAX for its devices."""
    told = (args.coordinator, args.num_processes, args.process_id)
    if told != (None, None, None) and None in told and not args.distributed:
        raise DataError("--coordinator, --num-processes and --process-id belong together")
    if told == (None, None, None) and not args.distributed:
        return
    if args.coordinator and ":" not in args.coordinator:
        raise DataError(f"--coordinator must be HOST:PORT, got {args.coordinator}")
    if args.num_processes is not None and not 0 <= args.process_id < args.num_processes:
        raise DataError(
            f"--process-id must be at least 0 and below {args.num_processes}, got {args.process_id}"
        )
    try:
        jax.distributed.initialize(*told)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"the other processes were not found: {reason}") from None


def is_main() -> bool:
    """True in the process that writes and prints."""
    return jax.process_index() == 0


def make_layout(batch_size: int, **choices: Any) -> training.Layout:
    """A layout over all devices; some stay idle where a lone process's batch does not divide.

    `choices` are those of `training.Layout`. The devices stand in their own order, so that every
    process reads rows without gaps.
    """
    devices = jax.devices()
    if jax.process_count() == 1:
        devices = devices[: math.gcd(len(devices), batch_size)]
    elif batch_size % len(devices):
        raise DataError(
            f"--batch-size must be a multiple of the {len(devices)} devices, got {batch_size}; "
            "take fewer processes or devices"
        )
    return training.Layout(jax.sharding.Mesh(np.array(devices), ("data",)), **choices)


def share_path(run: Callable[[], pathlib.Path]) -> pathlib.Path:
    """The path that run() returns in process 0, in all of them: a folder that they share."""
    path = training.on_process_zero(lambda: str(run().absolute()))
    return pathlib.Path(training.broadcast_from_process_zero(path))


def main_first(run: Callable[[], Result]) -> Result:
    """What run() returns, which runs in process 0 before it does in the others."""
    first = training.on_process_zero(run)
    return training.on_all_processes(run if first is None else lambda: first)


def require_same(subject: str, content: str) -> None:
    """DataError in every process unless all of them hold the same content."""
    if not training.same_on_all_processes(content):
        raise DataError(f"{subject} differs between processes")


def describe(layout: training.Layout) -> str:
    """How many devices and processes a layout has, where that is not one."""
    devices, processes = layout.mesh.devices.size, jax.process_count()
    parts = [f"{devices} devices"] if devices > 1 else []
    return "".join(f", {part}" for part in parts + [f"{processes} processes"] * (processes > 1))
