"""Lets the same script run on one device, on many devices, and in several processes.

Every process runs the whole script on its rows of the batch. They compute together on all devices.
Only process 0 writes and prints.
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
    """Adds the options of a script that can run in several processes."""
    add("--coordinator", metavar="HOST:PORT", help="address of process 0, for several processes")
    add("--num-processes", type=int, help="number of processes; needs --coordinator")
    add("--process-id", type=int, help="number of this process, from 0; needs --coordinator")
    add("--distributed", action="store_true", help="JAX finds the processes of a cluster by itself")


def start(args: Any) -> None:
    """Joins the other processes, if there are any.

    It must be called before JAX is first asked for its devices.
    """
    given = (args.coordinator, args.num_processes, args.process_id)
    if given != (None, None, None) and None in given and not args.distributed:
        raise DataError("--coordinator, --num-processes and --process-id belong together")
    if given == (None, None, None) and not args.distributed:
        return
    if args.coordinator and ":" not in args.coordinator:
        raise DataError(f"--coordinator must be HOST:PORT, got {args.coordinator}")
    if args.num_processes is not None and not 0 <= args.process_id < args.num_processes:
        raise DataError(
            f"--process-id must be at least 0 and below {args.num_processes}, got {args.process_id}"
        )
    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"the other processes were not found: {reason}") from None


def is_main() -> bool:
    """True in the process that writes and prints."""
    return jax.process_index() == 0


def make_layout(batch_size: int, **choices: Any) -> training.Layout:
    """A layout that divides the batch over all devices.

    If a single process cannot divide its batch over all devices, some of them stay idle. `choices`
    are arguments of `training.Layout`. The devices stay in JAX's order, so that every process reads
    contiguous rows.
    """
    devices = jax.devices()
    if jax.process_count() == 1:
        devices = devices[: math.gcd(len(devices), batch_size)]
    elif batch_size % len(devices):
        raise DataError(
            f"--batch-size must be a multiple of the {len(devices)} devices, got {batch_size}; "
            "use fewer processes or devices"
        )
    return training.Layout(jax.sharding.Mesh(np.array(devices), ("data",)), **choices)


def share_path(run: Callable[[], pathlib.Path]) -> pathlib.Path:
    """Calls `run` in process 0, and returns its path in every process."""
    path = training.on_process_zero(lambda: str(run().absolute()))
    return pathlib.Path(training.broadcast_from_process_zero(path))


def process_zero_first(run: Callable[[], Result]) -> Result:
    """Calls `run` in process 0, then in the other processes; returns the result of each."""
    first = training.on_process_zero(run)
    return training.on_all_processes(run if first is None else lambda: first)


def require_same(subject: str, content: str) -> None:
    """Raises a DataError in every process unless all of them hold the same content."""
    if not training.same_on_all_processes(content):
        raise DataError(f"{subject} must be the same in all processes, got different ones")


def describe(layout: training.Layout) -> str:
    """The numbers of devices and of processes, each only if it is above 1."""
    devices, processes = layout.mesh.devices.size, jax.process_count()
    parts = [f"{devices} devices"] if devices > 1 else []
    return "".join(f", {part}" for part in parts + [f"{processes} processes"] * (processes > 1))
