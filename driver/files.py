"""Places where the driver writes: a bad one is found before long work, and one process at a time writes a run."""

import errno
import fcntl
import os
import re
import socket
import tempfile
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path

from bam_kernels.whole_files import UNFINISHED, naming

from .config import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, or of a user's share of it, without room for a file."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
"""Errors of a file system without locks, or (EBADF) with locks only on files that may be written."""
LOCK = "run.lock"
HOLDER = re.compile(rb"process ([1-9]\d{0,6}) on ([A-Za-z0-9._-]{1,253})\n")
"""What the holder of a run's lock writes into the lock's file: its process id and its host."""
TRIES = 3
"""How often a lock is taken whose file was removed or replaced meanwhile."""
OLD_S = 24 * 60 * 60
"""Age in seconds at which an unfinished file has no writer any more."""


class RunLock:
    """Lock on the directory of a run, which the one process that trains the run holds until the end of the context.

    The system releases it when that process ends, however it ends. Processes that were started by it do not hold it.
    """

    def __init__(self) -> None:
        self._path = Path()
        self._file: FileIO | None = None

    def take(self, directory: Path) -> bool:
        """Lock the directory. Returns False, after a note, where its file system has no locks.

        Raises: UserError where another process holds the lock; OSError where the lock's file cannot be opened.
        """
        self.release()
        path = directory / LOCK
        for tries_left in reversed(range(TRIES)):
            file = _open_lock(path)
            try:
                if not lock(file, directory):
                    file.close()
                    return False
            except (BlockingIOError, PermissionError) as error:  # some file systems say EACCES to the second
                with file:
                    raise UserError(
                        f"{directory}: another process is at work on this run{_holder(file)}. Wait for its end, or end "
                        "it; or start a new run, without --run.resume"
                    ) from error
            if _is_at(path, file) or not tries_left:  # some file systems have no fixed numbers by which to compare
                break
            file.close()
        self._path, self._file = path, file
        with suppress(OSError):  # where the disk is full, a message will lack the holder
            os.ftruncate(file.fileno(), 0)
            os.pwrite(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return True

    def keep(self) -> None:
        """Lock the directory anew if the lock's file was removed. Raises: UserError if another process has the lock."""
        if self._file is not None and not _is_at(self._path, self._file) and self._path.parent.is_dir():
            self.take(self._path.parent)

    def release(self) -> None:
        """Release the lock, if this process holds it, and remove its file."""
        if self._file is None:
            return
        with self._file as file:
            self._file = None
            if _is_at(self._path, file):
                with suppress(OSError):
                    self._path.unlink()  # before the lock is free: it is another process's file then
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # a process forked meanwhile has the handle too

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def lock(file: FileIO, folder: Path, wait: bool = False) -> bool:
    """Lock an open file in `folder`. Returns False, after a note, where the file system has no locks.

    wait: wait until no other process holds the lock. Raises: BlockingIOError, or PermissionError, where one does.
    """
    try:
        with naming(folder):
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"note: {folder}: no locks there ({error.strerror}), so see that only one process writes there")
        return False
    return True


def _open_lock(path: Path) -> FileIO:
    """Open or make the lock's file: for writing, which network file systems ask for, or else for reading."""
    flags = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle, mode = os.open(path, os.O_RDWR | flags, 0o666), "r+"
    except PermissionError:  # another user's, who shares the directory
        handle, mode = os.open(path, os.O_RDONLY | flags), "r"
    return FileIO(handle, mode)


def _is_at(path: Path, file: FileIO) -> bool:
    """Whether an open file is the one at `path`, which another process would lock."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    return False


def _holder(file: FileIO) -> str:
    """Words for the process that holds a lock, from the lock's file; "" where the file names none that is alive."""
    with suppress(OSError):
        found = HOLDER.fullmatch(os.pread(file.fileno(), 300, 0))
        if found is None:
            return ""
        number, host = int(found[1]), found[2].decode()
        if host == socket.gethostname():
            with suppress(PermissionError):  # alive, and another user's
                os.kill(number, 0)
        return f" (process {number} on {host})"
    return ""


def remove_unfinished(directory: Path, own: str, at_once: bool) -> None:
    """Remove files that were being written into a run's directory when a process was killed; a note tells how many.

    own: regular expression of the names of files that only the holder of the run's lock writes. With `at_once`, such
    files go whatever their age. Others may have a writer, and go when they are a day old.
    """
    count = size = 0
    for entry in os.scandir(directory):
        found = re.fullmatch(rf"(.+?)({UNFINISHED}|\.writing)", entry.name, re.DOTALL)
        if found is None or not entry.is_file(follow_symlinks=False):
            continue
        mine, unique = re.fullmatch(own, found[1]) is not None, found[2] != ".writing"
        with suppress(OSError):  # gone, or another user's
            about = entry.stat(follow_symlinks=False)
            if (mine and at_once) or ((mine or unique) and time.time() - about.st_mtime > OLD_S):
                os.unlink(entry)
                count, size = count + 1, size + about.st_size
    if count:
        files = "file that was" if count == 1 else "files that were"
        print(f"note: {directory}: removed {count} {files} being written when a process was killed, {size:,} bytes")


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
