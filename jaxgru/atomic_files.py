"""Atomic writes: a file or folder appears complete, or not at all; and the check of its JSON."""

import errno
import json
import os
import pathlib
import secrets
import shutil
import stat
from typing import Any

PREFIX, SUFFIX = ".jaxgru-", ".tmp"  # of the names of temporary files
_REPLACED = ".replaced"  # ends the name of a folder that is being replaced
# What file systems without locks, without flushes of folders or without reservations answer.
UNSUPPORTED = (errno.EINVAL, errno.EPERM, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def require_json(function: str, name: str, value: Any) -> None:
    """TypeError unless value is of JSON, ValueError if JSON changes it: it would not load equal."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for key, entry in value.items():
            require_json(function, f"{name}[{key!r}]", entry)
        return
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except TypeError as error:
        raise TypeError(
            f"{function}: {name} must be a JSON value, got {value!r}; convert it to a Python "
            f"number, string, list or dict ({error})."
        ) from None
    except ValueError:  # NaN or infinity
        same = False
    if not same:
        raise ValueError(
            f"{function}: {name} must be the same after it is saved as JSON, got {value!r}; use "
            "finite numbers, lists instead of tuples, and strings as keys."
        )


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Writes a temporary file in the same folder, flushes it to disk and renames it.

    Args:
      path: of the file; an existing file is replaced and keeps its mode. A link is followed.
      data: the new content.

    Raises:
      OSError: the file cannot be written; the folder is unchanged. If only the last flush failed,
        the new file is there, but may be lost when the power fails.
    """
    path = pathlib.Path(os.path.realpath(path))
    temporary = path.with_name(f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}")
    try:
        with open(temporary, "xb") as file:  # not `tempfile`, whose files only their owner may read
            if path.exists():
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            temporary.replace(path)
        except OSError as error:
            message = f"write_atomically: {path} could not be replaced: {error.strerror}"
            raise OSError(error.errno, message) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def place_new(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Gives a finished file on the same disk the name `path`; FileExistsError if that exists.

    Where there are no hard links (exFAT, some network mounts), an empty file reserves the name.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        pathlib.Path(path).touch(exist_ok=False)
        os.replace(temporary, path)


def flush_folder(folder: str | os.PathLike) -> None:
    """Flushes the names in a folder to disk, where the system can do that."""
    if os.name == "nt":  # Windows opens no folders
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(opened)


def replace_folder(path: pathlib.Path, temporary: pathlib.Path) -> None:
    """Gives a temporary folder beside `path` that name; an existing folder is moved aside first.

    If that fails in between, `remove_leftovers` gives the existing folder its name back.
    """
    if path.exists():
        path.rename(path.with_name(f"{PREFIX}{path.name}{SUFFIX}{_REPLACED}"))
    temporary.rename(path)
    flush_folder(path.parent)


def remove_leftovers(folder: pathlib.Path) -> None:
    """Removes the temporary files of killed processes; no other process may use the folder."""
    for replaced in folder.glob(f"{PREFIX}*{SUFFIX}{_REPLACED}"):
        path = folder / replaced.name.removeprefix(PREFIX).removesuffix(f"{SUFFIX}{_REPLACED}")
        if not path.exists():
            replaced.rename(path)
    for path in folder.glob(f"{PREFIX}*{SUFFIX}*"):  # Orbax appends its own suffix
        shutil.rmtree(path) if path.is_dir() else path.unlink()
