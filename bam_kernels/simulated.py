"""Ranks without a process group: threads of one process, or one rank with the keys of all other ranks given."""

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from .header import Header, ways_header

Result = TypeVar("Result")
_numbers = itertools.count()


class SimulatedRanks:
    """Rank `rank` of W in a single process: the keys of the other ranks are given, and reductions stay local.

    Shows one rank's share of the work and memory on one device. The loss differs from the loss of W ranks, because
    columns are balanced over the rows of this rank only.
    keys (N, D): unit keys in gathered order; this rank's own block is replaced by the keys it computes.
    keep_sent: make the messages of the other ranks once, at the first call. For timing, which must not count work of
    other ranks; the embeddings must be equal at every call.
    """

    def __init__(self, W: int, rank: int, keys: Tensor, *, keep_sent: bool = False) -> None:
        if len(keys) % W:
            raise ValueError(f"SimulatedRanks: keys has {len(keys)} rows, not a multiple of W={W}")
        if not 0 <= rank < W:
            raise ValueError(f"SimulatedRanks: rank={rank} must be at least 0 and below W={W}")
        self.W, self.rank, self.keys = W, rank, keys
        self.name = f"simulated-{next(_numbers)}"
        self._sent: dict[tuple[int, torch.dtype], Tensor] | None = {} if keep_sent else None

    def agree(self, header: Header, device: torch.device) -> None:
        if header.fault or "D" not in header.values:
            return
        T, B, D = (header.values[letter] for letter in "TBD")
        if self.keys.shape != (self.W * T * B, D):
            raise ValueError(
                f"SimulatedRanks: keys is {tuple(self.keys.shape)}, must be W times {(T * B, D)}, W={self.W}"
            )

    def common_ways(self, operation: str, ways: tuple[str, ...], device: torch.device) -> tuple[str, ...]:
        return ways

    def gather(
        self, own: Tensor, as_sent: Callable[[Tensor], Tensor], room: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        yield self.rank * len(own), own
        for first, block in self._from_others(own, as_sent):
            yield first, block if room is None else room[first : first + len(block)].copy_(block)

    def _from_others(self, own: Tensor, as_sent: Callable[[Tensor], Tensor]) -> Iterator[tuple[int, Tensor]]:
        n, others = len(own), [(self.rank - step) % self.W for step in range(1, self.W)]
        if self._sent is None:
            for rank in others:
                yield rank * n, as_sent(self.keys[rank * n : (rank + 1) * n])
            return
        # All keys are in memory: one block holds the ranks before this one, another block the ranks after it.
        for ranks in (range(self.rank), range(self.rank + 1, self.W)):
            if not ranks:
                continue
            key = ranks.start, own.dtype
            if key not in self._sent:
                self._sent[key] = torch.cat([as_sent(self.keys[rank * n : (rank + 1) * n]) for rank in ranks])
            yield ranks.start * n, self._sent[key]

    def sum(self, x: Tensor, meanwhile: Callable[[], None] | None = None) -> Tensor:
        if meanwhile is not None:
            meanwhile()
        return x

    def max(self, x: Tensor) -> Tensor:
        return x

    def scatter(self, part: Callable[[int], Tensor]) -> Tensor:
        for step in range(self.W - 1):
            part((self.rank - 1 - step) % self.W)
        return part(self.rank)


class ThreadRanks:
    """One of W ranks that are threads of this process, with the results of W processes; `run_ranks` starts them."""

    def __init__(self, W: int, rank: int, meeting: "_Meeting") -> None:
        self.W, self.rank, self._meeting = W, rank, meeting
        self.name = f"threads-{next(_numbers)}"

    def agree(self, header: Header, device: torch.device) -> None:
        header.check(self._meeting.exchange(self.rank, header.encoded))

    def common_ways(self, operation: str, ways: tuple[str, ...], device: torch.device) -> tuple[str, ...]:
        header = ways_header(operation, ways)
        return header.common_ways(self._meeting.exchange(self.rank, header.encoded))

    def gather(
        self, own: Tensor, as_sent: Callable[[Tensor], Tensor], room: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        blocks, n = self._meeting.exchange(self.rank, own.clone()), len(own)
        for step in range(self.W):
            source = (self.rank - step) % self.W
            block = blocks[source]
            yield source * n, block if room is None else room[source * n : (source + 1) * n].copy_(block)

    def sum(self, x: Tensor, meanwhile: Callable[[], None] | None = None) -> Tensor:
        all_ranks = self._meeting.exchange(self.rank, x.clone())
        if meanwhile is not None:
            meanwhile()
        return x.copy_(torch.stack(all_ranks).sum(0))

    def max(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._meeting.exchange(self.rank, x.clone())).amax(0))

    def scatter(self, part: Callable[[int], Tensor]) -> Tensor:
        parts = self._meeting.exchange(self.rank, [part(r).clone() for r in range(self.W)])
        return torch.stack([rank_parts[self.rank] for rank_parts in parts]).sum(0)


class _Meeting:
    """All-gather between W threads: each thread gives one value and gets the values of all threads."""

    def __init__(self, W: int) -> None:
        self.barrier = threading.Barrier(W)
        self.values: list[Any] = [None] * W

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


def run_ranks(W: int, function: Callable[[ThreadRanks], Result]) -> list[Result]:
    """Run `function(group)` on W ranks, each a thread of this process, and return the results in rank order.

    function: gets its rank as a `ThreadRanks`, to be passed on as `group=`.
    Raises: the error of the lowest rank that did not fail merely because another rank failed.
    """
    meeting = _Meeting(W)
    results: list[Any] = [None] * W
    errors: list[BaseException | None] = [None] * W

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadRanks(W, rank, meeting))
        except BaseException as error:
            errors[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(W)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raised = [error for error in errors if error is not None]
    causes = [error for error in raised if not isinstance(error, threading.BrokenBarrierError)]
    if raised:
        raise (causes or raised)[0]
    return results
