"""Measurement of rows for `compare.py`: make a competitor, compare it with the truth, time it, write its row."""

import argparse
import gc
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "benchmarks" / "gpu")]

import torch  # noqa: E402
from compare import WRONG, Record  # noqa: E402
from comparisons import LARGEST_TRUTH, Comparison, comparisons, seconds_table, slow_kinds  # noqa: E402
from competitor import Choice, Competitor, RowName  # noqa: E402
from competitors import sinkhorn_competitors  # noqa: E402
from hardware import Machine  # noqa: E402
from one_step import wait  # noqa: E402
from our_kernels import GraphReplay  # noqa: E402
from potentials import potentials_competitors, truth_of_potentials  # noqa: E402
from problem import Problem, Truth, Work, loss_options, truth_of_embeddings, truth_of_sinkhorn  # noqa: E402
from report import Row, compare_with_truth, layout_fields, result_table  # noqa: E402
from rows import Row as Line  # noqa: E402
from sixteen_bit import Competitors, sixteen_bit_layout, sixteen_bit_problem, unavailable  # noqa: E402
from torch import Tensor  # noqa: E402

from bam_kernels import bam_loss, bam_targets, tuned  # noqa: E402
from bam_kernels.backends import cuda  # noqa: E402
from bam_kernels.layout import Layout  # noqa: E402
from bam_kernels.options import Options  # noqa: E402

MOST = 60  # repetitions at most


@dataclass(frozen=True)
class Pace:
    """Seconds for a row's warm-up, its runs timed by events and its runs timed by the wall; least repetitions."""

    warm_s: float = 0.15
    timed_s: float = 0.4
    wall_s: float = 0.15
    least: int = 7


TOY = Pace(0.0, 0.02, 0.02, 2)


def layout_of(comparison: Comparison) -> Layout:
    return sixteen_bit_layout(comparison.shape, comparison.views, comparison.teacher)


class ColdInputs:
    """Student (as a leaf) and teacher embeddings, handed out after a write that clears them from a GPU's cache."""

    def __init__(self, problem: Problem, machine: Machine) -> None:
        self.student, self.teacher = problem.student.detach().requires_grad_(), problem.teacher
        self.written = torch.empty(3 * machine.l2_bytes, dtype=torch.uint8, device=machine.device)

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        self.written.zero_()
        return self.student, self.teacher


class ProblemCompetitors:
    """Competitors and truth of one problem; a competitor of the whole loss is made when it is asked for."""

    def __init__(self, comparison: Comparison, machine: Machine, options: argparse.Namespace) -> None:
        torch.compiler.reset()
        self.comparison, self.machine, self.authors = comparison, machine, options.authors
        self.pace = TOY if options.toy else Pace()
        self.problem = sixteen_bit_problem(layout_of(comparison), machine.device)
        self.whole = comparison.part == "whole"
        if self.whole:
            compiler = "aot_eager" if options.toy else "inductor"  # inductor takes half a minute on a small machine
            self.made = Competitors(self.problem, ColdInputs(self.problem, machine), self.authors, compiler)
            return
        self.problem = Problem.generate(replace(layout_of(comparison), L=1), Options(), machine.device)
        kinds = tuple(kind.removesuffix("-graph") for kind in comparison.kinds)
        choice = Choice(kinds, ("auto",), self.authors, 3 * machine.l2_bytes)
        if comparison.part == "sinkhorn":
            self.scores = self.problem.scores()[0]
            listed = sinkhorn_competitors(self.problem, self.scores, choice)
        else:
            listed = potentials_competitors(self.problem, choice)
        self.all = {c.kind: c for c in listed}

    def present(self, kinds: list[RowName], record: Record) -> list[RowName]:
        """The kinds of rows that can run here; print and record why the others cannot."""
        reasons = {kind: self.missing(kind) for kind in kinds}
        for kind, reason in reasons.items():
            if reason is not None:
                record.leave_out(self.comparison.name, [kind], reason)
        return [kind for kind in kinds if reasons[kind] is None]

    def missing(self, kind: RowName) -> str | None:
        """Why this kind of row cannot run here; None if it can."""
        if self.whole:
            return unavailable(kind, self.problem, self.authors)
        return None if kind.removesuffix("-graph") in self.all else "cannot run here"

    def competitor(self, kind: RowName) -> Competitor:
        if self.whole:
            return self.made.competitor(kind)
        c = self.all[kind.removesuffix("-graph")]
        return replayed(c, kind) if kind.endswith("-graph") else c

    def truth(self) -> Truth:
        if self.comparison.part == "sinkhorn":
            return truth_of_sinkhorn(self.scores, self.problem.layout, self.problem.options)
        if self.comparison.part == "potentials":
            return truth_of_potentials(self.problem)
        return (
            truth_of_embeddings(self.problem) if self.problem.layout.N <= LARGEST_TRUTH else exact_truth(self.problem)
        )


