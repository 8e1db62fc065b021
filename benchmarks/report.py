"""Command-line options, result rows, the timing loop and the tables that the benchmarks share."""

import contextlib
import csv
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from competitor import OURS, Choice, Competitor, Isa, RowName
from hardware import Machine
from problem import Problem, Truth, layout_of, parse_shape, relative_error

from bam_kernels import ranges
from bam_kernels.layout import Layout
from bam_kernels.options import Options

LEAST_ROUNDS = 5
RATIOS: tuple[RowName, ...] = (
    *("eager", "compile", "compile-autocast", "compile-autocast-graph", "gemms", "gemms-half"),
    *("authors", "authors-autocast", "flash-sinkhorn", "flash-sinkhorn-tf32"),
)
SMALL_EPSILON = 0.005


@dataclass
class BenchmarkOptions:
    shapes: tuple[str, ...] = ("512x1024x256", "2048x2048x256", "2048x8192x256")
    """Problem sizes MxNxD: M = views*B rows, N keys, D features. N > key_views*B is one rank's share of several."""
    views: int = 2
    """V, the number of views per image."""
    key_views: int = 2
    """T: the first T views of every image are the keys."""
    epsilon: float = 0.05
    iterations: int = 3
    rows: tuple[RowName, ...] = (*OURS, "eager", "compile", "gemms", "authors", "flash-sinkhorn", "flash-sinkhorn-tf32")
    """Competitors to measure. Rows that cannot run here are left out; "-autocast" is the whole loss in 16 bit."""
    isa: tuple[Isa, ...] = ("auto",)
    """Instruction sets of the CPU kernels to measure."""
    authors: Path | None = None
    """Path of a checkout of the authors' published code; without it their rows are left out."""
    device: str = "auto"
    threads: int | None = None
    repetitions: int = 20
    warmup_s: float = 0.3
    """Seconds for which each competitor runs untimed before it is measured."""
    budget_s: float = 60.0
    """Seconds per table: no further round starts after them, except that at least 5 rounds are run."""
    json: Path | None = None
    csv: Path | None = None
    profile: Path | None = None
    """Directory for one torch profiler trace per table. With nvtx installed, each run is also an NVTX range."""

    def choice(self, machine: Machine) -> Choice:
        return Choice(self.rows, self.isa, self.authors, 3 * machine.l2_bytes)

    def problems(self, machine: Machine, *, L: int, R: int = 0, **options: Any) -> Iterator[Problem]:
        for text in self.shapes:
            layout = layout_of(*parse_shape(text), V=self.views, L=L, T=self.key_views, R=R)
            named = Options(epsilon=self.epsilon, iterations=self.iterations, **options).checked("benchmark")
            torch.compiler.reset()
            yield Problem.generate(layout, named, machine.device)


@dataclass
class Row:
    """The result of one competitor on one problem. Times are in milliseconds, None if it was not timed."""

    competitor: Competitor
    status: str = "ok"
    reason: str = ""
    error_P: float | None = None
    error_gradient: float | None = None
    threshold: float | None = None
    times_ms: Sequence[float] = ()
    peak_bytes: int | None = None
    floor_ms: float = math.nan
    copy_gbs: float = math.nan

    def quantile(self, q: float) -> float | None:
        return torch.tensor(self.times_ms, dtype=torch.float64).quantile(q).item() if self.times_ms else None

    @property
    def median_ms(self) -> float | None:
        return self.quantile(0.5)

    def fields(self) -> dict[str, Any]:
        c = self.competitor
        median = self.median_ms
        return {
            "kind": c.kind,
            "competitor": c.name,
            "ours": c.ours,
            "precision": c.precision,
            "note": c.note,
            "status": self.status,
            "reason": self.reason,
            "median_ms": median,
            "p20_ms": self.quantile(0.2),
            "p80_ms": self.quantile(0.8),
            "repetitions": len(self.times_ms),
            "peak_bytes": self.peak_bytes,
            "bytes": c.work.bytes,
            "exps": c.work.exps,
            "flops": c.work.flops,
            "copy_at_size_gbs": self.copy_gbs,
            "floor_ms": self.floor_ms,
            "share_of_floor": self.floor_ms / median if median else None,
            "error_P": self.error_P,
            "error_gradient": self.error_gradient,
            "threshold": self.threshold,
        }


