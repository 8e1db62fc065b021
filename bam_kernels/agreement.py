"""Check input on every rank, and report one rank's error to all ranks.

Without the report the other ranks would wait in a collective for the rank that failed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .exchanges import Exchanges
from .header import Header, NonFinite
from .ranks import Ranks, ranks_named, ranks_of


class share_errors_with_ranks:
    """Context that reports a ValueError or TypeError raised in it to all ranks of `group`, before it goes on.

    x: the tensor whose device the ranks communicate on. Nothing is reported for tensors on GPUs, where ranks do not
    compare headers at every call.
    """

    def __init__(self, operation: str, group: Any, x: Any) -> None:
        self._operation, self._group, self._x = operation, group, x

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, (ValueError, TypeError)):
            return
        device = self._x.device if isinstance(self._x, Tensor) else torch.device("cpu")
        if device.type == "cpu" and not torch.compiler.is_compiling():
            ranks = ranks_named(ranks_of(self._operation, self._group)[2])
            ranks.agree(Header(self._operation, {}, str(error)), device)


@contextmanager
def agree_with_ranks(
    ranks: Ranks | Exchanges, operation: str, values: dict[str, Any], device: torch.device
) -> Iterator[None]:
    """Check this rank's input in the block, then compare `values` with all ranks.

    An error of the block is reported to all ranks before it is raised here.
    Raises: ValueError, TypeError. With values["non_finite"] = "nan", non-finite input raises NonFinite on all ranks,
    and the caller returns NaN.
    """
    if torch.compiler.is_compiling():  # a compiled function compares when it runs: exchanges.py
        yield
        return
    try:
        yield from _agree(ranks, Header(operation, values), device)
    except NonFinite as error:
        raise for_caller(error, values) from None


def for_caller(error: NonFinite, values: dict[str, Any]) -> ValueError:
    """The error of a call with these values: NonFinite if its caller returns NaN then, else ValueError."""
    return error if values.get("non_finite") == "nan" else ValueError(str(error))


def _agree(ranks: Ranks | Exchanges, header: Header, device: torch.device) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        if ranks.W > 1:
            ranks.agree(replace(header, fault=str(error), non_finite=isinstance(error, NonFinite)), device)
        raise
    if ranks.W > 1:
        ranks.agree(header, device)
