"""Try the kernels of one way on problems of fixed seed, against float64, in this process; trial.py starts it.

    python -m bam_kernels.verification.problems triton --device 0

Each problem forces some form of the kernels. It is computed three times, and the results must be equal bit by bit: the
third call repeats the launches that the second recorded (engine/recorder.py). Emulated and interpreted kernels, whose
launches are not recorded, compute it twice. One problem is also replayed as a CUDA graph. Memory is filled with NaN
before the first call and the last, so that missing writes are seen.
layout.py defines the dimension letters.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import threading
import traceback
from typing import Any

import torch
from torch import Tensor

from ..backends import cuda, triton
from ..loss import bam_loss
from ..ranks import ONE_RANK
from ..ways import GPU_WAYS, WAYS
from . import cases, verified
from .cases import Bound
from .identity import identity
from .trial import CANNOT_RUN, REPORT

# Parts of messages about a machine that lacks something at that moment. cuBLAS says that it is not initialised where
# memory is short.
LACKS = {"out of memory", "BLAS_STATUS_ALLOC_FAILED", "BLAS_STATUS_NOT_INITIALIZED", "DefaultCPUAllocator"}
LACKS |= {"busy or unavailable", "ECC error", "Failed to find C compiler", "libcuda.so cannot found"}
SHOWN = 4  # wrong numbers of a result that are printed, spread over all of them
at = ""  # the problem that runs


def report(**fields: Any) -> None:
    """Print one report at the start of a line, at once."""
    os.write(1, f"\n{REPORT}{json.dumps(fields)}\n".encode())


class Wrong(Exception):
    """A result that is not right."""


def run_case(case: cases.Case, device: torch.device) -> float:
    """Compute each run of a case, compare with float64; returns the largest error, as a share of its bound.

    Raises: Wrong naming the first result that is not right, once all results of that run are printed.
    """
    truth, largest = case.truth(), 0.0
    for run in case.runs:
        print(f"  {run.label}", flush=True)
        poison(device)
        found = run.compute()
        # Steps of GPU kernels on CPU tensors are not recorded: their look for rows that are not finite reads memory.
        recorded = run.compute() if device.type == "cuda" else found
        poison(device)
        repeated = run.compute()
        faults = []
        for what, expected in truth.items():
            wrong, error = compare(what, found[what], expected, run.bounds[what])
            largest = max(largest, error)
            if wrong:
                faults.append(f"{wrong} of {expected.numel()} numbers of the {what} are wrong ({run.label})")
            elif not (torch.equal(found[what], recorded[what]) and torch.equal(found[what], repeated[what])):
                faults.append(f"numbers of the {what} differ from run to run ({run.label})")
        if faults:
            raise Wrong(faults[0])
    return largest


def compare(what: str, found: Tensor, truth: Tensor, bound: Bound) -> tuple[int, float]:
    """Number of results outside their bound, and the largest error as a share of its bound; prints both.

    A result that is exactly 0 in float64 must be 0; NaN is wrong.
    """
    found = found.cpu().double()
    allowed = bound.relative * truth.abs() + bound.floor * truth.abs().max()
    allowed.masked_fill_(truth == 0, 0.0)
    error = torch.where(found == truth, 0.0, (found - truth).abs() / allowed)
    largest = error.max().item()
    print(f"    {what:<21} largest error {largest:.2g} of its bound", flush=True)
    wrong = (~(error <= 1)).nonzero()
    for place in wrong[:: max(1, len(wrong) // SHOWN)][:SHOWN].tolist():
        print(f"      {place}: {found[tuple(place)].item():.9g}, not {truth[tuple(place)].item():.9g}", flush=True)
    return len(wrong), largest


def poison(device: torch.device) -> None:
    """Fill memory with NaN and free it: the allocator hands it out next."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what earlier calls left
    held = [torch.full((1 << 18,), math.nan, dtype=torch.float32, device=device) for _ in range(32)]
    held.append(torch.full((1 << 24,), math.nan, dtype=torch.float32, device=device))
    del held


