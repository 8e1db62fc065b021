"""How one rank sees the others. The engines speak to this interface alone.

B, T, D, N and W are those of layout.py; gathered order is rank-major.
"""

from typing import Any, Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """Gather keys, reduce column sums, scatter key gradients."""

    W: int
    rank: int

    def gather_keys(self, keys: Tensor) -> Tensor:
        """(T*B, D) of this rank -> (N, D) of all ranks, gathered order."""

    def sum(self, columns: Tensor) -> Tensor:
        """Sum of a (N,) tensor over the ranks."""

    def max(self, columns: Tensor) -> Tensor:
        """Maximum of a (N,) tensor over the ranks."""

    def scatter_keys(self, dk: Tensor) -> Tensor:
        """(N, D) of this rank's rows -> (T*B, D): the sum over ranks of the rows that this rank owns."""


class OneRank:
    """No other rank: nothing to send."""

    W = 1
    rank = 0

    def gather_keys(self, keys: Tensor) -> Tensor:
        return keys

    def sum(self, columns: Tensor) -> Tensor:
        return columns

    def max(self, columns: Tensor) -> Tensor:
        return columns

    def scatter_keys(self, dk: Tensor) -> Tensor:
        return dk


ONE_RANK = OneRank()


def ranks_of(name: str, group: Any) -> Ranks:
    """The ranks of `group`; of the default process group where it is None and torch.distributed is initialised."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        if group is not None:
            raise ValueError(f"{name}: group is given, but torch.distributed is not initialised")
        return ONE_RANK
    size = distributed.get_world_size(group)
    if size == 1:
        return ONE_RANK
    raise NotImplementedError(
        f"{name}: the process group has {size} ranks; this version computes the loss of one rank only. "
        "Pass a group of one rank to compute each rank's own loss"
    )
