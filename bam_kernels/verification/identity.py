"""Identity of what a verdict is about: the GPU, its driver, the software, and the sources of the kernels."""

import hashlib
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path

import torch

from ..backends.extension import _C

PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = ("backends", "engine")  # folders of the package whose Python decides what runs on a GPU
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))

Identity = dict[str, str]


def identity(index: int) -> Identity:
    """Identity of CUDA or ROCm device `index` with the software of this process."""
    device = torch.cuda.get_device_properties(index)
    return {
        "gpu": device.name,
        "capability": capability(index),
        "multiprocessors": str(device.multi_processor_count),  # of a part of a GPU, fewer
        **software(),
    }


def capability(index: int) -> str:
    """Compute capability of a device, e.g. 9.0; on ROCm the name of its architecture."""
    device = torch.cuda.get_device_properties(index)
    return device.gcnArchName if torch.version.hip else f"{device.major}.{device.minor}"


@cache
def software() -> Identity:
    """Identity of the software alone."""
    from .. import __version__

    return {
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "library": __version__,
        "sources": python_hash(),
        "extension": f"{built_from()} for {_C.cuda_architectures()}" if _C is not None and _C.with_cuda else "",
        "python": sys.implementation.cache_tag + sys.abiflags,
    }


def _driver() -> str:
    """Version of the GPU driver, as the kernel module says it; and of its interface, as CUDA counts."""
    interface = getattr(torch._C, "_cuda_getDriverVersion", lambda: torch.version.hip)()
    for file in DRIVERS:
        try:
            return f"{file.read_text().splitlines()[0].strip()} ({interface})"
        except (OSError, IndexError, UnicodeDecodeError):
            continue
    return str(interface)


@cache
def triton_version() -> str:
    """Version of the installed Triton, read without importing it; "" without Triton."""
    if "triton" in sys.modules:
        return getattr(sys.modules["triton"], "__version__", "")
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return ""
    found = re.search(r"""^__version__ = ['"]([^'"]+)""", Path(spec.origin).read_text(), re.MULTILINE)
    return found[1] if found else ""


@cache
def python_hash() -> str:
    """Hash of the Python sources that launch kernels, or are compiled by Triton."""
    digest = hashlib.sha256()
    for file in sorted(file for folder in SOURCES for file in (PACKAGE / folder).rglob("*.py")):
        text = file.read_bytes()
        digest.update(f"{file.relative_to(PACKAGE).as_posix()} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:16]


def built_from() -> str:
    """Hash of the sources of the compiled extension, and the compiler of its CUDA kernels."""
    return getattr(_C, "built_from", "")
