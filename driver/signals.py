"""SIGTERM and SIGUSR1, as schedulers send them before the time is up: save after the step under way, and end."""

import signal
import threading
from pathlib import Path
from types import FrameType

STOPPED = 75
"""Exit code of a run that has saved because of a signal and can go on: EX_TEMPFAIL of sysexits.h."""


class Stopped(Exception):
    """The run has saved and ended because of a signal."""

    def __init__(self, directory: Path, step: int) -> None:
        super().__init__(f"stopped by a signal after step {step}; --run.resume {directory} goes on from there")


class StopSignal:
    """While entered, the first signal is only noted; a second one does what it does without us."""

    NAMES = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopSignal":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # where alone Python lets handlers be set
            self.before = {name: signal.signal(name, self._note) for name in self.NAMES}
        return self

    def __exit__(self, *error: object) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self.before[signal.Signals(number)])