def replayed(c: Competitor, kind: RowName) -> Competitor:
    """The competitor replayed as a CUDA graph on inputs of its own; its outputs are those of eager calls."""
    note = ", ".join(filter(None, (c.note, "replayed; its memory is the graph's")))
    return replace(c, kind=kind, name=f"{c.name}, graph", run=GraphReplay(c.run, c.fresh), note=note)


def exact_truth(problem: Problem) -> Truth:
    """Truth by the library's own float32 products and scores, for problems whose float64 scores fit no memory."""
    leaf = problem.student.float().requires_grad_()
    teacher = None if problem.teacher is None else problem.teacher.float()
    backend = "cuda" if cuda.unavailable(leaf.device) is None else "auto"
    named: dict[str, Any] = loss_options(problem, keep_sent=False) | {"backend": backend, "precision": "exact"}
    (gradient,) = torch.autograd.grad(bam_loss(leaf, teacher, **named), leaf)
    return Truth(bam_targets(leaf.detach(), teacher, **named), gradient)


def measure_all(options: argparse.Namespace, record: Record) -> int:
    """Measure all rows of all problems until the time is over.

    Exit status: 0; WRONG if a row of ours failed; 2 if the device takes no more calls.
    """
    end = time.monotonic() + options.seconds
    listed = comparisons(options.toy)
    if not record.rows:
        print(seconds_table(listed), flush=True)
    machine = Machine.detect("cpu" if options.toy else "cuda", 1 if options.toy else None)
    print(machine.line(), flush=True)
    ceilings(machine, record)
    note_unfinished(listed, machine, record)
    record.expect(listed)
    for comparison in listed:
        kinds = [kind for kind in comparison.kinds if kind not in record.kinds(comparison.name)]
        if not kinds:
            continue
        if time.monotonic() + comparison.seconds * len(kinds) / len(comparison.kinds) / 2 > end:
            record.leave_out(comparison.name, kinds, "no time was left for the problem")
            continue
        if not measure_comparison(comparison, kinds, machine, options, record, end):
            return 2
    return WRONG if any(row["ours"] and row["status"] != "ok" for row in record.rows) else 0


def ceilings(machine: Machine, record: Record) -> None:
    on_gpu = machine.device.type == "cuda"
    copied, product = ("8192 MB", "8192x8192x8192") if on_gpu else ("256 MB", "2048x2048x2048")
    half = "fp16" if on_gpu else "bf16"
    record.lines.add(Line("ceiling", "copy", "torch", copied, "events", machine.copy_gbs, "GB/s", note=machine.name))
    for name, gflops in ((half, machine.half_gemm_gflops), ("fp32", machine.gemm_gflops)):
        record.lines.add(Line("ceiling", f"product {name}", "torch", product, "events", gflops / 1e3, "TFLOP/s"))


def note_unfinished(listed: list[Comparison], machine: Machine, record: Record) -> None:
    """Write failing rows for what ended an earlier process: one row, or all rows if the truth was being computed."""
    last = record.unfinished()
    for comparison in listed:
        if last is not None and last[0] == comparison.name:
            kinds = [last[1]] if last[1] in comparison.kinds else list(comparison.kinds)
            note_failing(comparison, kinds, f"its process crashed or hung in {last[1]}", machine, record)


