"""How `compare.py` measures one row: made, compared with the truth, timed, written."""

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
from common import Row, checked, formatted, layout_fields  # noqa: E402
from compare import WRONG, Record  # noqa: E402
from competitor import Choice, Competitor, RowName  # noqa: E402
from competitors import sinkhorn_competitors  # noqa: E402
from hardware import Machine  # noqa: E402
from one_step import wait  # noqa: E402
from places import LARGEST_TRUTH, Place, places, predicted  # noqa: E402
from potentials import potentials_competitors, truth_of_potentials  # noqa: E402
from problem import Problem, Truth, Work, loss_options, truth_of_embeddings, truth_of_sinkhorn  # noqa: E402
from rows import Row as Line  # noqa: E402
from sixteen_bit import Competitors, sixteen_bit_layout, sixteen_bit_problem, unavailable  # noqa: E402
from torch import Tensor  # noqa: E402

from bam_kernels import bam_loss, bam_targets, tuned  # noqa: E402
from bam_kernels.backends import cuda  # noqa: E402
from bam_kernels.layout import Layout  # noqa: E402
from bam_kernels.options import Options  # noqa: E402

MOST = 60  # repetitions


@dataclass(frozen=True)
class Pace:
    """Seconds of a row's warm-up, of runs between events and of runs by the wall; the least repetitions."""

    warm_s: float = 0.15
    timed_s: float = 0.4
    wall_s: float = 0.15
    least: int = 7


TOY = Pace(0.0, 0.02, 0.02, 2)


def layout_of(place: Place) -> Layout:
    return sixteen_bit_layout(place.shape, place.views, place.teacher)


class Cold:
    """The embeddings, a leaf and the teacher's, after a write that leaves nothing of them in a GPU's cache."""

    def __init__(self, problem: Problem, machine: Machine) -> None:
        self.student, self.teacher = problem.student.detach().requires_grad_(), problem.teacher
        self.written = torch.empty(3 * machine.l2_bytes, dtype=torch.uint8, device=machine.device)

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        self.written.zero_()
        return self.student, self.teacher


class Rows:
    """The competitors of one problem, made one by one."""

    def __init__(self, place: Place, machine: Machine, options: argparse.Namespace) -> None:
        torch.compiler.reset()
        self.place, self.machine, self.authors = place, machine, options.authors
        self.pace = TOY if options.toy else Pace()
        self.problem = sixteen_bit_problem(layout_of(place), machine.device)
        self.whole = place.part == "whole"
        if self.whole:
            compiler = "aot_eager" if options.toy else "inductor"  # which takes half a minute of a small machine
            self.made = Competitors(self.problem, Cold(self.problem, machine), self.authors, compiler)
            return
        self.problem = Problem.made(replace(layout_of(place), L=1), Options(), machine.device)
        choice = Choice(place.kinds, ("auto",), self.authors, 3 * machine.l2_bytes)
        if place.part == "sinkhorn":
            self.scores = self.problem.scores()[0]
            listed = sinkhorn_competitors(self.problem, self.scores, choice)
        else:
            listed = potentials_competitors(self.problem, choice)
        self.all = {c.kind: c for c in listed}

    def present(self, kinds: list[RowName], record: Record) -> list[RowName]:
        """The kinds of rows that can run here; prints why the others cannot."""
        reasons = {kind: self.missing(kind) for kind in kinds}
        for kind, reason in reasons.items():
            if reason is not None:
                record.leave_out(self.place.name, [kind], reason)
        return [kind for kind in kinds if reasons[kind] is None]

    def missing(self, kind: RowName) -> str | None:
        """Why there is no such row here."""
        if self.whole:
            return unavailable(kind, self.problem, self.authors)
        return None if kind in self.all else "cannot run here"

    def competitor(self, kind: RowName) -> Competitor:
        return self.made.competitor(kind) if self.whole else self.all[kind]

    def truth(self) -> Truth:
        if self.place.part == "sinkhorn":
            return truth_of_sinkhorn(self.scores, self.problem.layout, self.problem.options)
        if self.place.part == "potentials":
            return truth_of_potentials(self.problem)
        return truth_of_embeddings(self.problem) if self.problem.layout.N <= LARGEST_TRUTH else exact(self.problem)


