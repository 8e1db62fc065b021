"""Try the kernels of one way on problems of fixed seed, against float64, in this process; trial.py starts it.

    python -m bam_kernels.verification.problems triton --device 0

Each problem forces some form of the kernels. It is computed twice, and the results must be equal bit by bit; one is
also replayed as a CUDA graph. Memory is filled with NaN first, so that missing writes are seen.
layout.py defines the dimension letters.
"""

import argparse
import json
import math
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..loss import bam_loss, bam_targets
from ..ranks import ONE_RANK
from ..simulated import SimulatedRanks
from ..sinkhorn import sinkhorn_attention
from ..ways import GPU_WAYS, WAYS
from .identity import capability, identity
from .trial import REPORT
from .verified import code_for

GRADIENT_SCALE = 1024.0  # keeps gradients of float16 embeddings within the normal numbers of float16
# Largest error of each number, relative to it and to the largest number beside it, by the dtype of the embeddings.
BOUNDS = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 8e-3}
CLUSTER = 8  # images whose embeddings are close
TOP_K = 2 * (CLUSTER - 1)  # two views of a row's cluster, without its own image: far larger than all other weights


@dataclass(frozen=True)
class Problem:
    """One problem of `bam_loss` on rank 0 of W simulated ranks, with other numbers B and W in `toy`."""

    V: int
    R: int
    B: int
    W: int
    D: int
    dtype: torch.dtype = torch.float16
    options: dict[str, Any] = field(default_factory=dict)
    toy: tuple[int, int] = (8, 3)
    flash: bool = True  # the flash engine takes it


EXACT = {"precision": "exact"}
PROBLEMS = {
    # All iterations in one launch of CUDA kernels; int16 scores.
    "one launch": Problem(2, 0, 96, 1, 64, toy=(16, 1)),
    "teacher": Problem(4, 2, 40, 16, 128),
    # Float32 scores, more views than targets, scores computed again for each sweep.
    "exact, crops, slabs": Problem(
        5, 2, 24, 12, 300, torch.float32, {**EXACT, "epsilon": 0.01, "memory_budget": 40_000}
    ),
    "top-k": Problem(3, 0, 24, 8, 33, options={"top_k": TOP_K}, flash=False),
    "no mask": Problem(3, 2, 24, 8, 200, torch.bfloat16, {"mask_positives": False, "target_rows": "student"}),
    # 20,032 keys: rows over clusters of blocks on Hopper and newer, long rows elsewhere.
    "rows over clusters": Problem(2, 0, 16, 626, 16, toy=(8, 65)),
    # 140,160 keys: beyond clusters of blocks.
    "long rows, top-k": Problem(2, 2, 16, 4380, 16, torch.float32, EXACT | {"top_k": TOP_K}, (8, 70), flash=False),
}
ATTENTION = "attention"  # the eighth problem: `sinkhorn_attention` and its gradient
REPLAYED = "one launch"


def report(**fields: Any) -> None:
    """Print one report at the start of a line, at once."""
    os.write(1, f"\n{REPORT}{json.dumps(fields)}\n".encode())


class Wrong(Exception):
    """A result that is not right."""


def problems_of(way: str) -> list[str]:
    """Names of the problems that a way takes."""
    return [name for name, problem in PROBLEMS.items() if problem.flash or way != "flash"] + (
        [ATTENTION] if way != "flash" else []
    )