def note_failing(comparison: Comparison, kinds: list[RowName], reason: str, machine: Machine, record: Record) -> None:
    """Write a failing row for each kind that has no row."""
    for kind in kinds:
        if kind not in record.kinds(comparison.name):
            write(Row(placeholder(kind), "failing", reason), comparison, machine, record)


def measure_comparison(
    comparison: Comparison,
    kinds: list[RowName],
    machine: Machine,
    options: argparse.Namespace,
    record: Record,
    end: float,
) -> bool:
    """Measure the rows of one problem; return False if the device takes no more calls."""
    begin = time.monotonic()
    record.begin(comparison, "truth")
    truth = rows = None
    try:
        rows = ProblemCompetitors(comparison, machine, options)
        kinds = rows.present(kinds, record)
        truth = rows.truth() if kinds else None
    except Exception as error:
        note_failing(comparison, kinds, f"no truth: {error_summary(error)}", machine, record)
    if truth is not None and rows is not None:
        copy_gbs = copy_rate(comparison, machine)
        print(f"{comparison.name}: problem and truth in {time.monotonic() - begin:.1f} s", flush=True)
        for kind in kinds:
            if time.monotonic() > end:
                record.leave_out(comparison.name, [kind], "no time was left")
                continue
            record.begin(comparison, kind)
            measure_row(rows, kind, truth, copy_gbs, record)
            if not device_is_alive(machine):
                return False
        print(
            result_table(record.rows_of(comparison.name)) + "\n" if record.rows_of(comparison.name) else "", flush=True
        )
    del rows, truth
    free_memory()
    return device_is_alive(machine)


def measure_row(rows: ProblemCompetitors, kind: RowName, truth: Truth, copy_gbs: float, record: Record) -> None:
    machine, begin = rows.machine, time.monotonic()
    row, more = Row(placeholder(kind)), {}
    try:
        c = rows.competitor(kind)
        row = compare_with_truth(c, truth, rows.problem.options)
        row.copy_gbs = copy_gbs
        gflops = machine.gemm_gflops if c.precision == "float32" else machine.half_gemm_gflops
        row.floor_ms = c.work.floor_ms(copy_gbs, machine.exp_per_s, gflops)
        if row.status == "ok":
            more = time_row(row, machine, rows.pace)
    except Exception as error:
        row.status, row.reason = "failing", error_summary(error)
    more["row_s"] = round(time.monotonic() - begin, 2)
    write(row, rows.comparison, machine, record, more)
    del row
    free_memory()


def time_row(row: Row, machine: Machine, pace: Pace) -> dict[str, Any]:
    """Fill in the row's times and peak memory; return medians of wall and host times."""
    c = row.competitor
    end = time.perf_counter() + pace.warm_s
    machine.time_ms(c.run, *c.fresh())
    while time.perf_counter() < end:
        machine.time_ms(c.run, *c.fresh())
    if not c.kind.endswith("-graph"):  # a graph's memory was taken when it was captured
        peak = machine.peak_bytes(c.run, *c.fresh())
        row.peak_bytes = None if peak is None else peak + c.held_bytes
    times, end = [], time.perf_counter() + pace.timed_s
    while len(times) < pace.least or (len(times) < MOST and time.perf_counter() < end):
        times.append(machine.time_ms(c.run, *c.fresh()))
    row.times_ms = times
    wall, host, end = [], [], time.perf_counter() + pace.wall_s
    while len(wall) < pace.least or (len(wall) < MOST and time.perf_counter() < end):
        inputs = c.fresh()
        wait(machine.device)
        begin = time.perf_counter_ns()
        c.run(*inputs)
        host.append((time.perf_counter_ns() - begin) / 1e6)
        wait(machine.device)
        wall.append((time.perf_counter_ns() - begin) / 1e6)
    return {"wall_ms": median(wall), "host_ms": median(host)}


