"""The CUDA C++ row kernels of csrc/cuda, for Ampere and later."""

from functools import cache
from typing import TYPE_CHECKING

import torch

from ..extension import _C, import_error
from . import shapes
from .device import Device

if TYPE_CHECKING:
    from .row_kernels import CudaKernels

OLDEST = (8, 0)


def unavailable(device: torch.device) -> str | None:
    """Reason why the CUDA kernels cannot run on `device`, or None."""
    if device.type != "cuda":
        return f"it takes CUDA tensors, got {device}"
    if _C is None:
        return f"the extension is not built ({import_error}); install it with nvcc: pip install -e ."
    if shapes.MISSING:
        lacks = ", ".join(shapes.MISSING)
        return f"the extension is older than these sources, it lacks {lacks}; rebuild it: pip install -e ."
    if not _C.with_cuda:
        return "the extension was built without CUDA; install it where nvcc is found: pip install -e ."
    if torch.version.hip:
        return 'it takes NVIDIA GPUs; use backend="triton"'
    count, fault = _C.cuda_devices()
    if count == 0:
        return f"no CUDA device: {fault}"
    return _fault(query_device(device.index if device.index is not None else torch.cuda.current_device()))


def _fault(device: Device) -> str | None:
    if device.capability < OLDEST:
        major, minor = device.capability
        return f"{device.name} is sm_{major}{minor}, these kernels need sm_{OLDEST[0]}{OLDEST[1]} or newer"
    if device.fault:
        return f"{device.name}: {device.fault}; the kernels are compiled for {architectures()}: TORCH_CUDA_ARCH_LIST"
    return None


def device_count() -> int:
    """Number of CUDA devices that this process sees."""
    return _C.cuda_devices()[0] if _C is not None and _C.with_cuda else 0


@cache
def query_device(index: int) -> Device:
    """Attributes of the CUDA device `index` of this process; creates a CUDA context on it."""
    return Device(index, **_C.cuda_device(index))


def architectures() -> str:
    """Architectures that the CUDA kernels were compiled for; "" if there are none."""
    return _C.cuda_architectures() if _C is not None and _C.with_cuda else ""


@cache
def kernels() -> "CudaKernels":
    """The row kernels for all CUDA devices."""
    from .row_kernels import CudaKernels

    return CudaKernels(_C.cuda_kernels(), query_device)
