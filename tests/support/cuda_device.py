"""Where this process runs the CUDA kernels: on a GPU where there is one, else on the CPU under the emulator."""

import shutil
from dataclasses import replace

import emulated
import pytest
import torch

from bam_kernels.backends import cuda
from bam_kernels.backends.cuda import shapes
from bam_kernels.backends.cuda.device import Device
from bam_kernels.backends.cuda.row_kernels import CudaKernels
from bam_kernels.backends.extension import _C
from bam_kernels.backends.interface import Potential

if _C is None:
    pytest.skip("needs the extension", allow_module_level=True)
if torch.cuda.is_available() and cuda.unavailable(torch.device("cuda")) is None:
    DEVICE = torch.device("cuda")
elif shutil.which("g++"):
    DEVICE = torch.device("cpu")
else:
    pytest.skip("needs a GPU, or g++ for the emulator", allow_module_level=True)

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []


def kernels_on(**limits: object) -> CudaKernels:
    """Kernels that take the device to have these limits. cluster: blocks of the largest one, a skip on a device that
    has none so large; the emulator has."""
    if "cluster" in limits:
        largest = limits.pop("cluster")
        if DEVICE.type == "cuda" and largest > cuda.query_device(0).cluster:
            pytest.skip(f"this device has no clusters of {largest}")
        limits["clusters"] = tuple(int(size <= largest) for size in (2, 4, 8, 16))
    if DEVICE.type == "cpu":
        return emulated.kernels(replace(emulated.HOPPER, **limits))
    return CudaKernels(_C.cuda_kernels(), lambda index: replace(cuda.query_device(index), **limits))


# A row in one block; over a cluster of blocks of one warp, which is 512 columns each; in one block of a device before
# Hopper, without bulk copies (under the emulator); too long for the chip.
FORMS = {
    "block": {},
    "cluster": {},
    "before Hopper": {"cluster": 1, "programmatic": False},
    "long": {"shared_bytes": 0},
}


@pytest.fixture(params=FORMS)
def kernels(request, monkeypatch) -> CudaKernels:
    made = kernels_on(**FORMS[request.param])
    if request.param == "cluster":
        if made._query_device(0).cluster == 1:
            pytest.skip("this device has no clusters")
        monkeypatch.setattr(shapes, "MOST_THREADS", 32)
    return made


def device_of(made: CudaKernels) -> Device:
    return made._query_device(0)


def one(n: int) -> Potential:
    return Potential(torch.zeros(n, device=DEVICE), torch.ones(n, device=DEVICE))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def on_device(p: Potential) -> Potential:
    return Potential(p.exponent.to(DEVICE), p.mantissa.to(DEVICE))
