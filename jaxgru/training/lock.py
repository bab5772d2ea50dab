"""One run to a folder."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from jaxgru.training.processes import on_process_zero


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Holds a folder for this run alone; OSError where a living process holds it.

    The lock is the kernel's, on the file `lock`, and process 0's: it goes with that process and
    those it forked, however they end.
    """
    import fcntl  # Windows has no such module

    folder, descriptors = pathlib.Path(folder), []

    def lock():
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        descriptors.append(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            raise OSError(
                f"{folder} is in use by the run of process {holder}; wait for its end or give "
                "another folder"
            ) from None
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())

    try:
        on_process_zero(lock)
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
