"""The portable GPU row kernels, in Triton. `kernels()` imports Triton; importing this package does not.

If TRITON_INTERPRET=1 is set before Triton is imported, the kernels take CPU tensors, slowly, for tests.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .flash_kernels import FlashKernels
    from .row_kernels import TritonKernels


def unavailable(device: torch.device) -> str | None:
    """Reason why the Triton kernels cannot run on `device`, or None."""
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
    """The Triton row kernels. Raises: ImportError if Triton is not installed."""
    from .row_kernels import kernels

    return kernels()


def flash() -> "type[FlashKernels]":
    """The class of flash kernels; an instance serves one tensor of keys. Raises: ImportError without Triton."""
    from .flash_kernels import FlashKernels

    return FlashKernels
