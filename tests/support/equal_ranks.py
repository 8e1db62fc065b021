"""A ring of ranks in one process, which hold equal rows."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from bam_kernels.distributed import GroupRanks
from bam_kernels.header import Header
from bam_kernels.simulated import ThreadRanks

_numbers = itertools.count()


class Transfer:
    """A message that is copied when the receiver waits for it, at the last moment at which it may be read."""

    def __init__(self, sent: Tensor, received: Tensor) -> None:
        self._sent, self._received = sent, received

    def wait(self) -> None:
        self._received.copy_(self._sent)


class EqualRanks(GroupRanks, ThreadRanks):
    """Rank `rank` of W that all hold this process's rows: what a neighbour sends is what this rank sends.

    The rings are those of GroupRanks, without its process group; as ThreadRanks it may be given as `group`. With key
    gradients the neighbours' contributions to a rank are this rank's to another one, so that gradients are not those of
    W ranks.
    """

    def __init__(self, W: int, rank: int) -> None:
        self.W, self.rank, self.name = W, rank, f"equal-{next(_numbers)}"

    def agree(self, header: Header, device: torch.device) -> None:
        pass

    def sum(self, x: Tensor, meanwhile: Callable[[], None] | None = None) -> Tensor:
        if meanwhile is not None:
            meanwhile()
        return x.mul_(self.W)

    def max(self, x: Tensor) -> Tensor:
        return x

    def _exchange(self, right: Tensor, left: Tensor) -> list:
        return [Transfer(right, left)]
