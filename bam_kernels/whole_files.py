"""Writing of files: a file under its own name is always whole, whoever is killed and however many write it."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = r"\.[0-9a-f]{16}\.writing"
"""Regular expression of what follows a file's name in the name under which the file is written."""
LONGEST_NAME = 255
"""Bytes of the longest name that usual file systems take."""
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
"""Errors of a folder that cannot be synced: some network file systems do not offer it."""


@contextmanager
def replacing(path: Path, like: Path | None = None) -> Iterator[Path]:
    """Give an empty file beside `path`, of a name that no other process has; after the block it becomes `path`.

    It is synced and renamed, so that readers see the file that was there or the new one, whole. If the block raises,
    it is removed and `path` stays as it was. A link is replaced by a file; what it led to stays.
    The new file has the mode of `like`, by default of the file at `path`; where there is none, that of a new file.
    Raises: OSError that names `path`, also where `path` is a folder or a device.
    """
    temporary = path.with_name(_unfinished(path.name))
    with naming(path, temporary):
        check_file(path)
        try:
            mode = _create(temporary, like or path)
            yield temporary
            _complete(temporary, mode)
            os.replace(temporary, path)
            _sync_names(path.parent)
        finally:
            with suppress(OSError):  # the block's own error says more
                temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Context that gives `path` as file name to an OSError that has none, as from a full disk, or names `temporary`."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None and error.errno is not None
        if unnamed or (temporary is not None and str(error.filename) == str(temporary)):
            error.filename = str(path)
            del error.filename2  # None would be shown as a second name
        raise


def check_file(path: Path) -> None:
    """Raise an OSError where `path` cannot be replaced by a file: it is a folder, a device or a pipe."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def _unfinished(name: str) -> str:
    """A name for a file that is being written; a long name is cut to the bytes that a file system takes."""
    ending = f".{secrets.token_hex(8)}.writing"
    room = LONGEST_NAME - len(ending)
    encoded = os.fsencode(name)
    return (name if len(encoded) <= room else encoded[:room].decode(errors="ignore")) + ending


def _create(temporary: Path, like: Path) -> int:
    """Create an empty file that was not there, and return the mode that it shall have in the end."""
    try:
        wanted = stat.S_IMODE(like.stat().st_mode) & 0o777
    except OSError:  # none is there, or a link that leads nowhere
        wanted = None
    # Never open to more people than in the end, and writable for its owner until then.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if wanted is None else wanted | 0o600)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode) if wanted is None else wanted
    finally:
        os.close(handle)


def _complete(temporary: Path, mode: int) -> None:
    """Give a file its mode and wait until its content has reached the disk.

    A library may have put a file of its own, and of another mode, in the place of the one that was created.
    """
    handle = os.open(temporary, os.O_RDONLY)
    try:
        if stat.S_IMODE(os.fstat(handle).st_mode) != mode:
            with suppress(OSError):  # a file system that keeps no modes
                os.chmod(temporary, mode)
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_names(folder: Path) -> None:
    """Wait until the names in a folder have reached the disk, where the file system can say so."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
