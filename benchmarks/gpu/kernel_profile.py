"""Which kernels a step is made of and what each takes: `python benchmarks/gpu/kernel_profile.py` (torch's profiler)."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import times
import torch
from problem import loss_options
from steps import table

from bam_kernels import bam_loss

CALLS = 5


def kernels_of(run: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """Name, launches a call, and microseconds a call of everything that the device did, the longest first."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(CALLS):
            run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.time_range.elapsed_us())
    rows = [(name, len(us) / CALLS, sum(us) / CALLS) for name, us in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["2048x8192x4096", "2048x8192x256", "512x512x256"])
    options = parser.parse_args()
    device = torch.device("cuda")
    for shape, teacher, problem in times.problems(device, toy=False):
        if shape not in options.shapes:
            continue
        named = loss_options(problem)
        leaf = problem.student.half().requires_grad_()
        y = problem.teacher.half() if problem.teacher is not None else None
        for backend in times.backends(device):

            def step(backend: str = backend, leaf: Any = leaf, y: Any = y, named: Any = named) -> None:
                loss: Any = bam_loss(leaf, y, backend=backend, **named)
                torch.autograd.grad(loss * 1024, leaf)

            try:
                found = kernels_of(step)
            except Exception as error:
                print(f"FAILED {backend} {shape}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
            total = sum(us for _, _, us in found)
            print(f"\n{backend}, {shape}{', a teacher' if teacher else ''}: {total:.1f} us of kernels a step")
            print(
                table(["us", "launches", "kernel"], [[f"{us:.1f}", f"{n:g}", name[:110]] for name, n, us in found]),
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
