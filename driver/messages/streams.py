"""Standard output and standard error of a script: they may be closed, lose their reader, or lack characters."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

AtLoss = Callable[[OSError], None]
"""What follows from the first error of a stream."""


class OutputLost(Exception):
    """Exception of a script that can no longer write to standard output. The system's error is its `error`."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {error.strerror}")
        self.error = error


class Stream:
    """Text stream that passes all text on until it meets an error, such as a broken pipe.

    It then calls `at_loss` once. Later text goes to the null device, also text from C code.
    """

    def __init__(self, stream: TextIO, at_loss: AtLoss) -> None:
        self.stream, self.at_loss = stream, at_loss

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        # The file itself is replaced: the interpreter would meet the error again when it flushes the stream at exit.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)
        self.at_loss(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def guarded(at_loss: AtLoss) -> Iterator[None]:
    """Context in which `at_loss` gets the first error of standard output, and errors of standard error are ignored.

    Each line is written at once. A character that the encoding lacks is written as an escape such as \\xfc.
    """
    _open_closed_files()
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    guards = Stream(sys.stdout, at_loss), Stream(sys.stderr, lambda _: None)
    sys.stdout, sys.stderr = guards  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for guard in guards:
            guard.at_loss = lambda _: None
            guard.flush()


def _open_closed_files() -> None:
    """Open the null device as each of the files 0, 1 and 2 that is closed.

    A file that the script opens would get the free number, and with it what C code prints.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))
