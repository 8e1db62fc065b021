"""The row kernels of each backend behind one interface, and the choice between them."""

import warnings
from functools import cache
from typing import Protocol

import torch

from ..constant import constant_in_graphs
from . import cpu, cuda, triton
from .interface import RowKernels


class Execution(Protocol):
    """The options that say how to compute."""

    @property
    def backend(self) -> str: ...
    @property
    def precision(self) -> str: ...


_BY_NAME_ONLY = 'the kernels for {device} tensors are taken where they are named: backend="triton" or backend="cuda"'


def row_kernels(backend: str) -> RowKernels:
    """The row kernels of a backend that `choose` has returned."""
    if backend == "cuda":
        return cuda.kernels()
    return triton.kernels() if backend == "triton" else cpu.kernels()


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def choose(name: str, options: Execution, device: torch.device, dtype: torch.dtype, engine: str = "auto") -> str:
    """The backend that will run: the one asked for if it can run these tensors, the best one for "auto".

    Raises: TypeError for float64 with a backend other than reference; ValueError for one that cannot run here, or has
    not the precision or engine asked for.
    """
    backend = _choose(name, options.backend, device, dtype)
    if options.precision == "fp8":
        raise ValueError(f'{name}: precision="fp8" is not to be had from backend="{backend}"')
    if engine == "flash" and backend != "triton":
        raise ValueError(f'{name}: engine="flash" is not to be had from backend="{backend}"')
    return backend


def _choose(name: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    if backend == "reference":
        return backend
    if dtype == torch.float64:
        if backend == "auto":
            return "reference"
        raise TypeError(f'{name}: float64 is computed by backend="reference" only, got backend="{backend}"')
    if backend == "auto":
        if device.type == "cpu" and cpu.unavailable() is None:
            return "cpu"
        reason = cpu.unavailable() if device.type == "cpu" else _BY_NAME_ONLY.format(device=device.type)
        _warn_once(f"bam_kernels: computing with the slow PyTorch reference: {reason}")
        return "reference"
    reason = _cannot_run(backend, device)
    if reason:
        raise ValueError(f'{name}: backend="{backend}" cannot run here: {reason}')
    return backend


@constant_in_graphs
def _cannot_run(backend: str, device: torch.device) -> str | None:
    if backend == "cpu":
        if device.type != "cpu":
            return f'the tensors are on {device}, it takes CPU tensors; use backend="auto"'
        return cpu.unavailable()
    return (triton if backend == "triton" else cuda).unavailable(device)
