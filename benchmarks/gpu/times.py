"""Times ceilings, kernels and whole steps on a GPU that nothing else uses: `python times.py --rows FILE`.

Kernels and steps are replayed as CUDA graphs, whose launches cost the host nothing. Inputs are cold (they rotate
through sets larger than the cache) or warm. Steps are also timed by the wall clock, with the host's share of it. The
gradient of each step is compared with float64 first; a wrong step is not timed.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "benchmarks" / "gpu")]

import torch  # noqa: E402
from competitors import GRADIENT_SCALE  # noqa: E402
from one_step import wait  # noqa: E402
from problem import Problem, relative_error, truth_of_embeddings  # noqa: E402
from rows import Row, Rows  # noqa: E402
from sixteen_bit import our_step, sixteen_bit_layout, sixteen_bit_problem  # noqa: E402
from torch import Tensor  # noqa: E402

from bam_kernels.backends import cpu, cuda, triton  # noqa: E402
from bam_kernels.backends.interface import FIXED_STEPS, LOG2_E, Potential  # noqa: E402
from bam_kernels.layout import Layout  # noqa: E402

EPSILON, TAU = 0.05, 0.1
# Views by shape MxNxD, the most informative problems first.
STEPS = {
    "2048x8192x4096": 8,
    "2048x8192x256": 8,
    "512x512x256": 2,
    "2048x2048x256": 2,
    "2048x65536x1024": 8,
}
TOY_STEPS = {"32x64x16": 4, "16x16x16": 2}
LARGEST_ERROR = 2e-3  # largest relative error of dz with which a 16-bit step is timed
# Kernels of which four sets of operands exceed the cache; the others are timed warm only.
LARGE = ("sinkhorn_pass", "column_lse", "match", "finish_scores")
OF_FEATURES = ("product", "half_rows", "project", "product_step")  # their time depends on the number of features


@dataclass(frozen=True)
class Clock:
    """Times functions on a device; on a CPU (toy runs) by the wall clock."""

    device: torch.device
    seconds: float  # length of one measurement

    def graph_us(self, runs: list[Callable[[], Any]]) -> float:
        """Median device time in us of one of `runs`, which are captured into one graph and replayed."""
        if self.device.type == "cpu":
            return self.wall_us(runs[0])
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles kernels, makes plans and allocates workspaces
            for run in runs:
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [run() for run in runs]  # outputs must live as long as the graph
        times, end = [], time.perf_counter() + self.seconds
        while len(times) < 10 or time.perf_counter() < end:
            begin, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(begin.elapsed_time(stop) * 1e3 / len(runs))
        del kept
        return statistics.median(times[3:])

    def wall_us(self, run: Callable[[], Any]) -> float:
        """Median us of one call until the device has finished."""
        return self.eager_us(run)[0]

    def eager_us(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Median us of one call until the device has finished, and until the call returns."""
        run()
        walls, hosts, end = [], [], time.perf_counter() + self.seconds
        while len(walls) < 5 or time.perf_counter() < end:
            wait(self.device)
            begin = time.perf_counter_ns()
            run()
            hosts.append((time.perf_counter_ns() - begin) / 1e3)
            wait(self.device)
            walls.append((time.perf_counter_ns() - begin) / 1e3)
        return statistics.median(walls), statistics.median(hosts)


def backends(device: torch.device) -> dict[str, Any]:
    """Row kernels that can run on the device, by name of the backend."""
    if device.type == "cpu":
        return {"cpu": cpu.kernels()} if cpu.unavailable() is None else {}
    modules = {"cuda": cuda, "triton": triton}
    return {name: module.kernels() for name, module in modules.items() if module.unavailable(device) is None}


def ceilings(clock: Clock, rows: Rows, toy: bool) -> None:
    """Measure the device's rates of a large copy and a large fp16 product."""
    source = torch.empty((1 << 20) if toy else (1 << 30), dtype=torch.float32, device=clock.device).normal_()
    target = torch.empty_like(source)
    gbs = 2 * source.nbytes / clock.wall_us(partial(target.copy_, source)) / 1e3
    device = "CPU" if clock.device.type == "cpu" else torch.cuda.get_device_name()
    rows.add(Row("ceiling", "copy", "torch", f"{2 * source.nbytes >> 20} MB", "wall", gbs, "GB/s", note=device))
    del source, target
    n = 256 if toy else 8192
    a, b = torch.randn(2, n, n, device=clock.device).half()
    us = clock.graph_us([lambda: a @ b])
    rows.add(Row("ceiling", "product fp16", "torch", f"{n}x{n}x{n}", "graph", 2 * n**3 / us / 1e6, "TFLOP/s"))