def report_compilation() -> None:
    """Have Triton report when it begins to compile a kernel, and when that kernel has been launched.

    Between the two it may also compile the kernel's launcher and load the kernel.
    """
    from triton import knobs
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    compiling = False

    def begin(*, fn: Any, **_: Any) -> None:
        nonlocal compiling
        compiling = True
        report(stage="compiling", at=f"{at} ({fn.name})")

    def launch_and_report(kernel: Any, *args: Any, **options: Any) -> Any:
        nonlocal compiling
        launched = launch(kernel, *args, **options)
        if compiling:
            compiling = False
            report(stage="running", at=at)
        return launched

    knobs.runtime.jit_cache_hook = begin
    JITFunction.run = launch_and_report


def end_with_parent() -> None:
    """End this process once the process that started it has ended, which closes standard input."""

    def wait() -> None:
        while os.read(0, 1 << 12):
            pass
        os._exit(3)

    threading.Thread(target=wait, daemon=True).start()


def leave_no_core_file() -> None:
    """Keep a crash from writing this process's memory, gigabytes, into the user's working directory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def try_way(way: str, device: torch.device, toy: bool) -> dict[str, str]:
    """Run all problems of a way; returns the fields of the last report."""
    global at
    compiles, right = False, []
    if device.type == "cuda":
        torch.cuda.set_device(device)
        (torch.zeros(1, dtype=torch.float32, device=device) + 1).item()
        here = identity(device.index)
        report(identity=here)
        why_not = (cuda if WAYS[way].backend == "cuda" else triton).unavailable(device)
        if why_not:
            return {"status": "unknown", "reason": f"{CANNOT_RUN}{why_not}"}
        if way == "cuda":
            entry = verified.entry(way, here)
            compiles = entry is not None and entry["code"].endswith("+PTX")  # by the driver, at first use
        else:
            report_compilation()
    try:
        for name in cases.names(way):
            at = name
            print(name, flush=True)
            report(stage="compiling" if compiles else "running", at=at)
            largest = [run_case(case, device) for case in cases.cases(name, way, device, toy=toy)]
            right.append(f"{name}: right, largest error {max(largest):.2g} of its bound")
        if device.type == "cuda":
            at = "replay of a CUDA graph"
            report(stage="running", at=at)
            replay(way, device)
    except Wrong as wrong:
        return {"status": "failed", "reason": f"{at}: {wrong}"}
    print(*right, sep="\n", flush=True)  # the end of what is printed is kept
    return {"status": "verified"}


def replay(way: str, device: torch.device) -> None:
    """Capture a call as a CUDA graph and replay it on other embeddings. Raises: Wrong."""
    options: Any = {"backend": WAYS[way].backend, "engine": WAYS[way].engine, "group": ONE_RANK}
    student, other = (cases.embeddings(3, 65, 64, seed).to(device, torch.float16) for seed in (10, 40))
    student.requires_grad_()

    def compute() -> tuple[Tensor, Tensor]:
        loss: Any = bam_loss(student, **options)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # what is captured then repeats a recording
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = compute()
    with torch.no_grad():
        student.copy_(other)
    graph.replay()
    if not all(torch.equal(found, expected) for found, expected in zip(replayed, compute(), strict=True)):
        raise Wrong("another result than without")


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("way", choices=GPU_WAYS)
    parser.add_argument("--device", default="0", help="index of the GPU, or cpu for emulated or interpreted kernels")
    parser.add_argument("--toy", action="store_true", help="small problems")
    options = parser.parse_args(args)
    device = torch.device("cpu") if options.device == "cpu" else torch.device("cuda", int(options.device))
    try:
        result = try_way(options.way, device, options.toy)
    except Exception as error:
        result = meaning(error)
        print(traceback.format_exc(), flush=True)
    report(**result)
    return 0


def meaning(error: Exception) -> dict[str, str]:
    """Result of a trial that an error ended.

    Unknown before the first problem, without memory, and if a file, library or program is missing, as for compilation;
    else failed, also if a kernel needs more than this GPU has.
    """
    text = f"{at}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".removeprefix(": ")
    of_machine = (MemoryError, torch.OutOfMemoryError, OSError, ImportError, subprocess.SubprocessError)
    lacks = isinstance(error, of_machine) or any(part in str(error) for part in LACKS)
    return {"status": "unknown" if lacks or not at else "failed", "reason": text}


if __name__ == "__main__":
    end_with_parent()
    leave_no_core_file()
    status = main()
    sys.stdout.flush()
    os._exit(status)  # nothing is left to clean up, and a driver may hang in it
