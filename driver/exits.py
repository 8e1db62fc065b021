"""End of a script: one clear error message, an exit code, and a checkpoint when a scheduler's signal stops the run.

Schedulers send SIGTERM or SIGUSR1 before the time is up: the run saves after the current step and ends with code 75.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from .config import UserError
from .distributed import World

STOPPED = 75
"""Exit code of a run that has saved because of a signal and can go on: EX_TEMPFAIL of sysexits.h."""


class Stopped(Exception):
    """Exception of a run that has saved its state and ends because of a signal."""

    def __init__(self, directory: Path, step: int) -> None:
        super().__init__(f"stopped by a signal after step {step}; --run.resume {directory} goes on from there")


class StopSignal:
    """Context in which a first SIGTERM or SIGUSR1 is only noted, in `asked`; a second one has its usual effect."""

    NAMES = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopSignal":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in this thread only
            self.before = {name: signal.signal(name, self._note) for name in self.NAMES}
        return self

    def __exit__(self, *error: object) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self.before[signal.Signals(number)])


def exit_code(run: Callable[[World], int], interrupted: str = "interrupted") -> int:
    """Call `run` and return the exit code of this process: what `run` returns, 1 for a UserError, 130 for Ctrl-C.

    Only rank 0 prints to standard output; an error is printed once, by the rank that met it first. With several ranks,
    after an error on one of them, this process ends here with its exit code and does not return: see `World.abandon`.
    """
    world = World.from_environment()
    if not world.first:
        sys.stdout = open(os.devnull, "w")
    try:
        code = run(world)
        if not world.failed():
            world.end()
            return code
    except UserError as error:
        code = 1
        if world.first_to_fail():
            # A data-loader worker puts a traceback before the message of its UserError.
            say(f"error: {str(error).rsplit('UserError: ', 1)[-1]}")
    except KeyboardInterrupt:
        code = 130
        if world.first:
            say(interrupted)
    except RuntimeError:
        if not world.failed():
            raise
        code = 1  # a collective failed here because another rank has ended; it has printed why
    world.abandon(code)
    return code


def say(text: str) -> None:
    """Print `text` to standard error, on a line below the progress bar.

    Text and newlines go out in one write, because several ranks may write to one terminal.
    """
    sys.stderr.write(f"\n{text}\n")
