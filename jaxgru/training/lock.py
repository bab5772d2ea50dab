"""A lock that admits one training run per folder."""

import contextlib
import os
import pathlib
import warnings
from collections.abc import Iterator

from jaxgru.atomic_files import UNSUPPORTED
from jaxgru.training.processes import on_process_zero


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