class Report:
    """Measures the tables of a benchmark, prints them and collects their rows."""

    def __init__(
        self, benchmark: str, machine: Machine, options: BenchmarkOptions, *, unused: tuple[str, ...] = ()
    ) -> None:
        self.benchmark, self.machine, self.options, self.unused = benchmark, machine, options, unused
        self.rows: list[dict[str, Any]] = []
        print(machine.line(), flush=True)

    def table(self, part: str, problem: Problem, competitors: list[Competitor], truth: Truth) -> None:
        rows = [compare_with_truth(c, truth, problem.options) for c in competitors]
        passed = [row for row in rows if row.status == "ok"]
        copy_gbs = self._copy_gbs(problem)
        for row in passed:
            self._floor_and_peak(row, copy_gbs["int16" if row.competitor.precision == "int16" else "float32"])
        measure(passed, self.machine, self.options)
        if self.options.profile is not None:
            profile(passed, self.options.profile / f"{self.benchmark}_{part}_{shape(problem)}.json".replace(" ", "_"))
        measured = [row.fields() for row in rows]
        add_ratios(measured)
        sizes = problem_fields(problem) | dict.fromkeys(self.unused)
        head = {"benchmark": self.benchmark, "part": part} | sizes
        self.rows += [head | row | self.machine.fields() for row in measured]
        print(f"\n{part}: {describe(sizes)}")
        print(
            f"best copy of the scores' size {copy_gbs['float32']:.1f} GB/s (int16 {copy_gbs['int16']:.1f}), "
            f"best product {self.machine.gemm_gflops:.0f} GFLOP/s, in 16 bit {self.machine.half_gemm_gflops:.0f}"
        )
        print(result_table(measured), flush=True)
        write(self.rows, self.options.json, self.options.csv)

    def _copy_gbs(self, problem: Problem) -> dict[str, float]:
        """Measure the machine again; return the rate of a copy as large as the scores, by the type of the scores."""
        self.machine.measure()
        elements = problem.layout.M * problem.layout.N
        return {name: self.machine.copy_gbs_at(elements * size) for name, size in (("float32", 4), ("int16", 2))}

    def _floor_and_peak(self, row: Row, copy_gbs: float) -> None:
        machine, c = self.machine, row.competitor
        row.copy_gbs = copy_gbs
        gemm_gflops = machine.gemm_gflops if c.precision == "float32" else machine.half_gemm_gflops
        row.floor_ms = c.work.floor_ms(row.copy_gbs, machine.exp_per_s, gemm_gflops)
        c.run(*c.fresh())  # first touch of preallocated outputs and workspaces, which are no part of the peak
        peak = machine.peak_bytes(c.run, *c.fresh())
        row.peak_bytes = None if peak is None else peak + c.held_bytes

    def finish(self) -> int:
        """Exit status of the benchmark: 1 if a row of this library did not pass, else 0."""
        return int(any(row["ours"] and row["status"] != "ok" for row in self.rows))


