"""Launch a Triton kernel on the device of its tensors, and convert common arguments for kernels."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import interface
from ..interface import Number, Positives
from .interpreter import patch_interpreter

Launch = Callable[..., None]
COMPILE_OPTIONS = {"enable_fp_fusion": True}  # options of every launch
patch_interpreter()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the first tensor's device, on its current stream; nothing is launched for an empty grid."""
    if 0 in grid:
        return
    with on_device_of(args):
        kernel[grid](*args, **COMPILE_OPTIONS, **options)


def on_device_of(args: Sequence[Any]) -> AbstractContextManager[Any]:
    """Context in which the device of the first tensor is current."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def image_index(positives: Positives | None) -> tuple[int, int, int, int, int]:
    """Arguments for masking: first image, rows of a view, B, T, first of this rank's columns; None: unused values."""
    if positives is None:
        return 0, 1, 1, 1, 0
    layout = positives.layout
    return positives.first, positives.period, layout.B, layout.T, layout.own_columns


def number(x: Number) -> tuple[float, Tensor | None]:
    """Split x into a float factor and a device scalar (None: 1), as kernels take them."""
    factor, scalar = interface.number(x)
    assert scalar is None or scalar.dtype == torch.float32
    return factor, scalar


def check_scores(s: Tensor) -> None:
    assert s.stride(-1) == 1 and s.dtype in (torch.float32, torch.int16)
