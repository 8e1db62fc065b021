"""Options, rows, the measuring loop and the table that all benchmarks share."""

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
    """MxNxD: M = views*B rows, N keys; N > key_views*B makes it one rank's share of W ranks."""
    views: int = 2
    """V, views per image."""
    key_views: int = 2
    """T, the first T views of every image are keys."""
    epsilon: float = 0.05
    iterations: int = 3
    rows: tuple[RowName, ...] = (*OURS, "eager", "compile", "gemms", "authors", "flash-sinkhorn", "flash-sinkhorn-tf32")
    """Competitors; those that cannot run on the device are left out. "-autocast": the whole loss in 16 bit."""
    isa: tuple[Isa, ...] = ("auto",)
    """Instruction sets of our CPU kernels."""
    authors: Path | None = None
    """A checkout of the authors' published code."""
    device: str = "auto"
    threads: int | None = None
    repetitions: int = 20
    warmup_s: float = 0.3
    """Seconds of untimed runs of each competitor."""
    budget_s: float = 60.0
    """A table stops after the round in which this time is over, but not before 5 rounds."""
    json: Path | None = None
    csv: Path | None = None
    profile: Path | None = None
    """A directory for one torch profiler trace per table; with nvtx installed the runs are NVTX ranges too."""

    def choice(self, machine: Machine) -> Choice:
        return Choice(self.rows, self.isa, self.authors, 3 * machine.l2_bytes)

    def problems(self, machine: Machine, *, L: int, R: int = 0, **options: Any) -> Iterator[Problem]:
        for text in self.shapes:
            layout = layout_of(*parse_shape(text), V=self.views, L=L, T=self.key_views, R=R)
            named = Options(epsilon=self.epsilon, iterations=self.iterations, **options).checked("benchmark")
            torch.compiler.reset()
            yield Problem.made(layout, named, machine.device)


@dataclass
class Row:
    """One competitor on one problem; times in milliseconds, None where it was not timed."""

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
    """Measures tables, prints them and collects their rows."""

    def __init__(
        self, benchmark: str, machine: Machine, options: BenchmarkOptions, *, unused: tuple[str, ...] = ()
    ) -> None:
        self.benchmark, self.machine, self.options, self.unused = benchmark, machine, options, unused
        self.rows: list[dict[str, Any]] = []
        print(machine.line(), flush=True)

    def table(self, part: str, problem: Problem, competitors: list[Competitor], truth: Truth) -> None:
        rows = [checked(c, truth, problem.options) for c in competitors]
        passed = [row for row in rows if row.status == "ok"]
        copy_gbs = self._copy_gbs(problem)
        for row in passed:
            self._floor_and_peak(row, copy_gbs["int16" if row.competitor.precision == "int16" else "float32"])
        measure(passed, self.machine, self.options)
        if self.options.profile is not None:
            profile(passed, self.options.profile / f"{self.benchmark}_{part}_{shape(problem)}.json".replace(" ", "_"))
        measured = [row.fields() for row in rows]
        add_ratios(measured)
        of_problem = problem_fields(problem) | dict.fromkeys(self.unused)
        head = {"benchmark": self.benchmark, "part": part} | of_problem
        self.rows += [head | row | self.machine.fields() for row in measured]
        print(f"\n{part}: {describe(of_problem)}")
        print(
            f"best copy of the scores' size {copy_gbs['float32']:.1f} GB/s (int16 {copy_gbs['int16']:.1f}), "
            f"best product {self.machine.gemm_gflops:.0f} GFLOP/s, in 16 bit {self.machine.half_gemm_gflops:.0f}"
        )
        print(formatted(measured), flush=True)
        write(self.rows, self.options.json, self.options.csv)

    def _copy_gbs(self, problem: Problem) -> dict[str, float]:
        """The ceilings again, and the rate of a copy as large as the scores, by the type of the scores."""
        self.machine.measure()
        elements = problem.layout.M * problem.layout.N
        return {name: self.machine.copy_gbs_at(elements * size) for name, size in (("float32", 4), ("int16", 2))}

    def _floor_and_peak(self, row: Row, copy_gbs: float) -> None:
        machine, c = self.machine, row.competitor
        row.copy_gbs = copy_gbs
        gemm_gflops = machine.gemm_gflops if c.precision == "float32" else machine.half_gemm_gflops
        row.floor_ms = c.work.floor_ms(row.copy_gbs, machine.exp_per_s, gemm_gflops)
        c.run(*c.fresh())  # pages of outputs that are given, and what libraries keep, are not this run's
        peak = machine.peak_bytes(c.run, *c.fresh())
        row.peak_bytes = None if peak is None else peak + c.held_bytes

    def finish(self) -> int:
        """The exit status: 1 where one of our own rows did not pass."""
        return int(any(row["ours"] and row["status"] != "ok" for row in self.rows))


