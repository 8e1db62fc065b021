"""A recorded step: a list of operations that runs again on other memory, without the engine's Python.

recorder.py makes recordings, and says what they are for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.addresses import first_address
from ..ranks import ONE_RANK, Ranks
from .memory import use_huge_pages
from .workspace import NO_BASE


class Place(NamedTuple):
    """A tensor as a view of a base, which is a tensor of a run; `first`: elements of dtype before the view's first.

    base NO_BASE: the tensor has no elements.
    """

    base: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    first: int


@dataclass(eq=False)
class Run:
    """Memory of one run.

    bases       inputs, workspace, outputs, then results of operators, which are None before and after their use
    addresses   address of the first element of each base
    places      views of bases that operators take; `tensor` makes them when they are needed
    views       numbers of the places on each base
    """

    bases: list[Tensor | None]
    addresses: list[int]
    places: list[Place]
    views: dict[int, list[int]]
    device: torch.device
    stream: int
    ranks: Ranks
    _made: list[Tensor | None]
    _typed: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def tensor(self, i: int) -> Tensor:
        """The tensor at place i."""
        made = self._made[i]
        if made is not None:
            return made
        number, dtype, size, stride, first = self.places[i]
        base = self.bases[number] if number != NO_BASE else torch.empty(size, dtype=dtype, device=self.device)
        assert base is not None
        if base.dtype is not dtype:
            typed = self._typed.get((number, dtype))
            base = typed if typed is not None else self._typed.setdefault((number, dtype), base.view(dtype))
        if first or base.shape != size or base.stride() != stride:
            base = base.as_strided(size, stride, base.storage_offset() + first)
        self._made[i] = base
        return base

    def keep(self, number: int, tensor: Tensor) -> None:
        """Make the result of an operator or of ranks a base."""
        self.bases[number] = tensor
        self.addresses[number] = first_address(tensor)

    def release(self, number: int) -> None:
        """Free the memory of a base."""
        self.bases[number] = None
        for i in self.views.get(number, ()):
            self._made[i] = None
            self._typed.pop((number, self.places[i].dtype), None)


Operation = Callable[[Run], None]


def repeat(operations: Sequence[Operation], run: Run) -> None:
    for operation in operations:
        operation(run)


Slots = list[tuple[Any, int]]  # position or name of an argument, and place of its tensor


@dataclass(eq=False)
class Operator:
    """A call of an operator of torch.

    arguments, keywords   with None where tensors are to be put
    slots, lists, named   places of tensors: positional arguments, lists of tensors, keyword arguments
    results               base of each tensor that the operator allocates, by position
    """

    function: Callable[..., Any]
    arguments: list[Any]
    keywords: dict[str, Any]
    slots: Slots
    lists: list[tuple[int, list[int]]]
    named: Slots
    results: list[tuple[int, int]]

    def __call__(self, run: Run) -> None:
        arguments = self.arguments.copy()
        for position, place in self.slots:
            arguments[position] = run.tensor(place)
        for position, places in self.lists:
            arguments[position] = [run.tensor(place) for place in places]
        keywords = self.keywords
        if self.named:
            keywords = keywords | {name: run.tensor(place) for name, place in self.named}
        result = self.function(*arguments, **keywords)
        if self.results:
            allocated = result if isinstance(result, (tuple, list)) else (result,)
            for position, base in self.results:
                run.keep(base, allocated[position])


@dataclass(eq=False)
class Launches:
    """Launches first .. last - 1 of the extension's list."""

    launches: Any
    first: int
    last: int

    def __call__(self, run: Run) -> None:
        self.launches.run(self.first, self.last, run.addresses, run.stream)


@dataclass(eq=False)
class TritonLaunch:
    """Launch of a Triton kernel; tensors: base, and bytes after its first element, of each tensor that it takes."""

    kernel: Any
    tensors: list[tuple[int, int]]

    def __call__(self, run: Run) -> None:
        addresses = run.addresses
        self.kernel.run([addresses[base] + offset if base >= 0 else 0 for base, offset in self.tensors], run.stream)


@dataclass(eq=False)
class Release:
    """Frees results after their last use; results: their bases."""

    results: list[int]

    def __call__(self, run: Run) -> None:
        for base in self.results:
            run.release(base)


class NoRoom(torch.OutOfMemoryError):
    """There is not enough memory for the workspace and the outputs of a run, of which nothing has run yet."""


@dataclass(eq=False)
class Recording:
    """The operations of a step, which `run` repeats for other inputs.

    places           views that operators and `outputs` need
    workspace_bytes  memory of a run besides inputs, outputs and results
    allocated        size and dtype of outputs that are allocated before the operations run
    results          how many bases hold tensors that operators of torch and ranks allocate
    outputs          places of the tensors that `run` returns
    """

    operations: list[Operation]
    places: list[Place]
    workspace_bytes: int
    allocated: list[tuple[tuple[int, ...], torch.dtype]]
    results: int
    outputs: list[int]

    def __post_init__(self) -> None:
        self._views: dict[int, list[int]] = {}
        for i, place in enumerate(self.places):
            self._views.setdefault(place.base, []).append(i)

    def run(self, *inputs: Tensor, ranks: Ranks = ONE_RANK) -> list[Tensor]:
        """Repeat the step for inputs of the recorded shapes, strides, types and device; returns its outputs.

        ranks: with whom messages are exchanged; W and rank as they were recorded.
        Raises: NoRoom before the first message; whatever an operation raises.
        """
        device = inputs[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.run(*inputs, ranks=ranks)
        run = self._begin(inputs, device, ranks)
        repeat(self.operations, run)
        return [run.tensor(i) for i in self.outputs]

    def _begin(self, inputs: Sequence[Tensor], device: torch.device, ranks: Ranks) -> Run:
        """Allocate the memory of a run. Raises: NoRoom."""
        try:
            given = [*inputs, use_huge_pages(torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device))]
            given += [torch.empty(size, dtype=dtype, device=device) for size, dtype in self.allocated]
        except torch.OutOfMemoryError as error:
            raise NoRoom(str(error)) from error
        addresses = [first_address(x) for x in given] + [0] * self.results
        stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
        made: list[Tensor | None] = [None] * len(self.places)
        return Run([*given, *[None] * self.results], addresses, self.places, self._views, device, stream, ranks, made)
