"""Bounds of option values. A bound stands at its option: `size: Annotated[int, at_least(1)]`; tyro ignores it.

`cli.check_bounds` refuses values outside their bounds, and the help of an option ends with its bound.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bound:
    """A condition on the value of an option."""

    words: str
    """What the value must be, e.g. `at least 1`."""
    admits: Callable[[Any], bool]


def at_least(low: float) -> Bound:
    return Bound(f"at least {low}", lambda value: value >= low)


def each(bound: Bound) -> Bound:
    """Bound of an option that takes one or more numbers, all within `bound`."""
    words = f"one or more numbers, each {bound.words}"
    return Bound(words, lambda values: len(values) > 0 and all(map(bound.admits, values)))


POSITIVE = Bound("positive", lambda value: value > 0)
SHARE = Bound("from 0 to 1", lambda value: 0 <= value <= 1)
SHARE_BELOW_1 = Bound("at least 0 and below 1", lambda value: 0 <= value < 1)
RISING_SHARES = Bound("two numbers above 0 and at most 1, the smaller first", lambda pair: 0 < pair[0] <= pair[1] <= 1)
RISING = Bound("two finite numbers, the smaller first", lambda pair: -math.inf < pair[0] < pair[1] < math.inf)


def bounds_of(annotation: Any) -> list[Bound]:
    """Bounds in the annotation of an option; usually one or none."""
    return [part for part in getattr(annotation, "__metadata__", ()) if isinstance(part, Bound)]
