"""What every launch needs: addresses, the device and the current stream."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import interface
from ..interface import Number, Positives, Potential
from .device import Device

FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NO_SCORES = (0, False, 0, 0)
NO_POTENTIAL = (0, 0)
NO_POSITIVES = (False, 0, 1, 1, 1, 0)


def pair(potential: Potential) -> tuple[int, int]:
    return potential.exponent.data_ptr(), potential.mantissa.data_ptr()


def address(x: Tensor | None) -> int:
    return x.data_ptr() if x is not None else 0


def scores_of(s: Tensor) -> tuple[int, bool, int, int]:
    assert s.stride(-1) == 1 and s.dtype in (torch.float32, torch.int16)
    return s.data_ptr(), s.dtype == torch.int16, s.stride(0) if s.dim() == 3 else 0, s.stride(-2)


def rows_of(x: Tensor) -> tuple[int, int, tuple[int, int, int, int]]:
    """Address, type, and rows of a view, strides of views, rows and features of (m, D) or (V, B, D)."""
    view_stride = x.stride(0) if x.dim() == 3 else 0
    return x.data_ptr(), FLOAT_TYPES[x.dtype], (max(x.shape[-2], 1), view_stride, x.stride(-2), x.stride(-1))


def number(x: Number, factor: float = 1.0) -> tuple[float, int]:
    """factor * x as a factor and the address of a device scalar."""
    of_x, scalar = interface.number(x)
    return factor * of_x, address(scalar)


def rounded(scale: float) -> float:
    """As float32 holds it, which is how the scale of scores is handed over."""
    return torch.tensor(scale, dtype=torch.float32).item()


def positives_of(positives: Positives | None) -> tuple[bool, int, int, int, int, int]:
    if positives is None:
        return NO_POSITIVES
    layout = positives.layout
    return True, positives.first, positives.period, layout.B, layout.T, layout.own_columns


class Launcher:
    """A table of kernels, and what the device of an index is; on the CPU the table is an emulator's."""

    def __init__(self, table: Any, found_device: Callable[[int], Device]) -> None:
        self._kernels, self._found_device = table, found_device

    def _device(self, x: Tensor) -> Device:
        return self._found_device(x.device.index or 0)

    def _where(self, x: Tensor) -> tuple[int, int, bool, int]:
        """Device, stream, whether launches there may overlap, and shared memory of a block."""
        device = self._device(x)
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.device.type == "cuda" else 0
        return x.device.index or 0, stream, device.programmatic, device.shared_bytes
