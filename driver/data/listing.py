"""Files of one kind under a folder: each real directory is listed once, and what is left out is counted."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from ..config import UserError
from ..messages.text import printable
from .decode import EXTENSIONS

SYSTEM = frozenset(
    ("__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found")
)
"""Lower-case names of folders that archives, file servers and operating systems add, some with images in them."""
SHOWN = 3
"""Number of kinds of files that a message shows."""
BROKEN, REPEATED, SPECIAL = "broken link", "link to a folder listed already", "pipe or device"
STRAY = "image beside folders"
PLURALS = {
    BROKEN: "broken links",
    REPEATED: "links to folders listed already",
    SPECIAL: "pipes or devices",
    STRAY: "images beside folders",
}


def is_image(name: str) -> bool:
    """Whether a file name ends as the names of image files do."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


class Listing:
    """Files by directory under `root`: `files[directory]` is a sorted list of the names that are wanted.

    Links are followed after all real directories are listed. A link to a directory that is listed already, or that
    holds `root`, is kept in `repeats` with the directory's first path, and not listed again.
    """

    def __init__(self, root: Path, wanted: Callable[[str], bool] = is_image) -> None:
        """List the files whose names are `wanted`. Raises: UserError where a directory cannot be listed."""
        self.root, self.wanted = str(root), wanted
        self.files: dict[str, list[str]] = {}
        self.repeats: dict[str, str] = {}
        self.unusable: list[str] = []
        """Paths of broken links, pipes, sockets and devices."""
        self.left_out: Counter[str] = Counter()
        self._first_path = {_identity(str(folder)): str(folder) for folder in Path(os.path.realpath(root)).parents}
        links = self._list(self.root)
        while links:
            links = [link for folder in sorted(links) for link in self._list(folder)]

    def _list(self, top: str) -> list[str]:
        """List `top` and the real directories below it; return the links to directories that were met."""
        links, pending = [], [top]
        while pending:
            folder = pending.pop()
            first_path = self._first_path.setdefault(_identity(folder), folder)
            if first_path != folder:
                self.repeats[folder] = first_path
                self.left_out[REPEATED] += 1
                continue
            names, folders = self._entries(folder, links)
            self.files[folder] = sorted(names)
            pending += sorted(folders, reverse=True)
        return links

    def _entries(self, folder: str, links: list[str]) -> tuple[list[str], list[str]]:
        """Names of wanted files and paths of real directories in a folder; links to directories go to `links`."""
        names, folders = [], []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        self.left_out["hidden"] += 1
                    elif _is(entry.is_dir):
                        (links if entry.is_symlink() else folders).append(entry.path)
                    elif not _is(entry.is_file):
                        self.left_out[BROKEN if entry.is_symlink() else SPECIAL] += 1
                        self.unusable.append(entry.path)
                    elif self.wanted(entry.name):
                        names.append(entry.name)
                    else:
                        kind = os.path.splitext(entry.name)[1].lower()
                        self.left_out[printable(kind) if kind else "without extension"] += 1
        except OSError as error:
            raise _not_listed(folder, error) from error
        return names, folders

    def subfolders(self, folder: str) -> dict[str, list[str]]:
        """Directories at any depth below each direct subfolder that hold files; a subfolder without any has none."""
        prefix = os.path.join(folder, "")
        found: dict[str, list[str]] = {}
        for directory in sorted(self.files):
            if directory.startswith(prefix):
                name = directory[len(prefix) :].partition(os.sep)[0]
                found.setdefault(name, []).extend([directory] if self.files[directory] else [])
        return found

    def count(self, directories: Iterable[str]) -> int:
        """Number of the files that lie directly in these directories."""
        return sum(len(self.files[directory]) for directory in directories)

    def paths(self, directories: Iterable[str]) -> list[str]:
        """Paths of the files that lie directly in these directories, in order."""
        found = []
        for directory in directories:
            prefix = os.path.join(directory, "")
            found += [prefix + name for name in self.files[directory]]
        return found


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of a set of images, as `.ipynb_checkpoints` and `__MACOSX`."""
    return name.startswith(".") or name.lower() in SYSTEM


def counted(left_out: Counter[str]) -> str:
    """Counts of what was left out, the largest first, such as `100 .txt, 2 hidden and 4 more`; empty if nothing was."""
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {PLURALS.get(kind, kind) if count > 1 else kind}" for kind, count in kinds[:SHOWN]]
    more = sum(count for _, count in kinds[SHOWN:])
    return ", ".join(parts) + (f" and {more:,} more" if more else "")


def _is(question: Callable[[], bool]) -> bool:
    """Answer to `question` about an entry of a directory; False for a link that cannot be followed."""
    try:
        return question()
    except OSError:
        return False


def _identity(folder: str) -> tuple[int, int]:
    """Device and inode of a directory, the same by every path to it. Raises: UserError where there is no access."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _not_listed(folder, error) from error
    return status.st_dev, status.st_ino


def _not_listed(folder: str, error: OSError) -> UserError:
    return UserError(f"--data.root: {folder} cannot be listed ({error.strerror}); change its permissions or move it")
