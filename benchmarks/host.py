"""Time that a step of the loss takes on the host, with kernels that take no time; needs no GPU.

    python benchmarks/host.py --json benchmarks/results/host.json

A step is `loss = criterion(student, teacher); loss.backward(); student.grad = None`, with a BAMLoss made once and fp16
embeddings. On a GPU kernels run while the host goes on, so a small step takes what its host takes. Here the backends
cuda and triton get CPU tensors and kernels that return at once (null_kernels.py). Two rows compare with torch:

formula         backend="reference" at 4 images and 4 features, where an operator of torch takes its own overhead and
                hardly computes
floor           an autograd.Function that allocates loss and gradient, and scales the gradient in its backward pass:
                about the least that a loss with a gradient of its own can take

Steps run in rounds of random order, each step twice in a row. The first time is "cold": the caches of the processor
hold the code and data of another step, as they hold the model's in training; rows may share some code. The second time
is "warm": the step follows itself, as in a loop of nothing else.

us              CPU time of this process, cold and warm: median, 20th and 80th percentile
calls           calls of Python functions, generators that go on and stand-ins for kernels included
allocations     blocks of memory from torch's allocators
operators       operators of torch that Python or autograd calls, views included, without what these call in turn
launches        kernels of this library; a CUDA kernel that adds up partial sums is a part of the launch before
products        matrix products that null kernels replace
x formula       median as a multiple of the formula's, with or without a teacher as this row

Each count is taken in a further step, which is not timed. Left out is what only a GPU shows: the driver's work for each
launch, the look-up of the current stream and Triton's launcher. The backward pass runs in this thread; on a GPU
autograd hands it to another one.
"""

import gc
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from command_line import options_of
from hardware import Machine
from null_kernels import PRODUCT, NullKernels, null_kernels, unavailable
from problem import layout_of, parse_shape
from report import LEAST_ROUNDS, align_columns, describe, layout_fields, number, write
from torch import Tensor

from bam_kernels import BAMLoss
from bam_kernels.layout import Layout
from bam_kernels.options import Options

T = TypeVar("T")
PARTS = ("forward", "backward", "total")
CACHES = ("cold", "warm")
FORMULA = "reference"
FLOOR = "floor"
FORMULA_IMAGES, FORMULA_FEATURES = 4, 4
QUANTILES = ("median", "p20", "p80")
WARM_UP = 20  # steps; the first ones may compile, plan or record
OPERATORS = ("aten::", "bam_kernels::", "bam_null::")  # torch's operators, ours and the stand-in for products


@dataclass
class HostOptions:
    shapes: tuple[str, ...] = ("512x512x256",)
    """Problem sizes MxNxD on one rank: M = views*B rows, N = min(views, 2)*B keys, D features."""
    views: int = 2
    """V, the number of views per image, of the student and of the teacher."""
    backends: tuple[Literal["cuda", "triton"], ...] = ("cuda", "triton")
    teacher: tuple[bool, ...] = (False, True)
    """Whether there is a teacher; one set of rows for each value."""
    seconds: float = 10.0
    """Seconds for which the steps of one shape are timed; at least 5 rounds are run."""
    json: Path | None = None
    csv: Path | None = None