def exact(problem: Problem) -> Truth:
    """The library's own float32 products and scores, for problems whose float64 scores no memory holds."""
    leaf = problem.student.float().requires_grad_()
    teacher = None if problem.teacher is None else problem.teacher.float()
    backend = "cuda" if cuda.unavailable(leaf.device) is None else "auto"
    named: dict[str, Any] = loss_options(problem, keep_sent=False) | {"backend": backend, "precision": "exact"}
    (gradient,) = torch.autograd.grad(bam_loss(leaf, teacher, **named), leaf)
    return Truth(bam_targets(leaf.detach(), teacher, **named), gradient)


def measured(options: argparse.Namespace, record: Record) -> int:
    """All rows of all problems, until the time is over. WRONG: rows of ours are; 2: the device is lost."""
    end = time.monotonic() + options.seconds
    listed = places(options.toy)
    if not record.rows:
        print(predicted(listed), flush=True)
    machine = Machine.found("cpu" if options.toy else "cuda", 1 if options.toy else None)
    print(machine.line(), flush=True)
    ceilings(machine, record)
    note_unfinished(listed, machine, record)
    record.expect(listed)
    for place in listed:
        kinds = [kind for kind in place.kinds if kind not in record.kinds(place.name)]
        if not kinds:
            continue
        if time.monotonic() + place.seconds * len(kinds) / len(place.kinds) / 2 > end:
            record.leave_out(place.name, kinds, "no time was left for the problem")
            continue
        if not of_place(place, kinds, machine, options, record, end):
            return 2
    return WRONG if any(row["ours"] and row["status"] != "ok" for row in record.rows) else 0


def ceilings(machine: Machine, record: Record) -> None:
    on_gpu = machine.device.type == "cuda"
    copied, product = ("8192 MB", "8192x8192x8192") if on_gpu else ("256 MB", "2048x2048x2048")
    half = "fp16" if on_gpu else "bf16"
    record.lines.add(Line("ceiling", "copy", "torch", copied, "events", machine.copy_gbs, "GB/s", note=machine.name))
    for name, gflops in ((half, machine.half_gemm_gflops), ("fp32", machine.gemm_gflops)):
        record.lines.add(Line("ceiling", f"product {name}", "torch", product, "events", gflops / 1e3, "TFLOP/s"))


def note_unfinished(listed: list[Place], machine: Machine, record: Record) -> None:
    """Failing rows for what ended an earlier process: one, or all kinds where it was the problem itself."""
    last = record.unfinished()
    for place in listed:
        if last is not None and last[0] == place.name:
            kinds = [last[1]] if last[1] in place.kinds else list(place.kinds)
            note_failing(place, kinds, f"its process crashed or hung in {last[1]}", machine, record)


def note_failing(place: Place, kinds: list[RowName], reason: str, machine: Machine, record: Record) -> None:
    """A failing row for each kind that has none."""
    for kind in kinds:
        if kind not in record.kinds(place.name):
            write(Row(nothing(kind), "failing", reason), place, machine, record)


def of_place(
    place: Place,
    kinds: list[RowName],
    machine: Machine,
    options: argparse.Namespace,
    record: Record,
    end: float,
) -> bool:
    """The rows of one problem; False: the device is lost."""
    begin = time.monotonic()
    record.begin(place, "truth")
    truth = rows = None
    try:
        rows = Rows(place, machine, options)
        kinds = rows.present(kinds, record)
        truth = rows.truth() if kinds else None
    except Exception as error:
        note_failing(place, kinds, f"no truth: {said(error)}", machine, record)
    if truth is not None and rows is not None:
        copy_gbs = copy_rate(place, machine)
        print(f"{place.name}: problem and truth in {time.monotonic() - begin:.1f} s", flush=True)
        for kind in kinds:
            if time.monotonic() > end:
                record.leave_out(place.name, [kind], "no time was left")
                continue
            record.begin(place, kind)
            one_row(rows, kind, truth, copy_gbs, record)
            if not alive(machine):
                return False
        print(formatted(record.of(place.name)) + "\n" if record.of(place.name) else "", flush=True)
    del rows, truth
    free()
    return alive(machine)


def one_row(rows: Rows, kind: RowName, truth: Truth, copy_gbs: float, record: Record) -> None:
    machine, begin = rows.machine, time.monotonic()
    row, more = Row(nothing(kind)), {}
    try:
        c = rows.competitor(kind)
        row = checked(c, truth, rows.problem.options)
        row.copy_gbs = copy_gbs
        gflops = machine.gemm_gflops if c.precision == "float32" else machine.half_gemm_gflops
        row.floor_ms = c.work.floor_ms(copy_gbs, machine.exp_per_s, gflops)
        if row.status == "ok":
            more = timed(row, machine, rows.pace)
    except Exception as error:
        row.status, row.reason = "failing", said(error)
    more["row_s"] = round(time.monotonic() - begin, 2)
    write(row, rows.place, machine, record, more)
    del row
    free()


