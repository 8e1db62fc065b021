"""End of a script: one clear error message, an exit code, and a checkpoint when a scheduler's signal stops the run.

Schedulers send SIGTERM or SIGUSR1 before the time is up: the run saves after the current step and ends with code 75.
"""

import errno
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from types import FrameType

import torch
import torch.distributed as dist

from .config import UserError
from .distributed import World
from .files import FULL
from .messages.streams import OutputLost, Stream, guarded
from .messages.text import printable

STOPPED = 75
"""Exit code of a run that has saved because of a signal and can go on: EX_TEMPFAIL of sysexits.h."""
BROKEN_PIPE = 128 + signal.SIGPIPE
"""Exit code of a script whose standard output lost its reader, such as `head`: a shell's code for SIGPIPE."""


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


def exit_code(run: Callable[[World], int]) -> int:
    """Call `run` and return the exit code of this process: what `run` returns, 1 for an error, 130 for Ctrl-C.

    An error that the user can put right is one message: a UserError, or an OSError about a file or a folder. Its notes
    (`BaseException.add_note`) say how to go on. Only rank 0 prints to standard output; an error is printed once, by the
    rank that met it first. With several ranks, after an error on one of them, this process ends here with its exit code
    and does not return: see `World.abandon`. A loss of standard output ends `run`, unless it has called
    `outlive_output`.
    """
    with guarded(_end):
        return _exit_code(run)


def _exit_code(run: Callable[[World], int]) -> int:
    world = World()
    try:
        world = World.from_environment()
        if not world.first:
            sys.stdout = open(os.devnull, "w", errors="backslashreplace")
            warnings.filterwarnings("ignore", "bam_kernels: ")  # on the choice of kernels, which all ranks make alike
        code = run(world)
        sys.stdout.flush()
        if not world.failed():
            world.end()
            return code
    except OutputLost as lost:
        silent = lost.error.errno == errno.EPIPE  # the reader has all that it wanted
        code = BROKEN_PIPE if silent else 1
        if world.first_to_fail() and not silent:
            say(f"error: {lost}")
    except (UserError, OSError) as error:
        text = str(error) if isinstance(error, UserError) else about_files(error)
        if text is None:
            raise
        code = 1
        if world.first_to_fail():
            say(_with_notes(f"error: {text}", error))
    except KeyboardInterrupt as error:
        code = 130
        if world.first:
            say(_with_notes("interrupted", error))
    except (RuntimeError, MemoryError) as error:
        text = out_of_memory(error) or lost_rank(error)
        if not world.failed() and text is None:
            raise
        code = 1  # or a collective failed because another rank has ended; where that rank could, it has printed why
        if world.first_to_fail():
            say(_with_notes(f"error: {text}", error))
    world.abandon(code)
    return code


def lacks_memory(error: Exception) -> bool:
    """Whether the host's memory was refused, by Python or by torch, which raises a RuntimeError."""
    return isinstance(error, MemoryError) or "t allocate memory" in str(error)


def out_of_memory(error: Exception) -> str | None:
    """Message for an error of torch, NumPy or Python that could not get memory; None for another error."""
    text = " ".join(str(error).split())
    if not (lacks_memory(error) or isinstance(error, torch.OutOfMemoryError)):
        return None
    reason = f" ({_reason(text, 200)})" if text else ""
    return f"not enough memory{reason}; smaller batches, smaller images or a smaller network take less"


def _reason(text: str, width: int) -> str:
    """Text of an error of torch in so many characters, without places in torch's sources."""
    return shorten(re.sub(r"\[[^\]]*\.\w+:\d+\] (err == 0\. )?", "", text), width, placeholder=" ...")


def _with_notes(text: str, error: BaseException) -> str:
    return "; ".join([text, *getattr(error, "__notes__", [])])


def lost_rank(error: BaseException) -> str | None:
    """Message for an error of gloo, NCCL or the store where another rank is lost; None for another error."""
    text = " ".join(str(error).split())
    of_network = isinstance(error, (dist.DistNetworkError, dist.DistStoreError))
    if not of_network and "gloo/transport" not in text and "ncclRemoteError" not in text:
        return None
    reason = _reason(text, 150)
    if "timeout" in text.lower() or "timed out" in text.lower():
        return f"another rank does not answer: is its process stopped, its machine or the network down? ({reason})"
    return (
        "another rank has ended. If it left no message, the system may have killed it for want of memory, or its "
        f"machine failed ({reason})"
    )


def about_files(error: OSError) -> str | None:
    """Message for an OSError about a file, a folder or a disk, which the user can put right; None for another one."""
    if error.filename is None and error.errno == errno.ENOENT:
        if not _has_directory():
            return "the current directory has been removed; change to one that is there"
        # tempfile names the folders that it has tried; the system's own words alone, as of a socket, say nothing.
        return None if error.strerror == os.strerror(errno.ENOENT) else error.strerror
    if error.errno is None or (error.filename is None and error.errno not in FULL):
        return None
    names = [repr(name) for name in (error.filename, error.filename2) if name is not None]
    text = ": ".join(filter(None, [error.strerror, " -> ".join(names)]))
    return f"{text}: the disk is full; a checkpoint that was written stays whole" if error.errno in FULL else text


def _has_directory() -> bool:
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


def _end(error: OSError) -> None:
    raise OutputLost(error) from error


def outlive_output() -> None:
    """From now on, a loss of standard output does not end this script; a note on standard error tells of it."""
    if isinstance(sys.stdout, Stream):
        sys.stdout.at_loss = _go_on


def _go_on(error: OSError) -> None:
    say(f"note: standard output is lost ({error.strerror}); the run goes on")


def say(text: str) -> None:
    """Print `text` to standard error, on a line below the progress bar, with odd characters escaped.

    A name in it may come from anybody, and would command the terminal with a control character.
    Text and newlines go out in one write, because several ranks may write to one terminal.
    """
    lines = (printable(line, None) for line in text.split("\n"))
    sys.stderr.write("\n" + "\n".join(lines) + "\n")
