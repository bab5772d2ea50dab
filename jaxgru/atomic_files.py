"""Atomic writes: a file appears complete, or not at all."""

import os
import shutil
import tempfile


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Writes a temporary file in the same folder, flushes it to the disk and renames it.

    Args:
      path: of the file; one that exists is replaced, in one step.
      data: what it is to hold.

    Raises:
      OSError: it cannot be written; the folder is as it was.
    """
    folder = os.path.dirname(os.path.abspath(path))
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=PREFIX, suffix=SUFFIX)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    flush_folder(folder)


def flush_folder(folder: str | os.PathLike) -> None:
    """The names in a folder are on the disk after it."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes what writers that were killed left in a folder; for its only user."""
    for name in os.listdir(folder):
        if name.startswith(PREFIX) and SUFFIX in name:  # Orbax appends a suffix of its own
            path = os.path.join(folder, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


PREFIX, SUFFIX = ".jaxgru-", ".tmp"


def _umask():
    """The process's mask for new files, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
