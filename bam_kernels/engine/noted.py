"""Operations of a step while it is recorded: which memory they use, and how they run again on other memory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from .recording import Launches, Operation, Operator, Place, Release, TritonLaunch
from .workspace import NO_BASE, Block


class NotRecordable(Exception):
    """A step cannot be repeated from a list of its operations."""


class View(NamedTuple):
    """A tensor as a view of a block, None for a tensor without elements; offset in elements."""

    block: Block | None
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def blocks_of(views: Iterable[View | None]) -> Iterator[Block]:
    for view in views:
        if view is not None and view.block is not None:
            yield view.block


class Places:
    """Numbers of the places that a recording needs, and the results of operators that it has to free.

    Operations are placed from the last to the first, so that the first use that is seen of a result is its last one.
    results: bases of tensors that operators and ranks allocate. outputs: blocks that are not freed.
    """

    def __init__(self, results: Iterable[int], outputs: Iterable[Block]) -> None:
        self.numbers: dict[Place, int] = {}
        self._left = set(results).difference(block.base for block in outputs)

    def of(self, view: View) -> int:
        """Number of the place of a view whose block has been placed."""
        block, first = view.block, view.offset
        base = block.base if block is not None else NO_BASE
        if block is not None:
            first += block.offset // view.dtype.itemsize
        return self.numbers.setdefault(Place(base, view.dtype, view.size, view.stride, first), len(self.numbers))

    def operations(self, noted: "Sequence[Noted]") -> list[Operation]:
        """These operations, each followed by the release of results of which it is the last use."""
        operations: list[Operation] = []
        for operation in reversed(noted):
            last_used = self._left.intersection(block.base for block in operation.blocks())
            if last_used:
                operations.append(Release(sorted(last_used)))
                self._left -= last_used
            operations.append(operation.placed(self))
        return operations[::-1]


class Noted:
    """An operation while it is recorded."""

    def blocks(self) -> Iterator[Block]:
        """Memory that it uses, without its nested operations."""
        raise NotImplementedError

    def nested(self) -> "Iterator[Noted]":
        """Operations that run in the midst of it."""
        yield from ()

    def placed(self, places: Places) -> Operation:
        """How it runs again. Places its nested operations from the last to the first."""
        raise NotImplementedError


def with_nested(noted: Iterable[Noted]) -> Iterator[Noted]:
    """All operations, and all that are nested in them."""
    for operation in noted:
        yield operation
        yield from with_nested(operation.nested())


@dataclass(eq=False)
class NotedOperator(Noted):
    """A call of an operator of torch; results: blocks of the tensors that it allocates, by position."""

    function: Any
    arguments: list[Any]
    keywords: dict[str, Any]
    results: dict[int, Block]

    def blocks(self) -> Iterator[Block]:
        yield from blocks_of(x for x in tree_leaves((self.arguments, self.keywords), is_leaf=is_view) if is_view(x))
        yield from self.results.values()

    def placed(self, places: Places) -> Operation:
        lists = [(i, x) for i, x in enumerate(self.arguments) if isinstance(x, list) and any(map(is_view, x))]
        return Operator(
            self.function,
            [None if is_view(x) else x for x in self.arguments],
            {name: x for name, x in self.keywords.items() if not is_view(x)},
            [(i, places.of(x)) for i, x in enumerate(self.arguments) if is_view(x)],
            [(i, [places.of(x) for x in views]) for i, views in lists],
            [(name, places.of(x)) for name, x in self.keywords.items() if is_view(x)],
            [(i, block.base) for i, block in self.results.items()],
        )


def is_view(x: Any) -> bool:
    return type(x) is View


@dataclass(eq=False)
class NotedLaunches(Noted):
    """Launches first .. last - 1 of the extension's list, and the blocks that they use."""

    launches: Any
    first: int
    last: int
    used: list[Block]

    def blocks(self) -> Iterator[Block]:
        yield from self.used

    def placed(self, places: Places) -> Operation:
        return Launches(self.launches, self.first, self.last)


@dataclass(eq=False)
class NotedTritonLaunch(Noted):
    """Launch of a Triton kernel on these tensors."""

    kernel: Any
    tensors: list[View]

    def blocks(self) -> Iterator[Block]:
        yield from blocks_of(self.tensors)

    def placed(self, places: Places) -> Operation:
        return TritonLaunch(self.kernel, [_bytes_from_base(x) for x in self.tensors])


def _bytes_from_base(view: View) -> tuple[int, int]:
    """Base of a view, and bytes from the base's first element to the view's; NO_BASE for a tensor without elements."""
    if view.block is None:
        return NO_BASE, 0
    return view.block.base, view.block.offset + view.offset * view.dtype.itemsize