def write(rows: list[dict[str, Any]], json_path: Path | None, csv_path: Path | None) -> None:
    """The files that were asked for."""
    if json_path is not None:
        write_json(json_path, rows)
    if csv_path is not None:
        write_csv(csv_path, rows)


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """An error that is NaN is written as null; the row says so in its reason."""
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
    """The largest relative error of P and of the gradient that passes."""
    bound = {"float32": 1e-5, "tf32": 2e-3, "int16": 1e-3, "fp16": 2e-3, "autocast": 5e-2}[precision]
    if top_k and precision != "float32":  # rounded scores choose other columns at the k-th place
        bound = 5e-2
    return 10 * bound if epsilon <= SMALL_EPSILON else bound


def checked(competitor: Competitor, truth: Truth, options: Options) -> Row:
    """The row with its errors; a competitor that raises or is too far from the truth fails and is not timed."""
    row = Row(competitor)
    if competitor.outputs is None:
        return row
    row.threshold = threshold_of(competitor.precision, options.epsilon, options.top_k)
    try:
        found = competitor.outputs()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        row.status, row.reason = "failing", f"{type(error).__name__}: {first}"[:200]
        return row
    row.error_P = relative_error(found.P, truth.P)
    row.error_gradient = relative_error(found.gradient, truth.gradient)
    errors = [error for error in (row.error_P, row.error_gradient) if error is not None]
    if not all(map(math.isfinite, errors)):
        row.status, row.reason = "failing", "result is not finite"
    elif not errors or max(errors) > row.threshold:
        row.status, row.reason = "failing", f"error above {row.threshold:g}" if errors else "nothing to compare"
    return row


def measure(rows: list[Row], machine: Machine, options: BenchmarkOptions) -> None:
    """Warm-up by time, then rounds of one run of each row in an order drawn anew, so that noise hits all alike."""
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
            with ranges.named(row.competitor.name):
                times[id(row)].append(machine.time_ms(row.competitor.run, *row.competitor.fresh()))
    for row in rows:
        row.times_ms = times[id(row)]


def profile(rows: list[Row], path: Path) -> None:
    """One run of each row under the torch profiler, as a Chrome trace; for Nsight, runs and their parts are ranges."""
    with contextlib.suppress(ImportError):  # without nvtx the trace has the same runs
        ranges.enable()
    path.parent.mkdir(parents=True, exist_ok=True)
    cuda = [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *cuda]) as trace:
        for row in rows:
            arguments = row.competitor.fresh()
            with contextlib.ExitStack() as marks:
                marks.enter_context(ranges.named(row.competitor.name))
                marks.enter_context(torch.profiler.record_function(row.competitor.name))
                row.competitor.run(*arguments)
    trace.export_chrome_trace(str(path))


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """x_<kind>: how many times faster than that competitor, None where it was not timed."""
    median = {row["kind"]: row["median_ms"] for row in rows}
    for row in rows:
        for kind in RATIOS:
            base, own = median.get(kind), row["median_ms"]
            row[f"x_{kind}"] = base / own if base and own else None


def number(value: float | None, digits: int = 3) -> str:
    """About `digits` significant digits without exponent; "-" for nothing."""
    if value is None:
        return "-"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}" if value else "0"


def error_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def plain_table(rows: list[dict[str, Any]]) -> str:
    """The rows' own fields, aligned."""
    cells = [[*rows[0], ""]]
    for row in rows:
        cells.append([*(number(value) if isinstance(value, float) else str(value) for value in row.values()), ""])
    return aligned(cells)


def formatted(rows: list[dict[str, Any]]) -> str:
    """The table that is printed: times in ms, memory in MB beyond the inputs, x: times faster than."""
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
    return aligned(cells)


def aligned(cells: list[list[str]]) -> str:
    """Columns of equal width, the first and the last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *middle, last in cells:
        numbers = (cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *numbers, last]).rstrip())
    return "\n".join(lines)
