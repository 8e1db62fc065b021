"""Launching a kernel on the device of its tensors, and the arguments that are numbers or device scalars."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import interface
from ..interface import Number, Positives
from .interpreter import patch_interpreter_index

Launch = Callable[..., None]
patch_interpreter_index()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch on the current stream of the device of the first tensor; an empty grid is no launch."""
    if 0 in grid:
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, enable_fp_fusion=True, **options)


def image_index(positives: Positives | None) -> tuple[int, int, int, int, int]:
    """The first image, the rows of a view, B, T and the first of this rank's columns; of one image without a mask."""
    if positives is None:
        return 0, 1, 1, 1, 0
    layout = positives.layout
    return positives.first, positives.period, layout.B, layout.T, layout.own_columns


def number(x: Number) -> tuple[float, Tensor | None]:
    """The two factors of x, as kernels read them; None: 1."""
    factor, scalar = interface.number(x)
    assert scalar is None or scalar.dtype == torch.float32
    return factor, scalar


def check_scores(s: Tensor) -> None:
    assert s.stride(-1) == 1 and s.dtype in (torch.float32, torch.int16)


class Launcher:
    """`run(kernel, grid, *args, num_warps, **constants)` launches one kernel."""

    def __init__(self, run: Launch = launch) -> None:
        self._run = run
