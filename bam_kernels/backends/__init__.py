"""The row kernels of each backend behind one interface, and the choice between them."""

import warnings
from functools import cache
from typing import Protocol

import torch

from ..constant import constant_in_graphs
from . import cpu, cuda, triton
from .interface import RowKernels


class Execution(Protocol):
    """Options that choose how to compute, not what."""

    @property
    def backend(self) -> str: ...
    @property
    def precision(self) -> str: ...


_NOT_BY_AUTO = 'backend="auto" does not choose the GPU kernels; pass backend="triton" or backend="cuda"'


def row_kernels(backend: str) -> RowKernels:
    """The row kernels of a backend that `choose` has returned."""
    if backend == "cuda":
        return cuda.kernels()
    return triton.kernels() if backend == "triton" else cpu.kernels()


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def choose(name: str, options: Execution, device: torch.device, dtype: torch.dtype, engine: str = "auto") -> str:
    """Choose the backend for tensors of a device and dtype; returns options.backend, or for "auto" the best one.

    Raises: TypeError for float64 with a backend other than reference; ValueError for a backend that cannot run here or
    lacks the precision or engine asked for.
    """
    backend = _choose(name, options.backend, device, dtype)
    if options.precision == "fp8":
        raise ValueError(f'{name}: precision="fp8" is not to be had from backend="{backend}"')
    if engine == "flash" and backend != "triton":
        raise ValueError(f'{name}: engine="flash" is not to be had from backend="{backend}"')
    return backend


@constant_in_graphs
def _choose(name: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    if backend == "reference":
        return backend
    if dtype == torch.float64:
        if backend == "auto":
            return "reference"
        raise TypeError(f'{name}: float64 is computed by backend="reference" only, got backend="{backend}"')
    if backend == "auto":
        reason = _reason_for_reference(device)
        if reason is None:
            return "cpu"
        _warn_once(f"bam_kernels: computing with the slow PyTorch reference: {reason}")
        return "reference"
    reason = _reason_against(backend, device)
    if reason:
        raise ValueError(f'{name}: backend="{backend}" cannot run here: {reason}')
    return backend


def _reason_for_reference(device: torch.device) -> str | None:
    """Reason why "auto" uses the reference for tensors on `device`; None if it uses kernels."""
    if device.type in ("cpu", "meta"):
        return cpu.unavailable()
    return _NOT_BY_AUTO if device.type == "cuda" else f"there are no kernels for {device.type} tensors"


def _reason_against(backend: str, device: torch.device) -> str | None:
    if device.type == "meta":  # nothing runs: operators only return shapes
        return None
    if backend == "cpu":
        if device.type != "cpu":
            return f'the tensors are on {device}, it takes CPU tensors; use backend="auto"'
        return cpu.unavailable()
    return (triton if backend == "triton" else cuda).unavailable(device)
