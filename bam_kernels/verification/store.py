"""Verdicts of this machine: one small JSON file for each identity, in the user's cache folder.

Where that folder cannot be written, a folder of this user among the temporary files takes its place. What cannot be
kept at all holds for one process. A damaged file, or one about something else, counts as no file.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Linux: nothing is tried, see trust.py
    pass

from ..user_files import cache_folder, private_folder, read, write
from ..ways import GPU_WAYS
from .identity import Identity

MOST_BYTES = 1 << 20  # of a file; what a process printed is cut to less, even if JSON escapes each character
KEPT = ("verified", "failed")
POLL_S = 0.2
TOUCH_S = 1.0  # the least time between two touches
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Verdict:
    """What trying a way on this machine has shown.

    status   verified | failed | unknown; "unknown" is never kept
    reason   why it is not verified, for people
    seconds  how long it took, compilation included
    date     day and time of the trial
    output   last lines that the process printed
    """

    status: str
    reason: str = ""
    seconds: float = 0.0
    date: str = ""
    output: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else self.status


def load(here: Identity) -> dict[str, Verdict]:
    """Kept verdicts on exactly this identity, by way; the latest, should several folders have one."""
    kept: dict[str, Verdict] = {}
    for folder in _folders(make=False):
        with suppress(*UNREADABLE):
            for way, verdict in _decode(read(_file(folder(), here), MOST_BYTES), here, KEPT).items():
                if way not in kept or kept[way].date < verdict.date:
                    kept[way] = verdict
    return kept


def save(here: Identity, found: dict[str, Verdict]) -> Path | None:
    """Keep the verdicts that are not unknown, beside kept ones on other ways.

    Returns the file; None if there is nothing to keep, or no folder takes it.
    """
    found = {way: verdict for way, verdict in found.items() if verdict.status in KEPT}
    if not found:
        return None
    text = _encode(here, load(here) | found)
    for folder in _folders():
        with suppress(OSError):
            file = _file(folder(), here)
            if not file.is_file() and not file.is_dir():  # a pipe or a device counts as no file
                file.unlink(missing_ok=True)
            write(file, text)
            return file
    return None


def _folders(*, make: bool = True) -> tuple[Callable[[], Path], ...]:
    return (lambda: cache_folder() / "verdicts", lambda: private_folder(make=make))


def _file(folder: Path, here: Identity) -> Path:
    return folder / f"{hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:32]}.json"


def _encode(here: Identity, verdicts: dict[str, Verdict]) -> str:
    plain = {"identity": here, "verdicts": {way: asdict(verdict) for way, verdict in verdicts.items()}}
    return json.dumps(plain, indent=1) + "\n"


def _decode(text: str, here: Identity, statuses: tuple[str, ...]) -> dict[str, Verdict]:
    plain: Any = json.loads(text)
    if plain["identity"] != here:
        raise ValueError("another identity")
    verdicts = {way: Verdict(**fields) for way, fields in plain["verdicts"].items()}
    for way, verdict in verdicts.items():
        texts = (verdict.reason, verdict.date, verdict.output)
        if way not in GPU_WAYS or verdict.status not in statuses or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"no verdict: {way}")
        if not 0 <= verdict.seconds < 1e6:
            raise ValueError(f"no duration: {verdict.seconds}")
    return verdicts


class Lock:
    """Lock that one process of this machine holds while it tries the kernels for an identity.

    The system releases it when the process ends. The holder calls `touch` while kernels are compiled, so that others
    go on waiting, and `tell` at the end: others take also what is not kept, and do not try it one after another.
    """

    def __init__(self, here: Identity) -> None:
        self._here = here
        self._handle: int | None = None
        self._touched_s = -TOUCH_S
        for folder in _folders():
            with suppress(OSError):
                file = _file(folder(), here).with_suffix(".lock")
                file.parent.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                return

    def acquire(self) -> bool:
        """Take the lock if no other process holds it. True also where there is nothing to lock."""
        if self._handle is None:
            return True
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: two processes may try the kernels, each for itself
            return True
        return True

    def wait(self, seconds: float) -> dict[str, Verdict] | None:
        """Wait until the lock is free, and take it; returns what its holders told meanwhile.

        None, without the lock, once the holder has not touched it for `seconds`.
        """
        told_before = self._content()
        seen, since = self._touched(), time.monotonic()
        while not self.acquire():
            time.sleep(POLL_S)
            touched = self._touched()
            if touched != seen:
                seen, since = touched, time.monotonic()
            elif time.monotonic() > since + seconds:
                return None
        told = self._content()
        if told != told_before:
            with suppress(*UNREADABLE):
                return _decode(told.decode(), self._here, (*KEPT, "unknown"))
        return {}

    def touch(self) -> None:
        """Say that the holder is at work on what has no limit of its own."""
        if self._handle is not None and time.monotonic() >= self._touched_s + TOUCH_S:  # a home may be far away
            self._touched_s = time.monotonic()
            with suppress(OSError):
                os.utime(self._handle)

    def tell(self, found: dict[str, Verdict]) -> None:
        """Write what the holder has found into the lock's file."""
        if self._handle is not None:
            with suppress(OSError):
                os.ftruncate(self._handle, 0)
                os.pwrite(self._handle, _encode(self._here, found).encode(), 0)

    def _content(self) -> bytes:
        with suppress(OSError):
            return os.pread(self._handle, MOST_BYTES, 0) if self._handle is not None else b""
        return b""

    def _touched(self) -> int:
        with suppress(OSError):  # on a file server, a file that has been deleted
            return os.fstat(self._handle).st_mtime_ns if self._handle is not None else 0
        return 0

    def release(self) -> None:
        if self._handle is not None:
            with suppress(OSError):
                fcntl.flock(self._handle, fcntl.LOCK_UN)  # a process forked meanwhile has the handle too
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()
