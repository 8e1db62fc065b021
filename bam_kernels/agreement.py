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


@contextmanager
def share_errors_with_ranks(operation: str, group: Any, x: Any) -> Iterator[None]:
    """Report a ValueError or TypeError raised in the block to all ranks of `group`, then raise it here.

    x: the tensor whose device the ranks communicate on. Nothing is reported for tensors on GPUs, where ranks do not
    compare headers at every call.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        device = x.device if isinstance(x, Tensor) else torch.device("cpu")
        if device.type == "cpu" and not torch.compiler.is_compiling():
            ranks = ranks_named(ranks_of(operation, group)[2])
            ranks.agree(Header(operation, {}, str(error)), device)
        raise


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
        if values.get("non_finite") == "nan":
            raise
        raise ValueError(str(error)) from None


def _agree(ranks: Ranks | Exchanges, header: Header, device: torch.device) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        if ranks.W > 1:
            ranks.agree(replace(header, fault=str(error), non_finite=isinstance(error, NonFinite)), device)
        raise
    if ranks.W > 1:
        ranks.agree(header, device)