def write(
    row: Row, comparison: Comparison, machine: Machine, record: Record, more: dict[str, Any] | None = None
) -> None:
    more = {"wall_ms": None, "host_ms": None, "row_s": None} | (more or {})
    whole = comparison.part == "whole"
    head = {"benchmark": "loss" if whole else "sinkhorn", "problem": comparison.name}
    head["part"] = f"{comparison.part}{', teacher' if comparison.teacher else ''}"
    head |= layout_fields(layout_of(comparison), Options())
    if not whole:
        head |= dict.fromkeys(("L", "R", "temperature", "top_k"))
    fields = row.fields()
    tiles = tiles_of(row.competitor.kind)
    fields["note"] = ", ".join(filter(None, (fields["note"], tiles)))
    record.add(head | fields | more | machine.fields())
    if row.status != "ok":
        print(f"{comparison.name} {row.competitor.name}: FAILING: {row.reason}", flush=True)
        return
    kind = row.competitor.kind
    graph = kind.endswith("-graph") or (kind == "gemms-half" and machine.device.type == "cuda")
    hows = {"graph" if graph else "events": fields["median_ms"]}
    if not graph:
        hows |= {"wall": more["wall_ms"], "host": more["host_ms"]}
    names = {"gemms-half": "products alone"}
    name = names.get(kind, "loss and gradient" if whole else comparison.part)
    backend = kind.removesuffix("-graph")
    backend = backend.removesuffix("-int16") if whole else backend
    backend = "torch" if kind in names else backend
    peak = fields["peak_bytes"] / 1e6 if fields["peak_bytes"] is not None else None
    common = {"teacher": comparison.teacher, "peak_mb": peak, "error": fields["error_gradient"]}
    common["note"] = ", ".join(filter(None, (kind, tiles)))
    for how, ms in hows.items():
        record.lines.add(Line("step", name, backend, comparison.shape, how, ms * 1e3, **common))


def tiles_of(kind: RowName) -> str:
    """Note for a row of Triton kernels that run with tuned tiles; empty for all others."""
    file = tuned.path() if kind.startswith("triton") else None
    return "tuned tiles" if file is not None and file.exists() else ""


def placeholder(kind: RowName) -> Competitor:
    """Competitor without work, for the row of a competitor that could not be made."""
    return Competitor(kind, kind, lambda: (), lambda: None, None, Work(0, 0, 0))


def copy_rate(comparison: Comparison, machine: Machine) -> float:
    """Larger rate in GB/s of a large copy and a copy of the int16 scores' size; a small copy is mostly its launch."""
    return max(machine.copy_gbs, machine.copy_gbs_at(2 * layout_of(comparison).M * layout_of(comparison).N))


def compile_rows(options: argparse.Namespace) -> int:
    """Run once each row that compiles something: torch.compile, Triton, flash-sinkhorn; exit status 1 if one failed.

    `options.compile` is a problem, and then kinds if not all of its rows are wanted. Outputs are made too, because the
    targets have kernels of their own.
    """
    problem, *chosen = options.compile
    (comparison,) = [comparison for comparison in comparisons(options.toy) if comparison.name == problem]
    device = torch.device("cpu" if options.toy else "cuda")
    rows, failed = ProblemCompetitors(comparison, Machine(device, "", "", 0, ""), options), 0
    for kind in chosen or slow_kinds(comparison):
        if rows.missing(kind) is not None:
            continue
        begin = time.monotonic()
        try:
            c = rows.competitor(kind)
            if c.outputs is not None:
                c.outputs()
            wait(rows.machine.device)
            print(f"{comparison.name} {kind}: compiled in {time.monotonic() - begin:.1f} s", flush=True)
        except Exception as error:
            failed += 1
            print(f"{comparison.name} {kind}: FAILED: {error_summary(error)}", flush=True)
    return int(failed > 0)


def error_summary(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def device_is_alive(machine: Machine) -> bool:
    """Whether the device still takes calls; after some kernel errors a process cannot use it any more."""
    try:
        wait(machine.device)
    except RuntimeError:
        return False
    return True


def free_memory() -> None:
    """Return the memory of deleted tensors to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
