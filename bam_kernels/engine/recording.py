"""Record a step as a list of operations, and run the list again on other memory.

Which operators of torch run in a step, and which kernels are launched with which sizes, follows from shapes, types and
options alone. A `Recorder` notes them while an engine computes; a `Recording` repeats them for other inputs, without
the engine's Python. Memory between the operations is one workspace, in which tensors that are not needed at the same
time share their place. Launches of C++ and CUDA kernels that follow each other are one call into the extension.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..backends.addresses import first_address, storage_address
from ..backends.extension import _C

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
    base         number of the tensor that holds it in a later run, `offset` bytes after that tensor's first element
    """

    begin: int
    end: int
    allocated: bool = False
    first: int = -1
    last: int = -1
    base: int = -1
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


@dataclass(eq=False)
class Run:
    """Memory of one run of a recording: tensors and their addresses by number of a base."""

    tensors: list[Tensor | None]
    addresses: list[int]
    device: torch.device
    stream: int
    typed: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def tensor(self, view: View) -> Tensor:
        """The tensor of this run in place of a recorded one."""
        block = view.block
        if block is None:
            return torch.empty(view.size, dtype=view.dtype, device=self.device)
        base = self.tensors[block.base]
        assert base is not None
        if base.dtype == view.dtype and base.shape == view.size and base.stride() == view.stride:
            return base
        if base.dtype != view.dtype:
            key = block.base, view.dtype
            typed = self.typed.get(key)
            if typed is None:
                typed = self.typed[key] = base.view(view.dtype)
            base = typed
        first = base.storage_offset() + block.offset // view.dtype.itemsize + view.offset
        return base.as_strided(view.size, view.stride, first)

    def address(self, view: View) -> int:
        """Address of the first element of the tensor in place of a recorded one."""
        block = view.block
        if block is None:
            return 0
        return self.addresses[block.base] + block.offset + view.offset * view.dtype.itemsize

    def keep(self, block: Block, tensor: Tensor) -> None:
        """Make the result of an operator the memory of its block."""
        self.tensors[block.base] = tensor
        self.addresses[block.base] = first_address(tensor)

    def release(self, block: Block) -> None:
        """Free the memory of a block."""
        self.tensors[block.base] = None
        for key in [key for key in self.typed if key[0] == block.base]:
            del self.typed[key]


class Operation(Protocol):
    """An entry of a recording. blocks: memory that it uses."""

    def blocks(self) -> Iterator[Block]: ...

    def __call__(self, run: Run) -> None: ...


@dataclass(eq=False)
class Operator:
    """A call of an operator of torch; results: blocks of the tensors that it allocates, by position."""

    function: Callable[..., Any]
    arguments: list[Any]
    keywords: dict[str, Any]
    results: dict[int, Block]

    def blocks(self) -> Iterator[Block]:
        yield from _blocks_in([*self.arguments, *self.keywords.values()])
        yield from self.results.values()

    def __call__(self, run: Run) -> None:
        arguments = [_replaced(x, run) for x in self.arguments]
        result = self.function(*arguments, **{name: _replaced(x, run) for name, x in self.keywords.items()})
        if self.results:
            results = result if isinstance(result, (tuple, list)) else (result,)
            for position, block in self.results.items():
                run.keep(block, results[position])


def _replaced(x: Any, run: Run) -> Any:
    if type(x) is View:
        return run.tensor(x)
    return [_replaced(element, run) for element in x] if type(x) is list else x


def _blocks_in(arguments: Any) -> Iterator[Block]:
    for x in arguments:
        if type(x) is View:
            if x.block is not None:
                yield x.block
        elif type(x) is list:
            yield from _blocks_in(x)


@dataclass(eq=False)
class Launches:
    """Launches first .. last - 1 of the extension's list."""

    launches: Any
    first: int
    last: int
    used: list[Block]

    def blocks(self) -> Iterator[Block]:
        yield from self.used

    def __call__(self, run: Run) -> None:
        self.launches.run(self.first, self.last, run.addresses, run.stream)


@dataclass(eq=False)
class Release:
    """Frees tensors that operators have allocated, after their last use."""

    results: list[Block]

    def blocks(self) -> Iterator[Block]:
        yield from ()

    def __call__(self, run: Run) -> None:
        for block in self.results:
            run.release(block)


