"""Runs one step of each backend for a profiler: `ncu --profile-from-start off ... one_step.py`.

Kernels are compiled and plans made before the profiler starts. A step goes from 16-bit embeddings of student and
teacher to the gradient.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "benchmarks" / "gpu")]

import torch  # noqa: E402
from sixteen_bit import our_step, sixteen_bit_layout, sixteen_bit_problem  # noqa: E402
from torch import Tensor  # noqa: E402

INPUTS = 4  # copies of the embeddings, used in rotation


def steps_of(
    shape: str, views: int, backend: str, device: torch.device, *, teacher: bool = True, engine: str = "slab"
) -> list[Callable[[], Tensor]]:
    """Steps of one MxNxD problem on several copies of its embeddings; calling one returns the gradient."""
    problem = sixteen_bit_problem(sixteen_bit_layout(shape, views, teacher), device)
    step = our_step(problem, backend, engine)
    leaves = [problem.student.clone().requires_grad_() for _ in range(INPUTS)]
    return [partial(step, leaf, problem.teacher) for leaf in leaves]


def warm_step(backend: str, shape: str, views: int, device: torch.device) -> Callable[[], Tensor]:
    """A step that has run three times, so that its kernels are compiled and its plans made."""
    step, *_ = steps_of(shape, views, backend, device)
    for _ in range(3):
        step()
    wait(device)
    return step


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"])
    parser.add_argument("--shape", default="2048x8192x256", help="size of the problem, MxNxD")
    parser.add_argument("--views", type=int, default=8)
    return parser


def main() -> int:
    options = step_parser(__doc__).parse_args()
    for backend in options.backends:
        device = torch.device("cpu" if backend == "cpu" else "cuda")
        step = warm_step(backend, options.shape, options.views, device)
        if device.type == "cuda":
            torch.cuda.profiler.start()
        step()
        wait(device)
        if device.type == "cuda":
            torch.cuda.profiler.stop()
        print(f"{backend}: one step of {options.shape}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