class Floor(torch.autograd.Function):
    """The least that a loss with a gradient of its own can do: allocate both, and scale the gradient."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor | None) -> Tensor:
        dz = torch.empty_like(student, dtype=torch.float32)
        ctx.save_for_backward(dz)
        return torch.empty((), dtype=torch.float32, device=student.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dz,) = ctx.saved_tensors
        return torch.mul(grads[0], dz, out=torch.empty_like(dz, dtype=torch.float16)), None


@dataclass
class Step:
    """A step of one backend, times of its forward and backward passes in ns by state of caches, and counts by part."""

    backend: str
    criterion: Callable[..., Tensor]
    student: Tensor
    teacher: Tensor | None
    times_ns: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: {caches: [] for caches in CACHES})
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    @staticmethod
    def make(backend: str, V: int, B: int, D: int, *, teacher: bool) -> "Step":
        """A step on random embeddings; on Triton by the slab engine, as on CUDA."""
        generator = torch.Generator().manual_seed(0)
        student, y = torch.randn(2, V * B, D, generator=generator).half().unbind()
        engine = {"engine": "slab"} if backend == "triton" else {}
        criterion = BAMLoss(views=V, backend=backend, **engine) if backend != FLOOR else Floor.apply
        return Step(backend, criterion, student.requires_grad_(), y if teacher else None)

    def run(self) -> tuple[int, int]:
        """Run one step; returns the CPU time of its forward and backward passes in ns."""
        begin = time.process_time_ns()
        loss = self.criterion(self.student, self.teacher)
        middle = time.process_time_ns()
        loss.backward()
        self.student.grad = None
        return middle - begin, time.process_time_ns() - middle

    def count(self, null: NullKernels) -> None:
        """Fill `counts`, each by a step of its own."""
        counters = {"calls": python_calls, "allocations": allocations, "operators": operators}
        counters |= {"launches": partial(launches, null), "products": partial(products, null)}
        self.counts = {part: {} for part in PARTS}
        for name, counter in counters.items():
            forward, loss = counter(partial(self.criterion, self.student, self.teacher))
            backward, _ = counter(loss.backward)
            self.student.grad = None
            for part, count in zip(PARTS, (forward, backward, forward + backward), strict=True):
                self.counts[part][name] = count

    def rows(self) -> list[dict[str, Any]]:
        """One row for each part: times in us, and counts."""
        rows = []
        for part in PARTS:
            head = {"backend": self.backend, "teacher": self.teacher is not None, "part": part}
            rows.append(head | {"repetitions": len(self.times_ns["cold"])} | self.counts[part])
            if self.backend == FORMULA:  # its kernels are operators of torch
                rows[-1] |= {"launches": None, "products": None}
        for caches, times in self.times_ns.items():
            ns = torch.tensor([(*pair, sum(pair)) for pair in times], dtype=torch.float64)
            quantiles = ns.quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64), dim=0).T.tolist()
            for row, us in zip(rows, quantiles, strict=True):
                row |= {f"{caches}_{name}_us": x / 1e3 for name, x in zip(QUANTILES, us, strict=True)}
        return rows


def python_calls(run: Callable[[], T]) -> tuple[int, T]:
    """Number of calls of Python functions while `run` runs, and what it returns; a generator that goes on is a call."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        result = run()
    finally:
        sys.setprofile(None)
    return calls, result


