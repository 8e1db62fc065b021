"""How one rank sees the others. Engines, reference and operators speak to this interface alone.

W ranks, this one is `rank`; each holds n = T*B of the N = W*n keys, rows r*n .. (r+1)*n - 1 in gathered order.
Three kinds: no other rank (here), torch.distributed (distributed.py), and simulated ones (simulated.py).
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from .constant import constant_in_graphs
from .header import Header
from .saved_group import SavedGroup


class Ranks(Protocol):
    """Agree on the problem, gather keys, reduce column sums, scatter key gradients.

    Every rank calls the same methods in the same order with tensors of the same shapes: they follow from what `agree`
    has compared.
    """

    W: int
    rank: int
    name: str
    """Under which `ranks_named` finds them: operators take strings. Never empty."""

    def agree(self, header: Header, device: torch.device) -> None:
        """Return if all ranks have the same header and none has a fault. Raises: ValueError saying what differs."""

    def gather(self, own: Tensor, as_sent: Callable[[Tensor], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Blocks (first row, rows) of the ranks' `own` as they arrive, this rank's first; each valid until the next.

        rows (k*n, D): those of one rank or of k neighbouring ones. To be read to the end, and not to be written to.
        as_sent: what a rank with these unit rows would call `own`, for ranks that are simulated.
        """

    def sum(self, x: Tensor, meanwhile: Callable[[], None] | None = None) -> Tensor:
        """x <- its sum over the ranks; `meanwhile` is done while the sum is under way."""

    def max(self, x: Tensor) -> Tensor:
        """x <- its maximum over the ranks."""

    def scatter(self, part: Callable[[int], Tensor]) -> Tensor:
        """Σ over ranks of their part(this rank): `part(r)` is this rank's (n, D) contribution to rank r, a contiguous
        tensor that may be written to. Asked for the other ranks first."""


class OneRank:
    """No other rank: nothing to send."""

    W = 1
    rank = 0
    name = "one"

    def agree(self, header: Header, device: torch.device) -> None:
        pass

    def gather(self, own: Tensor, as_sent: Callable[[Tensor], Tensor]) -> Iterator[tuple[int, Tensor]]:
        yield 0, own

    def sum(self, x: Tensor, meanwhile: Callable[[], None] | None = None) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x

    def scatter(self, part: Callable[[int], Tensor]) -> Tensor:
        return part(0)


ONE_RANK = OneRank()
DEFAULT_GROUP = ""  # the name of the default process group, or of one rank where there is none: at every call anew
_ranks_by_name: WeakValueDictionary[str, Ranks] = WeakValueDictionary({ONE_RANK.name: ONE_RANK})
_ranks_by_group: WeakKeyDictionary[Any, Ranks] = (
    WeakKeyDictionary()
)  # with what they have agreed on, as long as the groups


def ranks_named(name: str, W: int | None = None, rank: int | None = None) -> Ranks:
    """The ranks of a name that `ranks_of` has returned. W, rank: what a function was compiled, or a graph made, for.

    Raises: RuntimeError where their group has gone, or is another than it was then.
    """
    ranks = _resolve("bam_kernels", None) if name == DEFAULT_GROUP else _ranks_by_name.get(name)
    if ranks is None:
        raise RuntimeError(f"bam_kernels: the process group {name} has been destroyed")
    if (W, rank) not in ((None, None), (ranks.W, ranks.rank)):
        raise RuntimeError(
            f"bam_kernels: compiled or recorded as rank {rank} of {W}, but this process is now rank {ranks.rank} of "
            f"{ranks.W}: the process group has been made or destroyed since. Call a compiled function only after "
            "init_process_group, or discard what has been compiled with torch.compiler.reset()"
        )
    return ranks


@constant_in_graphs
def ranks_of(operation: str, group: Any) -> tuple[int, int, str]:
    """(W, rank, name) of `group`; of the default process group where it is None and torch.distributed is initialised.

    A compiled function keeps the answer: operators take the name, and W and rank where something follows from them.
    Raises: ValueError, TypeError naming the operation.
    """
    ranks = _resolve(operation, group)
    _ranks_by_name[ranks.name] = ranks
    return ranks.W, ranks.rank, ranks.name if group is not None else DEFAULT_GROUP


def _resolve(operation: str, group: Any) -> Ranks:
    from .simulated import SimulatedRanks, ThreadRanks

    group = getattr(group, "real_obj", group)  # torch.compile may hand over the group in a wrapper of its own

    if isinstance(group, (OneRank, SimulatedRanks, ThreadRanks)):
        return group
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        if isinstance(group, SavedGroup):
            group.find(operation)  # raises
        if group is not None:
            raise ValueError(f"{operation}: group is given, but torch.distributed is not initialised")
        return ONE_RANK
    from .distributed import GroupRanks

    if isinstance(group, SavedGroup):
        group = group.find(operation)
    if group is None:
        group = distributed.group.WORLD
    if group == distributed.GroupMember.NON_GROUP_MEMBER:  # a number, of which a file has a copy
        raise ValueError(f"{operation}: this process is not a member of group")
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(f"{operation}: group must be a torch.distributed process group, got {type(group).__name__}")
    if group.size() == 1:
        return ONE_RANK
    known = _ranks_by_group.get(group)
    if known is None:
        _ranks_by_group[group] = known = GroupRanks(group)
    return known
