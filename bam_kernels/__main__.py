"""Print what is installed and built, check each backend against the reference, and show what `auto` uses on GPUs.

    python -m bam_kernels               tries no kernels for `auto`, and shows what is known of them
    python -m bam_kernels --verify      first tries them on every GPU: python -m bam_kernels.verify

Exit status 0 if every backend that can run on this machine agrees with the float64 reference, every way that was tried
is verified, and the tuning file, if there is one, can be read.
"""

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import __version__, reference, tuned, verify
from .backends import cpu, cuda, triton
from .loss import bam_loss
from .verification import trust
from .verification.trial import CANNOT_RUN
from .ways import GPU_WAYS

TOLERANCE = 1e-5


def main(args: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m bam_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--verify", action="store_true", help="first try the kernels of every GPU, for minutes")
    tried = _try_all() if parser.parse_args(args).verify else True
    print(f"bam_kernels {__version__}, Python {platform.python_version()}, {platform.machine()} {platform.system()}")
    print("packages    " + ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "numpy", "nvtx")))
    architectures = cuda.architectures()
    print(f"CUDA build  {'for ' + architectures if architectures else 'no'}")
    print(f"CPU         {_cpu_line()}")
    for device in map(cuda.query_device, range(cuda.device_count())):
        capability = "".join(map(str, device.capability))
        print(f"GPU         {device.name}, sm_{capability}, {device.memory_bytes >> 20} MiB; {device.forms()}")
    try:
        tuned.tuning()
    except ValueError as error:
        print(f"\ntuning file {error}")
        return 1
    print("\nbackend     against the float64 reference (relative error of the gradient)")
    verdicts = [
        _report("reference", None, "cpu", reference.bam_loss),
        _report("cpu", cpu.unavailable(), "cpu", partial(bam_loss, backend="cpu")),
        _report("triton", _gpu_unavailable(triton), "cuda", partial(bam_loss, backend="triton")),
        _report("cuda", _gpu_unavailable(cuda), "cuda", partial(bam_loss, backend="cuda")),
    ]
    for index in range(verify.device_count()):
        print(f"\n{_auto_lines(index)}")
    print("\nall backends that can run here agree" if all(verdicts) else "\nA BACKEND DISAGREES WITH THE REFERENCE")
    return 0 if all(verdicts) and tried else 1


def _try_all() -> bool:
    """Try the kernels on every GPU. Returns False if a way that can run is not verified."""
    statuses = []
    if not verify.device_count():
        print("nothing to try: torch sees no GPU\n")
    for index in range(verify.device_count()):
        statuses.append(verify.exit_status(verify.verify(index)[1]))
        print()
    return 1 not in statuses


def _auto_lines(index: int) -> str:
    """Lines about what backend="auto" uses on GPU `index`, and why; nothing is tried."""
    try:
        mode = trust.trial_mode()
    except ValueError as error:
        return f'backend="auto" on GPU {index}: {error}'
    here, known, left = trust.survey(index)
    lines = [f'backend="auto" on GPU {index}, {here["gpu"]}; {trust.MODE}={mode}']
    for way in GPU_WAYS:
        if way in left:
            text = f"not tried: {trust.COMMAND}{f' --device {index}' if index else ''}"
        elif known[way].status == "unknown":
            text = f"{CANNOT_RUN}{known[way].reason}"
        else:
            text = f"{known[way]}{f' ({known[way].date}, on this machine)' if known[way].date else ''}"
        lines.append(f"{way:<12}{text}")
    used = [way for way in GPU_WAYS if way not in left and known[way].status == "verified"]
    uses = f"{' or '.join(used)}{', by shape' * (len(used) > 1)}" if used else "the slow PyTorch reference"
    if mode == "force" or (left and mode == "auto"):
        uses = "what is found right when a program first uses it, by trying the kernels in other processes"
    return "\n".join([*lines, f"{'it uses':<12}{uses}"])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cpu_line() -> str:
    if cpu.unavailable():
        return f"reference only: {cpu.unavailable()}"
    kernels = cpu.kernels()
    tiles = ", 16-bit products on AMX" if kernels.can_split_products else ""
    return f"{torch.get_num_threads()} threads, instruction set {kernels.isa}{tiles}"


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
    sys.exit(main(sys.argv[1:]))