class Operands:
    """One set of operands for the kernels of a problem with V views of student and teacher and W ranks."""

    def __init__(self, kernels: Any, M: int, N: int, D: int, V: int, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.layout = Layout(B=M // V, V=V, L=2, T=2, D=D, R=V, W=N // (2 * M // V))
        self.kernels = kernels
        # Cubes, so that most scores are small and all lie within +-1/2, as in a real problem.
        self.scores = torch.rand(M, N, generator=generator, device=device).mul_(2).sub_(1).pow_(3).mul_(0.5)
        self.fixed = (self.scores * FIXED_STEPS).round().short() if kernels.backend != "cpu" else self.scores
        self.source, self.gradient = self.fixed.clone(), torch.empty_like(self.fixed)
        self.step = 1 / FIXED_STEPS if kernels.backend != "cpu" else 1.0
        self.scale = LOG2_E / EPSILON * self.step
        self.col = Potential(torch.zeros(N, device=device), torch.ones(N, device=device))
        self.row = Potential(torch.zeros(M, device=device), torch.ones(M, device=device))
        self.shift, self.sums, self.c = torch.zeros(3, N, device=device)
        # A close guess, as in a step, where a row's potential changes little between iterations.
        self.guess = torch.full((2, M // V), -math.ceil(LOG2_E / EPSILON / 2), dtype=torch.float32, device=device)
        self.x = torch.randn(M, D, generator=generator, device=device).half()
        self.d = torch.randn(M, D, generator=generator, device=device)
        self.z, self.k = (torch.randn(rows, D, generator=generator, device=device).half() for rows in (M, N))
        self.centre = torch.zeros(D, device=device)

    def sinkhorn_pass(self) -> Any:
        self.kernels.sinkhorn_pass(self.fixed, self.scale, self.row, self.col, self.c, False)

    def column_lse(self) -> Any:
        self.kernels.column_lse(self.fixed, self.scale, self.row, self.shift, self.sums, False)

    def finish_scores(self, m: int | None = None) -> Any:
        out = self.gradient[:m]
        row = self.row.rows(0, len(out))
        operands = self.scores[:m], None, self.step, out, None, self.scale, row, self.shift, self.sums
        self.kernels.finish_scores(*operands, accumulate=False)

    def quantize(self, m: int | None = None) -> Any:
        self.kernels.quantize(self.scores[:m], self.step, self.gradient[:m])

    def mean_unit_row(self) -> Any:
        return self.kernels.mean_unit_row(self.x[: len(self.x) // 4])

    def product_step(self) -> Any:
        return self.kernels.product_step(self.centre, self.c, self.row.mantissa, self.row.mantissa)

    def column_sums(self) -> Any:
        """The column potential of several ranks, without the sum over them."""
        return self.kernels.total_potential(self.kernels.column_totals(self.shift, self.sums, 29), 29)

    def match(self) -> Any:
        V, B, N = self.layout.V, self.layout.B, self.layout.N
        gradient = self.gradient.view(V, B, N)  # not in place: the scores must stay the same for every run
        return self.kernels.match(
            self.fixed.view(V, B, N)[:2],
            self.source.view(V, B, N),
            self.layout,
            self.col,
            self.guess,
            epsilon=EPSILON,
            temperature=TAU,
            step=self.step,
            gradient=gradient.view(torch.float16) if gradient.dtype == torch.int16 else gradient,
            gradient_factor=16384.0 * B * TAU,
        )

    def product(self) -> Any:
        return torch.mm(self.z, self.k.T)

    def half_rows(self) -> Any:
        return self.kernels.half_rows(self.x, self.centre, EPSILON)

    def project(self) -> Any:
        rows, _ = self.kernels.half_rows(self.x, self.centre, EPSILON)
        return self.kernels.project_(self.d, rows)


def kernel_times(clock: Clock, rows: Rows, toy: bool) -> None:
    """Time each kernel on 2048 x 8192 int16 scores and fp16 rows."""
    M, N, D, V = (32, 64, 16, 4) if toy else (2048, 8192, 256, 8)
    sets = 2 if toy else 4
    for backend, kernels in backends(clock.device).items():
        all_operands = [Operands(kernels, M, N, D, V, clock.device, seed) for seed in range(sets)]
        names = ["sinkhorn_pass", "column_lse", "match"]
        names += ["finish_scores", "half_rows", "project", "product_step", "column_sums"] if backend != "cpu" else []
        for name in [*names, "product"]:
            shape = f"{M}x{N}" if name not in OF_FEATURES else f"{M}x{N}x{D}"
            note = "with half_rows" if name == "project" else ""
            owner = backend if name != "product" else "torch"
            for how, runs in (("cold", all_operands), ("warm", all_operands[:1] * sets)):
                if how == "cold" and name not in LARGE:
                    continue

                def timed(name: str = name, runs: list[Operands] = runs) -> float:
                    return clock.graph_us([getattr(operands, name) for operands in runs])

                attempt(rows, "kernel", name, owner, shape, f"graph, {how}", timed, note=note)
        if backend != "cpu":
            for name in ("finish_scores", "quantize"):
                slab = [partial(getattr(all_operands[0], name), M // 4)] * sets
                labels = "kernel", name, backend, f"{M // 4}x{N}", "graph, warm"
                attempt(rows, *labels, lambda slab=slab: clock.graph_us(slab), note="a slab, as its product left it")
            labels = "kernel", "mean_unit_row", backend, f"{M // 4}x{D}", "graph, warm"
            attempt(rows, *labels, lambda runs=all_operands: clock.graph_us([o.mean_unit_row for o in runs]))
        small_kernels(clock, rows, backend, kernels, toy)


def small_kernels(clock: Clock, rows: Rows, backend: str, kernels: Any, toy: bool) -> None:
    """Time kernels that only some shapes use: one-launch Sinkhorn, G + transpose(G), rows of many features."""
    device = clock.device
    m = 32 if toy else 512
    fixed = torch.randint(-32000, 32000, (m, m), dtype=torch.int16, device=device)
    row = Potential(torch.zeros(m, device=device), torch.ones(m, device=device))
    if backend == "cuda" and kernels.fits_on_chip(m, m, torch.int16, device):

        def on_chip() -> float:
            return clock.graph_us([lambda: kernels.sinkhorn(fixed, LOG2_E / EPSILON / FIXED_STEPS, row, 3)])

        attempt(rows, "kernel", "sinkhorn_on_chip", backend, f"{m}x{m}", "graph, warm", on_chip, note="3 iterations")
    if backend == "cpu":
        return
    G = [torch.randn(4 * m, 4 * m, device=device).half() for _ in range(8)]
    symmetrize = [lambda g=g: kernels.symmetrize_(g) for g in G]
    attempt(
        rows, "kernel", "symmetrize", backend, f"{4 * m}x{4 * m}", "graph, cold", lambda: clock.graph_us(symmetrize)
    )
    x = [torch.randn(4 * m, 4096, device=device).half() for _ in range(4)]
    centre = torch.zeros(4096, device=device)
    half = [lambda x=x: kernels.half_rows(x, centre, EPSILON) for x in x]
    attempt(rows, "kernel", "half_rows", backend, f"{4 * m}x4096", "graph, cold", lambda: clock.graph_us(half))


def attempt(
    rows: Rows, kind: str, name: str, backend: str, shape: str, how: str, run: Callable[[], float], **more: Any
) -> None:
    """Measure and add a row; if the measurement raises, print and count the failure."""
    try:
        rows.add(Row(kind, name, backend, shape, how, run(), **more))
    except Exception as error:
        rows.fail(f"{kind} {name} {backend} {shape} {how}: {type(error).__name__}: {str(error)[:300]}")


def step_times(clock: Clock, rows: Rows, toy: bool, only: list[str]) -> None:
    """Time whole steps from 16-bit embeddings to the gradient, with a teacher and without."""
    for shape, V in (TOY_STEPS if toy else STEPS).items():
        for teacher in (True, False):
            if only and shape not in only:
                continue
            torch.manual_seed(0)
            begin = time.perf_counter()
            problem = sixteen_bit_problem(sixteen_bit_layout(shape, V, teacher), clock.device)
            truth = truth_of_embeddings(problem).gradient
            wait(clock.device)
            named = f"{shape}{', a teacher' if teacher else ''}"
            print(f"{named}: problem and float64 truth in {time.perf_counter() - begin:.1f} s", flush=True)
            for backend in backends(clock.device):
                try:
                    one_step(clock, rows, shape, teacher, problem, truth, backend)
                except Exception as error:
                    rows.fail(f"step {backend} {named}: {type(error).__name__}: {str(error)[:400]}")
            products(clock, rows, shape, teacher, problem)


def one_step(
    clock: Clock, rows: Rows, shape: str, teacher: bool, problem: Problem, truth: Tensor | None, backend: str
) -> None:
    """Time a backend's step on one problem, if its gradient is right."""
    leaves = [problem.student.clone().requires_grad_() for _ in range(4)]
    gradient_step = our_step(problem, backend)

    def step(leaf: Tensor = leaves[0]) -> Tensor:
        return gradient_step(leaf, problem.teacher)

    begin = time.perf_counter()
    error = relative_error(step().float() / GRADIENT_SCALE, truth)
    wait(clock.device)
    first_us = (time.perf_counter() - begin) * 1e6
    assert error is not None
    labels, common = ("step", "loss and gradient", backend, shape), {"teacher": teacher, "error": error}
    rows.add(Row(*labels, "first", first_us, note="compiles", **common))
    if not error <= LARGEST_ERROR:
        rows.fail(f"step {backend} {shape}: error {error:.2g}, at most {LARGEST_ERROR:g}: not timed")
        return
    peak = peak_mb(step, clock.device)
    wall, host = clock.eager_us(step)
    rows.add(Row(*labels, "wall", wall, peak_mb=peak, **common))
    rows.add(Row(*labels, "host", host, **common))
    attempt(rows, *labels, "graph", lambda: clock.graph_us([partial(step, leaf) for leaf in leaves]), **common)


def products(clock: Clock, rows: Rows, shape: str, teacher: bool, problem: Problem) -> None:
    """Time the three fp16 torch.mm of a step, which bound any step from below."""
    z, k = problem.student.half(), problem.keys.half()
    y = problem.teacher.half() if problem.teacher is not None else None
    G = torch.mm(z, k.T)

    def run() -> list[Tensor]:
        return [torch.mm(z, k.T), torch.mm(G, k), torch.mm(y, k.T) if y is not None else torch.mm(G.T, z)]

    attempt(rows, "step", "products alone", "torch", shape, "graph", lambda: clock.graph_us([run]), teacher=teacher)


def peak_mb(run: Callable[[], Any], device: torch.device) -> float | None:
    """Peak memory of a run beyond what was allocated before, in 10^6 bytes; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, help="file to which a JSON line is appended for each number")
    parser.add_argument("--toy", action="store_true", help="run toy sizes on the CPU")
    parser.add_argument(
        "--parts", nargs="+", choices=("ceilings", "kernels", "steps"), default=["ceilings", "kernels", "steps"]
    )
    parser.add_argument("--shapes", nargs="+", default=[], help="time only these whole steps, MxNxD")
    parser.add_argument("--seconds", type=float, default=0.15, help="seconds of each measurement (default: 0.15)")
    options = parser.parse_args()
    clock = Clock(torch.device("cpu" if options.toy else "cuda"), 0.01 if options.toy else options.seconds)
    if options.rows is not None:
        options.rows.write_text("")
    rows = Rows(options.rows)
    if "ceilings" in options.parts:
        ceilings(clock, rows, options.toy)
    if "kernels" in options.parts:
        kernel_times(clock, rows, options.toy)
    if "steps" in options.parts:
        step_times(clock, rows, options.toy, options.shapes)
    return int(rows.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
