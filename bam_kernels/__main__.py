"""Print what is installed and built, and check each backend against the reference: `python -m bam_kernels`.

Exit status 0 if every backend that can run on this machine agrees with the float64 reference.
"""

import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import __version__, reference
from .backends import cpu, cuda, triton
from .loss import bam_loss

TOLERANCE = 1e-5


def main() -> int:
    print(f"bam_kernels {__version__}, Python {platform.python_version()}, {platform.machine()} {platform.system()}")
    print("packages    " + ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "numpy", "nvtx")))
    architectures = cuda.architectures()
    print(f"CUDA build  {'for ' + architectures if architectures else 'no'}")
    print(f"CPU         {_cpu_line()}")
    for device in map(cuda.query_device, range(cuda.device_count())):
        capability = "".join(map(str, device.capability))
        print(f"GPU         {device.name}, sm_{capability}, {device.memory_bytes >> 20} MiB; {device.forms()}")
    print("\nbackend     against the float64 reference (relative error of the gradient)")
    verdicts = [
        _report("reference", None, "cpu", reference.bam_loss),
        _report("cpu", cpu.unavailable(), "cpu", partial(bam_loss, backend="cpu")),
        _report("triton", _gpu_unavailable(triton), "cuda", partial(bam_loss, backend="triton")),
        _report("cuda", _gpu_unavailable(cuda), "cuda", partial(bam_loss, backend="cuda")),
    ]
    print("\nall backends that can run here agree" if all(verdicts) else "\nA BACKEND DISAGREES WITH THE REFERENCE")
    return 0 if all(verdicts) else 1


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cpu_line() -> str:
    if cpu.unavailable():
        return f"reference only: {cpu.unavailable()}"
    return f"{torch.get_num_threads()} threads, instruction set {cpu.kernels().isa}"


def _gpu_unavailable(backend: Any) -> str | None:
    """Reason why a GPU backend cannot run on this machine, or None."""
    reason = backend.unavailable(torch.device("cuda"))
    return reason or (None if torch.cuda.is_available() else "torch sees no GPU")


def _report(name: str, unavailable: str | None, device: str, loss: Callable[..., Any]) -> bool:
    """Print the line of one backend. Returns False only if the backend ran and its gradient was wrong."""
    if unavailable:
        print(f"{name:<12}cannot run here: {unavailable}")
        return True
    error = max(_gradient_error(loss, with_teacher, device) for with_teacher in (False, True))
    verdict = "agrees" if error <= TOLERANCE else f"WRONG, more than {TOLERANCE:.0e}"
    print(f"{name:<12}{error:.1e}  {verdict}")
    return error <= TOLERANCE


def _gradient_error(loss: Callable[..., Any], with_teacher: bool, device: str) -> float:
    """Relative error |dz - dz_ref| / |dz_ref| of a small float32 problem; dz_ref is the reference in float64."""
    embeddings = partial(
        torch.randn, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu"
    )
    student = embeddings(4, 24, 40).to(device)
    teacher = embeddings(2, 24, 40).to(device) if with_teacher else None
    exact = student.double().requires_grad_()
    exact_loss: Any = reference.bam_loss(exact, teacher.double() if teacher is not None else None)
    (expected,) = torch.autograd.grad(exact_loss, exact)
    student.requires_grad_()
    (dz,) = torch.autograd.grad(loss(student, teacher, precision="exact"), student)
    return ((dz - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    sys.exit(main())
