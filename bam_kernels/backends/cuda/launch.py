"""Arguments common to all launches of CUDA kernels: rows, numbers, positives, device and stream."""

import ctypes
from collections.abc import Callable
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor

from .. import interface
from ..addresses import address
from ..interface import Number, Positives
from .device import Device

FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NO_POSITIVES = (False, 0, 1, 1, 1, 0)


def rows_of(x: Tensor, device: torch.device) -> tuple[int, int, tuple[int, int, int, int]]:
    """Rows (m, D) or (V, B, D) as kernels take them: address, type, (rows of a view, strides of view, row, feature)."""
    view_stride = x.stride(0) if x.dim() == 3 else 0
    at = address(x, device, FLOAT_TYPES)
    return at, FLOAT_TYPES[x.dtype], (max(x.shape[-2], 1), view_stride, x.stride(-2), x.stride(-1))


def number(x: Number, device: torch.device, factor: float = 1.0) -> tuple[float, int]:
    """factor * x as kernels take it: a factor, and the address of a device scalar (0: none)."""
    own_factor, scalar = interface.number(x)
    return factor * own_factor, address(scalar, device)


def as_float32(scale: float) -> float:
    """Round to float32, the type in which kernels take the scale of scores."""
    return ctypes.c_float(scale).value


def positives_of(positives: Positives | None) -> tuple[bool, int, int, int, int, int]:
    if positives is None:
        return NO_POSITIVES
    layout = positives.layout
    return True, positives.first, positives.period, layout.B, layout.T, layout.own_columns


class Launcher:
    """Base of the CUDA launchers: a table of kernels for one type of device, and the query of a device by its index.

    For CPU tensors the table is the emulator's.
    """

    def __init__(self, table: Any, query_device: Callable[[int], Device], device_type: str = "cuda") -> None:
        self._kernels, self._query_device, self._device_type = table, query_device, device_type

    def recorded(self, recorder: Any) -> Self:
        """These kernels, whose launches a Recorder also notes."""
        kernels = copy(self)
        kernels._kernels = self._kernels.recorded(recorder.launches)
        return kernels

    def _device(self, x: Tensor) -> Device:
        return self._query_device(x.device.index or 0)

    def _launch_context(self, x: Tensor) -> tuple[int, int, bool, int]:
        """Device index, stream, whether launches may overlap, and shared memory of a block, for a launch on x.

        Raises: TypeError if x is on another type of device.
        """
        if x.device.type != self._device_type:
            raise TypeError(f"these kernels run on {self._device_type} tensors, got one on {x.device}")
        device = self._device(x)
        index = x.device.index or 0
        stream = torch._C._cuda_getCurrentRawStream(index) if self._device_type == "cuda" else 0
        return index, stream, device.programmatic, device.shared_bytes
