"""Named ranges for Nsight Systems in the domain "bam_kernels": gather, scores, Sinkhorn, match, gradient.

Off unless the environment has BAM_KERNELS_NVTX=1 or `enable` was called: nvtx is imported only then. A range that is on
costs about a microsecond.
"""

import os
from collections.abc import Iterator
from contextlib import ContextDecorator
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")
_enabled = os.environ.get("BAM_KERNELS_NVTX") == "1"


def enable() -> None:
    """Mark ranges from now on. Raises: ImportError without nvtx."""
    global _enabled
    _domain()
    _enabled = True


@cache
def _domain() -> Any:
    try:
        import nvtx
    except ImportError as error:
        raise ImportError("bam_kernels: ranges for Nsight need nvtx: pip install nvtx") from error
    return nvtx.get_domain("bam_kernels")


class named_range(ContextDecorator):
    """`with named("scores"): ...`, or a decorator."""

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
    """The same items; the making of each is a range, what is done with it is not."""
    while True:
        with named_range(name):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
