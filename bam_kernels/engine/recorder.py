"""Record a step as a list of operations that can run again on other memory.

Which operators of torch run in a step, which kernels are launched with which sizes, and which messages ranks exchange
follows from shapes, types and options alone. A `Recorder` notes them while an engine computes; a `Recording` repeats
them for other inputs, without the engine's Python. Memory between the operations is one workspace, in which tensors
that are not needed at the same time share their place. Launches of C++ and CUDA kernels that follow each other are one
call into the extension.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves

from ..backends.addresses import extent_bytes, first_address, storage_address
from ..backends.extension import _C
from .noted import (
    Noted,
    NotedLaunches,
    NotedOperator,
    NotedTritonLaunch,
    NotRecordable,
    Places,
    View,
    is_view,
    with_nested,
)
from .recording import Recording
from .workspace import NO_BASE, Block, place

DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_aten = torch.ops.aten
ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}


class Recorder(TorchDispatchMode):
    """In its `with` block, notes operators of torch, and launches and messages that know the recorder.

    What cannot be noted does not stop the step, whose messages other ranks wait for: from then on nothing is noted, and
    `finish` raises the reason.
    launches: the extension's list, to which its kernels add their launches.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.launches: Any = getattr(_C, "LaunchList", tuple)()
        self._refusal: NotRecordable | None = None
        self._launched: list[list[tuple[Block, int]]] = []  # by launch: block and offset of each address
        self._lists: list[list[Noted]] = [[]]  # operations; then those nested in an operation that has not ended
        self._results: list[list[Block]] = []  # by base, the blocks that it holds in turn
        self._moment = 0
        self._blocks: list[Block] = []  # of the memory that is in use now, by address
        self._inputs = [self._new_block(x, allocated=False) for x in inputs]
        if len(self._blocks) < len(self._inputs):
            self.refuse("two inputs share their memory")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import the compiler, 150 MB, to keep it from compiling the next method

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        noted = self._attempt(self._called, function, arguments, keywords)
        result = function(*arguments, **keywords)
        if noted is not None:
            self._attempt(self._returned, noted, (arguments, keywords), result)
        return result

    def refuse(self, reason: str) -> None:
        """Give up recording this step."""
        self._refusal = self._refusal or NotRecordable(reason)

    def _attempt(self, note: Callable[..., Any], *arguments: Any) -> Any:
        """Note something, and give up recording if that cannot be noted; None after recording has been given up."""
        if self._refusal is None:
            try:
                return note(*arguments)
            except NotRecordable as error:
                self._refusal = error
        return None

    def _called(self, function: Any, arguments: Any, keywords: Any) -> NotedOperator:
        return NotedOperator(function, [*map(self._described, arguments)], self._described_by_name(keywords), {})

    def _returned(self, noted: NotedOperator, given: Any, result: Any) -> None:
        """Note what a call of an operator has done with its arguments `given`."""
        function = noted.function
        taken = {storage_address(x) for x in tree_leaves(given) if isinstance(x, Tensor)}
        results = result if isinstance(result, (tuple, list)) else (result,) if result is not None else ()
        if not all(isinstance(x, Tensor) for x in results) or DATA_DEPENDENT.intersection(function.tags):
            raise NotRecordable(f"{function} has a result whose size or value depends on the contents of tensors")
        self._note_launches()  # before new memory takes the place of old memory
        new = {i: x for i, x in enumerate(results) if x.numel() and storage_address(x) not in taken}
        if function in ALLOCATIONS:
            for x in new.values():
                self._new_block(x, allocated=True)
            return
        is_view_only = not (new or function._schema.is_mutable)
        if is_view_only or (results and not any(x.numel() for x in results)):
            return
        noted.results = {i: self._new_block(x, allocated=False) for i, x in new.items()}
        self._results += [[block] for block in noted.results.values()]
        self._add(noted)

    def add(self, operation: Noted, used: Iterable[Block] | None = None) -> None:
        """Append an operation that has just run; used: blocks that it used at its end, None: all its blocks."""
        self._attempt(self._add, operation, used)

    def _add(self, operation: Noted, used: Iterable[Block] | None = None) -> None:
        self.use(operation.blocks() if used is None else used)
        self._lists[-1].append(operation)

    def use(self, blocks: Iterable[Block]) -> None:
        """Note a moment at which these blocks are used."""
        self._attempt(self._note_launches)
        self._moment += 1
        for block in blocks:
            block.use(self._moment)

    @contextmanager
    def nested(self, into: list[Noted]) -> Iterator[None]:
        """In the block, operations go to the list `into` of an operation that has not ended."""
        self._attempt(self._note_launches)
        self._lists.append(into)
        try:
            yield
        finally:
            self._attempt(self._note_launches)
            self._lists.pop()

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
        with self.paused():  # Triton's interpreter has operators of its own
            run(kernel, grid, *args, **options)
            repeated = repeat(kernel, grid, args, options) if 0 not in grid and self._refusal is None else None
        if repeated is not None:
            self._attempt(self._launched_by_triton, repeated, args)
        elif 0 not in grid:
            self.refuse("Triton has no compiled kernel of a launch")

    def _launched_by_triton(self, kernel: Any, args: tuple[Any, ...]) -> None:
        self._add(NotedTritonLaunch(kernel, [self._view(x) for x in args if isinstance(x, Tensor)]))

    def paused(self) -> Any:
        """Context in which nothing is noted."""
        return _pop_mode_temporarily()

    def view(self, x: Tensor) -> View:
        """Describe a tensor of the step or of its inputs."""
        return self._attempt(self._view, x) or _without_memory(x)

    def _view(self, x: Tensor) -> View:
        """Describe a tensor. Raises: NotRecordable if it comes neither from the step nor from its inputs."""
        if not x.numel():
            return _without_memory(x)
        begin, block = first_address(x), self._block_at(first_address(x))
        if begin + extent_bytes(x) > block.end:
            raise NotRecordable("a tensor is larger than the memory that the step has for it")
        return View(block, x.dtype, tuple(x.shape), x.stride(), (begin - block.begin) // x.itemsize)

    def received(self, x: Tensor, known: Sequence[Tensor | None], instead_of: list[Block]) -> bool:
        """Note a tensor that ranks return; False if it lies in the memory of a known tensor, else it is a result.

        instead_of: earlier results, whose base x takes; x is appended.
        """
        if not x.numel() or any(y is not None and storage_address(y) == storage_address(x) for y in known):
            return False
        if not instead_of:
            self._results.append(instead_of)
        instead_of.append(self._new_block(x, allocated=False))
        return True

    def finish(self, outputs: Sequence[Tensor]) -> Recording:
        """The recording of all operations so far; outputs: tensors that a run returns. Raises: NotRecordable."""
        self._attempt(self._note_launches)
        if self._refusal is not None:
            raise self._refusal
        views = [self._view(x) for x in outputs]
        allocated = [view for view in views if view.block is not None and view.block.allocated]
        own = [_whole_block(view) for view in allocated]
        if len(set(own)) < len(own):
            raise NotRecordable("two outputs share their memory")
        workspace = len(self._inputs)
        first_result = workspace + 1 + len(own)
        for number, block in [*enumerate(self._inputs), *enumerate(own, workspace + 1)]:
            block.base = number
        for number, blocks in enumerate(self._results, first_result):
            for block in blocks:
                block.base = number
        (operations,) = self._lists
        used = dict.fromkeys(block for operation in with_nested(operations) for block in operation.blocks())
        workspace_bytes = place([block for block in used if block.base == NO_BASE], workspace)
        for i, addresses in enumerate(self._launched):
            self.launches.place(i, [(block.base, block.offset + offset) for block, offset in addresses])
        results = range(first_result, first_result + len(self._results))
        places = Places(results, [view.block for view in views if view.block is not None])
        returned = [places.of(view) for view in views]
        placed = places.operations(operations)
        sizes = [(view.size, view.dtype) for view in allocated]
        return Recording(placed, list(places.numbers), workspace_bytes, sizes, len(results), returned)

    def _note_launches(self) -> None:
        """Find the memory of the extension's latest launches, and put them after the operations so far."""
        done, operations = len(self._launched), self._lists[-1]
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
        latest = operations[-1] if operations else None
        if not isinstance(latest, NotedLaunches):
            latest = NotedLaunches(self.launches, done, done, [])
            operations.append(latest)
        latest.last = len(self.launches)
        latest.used += [block for launch in self._launched[done:] for block, _ in launch]

    def _block_at(self, address: int) -> Block:
        """The block of an address. Raises: NotRecordable if the step did not make it and did not take it as input."""
        i = bisect_right(self._blocks, address, key=lambda block: block.begin) - 1
        if i < 0 or address >= self._blocks[i].end:
            raise NotRecordable("an operation uses memory from outside of the step")
        return self._blocks[i]

    def _described(self, x: Any) -> Any:
        """An argument of an operator, with views in place of a tensor or of a list of tensors."""
        if isinstance(x, Tensor):
            return self._view(x)
        if not isinstance(x, (list, tuple)) or not any(isinstance(element, Tensor) for element in x):
            return x
        if not all(isinstance(element, Tensor) for element in x):
            raise NotRecordable("an operator takes a list that mixes tensors and other values")
        return [self._view(element) for element in x]

    def _described_by_name(self, keywords: dict[str, Any]) -> dict[str, Any]:
        described = {name: self._described(x) for name, x in keywords.items()}
        if any(isinstance(x, list) and any(map(is_view, x)) for x in described.values()):
            raise NotRecordable("an operator takes a list of tensors by name")
        return described

    def _new_block(self, x: Tensor, allocated: bool) -> Block:
        """A block for a tensor with new memory; blocks whose memory it takes have been freed."""
        begin = first_address(x)
        block = Block(begin, begin + extent_bytes(x), allocated)
        self._blocks = [other for other in self._blocks if other.end <= block.begin or block.end <= other.begin]
        self._blocks.insert(bisect_right(self._blocks, begin, key=lambda block: block.begin), block)
        return block


def _without_memory(x: Tensor) -> View:
    return View(None, x.dtype, tuple(x.shape), x.stride(), 0)


def _whole_block(view: View) -> Block:
    """The block that a contiguous tensor fills. Raises: NotRecordable if it is a part of one."""
    strides = [math.prod(view.size[i + 1 :]) for i in range(len(view.size))]
    assert view.block is not None
    block_bytes = view.block.end - view.block.begin
    if list(view.stride) != strides or math.prod(view.size) * view.dtype.itemsize != block_bytes:
        raise NotRecordable("an output is a part of a tensor")
    return view.block
