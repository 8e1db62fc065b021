"""The portable GPU row kernels. Triton is imported by `kernels()`, not by this package.

With TRITON_INTERPRET=1 set before Triton is imported they take CPU tensors, slowly: for tests.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .flash_kernels import FlashKernels
    from .row_kernels import TritonKernels


def unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot run on `device`, or None."""
    try:
        import triton
    except ImportError as error:
        return f"Triton is not installed ({error}); pip install triton"
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        return "it takes GPU tensors; CPU tensors only with TRITON_INTERPRET=1 set before import"
    if device.type not in ("cpu", "cuda"):
        return f"it takes CUDA and ROCm tensors, got {device}"
    return None


def kernels() -> "TritonKernels":
    """The row kernels. Raises: ImportError where Triton is not installed."""
    from .row_kernels import kernels

    return kernels()


def flash() -> "type[FlashKernels]":
    """The flash kernels, made for one set of keys. Raises: ImportError where Triton is not installed."""
    from .flash_kernels import FlashKernels

    return FlashKernels
