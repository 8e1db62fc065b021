"""Communication between ranks: the interface `Ranks`, the case of one rank, and the lookup by process group.

Engines, reference and operators use this interface alone. There are W ranks; rank r holds n = T*B of the N = W*n keys:
rows r*n .. (r+1)*n - 1 in gathered order.
Three kinds: OneRank (here), ranks of torch.distributed (distributed.py), simulated ranks (simulated.py).
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
    """The collectives of one evaluation: compare headers, gather keys, reduce column sums, scatter key gradients.

    Every rank calls the same methods in the same order, with tensors of equal shapes: both follow from the header that
    `agree` has compared.
    """

    W: int
    rank: int
    name: str
    """Key of these ranks for `ranks_named`, because operators take strings. Never empty."""

    def agree(self, header: Header, device: torch.device) -> None:
        """Compare headers of all ranks. Raises: ValueError if one reports an error or headers differ, saying what."""

    def common_ways(self, operation: str, ways: tuple[str, ...], device: torch.device) -> tuple[str, ...]:
        """Ways that all ranks have verified; `ways`: those of this rank. Raises: ValueError as `agree`."""

    def gather(
        self, own: Tensor, as_sent: Callable[[Tensor], Tensor], room: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Gather the keys `own` (n, D) of every rank: yields (first row, rows) block by block, in order of arrival.

        The first block is this rank's own. A block has the rows (k*n, D) of k neighbouring ranks, is valid until the
        next block is taken, and must not be written to. The iterator must be read to its end. Keys of equal shapes give
        the same blocks in the same order at every call, because recordings of steps rely on it.
        as_sent: for simulated ranks, the `own` of a rank whose unit rows are the argument.
        room: (N, D), of which `own` is this rank's block. The other ranks' keys are received in it, and blocks are
        parts of it, valid as long as it is.
        """

    def sum(self, x: Tensor, meanwhile: Callable[[], None] | None = None) -> Tensor:
        """Replace x by its sum over the ranks; `meanwhile` is called while the all-reduce is under way."""

    def max(self, x: Tensor) -> Tensor:
        """Replace x by its maximum over the ranks."""

    def scatter(self, part: Callable[[int], Tensor]) -> Tensor:
        """Reduce-scatter: the sum over ranks of their contributions to this rank, (n, D).

        part(r): this rank's contribution (n, D) to rank r, a contiguous tensor that may be written to, and is valid
        until the next contribution has been made, the last one also afterwards. `part` is called once for each rank.
        """


class OneRank:
    """The only rank of its group: nothing is sent."""

    W = 1
    rank = 0
    name = "one"

    def agree(self, header: Header, device: torch.device) -> None:
        pass

    def common_ways(self, operation: str, ways: tuple[str, ...], device: torch.device) -> tuple[str, ...]:
        return ways

    def gather(
        self, own: Tensor, as_sent: Callable[[Tensor], Tensor], room: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        yield 0, own

    def sum(self, x: Tensor, meanwhile: Callable[[], None] | None = None) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x

    def scatter(self, part: Callable[[int], Tensor]) -> Tensor:
        return part(0)


HAS_DISTRIBUTED = torch.distributed.is_available()
ONE_RANK = OneRank()
DEFAULT_GROUP = ""  # stands for the default process group of the time of the call, or for one rank if there is none
_ranks_by_name: WeakValueDictionary[str, Ranks] = WeakValueDictionary({ONE_RANK.name: ONE_RANK})
# GroupRanks live as long as their process groups, with the kinds of header that the ranks have compared.
_ranks_by_group: WeakKeyDictionary[Any, Ranks] = WeakKeyDictionary()


def ranks_named(name: str, W: int | None = None, rank: int | None = None) -> Ranks:
    """Look up the ranks by a name that `ranks_of` has returned.

    W, rank: values at the time a function was compiled or a graph was recorded; None: not compared.
    Raises: RuntimeError if the process group has been destroyed, or has another W or rank than given.
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
    """Number of ranks W, this rank, and the name for `ranks_named`, of a process group.

    group None: the default group if torch.distributed is initialised, else one rank.
    A compiled function keeps the result as a constant, so operators take the name, and W and rank to detect a change.
    Raises: ValueError, TypeError naming the operation.
    """
    ranks = _resolve(operation, group)
    if group is None:
        return ranks.W, ranks.rank, DEFAULT_GROUP
    _ranks_by_name[ranks.name] = ranks
    return ranks.W, ranks.rank, ranks.name


def _resolve(operation: str, group: Any) -> Ranks:
    distributed = torch.distributed
    is_initialized = HAS_DISTRIBUTED and distributed.is_initialized()
    if group is None and not is_initialized:
        return ONE_RANK
    from .simulated import SimulatedRanks, ThreadRanks

    group = getattr(group, "real_obj", group)  # torch.compile may wrap the group

    if isinstance(group, (OneRank, SimulatedRanks, ThreadRanks)):
        return group
    if not is_initialized:
        if isinstance(group, SavedGroup):
            group.find(operation)  # raises
        raise ValueError(f"{operation}: group is given, but torch.distributed is not initialised")
    from .distributed import GroupRanks

    if isinstance(group, SavedGroup):
        group = group.find(operation)
    if group is None:
        group = distributed.group.WORLD
    if group == distributed.GroupMember.NON_GROUP_MEMBER:  # compared by value: unpickling copies this constant
        raise ValueError(f"{operation}: this process is not a member of group")
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(f"{operation}: group must be a torch.distributed process group, got {type(group).__name__}")
    if group.size() == 1:
        return ONE_RANK
    known = _ranks_by_group.get(group)
    if known is None:
        _ranks_by_group[group] = known = GroupRanks(group)
    return known
