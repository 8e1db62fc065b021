"""Parts of messages: names on one line, numbers of things, lists that are cut short, options as they are typed."""

import os
from collections.abc import Callable, Iterable
from typing import Any

NAME_LIMIT = 40
"""Longest name of a file or class that a message shows whole, characters."""


def printable(text: str, limit: int | None = NAME_LIMIT) -> str:
    """The text on one line that any terminal can show: cut to `limit` characters, with odd characters escaped."""
    short = text if limit is None or len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def can_be_a_name(text: str) -> bool:
    """Whether the system could have a file of this name, as far as its characters go."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def listed(items: Iterable[Any], shown: int = 3, text: Callable[[Any], str] = str) -> str:
    """The first items, each as `text` gives it, and the number of the others, such as `a, b, c and 4 more`."""
    items = list(items)
    more = f" and {len(items) - shown:,} more" if len(items) > shown else ""
    return ", ".join(map(text, items[:shown])) + more


def amount(count: int, noun: str, plural: str = "") -> str:
    """A number of things, such as `1 class` and `1,200 images`; `plural` is for a noun that takes more than an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def typed(option: str, *values: object) -> str:
    """An option and its values as they are typed, such as `--data.local-scale 0.05 0.25` for data.local_scale."""
    return " ".join([f"--{option}".replace("_", "-"), *map(str, values)])


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
