"""The row kernels of each backend behind one interface, and the choice between them."""

import warnings
from functools import cache
from typing import Protocol

import torch

from ..constant import constant_in_graphs
from ..ranks import ONE_RANK
from ..verification import trust
from ..ways import WAYS, joined, of_backend, split
from . import cpu, cuda, triton
from .interface import RowKernels


class Execution(Protocol):
    """Options that choose how to compute, not what."""

    @property
    def backend(self) -> str: ...
    @property
    def precision(self) -> str: ...


GPU = "cuda"  # type of the devices that have GPU kernels, of NVIDIA and of AMD


def row_kernels(backend: str) -> RowKernels:
    """The row kernels of a backend that `choose` has returned."""
    if backend == "cuda":
        return cuda.kernels()
    return triton.kernels() if backend == "triton" else cpu.kernels()


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def choose(
    name: str,
    options: Execution,
    device: torch.device,
    dtype: torch.dtype,
    engine: str = "auto",
    ranks: tuple[int, int, str] = (1, 0, ONE_RANK.name),
) -> str:
    """Choose how to compute with tensors of a device and dtype: "reference", or the names of ways, joined.

    "auto" gives "cpu" for CPU and meta tensors other than float64 if the C++ kernels can run; for GPU tensors the
    verified ways; else "reference". Several ways differ in speed alone: the operator chooses, which knows the problem.
    ranks: as `ranks_of` returns them; "auto" takes what is verified on all ranks.

    Raises: TypeError for float64 with a backend other than reference; ValueError for a backend that cannot run here or
    lacks the precision or engine asked for.
    """
    if options.precision == "fp8":
        raise ValueError(f'{name}: backend="{options.backend}" does not support precision="fp8"')
    chosen = _choose(name, options.backend, device, dtype, engine, ranks)
    if engine == "flash" and chosen != "flash":
        raise ValueError(f'{name}: backend="{_backend_of(chosen)}" does not support engine="flash"')
    return chosen


def _backend_of(chosen: str) -> str:
    return WAYS[split(chosen)[0]].backend if chosen != "reference" else chosen


@constant_in_graphs
def _choose(
    name: str, backend: str, device: torch.device, dtype: torch.dtype, engine: str, ranks: tuple[int, int, str]
) -> str:
    if backend == "reference":
        return backend
    if dtype == torch.float64:
        if backend == "auto":
            return "reference"
        raise TypeError(f'{name}: float64 is computed by backend="reference" only, got backend="{backend}"')
    if backend == "auto":
        ways, reason = _automatic(name, device, engine, ranks)
        if ways:
            return joined(ways)
        if engine == "flash" and device.type == GPU:
            raise ValueError(f'{name}: engine="flash" cannot run here: {reason}')
        _warn_once(f"bam_kernels: computing with the slow PyTorch reference: {reason}")
        return "reference"
    reason = _reason_against(backend, device)
    if reason:
        raise ValueError(f'{name}: backend="{backend}" cannot run here: {reason}')
    return joined(of_backend(backend, engine))


def _automatic(
    name: str, device: torch.device, engine: str, ranks: tuple[int, int, str]
) -> tuple[tuple[str, ...], str | None]:
    """Ways that "auto" may use for tensors on `device`; and if there are none, the reason."""
    if device.type == GPU:
        return trust.ways(name, device, engine, ranks)
    if device.type in ("cpu", "meta"):
        reason = cpu.unavailable()
        return (() if reason else ("cpu",)), reason
    return (), f"there are no kernels for {device.type} tensors"


@constant_in_graphs
def is_final(backend: str, device: torch.device, ranks: tuple[int, int, str]) -> bool:
    """Whether what `choose` returns from now on holds for all later calls with equal arguments.

    Ranks on GPUs compare what they have verified, and a group that comes later may have an equal name.
    """
    return backend != "auto" or device.type != GPU or (ranks[0] == 1 and trust.is_decided(device))


@constant_in_graphs
def decide_early() -> None:
    """Decide what "auto" uses on the current GPU, if this process has a CUDA context on it already.

    A rank that has not selected its GPU yet must get no context on the first one.
    """
    if not torch.cuda.is_initialized():
        return
    index = torch.cuda.current_device()
    if torch._C._cuda_hasPrimaryContext(index):  # type: ignore[attr-defined]
        trust.of_device(torch.device(GPU, index))


def _reason_against(backend: str, device: torch.device) -> str | None:
    if device.type == "meta":  # nothing runs: operators only return shapes
        return None
    if backend == "cpu":
        if device.type != "cpu":
            return f'the tensors are on {device}, it takes CPU tensors; use backend="auto"'
        return cpu.unavailable()
    return (triton if backend == "triton" else cuda).unavailable(device)
