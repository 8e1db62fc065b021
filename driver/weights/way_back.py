"""The way back from a damaged checkpoint: the newest other one of its run that is whole."""

from pathlib import Path

from ..config import FILE as OPTIONS
from ..config import UserError
from .checksums import fault_of_zip

FILE = "checkpoint.pt"
STEP_FILES, EPOCH_FILES = f"step-{'[0-9]' * 9}.pt", "epoch-*.pt"
"""Names of the checkpoints of a run: the newest, and those that --run.keep-last and --run.keep-every keep."""


def damaged(path: Path, fault: str, advice: str = "download or copy it again") -> UserError:
    """Error of a file of weights with a fault, and the way on: another checkpoint of its run, else the advice."""
    return UserError("; ".join(filter(None, [f"{path}: {fault}", *_way_back(path, advice)])))


def _way_back(path: Path, advice: str) -> list[str]:
    """Parts of a message: the checkpoint to go back to, or that a run has no other; else the advice alone."""
    named = any(path.match(name) for name in (FILE, STEP_FILES, EPOCH_FILES))
    if not named or not (path.parent / OPTIONS).is_file():
        return [advice]
    other = _newest_other(path)
    if other is None:
        return ["no other checkpoint of this run is whole", advice]
    return [f"the newest other checkpoint of this run that is whole is {other}: --run.resume {other} goes back to it"]


def _newest_other(path: Path) -> Path | None:
    """Newest checkpoint beside `path` that is whole. A second name of the same file is as damaged as the file."""
    found = []
    for name in (FILE, STEP_FILES, EPOCH_FILES):
        for other in path.parent.glob(name):
            try:
                status = other.stat()
                if not path.exists() or not other.samefile(path):
                    found.append((status.st_mtime_ns, other))
            except OSError:
                continue
    for _, other in sorted(found, reverse=True):
        try:
            if not fault_of_zip(other):
                return other
        except OSError:
            continue
    return None
