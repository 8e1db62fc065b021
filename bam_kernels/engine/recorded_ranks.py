"""Messages between ranks in a recording: how they are noted, and how they run again.

Ranks call back while messages are under way: a gather yields keys as they arrive, a sum lets the caller compute
meanwhile, a scatter asks for one contribution after another. What runs then is nested in the operation of the messages.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..agreement import for_caller
from ..header import Header, NonFinite
from ..ranks import Ranks
from .noted import Noted, Places, View, blocks_of
from .recorder import Recorder
from .recording import Operation, Run, repeat
from .workspace import NO_BASE, Block


class RecordedRanks:
    """Ranks whose messages a recorder notes while they are exchanged."""

    def __init__(self, ranks: Ranks, recorder: Recorder) -> None:
        self.W, self.rank, self.name = ranks.W, ranks.rank, ranks.name
        self._ranks, self._recorder = ranks, recorder

    def agree(self, header: Header, device: torch.device) -> None:
        with self._recorder.paused():
            self._ranks.agree(header, device)
        self._recorder.add(NotedAgreement(header))

    def common_ways(self, operation: str, ways: tuple[str, ...], device: torch.device) -> tuple[str, ...]:
        return self._ranks.common_ways(operation, ways, device)

    def gather(
        self, own: Tensor, as_sent: Callable[[Tensor], Tensor], room: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        recorder = self._recorder

        def refused(unit: Tensor) -> Tensor:
            recorder.refuse("the messages of simulated ranks are made anew by the engine")
            return as_sent(unit)

        noted = NotedGather(recorder.view(own), recorder.view(room) if room is not None else None)
        recorder.use(noted.blocks())
        blocks = iter(self._ranks.gather(own, refused, room))
        while True:
            with recorder.paused():
                arrived = next(blocks, None)
            if arrived is None:
                break
            first, block = arrived
            operations: list[Noted] = []
            noted.parts.append((recorder.received(block, (own, room), noted.received), operations))
            with recorder.nested(operations):
                yield first, block
        recorder.add(noted)

    def sum(self, x: Tensor, meanwhile: Callable[[], None] | None = None) -> Tensor:
        noted, recorder = NotedSum(self._recorder.view(x)), self._recorder

        def noted_meanwhile() -> None:
            with recorder, recorder.nested(noted.meanwhile):
                if meanwhile is not None:
                    meanwhile()

        recorder.use(noted.blocks())
        with recorder.paused():
            self._ranks.sum(x, noted_meanwhile)
        recorder.add(noted)
        return x

    def max(self, x: Tensor) -> Tensor:
        with self._recorder.paused():
            self._ranks.max(x)
        self._recorder.add(NotedMax(self._recorder.view(x)))
        return x

    def scatter(self, part: Callable[[int], Tensor]) -> Tensor:
        noted, recorder = NotedScatter(), self._recorder
        latest: list[Tensor] = []

        def noted_part(rank: int) -> Tensor:
            operations: list[Noted] = []
            with recorder, recorder.nested(operations):
                message = part(rank)
            view = recorder.view(message)
            recorder.use(blocks_of([*noted.messages[-1:], view]))  # ranks keep one until they have the next
            noted.parts[rank] = (operations, view)
            latest[:] = [message]
            return message

        with recorder.paused():
            total = self._ranks.scatter(noted_part)
        recorder.received(total, latest, noted.total)
        recorder.add(noted, blocks_of(noted.messages[-1:]))
        return total


@dataclass(eq=False)
class NotedAgreement(Noted):
    header: Header

    def blocks(self) -> Iterator[Block]:
        yield from ()

    def placed(self, places: Places) -> Operation:
        return Agreement(self.header)


@dataclass(eq=False)
class Agreement:
    """Compares a header with all ranks. Raises: as `agree_with_ranks`."""

    header: Header

    def __call__(self, run: Run) -> None:
        try:
            run.ranks.agree(self.header, run.device)
        except NonFinite as error:
            raise for_caller(error, self.header.values) from None


@dataclass(eq=False)
class NotedMax(Noted):
    x: View

    def blocks(self) -> Iterator[Block]:
        yield from blocks_of([self.x])

    def placed(self, places: Places) -> Operation:
        return Max(places.of(self.x))


@dataclass(eq=False)
class Max:
    """Replaces the tensor at place x by its maximum over the ranks."""

    x: int

    def __call__(self, run: Run) -> None:
        run.ranks.max(run.tensor(self.x))


@dataclass(eq=False)
class NotedSum(Noted):
    x: View
    meanwhile: list[Noted] = field(default_factory=list)

    def blocks(self) -> Iterator[Block]:
        yield from blocks_of([self.x])

    def nested(self) -> Iterator[Noted]:
        yield from self.meanwhile

    def placed(self, places: Places) -> Operation:
        return Sum(places.of(self.x), places.operations(self.meanwhile))


@dataclass(eq=False)
class Sum:
    """Replaces the tensor at place x by its sum over the ranks; operations that run meanwhile."""

    x: int
    meanwhile: list[Operation]

    def __call__(self, run: Run) -> None:
        run.ranks.sum(run.tensor(self.x), lambda: repeat(self.meanwhile, run))


@dataclass(eq=False)
class NotedGather(Noted):
    """parts: for each block of keys, whether it is new memory, and the operations after its arrival.

    received: the blocks that are new memory, which one base holds in turn.
    """

    own: View
    room: View | None
    parts: list[tuple[bool, list[Noted]]] = field(default_factory=list)
    received: list[Block] = field(default_factory=list)

    def blocks(self) -> Iterator[Block]:
        yield from blocks_of([self.own, self.room])

    def nested(self) -> Iterator[Noted]:
        for _, operations in self.parts:
            yield from operations

    def placed(self, places: Places) -> Operation:
        base = self.received[0].base if self.received else NO_BASE
        parts = [(base if new else NO_BASE, places.operations(operations)) for new, operations in reversed(self.parts)]
        return Gather(places.of(self.own), places.of(self.room) if self.room is not None else None, parts[::-1])


@dataclass(eq=False)
class Gather:
    """Gathers keys from place `own`, with room for them at place `room`.

    parts: for each block of keys, the base that holds it, NO_BASE if it lies in `own` or `room`, and what runs then.
    """

    own: int
    room: int | None
    parts: list[tuple[int, list[Operation]]]

    def __call__(self, run: Run) -> None:
        room = run.tensor(self.room) if self.room is not None else None
        gathered = iter(run.ranks.gather(run.tensor(self.own), _no_simulation, room))
        for base, operations in self.parts:
            _, block = next(gathered)
            if base != NO_BASE:
                run.keep(base, block)
            del block  # so that it is freed before the next one arrives
            repeat(operations, run)
            if base != NO_BASE:
                run.release(base)
        for _ in gathered:
            raise AssertionError("ranks gather another number of blocks than they did")


def _no_simulation(unit: Tensor) -> Tensor:
    raise AssertionError("a recording has no messages of simulated ranks")


@dataclass(eq=False)
class NotedScatter(Noted):
    """parts: for each rank, the operations that make the contribution to it, and the contribution.

    total: the block of the sum if it is new memory, else empty: the sum lies in the last contribution.
    """

    parts: dict[int, tuple[list[Noted], View]] = field(default_factory=dict)
    total: list[Block] = field(default_factory=list)

    @property
    def messages(self) -> list[View]:
        return [view for _, view in self.parts.values()]

    def blocks(self) -> Iterator[Block]:
        yield from blocks_of(self.messages)
        yield from self.total

    def nested(self) -> Iterator[Noted]:
        for operations, _ in self.parts.values():
            yield from operations

    def placed(self, places: Places) -> Operation:
        placed = {rank: places.operations(operations) for rank, (operations, _) in reversed(self.parts.items())}
        parts = {rank: (placed[rank], places.of(view)) for rank, (_, view) in self.parts.items()}
        return Scatter(parts, self.total[0].base if self.total else NO_BASE)


@dataclass(eq=False)
class Scatter:
    """Reduce-scatter of contributions.

    parts: for each rank, the operations that make the contribution to it, and the place of the contribution.
    total: base of the sum, NO_BASE if it lies in the last contribution.
    """

    parts: dict[int, tuple[list[Operation], int]]
    total: int

    def __call__(self, run: Run) -> None:
        def part(rank: int) -> Tensor:
            operations, message = self.parts[rank]
            repeat(operations, run)
            return run.tensor(message)

        total = run.ranks.scatter(part)
        if self.total != NO_BASE:
            run.keep(self.total, total)