class Recorder(TorchDispatchMode):
    """In its `with` block, notes operators of torch, and launches of kernels that know the recorder.

    launches: the extension's list, to which its kernels add their launches.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.launches: Any = _C.LaunchList() if _C is not None else ()
        self._launched: list[list[tuple[Block, int]]] = []  # by launch: block and offset of each address
        self._operations: list[Operation] = []
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
        described, named = [self._described(x) for x in arguments], {k: self._described(x) for k, x in keywords.items()}
        taken = {storage_address(x) for x in tree_leaves((arguments, keywords)) if isinstance(x, Tensor)}
        result = function(*arguments, **keywords)
        results = result if isinstance(result, (tuple, list)) else (result,)
        if not all(isinstance(x, Tensor) for x in results) or DATA_DEPENDENT.intersection(function.tags):
            raise NotRecordable(f"{function} gives what depends on the contents of tensors")
        self._note_launches()  # before new memory takes the place of old memory
        allocates = function in ALLOCATIONS
        fresh = {
            i: self._new_block(x, allocates)
            for i, x in enumerate(results)
            if x.numel() and storage_address(x) not in taken
        }
        is_view = not (fresh or function._schema.is_mutable)
        if not (is_view or allocates) and any(x.numel() for x in results):
            self._results += fresh.values()
            self.add(Operator(function, described, named, fresh))
        return result

    def add(self, operation: Operation) -> None:
        """Append an operation that has just run."""
        self._note_launches()
        self._moment += 1
        for block in operation.blocks():
            block.use(self._moment)
        self._operations.append(operation)

    def view(self, x: Tensor) -> View:
        """Describe a tensor. Raises: NotRecordable if it comes neither from the step nor from its inputs."""
        if not x.numel():
            return View(None, x.dtype, tuple(x.shape), x.stride(), 0)
        block = self._block_at(first_address(x))
        return View(block, x.dtype, tuple(x.shape), x.stride(), (first_address(x) - block.begin) // x.itemsize)

    def finish(self, outputs: Sequence[Tensor]) -> "Recording":
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
        shared = [block for block in used if block.base < 0]
        workspace_bytes = _place(shared, len(self._inputs))
        for i, addresses in enumerate(self._launched):
            self.launches.place(i, [(block.base, block.offset + offset) for block, offset in addresses])
        operations = self._with_releases([view.block for view in views])
        return Recording(operations, workspace_bytes, allocated, len(self._results), views)

    def _with_releases(self, kept: list[Block | None]) -> list[Operation]:
        """All operations, each followed by the release of results of which it is the last use."""
        left = set(self._results).difference(kept)
        operations: list[Operation] = []
        for operation in reversed(self._operations):
            released = [block for block in dict.fromkeys(operation.blocks()) if block in left]
            if released:
                operations.append(Release(released))
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
        if not isinstance(latest, Launches):
            latest = Launches(self.launches, done, done, [])
            self._operations.append(latest)
        latest.last = len(self.launches)
        latest.used += [block for launch in self._launched[done:] for block, _ in launch]

    def _block_at(self, address: int) -> Block:
        """The block of an address. Raises: NotRecordable if the step did not make it and did not take it as input."""
        place = bisect_right(self._blocks, address, key=lambda block: block.begin) - 1
        if place < 0 or address > self._blocks[place].end:  # an empty tensor may begin where a block ends
            raise NotRecordable("an operation uses memory from outside of the step")
        return self._blocks[place]

    def _described(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self.view(x)
        return [self._described(element) for element in x] if isinstance(x, (list, tuple)) else x

    def _new_block(self, x: Tensor, allocated: bool) -> Block:
        """A block for a tensor with new memory; blocks whose memory it takes have been freed."""
        elements = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        begin = first_address(x)
        block = Block(begin, begin + elements * x.itemsize, allocated)
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


@dataclass(eq=False)
class Recording:
    """The operations of a step, which `run` repeats for other inputs.

    workspace_bytes  memory of a run besides inputs and outputs
    allocated        outputs that are allocated before the operations run
    results          how many tensors operators of torch allocate
    outputs          tensors that `run` returns
    """

    operations: list[Operation]
    workspace_bytes: int
    allocated: list[View]
    results: int
    outputs: list[View]

    def run(self, *inputs: Tensor) -> list[Tensor]:
        """Repeat the step for inputs of the recorded shapes, strides, types and device; returns its outputs."""
        device = inputs[0].device
        tensors = [*inputs, torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)]
        tensors += [torch.empty(view.size, dtype=view.dtype, device=device) for view in self.allocated]
        addresses = [first_address(x) for x in tensors] + [0] * self.results
        stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
        run = Run([*tensors, *[None] * self.results], addresses, device, stream)
        for operation in self.operations:
            operation(run)
        return [run.tensor(view) for view in self.outputs]