def embeddings(views: int, images: int, D: int, seed: int) -> Tensor:
    """Embeddings (views, images, D) float32, on the CPU: images of a cluster are close, views of an image closer."""

    def rows(seed: int, *shape: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        x = torch.randn(*shape, D, generator=generator, dtype=torch.float32, device="cpu")
        return torch.nn.functional.normalize(x, dim=-1)

    clusters = rows(0, 1, -(-images // CLUSTER)).repeat_interleave(CLUSTER, 1)[:, :images]
    return 3 * (clusters + 0.4 * rows(seed + 1, 1, images) + 0.3 * rows(seed + 2, views, images))


class Check:
    """Runs problems of one way on one device."""

    def __init__(self, way: str, device: torch.device, toy: bool) -> None:
        self.way, self.device, self.toy = way, device, toy
        self.options: dict[str, Any] = {"backend": WAYS[way].backend}

    def run(self, name: str) -> None:
        """Compute a problem twice and compare with float64. Raises: Wrong naming what is not right."""
        compute, expected, bound = self.attention() if name == ATTENTION else self.loss(name)
        found, again = compute(), compute()
        for what, first, second, truth in zip(("loss", "gradient", "targets"), found, again, expected, strict=True):
            check(what, first, truth, bound)
            if not torch.equal(first, second):
                raise Wrong(f"the {what} differs from run to run")

    def loss(self, name: str) -> tuple[Callable[[], tuple[Tensor, ...]], tuple[Tensor, ...], float]:
        """How to compute loss, gradient and targets of a problem; their truth; and the bound of their errors."""
        problem = PROBLEMS[name]
        B, W = problem.toy if self.toy else (problem.B, problem.W)
        options: dict[str, Any] = dict(problem.options)
        z, y = self.inputs(problem, B, W)
        keys = torch.nn.functional.normalize(embeddings(2, B * W, problem.D, 30), dim=-1)
        keys = keys.view(2, W, B, problem.D).transpose(0, 1).flatten(0, 2)  # in gathered order
        options["group"] = SimulatedRanks(W, 0, keys.double()) if W > 1 else ONE_RANK
        exact = z.double(), y.double() if y is not None else None
        loss, dz = loss_and_gradient(reference.bam_loss, *exact, **options)
        truth = loss, dz, reference.bam_targets(*exact, **options)
        options["group"] = SimulatedRanks(W, 0, keys.to(self.device)) if W > 1 else ONE_RANK
        options |= self.options | {"engine": WAYS[self.way].engine}
        on_device = z.to(self.device), y.to(self.device) if y is not None else None

        def compute() -> tuple[Tensor, ...]:
            loss, dz = loss_and_gradient(bam_loss, *on_device, **options)
            return loss, dz, bam_targets(*on_device, **options)

        return compute, truth, BOUNDS[problem.dtype]

    def inputs(self, problem: Problem, B: int, W: int) -> tuple[Tensor, Tensor | None]:
        """Student, and teacher or None, of rank 0: the first images of the batch of all ranks."""
        z = embeddings(problem.V, B * W, problem.D, 10)[:, :B].to(problem.dtype)
        y = embeddings(problem.R, B * W, problem.D, 20)[:, :B].to(problem.dtype) if problem.R else None
        return z, y

    def attention(self) -> tuple[Callable[[], tuple[Tensor, ...]], tuple[Tensor, ...], float]:
        """As `loss`, for the balanced attention: a weighted sum of P, its gradient, and P."""
        q, weights = embeddings(1, 24 if self.toy else 96, 40, 10)[0], embeddings(1, 96, 96, 20)[0]

        def compute(attend: Callable[..., Any], q: Tensor, **options: str) -> tuple[Tensor, ...]:
            q = q.clone().requires_grad_()
            P = attend(q, mask="self", differentiable=True, precision="exact", **options)
            total = (P * weights[: len(q), : len(q)].to(P)).sum()
            return total.detach(), torch.autograd.grad(total, q)[0], P.detach()

        truth = compute(reference.sinkhorn_attention, q.double())
        return lambda: compute(sinkhorn_attention, q.to(self.device), **self.options), truth, BOUNDS[torch.float32]

    def replay(self) -> None:
        """Capture a problem as a CUDA graph and replay it on other embeddings. Raises: Wrong."""
        problem = PROBLEMS[REPLAYED]
        options = self.options | {"engine": WAYS[self.way].engine, "group": ONE_RANK}
        z, _ = self.inputs(problem, problem.B, problem.W)
        student = z.to(self.device).requires_grad_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                warm: Any = bam_loss(student, **options)
                torch.autograd.grad(warm, student)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss: Any = bam_loss(student, **options)
            (dz,) = torch.autograd.grad(loss, student)
        with torch.no_grad():
            student.copy_(z.flip(1))
        graph.replay()
        expected: Any = bam_loss(student, **options)
        (expected_dz,) = torch.autograd.grad(expected, student)
        if not (torch.equal(loss, expected) and torch.equal(dz, expected_dz)):
            raise Wrong("the replay of a CUDA graph gives another result")


def loss_and_gradient(
    function: Callable[..., Any], student: Tensor, teacher: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient in float64."""
    student = student.clone().requires_grad_()
    loss = function(student, teacher, **options)
    (dz,) = torch.autograd.grad(loss * GRADIENT_SCALE, student)
    return loss.detach(), dz.double() / GRADIENT_SCALE


def check(what: str, found: Tensor, truth: Tensor, bound: float) -> None:
    """Check each number to within `bound` of itself and of the largest one. Raises: Wrong, also for NaN."""
    found = found.cpu().double()
    error = (found - truth).abs() / (bound * (truth.abs() + truth.abs().max()))
    print(f"  {what:<10} largest error {error.max().item():.2g} of its bound", flush=True)
    if not bool((error <= 1).all()):
        wrong = int((~(error <= 1)).sum())
        raise Wrong(f"{wrong} of {error.numel()} numbers of the {what} are wrong")


def poison(device: torch.device) -> None:
    """Fill memory with NaN and free it: the allocator hands it out next."""
    held = [torch.full((1 << 18,), math.nan, dtype=torch.float32, device=device) for _ in range(32)]
    held.append(torch.full((1 << 24,), math.nan, dtype=torch.float32, device=device))
    del held


def report_compilation() -> None:
    """Have Triton compile each kernel before its launch, with reports around it."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_and_run(kernel: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        if not warmup:
            report(stage="compiling", at=f"{at} ({kernel.fn.__name__})")
            run(kernel, *args, warmup=True, **options)
            report(stage="running", at=at)
        return run(kernel, *args, warmup=warmup, **options)

    JITFunction.run = compile_and_run


at = ""  # the problem that runs


def end_with_parent() -> None:
    """End this process once the process that started it has ended, which closes standard input."""

    def wait() -> None:
        while os.read(0, 1 << 12):
            pass
        os._exit(3)

    threading.Thread(target=wait, daemon=True).start()


def try_way(way: str, device: torch.device, toy: bool) -> dict[str, str]:
    """Run all problems of a way; returns the fields of the last report."""
    global at
    compiles = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
        (torch.zeros(1, dtype=torch.float32, device=device) + 1).item()
        here = identity(device.index)
        report(identity=here)
        if way == "cuda":
            architectures = here["extension"].partition(" for ")[2].split()
            compiles = code_for(capability(device.index), architectures).endswith("+PTX")  # by the driver, at first use
        else:
            report_compilation()
    poison(device)
    work = Check(way, device, toy)
    for name in problems_of(way):
        at = name
        print(name, flush=True)
        report(stage="compiling" if compiles else "running", at=at)
        try:
            work.run(name)
        except Wrong as wrong:
            return {"status": "failed", "reason": f"{name}: {wrong}"}
    at = "replay of a graph"
    if device.type == "cuda":
        report(stage="running", at=at)
        try:
            work.replay()
        except Wrong as wrong:
            return {"status": "failed", "reason": str(wrong)}
        torch.cuda.synchronize(device)
    return {"status": "verified"}


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
        print(f"{type(error).__name__}: {error}", flush=True)
    report(**result)
    return 0


def meaning(error: Exception) -> dict[str, str]:
    """Result of a trial that an error ended: unknown before the first problem and without memory, else failed."""
    text = f"{at}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".removeprefix(": ")
    no_memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
    return {"status": "unknown" if no_memory or not at else "failed", "reason": text}


if __name__ == "__main__":
    end_with_parent()
    status = main()
    sys.stdout.flush()
    os._exit(status)  # nothing is left to clean up, and a driver may hang in it
