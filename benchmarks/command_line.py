"""Reads a benchmark's options from its command line."""

import sys
from typing import TypeVar

T = TypeVar("T")


def options_of(kind: type[T], description: str | None) -> T:
    """Parse the command line into an instance of the dataclass `kind`.

    `--help` shows the description and the docstring of each field. Without tyro the process ends with a message:
    the benchmark modules can be imported without tyro, but their command lines need it.
    """
    try:
        import tyro
    except ImportError:
        sys.exit("reading this command line needs tyro: pip install tyro")
    return tyro.cli(kind, description=description)
