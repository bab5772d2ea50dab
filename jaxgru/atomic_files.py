"""Files that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from typing import BinaryIO


def write_whole(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill a temporary file in the same folder, flushes it to the disk and renames it.

    An existing file is replaced, in one step; after an error the folder is as it was.
    """
    folder = os.path.dirname(os.path.abspath(path))
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=PREFIX, suffix=SUFFIX)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)  # the new name, too, is on the disk
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
