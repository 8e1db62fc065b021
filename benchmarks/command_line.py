"""The options of a benchmark, read from its command line."""

import sys
from typing import TypeVar

T = TypeVar("T")


def options_of(kind: type[T], description: str | None) -> T:
    """An instance of the dataclass `kind`; `--help` shows the description and the text under each field.

    Ends the process with a message where tyro is not installed: the modules themselves can be imported without it.
    """
    try:
        import tyro
    except ImportError:
        sys.exit("reading this command line needs tyro: pip install tyro")
    return tyro.cli(kind, description=description)
