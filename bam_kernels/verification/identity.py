"""Identity of what a verdict is about: the GPU, its driver, the software, and the sources of the kernels."""

import ctypes
import hashlib
import importlib.util
import os
import re
import sys
from functools import cache
from pathlib import Path

import torch

from ..backends.extension import _C
from ..version import __version__

PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = ("backends", "engine", "layout.py", "precision.py")  # Python that decides what runs on a GPU
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))

Identity = dict[str, str]


def identity(index: int) -> Identity:
    """Identity of CUDA or ROCm device `index` with the software of this process.

    Its capability is a compute capability, such as 9.0, or on ROCm the name of an architecture.
    """
    device = torch.cuda.get_device_properties(index)
    return {
        "gpu": device.name,
        "capability": device.gcnArchName if torch.version.hip else f"{device.major}.{device.minor}",
        "multiprocessors": str(device.multi_processor_count),  # of a part of a GPU, fewer
        **software(),
    }


@cache
def software() -> Identity:
    """Identity of the software alone."""
    return {
        "driver": _driver(),
        "torch": f"{torch.__version__} for {_toolkit()}",  # not every build's version names it
        "triton": triton_version(),
        "library": __version__,
        "sources": python_hash(),
        "extension": f"{built_from()} for {_C.cuda_architectures()}" if _C is not None and _C.with_cuda else "",
        "python": sys.implementation.cache_tag + getattr(sys, "abiflags", ""),
    }


def _toolkit() -> str:
    """CUDA or HIP that torch was built for."""
    return f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"


def _driver() -> str:
    """Version of the GPU driver, as the kernel module says it; and the version of CUDA that the driver offers."""
    interface = _toolkit() if torch.version.hip else f"CUDA {_cuda_of_driver()}"
    for file in DRIVERS:
        try:
            return f"{file.read_text().splitlines()[0].strip()}; {interface}"
        except (OSError, IndexError, UnicodeDecodeError):
            continue
    return interface


def _cuda_of_driver() -> int:
    """Version of CUDA that the driver offers, as CUDA counts: 13000 is 13.0. 0 without a driver."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


@cache
def triton_version() -> str:
    """Version of Triton, "" without it: of the imported module, else read from its source without importing it."""
    if version := getattr(sys.modules.get("triton"), "__version__", ""):
        return str(version)
    try:
        spec = importlib.util.find_spec("triton")
        text = Path(spec.origin).read_text(encoding="utf-8") if spec is not None and spec.origin is not None else ""
    except (ValueError, OSError):
        return ""
    found = re.search(r"""^__version__ = ['"]([^'"]+)""", text, re.MULTILINE)
    return found[1] if found else ""


@cache
def python_hash() -> str:
    """Hash of the Python sources that launch kernels, or are compiled by Triton; programs in one file have none."""
    digest, root = hashlib.sha256(), len(str(PACKAGE)) + 1
    files = [os.path.join(PACKAGE, source) for source in SOURCES if os.path.isfile(os.path.join(PACKAGE, source))]
    for folder in SOURCES:  # os.walk takes less than half the time of Path.rglob, and yields nothing of a file
        files += [os.path.join(at, name) for at, _, names in os.walk(PACKAGE / folder) for name in names]
    for file in sorted(file for file in files if file.endswith(".py")):
        with open(file, "rb", buffering=0) as opened:
            text = opened.read()
        digest.update(f"{file[root:]} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:16]


def built_from() -> str:
    """Hash of the sources of the compiled extension, and the compiler of its CUDA kernels."""
    return getattr(_C, "built_from", "")


python_hash()  # now, when the sources are imported: they may change while this process runs
