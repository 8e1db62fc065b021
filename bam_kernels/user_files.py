"""Files that the library keeps for a user between processes: where they are, and how they are read and written."""

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from .whole_files import replacing


def cache_folder() -> Path:
    """Folder of kept files, which may not exist: XDG_CACHE_HOME/bam_kernels or ~/.cache/bam_kernels.

    Relative paths count as unset: they would mean another folder in each working directory.
    Raises: OSError if this user has no home.
    """
    folder = os.environ.get("XDG_CACHE_HOME") or ""
    if os.path.isabs(folder):
        return Path(folder) / "bam_kernels"
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise OSError("this user has no home folder")
    return Path(home) / ".cache" / "bam_kernels"


def private_folder(*, make: bool = True) -> Path:
    """Folder of this user in the folder for temporary files.

    make: make it if it is missing. Raises: OSError if it is missing, is another user's, or can be written by others.
    """
    folder = Path(tempfile.gettempdir()) / f"bam_kernels-{os.getuid()}"
    if make:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{folder} is not a folder that only this user can write to")
    return folder


def read(file: Path, most_bytes: int) -> str:
    """Text of a file. Raises: OSError for what is no plain file or larger; ValueError for what is not UTF-8."""
    handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe must not wait
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most_bytes:
            raise OSError(f"{file} is not a plain file of at most {most_bytes} bytes")
        with os.fdopen(handle, "rb", closefd=False) as opened:
            return opened.read(most_bytes).decode()
    finally:
        os.close(handle)


def write(file: Path, text: str) -> None:
    """Write a file whole, as `replacing` does. Makes its folder if that is missing. Raises: OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
