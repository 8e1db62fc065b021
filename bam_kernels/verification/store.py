"""Verdicts of this machine: one small JSON file for each identity, in the user's cache folder.

Where that folder cannot be written, a folder of this user among the temporary files takes its place. What cannot be
kept at all holds for one process. A damaged file, or one about something else, counts as no file.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..user_files import cache_folder, private_folder, read, write
from ..ways import GPU_WAYS
from .identity import Identity

MOST_BYTES = 1 << 18  # of a file; what a process printed is cut far below
KEPT = ("verified", "failed")
POLL_S = 0.2


@dataclass(frozen=True)
class Verdict:
    """What trying a way on this machine has shown.

    status   verified | failed | unknown; "unknown" is never kept
    reason   why it is not verified, for people
    seconds  how long it took, compilation included
    date     day of the trial
    output   last lines that the process printed, if it failed
    """

    status: str
    reason: str = ""
    seconds: float = 0.0
    date: str = ""
    output: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else self.status


def load(here: Identity) -> dict[str, Verdict]:
    """Kept verdicts by way, from the first folder that has a readable file about exactly this identity."""
    for folder in _folders():
        try:
            return _decode(read(_file(folder(), here), MOST_BYTES), here)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
    return {}


def save(here: Identity, verdicts: dict[str, Verdict]) -> Path | None:
    """Keep the verdicts that are not unknown, in place of the kept ones.

    Returns the file; None if there is nothing to keep, or no folder takes it.
    """
    kept = {way: asdict(verdict) for way, verdict in verdicts.items() if verdict.status in KEPT}
    if not kept:
        return None
    text = json.dumps({"identity": here, "verdicts": kept}, indent=1) + "\n"
    for folder in _folders():
        with suppress(OSError):
            write(_file(folder(), here), text)
            return _file(folder(), here)
    return None


def _folders() -> tuple[Callable[[], Path], ...]:
    return (lambda: cache_folder() / "verdicts", private_folder)


def _file(folder: Path, here: Identity) -> Path:
    return folder / f"{hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:32]}.json"


def _decode(text: str, here: Identity) -> dict[str, Verdict]:
    plain: Any = json.loads(text)
    if plain["identity"] != here:
        raise ValueError("another identity")
    verdicts = {way: Verdict(**fields) for way, fields in plain["verdicts"].items()}
    for way, verdict in verdicts.items():
        texts = (verdict.reason, verdict.date, verdict.output)
        if way not in GPU_WAYS or verdict.status not in KEPT or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"no verdict: {way}")
        float(verdict.seconds)
    return verdicts


class Lock:
    """Lock that one process of this machine holds while it tries the kernels for an identity.

    The system releases it when the process ends. The holder calls `touch` while kernels are compiled, so that others
    go on waiting.
    """

    def __init__(self, here: Identity) -> None:
        self._handle: int | None = None
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

    def wait(self, seconds: float) -> bool:
        """Wait until the lock is free, and take it; False once the holder has not touched it for `seconds`."""
        seen, since = self._touched(), time.monotonic()
        while not self.acquire():
            time.sleep(POLL_S)
            touched = self._touched()
            if touched != seen:
                seen, since = touched, time.monotonic()
            elif time.monotonic() > since + seconds:
                return False
        return True

    def touch(self) -> None:
        """Say that the holder is at work on what has no limit of its own."""
        if self._handle is not None:
            with suppress(OSError):
                os.utime(self._handle)

    def _touched(self) -> int:
        return os.fstat(self._handle).st_mtime_ns if self._handle is not None else 0

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()
