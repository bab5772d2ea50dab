"""Agreement between several processes, and a lock that admits one training run per folder.

With one process nothing is communicated.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgru.atomic_files import UNSUPPORTED

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


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Locks a folder for this run; raises OSError if a living process has locked it.

    Process 0 takes a kernel lock on the file `lock`. The kernel releases it when that process and
    its forks have ended, however they ended. Where the system has no such lock, it only warns.
    """
    folder = pathlib.Path(folder)

    def lock():
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        stack.callback(os.close, descriptor)
        try:
            import fcntl  # does not exist on Windows

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            raise OSError(
                f"fit: {folder} is in use by the run of process {holder}; wait until it ends or "
                "choose another folder."
            ) from None
        except (ImportError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
                raise
            warnings.warn(
                f"fit: {folder} could not be locked ({error}): make sure that no other run uses it",
                stacklevel=9,  # the caller of `fit`
            )
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())

    with contextlib.ExitStack() as stack:
        on_process_zero(lock)
        yield