def timed(row: Row, machine: Machine, pace: Pace) -> dict[str, Any]:
    """Fills the row's times and memory; what runs take by the wall, and the host alone."""
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
        given = c.fresh()
        wait(machine.device)
        begin = time.perf_counter_ns()
        c.run(*given)
        host.append((time.perf_counter_ns() - begin) / 1e6)
        wait(machine.device)
        wall.append((time.perf_counter_ns() - begin) / 1e6)
    return {"wall_ms": median(wall), "host_ms": median(host)}


def write(row: Row, place: Place, machine: Machine, record: Record, more: dict[str, Any] | None = None) -> None:
    more = {"wall_ms": None, "host_ms": None, "row_s": None} | (more or {})
    whole = place.part == "whole"
    head = {"benchmark": "loss" if whole else "sinkhorn", "problem": place.name}
    head["part"] = f"{place.part}{', teacher' if place.teacher else ''}"
    head |= layout_fields(layout_of(place), Options())
    if not whole:
        head |= dict.fromkeys(("L", "R", "temperature", "top_k"))
    fields = row.fields()
    tiles = tiles_of(row.competitor.kind)
    fields["note"] = ", ".join(filter(None, (fields["note"], tiles)))
    record.add(head | fields | more | machine.fields())
    if row.status != "ok":
        print(f"{place.name} {row.competitor.name}: FAILING: {row.reason}", flush=True)
        return
    kind = row.competitor.kind
    graph = kind.endswith("-graph") or (kind == "gemms-half" and machine.device.type == "cuda")
    hows = {"graph" if graph else "events": fields["median_ms"]}
    if not graph:
        hows |= {"wall": more["wall_ms"], "host": more["host_ms"]}
    names = {"gemms-half": "products alone"}
    name = names.get(kind, "loss and gradient" if whole else place.part)
    backend = kind.removesuffix("-graph").removesuffix("-int16") if whole else kind
    backend = "torch" if kind in names else backend
    peak = fields["peak_bytes"] / 1e6 if fields["peak_bytes"] is not None else None
    common = {"teacher": place.teacher, "peak_mb": peak, "error": fields["error_gradient"]}
    common["note"] = ", ".join(filter(None, (kind, tiles)))
    for how, ms in hows.items():
        record.lines.add(Line("step", name, backend, place.shape, how, ms * 1e3, **common))


def tiles_of(kind: RowName) -> str:
    """What a row of Triton's kernels must say of their tiles where a tuning run has left a file of them."""
    file = tuned.path() if kind.startswith("triton") else None
    return "tuned tiles" if file is not None and file.exists() else ""


def nothing(kind: RowName) -> Competitor:
    """Stands where a competitor could not be made."""
    return Competitor(kind, kind, lambda: (), lambda: None, None, Work(0, 0, 0))


def copy_rate(place: Place, machine: Machine) -> float:
    """GB/s of a copy as large as the int16 scores, or of a large one: a launch is most of what a small copy takes."""
    return max(machine.copy_gbs, machine.copy_gbs_at(2 * layout_of(place).M * layout_of(place).N))


def compiled(options: argparse.Namespace) -> int:
    """One run of each row of a problem that compiles something: torch.compile's, Triton's, other solvers'."""
    (place,) = [place for place in places(options.toy) if place.name == options.compile]
    device = torch.device("cpu" if options.toy else "cuda")
    rows, failed = Rows(place, Machine(device, "", "", 0, ""), options), 0
    for kind in place.kinds:
        slow = kind.startswith(("compile", "triton", "flash-sinkhorn")) and not kind.endswith("-graph")
        if not slow or rows.missing(kind) is not None:
            continue
        begin = time.monotonic()
        try:
            c = rows.competitor(kind)
            c.run(*c.fresh())
            wait(rows.machine.device)
            print(f"{place.name} {kind}: compiled in {time.monotonic() - begin:.1f} s", flush=True)
        except Exception as error:
            failed += 1
            print(f"{place.name} {kind}: FAILED: {said(error)}", flush=True)
    return int(failed > 0)


def said(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def alive(machine: Machine) -> bool:
    """Whether the device still takes calls: after some errors of a kernel a process can use it no more."""
    try:
        wait(machine.device)
    except RuntimeError:
        return False
    return True


def free() -> None:
    """Memory of what is no longer there goes back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
