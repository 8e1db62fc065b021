"""Checks whose failure on one rank is told to the others, which would otherwise wait for it."""

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
    """Check arguments in the block; the other ranks of `group`, who wait for this one, are told of an error first.

    x: the tensor whose device the ranks would have met on. On GPUs they do not meet at every call, so nothing is said.
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
    """Check this rank's input in the block; the other ranks are told of an error before it is raised here.

    Raises: ValueError, TypeError; NonFinite, on all ranks, only where values have non_finite="nan": the caller's answer
    is NaN then.
    """
    if torch.compiler.is_compiling():  # what is compiled compares when it runs: exchanges.py
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
