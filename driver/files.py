"""Writing of files: a file under its own name is always whole, and a bad place is found before long work."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, or of a user's share of it, without room for a file."""
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
"""Errors of a folder that cannot be synced: some network file systems do not offer it."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`. After the block, the file written there is synced and renamed to `path`.

    If the block raises, the temporary file is removed and `path` stays as it was.
    Raises: OSError, with a file name, also where `path` is a folder or a device.
    """
    temporary = path.with_name(f"{path.name}.writing")
    with naming(path):
        check_file(path)
        temporary.unlink(missing_ok=True)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync_names(path.parent)
        finally:
            with suppress(OSError):  # the block's own error says more
                temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context that gives `path` as file name to an OSError without one, as from a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def check_file(path: Path) -> None:
    """Raise an OSError where `path` cannot be replaced by a file: it is a folder, a device or a pipe."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def try_folder(folder: Path) -> None:
    """Make and remove a subfolder of `folder`, or where `folder` is missing, of its nearest parent that is there.

    Raises: OSError where this fails, also where `folder` is a link that leads nowhere.
    """
    while True:
        try:
            with tempfile.TemporaryDirectory(prefix=".trial-", dir=folder):
                return
        except FileNotFoundError:
            if os.path.lexists(folder) or folder.parent == folder:
                raise
            folder = folder.parent


def obstacle(path: Path, error: OSError | ValueError) -> str:
    """Words for why `path` cannot be made or written: a file or a dead link in the way, or the system's own words."""
    for part in (path, *path.parents):
        if os.path.islink(part) and not os.path.exists(part):
            return f"{part} is a link to {os.readlink(part)}, which is not there"
        if part != path and os.path.exists(part) and not os.path.isdir(part):
            return f"{part} is not a folder"
    return getattr(error, "strerror", None) or str(error)


def _sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_names(folder: Path) -> None:
    """Wait until the names in a folder have reached the disk, where the file system can say so."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
