"""Named ranges for Nsight Systems in the domain "bam_kernels": gather, scores, Sinkhorn, match, gradient.

Ranges are off, and nvtx is not imported, unless the environment has BAM_KERNELS_NVTX=1 or `enable` was called. A range
that is on costs about a microsecond, and a step then runs through the engine's Python each time.
"""

from collections.abc import Iterator
from contextlib import ContextDecorator
from functools import cache
from typing import Any, TypeVar

from .environment import is_on

T = TypeVar("T")
_enabled = is_on("BAM_KERNELS_NVTX")


def enable() -> None:
    """Turn ranges on for the rest of the process. Raises: ImportError if nvtx is not installed."""
    global _enabled
    _domain()
    _enabled = True


def are_on() -> bool:
    """Whether ranges are on."""
    return _enabled


@cache
def _domain() -> Any:
    try:
        import nvtx
    except ImportError as error:
        raise ImportError("bam_kernels: ranges for Nsight need nvtx: pip install nvtx") from error
    return nvtx.get_domain("bam_kernels")


class named_range(ContextDecorator):
    """Mark a block or a function as a range: `with named_range("scores"): ...`, or `@named_range("scores")`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _recreate_cm(self) -> "named_range":
        return named_range(self.name)

    def __enter__(self) -> "named_range":
        self._domain = _domain() if _enabled else None
        if self._domain is not None:
            self._domain.push_range(self._domain.get_event_attributes(message=self.name))
        return self

    def __exit__(self, *exception: object) -> None:
        if self._domain is not None:
            self._domain.pop_range()


def range_for_each(name: str, items: Iterator[T]) -> Iterator[T]:
    """Iterate over `items`, marking the production of each item, but not its use, as a range `name`."""
    while True:
        with named_range(name):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