def profiled(run: Callable[[], T], **options: bool) -> tuple[torch.profiler.profile, T]:
    """The profile of `run` on the CPU, and what it returns. A dispatch mode would change what a step does."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports that there is no GPU
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], **options) as profile:
        result = run()
    return profile, result


def allocations(run: Callable[[], T]) -> tuple[int, T]:
    """Number of blocks of memory that torch allocates while `run` runs, and what it returns."""
    profile, result = profiled(run, profile_memory=True)
    events = profile.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events), result


def operators(run: Callable[[], T]) -> tuple[int, T]:
    """Number of operators of torch that no other operator of torch calls while `run` runs, and what it returns.

    An operator of this library that calls torch's counts, and so does what it calls.
    """
    profile, result = profiled(run)
    return sum(event.name.startswith(OPERATORS) and not _inside_aten(event) for event in profile.events()), result


def _inside_aten(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name.startswith("aten::") or _inside_aten(parent))


def launches(null: NullKernels, run: Callable[[], T]) -> tuple[int, T]:
    """Number of kernels of this library that `run` launches, and what it returns."""
    before = null.launches()
    result = run()
    after = null.launches()
    return (after - before).total() - (after - before)[PRODUCT], result


def products(null: NullKernels, run: Callable[[], T]) -> tuple[int, T]:
    """Number of matrix products that null kernels replaced while `run` ran, and what it returns."""
    before = null.launches()[PRODUCT]
    result = run()
    return null.launches()[PRODUCT] - before, result


def measure(steps: Sequence[Step], seconds: float) -> None:
    """Time rounds in which each step runs twice, in a new random order, so that noise hits all steps alike."""
    shuffle, end = random.Random(0).shuffle, time.perf_counter() + seconds
    order = [*steps]
    gc.collect()
    gc.disable()
    try:
        rounds = 0
        while rounds < LEAST_ROUNDS or time.perf_counter() < end:
            latest = order[-1]
            shuffle(order)
            if order[0] is latest:  # its caches would be warm
                order.reverse()
            for step in order:
                for times in step.times_ns.values():
                    times.append(step.run())
            rounds += 1
    finally:
        gc.enable()


def rows_of(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Rows of all steps, with their times as multiples of the formula's."""
    rows = [row for step in steps for row in step.rows()]
    formula = {(row["teacher"], row["part"]): row for row in rows if row["backend"] == FORMULA}
    for row in rows:
        other = formula[row["teacher"], row["part"]]
        row |= {f"{caches}_x_formula": row[f"{caches}_median_us"] / other[f"{caches}_median_us"] for caches in CACHES}
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    times = [(f"{caches} us", "p20", "p80", "x formula") for caches in CACHES]
    counts = ("calls", "allocations", "operators", "launches", "products")
    cells = [["backend", "teacher", "part", *times[0], *times[1], "reps", *counts, ""]]
    for row in rows:
        name = "formula" if row["backend"] == FORMULA else row["backend"]
        keys = [f"{caches}_{key}" for caches in CACHES for key in (*(f"{q}_us" for q in QUANTILES), "x_formula")]
        shown = [number(row[key]) for key in keys]
        shown += ["-" if row[key] is None else str(row[key]) for key in ("repetitions", *counts)]
        cells.append([name, "yes" if row["teacher"] else "no", row["part"], *shown, ""])
    return align_columns(cells)


def layout_of_shape(shape: str, views: int) -> Layout:
    """Layout of a shape on one rank. Raises: ValueError if it has more keys than one rank."""
    keys = min(views, 2)
    layout = layout_of(*parse_shape(shape), V=views, L=keys, T=keys)
    if layout.W > 1:
        raise ValueError(f"shapes: N={layout.N} must be the {layout.T * layout.B} keys of one rank, got {shape}")
    return layout


def measured_rows(options: HostOptions, layout: Layout, backends: Sequence[str]) -> list[dict[str, Any]]:
    with null_kernels(backends) as null:
        steps = []
        for teacher in options.teacher:
            for backend in backends:
                steps.append(Step.make(backend, layout.V, layout.B, layout.D, teacher=teacher))
            steps.append(Step.make(FLOOR, layout.V, layout.B, layout.D, teacher=teacher))
            steps.append(Step.make(FORMULA, layout.V, FORMULA_IMAGES, FORMULA_FEATURES, teacher=teacher))
        for step in steps:
            for _ in range(WARM_UP):
                step.run()
            step.count(null)
        measure(steps, options.seconds)
    return rows_of(steps)


def main(options: HostOptions) -> int:
    layouts = [layout_of_shape(shape, options.views) for shape in options.shapes]
    machine = Machine.detect("cpu", 1)
    print(machine.line(), flush=True)
    reasons = {backend: unavailable(backend) for backend in options.backends}
    for backend, reason in reasons.items():
        if reason:
            print(f"{backend} is left out: {reason}")
    backends = [backend for backend, reason in reasons.items() if not reason]
    versions = {"triton": version("triton") if "triton" in backends else None}
    rows: list[dict[str, Any]] = []
    for layout in layouts:
        measured = measured_rows(options, layout, backends)
        sizes = layout_fields(layout, Options()) | {"R": None}
        print(f"\n{describe(sizes)}\n{table(measured)}", flush=True)
        for row in measured:
            teacher_views = {"R": layout.V if row["teacher"] else 0}
            rows.append({"benchmark": "host"} | sizes | teacher_views | row | machine.fields() | versions)
    write(rows, options.json, options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main(options_of(HostOptions, __doc__)))
