"""Agreement between several processes; with one process these functions communicate nothing."""

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Result = TypeVar("Result")


def on_all_processes(run: Callable[[], Result]) -> Result:
    """Calls run() on every process; an error on one of them raises on all.

    Args:
      run: a function without arguments.

    Returns:
      What run() returned on this process.

    Raises:
      Exception: what run() raised on this process, or OSError if it failed on another one.
    """
    try:
        result = run()
    except Exception:
        same_on_all_processes(False)
        raise
    if not same_on_all_processes(True):
        raise OSError("on_all_processes: another process failed; see its error message.")
    return result


def on_process_zero(run: Callable[[], Result]) -> Result | None:
    """Calls run() on process 0 while the other processes wait; its error raises on all.

    Args:
      run: as in `on_all_processes`.

    Returns:
      What run() returned on process 0; None on the others.

    Raises:
      Exception: as in `on_all_processes`.
    """
    return on_all_processes(run if jax.process_index() == 0 else lambda: None)


def broadcast_from_process_zero(value: Any) -> Any:
    """Returns the value of process 0 on every process; floats keep their bits.

    Args:
      value: a JSON value; it is ignored on other processes than 0.

    Returns:
      The value, decoded from JSON if there are several processes.

    Raises:
      TypeError: value is not JSON.
    """
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(text.size)))
    # The broadcast array must have the same size on all processes.
    received = multihost_utils.broadcast_one_to_all(np.resize(text, size))
    return json.loads(np.asarray(received).tobytes())


def same_on_all_processes(value: Any) -> bool:
    """Returns whether every process has the same value.

    Args:
      value: a JSON value.

    Returns:
      The same answer on every process; True with one process.

    Raises:
      TypeError: value is not JSON.
    """
    if jax.process_count() == 1:
        return True
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    own = np.frombuffer(digest, np.uint8)
    return bool((multihost_utils.process_allgather(own) == own).all())