def write(rows: list[dict[str, Any]], json_path: Path | None, csv_path: Path | None) -> None:
    """Write the rows to each file whose path is given."""
    if json_path is not None:
        write_json(json_path, rows)
    if csv_path is not None:
        write_csv(csv_path, rows)


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as JSON. NaN and infinity become null; the reason of such a row says what was not finite."""
    finite = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite, indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def shape(problem: Problem) -> str:
    layout = problem.layout
    return f"{layout.M}x{layout.N}x{layout.D}"


def problem_fields(problem: Problem) -> dict[str, Any]:
    return layout_fields(problem.layout, problem.options)


def layout_fields(layout: Layout, options: Options) -> dict[str, Any]:
    sizes = {letter: getattr(layout, letter) for letter in "MNDBVLTRW"}
    return sizes | {
        "epsilon": options.epsilon,
        "temperature": options.temperature,
        "iterations": options.iterations,
        "top_k": options.top_k,
    }


def describe(fields: dict[str, Any]) -> str:
    share = ", one rank's share, reductions local" if fields["W"] > 1 else ""
    return " ".join(f"{name}={value}" for name, value in fields.items() if value is not None) + share


def threshold_of(precision: str, epsilon: float, top_k: int) -> float:
    """Largest relative error of P and of the gradient with which a competitor of this precision passes."""
    # Tensor cores cut TF32 operands off instead of rounding them: 1e-2 at our epsilon.
    bound = {"float32": 1e-5, "split": 1e-4, "tf32": 3e-2, "int16": 1e-3, "fp16": 2e-3, "autocast": 5e-2}[precision]
    if top_k and precision != "float32":  # rounded scores choose other columns at the k-th place
        bound = 5e-2
    return 10 * bound if epsilon <= SMALL_EPSILON else bound


def compare_with_truth(competitor: Competitor, truth: Truth, options: Options) -> Row:
    """Row with the errors of a competitor, failing if it raises or is too far off."""
    row = Row(competitor)
    if competitor.outputs is None:
        return row
    row.threshold = threshold_of(competitor.precision, options.epsilon, options.top_k)
    try:
        outputs = competitor.outputs()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        row.status, row.reason = "failing", f"{type(error).__name__}: {first}"[:200]
        return row
    row.error_P = relative_error(outputs.P, truth.P)
    row.error_gradient = relative_error(outputs.gradient, truth.gradient)
    errors = [error for error in (row.error_P, row.error_gradient) if error is not None]
    if not all(map(math.isfinite, errors)):
        row.status, row.reason = "failing", "result is not finite"
    elif not errors or max(errors) > row.threshold:
        row.status, row.reason = "failing", f"error above {row.threshold:g}" if errors else "nothing to compare"
    return row


def measure(rows: list[Row], machine: Machine, options: BenchmarkOptions) -> None:
    """Warm up each row for a fixed time, then time rounds in which each row runs once.

    Each round has a new random order, so that noise of the machine hits all rows alike.
    """
    for row in rows:
        end = time.perf_counter() + options.warmup_s
        machine.time_ms(row.competitor.run, *row.competitor.fresh())
        while time.perf_counter() < end:
            machine.time_ms(row.competitor.run, *row.competitor.fresh())
    order, times = random.Random(0), {id(row): [] for row in rows}
    end = time.perf_counter() + options.budget_s
    for done in range(options.repetitions):
        if done >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for row in order.sample(rows, len(rows)):
            with ranges.named_range(row.competitor.name):
                times[id(row)].append(machine.time_ms(row.competitor.run, *row.competitor.fresh()))
    for row in rows:
        row.times_ms = times[id(row)]


def profile(rows: list[Row], path: Path) -> None:
    """Write a Chrome trace of one run of each row by the torch profiler; for Nsight, each run is an NVTX range."""
    with contextlib.suppress(ImportError):  # nvtx is optional: without it the trace lacks the ranges only
        ranges.enable()
    path.parent.mkdir(parents=True, exist_ok=True)
    cuda = [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *cuda]) as trace:
        for row in rows:
            arguments = row.competitor.fresh()
            with contextlib.ExitStack() as marks:
                marks.enter_context(ranges.named_range(row.competitor.name))
                marks.enter_context(torch.profiler.record_function(row.competitor.name))
                row.competitor.run(*arguments)
    trace.export_chrome_trace(str(path))


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add a field x_<kind> to each row: how many times faster it is than that competitor, or None."""
    median = {row["kind"]: row["median_ms"] for row in rows}
    for row in rows:
        for kind in RATIOS:
            base, own = median.get(kind), row["median_ms"]
            row[f"x_{kind}"] = base / own if base and own else None


def number(value: float | None, digits: int = 3) -> str:
    """The value with about `digits` significant digits and no exponent; "-" for None."""
    if value is None:
        return "-"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}" if value else "0"


def error_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def plain_table(rows: list[dict[str, Any]]) -> str:
    """A table of the rows with one column per field."""
    cells = [[*rows[0], ""]]
    for row in rows:
        cells.append([*(number(value) if isinstance(value, float) else str(value) for value in row.values()), ""])
    return align_columns(cells)


def result_table(rows: list[dict[str, Any]]) -> str:
    """The printed table of results: times in ms, memory in MB beyond the inputs; "x eager": times faster than eager."""
    head = "row|median ms|p20|p80|reps|peak MB|GB|Gexp|GFLOP|floor ms|share|err P|err grad"
    bases = [kind for kind in RATIOS if any(row[f"x_{kind}"] is not None for row in rows)]
    cells = [[*head.split("|"), *(f"x {kind}" for kind in bases), ""]]
    for row in rows:
        if row["status"] != "ok":
            errors = [error_text(row["error_P"]), error_text(row["error_gradient"])]
            blank = ["-"] * 9
            cells.append([row["competitor"], "FAILING", *blank, *errors, *["-"] * len(bases), row["reason"]])
            continue
        peak = row["peak_bytes"]
        cells.append(
            [
                row["competitor"],
                *(number(row[key]) for key in ("median_ms", "p20_ms", "p80_ms")),
                str(row["repetitions"]),
                "-" if peak is None else f"{peak / 1e6:.1f}",
                *(f"{row[key] / 1e9:.3f}" for key in ("bytes", "exps", "flops")),
                number(row["floor_ms"]),
                "-" if row["share_of_floor"] is None else f"{row['share_of_floor']:.0%}",
                *(error_text(row[key]) for key in ("error_P", "error_gradient")),
                *(number(row[f"x_{kind}"]) for kind in bases),
                row["note"],
            ]
        )
    return align_columns(cells)


def align_columns(cells: list[list[str]]) -> str:
    """Text with one line per row of cells: the first and last columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *middle, last in cells:
        numbers = (cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *numbers, last]).rstrip())
    return "\n".join(lines)
