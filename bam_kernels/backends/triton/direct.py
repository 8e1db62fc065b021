"""Launch a compiled kernel again on other memory, without Triton's look at every argument.

`kernel[grid](...)` finds the compiled kernel by the types, values and alignments of all arguments at every launch. A
recorded launch keeps what was found. Its form is how Triton's own `JITFunction.run` calls a compiled kernel, in
versions 3.6 to 3.8:

    run(grid_x, grid_y, grid_z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *all_arguments)

All parameters of the kernel follow in order, with constants and None in their places. A pointer may be an integer,
which Triton passes on as it is.
"""

import ctypes
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor

from ..addresses import extent_bytes
from .launch import COMPILE_OPTIONS, on_device_of


class DirectLaunch:
    """One recorded launch: grid, numbers and constants are kept, addresses are given at each run.

    It keeps no tensor. New memory must have the shapes, strides and dtypes of the recorded tensors. Where an address
    was divisible by 16, the new one must be too, because the kernel is compiled for wide reads and writes there. The
    device of the recorded launch must be current. Triton's launch hooks are not called.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        """arguments: of all parameters of the kernel, in order."""
        places = [place for place, value in enumerate(arguments) if isinstance(value, Tensor)]
        others = [place for place in range(len(arguments)) if place not in places]
        order = {place: index for index, place in enumerate([*places, *others])}
        self._tensors = len(places)
        self._constants = tuple(arguments[place] for place in others)
        self._in_order = itemgetter(*(order[place] for place in range(len(arguments))))

    def run(self, pointers: Sequence[int], stream: int) -> None:
        """Launch on a stream's handle. pointers: an address for every recorded tensor, in the order of parameters."""
        raise NotImplementedError

    def _filled(self, pointers: Sequence[Any]) -> tuple[Any, ...]:
        """All arguments, with `pointers` in the places of tensors."""
        if len(pointers) != self._tensors:
            raise ValueError(f"the launch has {self._tensors} tensors, got {len(pointers)} pointers")
        return self._in_order((*pointers, *self._constants))


class CompiledLaunch(DirectLaunch):
    """A launch of a compiled kernel."""

    def __init__(self, compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
        super().__init__(arguments)
        self._compiled = compiled  # Triton 3.8 unloads a kernel's code when the object goes
        self._grid = (*grid, 1, 1)[:3]
        self._run = compiled.run  # loads the code, so it comes before `function`
        self._handles = compiled.function, compiled.packed_metadata

    def run(self, pointers: Sequence[int], stream: int) -> None:
        self._run(*self._grid, stream, *self._handles, None, None, None, *self._filled(pointers))


class InterpretedLaunch(DirectLaunch):
    """A launch under the interpreter, which takes tensors: views of the memory at the addresses."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
        super().__init__(arguments)
        self._kernel, self._grid = kernel, grid
        self._shapes = [_without_memory(value) for value in arguments if isinstance(value, Tensor)]

    def run(self, pointers: Sequence[int], stream: int) -> None:
        # The interpreter takes tensors that begin at one address for views of one storage, so they share the longest.
        given = list(zip(pointers, self._shapes, strict=True))
        longest: dict[int, int] = {}
        for pointer, like in given:
            longest[pointer] = max(longest.get(pointer, 0), extent_bytes(like))
        storages = {pointer: _storage_at(pointer, size) for pointer, size in longest.items() if size}
        self._kernel[self._grid](*self._filled([_view(storages.get(pointer), like) for pointer, like in given]))


def direct(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], options: dict[str, Any]) -> DirectLaunch | None:
    """Record a launch that `launch(kernel, grid, *args, **options)` has made, without making it again.

    None if Triton returns no compiled kernel.
    """
    assert 0 not in grid
    arguments = all_arguments(kernel, args, options)
    if triton.knobs.runtime.interpret:
        return InterpretedLaunch(kernel, grid, arguments)
    with on_device_of(args):
        compiled = kernel.warmup(*args, grid=grid, **COMPILE_OPTIONS, **options)
        return CompiledLaunch(compiled, grid, arguments) if compiled is not None else None


def all_arguments(kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> list[Any]:
    """Arguments of all parameters of the kernel, in order: `args`, then constants by name."""
    return [*args, *(options[name] for name in list(kernel.arg_names)[len(args) :])]


def _without_memory(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _storage_at(address: int, size: int) -> torch.UntypedStorage:
    """Storage of the `size` bytes of memory at `address`."""
    memory = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def _view(storage: torch.UntypedStorage | None, like: Tensor) -> Tensor:
    """Tensor at the begin of a storage, with the shape, strides and dtype of `like`; storage None: without elements."""
    if storage is None:
        return torch.empty_like(like, device="cpu")
    return torch.empty(0, dtype=like.dtype, device="cpu").set_(storage, 0, like.shape, like.stride())
