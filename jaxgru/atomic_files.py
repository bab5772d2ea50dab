"""Atomic writes: a file appears complete, or not at all."""

import os
import pathlib
import secrets
import shutil

PREFIX, SUFFIX = ".jaxgru-", ".tmp"  # of the names of temporary files


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Writes a temporary file in the same folder, flushes it to disk and renames it.

    Args:
      path: of the file; an existing file is replaced.
      data: the new content.

    Raises:
      OSError: the file cannot be written; the folder is unchanged.
    """
    path = pathlib.Path(path).absolute()
    temporary = path.with_name(f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}")
    try:
        with open(temporary, "xb") as file:  # not `tempfile`, whose files only their owner may read
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(folder: str | os.PathLike) -> None:
    """Flushes the names in a folder to disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes the temporary files of killed processes; no other process may use the folder."""
    for name in os.listdir(folder):
        if name.startswith(PREFIX) and SUFFIX in name:  # Orbax appends its own suffix
            path = os.path.join(folder, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
