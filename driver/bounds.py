"""Bounds of option values. A bound stands at its option: `size: Annotated[int, at_least(1)]`; tyro ignores it.

`cli.check_bounds` refuses values outside their bounds, and the help of an option ends with its bound. Every number has
a bound on both sides: a larger one would overflow, start a thousand processes or never end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MOST = 10**9
"""Largest value of an option whose use has no smaller limit."""


@dataclass(frozen=True)
class Bound:
    """A condition on the value of an option."""

    words: str
    """What the value must be, e.g. `from 1 to 1,000`."""
    admits: Callable[[Any], bool]


def at_least(low: float, most: float = MOST) -> Bound:
    """Bound of numbers from `low` to `most`."""
    return Bound(f"from {low} to {most:,}", lambda value: low <= value <= most)


def each(bound: Bound) -> Bound:
    """Bound of an option that takes one or more numbers, all within `bound`."""
    words = f"one or more numbers, each {bound.words}"
    return Bound(words, lambda values: len(values) > 0 and all(map(bound.admits, values)))


PIXELS = at_least(1, 2**14)
"""Side of an image."""
PROCESSES = 1024
"""Most processes that an option may start."""
POSITIVE = Bound(f"above 0 and at most {MOST:,}", lambda value: 0 < value <= MOST)
TEMPERATURE = at_least(1e-6)
"""Divisor of cosines in float32, as in the library; much smaller ones would overflow."""
SEED = at_least(0, 2**63 - 1)
"""Seeds of torch's generators are 64 bits; `data.random_keys` keeps 63 of them."""
SHARE = at_least(0, 1)
SHARE_BELOW_1 = Bound("at least 0 and below 1", lambda value: 0 <= value < 1)
RISING_SHARES = Bound("two numbers above 0 and at most 1, the smaller first", lambda pair: 0 < pair[0] <= pair[1] <= 1)
RISING = Bound(
    "two numbers from -1e30 to 1e30 and at least 1e-30 apart, the smaller first",  # arithmetic is in float32
    lambda pair: -1e30 <= pair[0] < pair[1] <= 1e30 and pair[1] - pair[0] >= 1e-30,
)


def bounds_of(annotation: Any) -> list[Bound]:
    """Bounds in the annotation of an option; usually one or none."""
    return [part for part in getattr(annotation, "__metadata__", ()) if isinstance(part, Bound)]
