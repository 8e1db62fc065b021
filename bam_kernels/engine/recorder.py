"""Record a step as a list of operations that can run again on other memory.

Which operators of torch run in a step, and which kernels are launched with which sizes, follows from shapes, types and
options alone. A `Recorder` notes them while an engine computes; a `Recording` repeats them for other inputs, without
the engine's Python. Memory between the operations is one workspace, in which tensors that are not needed at the same
time share their place. Launches of C++ and CUDA kernels that follow each other are one call into the extension.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves

from ..backends.addresses import extent_bytes, first_address, storage_address
from ..backends.extension import _C
from .recording import NO_BASE, Launches, Operation, Operator, Place, Recording, Release, TritonLaunch

ALIGNMENT = 256  # bytes; torch's own allocations on a GPU are aligned to 512
DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_aten = torch.ops.aten
ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}


class NotRecordable(Exception):
    """A step cannot be repeated from a list of its operations."""


@dataclass(eq=False)
class Block:
    """Memory of one tensor that a step allocates or takes.

    begin, end   addresses of its first element and behind its last one, while it was recorded
    allocated    it came without contents, so that it may lie in the workspace
    first, last  first and last moment of use; launches and operators count as moments
    base         number of the tensor that holds it in a run, `offset` bytes after that tensor's first element
    """

    begin: int
    end: int
    allocated: bool = False
    first: int = -1
    last: int = -1
    base: int = NO_BASE
    offset: int = 0

    def use(self, moment: int) -> None:
        self.first = moment if self.first < 0 else self.first
        self.last = moment


class View(NamedTuple):
    """A tensor as a view of a block, None for a tensor without elements; offset in elements."""

    block: Block | None
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Places:
    """Numbers of the places that a recording needs."""

    def __init__(self) -> None:
        self.numbers: dict[Place, int] = {}

    def of(self, view: View) -> int:
        """Number of the place of a view whose block has been placed."""
        block, first = view.block, view.offset
        base = block.base if block is not None else NO_BASE
        if block is not None:
            first += block.offset // view.dtype.itemsize
        return self.numbers.setdefault(Place(base, view.dtype, view.size, view.stride, first), len(self.numbers))

    def on(self, base: int) -> list[int]:
        """Numbers of all places on a base."""
        return [number for place, number in self.numbers.items() if place.base == base]


class Noted(Protocol):
    """An operation while it is recorded. blocks: memory that it uses; placed: how it runs again."""

    def blocks(self) -> Iterator[Block]: ...

    def placed(self, places: Places) -> Operation: ...


@dataclass(eq=False)
class NotedOperator:
    """A call of an operator of torch; results: blocks of the tensors that it allocates, by position."""

    function: Callable[..., Any]
    arguments: list[Any]
    keywords: dict[str, Any]
    results: dict[int, Block]

    def blocks(self) -> Iterator[Block]:
        for x in tree_leaves((self.arguments, self.keywords), is_leaf=_is_view):
            if _is_view(x) and x.block is not None:
                yield x.block
        yield from self.results.values()

    def placed(self, places: Places) -> Operation:
        lists = [(i, x) for i, x in enumerate(self.arguments) if isinstance(x, list) and any(map(_is_view, x))]
        return Operator(
            self.function,
            [None if _is_view(x) else x for x in self.arguments],
            {name: x for name, x in self.keywords.items() if not _is_view(x)},
            [(i, places.of(x)) for i, x in enumerate(self.arguments) if _is_view(x)],
            [(i, [places.of(x) for x in views]) for i, views in lists],
            [(name, places.of(x)) for name, x in self.keywords.items() if _is_view(x)],
            [(i, block.base) for i, block in self.results.items()],
        )


def _is_view(x: Any) -> bool:
    return type(x) is View


@dataclass(eq=False)
class NotedLaunches:
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
class NotedTritonLaunch:
    """Launch of a Triton kernel on these tensors."""

    kernel: Any
    tensors: list[View]

    def blocks(self) -> Iterator[Block]:
        yield from (x.block for x in self.tensors if x.block is not None)

    def placed(self, places: Places) -> Operation:
        return TritonLaunch(self.kernel, [_bytes_from_base(x) for x in self.tensors])


def _bytes_from_base(view: View) -> tuple[int, int]:
    """Base of a view, and bytes from the base's first element to the view's; NO_BASE for a tensor without elements."""
    if view.block is None:
        return NO_BASE, 0
    return view.block.base, view.block.offset + view.offset * view.dtype.itemsize


class Recorder(TorchDispatchMode):
    """In its `with` block, notes operators of torch, and launches of kernels that know the recorder.

    launches: the extension's list, to which its kernels add their launches.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.launches: Any = getattr(_C, "LaunchList", tuple)()
        self._launched: list[list[tuple[Block, int]]] = []  # by launch: block and offset of each address
        self._operations: list[Noted] = []
        self._results: list[Block] = []
        self._moment = 0
        self._blocks: list[Block] = []  # of the memory that is in use now, by address
        self._inputs = [self._new_block(x, allocated=False) for x in inputs]
        if len(self._blocks) < len(self._inputs):
            raise NotRecordable("two inputs share their memory")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import the compiler, 150 MB, to keep it from compiling the next method

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        taken = {storage_address(x) for x in tree_leaves((arguments, keywords)) if isinstance(x, Tensor)}
        noted = NotedOperator(function, [*map(self._described, arguments)], self._described_by_name(keywords), {})
        result = function(*arguments, **keywords)
        results = result if isinstance(result, (tuple, list)) else (result,) if result is not None else ()
        if not all(isinstance(x, Tensor) for x in results) or DATA_DEPENDENT.intersection(function.tags):
            raise NotRecordable(f"{function} has a result whose size or value depends on the contents of tensors")
        self._note_launches()  # before new memory takes the place of old memory
        new = {i: x for i, x in enumerate(results) if x.numel() and storage_address(x) not in taken}
        if function in ALLOCATIONS:
            for x in new.values():
                self._new_block(x, allocated=True)
            return result
        is_view, is_empty = not (new or function._schema.is_mutable), results and not any(x.numel() for x in results)
        if is_view or is_empty:
            return result
        noted.results = {i: self._new_block(x, allocated=False) for i, x in new.items()}
        self._results += noted.results.values()
        self.add(noted)
        return result

    def add(self, operation: Noted) -> None:
        """Append an operation that has just run."""
        self._note_launches()
        self._moment += 1
        for block in operation.blocks():
            block.use(self._moment)
        self._operations.append(operation)

    def launch(
        self,
        run: Callable[..., None],
        repeat: Callable[..., Any],
        kernel: Any,
        grid: tuple[int, ...],
        *args: Any,
        **options: Any,
    ) -> None:
        """Launch a Triton kernel by `run` and note the launch, of which `repeat` makes one that can run again."""
        with _pop_mode_temporarily():  # Triton's interpreter has operators of its own
            run(kernel, grid, *args, **options)
            repeated = repeat(kernel, grid, args, options) if 0 not in grid else None
        if repeated is not None:
            self.add(NotedTritonLaunch(repeated, [self.view(x) for x in args if isinstance(x, Tensor)]))
        elif 0 not in grid:
            raise NotRecordable("Triton has no compiled kernel of a launch")

    def view(self, x: Tensor) -> View:
        """Describe a tensor. Raises: NotRecordable if it comes neither from the step nor from its inputs."""
        if not x.numel():
            return View(None, x.dtype, tuple(x.shape), x.stride(), 0)
        begin, block = first_address(x), self._block_at(first_address(x))
        if begin + extent_bytes(x) > block.end:
            raise NotRecordable("a tensor is larger than the memory that the step has for it")
        return View(block, x.dtype, tuple(x.shape), x.stride(), (begin - block.begin) // x.itemsize)

    def finish(self, outputs: Sequence[Tensor]) -> Recording:
        """The recording of all operations so far; outputs: tensors that a run returns. Raises: NotRecordable."""
        self._note_launches()
        views = [self.view(x) for x in outputs]
        allocated = [view for view in views if view.block is not None and view.block.allocated]
        own = [_whole_block(view) for view in allocated]
        if len(set(own)) < len(own):
            raise NotRecordable("two outputs share their memory")
        for number, block in enumerate([*self._inputs, None, *own, *self._results]):
            if block is not None:
                block.base = number
        used = dict.fromkeys(block for operation in self._operations for block in operation.blocks())
        workspace_bytes = _place([block for block in used if block.base == NO_BASE], len(self._inputs))
        for i, addresses in enumerate(self._launched):
            self.launches.place(i, [(block.base, block.offset + offset) for block, offset in addresses])
        places = Places()
        returned = [places.of(view) for view in views]
        operations = [operation.placed(places) for operation in self._operations]
        sizes = [(view.size, view.dtype) for view in allocated]
        operations = self._with_releases(operations, places, [view.block for view in views])
        return Recording(operations, list(places.numbers), workspace_bytes, sizes, len(self._results), returned)

    def _with_releases(self, placed: list[Operation], places: Places, kept: list[Block | None]) -> list[Operation]:
        """All operations, each followed by the release of results of which it is the last use."""
        left = set(self._results).difference(kept)
        operations: list[Operation] = []
        for noted, operation in zip(reversed(self._operations), reversed(placed), strict=True):
            released = [block for block in dict.fromkeys(noted.blocks()) if block in left]
            if released:
                operations.append(Release([(block.base, places.on(block.base)) for block in released]))
                left.difference_update(released)
            operations.append(operation)
        return operations[::-1]

    def _note_launches(self) -> None:
        """Find the memory of the extension's latest launches, and put them after the operations so far."""
        done = len(self._launched)
        if len(self.launches) == done:
            return
        for launch in range(done, len(self.launches)):
            self._moment += 1
            places = []
            for address in self.launches.addresses(launch):
                block = self._block_at(address)
                block.use(self._moment)
                places.append((block, address - block.begin))
            self._launched.append(places)
        latest = self._operations[-1] if self._operations else None
        if not isinstance(latest, NotedLaunches):
            latest = NotedLaunches(self.launches, done, done, [])
            self._operations.append(latest)
        latest.last = len(self.launches)
        latest.used += [block for launch in self._launched[done:] for block, _ in launch]

    def _block_at(self, address: int) -> Block:
        """The block of an address. Raises: NotRecordable if the step did not make it and did not take it as input."""
        place = bisect_right(self._blocks, address, key=lambda block: block.begin) - 1
        if place < 0 or address >= self._blocks[place].end:
            raise NotRecordable("an operation uses memory from outside of the step")
        return self._blocks[place]

    def _described(self, x: Any) -> Any:
        """An argument of an operator, with views in place of a tensor or of a list of tensors."""
        if isinstance(x, Tensor):
            return self.view(x)
        if not isinstance(x, (list, tuple)) or not any(isinstance(element, Tensor) for element in x):
            return x
        if not all(isinstance(element, Tensor) for element in x):
            raise NotRecordable("an operator takes a list that mixes tensors and other values")
        return [self.view(element) for element in x]

    def _described_by_name(self, keywords: dict[str, Any]) -> dict[str, Any]:
        described = {name: self._described(x) for name, x in keywords.items()}
        if any(isinstance(x, list) and any(map(_is_view, x)) for x in described.values()):
            raise NotRecordable("an operator takes a list of tensors by name")
        return described

    def _new_block(self, x: Tensor, allocated: bool) -> Block:
        """A block for a tensor with new memory; blocks whose memory it takes have been freed."""
        begin = first_address(x)
        block = Block(begin, begin + extent_bytes(x), allocated)
        self._blocks = [other for other in self._blocks if other.end <= block.begin or block.end <= other.begin]
        self._blocks.insert(bisect_right(self._blocks, begin, key=lambda block: block.begin), block)
        return block


def _whole_block(view: View) -> Block:
    """The block that a contiguous tensor fills. Raises: NotRecordable if it is a part of one."""
    strides = [math.prod(view.size[i + 1 :]) for i in range(len(view.size))]
    assert view.block is not None
    block_bytes = view.block.end - view.block.begin
    if list(view.stride) != strides or math.prod(view.size) * view.dtype.itemsize != block_bytes:
        raise NotRecordable("an output is a part of a tensor")
    return view.block


def _place(blocks: list[Block], base: int) -> int:
    """Place blocks in one workspace, so that none overlaps another that is in use at the same time; returns its bytes.

    Large blocks first, each at the lowest offset that is free.
    """
    placed: list[Block] = []
    total = 0
    for block in sorted(blocks, key=lambda b: b.begin - b.end):
        size = block.end - block.begin
        offset = 0
        for other in sorted(placed, key=lambda b: b.offset):
            if other.last < block.first or block.last < other.first:
                continue
            if offset + size <= other.offset:
                break
            offset = max(offset, _aligned(other.offset + other.end - other.begin))
        block.base, block.offset = base, offset
        placed.append(block)
        total = max(total, _aligned(offset + size))
    return total


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT
