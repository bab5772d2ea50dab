"""What several processes must do, or know, alike; with one process these functions do nothing."""

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Result = TypeVar("Result")


def on_all_processes(run: Callable[[], Result]) -> Result:
    """Calls run() on every process; an error on one of them is raised on all.

    Args:
      run: a function without arguments.

    Returns:
      What run() returned on this process.

    Raises:
      OSError: run() failed on another process.
      Exception: what run() raised on this one.
    """
    result: Any = None
    error = None
    try:
        result = run()
    except Exception as caught:
        error = caught
    if jax.process_count() > 1:
        done = multihost_utils.process_allgather(np.array(error is None))
        if not done.all() and error is None:
            error = OSError("another process stopped; its own message tells why")
    if error is not None:
        raise error
    return result


def on_process_zero(run: Callable[[], Result]) -> Result | None:
    """Calls run() on process 0 while the others wait for it; its error is raised on all.

    Args:
      run: a function without arguments.

    Returns:
      What run() returned on process 0; None on the others.

    Raises:
      OSError: run() failed on process 0, and this is another one.
      Exception: what run() raised, on process 0.
    """
    return on_all_processes(run if jax.process_index() == 0 else lambda: None)


def broadcast_from_process_zero(value: Any) -> Any:
    """The value that process 0 has, on every process; a float keeps its bits.

    Args:
      value: what `json` can write; on other processes than 0 it is ignored.

    Returns:
      The value of process 0, read back from JSON where there are several processes.

    Raises:
      TypeError: JSON has no form of the value.
    """
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(text.size)))
    buffer = np.zeros(size, np.uint8)
    buffer[: text.size] = text[:size]
    received = multihost_utils.broadcast_one_to_all(buffer)
    return json.loads(np.asarray(received).tobytes())


def same_on_all_processes(value: Any) -> bool:
    """Whether every process has the same value.

    Args:
      value: what `json` can write.

    Returns:
      The same answer on every process; True with one process.

    Raises:
      TypeError: JSON has no form of the value.
    """
    if jax.process_count() == 1:
        return True
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    own = np.frombuffer(digest, np.uint8)
    return bool((multihost_utils.process_allgather(own) == own).all())
